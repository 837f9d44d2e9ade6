"""Examples: what is read of every kind of file, and every fault that is named."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import kstest

from conftest import SHARED_DATA
from eval.evidence_sets import SPLITS, is_example_set, load_example_set
from eval.examples import EvalExample, choose, load_examples
from eval.metrics import contains_answer, exact_match, normalised, quantities, token_f1
from eval.tables import Table, write_table
from rag.errors import ReadError, TableError

GOOD: dict[str, Any] = {
    "id": "1",
    "question": "q",
    "document": "d",
    "answers": ["a"],
    "answerable": True,
}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"id": 7}, "id is 7; expected str"),
        ({"answers": "a"}, "answers is 'a'; expected list"),
        ({"answers": [" "]}, "not a word"),
        ({"answers": []}, "answerable is True with 0 answers"),
        ({"answerable": False}, "answerable is False with 1 answers"),
        ({"answerable": 1}, "answerable is 1; expected bool"),
        ({"document": True}, "document is True; expected str"),
        ({"question": " "}, "question is empty"),
        ({"answers": ["a", 1]}, "not a word"),
        ({}, "id '1' is on line 1 too"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, change: dict[str, Any], fault: str) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + json.dumps(GOOD | change) + "\n")
    with pytest.raises(ReadError, match="line 3") as caught:
        load_examples(path)
    assert fault in caught.value.message
    assert "answers (list)" in caught.value.hint


@pytest.mark.parametrize("key", sorted(GOOD))
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_text(json.dumps({k: v for k, v in GOOD.items() if k != key}))
    with pytest.raises(ReadError, match=f"line 1: {key} is missing"):
        load_examples(path)


def test_good_rows_are_read_plain_and_gzipped(tmp_path: Path) -> None:
    rows = [GOOD, {**GOOD, "id": "2", "document": 7, "answers": [], "answerable": False, "x": 0}]
    data = "\ufeff" + "\r\n".join(json.dumps(row) for row in rows)
    (tmp_path / "plain.jsonl").write_bytes(data.encode())
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(data.encode()))
    expected = [EvalExample("1", "q", "d", ("a",), True), EvalExample("2", "q", "7", (), False)]
    assert load_examples(tmp_path / "plain.jsonl") == expected
    assert load_examples(tmp_path / "packed.jsonl.gz") == expected


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"", "holds no example"),
        (b"\n \n", "holds no example"),
        (b"[1]", "line 1: is not a JSON object"),
        (b"\n\xff", "line 2: byte 1 is not UTF-8"),
        (b"[" * 100_000, "line 1: is not a JSON object"),
        (gzip.compress(json.dumps(GOOD).encode())[:-12], "cannot be read"),
        (b"\x1f\x8b\x08" + b"\0" * 7 + b"\xff" * 20, "cannot be read"),
    ],
)
def test_broken_bytes_are_named(tmp_path: Path, data: bytes, fault: str) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_bytes(data)
    with pytest.raises(ReadError, match=fault):
        load_examples(path)


def test_what_unpacks_to_more_than_memory_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.jsonl.gz"
    path.write_bytes(gzip.compress(b"\n" * (2**25 + 1)))
    assert path.stat().st_size < 2**16
    with pytest.raises(ReadError, match="unpacks to more than 32 MiB"):
        load_examples(path, most_bytes=2**25)


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ReadError, match="cannot be read"):
        load_examples(tmp_path / "none.jsonl")
    path = tmp_path / "examples.jsonl"
    path.write_text("{")
    with pytest.raises(ReadError, match="line 1: is not a JSON object"):
        load_examples(path)


def test_every_fault_of_every_row_is_named(tmp_path: Path) -> None:
    rows = [GOOD, {"id": 7, "question": "", "answers": ["a"], "answerable": False}, GOOD]
    path = tmp_path / "examples.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n{")
    with pytest.raises(ReadError) as caught:
        load_examples(path)
    assert caught.value.message.splitlines() == [
        "examples.jsonl, line 2: id is 7; expected str",
        "examples.jsonl, line 2: question is empty",
        "examples.jsonl, line 2: document is missing",
        "examples.jsonl, line 2: answerable is False with 1 answers",
        "examples.jsonl, line 3: id '1' is on line 1 too",
        "examples.jsonl, line 4: is not a JSON object",
    ]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"evidence": [{"start": 5, "end": 5}]}, "evidence holds {'start': 5, 'end': 5}"),
        ({"evidence": [{"start": -1, "end": 5}]}, "evidence holds"),
        ({"evidence": [[0, 5]]}, "evidence holds [0, 5]"),
        ({"evidence": [{"page": 0}]}, "evidence holds {'page': 0}"),
        ({"evidence": 12}, "evidence is 12; expected list"),
        ({"metric": "bleu"}, "metric is 'bleu'; expected contains, f1, number, option"),
        ({"metric": "option"}, "answers holds no letter of the options"),
        ({"question_class": "hop"}, "question_class is 'hop'; expected lookup, multi-hop"),
        ({"options": {"one": "x"}}, 'options is no {"A": "words", ...}'),
        (
            {"metric": "option", "options": {"A": "x"}, "answers": ["B"]},
            "answers holds no letter of the options",
        ),
    ],
)
def test_what_may_be_left_out_must_be_right(
    tmp_path: Path, change: dict[str, Any], fault: str
) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_text(json.dumps(GOOD | change))
    with pytest.raises(ReadError) as caught:
        load_examples(path)
    assert fault in caught.value.message


FULL = EvalExample(
    id="1",
    question="What colour?",
    document="7",
    answers=("A",),
    answerable=True,
    evidence=((3, 9),),
    pages=(2, 4),
    options={"A": "red", "B": "green"},
    metric="option",
    question_class="comparison",
)


@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".tsv", ".xlsx"])
def test_a_row_is_the_same_from_every_kind_of_file(tmp_path: Path, kind: str) -> None:
    none = EvalExample("2", "Who, then?", "harbour.md", (), False)
    more = EvalExample("3", "How many?", "harbour.md", ("12", "twelve"), True)
    one = EvalExample("4", "True?", "harbour.md", ("yes, it is",), True)
    path = tmp_path / f"examples{kind}"
    rows = [example.to_json() for example in (FULL, none, more, one)]
    if kind == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    else:
        for row in rows:
            row["answers"] = row["answers"][0] if len(row["answers"]) == 1 else row["answers"]
            for key in ("answers", "evidence", "options"):
                row[key] = json.dumps(row[key]) if isinstance(row[key], list | dict) else row[key]
        rows[3]["answerable"] = None  # left empty: it has an answer
        if kind == ".xlsx":
            rows[0]["document"] = 7  # a number, as spreadsheets keep them
        write_table(
            path, Table(tuple(dict.fromkeys(key for row in rows for key in row)), tuple(rows))
        )
    assert load_examples(path) == [FULL, none, more, one]


def test_faults_of_a_table_are_named_by_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "examples.csv"
    path.write_text("id,question,document,answers,answerable\n1,q,d,a,perhaps\n2,,d,a,yes\n")
    with pytest.raises(ReadError) as caught:
        load_examples(path)
    assert caught.value.message.splitlines() == [
        "examples.csv, line 2: answerable is 'perhaps'; expected bool",
        "examples.csv, line 3: question is missing",
    ]
    broken = tmp_path / "broken.xlsx"
    broken.write_bytes(b"PK\x03\x04 not a workbook")
    with pytest.raises(TableError, match=r"broken\.xlsx"):
        load_examples(broken)


def test_a_choice_is_seeded_and_gives_each_document_its_turn() -> None:
    examples = [
        EvalExample(f"{document}{n}", "q", document, ("a",), True)
        for document, number in (("a", 50), ("b", 50), ("c", 2), ("d", 50))
        for n in range(number)
    ]
    taken = choose(examples, documents=3, limit=20, seed=4)
    assert taken == choose(examples, documents=3, limit=20, seed=4)
    assert taken != choose(examples, documents=3, limit=20, seed=5)
    assert len(taken) == 20
    assert len({example.document for example in taken}) == 3
    assert taken == [example for example in examples if example in taken]
    by_all = choose(examples, documents=None, limit=11, seed=0)
    counts = [sum(e.document == name for e in by_all) for name in "abcd"]
    assert counts == [3, 3, 2, 3]
    assert choose(examples, documents=None, limit=None, seed=0) == examples


SETS = (
    [path for path in sorted(SHARED_DATA.iterdir()) if is_example_set(path)]
    if (SHARED_DATA.exists())
    else []
)


@pytest.mark.skipif(not SETS, reason="no evaluation data here")
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("folder", SETS, ids=lambda path: path.name)
def test_every_set_becomes_examples(tmp_path: Path, folder: Path, split: str) -> None:
    found = load_example_set(folder, split)
    path = tmp_path / "examples.jsonl"
    path.write_text("\n".join(json.dumps(example.to_json()) for example in found.examples))
    assert tuple(load_examples(path)) == found.examples  # valid, and nothing is lost
    texts = {document.id: document.text for document in found.documents}
    assert {example.document for example in found.examples} == set(texts)
    for example in found.examples:
        stretches = [texts[example.document][start:end] for start, end in example.evidence]
        if example.evidence and example.answerable and example.metric == "contains":
            assert any(contains_answer(text, example.answers) for text in stretches)
        if example.metric == "number":
            assert quantities(example.answers[0])


@pytest.mark.skipif(not SETS, reason="no evaluation data here")
def test_haystacks_move_the_evidence_evenly() -> None:
    """C0.7: depth says nothing of the question, and no filler holds an answer."""
    found = load_example_set(SHARED_DATA / "nq_passages", "dev")
    assert found == load_example_set(SHARED_DATA / "nq_passages", "dev")
    lengths = {document.id: len(document.text) for document in found.documents}
    depths = [e.evidence[0][0] / lengths[e.document] for e in found.examples]
    assert kstest(depths, "uniform").pvalue > 0.01
    by_length = [
        d for d, e in zip(depths, found.examples, strict=True) if lengths[e.document] > 3e4
    ]
    assert 0.4 < sum(by_length) / len(by_length) < 0.6
    texts = {document.id: document.text for document in found.documents}
    for example in found.examples[:50]:
        (start, end), text = example.evidence[0], texts[example.document]
        others = text[:start].splitlines() + text[end:].splitlines()
        needles = {texts[e.document][slice(*e.evidence[0])] for e in found.examples}
        assert not any(
            contains_answer(line, example.answers)
            for line in others
            if len(line) > 80 and line not in needles
        )


@pytest.mark.skipif(not SETS, reason="no evaluation data here")
def test_a_perfect_answer_has_full_marks_and_a_shrug_has_none() -> None:
    """Facts 5 and 6: the best reference counts, not the mean; two letters are no substring."""
    found = load_example_set(SHARED_DATA / "squad2_articles", "dev")
    answerable = [example for example in found.examples if example.answerable]
    several = [example for example in answerable if len(example.answers) > 1]
    assert len(several) > 500
    for example in several:
        for answer in example.answers:
            if normalised(answer):
                assert contains_answer(answer, example.answers)
                assert exact_match(answer, example.answers)
                assert token_f1(answer, example.answers) == 1.0
    short = [e for e in answerable if min(len(a) for a in e.answers) <= 2]
    assert len(short) > 5
    for example in short:
        assert not contains_answer("I do not know anything about it.", example.answers)


@pytest.mark.skipif(not SETS, reason="no evaluation data here")
def test_a_folder_or_split_without_questions_is_refused(tmp_path: Path) -> None:
    assert not is_example_set(SHARED_DATA / "ingest_docs")
    assert not is_example_set(tmp_path)
    with pytest.raises(ReadError, match="no split 'train'"):
        load_example_set(SETS[0], "train")
    (tmp_path / "questions.jsonl.gz").write_bytes(gzip.compress(b""))
    (tmp_path / "documents.jsonl.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(ReadError, match="0 questions in split 'dev'"):
        load_example_set(tmp_path, "dev")
