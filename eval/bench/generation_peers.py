"""Prefill and decoding beside what people would run instead: one card of ratios, interleaved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from eval.bench import llama_cpp
from eval.bench.decode_quality import DecodeQuality
from eval.bench.machine import CLOCKS, Clock, Machine, this_machine
from rag.lm.forward import forward, prefill_chunks
from rag.lm.four_bit import without_four_bit
from rag.lm.native_cache import branch, native_cache

NOT_INSTALLED = "not installed"


@dataclass(frozen=True, slots=True)
class Way:
    """Medians of one way to generate at one length; `ratio` of its seconds to ours, by rounds.

    Above 1, ours is faster. All are None where the peer is not there, and `note` says why.
    """

    name: str
    prefill_seconds: float | None = None
    prefill_ratio: float | None = None
    token_seconds: float | None = None
    token_ratio: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class PeersRow:
    """What each way takes for a prompt of `num_tokens`, and for a token written after it."""

    num_tokens: int
    ways: tuple[Way, ...]


@dataclass(frozen=True, slots=True)
class PeersBench:
    """What `fathom bench generation` shows."""

    model: str
    clock: str
    rounds: int
    new_tokens: int
    machine: Machine
    rows: tuple[PeersRow, ...]
    quality: DecodeQuality | None

    def to_json(self) -> dict[str, Any]:
        """Return the object that `fathom bench generation` prints last."""
        return {"bench": "generation", **asdict(self)}


def bench_generation(
    model: Any,  # noqa: ANN401 - a causal model of transformers
    plain: Any,  # noqa: ANN401
    lengths: Sequence[int],
    *,
    name: str,
    gguf: Path | None,
    new_tokens: int = 32,
    rounds: int = 3,
    clock: str = "cpu",
    quality: DecodeQuality | None = None,
    on_progress: Callable[[str], None] = lambda _: None,
) -> PeersBench:
    """Read a prompt and write after it, each way in turn.

    Args:
        model: as the engine runs it; with `use_four_bit`, both its ways are shown.
        plain: the same weights as transformers alone runs them.
        lengths: of prompts.
        name: of the model.
        gguf: the file for llama.cpp; without it that row stays empty.
        new_tokens: written after each prompt.
        rounds: how often all is run.
        clock: `cpu` or `wall`.
        quality: what decoding in 4 bits does to answers, for the card.
        on_progress: called with what is run next.
    """
    import torch

    read_clock = CLOCKS[clock]
    vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
    ways: dict[str, Callable[[list[int]], tuple[float, float]]] = {
        "fathom": lambda ids: _ours(model, ids, new_tokens, read_clock, four_bit=False),
        "transformers": lambda ids: _plain(plain, ids, new_tokens, read_clock),
    }
    if is_four_bit(model):
        ways["fathom, 4-bit"] = lambda ids: _ours(model, ids, new_tokens, read_clock, four_bit=True)
    notes: dict[str, str] = {}
    if not llama_cpp.is_installed():
        notes["llama.cpp"] = NOT_INSTALLED
    elif gguf is None:
        notes["llama.cpp"] = "needs --gguf FILE"
    else:
        peer = llama_cpp.LlamaCpp(
            gguf,
            context_tokens=max(lengths) + 2 * new_tokens + 64,
            num_threads=torch.get_num_threads(),
        )
        ways[peer.name] = lambda ids: peer.seconds(ids, new_tokens, read_clock)
    taken: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for number in range(rounds + 1):  # the first warms up, at the shortest length
        for length in lengths if number else [min(lengths)]:
            # Another prompt each round: a server would remember one that it has read.
            ids = [(1013 * number + 7919 * index) % vocabulary for index in range(length)]
            for way, run in ways.items():
                on_progress(f"round {number} of {rounds}: {length:,} tokens, {way}")
                found = run(ids)
                if number:
                    taken.setdefault((length, way), []).append(found)
    return PeersBench(
        model=name,
        clock=clock,
        rounds=rounds,
        new_tokens=new_tokens,
        machine=this_machine(model.device),
        rows=tuple(
            PeersRow(
                length,
                (
                    *(_way(way, taken[length, way], _best(taken, length)) for way in ways),
                    *(Way(way, note=note) for way, note in notes.items()),
                ),
            )
            for length in lengths
        ),
        quality=quality,
    )


def card(bench: PeersBench) -> str:
    """Return the figures for people."""
    lines = [
        f"{bench.model}; {bench.machine.describe()}",
        f"{bench.clock} seconds, medians of {bench.rounds} rounds; ratios of each way's seconds to"
        " ours in the same round (decoding: to our fastest), above 1 ours is faster",
        f"{'tokens':>7}  {'way':<44} {'prefill s':>9} {'ratio':>6} {'tokens/s':>9} {'ratio':>6}",
    ]
    for row in bench.rows:
        for way in row.ways:
            if way.prefill_seconds is None or not way.token_seconds:
                lines.append(f"{row.num_tokens:>7,}  {way.name:<44} {way.note}")
                continue
            lines.append(
                f"{row.num_tokens:>7,}  {way.name:<44} {way.prefill_seconds:>9.2f}"
                f" {way.prefill_ratio:>6.2f} {1 / way.token_seconds:>9.1f} {way.token_ratio:>6.2f}"
            )
    if bench.quality is not None:
        lines.append(describe_quality(bench.quality))
    return "\n".join(lines)


def describe_quality(quality: DecodeQuality) -> str:
    """Return what decoding in 4 bits does to answers, in a line."""
    low, high = quality.difference.low, quality.difference.high
    return (
        f"4-bit decoding: {quality.same.mean:.1%} of {quality.num_questions} answers word for word"
        f" the same; contains a gold answer {quality.fast.mean:.3f} against"
        f" {quality.plain.mean:.3f}, difference {quality.difference.mean:+.3f}"
        f" [{low:+.3f}, {high:+.3f}]; KL {quality.kl:.4f} nats, likeliest token the same for"
        f" {quality.same_token:.1%} of {quality.num_tokens:,}"
    )


def load_plain(folder: Path) -> Any:  # noqa: ANN401
    """Return a model's bfloat16 weights as transformers itself runs them."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, local_files_only=True
    )
    return model.eval()


