"""What answering needs of a language model, whichever process runs it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from threading import Event
from typing import Any, Protocol, runtime_checkable

from rag.lm.spec import ModelSpec
from rag.types import Decoding


def name_with_cache(name: str, kv_dtype: str) -> str:
    """Return what a model is called while its cache is in a format that is not its own."""
    return f"{name} with its cache in {kv_dtype}"


def name_in_four_bits(name: str) -> str:
    """Return what a model is called that writes its answers with 4-bit weights."""
    return f"{name} decoding in 4 bits"


def model_named(name: str) -> str:
    """Return the model's own name, without what `name_in_four_bits` added."""
    return name.removesuffix(name_in_four_bits(""))


@dataclass(frozen=True, slots=True)
class Message:
    """One chat message; `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """A chat ready for the model's reply; `num_tokens` counts its template as well.

    `ids` are its tokens, empty where only a server knows them.
    """

    messages: tuple[Message, ...]
    num_tokens: int
    ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class DocumentPrefix:
    """The prompt's first `num_tokens` tokens stay the same whatever is asked of `documents`.

    `documents` names each document's version (`Document.version_key`), in the prompt's order.
    Only the same `tenant` finds what was kept of it.
    """

    num_tokens: int
    documents: tuple[str, ...]
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """How likely is `continuation_ids` right after `prompt_ids`? Both hold at least one token."""

    prompt_ids: tuple[int, ...]
    continuation_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.prompt_ids or not self.continuation_ids:
            raise ValueError("a score needs at least one token of prompt and of continuation")


@dataclass(frozen=True, slots=True)
class PrefillProgress:
    """`done` of `total` prompt tokens are in the cache."""

    done: int
    total: int


@dataclass(frozen=True, slots=True)
class TextPiece:
    """The next stretch of generated text."""

    text: str


@dataclass(frozen=True, slots=True)
class GenerationDone:
    """The last step of a generation: what it took.

    `reused_tokens` of the prompt were in a cache already and were not computed again. `kv_tokens`
    and `kv_bytes` are what the cache really held at the end, the bytes summed over its tensors. All
    three are None where a server holds the cache and does not tell. `stopped` says that the
    caller's stop event ended it, `is_cut_off` that the token limit did; else the model ended it.
    `decoding` says how the tokens were computed, None where none was or a server did.
    """

    prompt_tokens: int
    reused_tokens: int | None
    new_tokens: int
    kv_tokens: int | None
    kv_bytes: int | None
    prefill_seconds: float
    decode_seconds: float
    stopped: bool
    is_cut_off: bool = False
    decoding: Decoding | None = None


GenerationStep = PrefillProgress | TextPiece | GenerationDone


@dataclass(frozen=True, slots=True)
class Scores(Sequence[tuple[float, ...]]):
    """What `score` found, and the cache that it took.

    Item i are the log-likelihoods, in nats, of each token of request i's continuation. The widest
    batch held `kv_rows` sequences of `kv_tokens` tokens each, `kv_bytes` summed over its tensors.
    """

    values: tuple[tuple[float, ...], ...]
    kv_rows: int = 0
    kv_tokens: int = 0
    kv_bytes: int = 0

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: Any) -> Any:  # noqa: ANN401 - as of a tuple
        return self.values[index]


class Engine(Protocol):
    """A language model ready to answer."""

    @property
    def name(self) -> str:
        """What receipts call the model: its catalog name, folder or hub id, and its server."""

    @property
    def spec(self) -> ModelSpec | None:
        """The model's shape and limits; None where a server runs it, whose business they are."""

    @property
    def context_tokens(self) -> int | None:
        """The most tokens of prompt and answer together that it takes; None if there is no end."""

    @property
    def can_score(self) -> bool:
        """Whether `score` works."""

    @property
    def model_id(self) -> str:
        """A fingerprint of what decides an answer: weights, dtype, cache, tokenizer, template.

        Of a server, whose weights nobody here sees, it is that of the name.
        """

    @property
    def quantised(self) -> Engine | None:
        """The same model with a quantised KV cache, which says so in `spec.kv_dtype`.

        It takes less memory and answers otherwise: its `model_id` is another. None where there is
        no such mode, or a server decides on it.
        """

    @property
    def tokenizer_id(self) -> str:
        """A fingerprint of the tokenizer: equal ids give equal token counts."""

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens of `text` alone, as a chat shows it, without any template.

        A special token that it spells out counts as the pieces it is broken into. Where tokens
        cannot be counted, no fewer than there are.
        """

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text` alone, without any template or special token.

        Raises:
            ModelError: if this engine cannot; see `can_score`.
        """

    def encode_chat(self, messages: list[Message]) -> Prompt:
        """Return the chat in the model's own template, ready for its reply.

        A message that spells out one of the model's special tokens cannot end its own turn.
        """

    def free_bytes(self) -> int | None:
        """Return the bytes of device memory that a request could have now; None if unknown here.

        Caches kept for later questions count as free: they make room.
        """

    def warm_up(self) -> None:
        """Get ready now, so that the first request does not wait for it."""

    def forget(self) -> None:
        """Drop what is held of prompts already answered: a document of theirs was deleted."""

    def predicted_prefill_seconds(self, num_tokens: int, *, cached_tokens: int = 0) -> float | None:
        """Return the seconds that prefilling `num_tokens` takes here, from a measured rate.

        The first `cached_tokens` of them are in a cache already. None where that is not known.
        """

    def cached_tokens(self, prompt: Prompt, prefix: DocumentPrefix | None) -> int:
        """Return how many of the prompt's first tokens need no prefill, because they are kept."""

    def load_seconds(self, prompt: Prompt, prefix: DocumentPrefix | None) -> float:
        """Return the seconds that fetching what is kept takes; 0 if it is in memory, or nothing."""

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int,
        stop: Event,
        prefix: DocumentPrefix | None = None,
    ) -> Iterator[GenerationStep]:
        """Prefill the prompt, then decode greedily, yielding each step; GenerationDone is last.

        `stop` is looked at within a prefill and between tokens. With a `prefix`, the engine may
        keep its cache, and use one that was kept.

        Raises:
            OutOfMemoryError: if memory runs out; the next request finds the engine as before.
            ModelServerError: if a server runs the model and gives no answer.
        """

    def generate_many(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        stop: Event,
        prefix: DocumentPrefix | None = None,
    ) -> Iterator[tuple[int, GenerationStep]]:
        """Answer several prompts as `generate` answers one, side by side where that is faster.

        Yields:
            The number of a prompt and a step of it; its GenerationDone is its last.
        """

    def score(
        self,
        requests: Sequence[ScoreRequest],
        *,
        stop: Event,
        prefix: DocumentPrefix | None = None,
    ) -> Scores | None:
        """Return the log-likelihood, in nats, of each token of each request's continuation.

        What all prompts begin with is prefilled once; the rest runs in batches, and a request
        that another begins with costs nothing. So it serves several answers to one long prompt,
        and one question after each of several short ones. A call with the prompt of the one
        before it does not prefill it again, where that is short.
        `prefix` is what of the prompts is kept, if they share it. None is returned once `stop` is
        set, which is looked at within a forward pass, too.

        Raises:
            ModelError: if this engine cannot; see `can_score`.
        """


@runtime_checkable
class ReadsInStrides(Protocol):
    """An engine that can read a text once through a window, and be asked at every stride."""

    def generate_in_strides(
        self,
        prompts: Sequence[Prompt],
        frames: Sequence[Prompt],
        *,
        max_new_tokens: int,
        stop: Event,
    ) -> Iterator[tuple[int, GenerationStep]]:
        """Reply to prompts that differ in their middle alone, which is read as one running text.

        Args:
            prompts: one a stride, in the order of the text.
            frames: the same prompt around two middles that begin and end differently.
            max_new_tokens: the longest reply to a stride.
            stop: looked at while the text is read, and between tokens.

        Yields:
            The number of a prompt and a step of it, its GenerationDone last.

        Raises:
            UnsupportedModelError: if no window can be fitted to the model exactly.
        """
