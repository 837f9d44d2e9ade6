"""E-mail to canonical text: its headers, its body, the names of what is attached."""

from email import message_from_bytes, policy
from email.message import EmailMessage
from pathlib import Path
from typing import cast

from ingest.readers.text import decode
from ingest.readers.web import decode_html, hidden_warning, html_text
from rag.types import CanonicalText, Section

_HEADERS = ("From", "To", "Cc", "Date", "Subject")


def read_mail(path: Path, media_type: str) -> CanonicalText:
    """Read an e-mail (RFC 5322); the plain text of its body is preferred to the HTML."""
    message = message_from_bytes(path.read_bytes(), policy=policy.default)
    headers = [
        f"{name}: {' '.join(str(value).split())}"
        for name in _HEADERS
        if (value := message.get(name)) is not None
    ]
    body = message.get_body(preferencelist=("plain", "html"))
    text, sections, warnings = _body(cast(EmailMessage | None, body))
    head = "\n".join(headers)
    shift = len(head) + 2
    subject = " ".join(str(message.get("Subject") or "").split())
    moved = tuple(Section(s.level + 1, s.title, s.start + shift) for s in sections)
    warnings += tuple(_attachment_warnings(message))
    content = f"{head}\n\n{text}"
    return CanonicalText(
        content, media_type, (), (Section(1, subject, 0), *moved) if subject else moved, warnings
    )


def _body(body: EmailMessage | None) -> tuple[str, tuple[Section, ...], tuple[str, ...]]:
    if body is None:
        return "", (), ("it has no text body",)
    data = cast(bytes, body.get_payload(decode=True) or b"")
    declared = body.get_content_charset()
    if body.get_content_subtype() == "html":
        html, warnings = decode_html(_recoded(data, declared))
        text, sections, hidden = html_text(html)
        return text, sections, warnings + hidden_warning(hidden)
    text, warnings = decode(_recoded(data, declared))
    return text, (), warnings


def _recoded(data: bytes, charset: str | None) -> bytes:
    """Return the bytes in UTF-8 if the declared character set is right."""
    try:
        return data.decode(charset or "utf-8").encode("utf-8-sig")
    except (LookupError, UnicodeError):
        return data


def _attachment_warnings(message: EmailMessage) -> list[str]:
    warnings = []
    for part in message.iter_attachments():
        name = part.get_filename() or "without a name"
        kind = part.get_content_type()
        warnings.append(f"the attachment {name} ({kind}) is not read; save it and ingest it")
    return warnings
