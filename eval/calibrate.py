"""How long a prompt this model uses well: the synthetic suite asked at several lengths.

The run goes in rounds, a haystack of every length each, so that one that is cut short has as many
of all. A haystack is read once, all its questions go on from that prefix, and its record is stored
as soon as it is there: a run that was killed goes on with the next haystack. Effective length and
depth cells are judged from all records that are stored.
"""

import hashlib
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from random import Random
from threading import Event
from typing import Any

from eval.judge_calibration import judge
from eval.synthetic import (
    SUITE_VERSION,
    Haystack,
    Mix,
    SyntheticQuestion,
    build_haystack,
    exact_score,
)
from rag.answering.prompt import build_messages
from rag.errors import ModelError
from rag.lm.engine import DocumentPrefix, Engine, GenerationDone, Prompt, ScoreRequest, TextPiece
from rag.store.calibrations import CalibrationStore, EffectiveLength
from rag.types import ContextPassage, Document, Passage

SHORTEST_TOKENS = 512
NUM_HAYSTACKS = 12
# A quick run takes lengths of which this many rounds fit its seconds, as predicted.
QUICK_SECONDS = 230.0
QUICK_ROUNDS = 3

# The longest reply; the value comes first, for the reply is begun for the model.
_REPLY_TOKENS = {Mix.LOOKUP: 16, Mix.REASONING: 32}
LONGEST_REPLY_TOKENS = max(_REPLY_TOKENS.values())
# A server is sent messages, so nothing can be begun for it.
_UNBEGUN_REPLY_TOKENS = 64
_QUESTION_TOKENS = 48  # about, with the beginning of the reply: for the prediction alone
_NUM_QUESTIONS = {Mix.LOOKUP: 12, Mix.REASONING: 4}
_TITLE = "Notes"


@dataclass(frozen=True, slots=True)
class Step:
    """One haystack: which facts, how long, the how-manieth."""

    mix: Mix
    tokens: int
    number: int

    @property
    def key(self) -> str:
        """Its name among the rows of a run."""
        return f"{self.mix} {self.tokens} {self.number}"


@dataclass(frozen=True, slots=True)
class CalibrationProgress:
    """`done` of `total` haystacks are asked, those of earlier runs included; `tokens` is next.

    `seconds_left` is predicted, and corrected by what was measured; None before anything was.
    """

    done: int
    total: int
    tokens: int
    seconds_left: float | None


# ---- steps --------------------------------------------------------------------------------------


def possible_lengths(longest_tokens: int) -> list[int]:
    """Return prompt lengths to try: powers of two from the shortest, and the longest itself.

    Args:
        longest_tokens: prompt and reply together that the model takes here.

    Raises:
        ModelError: if there are not two.
    """
    most = longest_tokens - LONGEST_REPLY_TOKENS
    lengths = []
    length = SHORTEST_TOKENS
    while length <= most:
        lengths.append(length)
        length *= 2
    if lengths and 4 * most >= 5 * lengths[-1]:
        lengths.append(most)
    if len(lengths) < 2:
        raise ModelError(
            f"{longest_tokens:,} tokens of context are too few to compare lengths in",
            hint=f"at least {2 * SHORTEST_TOKENS + LONGEST_REPLY_TOKENS:,} are needed: free"
            " memory, or raise FATHOM_MAX_CONTEXT_TOKENS",
        )
    return lengths


def lengths_within(
    lengths: Sequence[int], most_seconds: float, seconds_of: Callable[[int], float | None]
) -> list[int]:
    """Return as many of the lengths, shortest first, as take `most_seconds` each; two at least.

    Where seconds are not known, all.
    """
    kept: list[int] = []
    for length in sorted(lengths):
        seconds = seconds_of(length)
        if len(kept) >= 2 and seconds is not None and seconds > most_seconds:
            break
        kept.append(length)
    return kept


