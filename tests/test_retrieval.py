"""Two searches become one ranking, within the documents asked about."""

import math
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hash_embedder import HashEmbedder
from ingest.chunking import embedded_text
from rag.answering.context import nearest_passages
from rag.errors import ModelError
from rag.retrieval.lexical_score import (
    HEADING_WEIGHT,
    K1,
    NEIGHBOUR_WEIGHT,
    TITLE_WEIGHT,
    B,
    Candidate,
    lexical_scores,
    question_words,
    stems,
    words_in,
)
from rag.retrieval.reranker import CrossEncoderReranker
from rag.retrieval.retriever import NEIGHBOUR_COSINE, SAME_WORDS, Hit, _without_repeats
from rag.retrieval.vector_index import VectorIndex
from rag.store.documents import StoredChunk
from rag.types import Chunk
from tiny_bert import save_bert
from ui.assembly import Fathom

EMBEDDER = HashEmbedder()


def _candidate(text: str, title: str = "") -> Candidate:
    return Candidate(words_in(text), heading="", title=title)


def _retrieve(fathom: Fathom, question: str) -> list[Hit]:
    retriever = fathom.service()._retriever
    return retriever.retrieve(question, fathom.documents(), num_candidates=10)


def _agrees(index: VectorIndex, fathom: Fathom) -> bool:
    documents = [d.id for d in fathom.store.all(include_superseded=True)]
    return index.ids() == set(fathom.store.chunk_ids(documents))


def _add(fathom: Fathom, folder: Path, name: str, text: str) -> int:
    path = folder / name
    path.write_text(text)
    return fathom.ingest(path).document.id


def test_lexical_scores_by_hand() -> None:
    # Three chunks of two words; "berth" is in one of them, "fee" in two, both once where they are.
    candidates = [_candidate("berth fee"), _candidate("a fee"), _candidate("the quay")]
    scores = lexical_scores(
        ["berth", "fee"], candidates, frequencies={"berth": 1, "fee": 2}, num_chunks=3
    )
    idf_berth, idf_fee = math.log(1 + 2.5 / 1.5), math.log(1 + 1.5 / 2.5)
    once = 1 / (1 + K1)
    assert scores[0] == pytest.approx(once)
    assert scores[1] == pytest.approx(once * idf_fee**2 / (idf_berth**2 + idf_fee**2))
    assert scores[2] == 0.0


def test_words_of_the_chunks_beside_count_less() -> None:
    # The row of a table holds the amount, the chunk before it says of which years.
    candidates = [
        Candidate(words_in("march 2024"), heading="", title="", beside=(1,)),
        Candidate(words_in("interest paid"), heading="", title="", beside=(0, 2)),
        Candidate(words_in("the quay"), heading="", title="", beside=(1,)),
    ]
    scores = lexical_scores(
        ["interest", "march"], candidates, frequencies={"interest": 1, "march": 1}, num_chunks=3
    )
    lengths = [2 + NEIGHBOUR_WEIGHT * 2, 2 + NEIGHBOUR_WEIGHT * 4, 2 + NEIGHBOUR_WEIGHT * 2]
    dampening = [K1 * (1 - B + B * length * 3 / sum(lengths)) for length in lengths]
    own = [1 / (1 + d) for d in dampening]
    near = [NEIGHBOUR_WEIGHT / (NEIGHBOUR_WEIGHT + d) for d in dampening]
    assert scores == pytest.approx([(own[0] + near[0]) / 2, (own[1] + near[1]) / 2, near[2] / 2])


def test_common_words_of_a_date_do_not_outweigh_the_matter() -> None:
    date, matter = _candidate("ended march 31 2024"), _candidate("loss per share")
    words = ["loss", "ended", "march", "31", "2024"]
    frequencies = {"loss": 4, "ended": 30, "march": 30, "31": 30, "2024": 30}
    scores = lexical_scores(words, [date, matter], frequencies=frequencies, num_chunks=100)
    assert scores[1] > scores[0]


def test_a_question_whose_rare_words_are_nowhere_scores_low() -> None:
    candidates = [_candidate("the fee of a berth")]
    known = lexical_scores(["fee"], candidates, frequencies={"fee": 1}, num_chunks=9)
    with_unknown = lexical_scores(
        ["fee", "unicorn"], candidates, frequencies={"fee": 1}, num_chunks=9
    )
    assert with_unknown[0] < 0.5 * known[0]


def test_words_of_the_title_weigh_less() -> None:
    name, matter = (
        _candidate("Acme Corporation", title="Acme.txt"),
        _candidate("net loss", title="Acme.txt"),
    )
    frequencies = {"acme": 1, "loss": 1}
    scores = lexical_scores(["acme", "loss"], [name, matter], frequencies=frequencies, num_chunks=9)
    assert scores[0] == pytest.approx(TITLE_WEIGHT * scores[1])


