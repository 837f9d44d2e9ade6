"""Chat logs and transcripts: who speaks, and when, becomes the heading of what is said."""

import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from rag.turns import Turn, chat_turns
from rag.types import Section

# Short turns share a section up to this many characters: "Mm-hmm." alone is nothing to search for.
SECTION_CHARS = 600
_NAMED_SPEAKERS = 4


def chat_sections(text: str) -> tuple[Section, ...]:
    """Return the sections of a text that is a chat log or a transcript, none for any other text."""
    turns = chat_turns(text)
    return turn_sections(turns, len(text)) if turns else ()


def turn_sections(turns: Sequence[Turn], end: int) -> tuple[Section, ...]:
    """Return one section a day, and below it one for each long turn or run of short ones.

    The title names the speakers in order of appearance and the time, e.g. `Ana, Ben, 22:02-22:05`.
    """
    sections: list[Section] = []
    date: str | None = None
    level = 2 if any(turn.date for turn in turns) else 1
    for run in _runs(turns, end):
        if run[0].date and run[0].date != date:
            date = run[0].date
            sections.append(Section(1, date, run[0].start))
        sections.append(Section(level, _title(run), run[0].start))
    return tuple(sections)


def chat_from_json(value: Any) -> tuple[str, tuple[Turn, ...]] | None:  # noqa: ANN401 - any JSON
    """Return the text and the turns of a Slack, Telegram or Discord export, None for other JSON."""
    messages = value.get("messages") if isinstance(value, dict) else value
    if not isinstance(messages, list) or not messages:
        return None
    lines, turns, start = [], [], 0
    for message in messages:
        said = _message(message) if isinstance(message, dict) else None
        if said is None:
            continue
        moment, speaker, words = said
        line = f"[{moment}] {speaker}: {words}" if moment else f"{speaker}: {words}"
        date, _, clock = (moment or "").partition(" ")
        turns.append(Turn(start, speaker, date or None, clock or None))
        lines.append(line)
        start += len(line) + 1
    if len(turns) < 0.5 * len(messages):
        return None
    return "\n".join(lines), tuple(turns)


def _runs(turns: Sequence[Turn], end: int) -> Iterator[list[Turn]]:
    """Yield the turns that share a section: short ones of one day, together not too long."""
    ends = [*(turn.start for turn in turns[1:]), end]
    run: list[Turn] = []
    for turn, turn_end in zip(turns, ends, strict=True):
        if run and (turn_end - run[0].start > SECTION_CHARS or turn.date != run[0].date):
            yield run
            run = []
        run.append(turn)
    if run:
        yield run


def _title(run: list[Turn]) -> str:
    speakers = list(dict.fromkeys(turn.speaker for turn in run))
    names = ", ".join(speakers[:_NAMED_SPEAKERS])
    if len(speakers) > _NAMED_SPEAKERS:
        names += f" and {len(speakers) - _NAMED_SPEAKERS} more"
    clocks = [turn.clock for turn in run if turn.clock]
    if not clocks:
        return names
    return f"{names}, {clocks[0]}" + (f"-{clocks[-1]}" if clocks[-1] != clocks[0] else "")


def _message(message: dict[str, Any]) -> tuple[str, str, str] | None:
    """Return moment, speaker and words of one exported message."""
    profile, author = message.get("user_profile"), message.get("author")
    names = (
        profile.get("real_name") if isinstance(profile, dict) else None,
        author.get("name") if isinstance(author, dict) else author,
        *(message.get(key) for key in ("username", "from", "user", "speaker", "sender")),
    )
    speaker = next((name for name in names if isinstance(name, str) and name), None)
    words = message.get("text", message.get("content"))
    if isinstance(words, list):  # Telegram: pieces of text and of markup
        words = "".join(p if isinstance(p, str) else str(p.get("text", "")) for p in words)
    if speaker is None or not isinstance(words, str):
        return None
    return _moment(message), " ".join(speaker.split()), words


def _moment(message: dict[str, Any]) -> str:
    for key in ("ts", "timestamp", "date", "time"):
        value = message.get(key)
        if value is None:
            continue
        try:
            if re.fullmatch(r"\d{9,11}(\.\d+)?", str(value)):
                moment = datetime.fromtimestamp(float(value), tz=UTC)
            else:
                moment = datetime.fromisoformat(str(value))
        except (ValueError, OverflowError, OSError):
            return ""
        return moment.strftime("%Y-%m-%d %H:%M:%S")
    return ""
