"""The engine that asks a server: any that speaks OpenAI's protocol, here or elsewhere.

What the server says is used (its context, its token counts), what it does not say is unknown: no
KV bytes, no predicted seconds, no likelihoods. Documents are sent to it, which is why its host
stands in every receipt.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from queue import Empty, Queue
from threading import Event, Thread
from typing import Protocol

from rag.errors import FathomError, ModelError, ModelServerError
from rag.lm.chat_tokenizer import ChatTokenizer
from rag.lm.engine import (
    DocumentPrefix,
    GenerationDone,
    GenerationStep,
    Message,
    Prompt,
    ScoreRequest,
    Scores,
    TextPiece,
)
from rag.lm.model_server import Delta, ModelServer, ServerModel
from rag.settings import Settings

# How often a wait for the server looks at the stop event.
_POLL_SECONDS = 0.05
_COUNTS_REMEMBERED = 4096
# What the template of an unknown model may add to the bytes of the messages, in tokens.
_TEMPLATE_TOKENS = 256
_TEMPLATE_TOKENS_A_MESSAGE = 64
# How chat templates spell the ends of turns and the like, where no tokenizer tells exactly.
_SPECIAL = re.compile(
    r"<\|(?=[^<>|\s]{1,40}\|>)|<\N{FULLWIDTH VERTICAL LINE}|</?(?=s>)"
    r"|<(?=(?:start|end)_of_turn>|[be]os>|pad>|unk>)|\[(?=/?(?:INST|SYSTEM_PROMPT)\])"
)


class RemoteEngine:
    """A model behind an HTTP server; implements `rag.lm.engine.Engine`.

    Nothing is sent before the first question, plan or warm-up needs it.
    """

    def __init__(self, settings: Settings) -> None:
        """Take the address, the name and the key from the settings.

        Raises:
            SettingsError: if there is no usable URL.
        """
        key = settings.remote_api_key
        self._server = ModelServer(
            settings.remote_url or "",
            api_key=key.get_secret_value() if key else None,
            timeout_seconds=settings.remote_timeout_seconds,
        )
        self._settings = settings

    @property
    def name(self) -> str:
        """The server's name of the model, its host, and how tokens are counted if not exactly."""
        bounded = "" if self._tokens.is_exact else " (tokens bounded by bytes)"
        return f"{self._model.name} at {self._server.host}{bounded}"

    @property
    def spec(self) -> None:
        """Unknown: the model's shape is the server's business."""
        return

    @property
    def context_tokens(self) -> int:
        """The context that the server says it has, or else that of the settings.

        Raises:
            ModelServerError: if neither tells.
        """
        told = self._context
        found = [n for n in (told, self._settings.remote_context_tokens) if n is not None]
        if not found:
            raise ModelServerError(
                f"the server {self._server.host} does not say how long its context is",
                hint="set FATHOM_REMOTE_CONTEXT_TOKENS to the longest prompt and answer together"
                " that it takes",
            )
        return min(found)

    @property
    def can_score(self) -> bool:
        """Whether `score` works: the protocol has no way to ask for it."""
        return False

    @property
    def model_id(self) -> str:
        """A fingerprint of the name: the weights are the server's."""
        return hashlib.sha256(self.name.encode()).hexdigest()[:16]

    @property
    def quantised(self) -> None:
        """None: the format of the cache is the server's."""
        return None

    @property
    def tokenizer_id(self) -> str:
        """A fingerprint of how tokens are counted: equal ids give equal counts."""
        return self._tokens.id

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens of `text` as it is sent, or no fewer than there are."""
        return self._tokens.count(self._tokens.without_special_tokens(text))

    def encode(self, text: str) -> list[int]:
        """Raise: see `can_score`."""
        raise ModelError(
            f"the server {self._server.host} does not tell the tokens of a text",
            hint="unset FATHOM_REMOTE_URL to use a model in this process",
        )

    def encode_chat(self, messages: list[Message]) -> Prompt:
        """Return the chat as it will be sent, and its tokens in the model's template."""
        tokens = self._tokens
        safe = tuple(Message(m.role, tokens.without_special_tokens(m.content)) for m in messages)
        return Prompt(safe, tokens.count_chat(safe))

    def free_bytes(self) -> None:
        """Unknown: the memory is the server's."""
        return

    def warm_up(self) -> None:
        """Ask the server what it is, which the first question needs."""
        _ = self.name, self.context_tokens

    def forget(self) -> None:
        """Do nothing: no prompt is held here."""

    def predicted_prefill_seconds(self, num_tokens: int, *, cached_tokens: int = 0) -> None:
        """Unknown: who else asks the server, and what it has cached, is not."""
        return

    def cached_tokens(self, prompt: Prompt, prefix: DocumentPrefix | None) -> int:
        """Return 0: what the server keeps it tells afterwards, if at all."""
        return 0

    def load_seconds(self, prompt: Prompt, prefix: DocumentPrefix | None) -> float:
        """Return 0: nothing is kept here."""
        return 0.0

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int,
        stop: Event,
        prefix: DocumentPrefix | None = None,
    ) -> Iterator[GenerationStep]:
        """Send the chat, yield the answer's pieces as they come; GenerationDone is last.

        `stop` closes the connection, which ends the server's work on it. `prefill_seconds` end with
        the first piece.

        Raises:
            ModelError: if the prompt is too long for the server; nothing is sent.
            ModelServerError: if the server gives no whole answer.
            OutOfMemoryError: if it says that its memory ran out.
        """
        needed, limit = prompt.num_tokens + max_new_tokens, self.context_tokens
        if needed > limit:
            raise ModelError(
                f"prompt and answer take {needed:,} tokens, the server {self._server.host} has"
                f" {limit:,}",
                hint="ask about less, or lower FATHOM_MAX_NEW_TOKENS or FATHOM_RETRIEVAL_TOKENS",
            )
        begun = time.perf_counter()
        first: float | None = None
        written: list[str] = []
        last = Delta()
        conversation = _Conversation(
            self._server.stream_chat(
                self._model.name, prompt.messages, max_new_tokens=max_new_tokens
            )
        )
        for delta in conversation.until(stop):
            last = Delta(
                "",
                delta.finish_reason or last.finish_reason,
                _latest(delta.prompt_tokens, last.prompt_tokens),
                _latest(delta.new_tokens, last.new_tokens),
                _latest(delta.cached_tokens, last.cached_tokens),
            )
            if delta.text:
                first = first or time.perf_counter()
                written.append(delta.text)
                yield TextPiece(delta.text)
        ended = time.perf_counter()
        new_tokens = last.new_tokens
        if new_tokens is None:
            new_tokens = self.count_tokens("".join(written)) if written else 0
        yield GenerationDone(
            prompt_tokens=_latest(last.prompt_tokens, prompt.num_tokens) or 0,
            reused_tokens=last.cached_tokens,
            new_tokens=new_tokens,
            kv_tokens=None,
            kv_bytes=None,
            prefill_seconds=(first or ended) - begun,
            decode_seconds=ended - (first or ended),
            stopped=stop.is_set() and last.finish_reason is None,
            is_cut_off=last.finish_reason == "length",
        )

    def generate_many(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        stop: Event,
        prefix: DocumentPrefix | None = None,
    ) -> Iterator[tuple[int, GenerationStep]]:
        """Ask for several answers at once, as many as the settings allow; the server batches them.

        Raises:
            FathomError: the first problem, once all others are done.
        """
        halt = Event()
        steps: Queue[tuple[int, GenerationStep | FathomError]] = Queue()

        def ask(number: int) -> None:
            try:
                for step in self.generate(
                    prompts[number], max_new_tokens=max_new_tokens, stop=halt
                ):
                    steps.put((number, step))
            except FathomError as error:
                steps.put((number, error))

        problems: list[FathomError] = []
        left = len(prompts)
        with ThreadPoolExecutor(self._settings.remote_parallel) as pool:
            for number in range(len(prompts)):
                pool.submit(ask, number)
            try:
                while left:
                    if stop.is_set():
                        halt.set()
                    try:
                        number, step = steps.get(timeout=_POLL_SECONDS)
                    except Empty:
                        continue
                    left -= isinstance(step, (GenerationDone, FathomError))
                    if isinstance(step, FathomError):
                        problems.append(step)
                    else:
                        yield number, step
            finally:
                halt.set()
        if problems:
            raise problems[0]

    def score(
        self,
        requests: Sequence[ScoreRequest],
        *,
        stop: Event,
        prefix: DocumentPrefix | None = None,
    ) -> Scores | None:
        """Raise: see `can_score`."""
        raise ModelError(
            f"the server {self._server.host} does not tell how likely a given answer is",
            hint="unset FATHOM_REMOTE_URL to use a model in this process",
        )

    @cached_property
    def _model(self) -> ServerModel:
        """The model asked for; without a name, the only one there is."""
        wanted = self._settings.remote_model
        try:
            models = self._server.models()
        except ModelServerError:
            if wanted is None:
                raise
            models = []  # some servers fail to list, or answer to more names than they list
        found = [model for model in models if wanted in (None, model.name)]
        if wanted is not None and not found:
            return ServerModel(wanted, None)
        if len(found) != 1:
            names = ", ".join(model.name for model in models) or "none"
            raise ModelServerError(
                f"the server {self._server.host} offers these models: {names}; expected one",
                hint="name one with FATHOM_REMOTE_MODEL",
            )
        return found[0]

    @cached_property
    def _context(self) -> int | None:
        """The context in tokens, as the server tells it."""
        return self._model.context_tokens or self._server.context_of_llama_cpp()

    @cached_property
    def _tokens(self) -> _TokenCounter:
        """The best way to count: a tokenizer that the settings name, the server, a bound."""
        name = self._settings.remote_tokenizer
        if name is not None:
            return _LocalTokens(name, self._settings)
        server, model = self._server, self._model.name
        if server.count_tokens(model, "one two") and server.count_chat_tokens(
            model, (Message("user", "one"),)
        ):
            return _ServerTokens(server, model)
        return _BoundedTokens()


