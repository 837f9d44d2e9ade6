"""Verbatim answers: the likeliest stretch of the likeliest sentences, never a word of the model's.

The model writes nothing. It is shown a few sentences and the question, its reply is begun with a
quotation mark, and every stretch of the sentences is a candidate for what stands before the closing
one. With S its sentence, a stretch s has the score

    a (log p(s | prompt) + log p(closing mark | prompt, s)) + b log P(S) + c words(s) - ...

so the answer is the document's text by construction, and the closing mark decides where it ends.
Whether there is an answer at all is judged before: rag/answering/answerable.py.
Source: docs/decisions/0024.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from threading import Event

import numpy as np

from rag.answering.answerable import answer_probability
from rag.answering.sentence_choice import Sentence, kind_asked_for, weights
from rag.lm.engine import Engine, Message, ScoreRequest, Scores
from rag.lm.kv_bytes import kv_cache_bytes
from rag.retrieval.lexical_score import is_stop_word, question_words, stems
from rag.sentences import cell_spans
from rag.types import KVBytes

# The sentences that the model is shown, the starts in them that it goes on from, and how far, in
# tokens. Chosen on dev, like all numbers here: docs/decisions/0024.
NUM_SENTENCES = 3
NUM_STARTS = 6
MAX_SPAN_TOKENS = 24
# Below this probability of the quoted sentence another is shown beside it.
SURE = 0.8
SPAN_FEATURES = (
    "likelihood",  # log, of the stretch and the closing mark after it
    "log_probability",  # of its sentence
    "words_long",  # its words, where the question asks for no name, number, date or place
    "repeated",  # the share of its words that the question's matter consists of
    "nothing_new",  # no word but the question's and the grammar's
)
# Starts that go on alike for so many tokens are one.
_SAME_TOKENS = 6

_INSTRUCTION = "You answer questions with words copied from the text that the user shows you."
_ENDS = ('"', '".', '",')
# A number with what belongs to it; a word with what joins its parts; a sign of a script that
# writes no spaces; any other sign.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_LETTERS = rf"[^\W{_UNSPACED}]+"
_PIECE = re.compile(
    rf"[$€£]?\d+(?:[.,:/]\d+)*%?|[{_UNSPACED}]|{_LETTERS}(?:[-'’.]{_LETTERS})*|[^\w\s]|\w"
)


@dataclass(frozen=True, slots=True)
class Quotation:
    """An answer that is `[start, end)` of a document's text, inside a sentence of it.

    `beside` is another sentence, where that may as well hold the answer. `probability` is that the
    documents hold an answer; `prompt_ids` is what the model read, empty where no prompt fits,
    `kv_bytes` the widest cache that it took, and `predicted_seconds` how long that was to take,
    None where no rate is known.
    """

    sentence: Sentence
    start: int
    end: int
    beside: Sentence | None
    probability: float
    prompt_ids: tuple[int, ...]
    kv_bytes: KVBytes
    predicted_seconds: float | None = None

    @property
    def text(self) -> str:
        """The answer itself."""
        return self.sentence.text[self.start - self.sentence.start : self.end - self.sentence.start]


@dataclass(frozen=True, slots=True)
class _Start:
    """A place where a stretch may begin: its tokens from there, and where it may end.

    `ends` holds for each possible end its offset in the document and the tokens until there.
    """

    sentence: Sentence
    start: int
    token_ids: tuple[int, ...]
    ends: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch `[start, end)` of a document inside one of its sentences; see SPAN_FEATURES."""

    sentence: Sentence
    start: int
    end: int
    features: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class _Option:
    """A stretch of a start up to `end`, and a token that closes it."""

    start: _Start
    end: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SpansRead:
    """The stretches of the sentences that the model read, its prompt, and the widest cache.

    `predicted_seconds` is how long the reading was to take, None where no rate is known.
    """

    spans: list[Span]
    prompt_ids: tuple[int, ...]
    kv_bytes: KVBytes
    predicted_seconds: float | None


