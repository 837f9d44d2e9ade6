"""Answers and receipts in words, and untrusted text as inert HTML: what page and terminal share."""

import re
from collections.abc import Sequence
from datetime import timedelta

from rag.types import (
    Answer,
    Citation,
    Decoding,
    DecodingWay,
    Gate,
    IngestProgress,
    Receipt,
    RouteEstimate,
    ScanTally,
    Seconds,
)

# Everything that Markdown, HTML or a bare address could be made of.
_PUNCTUATION = re.compile(r"[^\w\s]|_")
# What moves a terminal's cursor or colours; tab and line feed stay.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

_WAYS = {
    DecodingWay.PLAIN: "token by token",
    DecodingWay.DRAFTS: "several tokens a pass where it copies",
    DecodingWay.STATIC: "token by token over a cache that stays in place",
    DecodingWay.RECORDED: "by one recorded step",
    DecodingWay.INTEGERS: "with the quantised weights of the model's file, in float32",
}


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
    parts = [f"{event.files_done} of {plural(event.num_files, 'file')}"]
    if event.chunks:
        parts.append(f"{plural(event.chunks, 'chunk')}, {event.chunks_per_second:.1f} a second")
    if event.pages:
        parts.append(f"{plural(event.pages, 'page')}, {event.pages_per_second:.1f} a second")
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


def limit_words(gate: Gate) -> str:
    """Return a gate's limit in words."""
    return "no limit" if gate.limit is None and gate.passed else amount(gate.limit, gate.unit)


def scan_words(scan: ScanTally) -> str:
    """Return what a scan did, in words."""
    return (
        f"{plural(scan.items, 'item')} found in {plural(scan.windows, 'window')};"
        f" {plural(scan.dropped_unverified, 'finding')} dropped as not standing there,"
        f" {scan.dropped_repeats:,} as repeats"
    )


def routes_words(routes: Sequence[RouteEstimate], thrift: float | None = None) -> str:
    """Return what each route is worth: how likely it is right, its prompt tokens, the thrift."""
    words = "; ".join(
        f"{estimate.route} likely right {estimate.probability:.0%} for"
        f" {estimate.cost_tokens:,} tokens"
        for estimate in routes
    )
    return words if thrift is None else f"{words}; thrift {thrift:g}"


def decoding_words(decoding: Decoding) -> str:
    """Return how an answer's tokens were computed, in words."""
    words = _WAYS[decoding.way]
    if decoding.drafted:
        words += f", {decoding.accepted:,} of {decoding.drafted:,} drafted tokens right"
    if decoding.num_rows > 1:
        words += f", {decoding.num_rows:,} answers in step"
    return f"{words}; {decoding.refused}" if decoding.refused else words


def class_words(receipt: Receipt) -> str:
    """Return the question's class and why it is thought of that class."""
    words = receipt.question_class.value
    return f"{words}: {receipt.class_reason}" if receipt.class_reason else words


def plural(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural where it is not one."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def rest_seconds(seconds: Seconds) -> float:
    """Return what no step of the receipt names: loading the model and timing it, once."""
    return max(0.0, seconds.total - seconds.retrieve - seconds.prefill - seconds.decode)


def one_line(quote: str) -> str:
    """Return a quotation without its line breaks."""
    return " ".join(quote.split())


def sentence(text: str) -> str:
    """Return the text with a capital letter and a full stop; a command as it is typed."""
    if text.startswith("fathom "):
        return text
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


# ---- untrusted text -----------------------------------------------------------------------------


def plain_html(text: str) -> str:
    """Return untrusted text as HTML that shows it and does nothing else.

    Every ASCII punctuation sign becomes a character reference: no
    image, link, bare address, heading, table or formula can arise from it, whether HTML or
    Markdown is made of it afterwards.
    """
    lines = _CONTROL.sub("\N{REPLACEMENT CHARACTER}", _unix_lines(text)).split("\n")
    return "<br>".join(_inert(line) for line in lines)


def error_html(message: str, hint: str) -> str:
    """Return an error with what to do about it."""
    return (
        f'<div class="problem" role="alert"><b>{plain_html(sentence(message))}</b><br>'
        f"{plain_html(sentence(hint))}</div>"
    )


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


# ---- the terminal -------------------------------------------------------------------------------


def receipt_text(answer: Answer) -> str:
    """Return answer, quotations and receipt as plain lines, safe to print on a terminal."""
    receipt, read, seconds = answer.receipt, answer.receipt.read, answer.receipt.seconds
    lines = [answer.answer, ""]
    for c in answer.citations:
        lines.append(f'[{c.marker}] "{one_line(c.quote)}"')
        lines.append(f"    {place(c)}, characters {c.start}-{c.end}")
    if answer.citations:
        lines.append("")
    lines.append(f"{receipt.route}: {receipt.reason}")
    if receipt.standalone_question:
        lines.append(f"asked as: {receipt.standalone_question}")
    if receipt.named:
        lines.append(f"asked of: {receipt.named}")
    lines.append(f"question: {class_words(receipt)}")
    if receipt.routes:
        lines.append(f"worth: {routes_words(receipt.routes, receipt.thrift)}")
    if receipt.scan:
        lines.append(f"scan: {scan_words(receipt.scan)}")
    kv = receipt.kv_bytes
    for gate in receipt.gates:
        verdict = "passed" if gate.passed else "FAILED"
        needs, limit = amount(gate.value, gate.unit), limit_words(gate)
        cache = f" ({gate.kv_dtype} cache)" if gate.kv_dtype else ""
        lines.append(f"  {gate.route:<9}  {gate.gate:<16}  {verdict}  {needs} of {limit}{cache}")
    lines += [
        f"read {read.tokens:,} of {read.of_tokens:,} tokens"
        + (f"; {read.not_read}" if read.not_read else ""),
        *(f"given up: {words}" for words in receipt.escalations),
        f"KV cache {amount(kv.predicted, 'bytes')} predicted, {amount(kv.actual, 'bytes')} actual",
        f"{seconds.total:.1f} s: {seconds.retrieve:.2f} retrieving, {seconds.prefill:.1f} reading"
        f" ({amount(seconds.prefill_predicted, 'seconds')} predicted),"
        f" {seconds.decode:.1f} writing, {rest_seconds(seconds):.1f} loading and measuring",
        *([f"written {decoding_words(receipt.decoding)}"] if receipt.decoding else []),
        f"{receipt.model}, receipt {receipt.id}",
    ]
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", _unix_lines("\n".join(lines)))