class _TokenCounter(Protocol):
    """A way to count tokens without the model being here."""

    @property
    def id(self) -> str:
        """Equal ids give equal counts."""

    @property
    def is_exact(self) -> bool:
        """Whether the counts are the model's, or only no smaller."""

    def count(self, text: str) -> int:
        """Return the tokens of a text alone."""

    def count_chat(self, messages: tuple[Message, ...]) -> int:
        """Return the tokens of a chat in its template."""

    def without_special_tokens(self, text: str) -> str:
        """Break up what would end a turn."""


class _LocalTokens:
    """Counts with a tokenizer that lies here; the settings say that it is the server's."""

    is_exact = True

    def __init__(self, name: str, settings: Settings) -> None:
        from transformers import AutoTokenizer

        from rag.lm.catalog import resolve_model

        folder = resolve_model(name, settings)
        self._tokenizer = ChatTokenizer(
            AutoTokenizer.from_pretrained(folder, local_files_only=True)
        )

    @property
    def id(self) -> str:
        return self._tokenizer.id

    def count(self, text: str) -> int:
        return self._tokenizer.count_tokens(text)

    def count_chat(self, messages: tuple[Message, ...]) -> int:
        return len(self._tokenizer.encode_chat(list(messages)))

    def without_special_tokens(self, text: str) -> str:
        return self._tokenizer.without_special_tokens(text)


