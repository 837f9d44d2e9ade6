"""Chat logs and transcripts: who speaks, and when, becomes the heading of what is said."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from rag.types import Section

# Short turns share a section up to this many characters: "Mm-hmm." alone is nothing to search for.
SECTION_CHARS = 600
_NAMED_SPEAKERS = 4

_DATE = r"\d{4}-\d\d-\d\d|\d{1,2}[./]\d{1,2}[./]\d{2,4}"
_CLOCK = (
    r"\d{1,2}:\d{2}(?::\d{2})?(?:[.,]\d{1,6})?(?:[ \u202f]?[AaPp]\.?[Mm]\.?)?(?:Z|[+-]\d\d:?\d\d)?"
)
_NAME = r"[^\W\d_][^:\n<>\[\]{}=/\\|\"]{0,50}"
# [22:02] Ana: …   31.12.23, 22:02 - Ana: …   22:02 <ana> …   (WhatsApp, IRC, meeting recorders)
_TIMED = re.compile(
    rf"^\u200e?[\[(]?(?:(?P<date>{_DATE})(?:,[ ]|[ ]|T))?(?P<clock>{_CLOCK})[\])]?[ ]?(?:-[ ])?"
    rf"(?:<[ @+%]?(?P<nick>[^>\s]{{1,30}})>|(?P<name>~?[ ]?{_NAME}):)(?=[ ]|$)",
    re.M,
)
_NICK = re.compile(r"^<[ @+%]?(?P<nick>[^>\s]{1,30})>(?=[ ])", re.M)
_UNTIMED = re.compile(r"^(?P<name>[^\W\d_a-z][\w.'’()&, -]{0,90}):(?=[ ]|$)", re.M)
_NO_SPEAKERS = frozenset(
    "debug info notice warn warning error critical fatal trace note todo http https".split()
)

_LEAST_TURNS = 6
_LEAST_SHARE_TIMED, _LEAST_SHARE_UNTIMED = 0.3, 0.8


@dataclass(frozen=True, slots=True)
class Turn:
    """What one speaker says at one time, from `start` to the next turn."""

    start: int
    speaker: str
    date: str | None = None
    clock: str | None = None


def chat_sections(text: str) -> tuple[Section, ...]:
    """Return the sections of a text that is a chat log or a transcript, none for any other text.

    It is one only if most lines open a turn, few speakers speak often, and it is no table of
    fields; prose and application logs are not.
    """
    num_lines = sum(bool(line.strip()) for line in text.split("\n"))
    for pattern, least in (
        (_TIMED, _LEAST_SHARE_TIMED),
        (_NICK, _LEAST_SHARE_TIMED),
        (_UNTIMED, _LEAST_SHARE_UNTIMED),
    ):
        turns = [_turn(match) for match in pattern.finditer(text)]
        if len(turns) >= max(_LEAST_TURNS, least * num_lines) and _is_conversation(text, turns):
            return turn_sections(turns, len(text))
    return ()


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


def _turn(match: re.Match[str]) -> Turn:
    found = match.groupdict()
    speaker = (found.get("name") or found["nick"]).strip(" ~")
    return Turn(match.start(), speaker, found.get("date"), found.get("clock"))


def _is_conversation(text: str, turns: list[Turn]) -> bool:
    # "Ana (chair)" and "Ana" are one
    speakers = [turn.speaker.split(" (")[0] for turn in turns]
    counts = Counter(speakers)
    if len(counts) < 2:
        return False
    if any(name.lower() in _NO_SPEAKERS or len(name.split()) > 6 for name in counts):
        return False
    if sum(count for count in counts.values() if count > 1) < 0.6 * len(turns):
        return False
    if turns[0].clock:
        return True
    # fields of a record come in a fixed order and are short; two people may alternate strictly
    period = len(counts)
    repeats = sum(a == b for a, b in zip(speakers, speakers[period:], strict=False))
    if repeats < 0.9 * (len(speakers) - period):
        return True
    num_words = len(text.split()) - sum(len(name.split()) for name in speakers)
    return period == 2 and num_words >= 5 * len(turns)


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
