"""A past question again: the same text from the same document version, or what differs is named."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from conftest import HANDBOOK, HashEmbedder, make_tiny_engine
from rag.answering.replay import replay
from rag.errors import DocumentNotFoundError, ReplayError
from rag.lm.local_engine import LocalEngine
from ui.assembly import Fathom
from ui.cli import app

QUESTION = "What is the harbour fee?"


def test_the_same_text_comes_again_although_the_document_has_changed_since(
    small_fathom: Fathom, handbook: Path
) -> None:
    before = small_fathom.service().answer(QUESTION)
    handbook.write_text(HANDBOOK + "\n\nThe fee is nine now.")
    assert small_fathom.ingest(handbook).document.version == 2
    found = replay(before.receipt.id, small_fathom.receipts, small_fathom.service())
    assert found.same_text
    assert found.differences == ()
    assert found.now.receipt.id != before.receipt.id
    assert found.now.receipt.prompt_sha256 == before.receipt.prompt_sha256
    # asked anew, the new version is read
    assert small_fathom.service().answer(QUESTION).receipt.prompt_sha256 != (
        before.receipt.prompt_sha256
    )


def test_another_model_is_named(small_fathom: Fathom) -> None:
    before = small_fathom.service().answer(QUESTION)
    engine = make_tiny_engine()
    engine._name = "another"
    other = Fathom(small_fathom.settings, embedder=HashEmbedder(), engine=engine)
    found = replay(before.receipt.id, other.receipts, other.service())
    assert found.differences == ("model: tiny-llama then, another now",)


def test_what_is_gone_cannot_be_replayed(small_fathom: Fathom) -> None:
    service = small_fathom.service()
    before = service.answer(QUESTION)
    with pytest.raises(DocumentNotFoundError, match="no receipt 'nothing'"):
        replay("nothing", small_fathom.receipts, service)
    small_fathom.delete(before.citations[0].document if before.citations else 1)
    with pytest.raises(ReplayError, match="was deleted with a document"):
        replay(before.receipt.id, small_fathom.receipts, service)


def test_the_verb_says_the_same_text(
    small_fathom: Fathom, tiny_engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = small_fathom.service().answer(QUESTION)
    monkeypatch.setattr("ui.verbs.questions.open_fathom", lambda settings: small_fathom)
    done = CliRunner().invoke(app, ["replay", before.receipt.id, "--json"])
    assert done.exit_code == 0
    line = json.loads(done.stdout)
    assert line["same_text"] is line["same_prompt"] is True
    assert line["receipt"] == before.receipt.id
