"""Answers and receipts in words, for the page (HTML) and for the terminal (plain text). Pure."""

import re
from collections.abc import Sequence
from datetime import timedelta

from rag.types import (
    Answer,
    Citation,
    Gate,
    IngestProgress,
    KVBytes,
    Receipt,
    RouteEstimate,
    ScanTally,
    Seconds,
)

# A count may have hundreds of quotations: the page folds those after the first.
SHOWN_QUOTATIONS = 8

_MARKER = re.compile(r"\[(\d{1,4}|unverified)\]")
# Everything that Markdown, HTML or a bare address could be made of.
_PUNCTUATION = re.compile(r"[^\w\s]|_")
# What moves a terminal's cursor or colours; tab and line feed stay.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def amount(value: float | None, unit: str) -> str:
    """Return a number with its unit as people read it, e.g. `35 MiB` or `1,508 tokens`."""
    if value is None:
        return "unknown"
    if unit == "bytes":
        return f"{value / 2**20:,.1f} MiB"
    if unit == "seconds":
        return f"{value:,.1f} s"
    return f"{value:,.0f} {unit}"


def progress_words(event: IngestProgress) -> str:
    """Return how far an ingest has come, its rates and the time left."""
    parts = [f"{event.files_done} of {event.num_files} files"]
    if event.chunks:
        parts.append(f"{event.chunks:,} chunks, {event.chunks_per_second:.1f} a second")
    if event.pages:
        parts.append(f"{event.pages:,} pages, {event.pages_per_second:.1f} a second")
    if event.seconds_left is not None:
        parts.append(f"{timedelta(seconds=round(event.seconds_left))} left")
    return "; ".join(parts)


def place(citation: Citation) -> str:
    """Return where a quotation stands: title, page and section, as far as they are known."""
    parts = [citation.title]
    if citation.version > 1:
        parts.append(f"version {citation.version}")
    if citation.page is not None:
        parts.append(f"page {citation.page}")
    if citation.section:
        parts.append(citation.section)
    return ", ".join(parts)


# ---- the page -----------------------------------------------------------------------------------


def plain_html(text: str) -> str:
    """Return untrusted text as HTML that shows it and does nothing else.

    The chat renders Markdown, so every ASCII punctuation sign becomes a character reference: no
    image, link, bare address, heading, table or formula can arise from it.
    """
    lines = _CONTROL.sub("\N{REPLACEMENT CHARACTER}", _unix_lines(text)).split("\n")
    return "<br>".join(_inert(line) for line in lines)


def answer_html(answer: Answer) -> str:
    """Return the answer with its markers as small superscripts; all text is escaped."""
    parts = _MARKER.split(answer.answer)  # text, marker, text, marker, ..., text
    shown = "".join(
        _marker_html(part) if index % 2 else plain_html(part) for index, part in enumerate(parts)
    )
    return f'<div class="answer">{shown}</div>'


def citations_html(answer: Answer) -> str:
    """Return the quotations the answer stands on, each with its place."""
    if not answer.citations:
        return ""
    first, rest = answer.citations[:SHOWN_QUOTATIONS], answer.citations[SHOWN_QUOTATIONS:]
    shown = _quotation_list(first, "Quotations")
    if rest:
        shown += (
            f'<details class="more"><summary>{len(rest):,} more quotations</summary>'
            f"{_quotation_list(rest, 'More quotations')}</details>"
        )
    return shown


def _quotation_list(citations: Sequence[Citation], label: str) -> str:
    items = "".join(
        f"<li value={c.marker}><blockquote>{_quote_html(c)}</blockquote>"
        f"<cite>{plain_html(place(c))}"
        f"{'' if c.verified else ' (not verified)'}</cite></li>"
        for c in citations
    )
    return f'<ol class="citations" aria-label="{label}">{items}</ol>'


def _quote_html(citation: Citation) -> str:
    """Return the quotation on one line, with the answer marked where it is a stretch of it."""
    if citation.answer_start is None or citation.answer_end is None:
        return plain_html(_one_line(citation.quote))
    start, end = citation.answer_start - citation.start, citation.answer_end - citation.start
    before, answer, after = (
        plain_html(re.sub(r"\s+", " ", part))
        for part in (citation.quote[:start], citation.quote[start:end], citation.quote[end:])
    )
    return f"{before}<mark>{answer}</mark>{after}"