def quote(
    question: str,
    ranked: Sequence[Sentence],
    engine: Engine,
    *,
    max_prompt_tokens: int,
    stop: Event,
) -> Quotation | None:
    """Return the answer as a quotation; None if there is nothing to quote, or it was stopped.

    Args:
        question: in words.
        ranked: sentences that may hold the answer, likeliest first.
        engine: the language model.
        max_prompt_tokens: sentences that would make the prompt longer are not shown; where not
            even one fits, it is quoted whole and unread.
        stop: ends it between forward passes.
    """
    if not ranked:
        return None
    probability = answer_probability(question, ranked)
    read = candidate_spans(question, ranked, engine, max_prompt_tokens=max_prompt_tokens, stop=stop)
    if read is None:
        return None
    best, beside = ranked[0], None
    start, end = best.start, best.end
    if read.spans:
        span = max(read.spans, key=span_score)
        best, start, end = span.sentence, span.start, span.end
        beside = sentence_beside(best, ranked)
    return Quotation(
        best,
        start,
        end,
        beside,
        probability,
        read.prompt_ids,
        read.kv_bytes,
        read.predicted_seconds,
    )


def unread_quotation(question: str, ranked: Sequence[Sentence]) -> Quotation:
    """Return the likeliest sentence whole, which no model has read."""
    first = ranked[0]
    beside = sentence_beside(first, ranked)
    probability = answer_probability(question, ranked)
    return Quotation(first, first.start, first.end, beside, probability, (), KVBytes(0, 0))


def sentence_beside(quoted: Sentence, ranked: Sequence[Sentence]) -> Sentence | None:
    """Return the likeliest other sentence where the quoted one is not sure to hold the answer."""
    if quoted.probability >= SURE:
        return None
    return next((sentence for sentence in ranked if sentence is not quoted), None)


def candidate_spans(
    question: str,
    ranked: Sequence[Sentence],
    engine: Engine,
    *,
    max_prompt_tokens: int,
    stop: Event,
) -> SpansRead | None:
    """Return the stretches that `quote` chooses from; None if it was stopped."""
    for num_sentences in range(min(NUM_SENTENCES, len(ranked)), 0, -1):
        shown = sorted(ranked[:num_sentences], key=lambda s: (s.document.id, s.start))
        prompt_ids = quotation_prompt(question, shown, engine)
        if len(prompt_ids) + MAX_SPAN_TOKENS <= max_prompt_tokens:
            break
    else:
        return SpansRead([], (), KVBytes(0, 0), None)
    starts = [start for sentence in shown for start in _starts_in(sentence, engine)]
    firsts = list(dict.fromkeys(start.token_ids[:1] for start in starts))
    first_scores = engine.score([ScoreRequest(prompt_ids, first) for first in firsts], stop=stop)
    if first_scores is None:
        return None
    likelihood = dict(zip(firsts, (scores[0] for scores in first_scores), strict=True))
    options = _options(_likeliest(starts, likelihood), engine)
    seconds = _predicted_seconds(engine, len(prompt_ids), options)
    scores = engine.score([ScoreRequest(prompt_ids, o.token_ids) for o in options], stop=stop)
    if scores is None:
        return None
    widest = max(first_scores, scores, key=lambda found: found.kv_bytes)
    predicted = None
    if engine.spec is not None:
        predicted = widest.kv_rows * kv_cache_bytes(engine.spec, widest.kv_tokens)
    return SpansRead(
        _spans(question, options, scores), prompt_ids, KVBytes(predicted, widest.kv_bytes), seconds
    )


def quotation_prompt(question: str, shown: Sequence[Sentence], engine: Engine) -> tuple[int, ...]:
    """Return the prompt that shows sentences, asks the question, and begins a quotation."""
    text = _shown_text(shown)
    user = (
        f"Text:\n\n{text}\n\nQuestion: {question.strip()}\n\n"
        "Answer with the shortest exact quotation from the text."
    )
    messages = [Message("system", _INSTRUCTION), Message("user", user)]
    return (*engine.encode_chat(messages).ids, *engine.encode(_ENDS[0]))


def _shown_text(shown: Sequence[Sentence]) -> str:
    """Return the sentences one after the other, and rows below each other and what names them."""
    text = columns = ""
    for sentence in shown:
        line_break = " "
        if sentence.columns is not None:
            line_break = "\n"
            if sentence.columns not in (columns, sentence.text):
                text += f"\n{sentence.columns}"
            columns = sentence.columns
        text += line_break + " ".join(sentence.text.split())
    return text.strip()


def _likeliest(
    starts: Sequence[_Start], likelihood: Mapping[tuple[int, ...], float]
) -> list[_Start]:
    """Return the starts whose first token is likeliest, no two that go on alike."""
    ordered = sorted(starts, key=lambda s: (-likelihood[s.token_ids[:1]], -s.sentence.probability))
    distinct: dict[tuple[int, ...], _Start] = {}
    for start in ordered:
        distinct.setdefault(start.token_ids[:_SAME_TOKENS], start)
    return list(distinct.values())[:NUM_STARTS]


