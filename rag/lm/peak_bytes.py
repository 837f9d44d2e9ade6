"""Memory that a forward pass takes beside weights and cache: an upper bound, explained."""

from rag.lm.kv_bytes import read_copy_bytes, room_bytes
from rag.lm.spec import LayerSpec, ModelSpec

_FLOAT32_BYTES = 4
# Scratch space of kernels, about 0.2 MiB a thread.
_SCRATCH_BYTES = 2**20
# Queries, and keys, of a block of paged attention.
BLOCK_TOKENS = 32
# What an element takes on its way into a quantised cache: itself and its quotient in float32, the
# latter rounded, and the bytes.
_QUANTISING_BYTES = 3 * _FLOAT32_BYTES + 2


def peak_bytes(spec: ModelSpec, num_tokens: int, *, chunk_tokens: int | None = None) -> int:
    """Return the most bytes that a prefill of `num_tokens` needs beside the weights and the cache.

    The last chunk sees the most, so it decides. With `C` its tokens, `S` the tokens that a layer
    sees from there (all of them, or the window's and the chunk's), `e` the bytes of an element, `h`
    the hidden size, `q` the width of the queries, `k` and `v` those of the cached keys and values,
    and `H` the heads, it is the masks, which stay through the pass,

        C * S for each kind of window, as booleans; none where a layer attends without a mask

    the room that full layers have for the next tokens, once they decode,

    and the largest of what comes and goes, over the layers:

    - growing the cache: `S * k * e`, the old keys (or values) beside the new ones;
    - attention: `(4h + 4q) * C * e`, and what its kernel copies: the mask in numbers, `C * S * e`,
      on a GPU once more, its rows filled up to what the kernel reads at once;
      grouped heads repeated to all heads, or a latent expanded to keys and values, `2 * S * q * e`;
      the windowed states joined with the chunk's; and where no fused kernel serves the model, its
      scores, `H * C * S * (3e + 8)`; of a quantised cache the copy that attention reads,
      `S * (k + v) * e`, and the chunk on its way into 8 bits;
    - attention without a mask: on a GPU in two parts, of which nothing grows with `S` but a
      quantised cache's copy, see `_parts_bytes`; on a CPU by pages, see `_paged_bytes`;
    - a state's update: what the reference code of its scan holds for each token, in float32;
    - the feed-forward layer: `8h * C * e`, half of it for norms in float32, and its own width;
    - the logits of one token, in float32 and in the model's dtype;

    or, once all of that is gone, on a GPU the largest layer again, `S * (k + v) * e`: it may be
    copied to where it stays while the answer is written.

    Tests compare it with what torch allocates on a CPU. Allocators, threads and the workspaces of a
    GPU's libraries (32 MiB of an H100's) take more: `FATHOM_KV_RESERVE_BYTES` is for them.

    Args:
        spec: the model's shape, and with `ModelSpec.on_device` how its layers attend there.
        num_tokens: prompt and new tokens of one sequence.
        chunk_tokens: how many of them enter the model at once; by default the spec's.

    Source: modelling code and attention functions of transformers 5.23; `rag.lm.chunked_attention`
    and `rag.lm.paged_attention`.
    """
    chunk = min(num_tokens, chunk_tokens or spec.chunk_tokens)
    shape, size = spec.activations, spec.dtype_bytes
    attending = [layer for layer in spec.layers if layer.kind not in ("linear", "none")]
    windows = {layer.window for layer in attending if not _is_maskless(layer, chunk)}
    masks = sum(chunk * _seen_tokens(window, num_tokens, chunk) for window in windows)
    attention = max(_attention_bytes(spec, layer, num_tokens, chunk) for layer in spec.layers)
    feed_forward = chunk * size * (8 * shape.hidden_size + shape.feed_forward_elements)
    logits = spec.vocab_size * (size + _FLOAT32_BYTES)
    prefill = masks + max(attention, feed_forward, logits)
    moved = max(_moved_bytes(spec, layer, num_tokens) for layer in spec.layers)
    return _SCRATCH_BYTES + room_bytes(spec, num_tokens) + max(prefill, moved)


