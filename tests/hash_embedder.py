"""An embedder without a model: words hashed into buckets. Imports nothing heavy."""

import hashlib
import re
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt


class HashEmbedder:
    """Words hashed into 64 buckets: texts that share words are near each other."""

    fingerprint = "hash-64"
    dim = 64
    max_tokens = 64
    queued_texts = 0

    def token_offsets(self, text: str) -> list[tuple[int, int]]:
        return [match.span() for match in re.finditer(r"\w+|[^\w\s]", text)]

    def embed(
        self, texts: Sequence[str], *, on_progress: Callable[[int], None] | None = None
    ) -> npt.NDArray[np.float32]:
        vectors = np.full((len(texts), self.dim), 1e-3, dtype=np.float32)
        for row, text in enumerate(texts):
            for word in re.findall(r"\w+", text.lower()):
                digest = hashlib.sha256(word.encode()).digest()
                vectors[row, digest[0] % self.dim] += 1.0
            if on_progress:
                on_progress(row + 1)
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        return np.asarray(vectors / norms, dtype=np.float32)
