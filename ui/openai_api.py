"""OpenAI's chat protocol: `/v1/models` and `/v1/chat/completions`, with documents behind them.

The question is the last message of the user; those before it, with their answers, serve to make it
stand alone. Which documents it is about, and by which route they are read, stands in the field
`fathom` of the request; citations and receipt in that of the answer. What is streamed as the
answer's content is the checked text, when it is there; the draft before it, whose statements are
not checked yet, goes beside it under `fathom`.
"""

import json
import re
import time
from collections.abc import AsyncIterator, Callable
from threading import Event
from typing import Annotated, Any, Literal

from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import StreamingResponse

from rag.answering.asked import askable
from rag.answering.conversation import Turn
from rag.answering.service import AnswerEvent, AnswerReady, QuestionRewritten, RouteChosen
from rag.errors import FathomError
from rag.lm.engine import PrefillProgress, TextPiece
from rag.types import Answer, AnswerMode, Route
from ui.asking import Thrift, ask_events, document_ids, whole_answer
from ui.assembly import Fathom
from ui.fair_queue import Waiting
from ui.http_errors import ERRORS, STREAMED, PlainError, error_json, unexpected
from ui.library import Library

ANY_MODEL = "fathom"  # the name that is always right, whatever model answers
_CUT_OFF = "the answer was cut off at its limit"


class Part(BaseModel):
    """A part of a message; only text is read."""

    type: str
    text: str = ""


class ChatMessage(BaseModel):
    """One message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None

    @property
    def text(self) -> str:
        """The words of the message."""
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content if part.type == "text")
        return self.content or ""


class StreamOptions(BaseModel):
    """What a stream says beside the answer."""

    include_usage: bool = False


class Extension(BaseModel):
    """What OpenAI's protocol has no field for."""

    model_config = ConfigDict(extra="forbid")

    documents: list[int | str] | None = Field(
        default=None, max_length=10_000, description="Numbers or titles; without any, all."
    )
    collection: str | None = None
    route: Route | None = None
    mode: AnswerMode | None = None
    thrift: Thrift = None


class ChatRequest(BaseModel):
    """OpenAI's request; what it sets besides changes nothing here, and the answer says so."""

    model_config = ConfigDict(extra="allow")

    model: str
    messages: list[ChatMessage] = Field(min_length=1, max_length=1_000)
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int | None = None
    tools: list[dict[str, Any]] | None = None
    fathom: Extension = Field(default_factory=Extension)


def openai_router(fathom: Fathom, library: Callable[[Request], Library]) -> APIRouter:
    """Return the routes of the protocol."""
    Own = Annotated[Library, Depends(library)]
    router = APIRouter(tags=["OpenAI"], responses=ERRORS)

    @router.get("/v1/models")
    def models(own: Own) -> dict[str, Any]:
        """List the one model that answers here, under its name and as `fathom`."""
        names = (ANY_MODEL, fathom.engine.name)
        return {"object": "list", "data": [_model_json(name) for name in names]}

    @router.post("/v1/chat/completions", responses=STREAMED)
    async def chat(own: Own, asked: ChatRequest, request: Request) -> Response:
        """Answer the last message of the user from the documents."""
        name = await run_sync(lambda: fathom.engine.name)
        if problem := _problem(asked, name):
            return problem
        question, history = _conversation(asked.messages)
        askable(question)  # before it waits for its turn
        extension = asked.fathom
        ids = await run_sync(document_ids, own, extension.documents, extension.collection)
        events = ask_events(
            own,
            Event(),
            question,
            ids=ids,
            route=extension.route,
            mode=extension.mode,
            history=history,
            thrift=extension.thrift,
        )
        unused = _unused(asked)
        if asked.stream:
            chunks = _chunks(events, name, unused, asked.stream_options or StreamOptions())
            return StreamingResponse(chunks, media_type="text/event-stream")
        answer = await whole_answer(events, request)
        return JSONResponse(
            {
                "id": f"chatcmpl-{answer.receipt.id}",
                "object": "chat.completion",
                "created": int(time.time()),
                "model": name,
                "choices": [
                    {
                        "index": 0,
                        "message": {"role": "assistant", "content": answer.answer},
                        "finish_reason": _finish_reason(answer),
                    }
                ],
                "usage": _usage(answer),
                "fathom": _extension(answer, unused),
            }
        )

    return router


