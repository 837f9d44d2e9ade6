"""A sliding window with sinks for RoPE models that were born without one; memory stays bounded.

The cache keeps the first `num_sinks` tokens for good, and the last ones that fit the window. What
left the window is gone: this bounds memory, not knowledge, so it is for reading a text once from
its start to its end with the question in sight, never for answering from an arbitrary place in it.
How `scan` uses it, with instruction and question as the sinks:

    checked = check_windowed(model)                   # once a model; refuses what is not exact
    plan = WindowPlan(num_sinks=len(question_ids), window=1024)
    session = WindowedSession(checked, plan)
    session.read(question_ids)                        # the sinks, prefilled once
    for stride_ids in strides:                        # the document, every token once
        session.read(stride_ids)
        branch = session.fork()                       # costs no memory until it reads
        logits = branch.read(cue_ids)                 # "Findings so far:"
        while (token := int(logits.argmax())) not in end_ids:
            logits = branch.read([token])
        # `session` has not seen the branch: the next stride goes on sliding.

Distances are those of StreamingLLM (arXiv:2309.17453, section 3.2), for many queries at a time:
inside the window they are true, and a sink is never further away than the cache is long, so no
distance leaves the trained range however long the text is. Keys are stored turned by their own
position; scores with the sinks come from queries turned back (a rotation after a rotation is a
rotation), by the model's own rotary code.

No model is patched: a cache, and an attention function registered with transformers under a name
that a model bears only while a session computes. Without a session's plan that function refuses.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

from rag.errors import UnsupportedModelError
from rag.lm.agreement import difference, tolerance
from rag.lm.forward import stoppable
from rag.lm.kv_bytes import measured_kv_bytes
from rag.lm.spec import CHUNK_TOKENS
from rag.lm.window_kernels import WindowPlan, WindowStep, choose_attention, visible_keys

# Families for which tests compare the windowed logits with a dense reference.
WINDOWED_FAMILIES = frozenset(
    {
        "arcee",
        "cohere",
        "ernie4_5",
        "gemma",
        "glm",
        "glm4",
        "gpt_neox",
        "granite",
        "llama",
        "mistral",
        "mixtral",
        "olmo",
        "olmo2",
        "phi",
        "phi3",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "seed_oss",
        "smollm3",
        "starcoder2",
    }
)
# `dynamic` and `longrope` turn by other angles once a text grows: cached keys would be stale.
EXACT_ROPES = frozenset({"default", "linear", "llama3", "yarn"})

_ATTENTION = "fathom_windowed"
_PROBE = "fathom_windowed_probe"

# The self-test reads this many tokens, and shifts them by so many positions.
_TEST_TOKENS = 40
_TEST_SHIFT = 23


@dataclass(frozen=True, slots=True)
class WindowedModel:
    """A model that passed `check_windowed`, and what was learned about it.

    `turning_layers` are the indexes of the layers that rotate queries and keys; in some families
    others do not.
    """

    model: Any
    turning_layers: frozenset[int]


class WindowedSession:
    """One sequence read through a window: read, fork, read on. One at a time on one model."""

    def __init__(self, checked: WindowedModel, plan: WindowPlan) -> None:
        """Start with an empty cache.

        Args:
            checked: what `check_windowed` gave.
            plan: the first `plan.num_sinks` tokens that are read become the sinks.
        """
        self._checked = checked
        self._plan = plan
        num_layers = checked.model.config.get_text_config(decoder=True).num_hidden_layers
        self._cache = Cache(layers=[_SinkWindowLayer(plan) for _ in range(num_layers)])

    @property
    def num_read(self) -> int:
        """Tokens read so far, those that left the window included."""
        return int(self._cache.get_seq_length())

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values that the cache holds now."""
        return measured_kv_bytes(self._cache)

    @property
    def chunk_tokens(self) -> int:
        """The most tokens computed at once; a longer chunk would mostly compute masked scores."""
        return min(CHUNK_TOKENS[self._checked.model.device.type], self._plan.window)

    def read(self, token_ids: Sequence[int], *, stop: Event | None = None) -> Tensor:
        """Append the tokens, chunk by chunk; one token is a decode step.

        Args:
            token_ids: at least one.
            stop: looked at before each layer.

        Returns:
            float [vocab_size], on the model's device: the logits of the token that comes next.

        Raises:
            ValueError: if there are no tokens.
            PassStoppedError: if it was stopped; the session is of no use then.
        """
        if not token_ids:
            raise ValueError("read needs at least one token")
        for start in range(0, len(token_ids), self.chunk_tokens):
            piece = token_ids[start : start + self.chunk_tokens]
            logits = self.logits(piece, last_only=True, stop=stop)
        return logits[-1]

    def logits(
        self, token_ids: Sequence[int], *, last_only: bool = False, stop: Event | None = None
    ) -> Tensor:
        """Append the tokens in one piece; return the logits after each, [len(token_ids), vocab]."""
        model = self._checked.model
        ids = torch.tensor([list(token_ids)], device=model.device)
        first = self.num_read
        positions = torch.arange(first, first + ids.shape[1], device=model.device)[None]
        with (
            torch.inference_mode(),
            attention_named(model, _ATTENTION),
            stoppable(model, stop),
        ):
            step = self._step(positions)
            output = model(
                input_ids=ids,
                position_ids=positions,
                attention_mask=step.mask[None, None],  # 4D: transformers hands it on as it is
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1 if last_only else 0,
                fathom_step=step,
            )
            found: Tensor = output.logits[0]
        return found

    def fork(self) -> WindowedSession:
        """Return a second session that has read the same; neither sees what the other reads on."""
        other = WindowedSession(self._checked, self._plan)
        # Shared, not copied: an update makes new tensors and never writes into the old ones.
        other._cache.layers = [copy.copy(layer) for layer in self._cache.layers]
        return other

    def _step(self, positions: Tensor) -> WindowStep:
        """Return what the attention of every layer needs to know of this piece."""
        plan = self._plan
        num_queries = positions.shape[1]
        num_keys = plan.kept_tokens(self.num_read) + num_queries
        turn = None
        if plan.caps_sink_distance and plan.num_sinks:
            furthest = plan.num_sinks + plan.window - 1
            back = positions.clamp(max=furthest) - positions  # 0 or less
            if int(back.min()) < 0:
                turn = _turn(self._checked.model, back)
        return WindowStep(
            num_sinks=min(plan.num_sinks, num_keys),
            window=plan.window,
            mask=visible_keys(plan, num_queries, num_keys, positions.device),
            turn=turn,
            turning_layers=self._checked.turning_layers,
            attend=choose_attention(positions.device, num_queries),
        )


