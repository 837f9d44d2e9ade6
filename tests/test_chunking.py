"""Chunks: exact offsets, tiling, pages, headings and budgets over any text and tokenizer."""

import gc
import re
import time
import tracemalloc
from bisect import bisect_right
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from conftest import INGEST_DOCS, HashEmbedder
from ingest.chunking import (
    CHARS_PER_TOKEN,
    PREFIX_BYTES,
    WINDOW_CHARS,
    TokenOffsets,
    chunk_text,
    embedded_text,
    heading_path,
)
from ingest.readers.pdf import read_pdf
from rag.errors import FathomError
from rag.lm.catalog import resolve_model
from rag.settings import Settings
from rag.types import CanonicalText, Page, Section

WORDS: TokenOffsets = HashEmbedder().token_offsets


def _bytes_tokenizer(text: str) -> list[tuple[int, int]]:
    """Make a token of every byte, as a byte-level BPE without merges does."""
    return [(n, n + 1) for n, char in enumerate(text) for _ in char.encode(errors="replace")]


def _greedy_tokenizer(text: str) -> list[tuple[int, int]]:
    """Make a token of up to seven characters from wherever the text begins: cuts change it."""
    return [(n, min(n + 7, len(text))) for n in range(0, len(text), 7)]


@pytest.fixture(scope="module")
def minilm() -> TokenOffsets:
    try:
        folder = resolve_model("all-minilm-l6-v2", Settings())
    except FathomError:
        pytest.skip("all-minilm-l6-v2 is not fetched: fathom models fetch all-minilm-l6-v2")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False).offsets)


@st.composite
def contents(draw: st.DrawFn) -> CanonicalText:
    """Build texts of any script with pages that tile them and sections anywhere."""
    alphabet = st.sampled_from("ab cdé.!?\n\n  #日本語。\u3000\u200d🙂\t-'한")
    text = draw(
        st.text(alphabet, max_size=500)
        | st.text(max_size=200).map(lambda t: re.sub("[\ud800-\udfff]", "", t))
        | st.lists(st.sampled_from(["lorem ", "ipsum. ", "x" * 60, "\n\n", "日" * 30])).map("".join)
    )
    offsets = st.integers(0, max(len(text) - 1, 0))
    cuts = sorted(draw(st.sets(offsets, max_size=4)) | {0, len(text)}) if text else [0, 0]
    pages = tuple(
        Page(n, draw(st.none() | st.just(f"p{n}")), a, b)
        for n, (a, b) in enumerate(pairwise(cuts), 1)
    )
    sections = tuple(
        Section(draw(st.integers(1, 4)), draw(st.text("ab 日", min_size=1, max_size=60)), start)
        for start in draw(st.lists(offsets, max_size=6))
    )
    return CanonicalText(text, "text/plain", pages, sections)


def _check(content: CanonicalText, token_offsets: TokenOffsets, max_tokens: int) -> None:
    text = content.text
    sections = sorted(content.sections, key=lambda s: s.start)
    starts = [page.start for page in content.pages]
    chunks = chunk_text(content, title="t", token_offsets=token_offsets, max_tokens=max_tokens)
    covered = 0
    for ordinal, chunk in enumerate(chunks):
        assert chunk.ordinal == ordinal
        assert chunk.text == text[chunk.start : chunk.end] == chunk.text.strip()
        assert chunk.text
        assert not text[covered : chunk.start].strip(), "nothing lost, nothing repeated"
        assert chunk.start >= covered
        assert chunk.num_tokens == len(token_offsets(chunk.text))
        assert chunk.num_tokens <= max_tokens or len(chunk.text) == 1
        assert not any(chunk.start < s.start < chunk.end for s in sections)
        assert chunk.heading_path == heading_path(sections, chunk.start)
        assert chunk.page_first == max(bisect_right(starts, chunk.start), 1)
        assert chunk.page_last == max(bisect_right(starts, chunk.end - 1), 1)
        covered = chunk.end
    assert not text[covered:].strip()


any_text = hypothesis_settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@any_text
@given(content=contents(), max_tokens=st.integers(4, 40))
@pytest.mark.parametrize("tokenizer", [WORDS, _bytes_tokenizer, _greedy_tokenizer])
def test_chunks_are_exact_and_tile_any_text(
    tokenizer: TokenOffsets, content: CanonicalText, max_tokens: int
) -> None:
    _check(content, tokenizer, max_tokens)


