"""A server that speaks OpenAI's protocol: what it says of itself, its token counts, its stream.

vLLM, SGLang, llama.cpp and `transformers serve` differ in what they offer beside the chat; each
thing is asked for, and one that is not there is None here.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from rag.errors import ModelServerError, OutOfMemoryError, SettingsError
from rag.lm.engine import Message

logger = logging.getLogger(__name__)

_CONNECT_SECONDS = 10.0
# How long to wait before each further attempt; none is made once a word has come.
_RETRY_SECONDS = (0.5, 2.0)
_MOST_RETRY_SECONDS = 30.0
_BUSY = frozenset({429, 500, 502, 503, 504})
_MOST_ERROR_CHARS = 300


@dataclass(frozen=True, slots=True)
class ServerModel:
    """One model of the server: the name it answers to, and its context in tokens if it is told."""

    name: str
    context_tokens: int | None


@dataclass(frozen=True, slots=True)
class Delta:
    """One event of an answer's stream; what it does not tell is empty or None."""

    text: str = ""
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    cached_tokens: int | None = None


class ModelServer:
    """One server. The key goes into the header of each request, and nowhere else."""

    def __init__(self, url: str, *, api_key: str | None, timeout_seconds: float) -> None:
        """Send nothing yet.

        Args:
            url: of the API, with or without its `/v1`.
            api_key: sent as a bearer token.
            timeout_seconds: longest wait for the next byte.

        Raises:
            SettingsError: if it is no http or https URL, or holds a password.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise SettingsError(
                "remote_url is not the http:// or https:// URL of a server",
                hint="set it like FATHOM_REMOTE_URL=http://127.0.0.1:8000/v1",
            )
        if parts.username or parts.password:
            raise SettingsError(
                "remote_url holds a user name or a password, which would stand in logs",
                hint="leave them out, and set FATHOM_REMOTE_API_KEY",
            )
        self.host = f"{parts.hostname}:{parts.port}" if parts.port else parts.hostname
        self._root = url.rstrip("/").removesuffix("/v1")
        self._options: dict[str, Any] = {
            "headers": {"Authorization": f"Bearer {api_key}"} if api_key else {},
            "timeout": httpx.Timeout(timeout_seconds, connect=_CONNECT_SECONDS),
            # A proxy of the environment is not for what stays on this machine.
            "trust_env": not _is_loopback(parts.hostname),
            "follow_redirects": False,  # documents go to the server that was named, or nowhere
        }
        self._takes_stream_options = True

    def models(self) -> list[ServerModel]:
        """Return the models that the server offers.

        Raises:
            ModelServerError: if it cannot be reached or does not list them.
        """
        listed = self._request("GET", "/v1/models")
        try:
            return [
                ServerModel(str(model["id"]), _positive(model.get("max_model_len")))
                for model in listed["data"]
            ]
        except (KeyError, TypeError, AttributeError) as error:
            raise self._nonsense("a list of models", listed) from error

    def context_of_llama_cpp(self) -> int | None:
        """Return the context of each slot of a llama.cpp server; None from any other."""
        told = self._request_or_none("GET", "/props")
        settings = told.get("default_generation_settings") if isinstance(told, dict) else None
        return _positive(settings.get("n_ctx")) if isinstance(settings, dict) else None

    def count_tokens(self, model: str, text: str) -> int | None:
        """Return the number of tokens of a text; None where the server does not count."""
        return self._tokenized(
            # vLLM and SGLang read the first line, llama.cpp the second.
            {"model": model, "prompt": text, "add_special_tokens": False}
            | {"content": text, "add_special": False, "parse_special": False}
        )

    def count_chat_tokens(self, model: str, messages: tuple[Message, ...]) -> int | None:
        """Return the number of tokens of a chat in its template; None if the server cannot."""
        chat = _chat(messages)
        told = self._request_or_none("POST", "/apply-template", {"messages": chat})  # llama.cpp
        if isinstance(told, dict) and isinstance(told.get("prompt"), str):
            return self._tokenized(
                {"content": told["prompt"], "add_special": True, "parse_special": True}
            )
        return self._tokenized({"model": model, "messages": chat, "add_generation_prompt": True})

    async def stream_chat(
        self, model: str, messages: tuple[Message, ...], *, max_new_tokens: int
    ) -> AsyncIterator[Delta]:
        """Ask for a greedy answer and yield its stream; cancelling it closes the connection.

        A server that is busy or out of reach is tried again as long as no word has come. What
        broke off later is an error: half an answer is none.

        Raises:
            ModelServerError: if it refuses, breaks off, or sends what is no chat completion.
            OutOfMemoryError: if it says that its memory ran out.
        """
        body = {
            "model": model,
            "messages": _chat(messages),
            "max_tokens": max_new_tokens,
            "temperature": 0.0,
            "stream": True,
        }
        for attempt in range(len(_RETRY_SECONDS) + 1):
            pause = _RETRY_SECONDS[attempt] if attempt < len(_RETRY_SECONDS) else None
            has_begun = False
            try:
                async with httpx.AsyncClient(**self._options) as client:
                    async for delta in self._stream_once(client, body):
                        has_begun = has_begun or bool(delta.text)
                        yield delta
                return
            except _BusyError as busy:
                problem, pause = busy.error, _waited(pause, busy.retry_after)
            except httpx.ReadTimeout as error:
                raise ModelServerError(
                    f"the server {self.host} sent nothing for {self._options['timeout'].read:g} s",
                    hint="raise FATHOM_REMOTE_TIMEOUT_SECONDS, or ask about less",
                ) from error
            except httpx.TransportError as error:
                problem = self._unreachable(error)
                if has_begun:
                    raise ModelServerError(
                        f"the server {self.host} broke off in the middle of its answer",
                        hint="ask again; if it happens again, look at the server's log",
                    ) from error
            if pause is None:
                raise problem
            logger.warning("%s; trying again in %g s", problem.message, pause)
            await asyncio.sleep(pause)

    async def _stream_once(
        self, client: httpx.AsyncClient, body: dict[str, Any]
    ) -> AsyncIterator[Delta]:
        while True:
            sent = dict(body)
            if self._takes_stream_options:
                sent["stream_options"] = {"include_usage": True}
            url = f"{self._root}/v1/chat/completions"
            async with client.stream("POST", url, json=sent) as response:
                if response.status_code == 200:
                    async for delta in self._deltas(response):
                        yield delta
                    return
                content = (await response.aread()).decode(errors="replace")
            is_refused = "stream_options" in content and response.status_code in (400, 422)
            if is_refused and self._takes_stream_options:
                self._takes_stream_options = False
                continue
            raise self._refusal(response, content)

    async def _deltas(self, response: httpx.Response) -> AsyncIterator[Delta]:
        """Yield the events of a stream, and check that it comes to its end."""
        is_whole = False
        async for line in response.aiter_lines():
            if not line.startswith("data:"):
                continue
            data = line[5:].strip()
            if data == "[DONE]":
                is_whole = True
                break
            delta = self._delta(data)
            is_whole = is_whole or delta.finish_reason is not None
            yield delta
        if not is_whole:
            raise httpx.RemoteProtocolError("the stream ended before its answer did")

    def _delta(self, data: str) -> Delta:
        try:
            event = json.loads(data)
            if event.get("error"):
                raise self._failure(json.dumps(event["error"]))
            choice = (event.get("choices") or [{}])[0]
            usage = event.get("usage") or {}
            details = usage.get("prompt_tokens_details") or {}
            return Delta(
                text=(choice.get("delta") or {}).get("content") or "",
                finish_reason=choice.get("finish_reason"),
                prompt_tokens=usage.get("prompt_tokens"),
                new_tokens=usage.get("completion_tokens"),
                cached_tokens=details.get("cached_tokens"),
            )
        except (ValueError, AttributeError, TypeError, LookupError) as error:
            raise self._nonsense("a piece of a chat completion", data) from error

    def _tokenized(self, body: dict[str, Any]) -> int | None:
        told = self._request_or_none("POST", "/tokenize", body)
        if not isinstance(told, dict):
            return None
        if isinstance(told.get("count"), int):
            return int(told["count"])
        return len(told["tokens"]) if isinstance(told.get("tokens"), list) else None

    def _request_or_none(self, method: str, path: str, body: Any = None) -> Any:  # noqa: ANN401
        """Return the JSON of an answer; None where the server does not offer the path.

        Raises:
            ModelServerError: if it cannot be reached.
        """
        try:
            response = httpx.request(method, self._root + path, json=body, **self._options)
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        try:
            return response.json() if response.status_code == 200 else None
        except ValueError:
            return None

    def _request(self, method: str, path: str) -> Any:  # noqa: ANN401
        try:
            response = httpx.request(method, self._root + path, **self._options)
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        if response.status_code != 200:
            try:
                raise self._refusal(response, response.text)
            except _BusyError as busy:
                raise busy.error from None
        try:
            return response.json()
        except ValueError as error:
            raise self._nonsense("JSON", response.text) from error

    def _unreachable(self, error: httpx.TransportError) -> ModelServerError:
        return ModelServerError(
            f"the server {self.host} could not be reached: {str(error) or type(error).__name__}",
            hint="start it, or correct FATHOM_REMOTE_URL",
        )

    def _nonsense(self, expected: str, found: Any) -> ModelServerError:  # noqa: ANN401
        return ModelServerError(
            f"the server {self.host} sent {_short(str(found))!r}, expected {expected}",
            hint="FATHOM_REMOTE_URL must lead to an OpenAI-compatible API, e.g. one ending in /v1",
        )

    def _failure(self, told: str) -> ModelServerError | OutOfMemoryError:
        """Return the error for what the server says went wrong on its side."""
        if "out of memory" in told.lower():
            return OutOfMemoryError(f"memory ran out on the server {self.host}: {_short(told)}")
        return ModelServerError(
            f"the server {self.host} gave no answer: {_short(told)}",
            hint="look at the server's log",
        )

    def _refusal(self, response: httpx.Response, content: str) -> Exception:
        """Return the error for a status other than 200; _BusyError if it may pass."""
        code = response.status_code
        if code in (401, 403):
            return ModelServerError(
                f"the server {self.host} refused the key, or there is none (status {code})",
                hint="set FATHOM_REMOTE_API_KEY",
            )
        if code == 404:
            return ModelServerError(
                f"the server {self.host} knows no such model or address: {_short(content)}",
                hint="check FATHOM_REMOTE_MODEL and FATHOM_REMOTE_URL",
            )
        failure = self._failure(f"status {code}: {content}")
        if code in _BUSY and isinstance(failure, ModelServerError):
            return _BusyError(failure, response.headers.get("retry-after"))
        return failure


class _BusyError(Exception):
    """A refusal that may pass."""

    def __init__(self, error: ModelServerError, retry_after: str | None) -> None:
        super().__init__(error.message)
        self.error = error
        self.retry_after = retry_after


def _waited(pause: float | None, retry_after: str | None) -> float | None:
    """Return the seconds to wait: those the server asks for, if they are few; None for no more."""
    if pause is None or retry_after is None or not retry_after.isdigit():
        return pause
    return max(pause, float(retry_after)) if float(retry_after) <= _MOST_RETRY_SECONDS else None


def _chat(messages: tuple[Message, ...]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def _positive(value: Any) -> int | None:  # noqa: ANN401 - whatever the server says
    return value if isinstance(value, int) and value > 0 else None


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _MOST_ERROR_CHARS else f"{line[:_MOST_ERROR_CHARS]} ..."


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
