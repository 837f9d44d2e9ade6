"""Who speaks when in a chat log or a transcript: the turns of a conversation, from its text."""

import re
from collections import Counter
from dataclasses import dataclass

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


def chat_turns(text: str) -> tuple[Turn, ...]:
    """Return the turns of a text that is a chat log or a transcript, none for any other text.

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
            return tuple(turns)
    return ()


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
