"""Token ids to text while they come, for any tokenizer.

A token need not be a character: bytes of one character may be spread over tokens, and a tokenizer may write a word
piece differently at the start of a text than inside. So text is never decoded token by token: a short window of
settled tokens is decoded with and without the new ones, and the difference is the new text.
"""

from __future__ import annotations

import itertools
from typing import Any

_BROKEN = "\ufffd"  # what decoders write for bytes that are no whole character yet


class TextStream:
    """Text of one reply; the pieces joined are the tokenizer's text of all tokens.

    Args:
        tokenizer: Anything with transformers' `decode`.
        skip_special_tokens: Leave special tokens out.
    """

    def __init__(self, tokenizer: Any, skip_special_tokens: bool = True) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._ids: list[int] = []
        self._start = 0  # the window begins here ...
        self._settled = 0  # ... and its text is out up to here
        self._shown = ""  # text of the window that is out

    def push(self, token: int) -> str:
        """Add a token; the text that is certain now."""
        self._ids.append(token)
        text = self._decode(self._ids[self._start :])
        if text.endswith(_BROKEN) or not text.startswith(self._shown) or len(text) == len(self._shown):
            return ""
        new = text[len(self._shown) :]
        self._start, self._settled = self._settled, len(self._ids)
        self._shown = self._decode(self._ids[self._start :])
        return new

    def flush(self) -> str:
        """The rest when no token follows, broken characters included."""
        text = self._decode(self._ids[self._start :])
        common = sum(
            1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(text, self._shown, strict=False))
        )
        new = text[common:]
        self._start, self._settled = self._settled, len(self._ids)
        self._shown = self._decode(self._ids[self._start :])
        return new

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip, clean_up_tokenization_spaces=False)
