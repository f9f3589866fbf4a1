"""Log probabilities in OpenAI's form: every token with its bytes, which joined give the text of the reply.

A token need not be text: the bytes of one character may be spread over tokens, and a SentencePiece token begins with a
mark that is a blank inside a text and nothing at its start. So tokens are spelled from the tokenizer's own pieces where
its decoder is of a known kind, and otherwise by what each adds to the text.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from llavakit.generation.request import TokenLogprob
from llavakit.generation.streaming import TextStream

Spell = Callable[[str, bool], bytes]  # from a piece of the vocabulary, and whether it comes first, to its bytes
_PROBES = ("What is it? A red square.", " two  blanks\n\n\tand a tab ", "größer, 日本語, \U0001f600!", "x")
_BYTE = re.compile(r"^<0x([0-9A-Fa-f]{2})>$")


class Spelling:
    """Bytes of single tokens of one tokenizer.

    Args:
        tokenizer: A transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        self._spell = _spell_of(tokenizer)
        if self._spell is not None and not all(map(self._is_exact, _PROBES)):
            self._spell = None

    @property
    def exact(self) -> bool:
        """Whether tokens are spelled from their pieces; if not, a character's bytes are those of its last token."""
        return self._spell is not None

    def _is_exact(self, text: str) -> bool:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        spelled = b"".join(self.bytes_of(token, number == 0) for number, token in enumerate(ids))
        wanted = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return spelled.decode("utf-8", "replace") == wanted

    def bytes_of(self, token: int, first: bool) -> bytes:
        """The bytes of a token that begins a text or goes on with it; none of a special token."""
        if token in self._special:
            return b""
        piece = self.tokenizer.convert_ids_to_tokens(token) if self._spell is not None else None
        if piece is not None:
            return self._spell(piece, first)
        return self.tokenizer.decode([token], clean_up_tokenization_spaces=False).encode()


def _spell_of(tokenizer: Any) -> Spell | None:
    """How pieces of a vocabulary are spelled, from the tokenizer's decoder; None if that is of an unknown kind."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return None
    described = json.loads(decoder.__getstate__())
    steps = described["decoders"] if described["type"] == "Sequence" else [described]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        table = _byte_level()
        return lambda piece, first: b"".join(table.get(letter, letter.encode()) for letter in piece)
    if not set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        return None
    replaced = [(step["pattern"].get("String"), step["content"]) for step in steps if step["type"] == "Replace"]
    replaced += [(step["replacement"], " ") for step in steps if step["type"] == "Metaspace"]
    stripped = sum(step["start"] for step in steps if step["type"] == "Strip" and step["content"] == " ")
    stripped += any(step["type"] == "Metaspace" and step.get("prepend_scheme") != "never" for step in steps)
    if any(pattern is None for pattern, _ in replaced):
        return None

    def spell(piece: str, first: bool) -> bytes:
        byte = _BYTE.match(piece) if "ByteFallback" in kinds else None
        if byte is not None:
            return bytes.fromhex(byte[1])
        for pattern, content in replaced:
            piece = piece.replace(pattern, content)
        for _ in range(stripped if first else 0):
            piece = piece.removeprefix(" ")
        return piece.encode()

    return spell


@functools.cache
def _byte_level() -> dict[str, bytes]:
    """The letters that stand for bytes in the vocabularies of byte-level BPE (GPT-2's table)."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in kept]
    letters = {chr(byte): bytes([byte]) for byte in kept}
    return letters | {chr(256 + number): bytes([byte]) for number, byte in enumerate(others)}


class TokenLog:
    """Log probabilities of one reply as they come.

    Entries are held back until the text that they belong to has been sent, so that what is cut from a reply (white
    space at its ends, a stop string) is missing in the bytes too.

    Args:
        spelling: Of the tokenizer.
        trimmed: Whether white space at the beginning of the reply is left out.
    """

    def __init__(self, spelling: Spelling, trimmed: bool = True) -> None:
        self._spelling = spelling
        self._stream = None if spelling.exact else TextStream(spelling.tokenizer)
        self._held: list[tuple[dict[str, Any], bytes]] = []
        self._first, self._begun = True, not trimmed
        self._sent = self._released = 0

    def push(self, entries: Iterable[TokenLogprob]) -> None:
        """The newest tokens."""
        for entry in entries:
            text = self._bytes(entry.token_id)
            tops = [
                self._entry(token, value, self._spelling.bytes_of(token, self._first)) for token, value in entry.top
            ]
            shown = self._entry(entry.token_id, entry.logprob, text) | {"top_logprobs": tops}
            self._first = self._first and not text
            if not self._begun:
                text = _without_leading_blanks(text)
                self._begun = bool(text)
            self._held.append((shown, text))

    def _bytes(self, token: int) -> bytes:
        if self._stream is None:
            return self._spelling.bytes_of(token, self._first)
        return self._stream.push(token).encode()

    def _entry(self, token: int, value: float, text: bytes) -> dict[str, Any]:
        said = text.decode("utf-8", "replace") or self._spelling.tokenizer.decode([token])
        return {"token": said, "logprob": max(value, -9999.0), "bytes": list(text)}

    def release(self, text: str, *, last: bool = False) -> list[dict[str, Any]]:
        """Entries of text that is sent; with the last piece all that are left."""
        self._released += len(text.encode("utf-8", "replace"))
        ready = []
        while self._held and (last or self._sent + len(self._held[0][1]) <= self._released):
            entry, own = self._held.pop(0)
            own = own[: max(self._released - self._sent, 0)]
            self._sent += len(own)
            ready.append(entry | {"bytes": list(own)})
        return ready


def _without_leading_blanks(text: bytes) -> bytes:
    try:
        return text.decode().lstrip().encode()
    except UnicodeDecodeError:  # a part of a character, which is no blank
        return text


def logprobs_body(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Entries as an answer has them."""
    return {"content": list(entries), "refusal": None}
