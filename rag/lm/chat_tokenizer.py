"""A model's tokenizer as Fathom uses it: counts, chats that no document can break out of, text."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from typing import Any

from rag.lm.engine import Message

# The end of a turn in ChatML; converted models may name only <|endoftext|> as their end.
_TURN_END = "<|im_end|>"
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# What is counted, as part of the fingerprint: counts that were made otherwise are not reused.
_COUNTED = "special tokens in pieces"


class ChatTokenizer:
    """A transformers tokenizer with its chat template; a message cannot end its own turn.

    `id` is a fingerprint: equal ids give equal token counts.
    """

    def __init__(self, tokenizer: Any) -> None:  # noqa: ANN401 - a union of backends
        self._tokenizer = tokenizer
        self._begins_special_token = _beginning_of_any(
            {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
        )
        self.id = _fingerprint(tokenizer)

    @property
    def template(self) -> Any:  # noqa: ANN401 - a string, or a dict of named ones
        """The chat template, None where the model has none."""
        return getattr(self._tokenizer, "chat_template", None)

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens of `text` alone, as a chat shows it, without any template."""
        return len(self.encode(text))

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text` alone, without any template or special token."""
        plain = self.without_special_tokens(text)
        return list(self._tokenizer.encode(plain, add_special_tokens=False, verbose=False))

    def encode_chat(self, messages: list[Message]) -> list[int]:
        """Return the token ids of the chat in the model's own template, ready for its reply.

        A model without a template reads the contents as plain text, a blank line after each. A
        template that knows no system role gets the system's words before the user's first.
        """
        from jinja2 import TemplateError

        messages = [Message(m.role, self.without_special_tokens(m.content)) for m in messages]
        if not self.template:
            text = "".join(f"{message.content}\n\n" for message in messages)
            return list(self._tokenizer.encode(text, verbose=False))
        try:
            return self._apply_template(messages)
        except TemplateError:
            if len(messages) < 2 or messages[0].role != "system":
                raise
            first = Message(messages[1].role, f"{messages[0].content}\n\n{messages[1].content}")
            return self._apply_template([first, *messages[2:]])

    def without_special_tokens(self, text: str) -> str:
        """Break up special tokens that a text spells out: a document is data, never a turn.

        A space follows the first character of each, wherever it begins.
        """
        return self._begins_special_token.sub(r"\g<0> ", text)

    def end_ids(self, model: Any) -> frozenset[int]:  # noqa: ANN401
        """Return every token id that ends an answer."""
        ids: set[int] = set()
        configured = getattr(model.generation_config, "eos_token_id", None)
        if configured is not None:
            ids.update([configured] if isinstance(configured, int) else configured)
        if self._tokenizer.eos_token_id is not None:
            ids.add(self._tokenizer.eos_token_id)
        turn_end = self._tokenizer.get_vocab().get(_TURN_END)
        if turn_end is not None:
            ids.add(turn_end)
        return frozenset(ids)

    def stream(self) -> TextStream:
        """Return what turns generated token ids into text."""
        return TextStream(self._tokenizer)

    def _apply_template(self, messages: list[Message]) -> list[int]:
        chat = [{"role": message.role, "content": message.content} for message in messages]
        return list(
            self._tokenizer.apply_chat_template(
                chat, tokenize=True, add_generation_prompt=True, return_dict=False
            )
        )


class TextStream:
    """Turns token ids into text piece by piece, holding back characters that are not whole yet.

    The pieces joined are the text of all ids decoded at once.
    """

    def __init__(self, tokenizer: Any) -> None:  # noqa: ANN401
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        # Decoding starts at a token already shown: some decoders drop a leading space.
        self._from = 0
        self._shown = 0

    def push(self, token_id: int) -> str:
        """Return the text that `token_id` completes, often one word, sometimes nothing."""
        self._ids.append(token_id)
        return self._new_text(hold_back=True)

    def flush(self) -> str:
        """Return what was held back."""
        return self._new_text(hold_back=False)

    def _new_text(self, *, hold_back: bool) -> str:
        before = self._decode(self._ids[self._from : self._shown])
        text = self._decode(self._ids[self._from :])
        if len(text) <= len(before) or (hold_back and text.endswith(_REPLACEMENT)):
            return ""
        self._from, self._shown = self._shown, len(self._ids)
        return text[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(
            self._tokenizer.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )


def _beginning_of_any(tokens: set[str]) -> re.Pattern[str]:
    """Return what matches the first character of each of these in a text; they may overlap.

    White space is a token of its own in some vocabularies, and no turn begins with it.
    """
    rests: defaultdict[str, set[str]] = defaultdict(set)
    for token in tokens:
        if len(token) > 1 and not token.isspace():
            rests[token[0]].add(re.escape(token[1:]))
    ways = [f"{re.escape(first)}(?={'|'.join(sorted(rest))})" for first, rest in rests.items()]
    return re.compile("|".join(ways) or r"(?!)")


def _fingerprint(tokenizer: Any) -> str:  # noqa: ANN401
    """Return the first 16 hex digits of the SHA-256 of all that the tokenizer does."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = (
        json.dumps(sorted(tokenizer.get_vocab().items())) if backend is None else backend.to_str()
    )
    return hashlib.sha256(f"{_COUNTED}\n{content}".encode()).hexdigest()[:16]
