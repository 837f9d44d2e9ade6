"""An answer that no sentence says: an option, a yes, the higher of two. Shown, marked, with why."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Event

import pytest

from conftest import HashEmbedder, make_tiny_engine
from rag.answering.citations import UNVERIFIED, CitedText, resolve_citations
from rag.answering.conclusions import claim, form_of, spelled_out, without_yes_or_no
from rag.answering.context import full_context
from rag.answering.prompt import CANNOT_ANSWER
from rag.answering.service import AnswerReady, RouteChosen
from rag.answering.writing import CONCLUDED
from rag.lm.engine import DocumentPrefix, GenerationDone, GenerationStep, Prompt, TextPiece
from rag.lm.local_engine import LocalEngine
from rag.routing.question_class import split_options
from rag.settings import Settings
from rag.types import Answer, Route
from ui.assembly import Fathom

PEAK, DALE = "The lamp in Peak has the number 8026.", "The lamp in Dale has the number 3429."
FACTS = [
    PEAK,
    "The wall in the yard is made of stone.",
    DALE,
    "The crate of Ann is kept in Dale by Otto.",
    "The fee is 35 crowns a night.",
    "The tower in Rome is taller than the tower in Bern.",
]
WHICH = "Which lamp has the higher number, the one in Peak or the one in Dale?"
OPTIONS = f"{WHICH}\n(A) Dale\n(B) Peak"


class SayingEngine(LocalEngine):
    """The tiny model, read for real; what it would write is replaced."""

    says = ""

    def generate_many(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        stop: Event,
        prefix: DocumentPrefix | None = None,
    ) -> Iterator[tuple[int, GenerationStep]]:
        for number, step in super().generate_many(
            prompts, max_new_tokens=2, stop=stop, prefix=prefix
        ):
            if isinstance(step, GenerationDone):
                yield number, TextPiece(self.says)
            if not isinstance(step, TextPiece):
                yield number, step


@pytest.fixture
def saying() -> SayingEngine:
    tiny = make_tiny_engine()
    return SayingEngine(tiny._model, tiny._tokenizer._tokenizer, name="saying")


@pytest.fixture
def lamps(settings: Settings, tmp_path: Path, saying: SayingEngine) -> Fathom:
    path = tmp_path / "lamps.txt"
    path.write_text("\n\n".join(FACTS))
    fathom = Fathom(settings, embedder=HashEmbedder(), engine=saying)
    fathom.ingest(path)
    return fathom


def _cited(fathom: Fathom, answer: str, question: str) -> CitedText:
    context = full_context(fathom.documents(), store=fathom.store, count_tokens=len)
    return resolve_citations(answer, question, context.passages, fathom.store)


def _asked(fathom: Fathom, question: str) -> tuple[list[Route], Answer]:
    events = list(fathom.service().stream(question))
    routes = [event.decision.route for event in events if isinstance(event, RouteChosen)]
    assert isinstance(events[-1], AnswerReady)
    return routes, events[-1].answer


@pytest.mark.parametrize(
    ("says", "shown"),
    [
        ("(B) Peak", "(B) Peak"),
        ("B", "(B) Peak"),
        ("B. Peak", "(B) Peak"),
        ("The answer is (B).", "(B) Peak"),
        ("A", "(A) Dale"),  # a letter that is a word of English, too
        ("Peak", "Peak"),
        ("The lamp in Peak has the higher number.", "The lamp in Peak has the higher number."),
    ],
)
def test_an_answer_that_names_an_option_is_shown_and_marked_with_what_is_said_of_each_side(
    lamps: Fathom, saying: SayingEngine, says: str, shown: str
) -> None:
    saying.says = says
    routes, answer = _asked(lamps, OPTIONS)
    assert len(routes) == 1  # nothing more is read
    assert not answer.abstained
    assert answer.answer == f"{shown} [1] [2] {UNVERIFIED}"
    assert [c.quote for c in answer.citations] == [PEAK, DALE]
    assert all(c.verified for c in answer.citations)
    assert CONCLUDED in answer.receipt.reason


def test_an_option_of_which_the_documents_say_nothing_is_not_found(
    lamps: Fathom, saying: SayingEngine
) -> None:
    saying.says = "(A) Tundra"
    _, answer = _asked(lamps, f"{WHICH}\n(A) Tundra\n(B) Peak")
    assert answer.abstained
    assert answer.answer.startswith(CANNOT_ANSWER)
    saying.says = "Yes."
    _, answer = _asked(lamps, "Does the whale sing in a choir?")
    assert answer.abstained


def test_an_option_that_a_sentence_says_is_proved_by_it(lamps: Fathom) -> None:
    cited = _cited(lamps, "B", "What is the fee?\n(A) 40 pounds\n(B) 35 crowns")
    assert cited.text == "(B) 35 crowns [1]"
    assert cited.citations[0].quote == "The fee is 35 crowns a night."
    assert (cited.num_unverified, cited.num_concluded) == (0, 0)


def test_an_option_in_the_askers_own_words_is_shown_where_the_documents_speak_of_it(
    lamps: Fathom,
) -> None:
    question = "What is the wall in the yard?\n(A) a sturdy stone barrier of some age\n(B) a hedge"
    cited = _cited(lamps, "A", question)
    assert cited.text == f"(A) a sturdy stone barrier of some age [1] {UNVERIFIED}"
    assert cited.citations[0].quote == "The wall in the yard is made of stone."
    assert _cited(lamps, "B", question).text == f"(B) a hedge {UNVERIFIED}"


def test_a_bare_yes_is_shown_and_marked_with_the_sentences_that_speak_of_the_question(
    lamps: Fathom,
) -> None:
    cited = _cited(lamps, "Yes.", "Is the fee 35 crowns?")
    assert cited.text == f"Yes. [1] {UNVERIFIED}"
    assert cited.citations[0].quote == "The fee is 35 crowns a night."
    for says in ("No, the fee is not 35 crowns.", "No fee of 35 crowns."):
        cited = _cited(lamps, says, "Is the fee 35 crowns?")
        assert cited.text.endswith(UNVERIFIED)  # the sentence says the opposite
    cited = _cited(lamps, "No", "Is the lamp number of Peak lower than that of Dale?")
    assert cited.text == f"No [1] [2] {UNVERIFIED}"
    assert [c.quote for c in cited.citations] == [PEAK, DALE]


def test_a_comparison_is_verified_only_by_a_sentence_that_compares(lamps: Fathom) -> None:
    question = "Which tower is taller, the one in Rome or the one in Bern?"
    cited = _cited(lamps, "The tower in Rome is taller.", question)
    assert cited.text == "The tower in Rome is taller. [1]"
    cited = _cited(lamps, "The lamp in Peak is higher than the lamp in Dale.", WHICH)
    assert cited.text.endswith(f"[1] [2] {UNVERIFIED}")
    cited = _cited(lamps, "The lamp in Peak has the number 8026.", WHICH)
    assert cited.text == "The lamp in Peak has the number 8026. [1]"


def test_a_chain_stands_on_its_sentences_together_or_on_none(lamps: Fathom) -> None:
    question = "What is the number of the lamp in the place where the crate of Ann is kept?"
    said = "Otto: 3429 or 8026."
    cited = _cited(lamps, said, question)
    assert cited.text == f"{said} [1] [2] [3] {UNVERIFIED}"
    cited = _cited(lamps, f"{said[:-1]}, marmalade.", question)
    assert cited.citations == ()
    assert cited.num_unverified == 1


@pytest.mark.parametrize("question", ["What is the fee?", "Who keeps a crate in Dale?"])
def test_a_lookup_is_answered_by_one_sentence_or_not_at_all(lamps: Fathom, question: str) -> None:
    for answer in ("Yes.", "B", "Peak of stone in Rome"):
        cited = _cited(lamps, answer, question)
        assert cited.citations == ()
        assert cited.num_concluded == 0


def test_options_are_taken_from_the_end_of_a_question() -> None:
    assert split_options(OPTIONS) == (WHICH, {"A": "Dale", "B": "Peak"})
    assert split_options(WHICH) == (WHICH, {})
    form = form_of(OPTIONS)
    assert spelled_out("C", form) == "C"  # no option of the question
    assert spelled_out("A lamp is in Peak.", form) == "A lamp is in Peak."
    assert claim("(B) Peak", form) == "Peak"
    assert without_yes_or_no("Yes, it is.", form_of("Is it?")) == "it is."
    assert without_yes_or_no("No lamp is there.", form_of(WHICH)) == "No lamp is there."
    assert not form_of("Can you tell me the fee?").may_conclude


def test_a_summary_is_shown_and_marked_with_sentences_that_it_tells_in_other_words(
    lamps: Fathom, saying: SayingEngine
) -> None:
    """Its question names nothing that stands in the text; none of its sentences stands there."""
    saying.says = (
        "Lamps with their numbers in Peak and Dale, and a fee of 35 crowns, are described."
    )
    routes, answer = _asked(lamps, "Summarise the whole document.")
    assert len(routes) == 1
    assert not answer.abstained
    assert UNVERIFIED in answer.answer
    assert answer.answer.startswith(saying.says[:-1])
    assert "The fee is 35 crowns a night." in [c.quote for c in answer.citations]
    assert CONCLUDED in answer.receipt.reason


def test_a_summary_of_something_else_is_not_shown(lamps: Fathom, saying: SayingEngine) -> None:
    saying.says = "Whales migrate through arctic oceans, singing to their young."
    _, answer = _asked(lamps, "Summarise the whole document.")
    assert answer.abstained
    assert answer.answer.startswith(CANNOT_ANSWER)


def test_a_statement_of_a_summary_that_a_sentence_says_is_proved_by_it(lamps: Fathom) -> None:
    cited = _cited(lamps, "The wall in the yard is made of stone.", "Summarise the document.")
    assert (cited.text, cited.num_unverified) == ("The wall in the yard is made of stone. [1]", 0)