@any_text
@given(content=contents(), max_tokens=st.integers(8, 254))
def test_chunks_of_the_real_tokenizer_are_exact(
    minilm: TokenOffsets, content: CanonicalText, max_tokens: int
) -> None:
    _check(content, minilm, max_tokens)


@hypothesis_settings(any_text, max_examples=40)
@given(
    title=st.text(max_size=300),
    path=st.lists(st.text("ab 日é🙂", min_size=1, max_size=300), max_size=8).map(tuple),
    words=st.lists(st.sampled_from(["lorem", "ipsum.", "日本語", "x" * 40]), min_size=300),
)
def test_what_is_embedded_fits_whatever_the_headings(
    minilm: TokenOffsets, title: str, path: tuple[str, ...], words: list[str]
) -> None:
    title = re.sub("[\ud800-\udfff]", "", title)
    sections = tuple(Section(n, heading, 0) for n, heading in enumerate(path, 1))
    content = CanonicalText(" ".join(words), "text/plain", sections=sections)
    chunks = chunk_text(content, title=title, token_offsets=minilm, max_tokens=254)
    for chunk in chunks:
        assert len(minilm(embedded_text(title, chunk.heading_path, chunk.text))) <= 254


def test_the_innermost_heading_is_kept_in_front_of_the_chunk() -> None:
    path = ("Part " + "one " * 30, "Chapter " + "two " * 40, "Fees")
    assert embedded_text("rules.pdf", path, "35 crowns") == "rules.pdf > Fees\n35 crowns"
    long = embedded_text("名" * 200, ("題" * 200,), "x").split("\n")[0]
    assert 0 < len(long.encode()) <= PREFIX_BYTES
    assert "題" in long


def test_heading_path_follows_levels() -> None:
    sections = [Section(1, "a", 0), Section(2, "b", 10), Section(2, "c", 20), Section(1, "d", 30)]
    paths = [heading_path(sections, at) for at in (5, 15, 25, 35)]
    assert paths == [("a",), ("a", "b"), ("a", "c"), ("d",)]


def test_windows_leave_no_trace() -> None:
    """A text longer than a window is cut as if it had been tokenized at once."""
    text = "\n\n".join(f"Sentence {n} tells of the number {n}." for n in range(4000))
    assert len(text) > 2 * WINDOW_CHARS
    chunks = chunk_text(
        CanonicalText(text, "text/plain"), title="t", token_offsets=WORDS, max_tokens=64
    )
    assert all(chunk.text.startswith("Sentence") for chunk in chunks)
    assert all(chunk.text.endswith(".") for chunk in chunks)
    assert min(chunk.num_tokens for chunk in chunks[:-1]) > 48


def test_one_endless_word_is_cut() -> None:
    content = CanonicalText("x" * 100_000, "text/plain")
    chunks = chunk_text(content, title="t", token_offsets=WORDS, max_tokens=64)
    assert max(len(chunk.text) for chunk in chunks) <= 64 * CHARS_PER_TOKEN
    assert "".join(chunk.text for chunk in chunks) == content.text


def test_thousands_of_sections_and_pages_stay_linear() -> None:
    def seconds(count: int) -> float:
        text = "word " * (8 * count)
        content = CanonicalText(
            text,
            "text/plain",
            tuple(Page(n + 1, None, n * 40, n * 40 + 40) for n in range(count)),
            tuple(Section(1 + n % 3, f"h{n}", n * 40) for n in range(count)),
        )
        started = time.process_time()
        chunk_text(content, title="t", token_offsets=WORDS, max_tokens=64)
        return time.process_time() - started

    # a collection looks at all that this process holds, which is no chunker's matter
    gc.disable()
    try:
        seconds(500)
        assert min(seconds(8000) for _ in range(3)) < 16 * max(seconds(1000), 0.01)
    finally:
        gc.enable()


def test_memory_stays_flat_over_a_long_text() -> None:
    content = CanonicalText("It was a dark and stormy night. " * 20_000, "text/plain")
    tracemalloc.start()
    chunks = chunk_text(content, title="t", token_offsets=WORDS, max_tokens=64)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    held = sum(len(chunk.text) + 400 for chunk in chunks)
    assert peak < held + 12 * 2**20


@pytest.mark.skipif(not INGEST_DOCS.is_dir(), reason="../shared/data/ingest_docs is not here")
def test_a_real_manual_has_exact_chunks(minilm: TokenOffsets) -> None:
    _check(read_pdf(INGEST_DOCS / "debian-policy.pdf"), minilm, 254)
