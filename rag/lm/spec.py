"""The shape and limits of a language model, read from its config without its weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rag.errors import UnsupportedModelError
from rag.lm.layers import ONE_PIECE_FAMILIES, cache_layers, check_shape, unsupported
from rag.lm.layers import VERIFIED_FAMILIES as VERIFIED_FAMILIES
from rag.lm.layers import LayerSpec as LayerSpec
from rag.lm.meta_model import (
    Activations,
    build_meta_model,
    count_parameters,
    measured_layers,
    read_activations,
    same_cache,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# What a config that lies makes of transformers' code and of ours.
_CONFIG_ERRORS = (
    ArithmeticError,
    AttributeError,
    IndexError,
    KeyError,
    RuntimeError,
    TypeError,
    ValueError,
)

# Families with a table of positions, learned or computed once: nothing exists beyond its last row.
_POSITION_TABLES = {
    "biogpt": ("learned", "max_position_embeddings"),
    "codegen": ("table", "n_positions"),
    "gpt2": ("learned", "n_positions"),
    "gpt_bigcode": ("learned", "n_positions"),
    "gptj": ("table", "n_positions"),
    "opt": ("learned", "max_position_embeddings"),
}

# Families that subtract from the scores what grows with the distance (ALiBi), and the field, if
# any, that says how far that was trained. MPT builds its slopes that long: a hard end.
_ALIBI = {"bloom": ("seq_length", False), "mpt": ("max_seq_len", True)}

# Families whose layers know the order of tokens from the recurrent ones among them alone.
_UNPOSITIONED = frozenset({"jamba", "kimi_linear", "nemotron_h"})

# Families in which the sliding layers alone are rotated, where there are any.
_ROTATED_WINDOWS_ONLY = frozenset({"cohere2", "exaone4"})


_ROPE_TYPES = frozenset(
    {"default", "dynamic", "linear", "llama3", "longrope", "proportional", "yarn"}
)


# Elements that share a scale in the format Q8_0.
Q8_GROUP = 32


class KVDtype(StrEnum):
    """The number format of cached keys, values and latents.

    Those of llama.cpp (q8_0, q4_0) count the scale of each 32 elements; int8, fp8 and int4 count
    the elements alone, as a cache with one scale for a whole tensor does. This engine keeps a cache
    in the model's own format or in q8_0; the others are planned for, where servers have them.
    """

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FP8 = "fp8"
    INT8 = "int8"
    INT4 = "int4"
    Q8_0 = "q8_0"
    Q4_0 = "q4_0"


@dataclass(frozen=True, slots=True)
class PositionRange:
    """How one group of layers encodes positions, and how far that was trained.

    `kind` is a RoPE type of transformers, or one of learned, table, sinusoidal, alibi and none. Up
    to `native` tokens apart is what was trained without scaling; up to `declared` is what the
    checkpoint's own scaling promises; None is no limit. Layers with a `window` never see two tokens
    further apart than that. Beyond a `hard_end` the positions do not exist.
    """

    layers: str
    kind: str
    native: int | None
    declared: int | None
    window: int | None = None
    hard_end: bool = False


# A prompt enters the model in pieces of so many tokens. A chunk of 512 keeps a CPU busy for a
# second; on a GPU it is computed sooner than its kernels are launched: 16,384 tokens of an 8B model
# took an H100 2.3, 1.1 and 0.9 seconds in chunks of 512, 2,048 and 4,096.
CHUNK_TOKENS = {"cpu": 512, "cuda": 4_096}


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What the gates need to know of a model; plain numbers, no torch.

    `linear_parameters` counts the weights that multiply every token (active experts only, no
    embeddings, no output head); `dtype_bytes` is the size of one element of weights and cache;
    `max_positions` is the longest context that the checkpoint declares, None if it declares none.
    `cache_basis` says how the layers are known: by formulas verified against real tensors, or
    measured on the modelling code of this family alone. `activations` is what a forward pass
    computes beside the cache. `kv_dtype` is the format in which full layers are cached, None for
    the model's own; see `quantised`. `chunk_tokens` are the most tokens of a prompt that enter the
    model at once on `device_type`, cpu or cuda, and `num_threads` those that attend to them on a
    CPU without a mask; see `on_device`.
    """

    model_type: str
    layers: tuple[LayerSpec, ...]
    positions: tuple[PositionRange, ...]
    dtype_bytes: int
    vocab_size: int
    max_positions: int | None
    num_parameters: int
    linear_parameters: int
    cache_basis: Literal["verified", "measured"] = "verified"
    activations: Activations = field(default_factory=Activations)
    kv_dtype: KVDtype | None = None
    chunk_tokens: int = CHUNK_TOKENS["cpu"]
    device_type: str = "cpu"
    num_threads: int = 1

    def on_device(
        self,
        device_type: str,
        *,
        has_kernel: Callable[[LayerSpec], bool] | None = None,
        num_threads: int | None = None,
    ) -> ModelSpec:
        """Return the same shape where it is computed.

        On a GPU prompts enter it in other chunks. Full layers may attend to them without a mask, on
        a GPU in two parts, on a CPU by a paged kernel: if the model's attention does so, and there
        is a kernel for the width of their heads.

        Args:
            device_type: cpu or cuda.
            has_kernel: says so of a layer; by default what is here is tried.
            num_threads: those that attend on a CPU; by default torch's.
        """
        spec = replace(self, device_type=device_type, chunk_tokens=CHUNK_TOKENS[device_type])
        if not self.activations.needs_no_mask:
            return spec
        if has_kernel is None:
            has_kernel = partial(_has_kernel_here, device_type, self.dtype_bytes)
        layers = tuple(
            replace(
                layer,
                maskless=layer.kind in ("full", "hybrid")
                and layer.key_elements_per_token == layer.value_elements_per_token
                and has_kernel(layer),
            )
            for layer in self.layers
        )
        if device_type == "cpu" and any(layer.maskless for layer in layers):
            spec = replace(spec, num_threads=num_threads or _torch_threads())
        return replace(spec, layers=layers)

    @property
    def quantised(self) -> ModelSpec | None:
        """The same shape with its full layers cached in 8 bits; None where they cannot be, or are.

        Windows, states and latents stay in the model's format: they are small already. A token's
        keys and values have to divide into groups that share a scale.
        """
        full = [layer for layer in self.layers if layer.kind == "full"]
        divides = all(
            elements % Q8_GROUP == 0
            for layer in full
            for elements in (layer.key_elements_per_token, layer.value_elements_per_token)
        )
        is_latent = any(layer.kind == "latent" for layer in self.layers)
        if self.kv_dtype or not full or not divides or is_latent or self.cache_basis != "verified":
            return None
        return replace(self, kv_dtype=KVDtype.Q8_0)

    @property
    def num_layers(self) -> int:
        """The number of layers."""
        return len(self.layers)

    @property
    def weights_bytes(self) -> int:
        """The bytes of all weights in the model's dtype."""
        return self.num_parameters * self.dtype_bytes

    @property
    def can_roll_back(self) -> bool:
        """Whether the last tokens can be taken out of the cache again.

        Not where a layer folds them into a state: such a cache must be copied before it is used
        for a question. A sliding layer can, if the cache was told to remember what it drops
        (`activate_past_recording`) or has not yet dropped anything.
        """
        return not any(
            layer.state_elements or layer.float32_state_elements for layer in self.layers
        )

    @property
    def prefills_in_chunks(self) -> bool:
        """Whether a prompt that enters in pieces gives the same answer as in one piece.

        Known for the verified families only, and not true of all of them.
        """
        if self.model_type in ONE_PIECE_FAMILIES:
            return False
        return self.cache_basis == "verified" or self.can_roll_back

    @property
    def reach_tokens(self) -> int | None:
        """The furthest that a token can influence a later one, counted with both; None if any.

        A model whose attention is all windowed hands knowledge on from layer to layer, each by at
        most its window; one full or recurrent layer reaches everything.

        Source: Mistral 7B, arXiv:2310.06825, section 2.
        """
        attending = [layer for layer in self.layers if layer.kind != "none"]
        windows = [layer.window for layer in attending if layer.window is not None]
        if not attending or len(windows) < len(attending):
            return None
        return 1 + sum(window - 1 for window in windows)

    @classmethod
    def from_config(cls, config: PreTrainedConfig, *, dtype_bytes: int | None = None) -> ModelSpec:
        """Return the spec of a transformers config; the config alone is read, no weights.

        What each layer caches is worked out by formula and compared with a run of the real
        modelling code on the meta device at two lengths. Where they differ, or no formula knows the
        family, the run is believed; where there is no such run either, the model is refused.

        Args:
            config: what `load_config` or `AutoConfig.from_pretrained` gave.
            dtype_bytes: bytes of one element of the weights; by default those of `config.dtype`,
                and 4 where the config names none.

        Raises:
            UnsupportedModelError: if the bytes of the cache or the meaning of positions are not
                known exactly, or the config contradicts itself.
        """
        try:
            return cls._from_config(config, dtype_bytes)
        except _CONFIG_ERRORS as error:
            detail = str(error).strip().splitlines() or [""]
            raise unsupported(
                f"its config of type {config.model_type!r} is not usable: "
                f"{type(error).__name__}: {detail[0]}"
            ) from error

    @classmethod
    def _from_config(cls, config: PreTrainedConfig, dtype_bytes: int | None) -> ModelSpec:
        text = config.get_text_config(decoder=True)
        check_shape(text)
        _check_ropes(text)
        model = build_meta_model(config)
        layers, basis = _checked_layers(model, text)
        positions = _positions(text, layers)
        num_parameters, linear_parameters = count_parameters(model, text)
        if dtype_bytes is None:
            dtype = getattr(text, "dtype", None) or getattr(config, "dtype", None)
            dtype_bytes = int(getattr(dtype, "itemsize", 4))
        return cls(
            model_type=text.model_type,
            layers=layers,
            positions=positions,
            dtype_bytes=dtype_bytes,
            vocab_size=int(text.vocab_size),
            max_positions=_max_positions(text, positions),
            num_parameters=num_parameters,
            linear_parameters=linear_parameters,
            cache_basis=basis,
            activations=read_activations(model, text),
        )


