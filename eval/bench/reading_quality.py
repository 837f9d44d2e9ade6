"""What reading does to answers: prompts read in the model's own format, beside plain float32.

The measure is transformers' own code in float32 with the weights that the GGUF file stands for,
from a prompt's first token to an answer's last. Each way of reading leaves a cache, and all answers
are written from it by that same code: what differs is the reading alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from eval.bench.decode_quality import (
    DecodeQuality,
    Written,
    check_weights,
    chosen_questions,
    judged,
    logs,
    prompt_ids,
)
from eval.bench.decode_ways import STORED, steps
from eval.evidence_sets import EvidenceSet
from rag.lm.chat_tokenizer import ChatTokenizer
from rag.lm.forward import forward, prefill_chunks
from rag.lm.native_cache import native_cache
from rag.lm.spec import CHUNK_TOKENS

if TYPE_CHECKING:
    import torch

# Around the evidence on each side: together about what a retrieval shows.
_CONTEXT_CHARS = 1_800
# How attention is called here, and by transformers alone.
OURS, PLAIN = "fathom", "transformers"


def reading_quality(
    model: Any,  # noqa: ANN401 - a causal model of transformers
    plain: Any,  # noqa: ANN401
    tokenizer: ChatTokenizer,
    evidence: EvidenceSet,
    *,
    num_questions: int = 200,
    max_new_tokens: int = 32,
    on_progress: Callable[[int], None] = lambda _: None,
) -> DecodeQuality:
    """Answer questions about some thousand characters around their evidence, read each way.

    Args:
        model: as the engine runs it; it is read with its own attention, then with transformers'.
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
    ways = {OURS: Written(), PLAIN: Written()}
    own_attention = model.config._attn_implementation
    attentions = {OURS: own_attention, PLAIN: "sdpa"}
    for number, question in enumerate(questions):
        ids = prompt_ids(question, evidence, tokenizer, _CONTEXT_CHARS)
        expected: list[torch.Tensor] = []
        answer = _written(plain, *_read(plain, ids), end_ids, max_new_tokens, expected.append)
        plain_answers.append(answer)
        for way, told in ways.items():
            model.set_attn_implementation(attentions[way])
            try:
                first, cache = _read(model, ids)
            finally:
                model.set_attn_implementation(own_attention)
            _compare(plain, first, _in_float32(plain, cache), answer, expected, told)
            same = all(told.agreed[-len(expected) :])
            own = answer
            if not same:
                wide = _in_float32(plain, cache)
                own = _written(plain, first, wide, end_ids, max_new_tokens, lambda _: None)
            told.answers.append(own)
        on_progress(number + 1)
    return judged(ways, plain_answers, questions, tokenizer)


def _read(model: Any, ids: Sequence[int]) -> tuple[torch.Tensor, Any]:  # noqa: ANN401
    """Return the logits after a prompt that was read as the engine reads it, and its cache."""
    cache = native_cache(model.config)
    for start, end in prefill_chunks(0, 0, len(ids), CHUNK_TOKENS[model.device.type]):
        logits = forward(model, [ids[start:end]], cache)
    return logits[0, -1].float(), cache


def _in_float32(plain: Any, cache: Any) -> Any:  # noqa: ANN401
    wide = native_cache(plain.config)
    for index, layer in enumerate(cache.layers):
        wide.update(layer.keys.float(), layer.values.float(), index)
    return wide


def _written(
    plain: Any,  # noqa: ANN401
    first: torch.Tensor,
    cache: Any,  # noqa: ANN401
    end_ids: frozenset[int],
    max_new_tokens: int,
    keep: Callable[[torch.Tensor], None],
) -> list[int]:
    """Write on from what was read; `keep` gets what was said of each token's successor."""
    keep(logs(first))
    answer = [int(first.argmax())]
    with steps(plain, STORED, cache) as step:
        while answer[-1] not in end_ids and len(answer) < max_new_tokens:
            logits = step(answer[-1])
            keep(logs(logits))
            answer.append(int(logits.argmax()))
    return answer


def _compare(
    plain: Any,  # noqa: ANN401
    first: torch.Tensor,
    cache: Any,  # noqa: ANN401
    answer: Sequence[int],
    expected: Sequence[torch.Tensor],
    told: Written,
) -> None:
    """Note of each token of the plain answer how far off what was said of it is."""
    with steps(plain, STORED, cache) as step:
        for number, right in enumerate(expected):
            logits = step(answer[number - 1]) if number else first
            told.kls.append(float((right.exp() * (right - logs(logits))).sum()))
            told.agreed.append(int(logits.argmax()) == answer[number])