def check_windowed(model: Any) -> WindowedModel:  # noqa: ANN401 - a causal model of transformers
    """Prove on the model itself that a retro-fitted window is exact for it.

    Besides the list of families, two things are tried with a few tokens: every layer's queries
    must turn by the model's own rotation, or not at all, when all positions are shifted; and a
    text read in chunks through a window must give the logits of the model's own attention under a
    dense mask.

    Args:
        model: on its device, in eval mode.

    Raises:
        UnsupportedModelError: if it is not exact, or not known to be; the message says why.
    """
    if reason := refusal(model.config.get_text_config(decoder=True)):
        raise _unsupported(model, reason)
    checked = WindowedModel(model, _turning_layers(model))
    plan = WindowPlan(num_sinks=3, window=8, caps_sink_distance=False)
    ids = probe_ids(model)
    session = WindowedSession(checked, plan)
    try:
        found = torch.cat([session.logits(part) for part in (ids[:13], ids[13:14], ids[14:])])
    except _NoStepError:
        raise _unsupported(model, "its layers do not hand the plan on to the attention") from None
    mask = visible_keys(plan, len(ids), len(ids), model.device)
    with torch.inference_mode(), attention_named(model, "sdpa"):
        expected = model(
            input_ids=torch.tensor([ids], device=model.device),
            attention_mask=mask[None, None],
            use_cache=False,
        ).logits[0]
    if (error := difference(found, expected)) > tolerance(model):
        raise _unsupported(model, f"windowed logits differ from a dense mask's by {error:.1%}")
    return checked


