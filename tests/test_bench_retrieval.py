"""The retrieval benchmark's numbers, worked by hand on a small corpus."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval.bench.bm25_floor import BM25Floor, word_windows
from eval.bench.retrieval import (
    COLUMNS,
    CachedEmbedder,
    bench_retrieval,
    card,
)
from eval.evidence_sets import load_evidence_set
from eval.metrics import evidence_read, recall_at_ranks
from eval.statistics import cluster_bootstrap
from hash_embedder import HashEmbedder
from rag.errors import ReadError
from rag.settings import Settings
from ui.cli import app

PARAGRAPHS = [
    "The quay has twelve berths and a crane of forty tons.",
    "The harbour fee is 35 crowns a night for every ship.",
    "The north beacon flashes green every four seconds.",
    "Pilots are asked for by radio on channel fourteen.",
]
TEXT = "\n\n".join(PARAGRAPHS)


def _write_set(folder: Path, questions: list[dict[str, Any]]) -> Path:
    """Write `questions` as the set covidqa of one document, the text above."""
    (folder / "covidqa").mkdir()
    document = {"doc_id": "d", "title": "harbour", "text": TEXT}
    for name, rows in (("documents", [document]), ("questions", questions)):
        with gzip.open(folder / "covidqa" / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return folder


def _question(number: int, question: str, answer: str, **more: object) -> dict[str, Any]:
    start = TEXT.index(answer)
    evidence = [{"start": start, "end": start + len(answer), **more}]
    row = {"qid": f"q{number}", "doc_id": "d", "question": question, "evidence": evidence}
    return row | {"split": "dev"}


@pytest.mark.parametrize(
    ("gold", "long_spans", "expected"),
    [
        ([(0, 10)], False, [1, 1, 1, 1, 1]),  # the first passage is it
        ([(15, 25)], False, [1, 1, 1, 1, 1]),  # half of it lies in the first passage
        ([(16, 26)], False, [0, 1, 1, 1, 1]),  # four of ten in the first, six in the second
        ([(0, 60)], False, [0, 0, 0, 0, 0]),  # no passage alone covers half of 60
        ([(0, 60)], True, [1, 1, 1, 1, 1]),  # but the first lies wholly within
        ([(70, 72), (41, 45)], False, [0, 1, 1, 1, 1]),  # any one span counts
        ([(61, 65)], False, [0, 0, 1, 1, 1]),
        ([(90, 95)], False, [0, 0, 0, 0, 0]),
    ],
)
def test_recall_at_ranks_by_hand(
    gold: list[tuple[int, int]], long_spans: bool, expected: list[int]
) -> None:
    passages = [(0, 20), (20, 40), (40, 60), (60, 80)]
    assert recall_at_ranks(passages, gold, long_spans=long_spans) == expected


def test_evidence_read_by_hand() -> None:
    assert evidence_read([(0, 10), (5, 20)], [(0, 40)], long_spans=False) == 1.0
    assert evidence_read([(0, 10), (5, 19)], [(0, 40)], long_spans=False) == 0.0
    assert evidence_read([(0, 10), (5, 20)], [(0, 40)], long_spans=True) == 0.5
    assert evidence_read([(0, 10), (30, 40)], [(5, 15), (30, 40)], long_spans=True) == 0.75
    assert evidence_read([], [(0, 4)], long_spans=False) == 0.0


def test_word_windows_overlap_by_thirty_words() -> None:
    text = " ".join(f"w{n:03d}" for n in range(400))  # five characters a word
    assert word_windows(text) == [(0, 899), (750, 1649), (1500, 1999)]
    assert word_windows("one two") == [(0, 7)]
    assert word_windows("") == []


def test_the_floor_ranks_by_rare_words() -> None:
    filler = " ".join(["common"] * 170)
    floor = BM25Floor(f"{filler} rare {filler} {filler}")
    assert floor.ranked("the rare common")[0] == floor.windows[0]
    assert len(floor.ranked("nothing of it")) == len(floor.windows)


def test_the_interval_counts_documents_not_questions() -> None:
    values = [1.0] * 50 + [0.0] * 50
    alike = cluster_bootstrap(values, ["a"] * 50 + ["b"] * 50)
    apart = cluster_bootstrap(values, [str(n) for n in range(100)])
    assert alike.mean == apart.mean == 0.5
    assert (alike.low, alike.high) == (0.0, 1.0)
    assert 0.38 < apart.low < 0.42 < 0.58 < apart.high < 0.62
    assert cluster_bootstrap(values, ["a"] * 100) == cluster_bootstrap(values, ["a"] * 100)
    assert cluster_bootstrap([0.1, 0.2], ["a", "b"]).excludes_zero
    assert not cluster_bootstrap([0.1, -0.2], ["a", "b"]).excludes_zero


def test_the_bench_finds_what_is_there(settings: Settings, tmp_path: Path) -> None:
    data = _write_set(
        tmp_path,
        [
            _question(1, "What is the harbour fee?", "35 crowns"),
            _question(2, "Which channel do pilots use?", "channel fourteen"),
            _question(3, "How does the north beacon flash?", "flashes green"),
            _question(4, "Not asked: by chance", "green", in_region=False),
            {**_question(5, "Not asked: other split", "berths"), "split": "test"},
        ],
    )
    evidence = load_evidence_set(data, "covidqa", "dev")
    assert [question.id for question in evidence.questions] == ["q1", "q2", "q3"]
    small = settings.model_copy(update={"chunk_tokens": 32})
    runs = [
        bench_retrieval(
            evidence, embedder=HashEmbedder(), settings=small, cache_folder=tmp_path / "cache"
        )
        for _ in range(2)
    ]
    assert runs[0].arms == runs[1].arms
    by_name = {arm.arm: arm for arm in runs[0].arms}
    assert list(by_name) == ["floor", "lexical", "dense", "hybrid"]
    # one window is the whole text, and 256 tokens hold all of it
    assert [by_name["floor"].recall[c].mean for c in COLUMNS] == [1.0] * len(COLUMNS)
    assert [by_name["hybrid"].recall[c].mean for c in COLUMNS] == [1.0] * len(COLUMNS)
    assert set(by_name["hybrid"].ahead_of) == {"floor", "lexical", "dense"}
    assert by_name["hybrid"].ahead_of["floor"]["@1"].mean == 0.0
    text = card(runs[0])
    assert "covidqa: 3 questions on 1 documents" in text
    assert "hybrid - floor" in text
    json.dumps(runs[0].to_json())
    assert not (settings.home / "fathom.sqlite").exists()


class ShortestFirst:
    """A reranker whose order is known."""

    name = "shortest-first"

    def scores(self, question: str, texts: Sequence[str]) -> list[float]:
        return [-float(len(text)) for text in texts]


def test_a_reranker_is_one_more_arm(settings: Settings, tmp_path: Path) -> None:
    data = _write_set(tmp_path, [_question(1, "harbour fee?", "35 crowns")])
    report = bench_retrieval(
        load_evidence_set(data, "covidqa", "dev"),
        embedder=HashEmbedder(),
        settings=settings.model_copy(update={"chunk_tokens": 32}),
        reranker=ShortestFirst(),
    )
    assert report.arms[-1].arm == "reranked"
    assert set(report.arms[-1].ahead_of) == {"floor", "lexical", "dense", "hybrid"}
    assert "reranked - hybrid" in card(report)


def test_known_vectors_are_not_computed_again(tmp_path: Path) -> None:
    texts = ["alpha", "beta", "alpha"]
    first = CachedEmbedder(HashEmbedder(), tmp_path).embed(texts)
    seen: list[int] = []
    again = CachedEmbedder(HashEmbedder(), tmp_path).embed(
        [*texts, "gamma"], on_progress=seen.append
    )
    assert seen == [1]
    assert np.array_equal(again[:3], first)
    assert np.array_equal(again, HashEmbedder().embed([*texts, "gamma"]))


def test_what_is_wrong_with_a_set_is_said(tmp_path: Path) -> None:
    with pytest.raises(ReadError, match=r"no file .*questions\.jsonl\.gz"):
        load_evidence_set(tmp_path, "covidqa", "dev")
    data = _write_set(tmp_path, [_question(1, "fee?", "35 crowns")])
    with pytest.raises(ReadError, match="no question with evidence in split 'tset'"):
        load_evidence_set(data, "covidqa", "tset")
    with pytest.raises(ReadError, match="no set 'squad'"):
        load_evidence_set(data, "squad", "dev")
    (data / "covidqa" / "documents.jsonl.gz").write_bytes(b"broken")
    with pytest.raises(ReadError, match="cannot be read"):
        load_evidence_set(data, "covidqa", "dev")


def test_the_command_says_which_file_is_missing(settings: Settings, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    result = CliRunner().invoke(app, ["bench", "retrieval", "--data", str(tmp_path)])
    assert isinstance(result.exception, ReadError)
    assert "--data" in result.exception.hint
