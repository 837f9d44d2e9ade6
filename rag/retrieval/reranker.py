"""A cross-encoder reads question and chunk together and scores the pair: optional, by name."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from rag.errors import ModelError


class Reranker(Protocol):
    """Scores texts for a question."""

    @property
    def name(self) -> str:
        """The name that receipts and benchmarks show."""

    def scores(self, question: str, texts: Sequence[str]) -> list[float]:
        """Return a score for each text, in their order; higher is nearer."""


class CrossEncoderReranker:
    """A reranker from a folder that sentence-transformers can load as a cross-encoder."""

    def __init__(self, folder: Path, *, name: str, device: str = "cpu") -> None:
        """Load the model.

        Args:
            folder: with config.json, the tokenizer and model.safetensors of a sequence classifier
                with one label.
            name: the name shown.
            device: cuda or cpu.

        Raises:
            ModelError: if the folder holds no such model.
        """
        from sentence_transformers import CrossEncoder

        try:
            self._model: Any = CrossEncoder(str(folder), device=device, local_files_only=True)
            num_labels = int(self._model.config.num_labels)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ModelError(
                f"the reranker {name} cannot be loaded from {folder}: {error}",
                hint="expected a cross-encoder's folder: config.json, tokenizer, model.safetensors",
            ) from error
        if num_labels != 1:
            raise ModelError(
                f"the reranker {name} gives {num_labels} labels for a pair; expected one score",
                hint="choose a cross-encoder trained for ranking, or unset FATHOM_RERANKER",
            )
        self.name = name

    def scores(self, question: str, texts: Sequence[str]) -> list[float]:
        """Return a score for each text, in their order; higher is nearer.

        A pair longer than the model reads is cut at its end by the model's own tokenizer; chunks
        are far shorter than what common cross-encoders read (512 tokens).
        """
        if not texts:
            return []
        pairs = [(question, text) for text in texts]
        return [float(score) for score in self._model.predict(pairs, show_progress_bar=False)]
