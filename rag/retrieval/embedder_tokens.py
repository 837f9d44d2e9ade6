"""Texts to token ids to batches of one length, as each embedder of our own takes them."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

Offsets = list[tuple[int, int]]
TokenIds = list[int]


def tokenizer_of(folder: Path) -> "Tokenizer":
    """Return the model's tokenizer, a copy of our own: it neither cuts nor pads."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


class EmbedderTokens:
    """The tokens of an embedder: where they lie in a text, and what the model is given."""

    def __init__(self, folder: Path, *, longest: int) -> None:
        """Load the tokenizer.

        Args:
            folder: with tokenizer.json.
            longest: tokens the model reads, special tokens included.
        """
        self._tokenizer = tokenizer_of(folder)
        self._longest = longest
        # the same without special tokens
        self.max_tokens = longest - int(self._tokenizer.num_special_tokens_to_add(is_pair=False))

    def offsets(self, text: str) -> Offsets:
        """Return the `[start, end)` characters of every token of `text`, in order.

        Python's other threads run meanwhile, as they do not while `encode` works: chunks of several
        documents are cut at once, and the embedder is fed.
        """
        (encoded,) = self._tokenizer.encode_batch([text], add_special_tokens=False)
        return list(encoded.offsets)

    def encoded(self, texts: Sequence[str]) -> "list[Encoding]":
        """Tokenize: all cores are used, and Python's other threads run meanwhile."""
        found: list[Encoding] = self._tokenizer.encode_batch_fast(list(texts))
        return found

    def ids(
        self, texts: Sequence[str], encoded: "Sequence[Encoding] | None" = None
    ) -> list[TokenIds]:
        """Return the token ids of each text, special tokens included, cut where it is too long.

        Args:
            texts: of any length.
            encoded: what `encoded` gave for them, if that was called before.
        """
        if encoded is None:
            encoded = self.encoded(texts)
        ids = [each.ids for each in encoded]
        too_long = [i for i, each in enumerate(ids) if len(each) > self._longest]
        if too_long:
            cut = self._cutting_tokenizer.encode_batch_fast([texts[i] for i in too_long])
            for i, shorter in zip(too_long, cut, strict=True):
                ids[i] = shorter.ids
        return ids

    @cached_property
    def _cutting_tokenizer(self) -> "Tokenizer":
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(self._tokenizer.to_str())
        tokenizer.enable_truncation(self._longest)
        return tokenizer


def batches(lengths: Sequence[int], *, batch_tokens: int) -> Iterator[list[int]]:
    """Yield the places of the texts, shortest first, in batches of up to `batch_tokens`, padded."""
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and lengths[place] * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def padded(ids: Sequence[TokenIds], pad_id: int) -> list[npt.NDArray[np.int64]]:
    """Return token ids and attention mask, int64 [len(ids), longest]."""
    lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
    mask = np.arange(lengths.max()) < lengths[:, None]
    tokens = np.full(mask.shape, pad_id, dtype=np.int64)
    tokens[mask] = np.fromiter(chain.from_iterable(ids), dtype=np.int64, count=lengths.sum())
    return [tokens, mask.astype(np.int64)]