def quick_lengths(
    lengths: Sequence[int], budget: float, seconds_of: Callable[[int], float | None]
) -> list[int]:
    """Return as many of the lengths, shortest first, as fit QUICK_ROUNDS rounds in the budget."""
    total = 0.0

    def so_far(length: int) -> float | None:
        nonlocal total
        seconds = seconds_of(length)
        if seconds is None:
            return None
        total += seconds
        return total

    return lengths_within(lengths, budget / QUICK_ROUNDS, so_far)


def step_seconds(engine: Engine, mix: Mix, tokens: int) -> float | None:
    """Return about how long a haystack takes here; None where no rate is known."""
    predicted = engine.predicted_prefill_seconds
    read = predicted(tokens)
    question = predicted(tokens, cached_tokens=tokens - _QUESTION_TOKENS)
    one_pass = predicted(tokens + _NUM_QUESTIONS[mix], cached_tokens=tokens)
    if read is None or question is None or one_pass is None:
        return None
    # Most replies end early, all of them are written in step, and so are the options scored.
    return read + _NUM_QUESTIONS[mix] * question + _REPLY_TOKENS[mix] * one_pass / 2


# ---- the run ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Run:
    """What is measured, and where its rows are stored.

    Attributes:
        lengths: of prompts, in tokens with the template.
        num_haystacks: of each mix and length, at most.
        mixes: which facts.
        budget_seconds: no round begins that would not end within it; None sets no end.
        seed: of everything drawn.
        filler: sentences to hide facts among; by default Fathom's own.
        filler_name: what the record calls them.
    """

    lengths: tuple[int, ...]
    num_haystacks: int = NUM_HAYSTACKS
    mixes: tuple[Mix, ...] = tuple(Mix)
    budget_seconds: float | None = None
    seed: int = 0
    filler: tuple[str, ...] = ()
    filler_name: str = "own sentences"

    def rounds(self) -> list[list[Step]]:
        """Return the steps: each round has one haystack of every length and mix."""
        return [
            [Step(mix, tokens, number) for tokens in sorted(self.lengths) for mix in self.mixes]
            for number in range(self.num_haystacks)
        ]

    def rows_prefix(self, model_id: str) -> str:
        """Return how the keys of all rows begin that belong together."""
        prompt = hashlib.sha256(str(build_messages("", ())).encode()).hexdigest()[:8]
        filler = hashlib.sha256("\n".join(self.filler).encode()).hexdigest()[:8]
        return (
            f"calibration rows: {model_id}, suite {SUITE_VERSION}, prompt {prompt},"
            f" filler {filler}, seed {self.seed}: "
        )


def calibrate(
    engine: Engine,
    calibrations: CalibrationStore,
    run: Run,
    *,
    dtype: str,
    device: str,
    fresh: bool = False,
    stop: Event | None = None,
    on_progress: Callable[[CalibrationProgress], None] = lambda _: None,
    clock: Callable[[], float] = time.monotonic,
) -> EffectiveLength:
    """Ask what was not asked yet, store what was found, and return it.

    Args:
        engine: the model; it is best given a document KV that holds one haystack.
        calibrations: where rows and result are stored.
        run: what is measured.
        dtype: of the weights, for the record.
        device: for the record.
        fresh: forget the rows of earlier runs first.
        stop: set it to end after the current haystack; what is there is judged.
        on_progress: called before each haystack and after the last.
        clock: returns seconds.

    Raises:
        ModelError: if fewer than two lengths were measured, or a length does not fit.
        OutOfMemoryError: if memory runs out; the haystacks done until then are kept.
    """
    stop = stop or Event()
    prefix = run.rows_prefix(engine.model_id)
    if fresh:
        calibrations.forget(prefix)
    there = calibrations.load_all(prefix)
    rounds = [[step for step in steps if prefix + step.key not in there] for steps in run.rounds()]
    pace = _Pace(engine, run.budget_seconds, clock)
    num_done = 0
    for number, steps in enumerate(rounds):
        for index, step in enumerate(steps):
            planned = list(chain(steps[index:], *pace.fitting(steps[index:], rounds[number + 1 :])))
            left = pace.seconds(planned)
            total = len(there) + num_done + len(planned)
            on_progress(CalibrationProgress(len(there) + num_done, total, step.tokens, left))
            begun = clock()
            record = ask(engine, step, run, stop)
            if record is None:
                break
            pace.took(step, clock() - begun)
            calibrations.save(prefix + step.key, record)
            num_done += 1
        if stop.is_set() or not pace.fitting([], rounds[number + 1 :]):
            break
    found = judge(
        list(calibrations.load_all(prefix).values()),
        model=engine.name,
        model_id=engine.model_id,
        seed=run.seed,
        filler=run.filler_name,
        dtype=dtype,
        device=device,
    )
    calibrations.save_effective_length(found)
    return found


