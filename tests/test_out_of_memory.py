"""Memory really runs out, under a limit of the operating system: the service degrades and goes on.

One process of its own goes through every case, its address space limited anew for each.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from conftest import make_tiny_engine, prompt_of
from rag.errors import OutOfMemoryError
from rag.lm.prefill import Prefill

ROOT = Path(__file__).resolve().parents[1]

_CASES = """
import sys; sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
from rag.runtime import prepare_process; prepare_process()
import json, resource
from pathlib import Path
from threading import Event
import torch
from conftest import HashEmbedder, make_tiny_tokenizer, prompt_of
from rag.errors import OutOfMemoryError
from rag.lm.local_engine import LocalEngine
from rag.settings import Settings
from rag.types import Route
from transformers import LlamaConfig, LlamaForCausalLM
from ui.assembly import Fathom
torch.set_num_threads(1)
torch.manual_seed(7)
tokenizer = make_tiny_tokenizer()
# Small, but for its cache: 128 KiB a token.
config = LlamaConfig(
    vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=4, head_dim=1024, max_position_embeddings=8192,
    eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
)
engine = LocalEngine(LlamaForCausalLM(config).eval(), tokenizer, name="heavy")
def limit(mebibytes):
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + mebibytes * 2**20, resource.RLIM_INFINITY))
def written(num_tokens):
    *_, done = engine.generate(prompt_of([7] * num_tokens), max_new_tokens=4, stop=Event())
    return done.new_tokens
def told(outcome):
    if isinstance(outcome, OutOfMemoryError):
        return {"error": outcome.message, "hint": outcome.hint}
    r = outcome.receipt
    return {"route": r.route, "reason": r.reason, "escalations": r.escalations, "id": r.id,
            "read": r.read.tokens, "stored": library.receipts.load(r.id) == outcome}
def asked(question):
    try:
        return told(service.answer(question))
    except OutOfMemoryError as error:
        return told(error)
written(40)  # whatever is loaded on first use

result = {"failed": []}
limit(150)
for _ in range(3):
    try:
        written(4000)
    except OutOfMemoryError as error:
        result["failed"].append(error.message)
result["written"] = written(40)
result["rate"] = engine.predicted_prefill_seconds(100)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
engine.predicted_prefill_seconds(100)  # the questions below are not about the measuring

# What needs everything: the router takes nothing less where the gates let it through.
questions = ["Summarise what is said of ship 3.", "Summarise what is said of ship 9."]
for name, budget, mebibytes in (("less", 300, 200), ("half", 2400, 300), ("none", 2400, 60)):
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    settings = Settings(
        home=Path(sys.argv[2]), kv_reserve_bytes=0, max_new_tokens=4,
        prefill_deadline_seconds=1e9, retrieval_tokens=budget,
    )
    library = Fathom(settings, embedder=HashEmbedder(), engine=engine)
    if name == "less":
        library.ingest(Path(sys.argv[3]))
    service = library.service()
    service.plan(questions[0], library.documents())
    limit(mebibytes)
    some = questions if name == "less" else questions[:1]
    result[name] = [asked(question) for question in some]
    if name == "less":
        result["many"] = [told(outcome) for _, outcome in service.answer_many(questions)]
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Any:  # noqa: ANN401
    folder = tmp_path_factory.mktemp("memory")
    ships = folder / "ships.txt"
    ships.write_text("\n\n".join(f"Ship {n} lies at berth {n * 7}." for n in range(110)))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _CASES, str(ROOT), str(folder / "home"), str(ships)],
        capture_output=True,
        text=True,
        # What is freed goes back at once: under the limit there is no room for holes.
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_an_engine_that_ran_out_of_memory_answers_the_next_request(told: Any) -> None:  # noqa: ANN401
    assert len(told["failed"]) == 3
    for message in told["failed"]:
        assert message.startswith("memory ran out with ")
        assert "tokens in the cache of 1 sequence(s), at the next 512" in message
        assert "allocate" in message
    assert told["written"] == 4


def test_a_rate_that_there_is_no_memory_to_measure_stays_unknown(told: Any) -> None:  # noqa: ANN401
    assert told["rate"] is None


def test_the_service_reads_less_where_memory_ran_out_and_says_so(told: Any) -> None:  # noqa: ANN401
    assert len(told["less"]) == len(told["many"]) == 2
    for answer in told["less"] + told["many"]:
        assert answer["route"] == "retrieval"
        (words,) = answer["escalations"]
        assert words.startswith("memory ran out with ")
        assert words.endswith("so at most 300 tokens of retrieved passages were read instead")
        assert words in answer["reason"]
        assert 0 < answer["read"] <= 300
        assert answer["stored"]


def test_the_service_halves_what_it_retrieves(told: Any) -> None:  # noqa: ANN401
    for answer in told["half"]:
        assert "error" not in answer
        budgets = [words.split("so at most ")[1].split()[0] for words in answer["escalations"]]
        assert budgets == ["2,400", "1,200"]
        assert 300 < answer["read"] <= 1200


def test_where_nothing_fits_the_error_says_what_ran_out(told: Any) -> None:  # noqa: ANN401
    assert len(told["none"]) == 1
    for answer in told["none"]:
        assert "memory ran out" in answer["error"]
        assert "FATHOM_RETRIEVAL_TOKENS" in answer["hint"]


def test_a_chunk_that_the_memory_does_not_hold_is_refused_before_it_is_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a CPU without such a limit nothing raises: the kernel ends the process."""
    engine = make_tiny_engine()
    monkeypatch.setattr(Prefill, "_unused_bytes", lambda self: 300_000)
    with pytest.raises(OutOfMemoryError, match="after 1,024 tokens of the prompt: the next 512"):
        list(engine.generate(prompt_of([7] * 2000), max_new_tokens=4, stop=Event()))
    monkeypatch.undo()
    assert list(engine.generate(prompt_of([7] * 20), max_new_tokens=4, stop=Event()))