def load_config(folder: Path) -> PreTrainedConfig:
    """Return the config in a model's folder; nothing is fetched and no code of the model runs.

    Raises:
        UnsupportedModelError: if `config.json` is missing, damaged or contradicts itself, its model
            type is not known, or it asks for code of its own.
    """
    from transformers import AutoConfig

    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    # Its checks raise an error class of huggingface_hub's own beside these.
    except Exception as error:
        if own_code := _own_code(folder):
            raise UnsupportedModelError(
                f"the model in {folder} asks for code of its own ({own_code}), which is not run",
                hint="give a model whose type transformers knows",
            ) from error
        detail = " ".join(str(error).split())[:300]
        raise UnsupportedModelError(
            f"the config.json in {folder} is not usable: {type(error).__name__}: {detail}",
            hint="give a model whose type transformers knows, with an unedited config.json",
        ) from error
    return config


def _own_code(folder: Path) -> str | None:
    """Return the code that a config.json wants to be run, None if it wants none."""
    try:
        wanted = json.loads((folder / "config.json").read_text(encoding="utf-8"))["auto_map"]
        return ", ".join(map(str, wanted.values())) or None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _checked_layers(
    model: Any,  # noqa: ANN401
    text: PreTrainedConfig,
) -> tuple[tuple[LayerSpec, ...], Literal["verified", "measured"]]:
    """Return what each layer caches: the formula's answer where the real code agrees with it."""
    is_verified = text.model_type in VERIFIED_FAMILIES
    measured = measured_layers(model, text)
    if is_verified:
        layers = cache_layers(text)
        if measured is None or same_cache(layers, measured):
            return layers, "verified"
    if measured is None:
        raise unsupported(
            f"model type {text.model_type!r} is not among the verified families, and its code does "
            "not run without weights"
        )
    return measured, "measured"


