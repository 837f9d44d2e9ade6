"""The benches beside peers, on tiny sizes: what they count, compare, print and write."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from eval.bench import embed, frameworks, search
from eval.bench.corpus import python_texts
from eval.bench.rounds import Seconds, in_turn, middle, ratio
from hash_embedder import HashEmbedder
from rag.settings import Settings
from ui.cli import app
from ui.verbs import bench_peers
from ui.verbs.bench_peers import BEGIN, END


def test_arms_run_in_turn_and_ratios_are_those_of_each_round() -> None:
    order: list[str] = []
    found = in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2)
    assert order == ["a", "b", "a", "b"]
    assert {name: len(each) for name, each in found.items()} == {"a": 2, "b": 2}
    rounds = {
        "peer": [Seconds(2, 8), Seconds(4, 8), Seconds(9, 9)],
        "ours": [Seconds(1, 2), Seconds(4, 4), Seconds(3, 1)],
    }
    assert ratio(rounds, "peer", "ours") == Seconds(2, 4)
    assert middle(rounds, "ours") == Seconds(3, 2)


def test_the_corpus_has_the_size_asked_for_and_no_more_than_there_is() -> None:
    texts = python_texts(600_000)
    assert sum(map(len, texts)) == 600_000
    assert texts == python_texts(600_000)
    with pytest.raises(ValueError, match="characters of text"):
        python_texts(10**9)


def test_search_counts_what_memory_gives_and_finds_the_nearest() -> None:
    bench = search.bench_search(3000, 32, rounds=1)
    flat, half, product = bench.rows
    assert flat.recall_at_10 == 1.0
    assert flat.ratio.cpu == 1.0
    assert half.recall_at_10 > 0.95
    assert product.recall_at_10 > 0.8
    for row, size in ((flat, 4), (half, 2)):
        read = row.read_share * bench.read_bytes_per_second * row.one.cpu
        assert read >= 3000 * 32 * size  # the share is of the best of its seconds
    assert "3,000 vectors of 32" in search.card(bench)
    json.dumps(bench.to_json())


def test_operations_of_a_token_are_those_of_a_bert(tmp_path: Path) -> None:
    config = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}
    (tmp_path / "config.json").write_text(json.dumps(config))
    projections = 6 * (4 * 384 * 384 + 2 * 384 * 1536)  # multiplied pairs, 10.6 million
    assert embed.flops_per_token(tmp_path, 0) == 2 * projections
    assert embed.flops_per_token(tmp_path, 100) == 2 * (projections + 6 * 2 * 384 * 100)


def test_ours_is_measured_and_what_is_absent_says_so(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    ours = {"fathom": lambda: frameworks.Ours(HashEmbedder(), settings), "other": None}
    bench = frameworks.bench_frameworks(python_texts(6000), ours, device=_cpu(), rounds=1)
    row, absent = bench.rows
    assert row.found == 1.0  # every sentence is found by its own words
    assert row.ask_ratio == row.ingest_ratio == Seconds(1.0, 1.0)
    assert (absent.ingest, absent.ask, absent.found) == (None, None, None)
    assert "not installed" in frameworks.card(bench)
    assert list(tmp_path.iterdir()) == []
    json.dumps(bench.to_json())


@pytest.mark.model
@pytest.mark.parametrize("name", ["llama-index", "langchain", "haystack", "txtai"])
@pytest.mark.filterwarnings("ignore")
def test_each_framework_that_is_installed_finds_what_it_read(name: str, tmp_path: Path) -> None:
    from rag.lm.catalog import resolve_model

    folder = resolve_model("all-minilm-l6-v2", Settings())
    load = frameworks.installed_frameworks(HashEmbedder(), folder, Settings())[name]
    if load is None:
        pytest.skip(f"{name} is in the extra peers")
    path = tmp_path / "harbour.txt"
    path.write_text("A ship pays 35 crowns a night at the quay. " * 3)
    assert "35 crowns" in load().ingest([path], tmp_path)("What does a ship pay?")[0]


def test_all_shows_every_bench_and_writes_between_its_marks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = (["search"], ["--vectors", "2000", "--rounds", "1"])
    monkeypatch.setattr(bench_peers, "_ALL", (tiny, tiny))
    page = tmp_path / "benchmarks.md"
    page.write_text(f"# Before\n\n{BEGIN}\nold\n{END}\n\nAfter\n")
    done = CliRunner().invoke(app, ["bench", "all", "--small", "--write", str(page), "--json"])
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert [each["bench"] for each in result["results"]] == ["search", "search"]
    text = page.read_text()
    assert text.startswith(f"# Before\n\n{BEGIN}\n")
    assert text.endswith(f"{END}\n\nAfter\n")
    assert "old" not in text
    assert "    $ fathom bench search --vectors 2000" in text
    assert "recall@10" in text
    (tmp_path / "unmarked.md").write_text("nothing")
    refused = CliRunner().invoke(app, ["bench", "all", "--write", str(tmp_path / "unmarked.md")])
    assert refused.exit_code != 0


@pytest.mark.long
@pytest.mark.model
def test_all_runs_every_bench_of_a_cpu() -> None:
    done = CliRunner().invoke(app, ["bench", "all", "--small", "--json"])
    assert done.exit_code == 0, done.stderr
    names = [each["bench"] for each in json.loads(done.stdout.splitlines()[-1])["results"]]
    assert names == [
        "embed",
        "frameworks",
        "search",
        "prefill",
        "decode",
        "threads",
        "document-kv",
        "cold",
    ]


def _cpu() -> object:
    import torch

    return torch.device("cpu")
