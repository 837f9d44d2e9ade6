"""Prefill and decoding beside what people would run instead: one card of ratios, interleaved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from eval.bench import llama_cpp
from eval.bench.corpus import python_texts
from eval.bench.decode_quality import DecodeQuality, describe_quality
from eval.bench.decode_ways import (
    FOUR_BIT,
    INTEGERS,
    STORED,
    can_compile,
    passes,
    weights_of,
)
from eval.bench.machine import CLOCKS, Clock, Machine, this_machine
from rag.lm.chat_tokenizer import ChatTokenizer
from rag.lm.forward import forward, prefill_chunks
from rag.lm.native_cache import branch, native_cache
from rag.lm.prompt_lookup import PromptLookup
from rag.lm.spec import CHUNK_TOKENS

# A passage of running text, and how much of it the prompt of `copying_prompt` begins to say again.
_PASSAGE_BEGIN, _PASSAGE_END = 2_000, 4_000
_SAID_AGAIN_CHARS = 300

NOT_INSTALLED = "not installed"
NEEDS_FILE = "needs --gguf FILE"


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
        model: as the engine runs it; all its ways to write are shown, see `weights_of`.
        plain: the same weights as transformers alone runs them.
        lengths: of prompts.
        name: of the model.
        gguf: the file for llama.cpp, and of our whole numbers; rows that lack it stay empty.
        new_tokens: written after each prompt.
        rounds: how often all is run.
        clock: `cpu` or `wall`.
        quality: what the weights of decoding do to answers, for the card.
        copied: returns a round's prompt whose answer copies from it; None leaves its row out.
        on_progress: called with what is run next.
    """
    import torch

    read_clock = CLOCKS[clock]
    here = weights_of(model)
    kinds = [kind for kind in _OURS if kind.weights in here]
    ways: dict[str, Callable[[list[int]], tuple[float, float]]] = {
        kind.name: partial(_ours, model, kind, new_tokens=new_tokens, clock=read_clock)
        for kind in kinds
    }
    ways["transformers"] = partial(_plain, plain, new_tokens=new_tokens, clock=read_clock)
    notes: dict[str, str] = {}
    if INTEGERS not in here:
        lacking = "this model or file has none" if gguf else NEEDS_FILE
        lacking = lacking if can_compile() else NOT_INSTALLED
        notes |= {kind.name: lacking for kind in _OURS if kind.weights == INTEGERS}
    if not llama_cpp.is_installed():
        notes["llama.cpp"] = NOT_INSTALLED
    elif gguf is None:
        notes["llama.cpp"] = NEEDS_FILE
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
        # What people get by default, but that nothing is drafted where there is nothing to copy.
        default = INTEGERS if INTEGERS in here else STORED
        ours = _Kind(default, drafts=is_copied).name
        measured = (_way(way, taken[index, way], taken[index, ours]) for way in ways)
        rows.append(
            PeersRow(
                len(prompt(0)),
                (*measured, *missing),
                same_text=_same_text(model, kinds, prompt(0), new_tokens) if is_copied else None,
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
        " ours in the same round (decoding: to our default), above 1 ours is faster",
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
        lines += describe_quality(bench.quality)
    return "\n".join(lines)


def load_plain(folder: Path) -> Any:  # noqa: ANN401
    """Return a model's bfloat16 weights as transformers itself runs them."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, local_files_only=True
    )
    return model.eval()


@dataclass(frozen=True, slots=True)
class _Kind:
    """One of our ways to write."""

    weights: str
    drafts: bool = False

    @property
    def name(self) -> str:
        """What its rows are called."""
        weights = "" if self.weights == STORED else f", {self.weights}"
        return f"fathom{weights}{', drafts' if self.drafts else ''}"


_OURS = tuple(
    _Kind(weights, drafts) for drafts in (False, True) for weights in (STORED, FOUR_BIT, INTEGERS)
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
    with passes(model, kind.weights, cache) as found:
        lookup = PromptLookup(found, ids)
        for left in range(new_tokens, 0, -1):
            if kind.drafts:
                written.append(lookup.next_id(written[-1], most=left))
            else:
                written += found.read(written[-1:])
    return written[1:]


def _same_text(model: Any, kinds: Sequence[_Kind], ids: list[int], new_tokens: int) -> bool:  # noqa: ANN401
    """Say whether drafts leave every token as it is, in each of our ways."""
    cache = native_cache(model.config)
    for start, end in prefill_chunks(0, 0, len(ids), CHUNK_TOKENS[model.device.type]):
        logits = forward(model, [ids[start:end]], cache)
    newest = int(logits[0, -1].argmax())
    texts = {
        kind: _written(model, kind, ids, branch(cache, 1), newest, new_tokens) for kind in kinds
    }
    return all(texts[kind] == texts[_Kind(kind.weights)] for kind in kinds)


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
