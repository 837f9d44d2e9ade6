"""Answers, their quotations and their receipts as HTML. Pure; all text in it is escaped.

Buttons carry `data-event` and what the event needs; `page.js` tells the tab when one is pressed.
Lengths of bars are `data-width` and the like, in percent: no attribute here loads or runs anything.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rag.types import Answer, AnswerMode, Citation, Gate, Receipt, Route
from ui.formatting import (
    amount,
    class_words,
    decoding_words,
    limit_words,
    one_line,
    place,
    plain_html,
    plural,
    rest_seconds,
    routes_words,
    scan_words,
    sentence,
)

# A count may have hundreds of quotations: the page folds those after the first.
SHOWN_QUOTATIONS = 8

ROUTE_NAMES = {Route.FULL: "Full", Route.RETRIEVAL: "Retrieval", Route.SCAN: "Scan"}
_MARKER = re.compile(r"\[(\d{1,4}|unverified)\]")
_MODES = {AnswerMode.QUOTED: ", quoted", AnswerMode.COUNTED: ", counted"}
_THIRDS = ("at the start", "in the middle", "at the end")


def answer_card(
    answer: Answer,
    *,
    num_chars: Mapping[int, int],
    can_ask_again: bool = True,
) -> str:
    """Return everything that is shown of one answer.

    Args:
        answer: the finished answer.
        num_chars: length of each document cited that still exists.
        can_ask_again: whether to offer the other routes.
    """
    rewritten = answer.receipt.standalone_question
    return (
        (asked_as_html(rewritten) if rewritten else "")
        + answer_html(answer)
        + citations_html(answer)
        + "".join(_strip(answer, d, num_chars[d]) for d in _cited(answer) if d in num_chars)
        + receipt_html(answer.receipt)
        + (_again_html(answer.receipt) if can_ask_again else "")
    )


def answer_html(answer: Answer) -> str:
    """Return the answer with its markers as small buttons that open the place."""
    parts = _MARKER.split(answer.answer)  # text, marker, text, marker, ..., text
    cited = {str(citation.marker): citation for citation in answer.citations}
    shown = "".join(
        _chip(part, cited.get(part), answer.receipt.id) if index % 2 else plain_html(part)
        for index, part in enumerate(parts)
    )
    return f'<div class="answer">{shown}</div>'


def asked_as_html(question: str) -> str:
    """Return a follow-up as it was asked, made to stand alone."""
    return f'<p class="asked-as">Asked as: {plain_html(question)}</p>'


def citations_html(answer: Answer) -> str:
    """Return the quotations the answer stands on, each with its place."""
    if not answer.citations:
        return ""
    first, rest = answer.citations[:SHOWN_QUOTATIONS], answer.citations[SHOWN_QUOTATIONS:]
    label = "Nearest passages" if answer.abstained else "Quotations"
    title = '<p class="nearest">Nearest passages, which do not hold the answer:</p>'
    shown = title * answer.abstained + _quotation_list(first, label, answer.receipt.id)
    if rest:
        shown += (
            f'<details class="more"><summary>{len(rest):,} more quotations</summary>'
            f"{_quotation_list(rest, 'More quotations', answer.receipt.id)}</details>"
        )
    return shown


def receipt_html(receipt: Receipt) -> str:
    """Return the receipt as a foldable panel: the route in a sentence, gates as bars, numbers."""
    read, seconds = receipt.read, receipt.seconds
    name = ROUTE_NAMES[receipt.route] + _MODES.get(receipt.mode, "")
    share = f"{read.tokens:,} of {read.of_tokens:,} tokens read, {seconds.total:,.1f} s"
    rest = rest_seconds(seconds)
    facts = [
        ("Read", f"{read.tokens:,} of {read.of_tokens:,} tokens in {read.chunks:,} of"
         f" {plural(read.of_chunks, 'chunk')}"),
        ("Not read", read.not_read or "nothing was left out"),
        *([("Asked of", receipt.named)] if receipt.named else []),
        *(("Given up", words) for words in receipt.escalations),
        ("Question", class_words(receipt)),
        *([("Worth", routes_words(receipt.routes, receipt.thrift))] if receipt.routes else []),
        *([("Scan", scan_words(receipt.scan))] if receipt.scan else []),
        ("Prompt", f"{receipt.prompt_tokens:,} tokens, {_reused(receipt)}"
         f" {receipt.new_tokens:,} written"),
        ("Time", f"{seconds.retrieve:.2f} s retrieving, {seconds.prefill:.1f} s reading,"
         f" {seconds.decode:.1f} s writing, {rest:.1f} s loading and measuring"),
        *([("Written", decoding_words(receipt.decoding))] if receipt.decoding else []),
        ("Model", f"{receipt.model}; {receipt.embedder}"),
        ("Receipt", receipt.id),
    ]  # fmt: skip
    lines = "".join(f"<dt>{name}</dt><dd>{plain_html(value)}</dd>" for name, value in facts)
    return (
        f'<details class="receipt"><summary>How this was read: <b>{name}</b>'
        f' <span class="share">{plain_html(share)}</span></summary>'
        f"<p>{plain_html(sentence(receipt.reason))}</p>{gates_html(receipt.gates)}"
        f"{_predictions(receipt)}<dl>{lines}</dl></details>"
    )


def gates_html(gates: Sequence[Gate]) -> str:
    """Return the gates of each route as bars against their limits, with the numbers in words."""
    by_route: dict[str, list[Gate]] = {}
    for gate in gates:
        by_route.setdefault(gate.route, []).append(gate)
    return "".join(
        f'<p class="of">Gates of <b>{plain_html(route)}</b></p><ul class="gates">'
        + "".join(map(_gate_item, found))
        + "</ul>"
        for route, found in by_route.items()
    )


def bar_html(value: float | None, limit: float | None, *, failed: bool = False) -> str:
    """Return a bar as long as `value`, with the limit as a line, the larger of both at the end.

    It is hidden from who listens: it says nothing that the words beside it do not.
    """
    if value is None:
        return '<span class="bar none" aria-hidden="true"></span>'
    end = max(value, limit or 0.0) or 1.0
    tick = "" if limit is None else f'<b data-left="{100 * limit / end:.1f}"></b>'
    kind = "bar failed" if failed else "bar"
    width = max(0.5, 100 * value / end) if value else 0.0
    return f'<span class="{kind}" aria-hidden="true"><i data-width="{width:.1f}"></i>{tick}</span>'


# ---- the answer ---------------------------------------------------------------------------------


def _chip(name: str, citation: Citation | None, receipt_id: str) -> str:
    if name == "unverified":
        return '<span class="unverified">unverified</span>'
    if citation is None:
        return f'<sup class="marker">{name}</sup>'
    return (
        f'<button type="button" class="chip" data-event="cite" data-receipt="{receipt_id}"'
        f' data-marker="{name}" aria-label="Citation {name}: {plain_html(place(citation))}">'
        f"{name}</button>"
    )


def _quotation_list(citations: Sequence[Citation], label: str, receipt_id: str) -> str:
    items = "".join(
        f"<li value={c.marker}><blockquote>{_quote_html(c)}</blockquote>"
        f'<button type="button" class="place" data-event="cite" data-receipt="{receipt_id}"'
        f' data-marker="{c.marker}">{plain_html(place(c))}</button>'
        f"{'' if c.verified else ' (not verified)'}</li>"
        for c in citations
    )
    return f'<ol class="citations" aria-label="{label}">{items}</ol>'


def _quote_html(citation: Citation) -> str:
    """Return the quotation on one line, with the answer marked where it is a stretch of it."""
    if citation.answer_start is None or citation.answer_end is None:
        return plain_html(one_line(citation.quote))
    start, end = citation.answer_start - citation.start, citation.answer_end - citation.start
    before, answer, after = (
        plain_html(re.sub(r"\s+", " ", part))
        for part in (citation.quote[:start], citation.quote[start:end], citation.quote[end:])
    )
    return f"{before}<mark>{answer}</mark>{after}"


def _cited(answer: Answer) -> list[int]:
    return list(dict.fromkeys(citation.document for citation in answer.citations))


def _strip(answer: Answer, document: int, num_chars: int) -> str:
    """Return a strip as long as a document, with a tick where each of its citations lies."""
    found = [citation for citation in answer.citations if citation.document == document]
    shares = [min(1.0, citation.start / max(1, num_chars)) for citation in found]
    thirds = [min(2, int(3 * share)) for share in shares]
    words = ", ".join(
        f"{thirds.count(third):,} {where}" for third, where in enumerate(_THIRDS) if third in thirds
    )
    ticks = "".join(f'<i data-left="{100 * share:.1f}"></i>' for share in sorted(set(shares)))
    return (
        f'<p class="strip"><span class="track" aria-hidden="true">{ticks}</span>'
        f"<span>{plain_html(found[0].title)}: {words}</span></p>"
    )


def _again_html(receipt: Receipt) -> str:
    others = [route for route in ROUTE_NAMES if route is not receipt.route]
    buttons = "".join(
        f'<button type="button" class="quiet" data-event="again" data-receipt="{receipt.id}"'
        f' data-route="{route}">{ROUTE_NAMES[route].lower()}</button>'
        for route in others
    )
    return (
        '<div class="again" role="group" aria-label="Ask again with another route">'
        f"<span>Ask again with</span>{buttons}</div>"
    )


# ---- the receipt --------------------------------------------------------------------------------


def _gate_item(gate: Gate) -> str:
    verdict = "passed" if gate.passed else "failed"
    numbers = f"{amount(gate.value, gate.unit)} of {limit_words(gate)}"
    if gate.value is not None and gate.limit is not None and gate.unit not in ("bytes", "seconds"):
        numbers = f"{gate.value:,.0f} of {amount(gate.limit, gate.unit)}"
    return (
        f'<li class="{verdict}"><span class="name">{plain_html(gate_name(gate))}</span>'
        f"{bar_html(gate.value, gate.limit, failed=not gate.passed)}"
        f'<span class="numbers">{plain_html(numbers)}</span>'
        f'<span class="verdict">{verdict}</span></li>'
    )


def gate_name(gate: Gate) -> str:
    """Return the gate's name without the unit, which its numbers carry."""
    name = gate.gate.removesuffix("_bytes").removesuffix("_seconds").replace("kv", "KV cache")
    return name.replace("_", " ") + (f" in {gate.kv_dtype}" if gate.kv_dtype else "")