def _starts_in(sentence: Sentence, engine: Engine) -> list[_Start]:
    """Return every place in a sentence where a word begins; of a row, an answer is in one cell."""
    starts = []
    for cell_start, cell_end in _cells_of(sentence):
        text = sentence.text[cell_start:cell_end]
        pieces = [(match.start(), match.end()) for match in _PIECE.finditer(text)]
        words = [_is_word(text[a:b]) for a, b in pieces]
        # The tokens of a piece at the start of a stretch, and after white space, differ.
        bare = [tuple(engine.encode(text[a:b])) for a, b in pieces]
        inner = [
            tuple(engine.encode(f" {text[a:b]}")) if a and text[a - 1].isspace() else bare[n]
            for n, (a, b) in enumerate(pieces)
        ]
        offset = sentence.start + cell_start
        for first, is_word in enumerate(words):
            if not is_word:
                continue
            token_ids: list[int] = []
            ends: list[tuple[int, int]] = []
            for at in range(first, len(pieces)):
                own = bare[at] if at == first else inner[at]
                if ends and len(token_ids) + len(own) > MAX_SPAN_TOKENS:
                    break
                token_ids += own
                if words[at]:
                    ends.append((offset + pieces[at][1], len(token_ids)))
            token_ids = token_ids[: ends[-1][1]]
            starts.append(
                _Start(sentence, offset + pieces[first][0], tuple(token_ids), tuple(ends))
            )
    return starts


def _cells_of(sentence: Sentence) -> list[tuple[int, int]]:
    """Return the cells of a row, the whole of any other sentence, from its start."""
    return [(0, len(sentence.text))] if sentence.columns is None else cell_spans(sentence.text)


def _is_word(piece: str) -> bool:
    return any(sign.isalnum() for sign in piece)


def _options(starts: Sequence[_Start], engine: Engine) -> list[_Option]:
    """Return every end of every start, with each way to close it: those of an end in a row."""
    closing = list(dict.fromkeys(engine.encode(end)[0] for end in _ENDS))
    return [
        _Option(start, end, (*start.token_ids[:num_tokens], end_id))
        for start in starts
        for end, num_tokens in start.ends
        for end_id in closing
    ]


def _predicted_seconds(
    engine: Engine, prompt_tokens: int, options: Sequence[_Option]
) -> float | None:
    """Return the seconds that scoring takes: prefills of known lengths, None without a rate.

    The prompt but for its last token, that token, and behind the prompt a row for each start, all
    as long as the longest.
    """
    shared = prompt_tokens - 1
    rows = len({option.start.start for option in options})
    tails = rows * max((len(option.token_ids) for option in options), default=0)
    parts = [
        engine.predicted_prefill_seconds(shared),
        engine.predicted_prefill_seconds(shared + 1, cached_tokens=shared),
        engine.predicted_prefill_seconds(shared + tails, cached_tokens=shared),
    ]
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


def _spans(question: str, options: Sequence[_Option], scores: Scores) -> list[Span]:
    """Return the stretches of the options, with the features that decide between them."""
    in_question = frozenset(stems(question))
    matter = frozenset(stems(" ".join(question_words(question))))
    wants_long = kind_asked_for(question) in (None, "why")
    spans = []
    for (start, end), group in groupby(
        zip(options, scores, strict=True), key=lambda pair: (pair[0].start, pair[0].end)
    ):
        closed = [found for _, found in group]
        likelihood = sum(closed[0][:-1])
        likelihood += float(np.logaddexp.reduce([found[-1] for found in closed]))
        sentence = start.sentence
        text = sentence.text[start.start - sentence.start : end - sentence.start]
        words = stems(text)
        new = [word for word in words if word not in in_question and not is_stop_word(word)]
        features = (
            likelihood,
            math.log(max(sentence.probability, 1e-9)),
            float(len(text.split()) if wants_long else 0),
            sum(word in matter for word in words) / max(1, len(words)),
            float(not new),
        )
        spans.append(Span(sentence, start.start, end, features))
    return spans


def span_score(span: Span) -> float:
    """Return what the best quotation is the highest of: its features by their weights."""
    fitted = weights()["span"]
    return float(
        sum(fitted[name] * value for name, value in zip(SPAN_FEATURES, span.features, strict=True))
    )
