"""Prefill and decoding beside what people would run instead: one card of ratios, interleaved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from eval.bench import llama_cpp
from eval.bench.corpus import python_texts
from eval.bench.decode_quality import DecodeQuality
from eval.bench.machine import CLOCKS, Clock, Machine, this_machine
from rag.lm.chat_tokenizer import ChatTokenizer
from rag.lm.forward import forward, prefill_chunks
from rag.lm.four_bit import without_four_bit
from rag.lm.native_cache import branch, native_cache
from rag.lm.prompt_lookup import PromptLookup, without_drafts
from rag.lm.spec import CHUNK_TOKENS

# A passage of running text, and how much of it the prompt of `copying_prompt` begins to say again.
_PASSAGE_BEGIN, _PASSAGE_END = 2_000, 4_000
_SAID_AGAIN_CHARS = 300

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
    """What each way takes for a prompt of `num_tokens`, and for a token written after it.

    `same_text` says whether ours writes the same with drafts as without, where the answer copies
    from the prompt; None where the prompt is made up.
    """

    num_tokens: int
    ways: tuple[Way, ...]
    same_text: bool | None = None


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
    copied: Callable[[int], list[int]] | None = None,
    on_progress: Callable[[str], None] = lambda _: None,
) -> PeersBench:
    """Read a prompt and write after it, each way in turn.

    In made-up prompts there is little to copy: drafts should cost nothing there.

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
        copied: returns a round's prompt whose answer copies from it; None leaves its row out.
        on_progress: called with what is run next.
    """
    import torch

    read_clock = CLOCKS[clock]
    ways: dict[str, Callable[[list[int]], tuple[float, float]]] = {
        kind.name: partial(_ours, model, kind, new_tokens=new_tokens, clock=read_clock)
        for kind in _OURS
        if is_four_bit(model) or not kind.four_bit
    }
    ways["transformers"] = partial(_plain, plain, new_tokens=new_tokens, clock=read_clock)
    notes: dict[str, str] = {}
    if not llama_cpp.is_installed():
        notes["llama.cpp"] = NOT_INSTALLED
    elif gguf is None:
        notes["llama.cpp"] = "needs --gguf FILE"
    else:
        peer = llama_cpp.LlamaCpp(
            gguf,
            context_tokens=max([*lengths, len(copied(0)) + 16 if copied else 0])
            + 2 * new_tokens
            + 64,
            num_threads=torch.get_num_threads(),
        )
        ways[peer.name] = lambda ids: peer.seconds(ids, new_tokens, read_clock)
    vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
    prompts: list[Callable[[int], list[int]]] = [
        partial(_made_up, vocabulary, length) for length in lengths
    ]
    if copied is not None:
        prompts.append(copied)
    taken: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for number in range(rounds + 1):  # the first warms up, on the first prompt
        for index, prompt in enumerate(prompts if number else prompts[:1]):
            ids = prompt(number)
            for way, run in ways.items():
                on_progress(f"round {number} of {rounds}: {len(ids):,} tokens, {way}")
                found = run(ids)
                if number:
                    taken.setdefault((index, way), []).append(found)
    missing = tuple(Way(way, note=note) for way, note in notes.items())
    rows = []
    for index, prompt in enumerate(prompts):
        is_copied = index == len(lengths)
        # What writes fastest of ours: nothing is drafted where there is nothing to copy.
        ours = [kind.name for kind in _OURS if kind.name in ways and kind.drafts == is_copied][-1]
        measured = (_way(way, taken[index, way], taken[index, ours]) for way in ways)
        rows.append(
            PeersRow(
                len(prompt(0)),
                (*measured, *missing),
                same_text=_same_text(model, prompt(0), new_tokens) if is_copied else None,
            )
        )
    return PeersBench(
        model=name,
        clock=clock,
        rounds=rounds,
        new_tokens=new_tokens,
        machine=this_machine(model.device),
        rows=tuple(rows),
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
        if row.same_text is not None:
            same = "the same text" if row.same_text else "ANOTHER TEXT"
            lines.append(f"an answer that copies; with drafts {same} as without")
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


@dataclass(frozen=True, slots=True)
class _Kind:
    """One of our ways to write."""

    name: str
    four_bit: bool = False
    drafts: bool = False


_OURS = (
    _Kind("fathom"),
    _Kind("fathom, 4-bit", four_bit=True),
    _Kind("fathom, drafts", drafts=True),
    _Kind("fathom, 4-bit, drafts", four_bit=True, drafts=True),
)


def copying_prompt(tokenizer: ChatTokenizer, number: int) -> list[int]:
    """Return about 500 tokens that begin to say again what they have said, others each round."""
    passage = python_texts(_PASSAGE_END)[0][_PASSAGE_BEGIN:]
    return tokenizer.encode(f"Text {number}\n\n{passage}\n\n{passage[:_SAID_AGAIN_CHARS]}")


def _made_up(vocabulary: int, length: int, number: int) -> list[int]:
    """Return a prompt, another one each round: a server would remember one that it has read."""
    return [(1013 * number + 7919 * index) % vocabulary for index in range(length)]


def _ours(
    model: Any,  # noqa: ANN401
    kind: _Kind,
    ids: list[int],
    *,
    new_tokens: int,
    clock: Clock,
) -> tuple[float, float]:
    """Return seconds of reading a prompt and of each token written after it."""
    cache = native_cache(model.config)
    begun = clock()
    for start, end in prefill_chunks(0, 0, len(ids), CHUNK_TOKENS[model.device.type]):
        logits = forward(model, [ids[start:end]], cache)
    newest = int(logits[0, -1].argmax())
    read = clock() - begun
    begun = clock()
    _written(model, kind, ids, cache, newest, new_tokens)
    return read, (clock() - begun) / new_tokens


def _written(
    model: Any,  # noqa: ANN401
    kind: _Kind,
    ids: list[int],
    cache: Any,  # noqa: ANN401
    newest: int,
    new_tokens: int,
) -> list[int]:
    """Return the tokens written after a prompt and `newest`, whichever they are."""
    written = [newest]
    lookup = PromptLookup(model, ids)
    with ExitStack() as stack:
        if not kind.four_bit:
            stack.enter_context(without_four_bit(model))
        if not kind.drafts:
            stack.enter_context(without_drafts(model))
        for left in range(new_tokens, 0, -1):
            written.append(lookup.next_id(written[-1], cache, most=left))
    return written[1:]


def _same_text(model: Any, ids: list[int], new_tokens: int) -> bool:  # noqa: ANN401
    """Say whether drafts leave every token as it is, in each of our ways."""
    cache = native_cache(model.config)
    for start, end in prefill_chunks(0, 0, len(ids), CHUNK_TOKENS[model.device.type]):
        logits = forward(model, [ids[start:end]], cache)
    newest = int(logits[0, -1].argmax())
    texts = {
        kind.name: _written(model, kind, ids, branch(cache, 1), newest, new_tokens)
        for kind in _OURS
    }
    return all(
        texts[kind.name] == texts[kind.name.removesuffix(", drafts")]
        for kind in _OURS
        if kind.drafts
    )


def _plain(
    model: Any,  # noqa: ANN401
    ids: list[int],
    *,
    new_tokens: int,
    clock: Clock,
) -> tuple[float, float]:
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