class _Prediction(NamedTuple):
    """A number that was predicted and measured; `note` says how they compare."""

    name: str
    unit: str
    predicted: float | None
    actual: float | None
    note: str


def _predictions(receipt: Receipt) -> str:
    """Return predicted beside actual, as bars of one scale."""
    kv, seconds = receipt.kv_bytes, receipt.seconds
    rows = [
        _Prediction("KV cache", "bytes", kv.predicted, kv.actual, _bytes_apart(receipt)),
        _Prediction("Prefill", "seconds", seconds.prefill_predicted, seconds.prefill, ""),
    ]
    items = []
    for row in rows:
        if row.predicted is None:
            continue
        longest = max(row.predicted, row.actual or 0.0)
        lines = "".join(
            f'<span class="what">{what}</span>{bar_html(value, longest)}'
            f'<span class="numbers">{plain_html(amount(value, row.unit))}</span>'
            for what, value in (("predicted", row.predicted), ("actual", row.actual))
        )
        items.append(
            f'<li><span class="name">{row.name}</span>{lines}'
            f'<span class="note">{plain_html(row.note)}</span></li>'
        )
    if not items:
        return ""
    return (
        '<p class="of">Predicted and actual</p><ul class="predictions">' + "".join(items) + "</ul>"
    )


def _bytes_apart(receipt: Receipt) -> str:
    """Return how prediction and cache compare; a difference too small for MiB is still said."""
    kv = receipt.kv_bytes
    if kv.predicted is None or kv.actual is None:
        return "the server holds it and does not tell"
    if kv.predicted == kv.actual:
        return "equal to the byte"
    return f"{abs(kv.actual - kv.predicted):,} bytes apart"


def _reused(receipt: Receipt) -> str:
    """Return how many tokens of the prompt were not computed again, where that is known."""
    return "" if receipt.cached_tokens is None else f"{receipt.cached_tokens:,} of them reused;"