def is_four_bit(model: Any) -> bool:  # noqa: ANN401
    """Say whether a model has 4-bit weights to decode with."""
    from rag.lm.lean_forward import lean_pass

    lean = lean_pass(model)
    return lean is not None and lean.most_few_rows > 0


def _ours(
    model: Any,  # noqa: ANN401
    ids: list[int],
    new_tokens: int,
    clock: Clock,
    *,
    four_bit: bool,
) -> tuple[float, float]:
    cache = native_cache(model.config)
    begun = clock()
    for start, end in prefill_chunks(0, 0, len(ids)):
        logits = forward(model, [ids[start:end]], cache)
    next_id = int(logits[0, -1].argmax())
    read = clock() - begun

    def write() -> float:
        own, written = branch(cache, 1), next_id
        begun = clock()
        for _ in range(new_tokens):
            written = int(forward(model, [[written]], own)[0, -1].argmax())
        return (clock() - begun) / new_tokens

    if four_bit:
        return read, write()
    with without_four_bit(model):
        return read, write()


def _plain(model: Any, ids: list[int], new_tokens: int, clock: Clock) -> tuple[float, float]:  # noqa: ANN401
    """Let transformers' own `generate` write, with and without the tokens after the first."""
    import torch

    seconds = []
    for tokens in (1, 1 + new_tokens):
        begun = clock()
        with torch.inference_mode():
            model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
            )
        seconds.append(clock() - begun)
    return seconds[0], max(seconds[1] - seconds[0], 1e-9) / new_tokens


def _best(
    taken: dict[tuple[int, str], list[tuple[float, float]]], length: int
) -> list[tuple[float, float]]:
    """Return our seconds of each round: those of 4 bits where there are such."""
    fast = taken.get((length, "fathom, 4-bit"))
    plain = taken[length, "fathom"]
    if fast is None:
        return plain
    return [(read, token) for (read, _), (_, token) in zip(plain, fast, strict=True)]


def _way(
    name: str, found: Sequence[tuple[float, float]], ours: Sequence[tuple[float, float]]
) -> Way:
    pairs = list(zip(found, ours, strict=True))
    return Way(
        name=name,
        prefill_seconds=median(read for read, _ in found),
        prefill_ratio=median(theirs[0] / own[0] for theirs, own in pairs),
        token_seconds=median(token for _, token in found),
        token_ratio=median(theirs[1] / own[1] for theirs, own in pairs),
    )
