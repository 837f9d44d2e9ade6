"""A cache in 8 bits: its bytes, what it does to answers, and that it is read only where it may."""

import html
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from conftest import (
    HashEmbedder,
    fail_to_allocate_once,
    make_tiny_engine,
    make_tiny_tokenizer,
    prompt_of,
)
from eval.bench.windowed import peak_allocated_bytes
from eval.judge_calibration import judge
from eval.synthetic import Task
from rag.answering.replay import replay
from rag.answering.service import AnsweringService
from rag.errors import UnsupportedModelError
from rag.lm.catalog import fetched_models
from rag.lm.document_kv import DocumentKV
from rag.lm.eight_bit_cache import new_cache, packed, unpacked
from rag.lm.engine import DocumentPrefix, GenerationDone, ScoreRequest, TextPiece
from rag.lm.kv_bytes import KVDtype, kv_cache_bytes, measured_kv_bytes
from rag.lm.local_engine import LocalEngine
from rag.lm.native_cache import native_cache
from rag.lm.peak_bytes import peak_bytes
from rag.lm.spec import ModelSpec
from rag.routing.gates import failed
from rag.routing.model_plan import plan_model
from rag.settings import Settings
from rag.types import Answer, Gate, Route
from tiny_families import WINDOW, tiny_config, tiny_model
from ui.answer_html import receipt_html
from ui.assembly import Fathom
from ui.cli import app
from ui.formatting import receipt_text

Q8 = KVDtype.Q8_0

# ---- the cache ----------------------------------------------------------------------------------


def read(model: Any, cache: Any, ids: torch.Tensor, pieces: Sequence[int]) -> torch.Tensor:  # noqa: ANN401
    """Put the ids into the cache in pieces; return the logits of the last token."""
    with torch.inference_mode():
        for piece in torch.split(ids, list(pieces), dim=1):
            logits = model(input_ids=piece, past_key_values=cache, use_cache=True).logits
    return logits[0, -1].float()  # type: ignore[no-any-return]


def random_ids(num_tokens: int) -> torch.Tensor:
    return torch.randint(2, 250, (1, num_tokens), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gpt2", {}),  # as many key-value heads as heads
        ("llama", {"head_dim": 16}),  # grouped heads
        ("qwen2", {"head_dim": 16}),  # some layers of this one are windows
        ("falcon", {"hidden_size": 128}),  # one key-value head
        ("gemma3_text", {"head_dim": 16}),  # windows and full layers
        ("gemma3n_text", {"head_dim": 16}),  # layers that share the cache of others
        ("llama4_text", {"head_dim": 16}),  # chunks
        ("lfm2", {"hidden_size": 64}),  # states
        ("qwen3_next", {"head_dim": 16}),
    ],
)
def test_predicted_bytes_are_those_of_the_tensors(family: str, changes: dict[str, int]) -> None:
    model = tiny_model(family, **changes).bfloat16()
    own = ModelSpec.from_config(model.config, dtype_bytes=2)
    spec = own.quantised
    assert spec is not None
    for num_tokens in (WINDOW - 6, 3 * WINDOW + 1):
        cache = new_cache(model, spec)
        ids = random_ids(num_tokens)
        read(model, cache, ids, [num_tokens // 2, num_tokens - num_tokens // 2 - 1, 1])
        held = measured_kv_bytes(cache)
        assert held == kv_cache_bytes(spec, num_tokens) < kv_cache_bytes(own, num_tokens)
        full = [layer for layer in own.layers if layer.kind == "full"]
        saved = sum(layer.elements_per_token * num_tokens for layer in full) * (64 - 34) // 32
        assert kv_cache_bytes(own, num_tokens) - held == saved


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("llama", "16 elements a token do not fill a group of 32"),
        ("deepseek_v3", "latents are small already"),
        ("mistral", "no layer is full"),
        ("zamba2", "states and keys in one layer"),
    ],
)
def test_a_model_without_such_a_cache_is_left_as_it_is(family: str, why: str) -> None:
    assert ModelSpec.from_config(tiny_config(family)).quantised is None, why


