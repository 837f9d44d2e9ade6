"""How fast texts are embedded: the machine's ceiling, sentence-transformers and ours, in turn."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.bench.machine import CLOCKS, Machine, matmul_flops_per_second, this_machine
from eval.bench.rounds import Seconds, in_turn, middle, ratio
from rag.retrieval.embedding import Embedder

if TYPE_CHECKING:
    import torch

    from eval.bench.ingest import Peer

_MATMUL_SIDE = 1024
MAX_DRIFT = 0.05  # of the ceiling from start to end; beyond it the machine was disturbed


@dataclass(frozen=True, slots=True)
class EmbedRow:
    """One way to embed; `ratio` is the peer's seconds to its own, `share` that of the limit."""

    name: str
    tokens_per_second: Seconds
    ratio: Seconds
    share: float
    min_cosine: float


@dataclass(frozen=True, slots=True)
class EmbedBench:
    """What `fathom bench embed` shows.

    `limit_tokens_per_second` is the ceiling, a bfloat16 matrix product where the CPU has them, over
    the operations of a token: CPU seconds, as the shares are. `question` is one alone.
    """

    machine: Machine
    texts: int
    tokens: int
    rounds: int
    ceiling_flops_per_second: float
    drift: float
    flops_per_token: int
    limit_tokens_per_second: float
    rows: tuple[EmbedRow, ...]
    question: dict[str, Seconds]

    def to_json(self) -> dict[str, Any]:
        """Return the object that `fathom bench embed` prints last."""
        return {"bench": "embed", "settled": self.drift <= MAX_DRIFT, **asdict(self)}


def bench_embed(
    texts: Sequence[str],
    question: str,
    embedder: Embedder,
    peer: Peer,
    folder: Path,
    *,
    device: torch.device,
    rounds: int = 3,
    on_progress: Callable[[str], None] = lambda _: None,
) -> EmbedBench:
    """Embed the same texts by both, in turn.

    Args:
        texts: what is embedded.
        question: a text that is embedded alone.
        embedder: ours.
        peer: plain sentence-transformers in float32; the first, in units of which ratios are.
        folder: the model's, for its shape.
        device: where both run.
        rounds: how often.
        on_progress: is told what is measured.
    """
    ceiling = _ceiling(device)
    ours, theirs = embedder.embed(texts), peer(list(texts))  # warm, and compared
    arms = {
        "sentence-transformers": lambda: peer(list(texts)),
        "ours": lambda: embedder.embed(texts),
    }
    found = in_turn(arms, rounds, on_progress=on_progress)
    alone = {
        "sentence-transformers": lambda: peer([question]),
        "ours": lambda: embedder.embed([question]),
    }
    asked = in_turn(alone, 10 * rounds)
    end = _ceiling(device)
    lengths = [len(embedder.token_offsets(text)) for text in texts]
    tokens = sum(lengths)
    flops = flops_per_token(folder, tokens / len(texts))
    limit = max(ceiling, end) / flops
    rows = [
        EmbedRow(
            name=name,
            tokens_per_second=Seconds(
                tokens / middle(found, name).wall, tokens / middle(found, name).cpu
            ),
            ratio=ratio(found, "sentence-transformers", name),
            share=tokens / middle(found, name).cpu / limit,
            min_cosine=1.0 if name != "ours" else float(np.sum(ours * theirs, axis=1).min()),
        )
        for name in arms
    ]
    return EmbedBench(
        machine=this_machine(device),
        texts=len(texts),
        tokens=tokens,
        rounds=rounds,
        ceiling_flops_per_second=max(ceiling, end),
        drift=abs(end / ceiling - 1),
        flops_per_token=flops,
        limit_tokens_per_second=limit,
        rows=tuple(rows),
        question={name: middle(asked, name) for name in alone},
    )


def flops_per_token(folder: Path, tokens: float) -> int:
    """Return the operations of one token of a BERT among `tokens`: two a multiplied pair.

    A layer has four projections of hidden x hidden, two of hidden x intermediate, and scores and
    mixes as many values as there are tokens.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    hidden, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
    projected = 4 * hidden**2 + 2 * hidden * int(config["intermediate_size"])
    return round(2 * layers * (projected + 2 * hidden * tokens))


def _ceiling(device: torch.device) -> float:
    import torch

    native = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
    dtype = torch.bfloat16 if native else torch.float32
    return matmul_flops_per_second(_MATMUL_SIDE, dtype, device, clock=CLOCKS["cpu"])


def card(bench: EmbedBench) -> str:
    """Return the table for people."""
    lines = [
        bench.machine.describe(),
        f"{bench.texts:,} texts, {bench.tokens:,} tokens; CPU seconds, medians of {bench.rounds};"
        f" wall-clock rates beside them",
        f"ceiling {bench.ceiling_flops_per_second / 1e9:,.0f} GFLOP/s, limit"
        f" {bench.limit_tokens_per_second:,.0f} tokens/s"
        + (
            ""
            if bench.drift <= MAX_DRIFT
            else f"; the ceiling drifted by {bench.drift:.0%}: the machine was disturbed"
        ),
        f"{'':24}{'tokens/s':>10}{'(wall)':>10}{'ratio':>7}{'of limit':>10}{'cosine':>9}"
        f"{'a question':>13}",
    ]
    lines += [
        f"{row.name:24}{row.tokens_per_second.cpu:>10,.0f}{row.tokens_per_second.wall:>10,.0f}"
        f"{row.ratio.cpu:>7.2f}{row.share:>10.0%}{row.min_cosine:>9.5f}"
        f"{bench.question[row.name].cpu * 1e3:>10.1f} ms"
        for row in bench.rows
    ]
    return "\n".join(lines)
