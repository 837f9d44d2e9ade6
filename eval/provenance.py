"""What the rows of a comparison are made with: data, weights, settings, machine."""

import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from eval.arms import Workplace
from eval.bench.machine import this_machine
from eval.journal import Run
from rag.errors import ModelError
from rag.lm.catalog import is_gguf, resolve_model
from rag.lm.device import choose_device
from rag.settings import Settings
from rag.types import Document

# The settings that can change an answer.
_SETTINGS = (
    "chunk_tokens", "retrieval_tokens", "max_new_tokens", "num_candidates", "answer_mode",
    "max_context_tokens", "prefill_deadline_seconds", "reranker", "device", "thrift", "escalations",
)  # fmt: skip


def made_with(
    place: Workplace,
    documents: Mapping[str, Document],
    *,
    command: str,
    data: str,
    examples_sha256: str,
    seed: int,
    held_out_looks: int = 0,
) -> Run:
    """Return what rows are made with from now on.

    Args:
        place: store, retriever and model.
        documents: those asked about, by the names that the examples give them.
        command: that was called, or that does the same.
        data: what the questions are called.
        examples_sha256: of the file or folder they come from; see `sha256_of_files`.
        seed: of the choice, and of random passages.
        held_out_looks: how often these questions have been looked at, where they are held out.
    """
    settings = place.settings
    effective = place.calibrations and place.calibrations.effective_length(place.engine.model_id)
    machine = this_machine(choose_device(settings))
    return Run(
        command=command,
        data=data,
        examples_sha256=examples_sha256,
        documents={name: documents[name].content_sha256 for name in sorted(documents)},
        model=place.engine.name,
        model_sha256=_weights_sha256(settings),
        context_tokens=place.engine.context_tokens,
        effective_tokens=effective.tokens if effective else None,
        embedder=place.retriever.embedder_name,
        settings={name: getattr(settings, name) for name in _SETTINGS},
        seed=seed,
        commit=machine.commit,
        device=machine.device if settings.remote_url is None else "a server",
        num_threads=machine.num_threads,
        versions=machine.versions,
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        held_out_looks=held_out_looks,
    )


def sha256_of_files(*paths: Path) -> str:
    """Return the checksum over files, and of a folder over the sets in it, in order of names."""
    digest = hashlib.sha256()
    for path in paths:
        for file in sorted(path.glob("*.jsonl.gz")) if path.is_dir() else [path]:
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def _weights_sha256(settings: Settings) -> str:
    """Return the checksum over the files of weights, "" where they are not this machine's files."""
    if settings.remote_url is not None:
        return ""
    if is_gguf(settings.model):
        return sha256_of_files(Path(settings.model))
    try:
        folder = resolve_model(settings.model, settings)
    except ModelError:  # the engine was handed in
        return ""
    return sha256_of_files(*sorted(folder.glob("*.safetensors")))