_WORDS = st.sampled_from("the berth berths fee fees quay 2024 1500 acme".split())
_TEXTS = st.lists(_WORDS, max_size=12)
_CHUNKS = st.lists(st.tuples(_TEXTS, _TEXTS, st.sampled_from(["Acme fee", "Quays"])), max_size=6)


@given(_CHUNKS, st.lists(_WORDS, min_size=1, max_size=4, unique=True), st.integers(1, 99))
def test_lexical_scores_are_those_of_one_chunk_after_the_other(
    chunks: list[tuple[list[str], list[str], str]], words: list[str], num_chunks: int
) -> None:
    """To the last bit, in the order of the formula."""
    around = [tuple({n - 1, n + 1} & set(range(len(chunks)))) for n in range(len(chunks))]
    candidates = [
        Candidate(words_in(" ".join(text)), " ".join(heading), title, beside)
        for (text, heading, title), beside in zip(chunks, around, strict=True)
    ]
    frequencies = {word: n for n, word in enumerate(words)}
    found = lexical_scores(words, candidates, frequencies=frequencies, num_chunks=num_chunks)

    idf = {}
    for word in words:
        n = min(frequencies[word], num_chunks)
        idf[stems(word)[0]] = math.log(1 + (num_chunks - n + 0.5) / (n + 0.5)) ** 2
    cut = [stems(" ".join(candidate.words)) for candidate in candidates]
    lengths = [
        len(text) + NEIGHBOUR_WEIGHT * sum(len(cut[place]) for place in candidate.beside)
        for text, candidate in zip(cut, candidates, strict=True)
    ]
    mean_length = sum(lengths) / max(len(lengths), 1) or 1.0
    expected = []
    for text, candidate, length in zip(cut, candidates, lengths, strict=True):
        score = best = 0.0
        for stem, weight in idf.items():
            weight = weight * TITLE_WEIGHT if stem in stems(candidate.title) else weight
            count = text.count(stem) + HEADING_WEIGHT * stems(candidate.heading).count(stem)
            count += NEIGHBOUR_WEIGHT * sum(cut[place].count(stem) for place in candidate.beside)
            score += weight * count / (count + K1 * (1 - B + B * length / mean_length))
            best += weight
        expected.append(score / best)
    assert found == expected


def test_questions_are_cleaned_of_grammar_but_never_empty() -> None:
    assert question_words("What is the fee, and when is the fee due?") == ["fee", "due"]
    assert question_words("Who is he?") == ["who", "is", "he"]


def test_frequencies_count_stems_among_the_documents(small_fathom: Fathom, tmp_path: Path) -> None:
    other = _add(small_fathom, tmp_path, "other.txt", "A beacon. Beacons shine.")
    lexical = small_fathom.lexical
    assert lexical.frequencies(["beacons"]) == {"beacons": 2}
    assert lexical.frequencies(["beacons", "berth"], document_ids=[other]) == {
        "beacons": 1,
        "berth": 0,
    }


def test_hits_carry_the_evidence_of_both_searches(small_fathom: Fathom) -> None:
    hits = _retrieve(small_fathom, "What does the harbour fee cost a night?")
    assert "35 crowns" in hits[0].chunk.chunk.text
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    (document,) = small_fathom.documents()
    query = EMBEDDER.embed(["What does the harbour fee cost a night?"])[0]
    for hit in hits:
        chunk = hit.chunk.chunk
        seen = EMBEDDER.embed([embedded_text(document.title, chunk.heading_path, chunk.text)])[0]
        assert hit.cosine == pytest.approx(float(seen @ query), abs=1e-5)
        assert 0.0 <= hit.lexical <= 1.0
    cosines = {hit.chunk.chunk.ordinal: hit.cosine for hit in hits}
    for hit in hits:
        ordinal = hit.chunk.chunk.ordinal
        around = [cosines[n] for n in (ordinal - 1, ordinal + 1) if n in cosines]
        near = (hit.cosine + NEIGHBOUR_COSINE * sum(around)) / (1 + NEIGHBOUR_COSINE * len(around))
        assert hit.score == pytest.approx(1 - (1 - near) * (1 - hit.lexical))


def test_repeats_are_one_hit_but_other_numbers_are_not(library: Fathom, tmp_path: Path) -> None:
    words = "the harbour fee for each night that a ship lies at the quay in summer or winter is"
    sections = [f"{words} 35", f"{words}\n36", f"{words.upper()}  35", f"Now {words} 35"]
    text = "\n\n".join(f"# Part\n\n{section}" for section in sections)
    _add(library, tmp_path, "fees.md", text)
    found = [hit.chunk.chunk.text for hit in _retrieve(library, "harbour fee")]
    assert len(found) == 2
    assert sorted(text[-2:] for text in found) == ["35", "36"]