class _Pace:
    """How long haystacks take: as predicted, corrected by those that were measured."""

    def __init__(
        self, engine: Engine, budget_seconds: float | None, clock: Callable[[], float]
    ) -> None:
        self._engine = engine
        self._budget_seconds = budget_seconds
        self._clock = clock
        self._begun = clock()
        self._taken = 0.0
        self._predicted = 0.0
        self._weights: dict[tuple[Mix, int], float] = {}

    def took(self, step: Step, seconds: float) -> None:
        """Learn from one haystack."""
        self._taken += seconds
        self._predicted += self._weight(step)

    def seconds(self, steps: Sequence[Step]) -> float | None:
        """Return about how long these will take; None before anything is known."""
        weight = sum(map(self._weight, steps))
        if self._predicted:
            return weight * self._taken / self._predicted
        known = all(step_seconds(self._engine, s.mix, s.tokens) is not None for s in steps)
        return weight if known else None

    def fitting(self, begun: Sequence[Step], rounds: Sequence[list[Step]]) -> list[list[Step]]:
        """Return the rounds that fit what the budget leaves after those steps of a begun one."""
        if self._budget_seconds is None:
            return list(rounds)
        left = self._budget_seconds - (self._clock() - self._begun) - (self.seconds(begun) or 0.0)
        kept: list[list[Step]] = []
        for steps in rounds:
            left -= self.seconds(steps) or 0.0
            if left < 0:
                break
            kept.append(steps)
        return kept

    def _weight(self, step: Step) -> float:
        """Return the predicted seconds, or the tokens where seconds cannot be predicted."""
        key = (step.mix, step.tokens)
        if key not in self._weights:
            self._weights[key] = step_seconds(self._engine, *key) or float(step.tokens)
        return self._weights[key]


# ---- one haystack -------------------------------------------------------------------------------


def ask(engine: Engine, step: Step, run: Run, stop: Event) -> dict[str, Any] | None:
    """Build one haystack, ask its questions, and return its record: plain JSON.

    None is returned once `stop` is set, for half a haystack is none.
    """
    haystack = build_haystack(
        step.mix,
        step.tokens,
        Random(f"{run.seed} {step.key}"),
        count_tokens=engine.count_tokens,
        count_prompt=lambda text, question: _prompt(engine, text, question).num_tokens,
        filler=run.filler,
    )
    prompts = [_prompt(engine, haystack.text, question) for question in haystack.questions]
    prefix = _shared(prompts, f"calibration {run.seed} {step.key}")
    predicted = engine.predicted_prefill_seconds(prompts[0].num_tokens)
    replies, prefill_seconds = _replies(engine, prompts, prefix, _REPLY_TOKENS[step.mix], stop)
    likeliest = _likeliest(engine, haystack, prompts, prefix, stop)
    if stop.is_set():
        return None
    return {
        "mix": step.mix,
        "tokens": step.tokens,
        "number": step.number,
        "prompt_tokens": max(prompt.num_tokens for prompt in prompts),
        "document_tokens": haystack.document_tokens,
        "prefill_seconds": prefill_seconds,
        "predicted_seconds": predicted,
        "rows": [
            {
                "task": question.task,
                "question": question.question,
                "answers": question.answers,
                "depth": haystack.depth(question),
                "reply": reply,
                "score": exact_score(question, reply),
                "likeliest": is_likeliest,
            }
            for question, reply, is_likeliest in zip(
                haystack.questions, replies, likeliest, strict=True
            )
        ],
    }