class _SinkWindowLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values of the sinks, then of the last `window - 1` tokens."""

    is_croppable = False

    def __init__(self, plan: WindowPlan) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._plan = plan
        self._num_seen = 0

    def get_seq_length(self) -> int:
        # Positions keep counting when tokens have left the window.
        return self._num_seen

    def get_max_length(self) -> int:
        return self._plan.kept_tokens(sys.maxsize)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        kept = self._plan.kept_tokens(self._num_seen)
        return kept + query_length, self._num_seen - kept

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: Any,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        keys = torch.cat([self.keys, key_states], dim=-2)
        values = torch.cat([self.values, value_states], dim=-2)
        self._num_seen += key_states.shape[-2]
        self.keys, self.values = self._keep(keys), self._keep(values)
        return keys, values

    def crop(self, tokens_to_remove: int) -> None:
        raise RuntimeError("tokens that left the window cannot be brought back: fork before")

    def reset(self) -> None:
        super().reset()
        self._num_seen = 0

    def _keep(self, states: Tensor) -> Tensor:
        num_sinks, num_recent = self._plan.num_sinks, self._plan.window - 1
        surplus = states.shape[-2] - num_sinks - num_recent
        if surplus <= 0:
            return states
        # A copy: a slice would keep the whole chunk alive.
        sinks, rest = states[:, :, :num_sinks], states[:, :, num_sinks + surplus :]
        return torch.cat([sinks, rest], dim=-2)


class _NoStepError(RuntimeError):
    """The attention was called without a plan."""


def _windowed_attention(
    module: Any,  # noqa: ANN401
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    fathom_step: WindowStep | None = None,
    **kwargs: Any,  # noqa: ANN401 - what other attention functions use
) -> tuple[Tensor, None]:
    """The attention function of a session's model, as transformers calls it."""
    if fathom_step is None:
        raise _NoStepError("the model is in use by a windowed session; wait until it has read")
    step = fathom_step
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    sink_scores = None
    if step.turn is not None and module.layer_idx in step.turning_layers:
        B, H, T, D = query.shape
        rows = _turned(module, query, *step.turn).reshape(B, key.shape[1], -1, D)
        sinks = key[:, :, : step.num_sinks]
        sink_scores = (rows.float() @ sinks.float().mT * scale).reshape(B, H, T, -1)
    out = step.attend(query, key, value, step, sink_scores, scale)
    return out.transpose(1, 2).contiguous(), None


