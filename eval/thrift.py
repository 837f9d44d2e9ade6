"""What thrift leads to: past questions routed again as they would be under another one.

No model runs: a receipt holds what both routes were thought to be worth, and every gate.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rag.routing.question_class import NEEDS_EVERYTHING, ClassifiedQuestion
from rag.routing.router import decide_route
from rag.routing.utility import at_thrift
from rag.types import AnswerMode, Receipt, Route

# From taking the likelier route whatever it costs to all but always taking the cheaper one.
THRIFTS = (0.0, 0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2)


@dataclass(frozen=True, slots=True)
class ThriftPoint:
    """What one thrift leads to, a question on average.

    `probability` is that of being right, as the router's models reckon; `cost_tokens` are the
    prompt tokens to compute; `full_share` is the share of questions that read everything, 0 to 1.
    """

    thrift: float
    probability: float
    cost_tokens: float
    full_share: float


def weighed(receipts: Sequence[Receipt]) -> list[Receipt]:
    """Return the receipts of questions whose routes can be weighed against each other.

    Left out are quotations and counts, for which no prompt is read, and what needs everything read.
    """
    return [
        receipt
        for receipt in receipts
        if {estimate.route for estimate in receipt.routes} == {Route.FULL, Route.RETRIEVAL}
        and receipt.mode is AnswerMode.WRITTEN
        and receipt.question_class not in NEEDS_EVERYTHING
    ]


def thrift_point(receipts: Sequence[Receipt], thrift: float, retrieval_tokens: int) -> ThriftPoint:
    """Return what a thrift leads to over these receipts: those of `weighed`, one at least.

    The router's own rule decides, so a question that fails a gate of `full`, or whose document is
    no longer than the retrieval budget, is routed as ever.
    """
    taken = []
    for receipt in receipts:
        estimates = at_thrift(receipt.routes, thrift)
        decision = decide_route(
            receipt.gates,
            ClassifiedQuestion(receipt.question_class, receipt.class_reason),
            document_tokens=receipt.read.of_tokens,
            retrieval_tokens=retrieval_tokens,
            routes=estimates,
        )
        taken += [estimate for estimate in estimates if estimate.route is decision.route]
    return ThriftPoint(
        thrift,
        sum(estimate.probability for estimate in taken) / len(taken),
        sum(estimate.cost_tokens for estimate in taken) / len(taken),
        sum(estimate.route is Route.FULL for estimate in taken) / len(taken),
    )


def thrift_curve(receipts: Sequence[Receipt], retrieval_tokens: int) -> tuple[ThriftPoint, ...]:
    """Return what each of THRIFTS leads to over the receipts of `weighed`; nothing over none."""
    return tuple(thrift_point(receipts, thrift, retrieval_tokens) for thrift in THRIFTS if receipts)
