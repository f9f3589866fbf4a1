"""Tokenisation of a rendered conversation, with the characters that every token covers.

The text between two media items is tokenised on its own, as in the original LLaVA (`tokenizer_image_token`): each piece
starts a new word, and a begin token is kept only in front of the first piece. A media item is one placeholder id.
"""

from __future__ import annotations

import itertools
import json
import weakref
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from llavakit.conversation.template import PLACEHOLDER, SPELT, Span
from llavakit.errors import UserError

IMAGE_PLACEHOLDER = -200
_LETTERS: weakref.WeakKeyDictionary[Any, tuple[int, Any]] = weakref.WeakKeyDictionary()


def tokenize(
    text: str, tokenizer: Any, *, whole: bool = False, cuts: Collection[int] = (), begins: bool = True
) -> tuple[list[int], list[Span]]:
    """Ids of a rendered text and the characters [start, end) that each covers.

    Args:
        cuts: Characters before which the tokenizer starts anew, beside the ends of media items; not with `whole`.
        begins: Whether the tokenizer adds the special tokens that it puts around a text; not with `whole`.
        whole: Tokenise the text in one go, placeholders included, as transformers' processors do; the tokenizer then
            has a special token of the placeholder's name, and adds no begin token to a text that opens with it.

    Raises:
        UserError: If the tokenizer gives no offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"{type(tokenizer).__name__} gives no character offsets; use the fast tokenizer of this model")
    if whole:
        return _whole(text, tokenizer)
    ids: list[int] = []
    offsets: list[Span] = []
    position = 0
    has_bos = False
    for number, (piece, follows_media) in enumerate(_pieces(text, cuts)):
        if follows_media:
            ids.append(IMAGE_PLACEHOLDER)
            offsets.append((position, position + len(PLACEHOLDER)))
            position += len(PLACEHOLDER)
        piece_ids, piece_offsets = _piece(piece, tokenizer, add_special_tokens=begins)
        if number == 0 and begins:
            has_bos = bool(piece_ids) and piece_ids[0] == tokenizer.bos_token_id
        begin = int(has_bos and number > 0)
        ids += piece_ids[begin:]
        offsets += [(position + start, position + end) for start, end in piece_offsets[begin:]]
        position += len(piece)
    return ids, offsets


def _pieces(text: str, cuts: Collection[int]) -> Iterator[tuple[str, bool]]:
    """The stretches of text between media items and at cuts, each with whether a media item stands before it."""
    position = 0
    for number, piece in enumerate(text.split(PLACEHOLDER)):
        position += len(PLACEHOLDER) * (number > 0)
        inside = sorted(cut - position for cut in cuts if position < cut < position + len(piece))
        for begin, end in itertools.pairwise([0, *inside, len(piece)]):
            yield piece[begin:end], number > 0 and begin == 0
        position += len(piece)


def _whole(text: str, tokenizer: Any) -> tuple[list[int], list[Span]]:
    begun = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    encoded = tokenizer(text, return_offsets_mapping=True, return_attention_mask=False, add_special_tokens=not begun)
    image = tokenizer.convert_tokens_to_ids(PLACEHOLDER) if PLACEHOLDER in text else None
    ids = [IMAGE_PLACEHOLDER if token == image else token for token in encoded["input_ids"]]
    return ids, [tuple(span) for span in encoded["offset_mapping"]]


def _piece(piece: str, tokenizer: Any, *, add_special_tokens: bool = True) -> tuple[list[int], list[Span]]:
    # SentencePiece puts a word mark in front of every text. Its equivalent in the tokenizers library (Metaspace with
    # prepend_scheme "first") leaves the mark out of a text that begins with a space, so such a text gets one more.
    extra = int(piece[:1] in (" ", "▁") and marks_first_word(tokenizer))
    settings = {"add_special_tokens": add_special_tokens, "return_offsets_mapping": True}
    text = " " * extra + piece
    if SPELT in text:
        encoded = _letters(tokenizer).encode(text.replace(SPELT, PLACEHOLDER), add_special_tokens=add_special_tokens)
        ids, spans = encoded.ids, encoded.offsets
    else:
        encoded = tokenizer(text, return_attention_mask=False, **settings)
        ids, spans = encoded["input_ids"], encoded["offset_mapping"]
    if not extra:
        return list(ids), list(spans)
    return list(ids), [(max(start - 1, 0), end and max(end - 1, 1)) for start, end in spans]


def _letters(tokenizer: Any) -> Any:
    """The tokenizer's backend without a token of the placeholder's name, so that it reads the letters."""
    size, backend = _LETTERS.get(tokenizer, (None, None))
    if size != len(tokenizer):
        from tokenizers import Tokenizer

        settings = json.loads(tokenizer.backend_tokenizer.to_str())
        known = tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=False)
        # One beyond the model's vocabulary keeps its place under a name that no text has by now, because ids of added
        # tokens follow from their order.
        settings["added_tokens"] = [
            own | {"content": SPELT, "normalized": False} if own["content"] == PLACEHOLDER else own
            for own in settings["added_tokens"]
            if own["content"] != PLACEHOLDER or own["id"] >= known
        ]
        backend = Tokenizer.from_str(json.dumps(settings | {"truncation": None, "padding": None}))
        _LETTERS[tokenizer] = len(tokenizer), backend
    return backend


def marks_first_word(tokenizer: Any) -> bool:
    """Whether the tokenizer puts a word mark in front of a text only if it does not begin with a space already."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    steps = getattr(backend, "pre_tokenizer", None)
    return getattr(steps, "prepend_scheme", None) == "first"


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """The special tokens of a tokenizer and their ids; decoding with `skip_special_tokens` leaves them out."""
    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


def stop_token_ids(stops: Sequence[str], tokenizer: Any) -> dict[int, str]:
    """The stop strings that are one special token (`<|eot_id|>`), by id.

    The text of a reply does not hold special tokens, so these are matched by id. All others are matched in the text.
    """
    special = special_tokens(tokenizer) if stops else {}
    return {special[stop]: stop for stop in stops if stop in special}
