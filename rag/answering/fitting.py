"""As many retrieved passages as a budget, a context and a memory hold."""

from collections.abc import Sequence

from rag.answering.context import Context, retrieved_context
from rag.answering.prompt import build_messages
from rag.lm.engine import Engine, Prompt
from rag.retrieval.retriever import Hit
from rag.routing.gates import Limits, Need, check_gates, describe, failed
from rag.store.documents import DocumentStore
from rag.types import Document, Gate, Route


def fitting_passages(
    question: str,
    hits: Sequence[Hit],
    documents: Sequence[Document],
    limits: Limits,
    *,
    store: DocumentStore,
    engine: Engine,
    token_budget: int,
    max_new_tokens: int,
) -> tuple[Context, Prompt, str]:
    """Return the passages within a budget, the prompt that shows them, and what was lowered.

    Where the model, or its memory, does not hold so many beside the template and an answer, they
    are as many as it holds. Where it holds not even one, they are those of the budget: the gates
    then say why they do not fit. Source: docs/decisions/0031.

    Args:
        question: in words.
        hits: the chunks found, best first.
        documents: those asked about.
        limits: of this model on this machine now.
        store: where the text is read.
        engine: counts tokens, and puts the prompt into its template.
        token_budget: of the passages.
        max_new_tokens: the longest answer.
    """

    def within(tokens: int) -> tuple[Context, Prompt, list[Gate]]:
        passages = retrieved_context(
            hits, documents, store=store, count_tokens=engine.count_tokens, token_budget=tokens
        )
        prompt = engine.encode_chat(build_messages(question, passages.passages))
        need = Need(Route.RETRIEVAL, prompt.num_tokens, max_new_tokens)
        gates = check_gates(need, engine.spec, limits, predicted_prefill_seconds=None)
        return passages, prompt, failed(gates, Route.RETRIEVAL)

    passages, prompt, against = within(token_budget)
    fitting, fitting_prompt, still = passages, prompt, against
    while still and fitting.num_chunks:
        beyond = fitting.num_tokens // 4  # bytes are not tokens: in steps
        first = still[0]
        if first.unit != "bytes" and first.value is not None and first.limit is not None:
            beyond = int(first.value - first.limit)
        fitting, fitting_prompt, still = within(fitting.num_tokens - max(1, beyond))
    if not against or not fitting.num_chunks:
        return passages, prompt, ""
    lowered = (
        f"; the retrieval budget of {token_budget:,} tokens does not fit"
        f" ({describe(against[0])}), so {fitting.num_tokens:,} tokens were retrieved"
    )
    return fitting, fitting_prompt, lowered
