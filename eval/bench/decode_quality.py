"""What the weights of decoding do to answers: each way beside plain float32, on one prefill.

The measure is transformers' own code in float32 with the weights that the GGUF file stands for:
nothing of ours decodes there, and nothing but float32 rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass, field
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.bench.decode_ways import STORED, steps, weights_of
from eval.evidence_sets import EvidenceQuestion, EvidenceSet
from eval.metrics import contains_answer
from eval.statistics import Interval, clustered_difference, clustered_mean
from rag.errors import SettingsError
from rag.lm.chat_tokenizer import ChatTokenizer
from rag.lm.engine import Message
from rag.lm.forward import forward, prefill_chunks
from rag.lm.native_cache import native_cache
from rag.lm.spec import CHUNK_TOKENS

if TYPE_CHECKING:
    import torch

# Around the evidence, as a passage of a retrieval would be.
_CONTEXT_CHARS = 600


@dataclass(frozen=True, slots=True)
class WayQuality:
    """Greedy answers of one way, beside the plain ones.

    `same` is the share of equal answers, token by token; `gold` of answers that contain a gold one,
    `difference` that less the plain share, paired. Along the plain answers: `kl` is the mean
    divergence of the next token's distribution from the plain one, in nats, and `same_token` the
    share of tokens where both have the same likeliest.
    """

    way: str
    same: Interval
    gold: Interval
    difference: Interval
    kl: float
    same_token: float


@dataclass(frozen=True, slots=True)
class DecodeQuality:
    """All ways to write the answers to the same questions.

    `num_tokens` are those of the plain answers along which the ways were compared, and `gold` the
    share of these answers that contain a gold one.
    """

    num_questions: int
    num_tokens: int
    gold: Interval
    ways: tuple[WayQuality, ...]

    def to_json(self) -> dict[str, Any]:
        """Return its figures."""
        return asdict(self)


@dataclass(slots=True, eq=False)
class Written:
    """What one way has written so far; of each token along the plain answers, how far it is off."""

    answers: list[list[int]] = field(default_factory=list)
    kls: list[float] = field(default_factory=list)
    agreed: list[bool] = field(default_factory=list)


def load_exact(path: Path) -> Any:  # noqa: ANN401 - a causal model of transformers
    """Return transformers' own model with a GGUF file's weights in float32, each as it is meant."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with redirect_stderr(StringIO()):  # the reader's progress bar cannot be switched off
        model: Any = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=torch.float32,
            # Where it could keep blocks packed, it would multiply by them in a way of its own.
            quantization_config=GgufConfig(dequantize=True),
        )
    return model.eval()


def decode_quality(
    model: Any,  # noqa: ANN401 - a causal model of transformers
    plain: Any,  # noqa: ANN401
    tokenizer: ChatTokenizer,
    evidence: EvidenceSet,
    *,
    num_questions: int = 200,
    max_new_tokens: int = 32,
    on_progress: Callable[[int], None] = lambda _: None,
) -> DecodeQuality:
    """Answer questions about the passage that holds their evidence, each way.

    A prompt is read once, as the engine reads it, and all write on from there.

    Args:
        model: as the engine runs it, see `weights_of`.
        plain: what `load_exact` gave of the file that its weights are from.
        tokenizer: its tokenizer.
        evidence: the questions.
        num_questions: spread evenly over the set.
        max_new_tokens: of each answer.
        on_progress: called with the number of questions done.

    Raises:
        SettingsError: if the weights of the two are not the same.
    """
    check_weights(model, plain)
    questions = chosen_questions(evidence, num_questions)
    end_ids = tokenizer.end_ids(model)
    plain_answers: list[list[int]] = []
    ways = {weights: Written() for weights in weights_of(model)}
    for number, question in enumerate(questions):
        ids = prompt_ids(question, evidence, tokenizer, _CONTEXT_CHARS)
        plain_answers.append(_answer(model, plain, ids, ways, end_ids, max_new_tokens))
        on_progress(number + 1)
    return judged(ways, plain_answers, questions, tokenizer)


