"""Sentences: they end where a reader would end them, and nothing of a text is lost between them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag.answering.citations import UNVERIFIED, split_sentences
from rag.sentences import (
    LONGEST_SENTENCE_CHARS,
    cell_spans,
    line_sentence_spans,
    row_spans,
    sentence_spans,
)


def cut(text: str) -> list[str]:
    return [text[start:end] for start, end in sentence_spans(text)]


def test_sentences_end_where_a_reader_would_end_them() -> None:
    text = (
        "Dr. Smith met J. R. Jones in the U.S. Navy. It cost 3.5 million, e.g. for ships!\n"
        'He said "Go." Then\nhe left.\n\n# A heading\n\n- one\n- two\n'
    )
    assert cut(text) == [
        "Dr. Smith met J. R. Jones in the U.S. Navy.",
        "It cost 3.5 million, e.g. for ships!",
        'He said "Go."',
        "Then\nhe left.",
        "# A heading",
        "- one",
        "- two",
    ]
    assert sentence_spans("港の使用料は一泊三十五クローネです。子供は無料。") == [(0, 18), (18, 24)]
    assert sentence_spans(" \n ") == []


@pytest.mark.parametrize(
    "sentence",
    [
        # titles and initials
        "“I shall be Mr. Four Millions, an American citizen.",
        "'You are not going to run away so soon, Mr. Ainsworth?' she screamed out.",
        "She was talking to Mrs. Brooks, Ms. Lee and Prof. Moody of St. Hyacinth's Church.",
        "J.K. Rowling waited to read Harry Potter to her daughter.",
        "It was told by J. K. Rowling, É. Zola and J.-P. Sartre.",
        "There’s that poor M. Lupin that they made out to be a convict.",
        "MR. DARCY bowed.",
        # what is no whole word
        "The inoculated chicken eggs using a RNeasy mini kit (Qiagen Inc. Valencia, CA) died.",
        "It is consistent with the work of Saksena et al. [9] on communes.",
        "Kernel methods, cf. The Elements of Statistical Learning, are older.",
        "The Lakers vs. The Jazz was, i.e. The match of the year.",
        "Warner Bros. Entertainment Inc. and Acme Co. Ltd. of Rome are in it.",
        "In Roe v. Wade the U.S. Supreme Court decided.",
        "Martin Luther King Jr. Day is a holiday.",
        # numbers
        "In March 2022, the FASB issued ASU No. 2022-02, Financial Instruments.",
        "The strain (accession no. KU886219) is shown in Fig. 2 and Fig. S1.",
        "See Harris 1985, p. 39 and pp. 40 to 42 of Vol. II, Sec. 4.2 of Art. V.",
        "The par value is $0.001 and the rate 3.5 percent.",
        "It was signed on Sept. 11 of that year.",
        # the numbers of items
        "Sec. 4. The buyer pays.",
        "Section 12.1. Intellectual Property.",
        "5. CONSIDERATION; NO LIABILITY.",
        "- 2. Term.",
    ],
)
def test_a_stop_within_a_sentence_does_not_end_it(sentence: str) -> None:
    assert cut(sentence) == [sentence]
    assert cut(f"It was so. {sentence} The rest is known.") == [
        "It was so.",
        sentence,
        "The rest is known.",
    ]


@pytest.mark.parametrize(
    "sentences",
    [
        "“A banknote?|No.”|He peered into the envelope.",
        "Well, no.|Though Clinton slavishly emulates JFK.",
        "He moved to the U.S.|He was nine.",
        "It is sold by Acme Inc.|The price is high.",
        "It came at 5 p.m.|A crowd was waiting.",
        "These are sleep deprivation, shift work, etc.|Light is another.",
        "Both lack vitamin C.|It is in fruit.",
        "This is part of this Annual Report on Form 10-K.|Registrants file it.",
        "The score is at intervals of 0.5.|We consider a review.",
        "It was built in 1990.|5 people came.",
        "That was ten years before George V.|It was cold.",
        "The rest is shown in Fig. 2.|More is told on p. 5.|It holds.",
        "It took 5 ms.|Later runs took less.",
        "They all left...|Nobody came back.",
        "What is it?|a lamp, he says.",
    ],
)
def test_the_same_signs_end_one_where_another_begins(sentences: str) -> None:
    assert cut(sentences.replace("|", " ")) == sentences.split("|")


def test_a_quoted_question_goes_on_with_who_asks() -> None:
    assert cut("“Are you serious?” cried Diana. “Quite!” He was.") == [
        "“Are you serious?” cried Diana.",
        "“Quite!”",
        "He was.",
    ]


def test_rows_and_items_stand_alone_and_wrapped_lines_do_not() -> None:
    text = (
        "Fees\nAdults: 35 crowns\nChildren pay\nnothing at all. Mr. Bell\ncollects:\n"
        "1. a\n2. b\na. Mr. C"
    )
    assert [text[start:end] for start, end in line_sentence_spans(text)] == [
        "Fees",
        "Adults: 35 crowns",
        "Children pay\nnothing at all.",
        "Mr. Bell\ncollects:",
        "1. a",
        "2. b",
        "a. Mr. C",
    ]


@pytest.mark.parametrize(
    "rows",
    [
        "id,name,fee\n1,Boat 1,3\n2,Boat 2,6\n77,Boat 77,231",
        'id;name;said\n1;Ann;"a;b, c"\n2;Bo;It was. It is.\n3;Cy;',
        "when,crowns\n2024-01-05,123\n2024-01-06,1.5\n2024-01-07,40",
        "name\tfee\nAnna\t1,200",
        "Fee | Berth | Note\nAnna | 35",
        "| Fee | Berth |\n| --- | --- |\n| 35 | 7 |",
        '{"id": 1, "fee": 3}\n{"id": 2, "fee": 6}',
    ],
)
def test_a_row_is_a_sentence(rows: str) -> None:
    """However it is parted, and whatever stands above and below."""
    text = f"The fees of\nthe harbour\n{rows}\n\nThe rest is\nfree."
    expected = rows.split("\n")
    found = cut(text)
    assert found[1:-1] == expected or found[:-1] == ["The fees of\nthe harbour", *expected]
    assert found[-1] == "The rest is\nfree."
    by_lines = [text[start:end] for start, end in line_sentence_spans(text)]
    assert by_lines[-1 - len(expected) : -1] == expected


@pytest.mark.parametrize(
    "prose",
    [
        "It was red, green, and\nblue, white, and black,\ngrey, pale, and dim.",
        "Sales of 1,200 boats\nand of 3,400 oars\nand 5,600 sails fell.",
        "The strains [1,2] were\ngrown as told [3,4] by us.",
        "He said ‘I did,’ and\nthen ‘I do,’ and then\n‘I will,’ and went.",
    ],
)
def test_wrapped_prose_with_commas_is_no_table(prose: str) -> None:
    assert row_spans(prose) == []
    assert cut(prose) == [prose]


def test_a_row_too_long_for_a_sentence_is_cut_where_sentences_end() -> None:
    said = "It was cold. " * 60
    assert cut(f"a\tb\nAnna\t{said}")[:3] == ["a\tb", "Anna\tIt was cold.", "It was cold."]


@pytest.mark.parametrize(
    ("row", "cells"),
    [
        ("77,Boat 77,231", ["77", "Boat 77", "231"]),
        ('7;"a;b, c";', ["7", '"a;b, c"', ""]),
        ("Anna\t1,200", ["Anna", "1,200"]),
        ("Anna | 35, 40", ["Anna", "35, 40"]),
    ],
)
def test_cells_stand_between_what_parts_them(row: str, cells: list[str]) -> None:
    assert [row[start:end].strip() for start, end in cell_spans(row)] == cells


def test_statements_keep_their_markers_numbers_and_names() -> None:
    text = (
        f"It costs 3.50 today. [2] Mr. Bennet [1] said so. {UNVERIFIED} See python.org! [3] [4]\nOk"
    )
    assert split_sentences(text) == [
        "It costs 3.50 today. [2]",
        f"Mr. Bennet [1] said so. {UNVERIFIED}",
        "See python.org! [3] [4]",
        "Ok",
    ]


any_text = st.text(alphabet=st.sampled_from("ab .,。!?\n(\"'1-#\t|;"), max_size=300) | st.text(
    max_size=2000
)
words = st.lists(
    st.sampled_from(
        ["Mr.", "No.", "5.", "a", "The", "U.S.", "J.", "?”", "\n", "\n\n", "-", "1,a,b\n"]
    )
).map(" ".join)


@given(any_text | words)
def test_sentences_lose_nothing_but_white_space(text: str) -> None:
    for spans in (sentence_spans(text), line_sentence_spans(text)):
        places = {at for start, end in spans for at in range(start, end)}
        assert len(places) == sum(end - start for start, end in spans)
        assert all(sign.isspace() for at, sign in enumerate(text) if at not in places)
        assert all(0 < end - start <= LONGEST_SENTENCE_CHARS for start, end in spans)
        assert spans == sorted(spans)
    for start, end in row_spans(text):
        cells = cell_spans(text[start:end])
        assert cells[0][0] == 0
        assert cells[-1][1] == end - start
        assert cells == sorted(cells)


def test_a_table_without_any_stop_is_cut_all_the_same() -> None:
    """A million characters, so that nothing may go as deep as there are pieces."""
    text = "7,crowns\n" * 120_000
    spans = sentence_spans(text)
    assert spans[-1][1] == len(text.rstrip())
    assert all(end - start <= LONGEST_SENTENCE_CHARS for start, end in spans)