def _prompt(engine: Engine, text: str, question: SyntheticQuestion) -> Prompt:
    """Return the prompt of the route `full`, the reply begun where the tokens are ours to give."""
    document = Document(0, _TITLE, "", 1, True, "", "", 0, 0, 0, 0, (), "")
    passage = Passage(document, 0, len(text), text, None, None)
    prompt = engine.encode_chat(build_messages(question.question, (ContextPassage(1, passage),)))
    if not prompt.ids or not question.reply_start:
        return prompt
    ids = (*prompt.ids, *engine.encode(question.reply_start))
    return Prompt(prompt.messages, len(ids), ids)


def _shared(prompts: Sequence[Prompt], name: str) -> DocumentPrefix | None:
    """Return what all prompts begin with; None where a server holds the tokens."""
    if not all(prompt.ids for prompt in prompts):
        return None
    shared = 0
    for ids in zip(*(prompt.ids for prompt in prompts), strict=False):
        if len(set(ids)) > 1:
            break
        shared += 1
    return DocumentPrefix(shared, (name,))


def _replies(
    engine: Engine,
    prompts: Sequence[Prompt],
    prefix: DocumentPrefix | None,
    max_new_tokens: int,
    stop: Event,
) -> tuple[list[str], float | None]:
    """Return what the model writes to each prompt, and the seconds of the longest prefill."""
    replies = [""] * len(prompts)
    seconds: list[float] = []
    if prefix is None:
        max_new_tokens = _UNBEGUN_REPLY_TOKENS
    steps = engine.generate_many(prompts, max_new_tokens=max_new_tokens, stop=stop, prefix=prefix)
    for number, event in steps:
        if isinstance(event, TextPiece):
            replies[number] += event.text
        elif isinstance(event, GenerationDone) and event.reused_tokens == 0:
            seconds.append(event.prefill_seconds)
    return replies, max(seconds, default=None)


def _likeliest(
    engine: Engine,
    haystack: Haystack,
    prompts: Sequence[Prompt],
    prefix: DocumentPrefix | None,
    stop: Event,
) -> list[bool | None]:
    """Say of each question whether its gold value is the likeliest of its options.

    None where there are no options, or the engine cannot score. Options are compared up to the
    token that tells them all apart, and one whose likelihood is another's is not the likeliest.
    """
    found: list[bool | None] = [None] * len(prompts)
    if not engine.can_score or stop.is_set():
        return found
    requests: list[ScoreRequest] = []
    numbers: list[int] = []
    for number, question in enumerate(haystack.questions):
        if question.options:
            without = len(prompts[number].ids) - len(engine.encode(question.reply_start))
            begun = prompts[number].ids[:without]
            made = _option_requests(engine, begun, question)
            requests += made
            numbers += [number] * len(made)
    scores = engine.score(requests, stop=stop, prefix=prefix)
    if scores is None:
        return found
    by_question: dict[int, list[float]] = defaultdict(list)
    for number, logs in zip(numbers, scores, strict=True):
        by_question[number].append(sum(logs))
    for number, (gold, *others) in by_question.items():
        found[number] = gold > max(others)
    return found


def _option_requests(
    engine: Engine, begun: tuple[int, ...], question: SyntheticQuestion
) -> list[ScoreRequest]:
    whole = [tuple(engine.encode(f"{question.reply_start} {one}")) for one in question.options]
    shared = 0
    while len({ids[: shared + 1] for ids in whole}) == 1:
        shared += 1
    longest = max(map(len, whole))
    end = next(
        (n for n in range(shared + 1, longest) if len({ids[:n] for ids in whole}) == len(whole)),
        longest,
    )
    return [ScoreRequest(begun + ids[:shared], ids[shared:end] or ids[-1:]) for ids in whole]
