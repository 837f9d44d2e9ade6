"""Which route one question takes, and why."""

from rag.errors import ModelError
from rag.routing.gates import describe, failed
from rag.routing.question_class import NEEDS_EVERYTHING
from rag.types import Gate, QuestionClass, Route, RouteDecision


def decide_route(
    gates: tuple[Gate, ...],
    question_class: QuestionClass,
    *,
    document_tokens: int,
    retrieval_tokens: int,
    asked_for: Route | None = None,
) -> RouteDecision:
    """Return the route, with the reason in one sentence.

    The whole document is read where every gate of `full` passes, retrieval takes the rest. A
    prefill that is merely slow does not stop a person who asked for `full`.

    Args:
        gates: those of both routes.
        question_class: what the question asks for.
        document_tokens: length of the documents asked about.
        retrieval_tokens: budget of the retrieval route.
        asked_for: a route that the person chose.

    Raises:
        ModelError: if not even the retrieval prompt fits the model.
    """
    too_small = failed(gates, Route.RETRIEVAL)
    if too_small:
        raise ModelError(
            f"even the retrieved passages do not fit: {describe(too_small[0])}",
            hint="lower FATHOM_RETRIEVAL_TOKENS or FATHOM_MAX_NEW_TOKENS, or free memory",
        )
    against = failed(gates, Route.FULL)
    hard = [gate for gate in against if gate.gate != "prefill_seconds"]
    if asked_for is Route.RETRIEVAL:
        route, reason = Route.RETRIEVAL, "retrieval was asked for"
    elif asked_for is Route.FULL and not hard:
        route, reason = Route.FULL, "reading everything was asked for, and it fits"
        if against:
            reason += f", though it is slow: {describe(against[0])}"
    elif against:
        route = Route.RETRIEVAL
        begin = "reading everything was asked for but" if asked_for else "reading everything"
        reason = f"{begin} fails a gate: {'; '.join(map(describe, hard or against))}"
    elif document_tokens <= retrieval_tokens:
        route = Route.FULL
        reason = f"all {document_tokens:,} tokens fit the retrieval budget of {retrieval_tokens:,}"
    else:
        route, reason = Route.FULL, "the whole document passes every gate"
    if route is Route.RETRIEVAL and question_class in NEEDS_EVERYTHING:
        reason += (
            f"; the question is of the class {question_class}, which needs everything read, so"
            " parts of the answer may be missing"
        )
    return RouteDecision(route, reason, question_class, gates)