def evidence_html(where: str, before: str, quote: str, after: str) -> str:
    """Return a quotation marked in the text around it, under the name of its place."""
    return (
        f'<figure class="evidence"><figcaption>{plain_html(where)}</figcaption>'
        f"<p>{plain_html(before)}<mark>{plain_html(quote)}</mark>{plain_html(after)}</p></figure>"
    )


def receipt_html(receipt: Receipt) -> str:
    """Return the receipt as a foldable panel."""
    rows = "".join(_gate_row(gate) for gate in receipt.gates)
    read, seconds = receipt.read, receipt.seconds
    facts = [
        ("Read", f"{read.tokens:,} of {read.of_tokens:,} tokens in {read.chunks:,} of"
         f" {read.of_chunks:,} chunks"),
        ("Not read", read.not_read or "nothing was left out"),
        *(("Given up", words) for words in receipt.escalations),
        *([("Asked as", receipt.standalone_question)] if receipt.standalone_question else []),
        ("Question", _class_words(receipt)),
        *([("Worth", routes_words(receipt.routes))] if receipt.routes else []),
        *([("Scan", _scan_words(receipt.scan))] if receipt.scan else []),
        ("Prompt", f"{receipt.prompt_tokens:,} tokens, {_reused(receipt)}"
         f" {receipt.new_tokens:,} written"),
        ("KV cache", _kv_words(receipt.kv_bytes)),
        ("Time", f"{seconds.retrieve:.2f} s retrieving, {seconds.prefill:.1f} s reading"
         f" ({amount(seconds.prefill_predicted, 'seconds')} predicted),"
         f" {seconds.decode:.1f} s writing, {seconds.total:.1f} s in all"),
        ("Model", f"{receipt.model}; {receipt.embedder}"),
        ("Receipt", receipt.id),
    ]  # fmt: skip
    lines = "".join(f"<dt>{name}</dt><dd>{plain_html(value)}</dd>" for name, value in facts)
    return (
        f'<details class="receipt"><summary>How this was read: <b>{receipt.route}</b></summary>'
        f"<p>{plain_html(_sentence(receipt.reason))}</p>"
        "<table><thead><tr><th>Route</th><th>Gate</th><th>Needs</th><th>Limit</th>"
        f"<th>Verdict</th></tr></thead><tbody>{rows}</tbody></table><dl>{lines}</dl></details>"
    )


def routes_words(routes: Sequence[RouteEstimate]) -> str:
    """Return what each route is worth: how likely it is right, and its prompt tokens."""
    return "; ".join(
        f"{estimate.route} likely right {estimate.probability:.0%} for"
        f" {estimate.cost_tokens:,} tokens"
        for estimate in routes
    )


def error_html(message: str, hint: str) -> str:
    """Return an error with what to do about it."""
    return (
        f'<div class="problem" role="alert"><b>{plain_html(_sentence(message))}</b><br>'
        f"{plain_html(_sentence(hint))}</div>"
    )


def _gate_row(gate: Gate) -> str:
    verdict = "passed" if gate.passed else "failed"
    cells = (gate.route, _gate_name(gate), amount(gate.value, gate.unit), _limit(gate), verdict)
    return f'<tr class="{verdict}">' + "".join(f"<td>{plain_html(c)}</td>" for c in cells) + "</tr>"


def _gate_name(gate: Gate) -> str:
    """Return the gate's name without the unit, which its numbers carry."""
    return gate.gate.removesuffix("_bytes").removesuffix("_seconds").replace("kv", "KV cache")


def _limit(gate: Gate) -> str:
    return "no limit" if gate.limit is None and gate.passed else amount(gate.limit, gate.unit)


