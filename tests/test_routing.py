"""Gates, question classes and the route: numbers worked by hand."""

from functools import partial

import pytest

from rag.errors import ModelError
from rag.lm.local_engine import LocalEngine
from rag.lm.peak_bytes import peak_bytes
from rag.routing.gates import Limits, Need, check_gates, describe, failed
from rag.routing.question_class import ClassifiedQuestion, classify_question
from rag.routing.router import decide_route
from rag.types import Gate, QuestionClass, Route

# tiny-llama: 2 layers x 2 kv heads x (8 + 8) elements x 4 bytes
TINY_BYTES_PER_TOKEN = 2 * 2 * 16 * 4


def _gates(engine: LocalEngine, tokens: int, **limits: float) -> tuple[Gate, ...]:
    beside_peak = int(limits.get("beside_peak", 10**9))
    return check_gates(
        Need(Route.FULL, tokens, 100),
        engine.spec,
        Limits(
            context_tokens=int(limits.get("context_tokens", 4096)),
            memory_bytes=beside_peak + peak_bytes(engine.spec, tokens + 100),
            prefill_seconds=limits.get("prefill_seconds", 60.0),
        ),
        predicted_prefill_seconds=tokens / 100,
    )


@pytest.mark.parametrize(
    ("tokens", "limits", "expected"),
    [
        (3996, {}, []),
        (3997, {}, ["tokens", "positions"]),
        (1000, {"beside_peak": 1100 * TINY_BYTES_PER_TOKEN}, []),
        (1000, {"beside_peak": 1100 * TINY_BYTES_PER_TOKEN - 1}, ["kv_bytes"]),
        (1000, {"prefill_seconds": 9.9}, ["prefill_seconds"]),
        (1000, {"context_tokens": 1099}, ["tokens"]),
    ],
)
def test_gates_by_hand(
    tiny_engine: LocalEngine, tokens: int, limits: dict[str, float], expected: list[str]
) -> None:
    gates = _gates(tiny_engine, tokens, **limits)
    gates = tuple(g for g in gates if g.gate != "prefill_seconds" or "prefill_seconds" in limits)
    assert [gate.gate for gate in failed(gates, Route.FULL)] == expected


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("Which section must a package use?", QuestionClass.LOOKUP),
        ("How many records are in this file?", QuestionClass.AGGREGATE),
        ("List all fees.", QuestionClass.AGGREGATE),
        ("Summarise the contract.", QuestionClass.SUMMARY),
        ("What is this document about?", QuestionClass.SUMMARY),
        ("How does plan A differ from plan B?", QuestionClass.COMPARISON),
        ("Who founded the company whose ship sank?", QuestionClass.MULTI_HOP),
        ("Welche Gebühr gilt?", QuestionClass.LOOKUP),
    ],
)
def test_question_classes(question: str, expected: QuestionClass) -> None:
    assert classify_question(question).question_class is expected


def _gate(name: str, route: Route, *, passed: bool) -> Gate:
    return Gate(name, 10_000, 8192, "tokens", passed, route)


LOOKUP = ClassifiedQuestion(QuestionClass.LOOKUP, "a test")
SUMMARY = ClassifiedQuestion(QuestionClass.SUMMARY, "a test")
FITS = (_gate("tokens", Route.FULL, passed=True), _gate("tokens", Route.RETRIEVAL, passed=True))
TOO_LONG = (_gate("tokens", Route.FULL, passed=False), FITS[1])
SLOW = (Gate("prefill_seconds", 99, 60, "seconds", False, Route.FULL), *FITS)


@pytest.mark.parametrize(
    ("gates", "asked", "route", "words"),
    [
        (FITS, None, Route.FULL, "passes every gate"),
        (FITS, Route.RETRIEVAL, Route.RETRIEVAL, "asked for"),
        (FITS, Route.FULL, Route.FULL, "it fits"),
        (TOO_LONG, None, Route.RETRIEVAL, "tokens 10,000 of 8,192"),
        (TOO_LONG, Route.FULL, Route.RETRIEVAL, "asked for but fails a gate: tokens 10,000"),
        (SLOW, None, Route.RETRIEVAL, "prefill_seconds 99 of 60"),
        (SLOW, Route.FULL, Route.FULL, "though it is slow"),
    ],
)
def test_routes(gates: tuple[Gate, ...], asked: Route | None, route: Route, words: str) -> None:
    decision = decide_route(
        gates,
        LOOKUP,
        document_tokens=9000,
        retrieval_tokens=1024,
        asked_for=asked,
    )
    assert decision.route is route
    assert words in decision.reason


def test_a_summary_by_retrieval_is_warned_about() -> None:
    decision = decide_route(TOO_LONG, SUMMARY, document_tokens=9000, retrieval_tokens=1024)
    assert "may be missing" in decision.reason


def test_a_summary_that_does_not_fit_is_scanned_where_a_window_fits() -> None:
    fits, too_wide = (_gate("kv_bytes", Route.SCAN, passed=passed) for passed in (True, False))
    decide = partial(decide_route, document_tokens=9000, retrieval_tokens=1024)
    scanned = decide((*TOO_LONG, fits), SUMMARY)
    assert scanned.route is Route.SCAN
    assert "needs everything, so it is read in windows" in scanned.reason
    assert decide((*TOO_LONG, fits), LOOKUP).route is Route.RETRIEVAL
    refused = decide((*TOO_LONG, too_wide), SUMMARY, asked_for=Route.SCAN)
    assert refused.route is Route.RETRIEVAL
    assert "a scan was asked for but fails a gate: kv_bytes" in refused.reason
    assert decide((*FITS, fits), SUMMARY).route is Route.FULL


def test_a_prompt_that_fits_nowhere_is_an_error() -> None:
    gates = (_gate("kv_bytes", Route.RETRIEVAL, passed=False),)
    with pytest.raises(ModelError, match="even the retrieved passages"):
        decide_route(gates, LOOKUP, document_tokens=1, retrieval_tokens=1)


def test_gates_in_words() -> None:
    gate = Gate("kv_bytes", 3 * 2**20, 2**30, "bytes", True, Route.FULL)
    assert describe(gate) == "kv_bytes 3 MiB of 1,024 MiB"
