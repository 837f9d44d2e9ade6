"""What decoding in 4 bits does to answers: the same questions, with and without, on one prefill."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from eval.evidence_sets import EvidenceSet
from eval.metrics import contains_answer
from eval.statistics import Interval, clustered_difference, clustered_mean
from rag.lm.chat_tokenizer import ChatTokenizer
from rag.lm.engine import Message
from rag.lm.forward import forward, prefill_chunks
from rag.lm.four_bit import without_four_bit
from rag.lm.native_cache import branch, native_cache
from rag.lm.spec import CHUNK_TOKENS

# Around the evidence, as a passage of a retrieval would be.
_CONTEXT_CHARS = 600


@dataclass(frozen=True, slots=True)
class DecodeQuality:
    """Greedy answers of the plain path and of the fast one.

    `same` is the share of equal texts; `plain` and `fast` of answers that contain a gold one;
    `difference` fast less plain, paired; `kl` the mean over the tokens of the plain answers of the
    divergence of the next token's distribution, in nats, and `same_token` the share of them where
    both have the same likeliest.
    """

    num_questions: int
    num_tokens: int
    same: Interval
    plain: Interval
    fast: Interval
    difference: Interval
    kl: float
    same_token: float

    def to_json(self) -> dict[str, Any]:
        """Return its figures."""
        return asdict(self)


def decode_quality(
    model: Any,  # noqa: ANN401 - a causal model of transformers
    tokenizer: ChatTokenizer,
    evidence: EvidenceSet,
    *,
    num_questions: int = 200,
    max_new_tokens: int = 32,
    on_progress: Callable[[int], None] = lambda _: None,
) -> DecodeQuality:
    """Answer questions about the passage that holds their evidence, both ways.

    Args:
        model: decodes in 4 bits, see `use_four_bit`.
        tokenizer: its tokenizer.
        evidence: the questions.
        num_questions: spread evenly over the set.
        max_new_tokens: of each answer.
        on_progress: called with the number of questions done.
    """
    texts = {document.id: document.text for document in evidence.documents}
    step = max(1, len(evidence.questions) // num_questions)
    questions = evidence.questions[::step][:num_questions]
    end_ids = tokenizer.end_ids(model)
    plain, fast, kls, agreed = [], [], [], []
    for number, question in enumerate(questions):
        start, end = question.spans[0]
        begin = max(0, start - _CONTEXT_CHARS)
        passage = texts[question.document][begin : end + _CONTEXT_CHARS]
        ids = tokenizer.encode_chat(
            [Message("user", f"{passage}\n\nQuestion: {question.question}\nAnswer briefly.")]
        )
        found = _both(model, ids, end_ids, max_new_tokens)
        plain.append(found[0])
        fast.append(found[1])
        kls += found[2]
        agreed += found[3]
        on_progress(number + 1)
    documents = [question.document for question in questions]
    golds = [question.answers for question in questions]
    right = [
        [
            float(contains_answer(_text(tokenizer, ids), gold))
            for ids, gold in zip(way, golds, strict=True)
        ]
        for way in (plain, fast)
    ]
    return DecodeQuality(
        num_questions=len(questions),
        num_tokens=len(kls),
        same=clustered_mean([float(a == b) for a, b in zip(plain, fast, strict=True)], documents),
        plain=clustered_mean(right[0], documents),
        fast=clustered_mean(right[1], documents),
        difference=clustered_difference([b - a for a, b in zip(*right, strict=True)], documents),
        kl=sum(kls) / len(kls),
        same_token=sum(agreed) / len(agreed),
    )


def _both(
    model: Any,  # noqa: ANN401
    ids: Sequence[int],
    end_ids: frozenset[int],
    max_new_tokens: int,
) -> tuple[list[int], list[int], list[float], list[bool]]:
    """Return both answers, and for each token of the plain one KL and whether both agree."""
    cache = native_cache(model.config)
    for start, end in prefill_chunks(0, 0, len(ids), CHUNK_TOKENS[model.device.type]):
        logits = forward(model, [ids[start:end]], cache)
    first = int(logits[0, -1].argmax())
    own, other = cache, branch(cache, 1)
    plain, fast = [first], [first]
    kls: list[float] = []
    agreed: list[bool] = []
    is_same = True
    while plain[-1] not in end_ids and len(plain) < max_new_tokens:
        with without_four_bit(model):
            expected = forward(model, [plain[-1:]], own)[0, -1].float().log_softmax(-1)
        found = forward(model, [plain[-1:]], other)[0, -1].float().log_softmax(-1)
        kls.append(float((expected.exp() * (expected - found)).sum()))
        plain.append(int(expected.argmax()))
        choice = int(found.argmax())
        agreed.append(choice == plain[-1])
        if is_same:
            fast.append(choice)
            if not agreed[-1]:
                is_same = False
                _write_on(model, fast, branch(other, 1), end_ids, max_new_tokens)
    return plain, fast, kls, agreed


def _write_on(
    model: Any,  # noqa: ANN401
    written: list[int],
    cache: Any,  # noqa: ANN401
    end_ids: frozenset[int],
    max_new_tokens: int,
) -> None:
    """Decode on from where an answer went its own way."""
    while written[-1] not in end_ids and len(written) < max_new_tokens:
        written.append(int(forward(model, [written[-1:]], cache)[0, -1].argmax()))


def _text(tokenizer: ChatTokenizer, ids: Sequence[int]) -> str:
    stream = tokenizer.stream()
    return "".join(stream.push(number) for number in ids) + stream.flush()
