"""Embedding on a GPU, from texts to vectors, with random weights of MiniLM's shape."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.bench.gpu_run import Run

if TYPE_CHECKING:
    from rag.retrieval.embedding import Embedder

_MAX_TOKENS = 256


@dataclass(frozen=True, slots=True)
class EmbedShapes:
    """The encoder, its vocabulary, and what it reads."""

    hidden_size: int
    num_layers: int
    num_heads: int
    feed_forward: int
    num_words: int
    num_texts: int
    words_per_text: int
    num_files: int  # of which an ingest takes the texts


@dataclass(frozen=True, slots=True)
class EmbedRow:
    """One way from texts to vectors; `ratio` is the seconds of sentence-transformers to its own.

    `min_cosine` is the least one with its vectors. The row `tokens alone` is the limit that
    the tokeniser sets: it has no vectors. An ingest reads the texts from files, cuts them into its
    own chunks and stores them, too; `by 256` hands over no more than that at a time.
    """

    way: str
    texts: int
    million_tokens_per_second: float
    ratio: float
    min_cosine: float | None


def bench_embed(run: Run, shapes: EmbedShapes) -> list[EmbedRow]:
    """Embed the same texts by sentence-transformers in bfloat16, its default batches, and ours."""
    from eval.bench.ingest import plain_sentence_transformers
    from rag.retrieval.embedder_tokens import tokenizer_of
    from rag.retrieval.gpu_embedder import GpuEmbedder

    what = f"embedding {shapes.num_texts:,} texts"
    rows: list[EmbedRow] = []
    if run.too_late(what):
        return rows
    with run.section(what), TemporaryDirectory() as name:
        folder = save_encoder(Path(name), shapes)
        texts = some_texts(shapes)
        tokenizer = tokenizer_of(folder)
        num_tokens = sum(len(e.ids) for e in tokenizer.encode_batch_fast(texts))

        def add(way: str, seconds: float, cosine: float | None) -> None:
            rate = num_tokens / seconds / 1e6
            ratio = rate / rows[0].million_tokens_per_second if rows else 1.0
            rows.append(EmbedRow(way, len(texts), rate, ratio, cosine))

        device = run.device.type
        peer = plain_sentence_transformers(folder, device=device, dtype="bfloat16")
        ours = GpuEmbedder(folder, name="random", device=device)
        expected, found = peer(texts), ours.embed(texts)  # warm, and compared
        cosine = float(np.min(np.sum(expected * found, axis=1)))
        add("sentence-transformers", run.middle(lambda: peer(texts), times=3), 1.0)
        add("ours", run.middle(lambda: ours.embed(texts), times=3), cosine)
        add("tokens alone", run.middle(lambda: tokenizer.encode_batch_fast(texts), times=3), None)
        for way, queued_texts in (("an ingest, by 256", 0), ("an ingest", ours.queued_texts)):
            seconds, inside = _ingested(Path(name), texts, ours, queued_texts, shapes.num_files)
            add(way, seconds, None)
            add(f"{way}: embedding", inside, None)
    return rows


def _ingested(
    folder: Path, texts: Sequence[str], embedder: Embedder, queued_texts: int, num_files: int
) -> tuple[float, float]:
    """Return the seconds of an ingest of so many files, and those within the embedder."""
    from eval.bench.ingest import TimedEmbedder
    from ingest.pipeline import IngestFailure, ingest_files
    from ingest.sources import SourceToRead
    from rag.settings import Settings
    from rag.store.database import Database
    from rag.store.documents import DocumentStore

    sources = []
    for number in range(num_files):
        path = folder / f"part-{number}.txt"
        path.write_text("\n\n".join(texts[number::num_files]))
        sources.append(SourceToRead(path, str(path), path.name, None))
    timed = TimedEmbedder(embedder)
    timed.queued_texts = queued_texts
    with TemporaryDirectory() as home:
        settings = Settings(home=Path(home), database_url=None)
        database = Database(settings.resolved_database_url)
        store = DocumentStore(database)
        begun = time.perf_counter()
        outcomes = list(ingest_files(sources, store=store, embedder=timed, settings=settings))
        seconds = time.perf_counter() - begun
        database.engine.dispose()
    failed = [outcome for outcome in outcomes if isinstance(outcome, IngestFailure)]
    if failed:
        raise failed[0].error
    return seconds, timed.seconds


def some_texts(shapes: EmbedShapes) -> list[str]:
    """Return texts of made-up words, each a token."""
    random = Random(7)
    names = [_word(number) for number in range(shapes.num_words)]
    return [
        " ".join(random.choices(names, k=shapes.words_per_text)) for _ in range(shapes.num_texts)
    ]


def save_encoder(folder: Path, shapes: EmbedShapes) -> Path:
    """Save a random BERT with mean pooling, and a tokenizer of whole words."""
    import torch
    from sentence_transformers import SentenceTransformer
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = special + [_word(number) for number in range(shapes.num_words)]
    backend = Tokenizer(
        models.WordPiece(vocab={w: n for n, w in enumerate(vocabulary)}, unk_token="[UNK]")
    )
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=_MAX_TOKENS,
    )
    torch.manual_seed(7)
    model: Any = BertModel(
        BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=shapes.hidden_size,
            num_hidden_layers=shapes.num_layers,
            num_attention_heads=shapes.num_heads,
            intermediate_size=shapes.feed_forward,
            max_position_embeddings=512,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # A folder without modules.json is read as one with mean pooling; ours wants that file.
    SentenceTransformer(str(folder), device="cpu", local_files_only=True).save(str(folder))
    return folder


def _word(number: int) -> str:
    """Return a word of letters that no other number has."""
    letters = "bcdfghjklmnprstvz", "aeiou"
    word = ""
    for place in range(6):
        number, index = divmod(number, len(letters[place % 2]))
        word += letters[place % 2][index]
    return word


def lines(rows: Sequence[EmbedRow]) -> list[str]:
    """Return the figures for people."""
    if not rows:
        return []
    return [
        "",
        f"{'embedding':<28} {'texts':>8} {'M tokens/s':>11} {'ratio':>6}  least cosine",
        *(
            f"{row.way:<28} {row.texts:>8,} {row.million_tokens_per_second:>11.3f}"
            f" {row.ratio:>6.2f}  {'-' if row.min_cosine is None else f'{row.min_cosine:.5f}'}"
            for row in rows
        ),
    ]