def _kv_words(kv: KVBytes) -> str:
    """Return both numbers; a difference too small for MiB is still said."""
    words = f"{amount(kv.predicted, 'bytes')} predicted, {amount(kv.actual, 'bytes')} actual"
    if kv.predicted is None or kv.actual is None:
        return "unknown: the server holds it"
    if kv.predicted == kv.actual:
        return f"{words}, equal to the byte"
    return f"{words}, {abs(kv.actual - kv.predicted):,} bytes apart"


def _reused(receipt: Receipt) -> str:
    """Return how many tokens of the prompt were not computed again, where that is known."""
    return "" if receipt.cached_tokens is None else f"{receipt.cached_tokens:,} of them reused;"


def _scan_words(scan: ScanTally) -> str:
    """Return what a scan did, in words."""
    return (
        f"{scan.items:,} items found in {_plural(scan.windows, 'window')};"
        f" {scan.dropped_unverified:,} findings dropped because they do not stand there,"
        f" {scan.dropped_repeats:,} as repeats"
    )


def _class_words(receipt: Receipt) -> str:
    words = receipt.question_class.value
    return f"{words}: {receipt.class_reason}" if receipt.class_reason else words


def _plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _marker_html(name: str) -> str:
    if name == "unverified":
        return '<span class="unverified">unverified</span>'
    return f'<sup class="marker">{name}</sup>'


def _inert(line: str) -> str:
    """Return one line with its punctuation and its indentation as character references."""
    bare = line.lstrip()
    indent = "&nbsp;" * (len(line.expandtabs(4)) - len(bare.expandtabs(4)))
    shown = _PUNCTUATION.sub(_reference, bare)
    return indent + re.sub(r"^\d", _reference, shown)  # `1.` and `1)` open a list


def _reference(match: re.Match[str]) -> str:
    return f"&#{ord(match.group())};" if match.group().isascii() else match.group()


def _unix_lines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _rest(seconds: Seconds) -> float:
    """Return what no step of the receipt names: loading the model and timing it, once."""
    return max(0.0, seconds.total - seconds.retrieve - seconds.prefill - seconds.decode)


def _one_line(quote: str) -> str:
    return " ".join(quote.split())


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


# ---- the terminal -------------------------------------------------------------------------------


def receipt_text(answer: Answer) -> str:
    """Return answer, quotations and receipt as plain lines, safe to print on a terminal."""
    receipt, read, seconds = answer.receipt, answer.receipt.read, answer.receipt.seconds
    lines = [answer.answer, ""]
    for c in answer.citations:
        lines.append(f'[{c.marker}] "{_one_line(c.quote)}"')
        lines.append(f"    {place(c)}, characters {c.start}-{c.end}")
    if answer.citations:
        lines.append("")
    lines.append(f"{receipt.route}: {receipt.reason}")
    if receipt.standalone_question:
        lines.append(f"asked as: {receipt.standalone_question}")
    lines.append(f"question: {_class_words(receipt)}")
    if receipt.routes:
        lines.append(f"worth: {routes_words(receipt.routes)}")
    if receipt.scan:
        lines.append(f"scan: {_scan_words(receipt.scan)}")
    kv = receipt.kv_bytes
    for gate in receipt.gates:
        verdict = "passed" if gate.passed else "FAILED"
        needs, limit = amount(gate.value, gate.unit), _limit(gate)
        lines.append(f"  {gate.route:<9}  {gate.gate:<16}  {verdict}  {needs} of {limit}")
    lines += [
        f"read {read.tokens:,} of {read.of_tokens:,} tokens"
        + (f"; {read.not_read}" if read.not_read else ""),
        *(f"given up: {words}" for words in receipt.escalations),
        f"KV cache {amount(kv.predicted, 'bytes')} predicted, {amount(kv.actual, 'bytes')} actual",
        f"{seconds.total:.1f} s: {seconds.retrieve:.2f} retrieving, {seconds.prefill:.1f} reading"
        f" ({amount(seconds.prefill_predicted, 'seconds')} predicted),"
        f" {seconds.decode:.1f} writing, {_rest(seconds):.1f} loading and measuring",
        f"{receipt.model}, receipt {receipt.id}",
    ]
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", _unix_lines("\n".join(lines)))
