"""The step in few kernels: the numbers of the model's own code, and nothing in memory twice.

That it is what answers are written by is seen in test_static_decode.py and test_static_rows.py: all
models of its families go through it there.
"""

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from eval.bench.windowed import peak_allocated_bytes
from rag.lm import lean_step as module
from rag.lm.agreement import difference, tolerance
from rag.lm.lean_step import STEP_FAMILIES, LeanStep, lean_step
from rag.lm.native_cache import merge, native_cache
from rag.lm.shared_prefix import SharedPrefixCache, can_share, forward_shared
from rag.lm.static_cache import STATIC_FAMILIES
from rag.lm.static_decode import StaticDecoder, can_decode_statically
from test_static_decode import NEW, answer, engine_of, prefilled, spec_of
from test_static_rows import PADDING, cache_of
from tiny_families import tiny_model

# What a layer is, see decision 40; norms of queries and keys, and joining them, are three more.
OPERATIONS = {"llama": 19, "mistral": 19, "qwen2": 19, "qwen3": 22}
WITHOUT_WINDOWS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False},
}


def steps_of(model: Any, *, rows: str) -> tuple[StaticDecoder, StaticDecoder]:  # noqa: ANN401
    """Return two decoders of the same prompts, a lean one and one by the model's own code."""

    def decoder(*, is_lean: bool) -> StaticDecoder:
        if rows == "one":
            cache, first_id = prefilled(model, 40)
            return StaticDecoder(model, cache, [first_id], max_new_tokens=NEW, is_lean=is_lean)
        cache, first_ids = cache_of(model, is_shared=rows == "shared")
        return StaticDecoder(
            model,
            cache,
            first_ids,
            max_new_tokens=NEW,
            front_padding=PADDING,
            is_lean=is_lean,
        )

    return decoder(is_lean=True), decoder(is_lean=False)


# ---- what it gives -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", ["one", "joined", "shared"])
@pytest.mark.parametrize("family", sorted(STEP_FAMILIES))
def test_its_logits_are_those_of_the_models_own_code(
    family: str, rows: str, dtype: torch.dtype
) -> None:
    # Two of the families have windows, which share nothing.
    model = tiny_model(family, **(WITHOUT_WINDOWS.get(family, {}) if rows == "shared" else {}))
    model.to(dtype)
    assert can_share(model, spec_of(model)) or rows != "shared"
    lean, own = steps_of(model, rows=rows)
    for _ in range(NEW - 1):
        lean.advance()
        own.advance()
        if dtype == torch.float32:
            torch.testing.assert_close(lean.logits, own.logits, rtol=1e-4, atol=1e-5)
        else:
            for found, expected in zip(lean.logits, own.logits, strict=True):
                assert difference(found, expected) < tolerance(model) / 4
        with torch.inference_mode():
            lean.token.copy_(own.token)


@pytest.mark.parametrize(
    ("family", "facts"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"tie_word_embeddings": True, "head_dim": 12}),
        ("qwen3", {"attention_bias": True, "num_key_value_heads": 4}),
        ("mistral", {"sliding_window": None, "num_key_value_heads": 1}),
        ("qwen2", {"hidden_act": "gelu"}),
    ],
)
def test_biases_heads_and_activations_are_the_models(family: str, facts: dict[str, Any]) -> None:
    model = tiny_model(family, **facts)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "norm.weight")):  # they begin as zeros and ones
                parameter.uniform_(-1, 1)
    plain = prefilled(model, 40)
    assert can_decode_statically(model, spec_of(model))
    assert isinstance(lean_step(model), LeanStep)
    lean, own = steps_of(model, rows="one")
    for _ in range(NEW - 1):
        assert lean.next_ids() == own.next_ids()
        torch.testing.assert_close(lean.logits, own.logits, rtol=1e-4, atol=1e-5)
    again = prefilled(model, 40)  # the model itself computes what it did before
    assert again[1] == plain[1]
    for one, other in zip(again[0].layers, plain[0].layers, strict=True):
        assert torch.equal(one.keys, other.keys)