def _attention_bytes(spec: ModelSpec, layer: LayerSpec, num_tokens: int, chunk: int) -> int:
    """Return what one layer takes to grow its cache and to attend."""
    shape, size = spec.activations, spec.dtype_bytes
    seen = _seen_tokens(layer.window, num_tokens, chunk)
    queries, keys = layer.query_elements_per_token, layer.key_elements_per_token
    states = chunk * size * 4 * (shape.hidden_size + queries)
    if layer.kind in ("linear", "hybrid"):
        states += chunk * shape.scan_elements * _FLOAT32_BYTES
    if not queries:
        return states
    copies = 0
    if copy := read_copy_bytes(spec, layer, seen):
        copies += copy + _QUANTISING_BYTES * chunk * layer.elements_per_token
    if _is_maskless(layer, chunk):
        on_cpu = spec.device_type == "cpu"
        copies += (
            _paged_bytes(spec, layer, chunk, seen) if on_cpu else _parts_bytes(spec, layer, chunk)
        )
        return states + max(copies, seen * keys * size)
    copies += chunk * seen * size * (2 if spec.device_type == "cuda" else 1)
    if layer.kind == "latent" or shape.repeats_heads:
        copies += 2 * seen * queries * size
    if layer.window is not None:
        copies += seen * layer.elements_per_token * size
    if not shape.has_fused_attention:
        copies += shape.num_heads * chunk * seen * (3 * size + 2 * _FLOAT32_BYTES)
    return states + max(copies, seen * keys * size)


def _parts_bytes(spec: ModelSpec, layer: LayerSpec, chunk: int) -> int:
    """Return what attention in two parts takes beside `(4h + 4q) * C * e`, whatever is behind.

    Of those `4q` there are at the same time the queries and what each of the two parts gave. What
    queries, keys and values were projected to in one piece may be there still: another `q`, and
    `k + v`. To that come

        max(2q * e, 12q) * C    the chunk's keys and values, for all heads; then, once they are
                                gone, both parts and what they are joined to in float32
        20H * C                 the sums of both parts, their share, and what it comes from
    """
    size, queries = spec.dtype_bytes, layer.query_elements_per_token
    projected = (layer.key_elements_per_token + layer.value_elements_per_token) * size
    copies = max(2 * size, 3 * _FLOAT32_BYTES) * queries
    sums = 5 * spec.activations.num_heads * _FLOAT32_BYTES
    return chunk * (projected + copies + sums)


def _paged_bytes(spec: ModelSpec, layer: LayerSpec, chunk: int, seen: int) -> int:
    """Return what paged attention takes, which goes through one key head after the other.

    With `d` the width of a head, each thread holds the scores of a block of 32 queries in float32,
    `128S`. The head's keys and values are copied twice: with their last block filled up, and as the
    products want them, `4d * S * e`. Queries and results lie beside those that are counted already,
    `2q * C * e`.

    Of fewer queries than the kernel takes, behind a cache, the mask is less than that.
    """
    size, width = spec.dtype_bytes, layer.head_width
    scores = spec.num_threads * BLOCK_TOKENS * _FLOAT32_BYTES
    queries = 2 * layer.query_elements_per_token * size
    return seen * (scores + 4 * width * size) + chunk * queries


def _moved_bytes(spec: ModelSpec, layer: LayerSpec, num_tokens: int) -> int:
    """Return the copy of a layer that is made for decoding on a GPU; see `rag.lm.static_cache`."""
    if spec.device_type != "cuda" or spec.kv_dtype is not None:
        return 0
    kept = layer.kept_tokens(num_tokens)
    return layer.elements_per_token * kept * spec.dtype_bytes


def _is_maskless(layer: LayerSpec, chunk: int) -> bool:
    """Say whether a chunk is attended to without a mask; a single token is not."""
    return layer.maskless and chunk > 1


def _seen_tokens(window: int | None, num_tokens: int, chunk: int) -> int:
    return num_tokens if window is None else min(num_tokens, window - 1 + chunk)