def test_nothing_asked_about_gives_no_hits(library: Fathom) -> None:
    assert _retrieve(library, "fee") == []


def test_the_nearest_passages_show_each_chunk_once(small_fathom: Fathom) -> None:
    hits = _retrieve(small_fathom, "beacon fee berth")
    documents = small_fathom.documents()
    passages = list(nearest_passages(hits, documents, store=small_fathom.store))
    shown = [n for passage in passages for n in passage.chunk_ordinals]
    assert sorted(shown) == list(range(documents[0].num_chunks))
    assert hits[0].chunk.chunk.ordinal in passages[0].chunk_ordinals
    for passage in passages:
        assert passage.text == small_fathom.store.text(1, passage.start, passage.end)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a random cross-encoder."""
    return save_bert(tmp_path_factory.mktemp("bert"), num_labels=1)


def test_a_reranker_orders_the_hits_by_its_own_scores(
    small_fathom: Fathom, tiny_bert: Path
) -> None:
    reranker = CrossEncoderReranker(tiny_bert, name="tiny-bert")
    question = "harbour fee"
    plain = _retrieve(small_fathom, question)
    fathom = Fathom(
        small_fathom.settings.model_copy(update={"reranker": str(tiny_bert)}),
        embedder=EMBEDDER,
        engine=small_fathom.engine,
    )
    hits = _retrieve(fathom, question)
    texts = [hit.chunk.chunk.text for hit in hits]
    assert sorted(texts) == sorted(hit.chunk.chunk.text for hit in plain)
    assert [hit.score for hit in hits] == pytest.approx(
        sorted(reranker.scores(question, texts), reverse=True), abs=1e-5
    )
    assert len({hit.score for hit in hits}) == len(hits)
    assert reranker.scores(question, []) == []


def test_a_folder_that_is_no_reranker_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no-model"):
        CrossEncoderReranker(tmp_path / "nothing", name="no-model")
    classifier = save_bert(tmp_path, num_labels=3)
    with pytest.raises(ModelError, match="3 labels"):
        CrossEncoderReranker(classifier, name="classifier")


def test_search_stays_within_the_documents_asked(small_fathom: Fathom, tmp_path: Path) -> None:
    other = _add(small_fathom, tmp_path, "other.txt", "The fee in the other harbour is 90.")
    service = small_fathom.service()
    documents = service.documents([other])
    hits = service._retriever.retrieve("harbour fee", documents, num_candidates=10)
    assert {hit.chunk.document_id for hit in hits} == {other}


_RARE = st.sampled_from("quay berth fee ship 1 2 x² crane rope".split())


@given(st.lists(st.lists(_RARE, max_size=9), max_size=12), st.integers(0, 40))
def test_repeats_are_those_that_comparing_every_pair_finds(
    texts: list[list[str]], num_common: int
) -> None:
    """Common words make long chunks alike, so that a rare one more or less decides."""
    common = [f"w{chr(97 + n % 26)}{'y' * (n // 26)}" for n in range(num_common)]
    words_of = {number: common + text for number, text in enumerate(texts)}
    hits = [
        Hit(StoredChunk(n, 1, Chunk(n, 0, 1, "", 1)), score=1.0, cosine=1.0, lexical=1.0)
        for n in words_of
    ]
    kept: list[int] = []
    for number, text in words_of.items():
        words = set(text)
        digits = {w for w in words if any(sign.isdigit() for sign in w)}
        alike = (set(words_of[other]) for other in kept)
        if not any(
            len(words & o) >= SAME_WORDS * len(words | o)
            and digits == {w for w in o if any(sign.isdigit() for sign in w)}
            for o in alike
        ):
            kept.append(number)
    assert [hit.chunk.id for hit in _without_repeats(hits, words_of)] == kept


def test_fts_syntax_in_a_question_is_only_words(small_fathom: Fathom) -> None:
    for question in ["fee AND (", '"', "heading:fee NOT *", "a' OR 1=1 --", "NEAR(fee, 2)"]:
        small_fathom.lexical.search(question, top_k=5)
    assert small_fathom.lexical.search("crowns", top_k=5)
    assert small_fathom.lexical.search("***", top_k=5) == []


def test_concurrent_writers_and_readers_agree(library: Fathom, tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def work(name: str) -> None:
        try:
            for number in range(5):
                _add(library, tmp_path, f"{name}{number}.txt", f"{name} {number} text")
                library.service()._retriever.retrieve("text", library.documents(), num_candidates=5)
        except BaseException as error:
            errors.append(error)

    library.service()
    threads = [threading.Thread(target=work, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    library.index.catch_up()
    assert _agrees(library.index, library)
    assert len(library.documents()) == 15