# ---- positions --------------------------------------------------------------------------------


def _check_ropes(text: Any) -> None:  # noqa: ANN401
    """Refuse a missing or unknown RoPE before transformers' code stumbles over it."""
    if not hasattr(text, "rope_parameters") or _is_unpositioned(text):
        return
    rope = text.rope_parameters
    if not rope:
        if getattr(text, "alibi", False):
            return
        raise unsupported("its config has no rope_parameters")
    nested = [value for value in rope.values() if isinstance(value, dict)]
    for parameters in nested or [rope]:
        kind = parameters.get("rope_type") or "default"
        if kind not in _ROPE_TYPES:
            raise unsupported(f"RoPE type {kind!r} is not known")


def _positions(text: Any, layers: tuple[LayerSpec, ...]) -> tuple[PositionRange, ...]:  # noqa: ANN401
    """Return the position ranges of `text`, one per group of layers that shares an encoding."""
    family = text.model_type
    if family in _POSITION_TABLES:
        kind, field = _POSITION_TABLES[family]
        rows = int(getattr(text, field))
        return (PositionRange("all", kind, rows, rows, hard_end=True),)
    if family in _ALIBI or getattr(text, "alibi", False):
        field, hard_end = _ALIBI.get(family, ("", False))
        trained = getattr(text, field, None)
        return (PositionRange("all", "alibi", trained, trained, hard_end=hard_end),)
    if family == "xglm":
        longest = int(text.max_position_embeddings)
        return (PositionRange("all", "sinusoidal", longest, longest),)
    if _is_unpositioned(text):
        return (PositionRange("all", "none", None, None),)
    rope = getattr(text, "rope_parameters", None)
    if not rope:
        raise unsupported("its config has no rope_parameters")
    if any(isinstance(value, dict) for value in rope.values()):
        groups = {name: value for name, value in rope.items() if value is None or dict(value)}
        kinds = set(getattr(text, "layer_types", None) or rope)
        return tuple(
            _rope_range(text, parameters, group, _widest(layers, group))
            for group, parameters in groups.items()
            if group in kinds
        )
    return _rotated_and_not(text, rope, layers)