def test_there_is_no_third_cache() -> None:
    spec = ModelSpec.from_config(tiny_config("gpt2")).quantised
    assert spec is not None
    assert spec.kv_dtype is Q8
    assert spec.quantised is None
    assert make_tiny_engine().quantised is None  # its keys are 16 elements wide


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_number_is_off_by_half_a_step_of_its_own_group(dtype: torch.dtype) -> None:
    states = torch.randn(2, 3, 5, 64, generator=torch.Generator().manual_seed(1))
    states[:, :, :, 7] *= 1000  # a channel such as the keys of Qwen2.5 have
    states[:, 2, 3] = 0.0
    states = states.to(dtype)
    kept = packed(states)
    assert kept.shape == (2, 5, 3 * 64 // 32 * 34)
    assert kept.dtype == torch.uint8
    back = unpacked(kept, states)
    assert back.dtype == dtype
    groups = states.double().view(2, 3, 5, 2, 32)
    steps = groups.abs().amax(-1, keepdim=True) / 127
    off = (back.double().reshape(groups.shape) - groups).abs()
    # Half a step, the scale rounded to bfloat16 (at most 1 in 256 of the value), and the dtype.
    rounding = groups.abs() * (1 / 256 + 2 * torch.finfo(dtype).eps)
    assert bool((off <= 0.51 * steps + rounding).all())
    assert bool((back[:, 2, 3] == 0).all())

    # Divided by its size, the large channel spoils its neighbours no longer.
    sizes = states.abs().amax(dim=(0, 2)).flatten().float()
    even = unpacked(packed(states, sizes), states, sizes)
    neighbours = [channel for channel in range(32) if channel != 7]
    off = (states - back).float().abs()[..., neighbours].mean()
    assert (states - even).float().abs()[..., neighbours].mean() < off / 50


def test_a_prompt_in_pieces_is_the_prompt_in_one_piece() -> None:
    model = tiny_model("llama", head_dim=16)
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.data.normal_(0, 0.15)  # as initialised, attention would hardly matter
    ids = random_ids(60)
    spec = ModelSpec.from_config(model.config).quantised
    assert spec is not None
    in_pieces = [
        read(model, new_cache(model, spec), ids, pieces)
        for pieces in ([60], [20, 20, 19, 1], [1] * 60)
    ]
    own = read(model, native_cache(model.config), ids, [60])
    for logits in in_pieces[1:]:
        assert (logits - in_pieces[0]).abs().max() < 1e-4 * own.abs().max()
    off = (in_pieces[0] - own).abs().max() / own.abs().max()
    assert 1e-4 < off < 0.1  # it is another cache, and near


@pytest.mark.parametrize("num_tokens", [1024, 4096])
def test_the_bound_on_the_peak_holds_and_is_near(num_tokens: int) -> None:
    shape = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 8}
    shape |= {"num_key_value_heads": 4, "max_position_embeddings": 8192}
    model = tiny_model("llama", **shape).bfloat16()
    spec = ModelSpec.from_config(model.config, dtype_bytes=2).quantised
    assert spec is not None
    held = []

    def prefill() -> None:
        cache = new_cache(model, spec)
        for piece in torch.split(random_ids(num_tokens), 512, dim=1):
            with torch.inference_mode():
                model(input_ids=piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
        held.append(measured_kv_bytes(cache))

    measured = peak_allocated_bytes(prefill, "cpu") - held[0]
    predicted = peak_bytes(spec, num_tokens)
    assert measured <= predicted <= 1.6 * measured + 2**20, (measured, predicted)


# ---- the engine ---------------------------------------------------------------------------------


def wide_engine(document_kv: DocumentKV | None = None) -> LocalEngine:
    """Return the tiny engine with keys that fill a group, and more layers than a copy counts for.

    Of five words it never tires, but what is likeliest hangs on the whole prompt.
    """
    tiny = make_tiny_engine(hidden_size=64, num_hidden_layers=8)
    for weight in tiny._model.parameters():
        if weight.ndim > 1:
            weight.data.normal_(0, 0.15, generator=torch.Generator().manual_seed(weight.numel()))
    return LocalEngine(
        tiny._model, tiny._tokenizer._tokenizer, name="wide", document_kv=document_kv
    )


def both(engine: LocalEngine) -> tuple[LocalEngine, LocalEngine]:
    assert engine.quantised is not None
    return engine, engine.quantised


def replies(
    engine: LocalEngine, prompts: list[list[int]], prefix: DocumentPrefix | None = None
) -> tuple[list[str], list[GenerationDone]]:
    texts, done = [""] * len(prompts), {}
    steps = engine.generate_many(
        list(map(prompt_of, prompts)), max_new_tokens=12, stop=Event(), prefix=prefix
    )
    for number, step in steps:
        if isinstance(step, TextPiece):
            texts[number] += step.text
        elif isinstance(step, GenerationDone):
            done[number] = step
    return texts, [done[number] for number in range(len(prompts))]


def test_weights_are_read_once_for_both_engines() -> None:
    tiny = make_tiny_engine(hidden_size=64)
    loads = []

    def load() -> Any:  # noqa: ANN401
        loads.append(1)
        return tiny._model

    engine, quantised = both(
        LocalEngine(load, make_tiny_tokenizer(), name="lazy", config=tiny._model.config)
    )
    assert (engine.is_loaded, loads) == (False, [])
    replies(quantised, [[7] * 40])
    replies(engine, [[7] * 40])
    assert quantised._loaded_model() is engine._loaded_model()
    assert loads == [1]
    assert engine.model_id != quantised.model_id
    assert engine.tokenizer_id == quantised.tokenizer_id
    assert quantised.name == "lazy with its cache in q8_0"
    engine.predicted_prefill_seconds(100)
    assert quantised._prefill_clock is engine._prefill_clock
    assert engine.quantised is quantised


def test_prompts_side_by_side_are_answered_as_alone_and_to_the_byte() -> None:
    engine, quantised = both(wide_engine())
    assert quantised.spec.kv_dtype is Q8
    prompts = [list(range(60, 60 + n)) for n in (30, 90, 61)]
    together, _ = replies(quantised, prompts)
    for prompt, text in zip(prompts, together, strict=True):
        (alone,), (done,) = replies(quantised, [prompt])
        assert alone == text
        assert done.kv_tokens is not None
        assert done.kv_bytes == kv_cache_bytes(quantised.spec, done.kv_tokens)
        assert done.kv_bytes < kv_cache_bytes(engine.spec, done.kv_tokens) / 3.7


def test_likelihoods_are_near_those_of_the_models_own_cache() -> None:
    prompt = tuple(range(60, 160))
    requests = [ScoreRequest(prompt, (n, n + 1)) for n in (70, 100)]
    own, packed = (engine.score(requests, stop=Event()) for engine in both(wide_engine()))
    assert own is not None
    assert packed is not None
    assert packed.kv_bytes < own.kv_bytes / 3.7
    for ours, theirs in zip(own, packed, strict=True):
        assert ours != theirs
        assert ours == pytest.approx(theirs, abs=0.05)


def test_a_document_is_kept_in_the_format_it_was_read_in(tmp_path: Path) -> None:
    kept = DocumentKV(tmp_path, memory_bytes=2**26, disk_bytes=2**26)
    prefix = DocumentPrefix(80, ("1:a",))
    document = list(range(60, 140))
    for engine in both(wide_engine(kept)):
        (first,), (done,) = replies(engine, [[*document, 61, 62]], prefix)
        assert done.reused_tokens == 0  # what the other format kept is not its own
        before = kept.memory_used_bytes
        (again,), (reused,) = replies(engine, [[*document, 61, 62]], prefix)
        assert (again, reused.reused_tokens) == (first, 80)
        assert kept.memory_used_bytes == before
    engine, quantised = both(wide_engine(kept))
    sizes = [kv_cache_bytes(e.spec, 80) for e in (engine, quantised)]
    assert kept.memory_used_bytes == sum(sizes)

    elsewhere = DocumentKV(tmp_path, memory_bytes=0, disk_bytes=2**26)
    (from_disk,), (done,) = replies(both(wide_engine(elsewhere))[1], [[*document, 61, 62]], prefix)
    assert (from_disk, done.reused_tokens) == (first, 80)


# ---- the plan -----------------------------------------------------------------------------------

QUESTION = "Summarise what is said of the ferry."
LENGTHS = (1024, 2048)


@dataclass(frozen=True)
class Harbour:
    """A library, and a device whose memory holds its document in 8 bits but not in 32."""

    fathom: Fathom
    engine: LocalEngine
    monkeypatch: pytest.MonkeyPatch

    @property
    def service(self) -> AnsweringService:
        return self.fathom.service()

    def plan(self, route: Route | None = None) -> Any:  # noqa: ANN401
        return self.service.plan(QUESTION, self.service.documents(), route=route, calibrate=True)

    def memory(self, share: float) -> None:
        """Leave free what 8 bits need, and this share of what the model's own cache needs more."""
        total = 2500 + self.fathom.settings.max_new_tokens
        more, less = (
            kv_cache_bytes(engine.spec, total) + peak_bytes(engine.spec, total)
            for engine in both(self.engine)
        )
        free = int(less + share * (more - less))
        self.monkeypatch.setattr("rag.lm.prefill.free_device_bytes", lambda device_type: free)

    def calibrate(self, tokens: int) -> None:
        """Save an effective length of this many tokens for the 8-bit cache."""
        engine = both(self.engine)[1]
        rows = [{"task": Task.LITERAL, "depth": 0.5, "score": float(tokens > 0), "likeliest": None}]
        records = [
            {"tokens": n, "prefill_seconds": 1.0, "predicted_seconds": 1.0, "rows": rows * 10}
            for n in LENGTHS
        ]
        found = judge(
            records,
            model=engine.name,
            model_id=engine.model_id,
            seed=0,
            filler="none",
            dtype="32 bits, cache in q8_0",
            device="a test",
        )
        self.fathom.calibrations.save_effective_length(replace(found, tokens=tokens))


@pytest.fixture(scope="module")
def shared_engine() -> LocalEngine:
    return wide_engine()


@pytest.fixture
def harbour(
    settings: Settings,
    shared_engine: LocalEngine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Harbour]:
    path = tmp_path / "crossing.txt"
    path.write_text("The ferry crosses the sound twice a day. The fee is 12 crowns. " * 32)
    settings = settings.model_copy(update={"retrieval_tokens": 512})
    fathom = Fathom(settings, embedder=HashEmbedder(), engine=shared_engine)
    fathom.ingest(path)
    shared_engine.predicted_prefill_seconds(1)  # before the memory is short
    found = Harbour(fathom, shared_engine, monkeypatch)
    found.memory(0.5)
    yield found
    fathom.database.close()


def formats(gates: Sequence[Gate]) -> list[tuple[str, str | None, bool]]:
    return [(g.gate, g.kv_dtype, g.passed) for g in gates if g.route == Route.FULL]


def test_nothing_changes_for_who_never_calibrated_it(harbour: Harbour) -> None:
    plan = harbour.plan()
    assert plan.decision.route is not Route.FULL
    assert {gate.kv_dtype for gate in plan.decision.gates} == {None}
    assert [gate.gate for gate in failed(plan.decision.gates, Route.FULL)] == ["kv_bytes"]
    assert plan.engine is harbour.engine
    assert plan.kv_dtype is None


def test_a_calibrated_cache_is_tried_before_full_is_given_up(harbour: Harbour) -> None:
    harbour.calibrate(3000)
    plan = harbour.plan()
    assert plan.decision.route is Route.FULL
    assert plan.engine is harbour.engine.quantised
    assert plan.decision.reason.endswith(", in an 8-bit cache (q8_0), calibrated to 3,000 tokens")
    tries = formats(plan.decision.gates)
    assert tries[:4] == [
        ("tokens", None, True),
        ("positions", None, True),
        ("kv_bytes", None, False),
        ("prefill_seconds", None, True),
    ]
    assert tries[4:] == [
        ("tokens", "q8_0", True),
        ("positions", "q8_0", True),
        ("kv_bytes", "q8_0", True),
        ("prefill_seconds", "q8_0", True),
        ("effective_length", "q8_0", True),
    ]
    assert failed(plan.decision.gates, Route.FULL) == []
    own, packed = (g for g in plan.decision.gates if (g.gate, g.route) == ("kv_bytes", "full"))
    assert own.value / packed.value == 128 / 34


@pytest.mark.parametrize("tokens", [0, 2000])
def test_it_is_not_tried_beyond_what_it_was_measured_to_use(harbour: Harbour, tokens: int) -> None:
    harbour.calibrate(tokens)
    for route in (None, Route.FULL):
        plan = harbour.plan(route)
        assert plan.decision.route is not Route.FULL
        assert {gate.kv_dtype for gate in plan.decision.gates} == {None}


def test_where_8_bits_do_not_fit_either_both_tries_are_shown(harbour: Harbour) -> None:
    harbour.calibrate(3000)
    harbour.memory(-0.5)
    plan = harbour.plan()
    assert plan.decision.route is not Route.FULL
    assert plan.engine is harbour.engine
    assert ("kv_bytes", None, False) in formats(plan.decision.gates)
    (gate,) = failed(plan.decision.gates, Route.FULL)
    assert (gate.gate, gate.kv_dtype) == ("kv_bytes", "q8_0")


def test_where_the_models_own_cache_fits_it_is_the_one(harbour: Harbour) -> None:
    harbour.calibrate(3000)
    harbour.memory(1.5)
    plan = harbour.plan()
    assert plan.decision.route is Route.FULL
    assert plan.engine is harbour.engine
    assert {gate.kv_dtype for gate in plan.decision.gates} == {None}


def test_what_else_fails_is_not_helped_by_a_smaller_cache(harbour: Harbour) -> None:
    harbour.calibrate(3000)
    slow = harbour.fathom.settings.model_copy(update={"prefill_deadline_seconds": 1e-9})
    harbour.fathom.settings = slow
    service = Fathom(slow, embedder=HashEmbedder(), engine=harbour.engine).service()
    plan = service.plan(QUESTION, service.documents(), calibrate=True)
    assert plan.decision.route is not Route.FULL
    asked = service.plan(QUESTION, service.documents(), route=Route.FULL, calibrate=True)
    assert asked.decision.route is Route.FULL  # slow, as asked for
    assert asked.engine is harbour.engine.quantised
    assert "it is slow" in asked.decision.reason
    short = slow.model_copy(update={"max_context_tokens": 2048})
    service = Fathom(short, embedder=HashEmbedder(), engine=harbour.engine).service()
    plan = service.plan(QUESTION, service.documents(), calibrate=True)
    assert {gate.kv_dtype for gate in plan.decision.gates} == {None}


def check(answer: Answer, engine: LocalEngine) -> None:
    receipt = answer.receipt
    assert (receipt.route, receipt.kv_dtype, receipt.model) == (Route.FULL, "q8_0", "wide")
    assert receipt.read.tokens == receipt.read.of_tokens
    held = receipt.prompt_tokens + receipt.new_tokens - 1
    assert receipt.kv_bytes.predicted == kv_cache_bytes(both(engine)[1].spec, held)
    assert "in an 8-bit cache (q8_0), calibrated to 3,000 tokens" in receipt.reason


def test_the_answer_is_made_in_it_and_replayed_whatever_the_memory(harbour: Harbour) -> None:
    harbour.calibrate(3000)
    answer = harbour.service.answer(QUESTION, route=Route.FULL)
    check(answer, harbour.engine)
    assert answer.receipt.kv_bytes.actual == answer.receipt.kv_bytes.predicted
    stored = harbour.fathom.receipts.load(answer.receipt.id)
    assert stored == answer
    assert "KV cache in q8_0" in html.unescape(receipt_html(stored.receipt))
    assert "(q8_0 cache)" in receipt_text(stored)
    for share in (0.5, 1.5):  # now there is room for the model's own
        harbour.memory(share)
        found = replay(answer.receipt.id, harbour.fathom.receipts, harbour.service)
        assert found.differences == ()
        assert found.same_text
        check(found.now, harbour.engine)


def test_a_table_of_questions_is_answered_in_it(harbour: Harbour) -> None:
    harbour.calibrate(3000)
    questions = [QUESTION, "Summarise the fees."]
    alone = [harbour.service.answer(question, route=Route.FULL) for question in questions]
    many = dict(harbour.service.answer_many(questions, route=Route.FULL))
    for number, before in enumerate(alone):
        answer = many[number]
        assert isinstance(answer, Answer)
        check(answer, harbour.engine)
        assert answer.answer == before.answer


def test_where_its_memory_runs_out_passages_are_read(harbour: Harbour) -> None:
    harbour.calibrate(3000)
    fail_to_allocate_once(harbour.engine._model)
    answer = harbour.service.answer(QUESTION, route=Route.FULL)
    assert answer.receipt.route is Route.RETRIEVAL
    assert answer.receipt.kv_dtype is None
    (words,) = answer.receipt.escalations
    assert words.startswith("memory ran out")


# ---- the commands -------------------------------------------------------------------------------


def test_the_verb_measures_it_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = make_tiny_engine(hidden_size=64)
    model, home = tmp_path / "tiny", tmp_path / "home"
    tiny._loaded_model().save_pretrained(model)
    tiny._tokenizer._tokenizer.save_pretrained(model)
    monkeypatch.setenv("FATHOM_HOME", str(home))
    monkeypatch.setenv("FATHOM_KV_RESERVE_BYTES", "0")
    arguments = ["calibrate", "--model", str(model), "--json", "--kv-dtype", "q8_0"]
    arguments += ["--lengths", "1900,2400", "--haystacks", "1", "--quick"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    line = json.loads(done.stdout)
    assert line["model"] == f"{model} with its cache in q8_0"
    assert line["dtype"] == "32 bits, cache in q8_0"
    assert line["measurable"] is False  # random weights answer nothing

    settings = Settings(home=home, model=str(model))
    fathom = Fathom(settings, embedder=HashEmbedder())
    assert fathom.calibrations.effective_length(fathom.engine.model_id) is None
    assert fathom.engine.quantised is not None
    found = fathom.calibrations.effective_length(fathom.engine.quantised.model_id)
    assert found is not None
    assert found.tokens == 0
    assert fathom.calibrations.effective_length_of(str(model)) is None


def test_a_format_that_the_engine_does_not_keep_is_refused() -> None:
    from ui.verbs.calibration import _with_cache

    engine = wide_engine()
    assert _with_cache(engine, None) is engine
    assert _with_cache(engine, Q8) is engine.quantised
    with pytest.raises(UnsupportedModelError, match="in fp8: this engine keeps its own and q8_0"):
        _with_cache(engine, KVDtype.FP8)
    with pytest.raises(UnsupportedModelError, match="keeps its own alone"):
        _with_cache(make_tiny_engine(), Q8)


def test_a_models_plan_in_q8_0_is_that_of_the_engine() -> None:
    own, packed = (engine.spec for engine in both(wide_engine()))
    plan = plan_model(own, 1000, model="wide", device_bytes=2**30, reserve_bytes=0, kv_dtype=Q8)
    assert plan.kv_dtype == "q8_0"
    assert plan.kv_bytes == kv_cache_bytes(packed, 1000)
    assert plan.peak_bytes == peak_bytes(packed, 1000) > peak_bytes(own, 1000)
    assert {gate.kv_dtype for gate in plan.gates} == {"q8_0"}


# ---- a real model -------------------------------------------------------------------------------


@pytest.mark.model
@pytest.mark.skipif(
    not any(model.name == "smollm2-135m" for model in fetched_models(Settings())),
    reason="the test model is not fetched: make test fetches it",
)
def test_a_real_model_says_nearly_the_same(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings.model_copy(update={"retrieval_tokens": 256, "max_new_tokens": 12})
    engine = LocalEngine.load("smollm2-135m", settings)
    fathom = Fathom(settings, embedder=HashEmbedder(), engine=engine)
    path = tmp_path / "ships.txt"
    path.write_text("\n\n".join(f"The ship Nora-{n} lies at berth {n * 7}." for n in range(24)))
    fathom.ingest(path)
    engine.predicted_prefill_seconds(1)
    quantised = both(engine)[1]
    prompt = tuple(engine.encode(path.read_text()))
    requests = [
        ScoreRequest(prompt[:n], prompt[n : n + 1]) for n in range(len(prompt) // 2, len(prompt))
    ]
    scores = [one.score(requests, stop=Event()) for one in (engine, quantised)]
    own, packed = (torch.tensor(list(found)) for found in scores if found is not None)
    assert (own - packed).abs().mean() < 0.05  # nats a token; these are certain of most

    harbour = Harbour(fathom, engine, monkeypatch)
    harbour.calibrate(3000)
    question = "At which berth lies the ship Nora-11?"
    before = fathom.service().answer(question, route=Route.FULL)
    assert before.receipt.kv_dtype is None
    total = before.receipt.prompt_tokens + settings.max_new_tokens
    needed = [
        kv_cache_bytes(e.spec, total) + peak_bytes(e.spec, total) for e in (engine, quantised)
    ]
    monkeypatch.setattr("rag.lm.prefill.free_device_bytes", lambda device_type: sum(needed) // 2)
    answer = fathom.service().answer(question, route=Route.FULL)
    assert answer.receipt.kv_dtype == "q8_0"
    assert answer.receipt.kv_bytes.actual == answer.receipt.kv_bytes.predicted
    assert answer.answer == before.answer
