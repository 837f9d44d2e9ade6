"""Answers and receipts in words, for the page (HTML) and for the terminal (plain text). Pure."""

import html
import re

from rag.types import Answer, Citation, Gate, Receipt, Seconds

_MARKER = re.compile(r"\[(\d{1,3})\]")


def amount(value: float | None, unit: str) -> str:
    """Return a number with its unit as people read it, e.g. `35 MiB` or `1,508 tokens`."""
    if value is None:
        return "unknown"
    if unit == "bytes":
        return f"{value / 2**20:,.1f} MiB"
    if unit == "seconds":
        return f"{value:,.1f} s"
    return f"{value:,.0f} {unit}"


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
    """Return untrusted text as HTML that shows it and does nothing else."""
    return html.escape(text).replace("\n", "<br>")


def answer_html(answer: Answer) -> str:
    """Return the answer with its markers as small superscripts; all text is escaped."""
    shown = plain_html(answer.answer)
    shown = _MARKER.sub(r'<sup class="marker">\1</sup>', shown)
    return shown.replace("[unverified]", '<span class="unverified">unverified</span>')


def citations_html(answer: Answer) -> str:
    """Return the quotations the answer stands on, each with its place."""
    if not answer.citations:
        return ""
    items = "".join(
        f"<li value={c.marker}><blockquote>{plain_html(c.quote)}</blockquote>"
        f"<cite>{html.escape(place(c))}"
        f"{'' if c.verified else ' (not verified)'}</cite></li>"
        for c in answer.citations
    )
    return f'<ol class="citations" aria-label="Quotations">{items}</ol>'


def evidence_html(before: str, quote: str, after: str) -> str:
    """Return a quotation marked in the text around it."""
    return (
        f'<div class="evidence">… {plain_html(before)}<mark>{plain_html(quote)}</mark>'
        f"{plain_html(after)} …</div>"
    )


def receipt_html(receipt: Receipt) -> str:
    """Return the receipt as a foldable panel."""
    rows = "".join(_gate_row(gate) for gate in receipt.gates)
    read, seconds = receipt.read, receipt.seconds
    facts = [
        ("Read", f"{read.tokens:,} of {read.of_tokens:,} tokens in {read.chunks:,} of"
         f" {read.of_chunks:,} chunks"),
        ("Not read", read.not_read or "nothing was left out"),
        ("Question", receipt.question_class.value),
        ("Prompt", f"{receipt.prompt_tokens:,} tokens, {receipt.cached_tokens:,} of them reused;"
         f" {receipt.new_tokens:,} written"),
        ("KV cache", f"{amount(receipt.kv_bytes.predicted, 'bytes')} predicted,"
         f" {amount(receipt.kv_bytes.actual, 'bytes')} actual"),
        ("Time", f"{seconds.retrieve:.2f} s retrieving, {seconds.prefill:.1f} s reading"
         f" ({seconds.prefill_predicted:.1f} s predicted), {seconds.decode:.1f} s writing,"
         f" {seconds.total:.1f} s in all"),
        ("Model", f"{receipt.model}; {receipt.embedder}"),
        ("Receipt", receipt.id),
    ]  # fmt: skip
    lines = "".join(f"<dt>{name}</dt><dd>{html.escape(value)}</dd>" for name, value in facts)
    return (
        f'<details class="receipt"><summary>How this was read: <b>{receipt.route}</b></summary>'
        f"<p>{html.escape(_sentence(receipt.reason))}</p>"
        "<table><thead><tr><th>Route</th><th>Gate</th><th>Needs</th><th>Limit</th>"
        f"<th>Verdict</th></tr></thead><tbody>{rows}</tbody></table><dl>{lines}</dl></details>"
    )


def error_html(message: str, hint: str) -> str:
    """Return an error with what to do about it."""
    return (
        f'<div class="problem" role="alert"><b>{plain_html(_sentence(message))}</b><br>'
        f"{plain_html(_sentence(hint))}</div>"
    )


def _gate_row(gate: Gate) -> str:
    verdict = "passed" if gate.passed else "failed"
    needs, limit = amount(gate.value, gate.unit), amount(gate.limit, gate.unit)
    cells = (gate.route, gate.gate.replace("_", " "), needs, limit, verdict)
    return (
        f'<tr class="{verdict}">' + "".join(f"<td>{html.escape(c)}</td>" for c in cells) + "</tr>"
    )


def _rest(seconds: Seconds) -> float:
    """Return what no step of the receipt names: loading the model and timing it, once."""
    return max(0.0, seconds.total - seconds.retrieve - seconds.prefill - seconds.decode)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


# ---- the terminal -------------------------------------------------------------------------------


def receipt_text(answer: Answer) -> str:
    """Return answer, quotations and receipt as plain lines."""
    receipt, read, seconds = answer.receipt, answer.receipt.read, answer.receipt.seconds
    lines = [answer.answer, ""]
    for c in answer.citations:
        quote = " ".join(c.quote.split())
        lines.append(f'[{c.marker}] "{quote}"')
        lines.append(f"    {place(c)}, characters {c.start}-{c.end}")
    if answer.citations:
        lines.append("")
    lines.append(f"{receipt.route}: {receipt.reason}")
    for gate in receipt.gates:
        verdict = "passed" if gate.passed else "FAILED"
        needs, limit = amount(gate.value, gate.unit), amount(gate.limit, gate.unit)
        lines.append(f"  {gate.route:<9}  {gate.gate:<15}  {verdict}  {needs} of {limit}")
    kv = receipt.kv_bytes
    lines += [
        f"read {read.tokens:,} of {read.of_tokens:,} tokens"
        + (f"; {read.not_read}" if read.not_read else ""),
        f"KV cache {amount(kv.predicted, 'bytes')} predicted, {amount(kv.actual, 'bytes')} actual",
        f"{seconds.total:.1f} s: {seconds.retrieve:.2f} retrieving, {seconds.prefill:.1f} reading"
        f" ({seconds.prefill_predicted:.1f} predicted), {seconds.decode:.1f} writing,"
        f" {_rest(seconds):.1f} loading and measuring",
        f"{receipt.model}, receipt {receipt.id}",
    ]
    return "\n".join(lines)
