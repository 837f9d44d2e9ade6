"""Document KV: the same answer from what is kept, within a budget, and gone when deleted."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from conftest import HashEmbedder, make_tiny_engine, make_tiny_tokenizer, prompt_of
from rag.errors import ModelFetchError
from rag.lm.catalog import resolve_model
from rag.lm.document_kv import DocumentKV, KeptPrefix, prefix_key, restore, snapshot
from rag.lm.engine import DocumentPrefix, GenerationDone, PrefillProgress
from rag.lm.kv_bytes import kv_cache_bytes, measured_kv_bytes
from rag.lm.local_engine import LocalEngine
from rag.lm.prefill import Prefill
from rag.settings import Settings
from rag.types import Answer, Route
from ui.assembly import Fathom
from ui.doctor import examine_library, repair

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20
WINDOW = 16
DOCUMENT, ASKED = 600, 24
TINY = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def tiny_model(family: str, **changes: Any) -> Any:  # noqa: ANN401
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**{**TINY, "num_hidden_layers": 2, **changes})
    model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return model.float().eval()


def logits_of(model: Any, ids: torch.Tensor, cache: DynamicCache) -> torch.Tensor:  # noqa: ANN401
    with torch.inference_mode():
        output = model(input_ids=ids, past_key_values=cache, use_cache=True)
    return output.logits[0]  # type: ignore[no-any-return]


def random_ids(num_tokens: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, 250, (num_tokens,), generator=generator).tolist()


def kept_of(key: str, *, tokens: int = 8, documents: tuple[str, ...] = ("1:1:a",)) -> KeptPrefix:
    """Return a prefix of two layers and `tokens` KiB."""
    layers = tuple((torch.rand(1, 2, tokens, 32), torch.rand(1, 2, tokens, 32)) for _ in range(2))
    return KeptPrefix(key, documents, tokens, layers)


def key_of(number: int) -> str:
    return prefix_key("m", DocumentPrefix(1, (f"{number}:1:a",)), [number])


def on_disk(folder: Path, num_bytes: int = MIB, **options: Any) -> DocumentKV:  # noqa: ANN401
    return DocumentKV(folder, memory_bytes=0, disk_bytes=num_bytes, **options)


def equal(one: KeptPrefix, other: KeptPrefix | None) -> bool:
    assert other is not None
    return all(
        torch.equal(a, b)
        for first, second in zip(one.layers, other.layers, strict=True)
        for a, b in zip(first, second, strict=True)
    )


# ---- the same answer ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
        ("gemma3_text", {"head_dim": 12, "sliding_window": WINDOW, "num_hidden_layers": 6}),
        ("mistral", {"sliding_window": WINDOW}),
    ],
)
def test_two_questions_on_a_kept_document_get_the_logits_of_a_fresh_prefill(
    family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    """Windows included: the document is far longer than they are."""
    model = tiny_model(family, **changes)
    document = torch.tensor([random_ids(100, seed=1)])
    cache = DynamicCache(config=model.config)
    logits_of(model, document[:, :64], cache)
    logits_of(model, document[:, 64:], cache)
    layers = snapshot(cache, model.config.model_type)
    assert layers is not None
    kept = KeptPrefix(key_of(1), ("1:1:a",), 100, layers)
    assert kept.num_bytes == measured_kv_bytes(cache)
    folder = on_disk(tmp_path)
    folder.save(kept)
    logits_of(model, torch.tensor([random_ids(9, seed=2)]), cache)  # it goes on; kept does not
    for source in (kept, folder.load(kept.key, "cpu")):
        assert source is not None
        for seed in (3, 4):
            question = torch.tensor([random_ids(ASKED, seed=seed)])
            again = DynamicCache(config=model.config)
            restore(source, again)
            assert again.get_seq_length() == 100
            found = logits_of(model, question, again)
            whole = torch.cat([document, question], dim=1)
            fresh = logits_of(model, whole, DynamicCache(config=model.config))[-ASKED:]
            assert (found - fresh).abs().max() < 1e-4
    assert kept.num_bytes == sum(
        t.untyped_storage().nbytes() for layer in kept.layers for t in layer
    )


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("lfm2", {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}),
        ("recurrent_gemma", {"block_types": ["recurrent", "attention"], "head_dim": 8}),
    ],
)
def test_caches_that_are_not_all_of_the_state_are_refused(
    family: str, changes: dict[str, Any]
) -> None:
    cache = DynamicCache(config=CONFIG_MAPPING[family](**{**TINY, **changes}))
    assert snapshot(cache, family) is None


def test_a_state_outside_the_cache_is_refused_whatever_its_layers() -> None:
    model = tiny_model("llama")
    cache = DynamicCache(config=model.config)
    logits_of(model, torch.tensor([random_ids(5, seed=1)]), cache)
    assert snapshot(cache, "llama") is not None
    assert snapshot(cache, "minimax") is None


def test_a_sliding_layer_cannot_be_rolled_back_so_it_is_kept_whole() -> None:
    model = tiny_model("mistral", sliding_window=WINDOW)
    cache = DynamicCache(config=model.config)
    logits_of(model, torch.tensor([random_ids(50, seed=1)]), cache)
    assert isinstance(cache.layers[0], DynamicSlidingWindowLayer)
    with pytest.raises(RuntimeError, match="roll"):
        cache.crop(-1)
    layers = snapshot(cache, "mistral")
    assert layers is not None
    assert layers[0][0].shape[-2] == WINDOW - 1
    assert layers[0][0].untyped_storage().nbytes() == layers[0][0].numel() * 4


# ---- the engine --------------------------------------------------------------------------------


def engine_with(documents: DocumentKV | None, **options: Any) -> LocalEngine:  # noqa: ANN401
    plain = make_tiny_engine()
    return LocalEngine(
        plain._model,
        make_tiny_tokenizer(),
        name="tiny-llama",
        document_kv=documents,
        **{"weights_id": "seed 7", **options},
    )


def ask(engine: LocalEngine, seed: int, *, tenant: str = "") -> tuple[GenerationDone, list[Any]]:
    prompt = prompt_of(random_ids(DOCUMENT, seed=1) + random_ids(ASKED, seed=seed))
    prefix = DocumentPrefix(DOCUMENT, ("1:1:a",), tenant)
    *steps, done = engine.generate(prompt, max_new_tokens=8, stop=Event(), prefix=prefix)
    assert isinstance(done, GenerationDone)
    return done, steps


def words(steps: list[Any]) -> list[Any]:
    return [step for step in steps if not isinstance(step, PrefillProgress)]


def test_the_second_question_skips_the_document_and_answers_the_same(tmp_path: Path) -> None:
    documents = DocumentKV(tmp_path, memory_bytes=8 * MIB, disk_bytes=8 * MIB)
    engine = engine_with(documents)
    first, _ = ask(engine, 2)
    assert (first.reused_tokens, first.prompt_tokens) == (0, DOCUMENT + ASKED)
    restarted = engine_with(DocumentKV(tmp_path, memory_bytes=0, disk_bytes=8 * MIB))
    for asked in (engine, restarted):
        for seed in (2, 3):
            done, steps = ask(asked, seed)
            fresh, expected = ask(engine_with(None), seed)
            assert done.reused_tokens == DOCUMENT
            assert (done.kv_tokens, done.kv_bytes) == (fresh.kv_tokens, fresh.kv_bytes)
            assert done.kv_tokens is not None
            assert done.kv_bytes == kv_cache_bytes(engine.spec, done.kv_tokens)
            assert words(steps) == words(expected)
            done_tokens = [step.done for step in steps if isinstance(step, PrefillProgress)]
            assert done_tokens == [DOCUMENT + ASKED]


def test_another_tenant_model_or_weights_find_nothing(tmp_path: Path) -> None:
    documents = DocumentKV(tmp_path, memory_bytes=8 * MIB, disk_bytes=8 * MIB)
    engine = engine_with(documents)
    ask(engine, 2)
    assert ask(engine, 2, tenant="another")[0].reused_tokens == 0
    assert ask(engine, 2)[0].reused_tokens == DOCUMENT
    assert ask(engine_with(documents, weights_id="seed 8"), 2)[0].reused_tokens == 0


def test_keys_differ_in_each_of_their_parts() -> None:
    prefix = DocumentPrefix(2, ("1:1:a",))
    keys = {
        prefix_key("m", prefix, [1, 2, 3]),
        prefix_key("n", prefix, [1, 2, 3]),
        prefix_key("m", prefix, [1, 4, 3]),
        prefix_key("m", DocumentPrefix(1, ("1:1:a",)), [1, 2, 3]),
        prefix_key("m", DocumentPrefix(2, ("1:2:b",)), [1, 2, 3]),
        prefix_key("m", DocumentPrefix(2, ("1:1:a",), "t"), [1, 2, 3]),
    }
    assert len(keys) == 6
    assert prefix_key("m", prefix, [1, 2, 9]) in keys  # what follows the prefix does not count


def test_a_stop_within_the_document_keeps_nothing(tmp_path: Path) -> None:
    engine = engine_with(DocumentKV(tmp_path, memory_bytes=8 * MIB, disk_bytes=8 * MIB))
    prompt, stop = prompt_of(random_ids(DOCUMENT + ASKED, seed=1)), Event()
    prefix = DocumentPrefix(DOCUMENT, ("1:1:a",))
    steps = []
    for step in engine.generate(prompt, max_new_tokens=4, stop=stop, prefix=prefix):
        steps.append(step)
        stop.set()  # after the first chunk
    done = steps[-1]
    assert isinstance(done, GenerationDone)
    assert (done.kv_tokens, done.stopped) == (512, True)
    assert engine.cached_tokens(prompt, prefix) == 0
    assert list(tmp_path.iterdir()) == []
    assert ask(engine, 2)[0].reused_tokens == 0


def test_an_abandoned_question_keeps_the_whole_document_or_nothing(tmp_path: Path) -> None:
    """In memory at once; on disk with the next answer, for who abandons it waits for nothing."""
    engine = engine_with(DocumentKV(tmp_path, memory_bytes=8 * MIB, disk_bytes=8 * MIB))
    prompt = prompt_of(random_ids(DOCUMENT, seed=1) + random_ids(ASKED, seed=2))
    prefix = DocumentPrefix(DOCUMENT, ("1:1:a",))
    steps = engine.generate(prompt, max_new_tokens=4, stop=Event(), prefix=prefix)
    assert [next(steps), engine.cached_tokens(prompt, prefix)] == [PrefillProgress(512, 624), 0]
    next(steps)
    assert isinstance(steps, Iterator)
    steps.close()  # type: ignore[attr-defined]
    assert engine.cached_tokens(prompt, prefix) == DOCUMENT
    assert list(tmp_path.glob("*.safetensors")) == []
    assert ask(engine, 2)[0].reused_tokens == DOCUMENT
    restarted = engine_with(on_disk(tmp_path, 8 * MIB))
    assert restarted.cached_tokens(prompt, prefix) == DOCUMENT


def test_loading_from_disk_is_part_of_the_prediction_and_of_the_seconds(tmp_path: Path) -> None:
    documents = DocumentKV(tmp_path, memory_bytes=8 * MIB, disk_bytes=8 * MIB)
    engine = engine_with(documents)
    prompt = prompt_of(random_ids(DOCUMENT, seed=1) + random_ids(ASKED, seed=2))
    prefix = DocumentPrefix(DOCUMENT, ("1:1:a",))
    assert engine.load_seconds(prompt, prefix) == 0.0  # nothing is kept
    ask(engine, 2)
    assert engine.load_seconds(prompt, prefix) == 0.0  # it is in memory
    assert engine.load_seconds(prompt, None) == 0.0
    folder = on_disk(tmp_path, 8 * MIB)
    restarted = engine_with(folder)
    (file,) = tmp_path.glob("*.safetensors")
    size = file.stat().st_size
    sampled = restarted.load_seconds(prompt, prefix)
    assert folder._bytes_per_second is not None
    assert sampled == size / folder._bytes_per_second > 0
    folder._bytes_per_second = 1.0  # a very slow disk
    assert restarted.load_seconds(prompt, prefix) == size
    done, _ = ask(restarted, 2)
    assert done.reused_tokens == DOCUMENT
    assert 0 < restarted.load_seconds(prompt, prefix) < size  # it knows better now
    file.unlink()
    assert restarted.load_seconds(prompt, prefix) == 0.0


def test_the_prediction_counts_only_what_is_not_kept(tmp_path: Path) -> None:
    engine = engine_with(DocumentKV(tmp_path, memory_bytes=8 * MIB, disk_bytes=0))
    whole = engine.predicted_prefill_seconds(1000)
    rest = engine.predicted_prefill_seconds(1000, cached_tokens=900)
    assert whole is not None
    assert rest is not None
    assert 0 < rest < whole
    assert engine.predicted_prefill_seconds(1000, cached_tokens=0) == whole


def test_where_memory_is_short_kept_caches_make_room_and_none_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = DocumentKV(tmp_path, memory_bytes=8 * MIB, disk_bytes=8 * MIB)
    engine = engine_with(documents, kv_reserve_bytes=MIB)
    ask(engine, 2)
    held = documents.memory_used_bytes
    assert held == kv_cache_bytes(engine.spec, DOCUMENT)
    monkeypatch.setattr(Prefill, "_unused_bytes", lambda self: MIB + 1000)
    assert engine.free_bytes() == MIB + 1000 + held
    done, _ = ask(engine, 3)
    assert done.reused_tokens == DOCUMENT  # its tensors went on in the question's own cache
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    documents.release(held)
    done, _ = ask(engine, 3)
    assert done.reused_tokens == documents.memory_used_bytes == 0
    assert list(tmp_path.glob("*.safetensors")) == []


def test_rope_that_follows_the_length_is_never_kept(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = tiny_model("llama", rope_parameters=rope, max_position_embeddings=4096)
    documents = DocumentKV(tmp_path, memory_bytes=8 * MIB, disk_bytes=8 * MIB)
    engine = LocalEngine(
        model, make_tiny_tokenizer(), name="dynamic", document_kv=documents, weights_id="seed 0"
    )
    for _ in range(2):
        assert ask(engine, 2)[0].reused_tokens == 0
    assert documents.memory_used_bytes == 0


# ---- the budget and the folder -----------------------------------------------------------------


def test_memory_keeps_its_budget_and_drops_the_least_recently_used(tmp_path: Path) -> None:
    size = kept_of(key_of(0)).num_bytes
    documents = DocumentKV(tmp_path, memory_bytes=3 * size, disk_bytes=0)
    for number in range(3):
        documents.keep(kept_of(key_of(number)))
    assert documents.load(key_of(0), "cpu") is not None  # used: 1 is now the oldest
    documents.keep(kept_of(key_of(3)))
    assert [documents.has(key_of(n)) for n in range(4)] == [True, False, True, True]
    assert documents.memory_used_bytes == 3 * size
    documents.keep(kept_of(key_of(4), tokens=32))  # larger than all of it
    assert not documents.has(key_of(4))
    documents.release(size + 1)
    assert [documents.has(key_of(n)) for n in range(4)] == [False, False, False, True]
    assert list(tmp_path.iterdir()) == []


def test_disk_keeps_its_budget_and_drops_the_least_recently_used(tmp_path: Path) -> None:
    budget = 300 * 1024
    documents = on_disk(tmp_path, budget)
    for number in range(3):
        documents.save(kept_of(key_of(number), tokens=70))
        os.utime(documents._path(key_of(number)), (number, number))
    assert documents.load(key_of(0), "cpu") is not None
    documents.save(kept_of(key_of(3), tokens=70))
    assert [documents.has(key_of(n)) for n in range(4)] == [True, False, True, True]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= budget
    documents.save(kept_of(key_of(4), tokens=400))  # larger than all of it
    assert [documents.has(key_of(n)) for n in range(5)] == [True, False, True, True, False]


def test_a_budget_of_nothing_keeps_nothing(tmp_path: Path) -> None:
    documents = DocumentKV(tmp_path / "never", memory_bytes=0, disk_bytes=0)
    documents.keep(kept_of(key_of(0)))
    documents.save(kept_of(key_of(0)))
    assert not documents.has(key_of(0))
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "foreign", "renamed", "text"])
def test_a_file_that_is_not_what_was_written_is_ignored_and_removed(
    tmp_path: Path, damage: str
) -> None:
    documents = on_disk(tmp_path)
    documents.save(kept_of(key_of(0)))
    path = documents._path(key_of(0))
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-100] ^= 1
    changed = {
        "truncate": bytes(data[:-7]),
        "flip": bytes(data),
        "empty": b"",
        "foreign": b"\x02\0\0\0\0\0\0\0{}",
        "renamed": bytes(data),
        "text": b"not at all",
    }[damage]
    if damage == "renamed":
        path = path.rename(documents._path(key_of(1)))
    path.write_bytes(changed)
    assert documents.load(path.stem, "cpu") is None
    assert not path.exists()
    documents.save(kept_of(key_of(0)))  # and its place is free again
    assert documents.load(key_of(0), "cpu") is not None


def test_bfloat16_survives_the_disk_bit_for_bit(tmp_path: Path) -> None:
    layers = tuple(
        (torch.rand(1, 2, 5, 8).bfloat16(), torch.rand(1, 2, 5, 8).bfloat16()) for _ in "ab"
    )
    kept = KeptPrefix(key_of(0), ("1:1:a",), 5, layers)
    on_disk(tmp_path).save(kept)
    read = on_disk(tmp_path).load(kept.key, "cpu")
    assert equal(kept, read)
    assert read is not None
    assert (read.documents, read.num_tokens) == (kept.documents, 5)


def test_a_full_disk_keeps_nothing_and_fails_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this system does not let root mount a tmpfs")
    try:
        documents = DocumentKV(folder, memory_bytes=0, disk_bytes=8 * MIB)
        done, _ = ask(engine_with(documents), 2)
        assert done.new_tokens > 0
        assert [path.name for path in folder.iterdir()] == ["document_kv.lock"]
        assert ask(engine_with(documents), 2)[0].reused_tokens == 0
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_folder_that_cannot_be_made_fails_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    documents = on_disk(tmp_path / "file" / "kv", 8 * MIB)
    assert ask(engine_with(documents), 2)[0].new_tokens > 0


def test_two_processes_share_the_folder(tmp_path: Path) -> None:
    """Both write and evict the same few names; what is read meanwhile is whole or absent."""
    code = (
        "import sys; from rag.runtime import prepare_process; prepare_process();"
        "import pathlib, torch; sys.path.insert(0, 'tests');"
        "from test_document_kv import kept_of, key_of, on_disk;"
        "kv = on_disk(pathlib.Path(sys.argv[1]), 300 * 1024);"
        "print('ready', flush=True);"
        "[kv.save(kept_of(key_of(n % 5), tokens=70)) for n in range(60)]"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)]
    documents, found, turns = on_disk(tmp_path, 300 * 1024), 0, 0
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"ready\n"
        while other.poll() is None or turns < 5:
            documents.save(kept_of(key_of(turns % 5), tokens=70))
            found += documents.load(key_of((turns + 4) % 5), "cpu") is not None
            turns += 1
    assert other.returncode == 0
    assert found > 0
    assert documents.strays({"1:1:a"}) == []
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 300 * 1024


def test_a_lowered_budget_deletes_what_it_has_no_room_for(tmp_path: Path) -> None:
    documents = on_disk(tmp_path, 300 * 1024)
    for number in range(3):
        documents.save(kept_of(key_of(number), tokens=70))
        os.utime(documents._path(key_of(number)), (number, number))
    on_disk(tmp_path, 200 * 1024).shrink()
    assert [documents.has(key_of(n)) for n in range(3)] == [False, True, True]
    on_disk(tmp_path, 0).shrink()
    assert [path.name for path in tmp_path.iterdir()] == ["document_kv.lock"]
    on_disk(tmp_path / "never", 0).shrink()
    assert not (tmp_path / "never").exists()


def test_an_evicted_prefix_is_not_written_again_with_every_answer(tmp_path: Path) -> None:
    documents = DocumentKV(tmp_path, memory_bytes=MIB, disk_bytes=200 * 1024)
    for number in range(3):
        documents.keep(kept_of(key_of(number), tokens=70))
        documents.save_rest()
        os.utime(documents._path(key_of(number)), (number, number))
    before = sorted(path.name for path in tmp_path.iterdir())
    documents.save_rest()
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert not documents._path(key_of(0)).exists()


def test_what_a_crash_left_half_written_goes_with_the_next_writing(tmp_path: Path) -> None:
    (tmp_path / f"{key_of(9)}.tmp").write_bytes(b"half")
    documents = on_disk(tmp_path)
    documents.save(kept_of(key_of(0)))
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".lock", ".safetensors"]


# ---- deleted is gone ---------------------------------------------------------------------------


def test_forgetting_a_document_drops_every_prefix_that_holds_it(tmp_path: Path) -> None:
    documents = DocumentKV(tmp_path, memory_bytes=MIB, disk_bytes=MIB)
    held = [("1:1:a",), ("1:1:a", "2:1:b"), ("2:1:b",)]
    for number, versions in enumerate(held):
        documents.keep(kept_of(key_of(number), documents=versions))
        documents.save(kept_of(key_of(number), documents=versions))
    documents.forget({"1:1:a"})
    assert [documents.has(key_of(n)) for n in range(3)] == [False, False, True]
    assert documents.strays({"2:1:b"}) == []


def test_what_was_deleted_meanwhile_is_not_kept(tmp_path: Path) -> None:
    documents = DocumentKV(
        tmp_path, memory_bytes=MIB, disk_bytes=MIB, is_there=lambda versions: "2:1:b" in versions
    )
    for number, versions in enumerate([("1:1:a",), ("2:1:b",)]):
        documents.keep(kept_of(key_of(number), documents=versions))
        documents.save(kept_of(key_of(number), documents=versions))
    assert [documents.has(key_of(n)) for n in range(2)] == [False, True]
    assert documents.memory_used_bytes == kept_of(key_of(0)).num_bytes


@pytest.fixture
def keeping(settings: Settings, handbook: Path) -> Fathom:
    """Return a library that holds the handbook and keeps what the tiny model reads."""
    fathom = Fathom(settings, embedder=HashEmbedder())
    fathom._given_engine = engine_with(fathom.document_kv)
    fathom.ingest(handbook)
    return fathom


def full(fathom: Fathom, question: str) -> Answer:
    answer = fathom.service().answer(question, route=Route.FULL)
    assert answer.receipt.route is Route.FULL
    return answer


def test_the_receipt_says_what_was_kept_and_the_gate_counts_it(keeping: Fathom) -> None:
    first = full(keeping, "What is the harbour fee?")
    second = full(keeping, "3 beacons or more?")
    assert first.receipt.cached_tokens == 0
    prompt, cached = second.receipt.prompt_tokens, second.receipt.cached_tokens
    text = keeping.text(1, 0, 10**6)
    assert cached is not None
    assert len(text.encode()) < cached < prompt  # one token a byte: all of the document
    assert second.receipt.kv_bytes.actual == second.receipt.kv_bytes.predicted
    predicted = [answer.receipt.seconds.prefill_predicted for answer in (first, second)]
    assert predicted[0] is not None
    assert predicted[1] is not None
    assert predicted[1] < predicted[0]
    gates = [
        next(gate.value for gate in answer.receipt.gates if gate.gate == "prefill_seconds")
        for answer in (first, second)
    ]
    assert gates[1] is not None
    assert gates[0] is not None
    assert gates[1] <= gates[0]
    again = full(keeping, "What is the harbour fee?")
    assert again.answer == first.answer
    assert again.receipt.cached_tokens == cached


def test_a_kept_document_passes_the_prefill_gate_that_it_failed(
    keeping: Fathom, settings: Settings
) -> None:
    question = "What is the harbour fee?"
    full(keeping, question)
    engine = keeping.engine
    prompt = keeping.service().plan(question, keeping.documents(), calibrate=True).prompt
    whole = engine.predicted_prefill_seconds(prompt.num_tokens)
    assert whole is not None
    keeping.settings = settings.model_copy(update={"prefill_deadline_seconds": whole / 2})
    keeping.__dict__.pop("_service")
    assert keeping.service().answer(question).receipt.route is Route.FULL
    keeping.document_kv.forget({keeping.documents()[0].version_key})
    receipt = keeping.service().answer(question).receipt
    assert receipt.route is Route.RETRIEVAL
    assert "prefill_seconds" in receipt.reason


def test_deleting_a_document_deletes_its_kv(keeping: Fathom) -> None:
    full(keeping, "What is the harbour fee?")
    folder = keeping.settings.document_kv_dir
    assert len(list(folder.glob("*.safetensors"))) == 1
    assert keeping.document_kv.memory_used_bytes > 0
    keeping.delete(keeping.documents()[0].id)
    assert [path.name for path in folder.iterdir()] == ["document_kv.lock"]
    assert keeping.document_kv.memory_used_bytes == 0


def test_deleting_a_collection_deletes_the_kv_of_its_documents(
    keeping: Fathom, tmp_path: Path
) -> None:
    full(keeping, "What is the harbour fee?")
    other = tmp_path / "other.md"
    other.write_text("# Lights\n\nThe north beacon flashes green every four seconds.\n")
    stays = keeping.ingest(other).document
    keeping.service().answer("north?", document_ids=[stays.id], route=Route.FULL)
    keeping.store.add_to_collection("harbour", [1])
    folder = keeping.settings.document_kv_dir
    assert len(list(folder.glob("*.safetensors"))) == 2
    keeping.delete_collection("harbour")
    (path,) = folder.glob("*.safetensors")
    assert keeping.document_kv.strays({stays.version_key}) == []
    assert keeping.document_kv.memory_used_bytes == path.stat().st_size - _header_bytes(path)


def _header_bytes(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def test_after_a_deletion_no_file_in_home_holds_the_document(keeping: Fathom) -> None:
    """Neither its words nor any stretch of its keys and values."""
    full(keeping, "What is the harbour fee?")
    home = keeping.settings.home
    held = [
        t.view(torch.uint8).numpy().tobytes()[:64]
        for kept in keeping.document_kv._kept.values()
        for layer in kept.layers
        for t in (layer[0].flatten(), layer[1].flatten())
    ]
    needles = [b"crowns a night", b"Berth seven", *held]
    assert len(held) == 4

    def found() -> set[bytes]:
        files = [path.read_bytes() for path in home.rglob("*") if path.is_file()]
        return {needle for needle in needles if any(needle in data for data in files)}

    assert found() == set(needles)
    keeping.delete(keeping.documents()[0].id)
    assert found() == set()


def test_a_budget_of_nothing_erases_what_an_earlier_one_wrote(
    keeping: Fathom, settings: Settings
) -> None:
    full(keeping, "What is the harbour fee?")
    folder = settings.document_kv_dir
    assert len(list(folder.glob("*.safetensors"))) == 1
    later = Fathom(settings.model_copy(update={"document_kv_disk_bytes": 0}))
    assert later.document_kv.memory_used_bytes == 0
    assert list(folder.glob("*.safetensors")) == []


def test_doctor_names_strays_and_repair_removes_them(keeping: Fathom) -> None:
    full(keeping, "What is the harbour fee?")
    folder = keeping.settings.document_kv_dir
    (sound,) = folder.glob("*.safetensors")

    def found() -> tuple[bool, str]:
        check = next(c for c in examine_library(keeping) if c.name == "document KV")
        return check.passed, check.detail

    assert found()[0]
    (folder / "note.txt").write_text("foreign")
    (folder / f"{key_of(1)}.safetensors").write_bytes(b"damaged")
    gone = kept_of(key_of(2), documents=("99:1:a",))
    DocumentKV(folder, memory_bytes=0, disk_bytes=MIB)._write(gone)
    passed, detail = found()
    assert not passed
    for words_of_it in ("is not document KV", "is damaged", "belongs to a document that is gone"):
        assert words_of_it in detail
    assert sum("document KV" in line for line in repair(keeping)) == 3
    assert found()[0]
    assert sorted(p.name for p in folder.iterdir()) == sorted([sound.name, "document_kv.lock"])


# ---- a real model ------------------------------------------------------------------------------


@pytest.mark.model
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 1.0)])
def test_smollm2_gives_the_logits_of_a_fresh_prefill(
    tmp_path: Path, dtype: torch.dtype, tolerance: float
) -> None:
    """The very same ones where the chunks are the same; elsewhere the number format rounds.

    In bfloat16 two fresh prefills in other chunks differ by up to 0.6 (seen), at a standard
    deviation of 2.6 of the logits: that is the tolerance, not what keeping adds.
    """
    try:
        folder = resolve_model("smollm2-135m", Settings())
    except ModelFetchError:
        pytest.skip("smollm2-135m is not fetched (make test fetches it)")
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=dtype, local_files_only=True
    )
    document = torch.tensor([random_ids(300, seed=1)])
    question = torch.tensor([random_ids(ASKED, seed=2)])
    cache = DynamicCache(config=config)
    logits_of(model, document, cache)
    layers = snapshot(cache, config.model_type)
    assert layers is not None
    kept = KeptPrefix(key_of(1), ("1:1:a",), 300, layers)
    disk = on_disk(tmp_path, 100 * MIB)
    disk.save(kept)
    read = disk.load(kept.key, "cpu")
    assert equal(kept, read)
    assert read is not None
    again = DynamicCache(config=config)
    restore(read, again)
    found = logits_of(model, question, again).float()
    assert torch.equal(found, logits_of(model, question, cache).float())
    whole = torch.cat([document, question], dim=1)
    fresh = logits_of(model, whole, DynamicCache(config=config))[-ASKED:].float()
    assert (found - fresh).abs().max() < tolerance
    assert bool(found[-1].argmax() == fresh[-1].argmax())