def _is_unpositioned(text: Any) -> bool:  # noqa: ANN401
    if text.model_type == "granitemoehybrid":
        return bool(text.position_embedding_type != "rope")
    if text.model_type == "zamba2":
        return not text.use_mem_rope
    return text.model_type in _UNPOSITIONED


def _rotated_and_not(
    text: Any,  # noqa: ANN401
    rope: dict[str, Any],
    layers: tuple[LayerSpec, ...],
) -> tuple[PositionRange, ...]:
    """Return the range of the layers with RoPE, and that of those without, where there are any."""
    flags = [bool(flag) for flag in getattr(text, "no_rope_layers", None) or [1] * len(layers)]
    if text.model_type in _ROTATED_WINDOWS_ONLY and any(layer.window for layer in layers):
        flags = [layer.window is not None for layer in layers]
    attending = [
        (flag, layer)
        for flag, layer in zip(flags, layers, strict=True)
        if layer.kind not in ("linear", "none")
    ]
    rotated = [layer for flag, layer in attending if flag]
    if not rotated:
        return (PositionRange("all", "none", None, None),)
    windows = [layer.window for layer in rotated if layer.window is not None]
    window = max(windows) if len(windows) == len(rotated) else None
    if len(rotated) == len(attending):
        return (_rope_range(text, rope, "all", window),)
    return (
        _rope_range(text, rope, "with RoPE", window),
        PositionRange("without RoPE", "none", None, None),
    )


def _widest(layers: tuple[LayerSpec, ...], group: str) -> int | None:
    """Return the widest window of the layers that `group`, a layer type, names."""
    kind = {"sliding_attention": "sliding", "chunked_attention": "chunked"}.get(group)
    return max((layer.window or 0 for layer in layers if layer.kind == kind), default=0) or None


def _rope_range(
    text: Any,  # noqa: ANN401
    rope: dict[str, Any] | None,
    group: str,
    window: int | None,
) -> PositionRange:
    """Return the range of one RoPE: what each scaling type makes of `max_position_embeddings`."""
    if rope is None:
        return PositionRange(group, "none", None, None, window)
    longest = int(text.max_position_embeddings)
    kind = str(rope.get("rope_type") or "default")
    factor = float(rope.get("factor") or 1.0)
    original = int(
        rope.get("original_max_position_embeddings")
        or getattr(text, "original_max_position_embeddings", None)
        or longest
    )
    if longest < 1 or original < 1 or factor < 1:
        raise unsupported(
            f"max_position_embeddings {longest}, original {original} and RoPE factor {factor}, "
            "expected all of them to be 1 or more"
        )
    native = declared = longest
    if kind == "linear":
        native = int(longest / factor)
    elif kind == "llama3":
        native, declared = original, max(longest, original)
    elif kind == "yarn":
        native, declared = original, max(longest, int(original * factor))
    elif kind == "longrope":
        # Beyond this length its frequencies change, and cached keys would no longer fit them. So
        # do those of `dynamic`, beyond the length it was trained for.
        native = declared = original
    return PositionRange(group, kind, native, declared, window)


def _max_positions(text: Any, positions: tuple[PositionRange, ...]) -> int | None:  # noqa: ANN401
    """Return the longest context that any group of layers, or else the config, declares."""
    declared = [reach.declared for reach in positions if reach.declared is not None]
    if declared:
        return max(declared)
    if any(reach.kind == "alibi" for reach in positions):
        return None  # what it declares, if anything, is not what it was trained for
    longest = getattr(text, "max_position_embeddings", None)
    return longest if isinstance(longest, int) and longest > 0 else None


def _has_kernel_here(device_type: str, dtype_bytes: int, layer: LayerSpec) -> bool:
    """Say whether this machine attends to chunks without a mask in heads like those of a layer."""
    if device_type == "cuda":
        from rag.lm.chunked_attention import has_kernel_here

        return has_kernel_here(layer.head_width, dtype_bytes=dtype_bytes)
    from rag.lm.paged_attention import has_paged_attention

    group = layer.query_elements_per_token // (layer.key_elements_per_token or 1)
    return dtype_bytes == 2 and has_paged_attention(group, layer.head_width)


def _torch_threads() -> int:
    import torch

    return torch.get_num_threads()
