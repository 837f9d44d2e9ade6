"""Which route one question takes, and why."""

from rag.errors import ModelError
from rag.routing.gates import SOFT_GATES, describe, failed, hard
from rag.routing.question_class import NEEDS_EVERYTHING, ClassifiedQuestion
from rag.types import AnswerMode, Gate, QuestionClass, Route, RouteDecision, RouteEstimate


def counted_decision(reason: str) -> RouteDecision:
    """Return the decision for a count that the text itself proves: exact, and no token is read.

    Args:
        reason: what was counted, in short: `102 records`.
    """
    return RouteDecision(
        Route.SCAN,
        f"counted from the text itself: {reason}",
        QuestionClass.AGGREGATE,
        (),
        "it asks for a count, and one structure of the text is what it speaks of",
        AnswerMode.COUNTED,
    )


def decide_route(
    gates: tuple[Gate, ...],
    classified: ClassifiedQuestion,
    *,
    document_tokens: int,
    retrieval_tokens: int,
    routes: tuple[RouteEstimate, ...] = (),
    asked_for: Route | None = None,
) -> RouteDecision:
    """Return the route, with the reason in one sentence.

    Where every gate of `full` passes, a short document and a question that needs everything are
    read whole; any other question takes the route that is worth more. Where a gate fails, a
    question that needs everything is scanned, if the gates of `scan` are among those given and
    pass; retrieval takes the rest. A prefill that is merely slow, or a length that the model was
    not measured to use well, does not stop a person who asked for `full`; nor does the latter stop
    a document that is no longer than what retrieval would show.

    Args:
        gates: those of all routes.
        classified: what the question asks for, and why that is thought.
        document_tokens: length of the documents asked about.
        retrieval_tokens: budget of the retrieval route.
        routes: what full and retrieval are worth, best first; without, all is read that may be.
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
    question_class = classified.question_class
    against = failed(gates, Route.FULL)
    insurmountable = hard(against)
    if document_tokens <= retrieval_tokens:
        against = [gate for gate in against if gate.gate != "effective_length"]
    can_scan = any(gate.route == Route.SCAN for gate in gates) and not failed(gates, Route.SCAN)
    if asked_for is Route.RETRIEVAL:
        route, reason = Route.RETRIEVAL, "retrieval was asked for"
    elif asked_for is Route.SCAN and can_scan:
        route, reason = Route.SCAN, "a scan was asked for"
    elif asked_for is Route.FULL and not insurmountable:
        route, reason = Route.FULL, "reading everything was asked for, and it fits"
        if against:
            reason += (
                f", though {'; '.join(f'{SOFT_GATES[g.gate]}: {describe(g)}' for g in against)}"
            )
    elif against:
        route = Route.SCAN if can_scan and question_class in NEEDS_EVERYTHING else Route.RETRIEVAL
        begin = "reading everything" + (" at once" if route is Route.SCAN else "")
        if asked_for is Route.FULL:
            begin = "reading everything was asked for but"
        reason = f"{begin} fails a gate: {'; '.join(map(describe, insurmountable or against))}"
        if route is Route.SCAN:
            reason += f"; the class {question_class} needs everything, so it is read in windows"
    elif document_tokens <= retrieval_tokens:
        route = Route.FULL
        reason = f"all {document_tokens:,} tokens fit the retrieval budget of {retrieval_tokens:,}"
    elif question_class in NEEDS_EVERYTHING:
        route = Route.FULL
        reason = f"the class {question_class} needs everything, which passes every gate"
    elif routes:
        best, other = routes[0], routes[-1]
        route = best.route
        reason = (
            f"{best.route} is worth more: likely right {best.probability:.0%} for"
            f" {best.cost_tokens:,} tokens, {other.route} {other.probability:.0%} for"
            f" {other.cost_tokens:,}"
        )
    else:
        route, reason = Route.FULL, "the whole document passes every gate"
    if asked_for is Route.SCAN and route is not Route.SCAN:
        gates_failed = "; ".join(map(describe, failed(gates, Route.SCAN)))
        reason = f"a scan was asked for but fails a gate: {gates_failed}; {reason}"
    if route is Route.RETRIEVAL and question_class in NEEDS_EVERYTHING:
        reason += (
            f"; the question is of the class {question_class}, which needs everything read, so"
            " parts of the answer may be missing"
        )
    return RouteDecision(
        route, reason, question_class, gates, classified.reason, AnswerMode.WRITTEN, routes
    )