# ---- its weights -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(STEP_FAMILIES))
def test_the_models_weights_are_views_of_those_that_are_multiplied(family: str) -> None:
    model = tiny_model(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step = lean_step(model)
    assert step is not None
    assert lean_step(model) is step
    for own, layer in zip(model.get_decoder().layers, step.layers, strict=True):
        attention, feed_forward = own.self_attn, own.mlp
        for [merged], parts in (
            (layer.qkv, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.gate_up, (feed_forward.gate_proj, feed_forward.up_proj)),
        ):
            storage = merged.weight.untyped_storage()
            assert storage.nbytes() == sum(
                part.weight.numel() * part.weight.element_size() for part in parts
            )
            for part in parts:
                assert part.weight.untyped_storage().data_ptr() == storage.data_ptr()
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_no_more_than_one_layers_two_matrices_are_there_twice() -> None:
    shape = {"num_hidden_layers": 8, "hidden_size": 256, "intermediate_size": 1024}
    models = []

    def loaded() -> Any:  # noqa: ANN401
        models.append(tiny_model("llama", **shape))
        return models[-1]

    gc.collect()  # what goes of other tests meanwhile would count
    alone = peak_allocated_bytes(loaded, "cpu")
    beside = peak_allocated_bytes(lambda: lean_step(loaded()), "cpu") - alone
    assert lean_step(models[-1]) is not None
    pair = 2 * 1024 * 256 * 4  # of eight layers
    assert beside < 1.25 * pair


def _hooked(model: Any) -> None:  # noqa: ANN401
    model.get_decoder().layers[1].mlp.up_proj.register_forward_hook(lambda *_: None)


def _adapted(model: Any) -> None:  # noqa: ANN401
    class Adapted(torch.nn.Linear):
        """Somebody's, which does more than its weight says."""

    attention = model.get_decoder().layers[1].self_attn
    adapted = Adapted(attention.q_proj.in_features, attention.q_proj.out_features, bias=False)
    attention.q_proj = adapted


def _shared(model: Any) -> None:  # noqa: ANN401
    first, second = model.get_decoder().layers
    second.mlp = first.mlp


def _mixed(model: Any) -> None:  # noqa: ANN401
    model.get_decoder().norm.to(torch.float64)


def _spread(model: Any) -> None:  # noqa: ANN401
    model.get_decoder().layers[1].to("meta")


@pytest.mark.parametrize("change", [_hooked, _adapted, _shared, _mixed, _spread])
def test_what_something_was_done_to_is_left_alone(change: Callable[[Any], None]) -> None:
    model = tiny_model("llama")
    change(model)
    weights = {name: value.data_ptr() for name, value in model.named_parameters()}
    assert lean_step(model) is None
    assert {name: value.data_ptr() for name, value in model.named_parameters()} == weights


@pytest.mark.parametrize("family", sorted(STATIC_FAMILIES - STEP_FAMILIES))
def test_other_families_keep_their_own_code(family: str) -> None:
    assert lean_step(tiny_model(family)) is None


# ---- what is wrong is not used -----------------------------------------------------------------


def test_a_lean_step_that_gives_something_else_leaves_the_step_to_the_models_own_code(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("llama")
    spec = spec_of(model)
    assert can_decode_statically(model, spec)
    assert lean_step(model) is not None
    with monkeypatch.context() as patch:
        right = LeanStep._turn

        def turned_back(step: LeanStep, cos: torch.Tensor, sin: torch.Tensor) -> Any:  # noqa: ANN401
            return right(step, cos, -sin)

        patch.setattr(LeanStep, "_turn", turned_back)
        assert can_decode_statically(model, spec, "joined")
    assert "the model's own code: the lean one's logits differ" in caplog.text
    assert lean_step(model) is None
    caplog.clear()
    assert can_decode_statically(model, spec)  # proven anew, of the other step
    assert not caplog.text
    text, _ = answer(engine_of(model, static=False), 40)
    assert answer(engine_of(model, static=True), 40)[0] == text


def test_without_memory_for_a_matrix_twice_the_step_is_the_models_own_code(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("llama")
    text, _ = answer(engine_of(model, static=False), 40)
    right, merged = module._merged, []

    def full(linears: Any) -> Any:  # noqa: ANN401
        merged.append(linears)
        if len(merged) == 3:  # after the first layer
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right(linears)

    monkeypatch.setattr(module, "_merged", full)
    assert answer(engine_of(model, static=True), 40)[0] == text
    assert lean_step(model) is None
    assert "the model's own code: CUDA out of memory" in caplog.text
    assert can_decode_statically(model, spec_of(model))


# ---- how little it is ---------------------------------------------------------------------------


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations that compute something: those that only look at a tensor do not."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counted: Counter[str] = Counter()
        self.is_within = False

    def __torch_dispatch__(
        self,
        function: Any,  # noqa: ANN401
        types: Any,  # noqa: ANN401
        args: Any = (),  # noqa: ANN401
        kwargs: Any = None,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        found = function(*args, **(kwargs or {}))
        given = _storages((args, kwargs))
        is_view = not function._schema.is_mutable and _storages(found) <= given
        if not (self.is_within or is_view or "empty" in str(function)):
            self.counted[str(function)] += 1
        return found


class _FusedNorm(TorchFunctionMode):
    """Counts a norm as one, which it is on a GPU; elsewhere torch makes it of several."""

    def __init__(self, operations: _Operations) -> None:
        super().__init__()
        self._operations = operations

    def __torch_function__(
        self,
        function: Any,  # noqa: ANN401
        types: Any,  # noqa: ANN401
        args: Any = (),  # noqa: ANN401
        kwargs: Any = None,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        is_norm = function is torch.nn.functional.rms_norm
        if is_norm:
            self._operations.counted["rms_norm"] += 1
        self._operations.is_within = is_norm
        try:
            return function(*args, **(kwargs or {}))
        finally:
            self._operations.is_within = False


def _storages(values: Any) -> set[int]:  # noqa: ANN401
    return {
        value.untyped_storage()._cdata
        for value in tree_leaves(values)
        if isinstance(value, torch.Tensor)
    }


@contextmanager
def counted() -> Iterator[Counter[str]]:
    operations = _Operations()
    with operations, _FusedNorm(operations):
        yield operations.counted


def operations_of_a_layer(
    family: str, *, rows: int, is_shared: bool, is_lean: bool = True
) -> Counter[str]:
    """Return what a step computes more if the model has a layer more; of a GPU's kernels."""

    def of_a_step(num_layers: int) -> Counter[str]:
        shape = {"num_hidden_layers": num_layers, "head_dim": 16}
        model = tiny_model(family, **shape, **WITHOUT_WINDOWS.get(family, {}))
        model = model.to(torch.bfloat16).to("meta")
        prefix = native_cache(model.config)
        ids = torch.zeros(1, 20, dtype=torch.long, device="meta")
        with torch.inference_mode():
            model(input_ids=ids, past_key_values=prefix)
        cache: Any = SharedPrefixCache(prefix) if is_shared else merge([prefix] * rows)
        if is_shared and rows > 1:
            forward_shared(model, [[0] * 5] * rows, cache, front_padding=[0] * rows)
        decoder = StaticDecoder(
            model,
            cache,
            [5] * rows,
            max_new_tokens=NEW,
            front_padding=[0] * rows,
            is_lean=is_lean,
        )
        with counted() as found:
            decoder.advance()
        return found

    return of_a_step(3) - of_a_step(2)


@pytest.mark.parametrize(("family", "most"), OPERATIONS.items())
def test_a_layer_is_so_many_operations(
    family: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a prompt where it stands: one row, and several behind one document."""
    monkeypatch.setattr("rag.lm.partial_attention._choose", lambda *_: "flash")
    alone = operations_of_a_layer(family, rows=1, is_shared=True)
    assert alone.total() == most
    assert alone["aten._scaled_dot_product_flash_attention.default"] == 1
    # Two copies more: the rows' queries in the order of the document's heads, and of their own.
    assert operations_of_a_layer(family, rows=2, is_shared=True).total() == most + 2
    # In a cache of its own there is no document to attend to, and none to join with.
    assert operations_of_a_layer(family, rows=1, is_shared=False).total() == most - 3
    own_code = operations_of_a_layer(family, rows=1, is_shared=True, is_lean=False)
    assert own_code.total() >= most + 28
    assert own_code["aten.linear.default"] == 7


def test_prompts_are_read_as_many_kernels_as_before() -> None:
    """The model itself does not know that its weights lie one after the other."""
    model = tiny_model("llama").to(torch.bfloat16).to("meta")
    ids = torch.zeros(1, 20, dtype=torch.long, device="meta")

    def of_a_prompt() -> Counter[str]:
        with torch.inference_mode(), counted() as found:
            model(input_ids=ids, past_key_values=native_cache(model.config))
        return found

    before = of_a_prompt()
    assert lean_step(model) is not None
    assert of_a_prompt() == before
