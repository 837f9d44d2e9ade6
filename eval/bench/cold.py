"""From a new process to its first token: ours on a library, transformers on a GGUF file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eval.bench.rounds import Seconds, middle, ratio
from rag.errors import FathomError
from rag.lm.engine import Message

_ROOT = Path(__file__).resolve().parents[2]

# Each prints a JSON line with what it did; seconds are the parent's, of a process from its start to
# its end, which follows the first token at once.
_OURS = """
import json, os, sys
from rag.runtime import prepare_process
prepare_process()
from rag.answering.service import TextPiece
from rag.settings import load_settings
from rag.types import AnswerMode, Route
from ui.assembly import Fathom
fathom = Fathom(load_settings(model=sys.argv[1], home=sys.argv[2]))
for event in fathom.stream(sys.argv[3], mode=AnswerMode.WRITTEN, route=Route.RETRIEVAL):
    if isinstance(event, TextPiece):
        print(json.dumps({"first": event.text}), flush=True)
        os._exit(0)
"""
_TRANSFORMERS = """
import json, os, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, file = os.path.split(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file)
ids = tokenizer.apply_chat_template(
    json.loads(sys.argv[2]), add_generation_prompt=True, return_tensors="pt", return_dict=True
)
out = model.generate(**ids, max_new_tokens=1, do_sample=False)
print(json.dumps({"first": tokenizer.decode(out[0, -1])}), flush=True)
os._exit(0)
"""


@dataclass(frozen=True, slots=True)
class ColdRow:
    """One arm; `ratio` is its seconds to ours. None where it could not be run, and why."""

    name: str
    seconds: Seconds | None = None
    ratio: Seconds | None = None
    absent: str = ""


@dataclass(frozen=True, slots=True)
class ColdBench:
    """What `fathom bench cold` shows: seconds of whole processes, up to their first token."""

    model: str
    rounds: int
    rows: tuple[ColdRow, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the object that `fathom bench cold` prints last."""
        return {"bench": "cold", **asdict(self)}


def bench_cold(
    model: str,
    home: Path,
    question: str,
    gguf: Path | None,
    *,
    messages: Sequence[Message],
    rounds: int = 3,
    on_progress: Callable[[str], None] = lambda _: None,
) -> ColdBench:
    """Start all in turn, the files in the page cache.

    Ours retrieves, so that it reads a thousand tokens. transformers reads the question alone, then
    the same prompt, with the weights as it dequantises them at every start.

    Args:
        model: a catalog name or folder that has been fetched.
        home: a library with documents.
        question: what is asked.
        gguf: the same model's file for transformers; None leaves its rows out.
        messages: the prompt that ours makes of the question.
        rounds: how often; one more comes first and is not counted.
        on_progress: is told what is started.
    """
    arms: dict[str, list[str]] = {"fathom": ["-c", _OURS, model, str(home), question]}
    if gguf is not None:
        alone = [Message("user", question)]
        for name, chat in (("transformers, GGUF", alone), ("the same prompt", messages)):
            given = json.dumps([asdict(message) for message in chat])
            arms[name] = ["-c", _TRANSFORMERS, str(gguf.resolve()), given]
    found: dict[str, list[Seconds]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        for name, command in arms.items():
            on_progress(f"round {number} of {rounds}: {name}")
            seconds = _run(command)
            if number:
                found[name].append(seconds)
    rows = [ColdRow(name, middle(found, name), ratio(found, name, "fathom")) for name in arms]
    if gguf is None:
        rows.append(ColdRow("transformers, GGUF", absent="give the model's file with --gguf"))
    return ColdBench(model, rounds, tuple(rows))


def _run(command: list[str]) -> Seconds:
    """Return what a process takes; its CPU seconds are those of all its threads."""
    import resource
    import time

    environment: Mapping[str, str] = os.environ | {"PYTHONPATH": str(_ROOT)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False, env=environment
    )
    wall = time.perf_counter() - begun
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    lines = done.stdout.splitlines()
    if done.returncode or not lines or not json.loads(lines[-1])["first"]:
        reason = done.stderr.strip().splitlines()[-1:] or ["it printed no token"]
        raise FathomError(f"a process of the bench failed: {reason[0]}", hint="see its command")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Seconds(wall, cpu)


def card(bench: ColdBench) -> str:
    """Return the table for people."""
    lines = [
        f"{bench.model}: a process from its start to its first token, medians of {bench.rounds};"
        " ratio: its CPU seconds to ours",
        f"{'':20}{'CPU':>9}{'wall':>9}{'ratio':>7}",
    ]
    for row in bench.rows:
        if row.seconds is None or row.ratio is None:
            lines.append(f"{row.name:20}  {row.absent}")
        else:
            lines.append(
                f"{row.name:20}{row.seconds.cpu:>7.1f} s{row.seconds.wall:>7.1f} s"
                f"{row.ratio.cpu:>7.2f}"
            )
    return "\n".join(lines)
