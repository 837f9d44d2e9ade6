"""Seconds to the first token of a question: document read anew, kept in memory, kept on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from threading import Event
from typing import TYPE_CHECKING, Any

from eval.bench.machine import CLOCKS, Clock, Machine, this_machine
from rag.lm.document_kv import DocumentKV, KeptPrefix, restore, snapshot
from rag.lm.engine import DocumentPrefix, PrefillProgress, Prompt
from rag.lm.forward import forward, prefill_chunks
from rag.lm.kv_bytes import kv_cache_bytes
from rag.lm.local_engine import LocalEngine
from rag.lm.native_cache import native_cache
from rag.lm.spec import CHUNK_TOKENS

if TYPE_CHECKING:
    from torch import Tensor

_BUDGET_BYTES = 2**34
_DOCUMENT = ("1:1:bench",)


@dataclass(frozen=True, slots=True)
class FirstToken:
    """Median seconds to the first token, and how many times faster than with a fresh prefill."""

    seconds: float
    ratio: float


@dataclass(frozen=True, slots=True)
class DocumentKVBench:
    """What `fathom bench document-kv` shows.

    `logit_difference` is the largest between what a kept document and one prefilled in the same
    chunks make of a question; `chunk_difference` that between two fresh prefills whose chunks end
    at other places: what the number format's rounding alone does. `peer` is transformers' own
    prefill of document and question, None if it was not run.
    """

    model: str
    dtype: str
    clock: str
    rounds: int
    machine: Machine
    document_tokens: int
    question_tokens: int
    fresh: FirstToken
    memory: FirstToken
    disk: FirstToken
    peer: FirstToken | None
    logit_difference: float
    chunk_difference: float
    same_next_token: bool
    kept_bytes: int
    predicted_bytes: int
    file_bytes: int

    @property
    def ten_questions(self) -> float | None:
        """How many times faster ten questions are than by the peer: one read anew, nine kept."""
        if self.peer is None:
            return None
        return 10 * self.peer.seconds / (self.fresh.seconds + 9 * self.memory.seconds)

    def to_json(self) -> dict[str, Any]:
        """Return the object that `fathom bench document-kv` prints last."""
        return {"bench": "document-kv", **asdict(self), "ten_questions": self.ten_questions}


def bench_document_kv(
    model: Any,  # noqa: ANN401 - a causal model of transformers
    tokenizer: Any,  # noqa: ANN401 - transformers types it as a union of backends
    folder: Path,
    *,
    name: str,
    document_tokens: int = 1500,
    question_tokens: int = 32,
    rounds: int = 3,
    clock: str = "wall",
    peer: Any = None,  # noqa: ANN401
    on_progress: Callable[[str], None] = lambda _: None,
) -> DocumentKVBench:
    """Ask an engine the same way three times a round; every question is another.

    Args:
        model: ready to run.
        tokenizer: its tokenizer.
        folder: an empty one, for what is kept on disk.
        name: of the model.
        document_tokens: 1 or more.
        question_tokens: 1 or more.
        rounds: how often all three run, in turn; medians are shown.
        clock: `wall`, or `cpu` where others have the machine for most of the time.
        peer: the same weights as transformers alone runs them, which keeps nothing.
        on_progress: called with what is run next.
    """

    def engine(document_kv: DocumentKV | None) -> LocalEngine:
        return LocalEngine(model, tokenizer, name=name, document_kv=document_kv, weights_id="bench")

    def on_disk() -> DocumentKV:
        return DocumentKV(folder, memory_bytes=0, disk_bytes=_BUDGET_BYTES)

    in_memory = DocumentKV(folder, memory_bytes=_BUDGET_BYTES, disk_bytes=_BUDGET_BYTES)
    keeping, plain = engine(in_memory), engine(None)
    spec = plain.spec
    document = _ids(document_tokens, spec.vocab_size, seed=0)
    read_clock = CLOCKS[clock]
    on_progress("keeping the document")
    _ask(keeping, document, _ids(question_tokens, spec.vocab_size, seed=1), read_clock)
    taken: dict[str, list[float]] = {"fresh": [], "memory": [], "disk": []}
    for number in range(1, rounds + 1):
        on_progress(f"round {number} of {rounds}")
        question = _ids(question_tokens, spec.vocab_size, seed=1 + number)
        ways = {"fresh": plain, "memory": keeping, "disk": engine(on_disk())}
        for way, asked in ways.items():
            taken[way].append(_ask(asked, document, question, read_clock))
        if peer is not None:
            begun = read_clock()
            read_anew(peer, document + question)
            taken.setdefault("peer", []).append(read_clock() - begun)

    on_progress("comparing logits")
    question = _ids(question_tokens, spec.vocab_size, seed=1)
    boundary = len(document)
    fresh, kept = _logits(model, document, question, boundary)
    other, _ = _logits(model, document, question, 0)
    (path,) = folder.glob("*.safetensors")
    on_disk_too = on_disk().load(path.stem, str(model.device))
    assert on_disk_too is not None  # the rounds have just read it
    found = _continue(model, on_disk_too, question)
    return DocumentKVBench(
        model=name,
        dtype=str(model.dtype).removeprefix("torch."),
        clock=clock,
        rounds=rounds,
        machine=this_machine(model.device),
        document_tokens=document_tokens,
        question_tokens=question_tokens,
        fresh=_first_token(taken, "fresh"),
        memory=_first_token(taken, "memory"),
        disk=_first_token(taken, "disk"),
        peer=None if peer is None else _first_token(taken, "peer"),
        logit_difference=float((found - fresh).abs().max()),
        chunk_difference=float((other[-1] - fresh[-1]).abs().max()),
        same_next_token=bool(found[-1].argmax() == fresh[-1].argmax()),
        kept_bytes=kept,
        predicted_bytes=kv_cache_bytes(spec, document_tokens),
        file_bytes=path.stat().st_size,
    )


def card(bench: DocumentKVBench) -> str:
    """Return the figures for people."""
    mib = 2**20
    ways = [("fresh", bench.fresh), ("in memory", bench.memory), ("on disk", bench.disk)]
    lines = []
    if bench.peer is not None:
        ways.append(("transformers", bench.peer))
        lines.append(
            "ten questions, the document read anew for the first alone, take transformers"
            f" {bench.ten_questions:.1f} times as long"
        )
    return "\n".join(
        [
            f"{bench.model}, {bench.dtype}; {bench.machine.describe()}",
            f"{bench.document_tokens:,} tokens of document, {bench.question_tokens} of question;"
            f" {bench.clock} seconds to the first token, medians of {bench.rounds} rounds",
            *(f"  {way:<12} {first.seconds:8.3f}  {first.ratio:6.1f} times" for way, first in ways),
            f"logits differ by {bench.logit_difference:.1e} at most from a fresh prefill in the"
            f" same chunks; in other chunks that itself differs by {bench.chunk_difference:.1e}",
            f"kept {bench.kept_bytes / mib:,.2f} MiB, predicted"
            f" {bench.predicted_bytes / mib:,.2f} MiB; the file {bench.file_bytes / mib:,.2f} MiB",
            *lines,
        ]
    )


def _ids(num_tokens: int, vocab_size: int, *, seed: int) -> list[int]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    return [int(n) for n in torch.randint(0, vocab_size, (num_tokens,), generator=generator)]


def _ask(engine: LocalEngine, document: list[int], question: list[int], clock: Clock) -> float:
    """Return the seconds until the whole prompt is in the cache: the first token is known then."""
    ids = (*document, *question)
    begun = clock()
    steps = engine.generate(
        Prompt((), len(ids), ids),
        max_new_tokens=1,
        stop=Event(),
        prefix=DocumentPrefix(len(document), _DOCUMENT),
    )
    seconds = 0.0
    for step in steps:
        if isinstance(step, PrefillProgress) and step.done == step.total:
            seconds = clock() - begun
    return seconds


def read_anew(model: Any, ids: list[int]) -> None:  # noqa: ANN401
    """Read a prompt to its first token as transformers alone does, in one piece."""
    import torch

    with torch.inference_mode():
        found = model(input_ids=torch.tensor([ids], device=model.device), logits_to_keep=1)
    int(found.logits[0, -1].argmax())  # waits for the GPU


def _logits(
    model: Any,  # noqa: ANN401
    document: list[int],
    question: list[int],
    boundary: int,
) -> tuple[Tensor, int]:
    """Prefill both; return the last chunk's float32 logits and the bytes of the document's cache.

    With the document's length as `boundary` the last chunk is the question.
    """
    ids, cache, kept = document + question, native_cache(model.config), 0
    logits: Any = None
    for start, end in prefill_chunks(0, boundary, len(ids), CHUNK_TOKENS[model.device.type]):
        if end < len(ids):
            forward(model, [ids[start:end]], cache)
        else:
            logits = forward(model, [ids[start:]], cache, keep=range(len(ids) - start))
        if end == boundary:
            layers = snapshot(cache, model.config.model_type)
            kept = KeptPrefix("", (), end, layers).num_bytes if layers else 0
    return logits[0].float(), kept


def _continue(model: Any, kept: KeptPrefix, question: list[int]) -> Tensor:  # noqa: ANN401
    """Return the float32 logits of a question on a kept document."""
    cache = native_cache(model.config)
    restore(kept, cache)
    logits = forward(model, [question], cache, keep=range(len(question)))
    return logits[0].float()


def _first_token(taken: dict[str, list[float]], way: str) -> FirstToken:
    ratios = [fresh / other for fresh, other in zip(taken["fresh"], taken[way], strict=True)]
    return FirstToken(median(taken[way]), median(ratios))