def _turn(model: Any, by: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    """Return cosines and sines, each [1, T, rotated dims], that turn by so many positions."""
    rotary = model.get_decoder().rotary_emb
    cos, sin = rotary(torch.empty(0, dtype=torch.float32, device=by.device), by)
    # YaRN also stretches what it turns; that has been done once already.
    stretch = getattr(rotary, "attention_scaling", 1.0)
    return cos / stretch, sin / stretch


def _turned(module: torch.nn.Module, query: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return float32 `query` [B, H, T, D] turned by the rotary code of the module's own family."""
    rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb
    query = query.float()
    width = cos.shape[-1]  # with partial rotary the other dimensions stay
    turned: Tensor = rotate(query[..., :width], query[:, :1, :, :width], cos, sin)[0]
    return torch.cat([turned, query[..., width:]], dim=-1)


@contextmanager
def attention_named(model: Any, name: str) -> Iterator[None]:  # noqa: ANN401
    """Let this model, and no other, use an attention function by its name."""
    AttentionInterface.register(_ATTENTION, _windowed_attention)
    AttentionInterface.register(_PROBE, _probe_attention)
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def refusal(config: PreTrainedConfig) -> str | None:
    """Return why the config alone rules a retro-fitted window out, or None."""
    layers: list[Any] = DynamicCache(config=config).layers
    rope = getattr(config, "rope_parameters", None)
    if getattr(config, "alibi", False) or config.model_type in {"bloom", "mpt"}:
        return "its positions are ALiBi slopes, and only rotary ones can be turned"
    if getattr(config, "kv_lora_rank", None):
        return "it caches latents (MLA), not keys and values"
    if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers):
        return "it is a hybrid: some of its layers keep a state, not keys and values"
    if any(layer.is_sliding for layer in layers):
        return "it has windows of its own, which `native_cache` keeps exactly"
    if any(type(layer) is not DynamicLayer for layer in layers):
        return "some of its layers keep more, or less, than keys and values of their own"
    if not rope:
        return "its positions are not rotary (a learned table, or none)"
    if (kind := rope.get("rope_type", "default")) not in EXACT_ROPES:
        return f"its {kind!r} rope is not the same for every length, so cached keys would be stale"
    if config.model_type not in WINDOWED_FAMILIES:
        return f"model type {config.model_type!r} is not among the verified families"
    return None


def _turning_layers(model: Any) -> frozenset[int]:  # noqa: ANN401
    """Return the layers that turn queries and keys as we turn them when positions are shifted.

    The same tokens go through at two places. Every layer passes on what the first place gave, so
    that rounding does not add up; what is left is each layer's own use of positions: queries and
    keys turn by the shift or, in a layer without positions, not at all.
    """
    shift = torch.full((1, _TEST_TOKENS), _TEST_SHIFT, device=model.device)
    near = torch.arange(_TEST_TOKENS, device=model.device)[None]
    seen: dict[int, tuple[Any, Tensor, Tensor]] = {}
    with torch.inference_mode(), attention_named(model, _PROBE):
        model(
            input_ids=torch.tensor([probe_ids(model)] * 2, device=model.device),
            position_ids=torch.cat([near, near + shift]),
            attention_mask=torch.ones(2, 1, _TEST_TOKENS, _TEST_TOKENS, device=model.device).bool(),
            use_cache=False,
            fathom_probe=seen,
        )
        turn = _turn(model, shift)
        turning = set()
        for index, (module, *pair) in seen.items():
            turned = [difference(_turned(module, x[:1], *turn), x[1:]) for x in pair]
            still = [difference(x[:1], x[1:]) for x in pair]
            if max(turned) <= tolerance(model):
                turning.add(index)
            elif not max(still) <= tolerance(model):
                raise _unsupported(model, f"layer {index} does not turn by the model's rotary code")
    num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    if sorted(seen) != list(range(num_layers)) or not turning:
        raise _unsupported(model, "its layers do not call the attention that was set")
    return frozenset(turning)


def _probe_attention(
    module: Any,  # noqa: ANN401
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    fathom_probe: dict[int, tuple[Any, Tensor, Tensor]] | None = None,
    **kwargs: Any,  # noqa: ANN401
) -> tuple[Tensor, None]:
    """Note each layer's queries and keys; give both rows of the batch what the first attends to."""
    if fathom_probe is not None:
        fathom_probe[int(module.layer_idx)] = (module, query, key)
    out = scaled_dot_product_attention(
        query[:1], key[:1], value[:1], is_causal=True, scale=scaling, enable_gqa=True
    )
    return out.expand(2, -1, -1, -1).transpose(1, 2).contiguous(), None


def probe_ids(model: Any) -> list[int]:  # noqa: ANN401
    """Return the few tokens that attention is tried with."""
    vocab_size = model.config.get_text_config(decoder=True).vocab_size
    # Spread over the vocabulary, none of the special ones at its start.
    return [(7 + 7919 * index) % vocab_size for index in range(_TEST_TOKENS)]


def _unsupported(model: Any, reason: str) -> UnsupportedModelError:  # noqa: ANN401
    config = model.config.get_text_config(decoder=True)
    return UnsupportedModelError(
        f"a window cannot be fitted to {config.model_type}: {reason}",
        hint="choose another route, or a model of: " + ", ".join(sorted(WINDOWED_FAMILIES)),
    )