class _ServerTokens:
    """Lets the server count."""

    is_exact = True

    def __init__(self, server: ModelServer, model: str) -> None:
        self._server, self._model = server, model
        self.id = f"{model} at {server.host}"
        self.count = lru_cache(_COUNTS_REMEMBERED)(self._count)

    def _count(self, text: str) -> int:
        return self._known(self._server.count_tokens(self._model, text))

    def count_chat(self, messages: tuple[Message, ...]) -> int:
        return self._known(self._server.count_chat_tokens(self._model, messages))

    def without_special_tokens(self, text: str) -> str:
        return _without_special_signs(text)

    def _known(self, counted: int | None) -> int:
        if counted is None:
            raise ModelServerError(
                f"the server {self._server.host} stopped counting tokens",
                hint="name a tokenizer with FATHOM_REMOTE_TOKENIZER",
            )
        return counted


class _BoundedTokens:
    """Counts bytes: no tokenizer in use makes more tokens than that of a text."""

    is_exact = False
    id = "bytes"

    def count(self, text: str) -> int:
        return len(text.encode())

    def count_chat(self, messages: tuple[Message, ...]) -> int:
        words = sum(self.count(message.content) for message in messages)
        return words + _TEMPLATE_TOKENS + _TEMPLATE_TOKENS_A_MESSAGE * len(messages)

    def without_special_tokens(self, text: str) -> str:
        return _without_special_signs(text)


class _Conversation:
    """An answer's stream, read in a thread of its own so that a wait for it can be ended."""

    def __init__(self, deltas: AsyncIterator[Delta]) -> None:
        self._deltas = deltas
        self._told: Queue[Delta | BaseException | None] = Queue()
        self._loop = asyncio.new_event_loop()

    def until(self, stop: Event) -> Iterator[Delta]:
        """Yield what comes; once `stop` is set, or nobody reads on, the connection is closed."""
        reading = self._loop.create_task(self._read())
        thread = Thread(target=self._run, args=(reading,), daemon=True)
        thread.start()
        try:
            while not stop.is_set():
                try:
                    told = self._told.get(timeout=_POLL_SECONDS)
                except Empty:
                    continue
                if told is None:
                    return
                if isinstance(told, BaseException):
                    raise told
                yield told
        finally:
            if thread.is_alive():
                self._loop.call_soon_threadsafe(reading.cancel)
            thread.join()
            self._loop.close()

    def _run(self, reading: asyncio.Task[None]) -> None:
        try:
            self._loop.run_until_complete(reading)
        except asyncio.CancelledError:
            pass
        except Exception as error:
            self._told.put(error)
        else:
            self._told.put(None)
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())

    async def _read(self) -> None:
        async for delta in self._deltas:
            self._told.put(delta)


def _latest(new: int | None, old: int | None) -> int | None:
    return old if new is None else new


def _without_special_signs(text: str) -> str:
    """Break up what the usual chat templates would read as the end of a turn."""
    return _SPECIAL.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)