def _problem(asked: ChatRequest, name: str) -> Response | None:
    if asked.model not in (ANY_MODEL, name):
        return PlainError(404, f"no model {asked.model!r}; there are {ANY_MODEL!r} and {name!r}")
    if asked.n not in (None, 1):
        return PlainError(400, f"n is {asked.n}; one answer is given", "leave n out")
    if asked.tools:
        return PlainError(400, "tools cannot be called here", "leave tools out")
    users = [message.text for message in asked.messages if message.role == "user"]
    if not users or not users[-1].strip():
        return PlainError(400, "there is no message of the user, or it has no text")
    return None


def _conversation(messages: list[ChatMessage]) -> tuple[str, list[Turn]]:
    """Return the last question, and the questions before it with their answers."""
    turns: list[Turn] = []
    for message in messages:
        if message.role == "user":
            turns.append(Turn(message.text, ""))
        elif message.role == "assistant" and turns:
            turns[-1] = Turn(turns[-1].question, message.text)
    return turns[-1].question, turns[:-1]


def _model_json(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "fathom"}


async def _chunks(
    events: AsyncIterator[Waiting | AnswerEvent],
    name: str,
    unused: dict[str, Any],
    options: StreamOptions,
) -> AsyncIterator[str]:
    """Yield the stream: what is going on beside an empty delta, then the checked answer."""
    head: dict[str, Any] = {"id": f"chatcmpl-{time.time_ns():x}", "object": "chat.completion.chunk"}
    head |= {"created": int(time.time()), "model": name}

    def chunk(delta: dict[str, Any], finish: str | None = None, **more: Any) -> str:  # noqa: ANN401
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return _data({**head, "choices": [choice], **more})

    yield chunk({"role": "assistant", "content": ""})
    try:
        async for event in events:
            match event:
                case Waiting(place):
                    yield chunk({}, fathom={"waiting": place})
                case QuestionRewritten(question):
                    yield chunk({}, fathom={"rewritten": question})
                case RouteChosen(decision, read):
                    yield chunk({}, fathom={"route": decision.route, "reads": read})
                case PrefillProgress(done, total):
                    yield chunk({}, fathom={"tokens_read": done, "of_tokens": total})
                case TextPiece(text):
                    yield chunk({}, fathom={"draft": text})
                case AnswerReady(answer):
                    for words in re.findall(r"\S+\s*|\s+", answer.answer):
                        yield chunk({"content": words})
                    yield chunk({}, _finish_reason(answer), fathom=_extension(answer, unused))
                    if options.include_usage:
                        yield _data({**head, "choices": [], "usage": _usage(answer)})
        yield "data: [DONE]\n\n"
    except FathomError as error:
        yield _data(error_json(error))
    except Exception as error:
        yield _data(unexpected(error))
    finally:
        await events.aclose()  # type: ignore[attr-defined]


def _data(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _finish_reason(answer: Answer) -> str:
    return "length" if _CUT_OFF in answer.receipt.reason else "stop"


def _usage(answer: Answer) -> dict[str, Any]:
    receipt = answer.receipt
    return {
        "prompt_tokens": receipt.prompt_tokens,
        "completion_tokens": receipt.new_tokens,
        "total_tokens": receipt.prompt_tokens + receipt.new_tokens,
        "prompt_tokens_details": {"cached_tokens": receipt.cached_tokens or 0},
    }


def _unused(asked: ChatRequest) -> dict[str, Any]:
    """Return how many messages are not read, and the names of what was set for nothing.

    Decoding is greedy and an answer's length is a setting of the server's, so `temperature` and
    `max_tokens` are among these.
    """
    unread = sum(message.role not in ("user", "assistant") for message in asked.messages)
    unused = sorted(name for name, value in (asked.model_extra or {}).items() if value is not None)
    return {"messages_not_read": unread, "fields_not_used": unused}


def _extension(answer: Answer, unused: dict[str, Any]) -> dict[str, Any]:
    """Return what the answer stands on, and what of the request had no part in it."""
    told = answer.to_json()
    del told["answer"]
    return {**told, **unused}