def chosen_questions(evidence: EvidenceSet, num_questions: int) -> Sequence[EvidenceQuestion]:
    """Return so many questions, spread evenly over a set."""
    step = max(1, len(evidence.questions) // num_questions)
    return evidence.questions[::step][:num_questions]


def prompt_ids(
    question: EvidenceQuestion, evidence: EvidenceSet, tokenizer: ChatTokenizer, context_chars: int
) -> list[int]:
    """Return the tokens of a question about so many characters on each side of its evidence."""
    text = next(d.text for d in evidence.documents if d.id == question.document)
    start, end = question.spans[0]
    passage = text[max(0, start - context_chars) : end + context_chars]
    return tokenizer.encode_chat(
        [Message("user", f"{passage}\n\nQuestion: {question.question}\nAnswer briefly.")]
    )


def judged(
    ways: Mapping[str, Written],
    plain_answers: Sequence[Sequence[int]],
    questions: Sequence[EvidenceQuestion],
    tokenizer: ChatTokenizer,
) -> DecodeQuality:
    """Return what each way wrote beside the plain answers to the same questions."""
    documents = [question.document for question in questions]

    def right(answers: Sequence[Sequence[int]]) -> list[float]:
        pairs = zip(answers, questions, strict=True)
        return [float(contains_answer(_text(tokenizer, ids), q.answers)) for ids, q in pairs]

    def way(name: str, found: Written) -> WayQuality:
        pairs = list(zip(found.answers, plain_answers, strict=True))
        own = right(found.answers)
        return WayQuality(
            way=name,
            same=clustered_mean([float(one == other) for one, other in pairs], documents),
            gold=clustered_mean(own, documents),
            difference=clustered_difference(
                [one - other for one, other in zip(own, plain_right, strict=True)], documents
            ),
            kl=sum(found.kls) / max(1, len(found.kls)),
            same_token=sum(found.agreed) / max(1, len(found.agreed)),
        )

    plain_right = right(plain_answers)
    return DecodeQuality(
        num_questions=len(questions),
        num_tokens=max(len(found.kls) for found in ways.values()),
        gold=clustered_mean(plain_right, documents),
        ways=tuple(way(*each) for each in ways.items()),
    )


def check_weights(model: Any, plain: Any) -> None:  # noqa: ANN401
    """Refuse a model whose embeddings are not those of the file, rounded to its dtype."""
    import torch

    own, exact = (each.get_input_embeddings().weight for each in (model, plain))
    if own.shape != exact.shape or not torch.equal(own, exact.to(own.dtype)):
        raise SettingsError(
            "the model's weights are not those of the GGUF file: they were rounded otherwise, or"
            " are of another model",
            hint="name the file as the model, too: --model FILE --gguf FILE",
        )


def _answer(
    model: Any,  # noqa: ANN401
    plain: Any,  # noqa: ANN401
    ids: Sequence[int],
    ways: dict[str, Written],
    end_ids: frozenset[int],
    max_new_tokens: int,
) -> list[int]:
    """Write one answer each way; add them to `ways`, and return the plain one."""
    cache = native_cache(model.config)
    for start, end in prefill_chunks(0, 0, len(ids), CHUNK_TOKENS[model.device.type]):
        logits = forward(model, [ids[start:end]], cache)
    first = int(logits[0, -1].argmax())
    wide = native_cache(plain.config)
    held: Any = cache.layers
    for index, layer in enumerate(held):
        wide.update(layer.keys.float(), layer.values.float(), index)

    def written(
        step: Callable[[int], torch.Tensor], keep: Callable[[torch.Tensor], None] = lambda _: None
    ) -> list[int]:
        answer = [first]
        while answer[-1] not in end_ids and len(answer) < max_new_tokens:
            logits = step(answer[-1])
            keep(logits)
            answer.append(int(logits.argmax()))
        return answer

    expected: list[torch.Tensor] = []
    with steps(plain, STORED, wide) as step:
        answer = written(step, lambda logits: expected.append(logs(logits)))
    for weights, told in ways.items():
        is_same = True
        with steps(model, weights, cache) as step:
            for number, right in enumerate(expected):
                logits = step(answer[number])
                told.kls.append(float((right.exp() * (right - logs(logits))).sum()))
                told.agreed.append(int(logits.argmax()) == answer[number + 1])
                is_same = is_same and told.agreed[-1]
        own = answer
        if not is_same:
            with steps(model, weights, cache) as step:
                own = written(step)
        told.answers.append(own)
    return answer


def logs(logits: torch.Tensor) -> torch.Tensor:
    """Return the logarithms of probabilities, float64."""
    return logits.double().log_softmax(-1)


def _text(tokenizer: ChatTokenizer, ids: Sequence[int]) -> str:
    stream = tokenizer.stream()
    return "".join(stream.push(number) for number in ids) + stream.flush()


def describe_quality(quality: DecodeQuality) -> list[str]:
    """Return what each way does to answers, a line a way."""
    return [
        f"{quality.num_questions} answers beside those of the file's weights in plain float32, of"
        f" which {_shares(quality.gold)} contain a gold one",
        *(
            f"{way.way:>12}: {_shares(way.same)} word for word the same; contain a gold one"
            f" {_shares(way.gold)}, difference {_shares(way.difference, sign='+')}; KL"
            f" {way.kl:.1e} nats, likeliest token the same for {way.same_token:.2%} of"
            f" {quality.num_tokens:,}"
            for way in quality.ways
        ),
    ]


def _shares(found: Interval, sign: str = "") -> str:
    """Return a share and its interval in per cent."""
    mean, low, high = (f"{100 * value:{sign}.1f}" for value in (found.mean, found.low, found.high))
    return f"{mean}% [{low}, {high}]"
