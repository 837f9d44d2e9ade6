"""Past conversations: listed, searched, opened, renamed, exported, deleted."""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from rag.errors import DocumentNotFoundError
from rag.store.receipts import REDACTED
from rag.types import Answer, Conversation, Exchange
from ui.answer_html import answer_card
from ui.formatting import place, plain_html
from ui.library import Library
from ui.tabs.parts import MOST_ROWS

LIST_EVENTS = ("open",)
TOOL_EVENTS = ("rename", "export", "remove")
View = dict[str, Any]  # what `conversation` in page.js draws


def conversation_view(
    library: Library, exchanges: Sequence[Exchange], *, empty: str = "", busy: bool = False
) -> View:
    """Return past questions and answers as the page draws them."""
    answers = [answer for exchange in exchanges for answer in exchange.answers]
    num_chars = document_lengths(library, answers)
    turns = [
        {
            "question": plain_html(exchange.question),
            "answers": [
                answer_card(
                    answer, num_chars=num_chars, can_ask_again=exchange.question != REDACTED
                )
                for answer in exchange.answers
            ],
        }
        for exchange in exchanges
    ]
    return {"turns": turns, "busy": busy, "empty": empty}


def document_lengths(library: Library, answers: Iterable[Answer]) -> dict[int, int]:
    """Return the characters of each document cited that still exists."""
    lengths: dict[int, int] = {}
    for number in {citation.document for answer in answers for citation in answer.citations}:
        try:
            lengths[number] = library.store.find(str(number)).num_chars
        except DocumentNotFoundError:
            continue
    return lengths


def list_html(found: Sequence[Conversation], current: str | None, search: str = "") -> str:
    """Return the conversations as a list of buttons, the open one marked."""
    if not found:
        words = "None holds these words." if search.strip() else "None yet: ask something."
        return f'<p class="none">{words}</p>'
    items = "".join(
        f'<li><button type="button" data-event="open" data-conversation="{c.id}"'
        f"{' aria-current=true' if c.id == current else ''}>"
        f'<span class="title">{plain_html(c.title)}</span>'
        f'<span class="when">{c.updated_at[:10]}</span></button></li>'
        for c in found[:MOST_ROWS]
    )
    more = len(found) - MOST_ROWS
    rest = f'<p class="none">{more:,} older ones: search for them.</p>' if more > 0 else ""
    return f'<nav aria-label="Conversations"><ul>{items}</ul></nav>{rest}'


def tools_html(current: Conversation | None) -> str:
    """Return the title of the open conversation, and what can be done with it."""
    if current is None:
        return '<h2 class="talk-title">New conversation</h2>'
    title = plain_html(current.title)
    return (
        f'<h2 class="talk-title">{title}</h2><details class="menu"><summary>Manage</summary>'
        f'<form><label>Title <input name="title" value="{title}" maxlength="200"></label>'
        f'<button type="submit" class="quiet" data-event="rename">Rename</button>'
        '<div class="row"><button type="button" class="quiet" data-event="export"'
        ' data-kind="md">Save as Markdown</button><button type="button" class="quiet"'
        ' data-event="export" data-kind="json">Save as JSON</button></div>'
        '<button type="button" class="quiet danger" data-event="remove">Delete for good, with its'
        " receipts</button></form></details>"
    )


def exported(current: Conversation, exchanges: Sequence[Exchange], kind: str) -> str:
    """Return a conversation as the file that `fathom.download` in page.js saves, as JSON."""
    name = re.sub(r"[^\w-]+", "-", current.title).strip("-")[:60] or "conversation"
    if kind == "json":
        whole = {
            "title": current.title,
            "created_at": current.created_at,
            "exchanges": [exchange.to_json() for exchange in exchanges],
        }
        text, media_type = json.dumps(whole, ensure_ascii=False, indent=1), "application/json"
    else:
        text, media_type = _markdown(current, exchanges), "text/markdown"
    return json.dumps({"name": f"{name}.{kind}", "type": media_type, "text": text})


def _markdown(current: Conversation, exchanges: Sequence[Exchange]) -> str:
    """Return questions, answers, quotations and how each was read; the words as they are."""
    lines = [f"# {current.title}", ""]
    for exchange in exchanges:
        lines += [f"## {exchange.question}", ""]
        for given in exchange.answers:
            read = given.receipt.read
            lines += [given.answer, ""]
            for c in given.citations:
                lines += [f"[{c.marker}] {place(c)}", "", *_quoted(c.quote), ""]
            lines += [
                f"*{given.receipt.route}: {given.receipt.reason}; {read.tokens:,} of"
                f" {read.of_tokens:,} tokens read; receipt {given.receipt.id}*",
                "",
            ]
    return "\n".join(lines)


def _quoted(text: str) -> list[str]:
    return [f"> {line}" for line in text.splitlines()]
