"""Edits: what training does to a record's conversation before it is encoded, by name and per source.

    data:
      - {path: m4.json, images: m4, edits: [{type: media_in_front, share: 0.5}]}

An edit is a class in `llavakit.registry.RECORD_EDITS`; an instance takes normalised messages and gives new ones. It
sees neither tokenizer nor pixels, and what it does depends on the conversation and its options alone, so that a run
that goes on after a kill sees the same records.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from llavakit.conversation.messages import Message, Part, is_media, media_of, text_of
from llavakit.errors import UserError, quoted
from llavakit.registry import RECORD_EDITS


class RecordEdit(Protocol):
    """A rule for conversations."""

    def __call__(self, messages: Sequence[Message]) -> list[Message]:
        """The edited messages; those given are left as they are."""


def build_edits(edits: Any) -> tuple[RecordEdit, ...]:
    """Edits of their names, or mappings with `type` and options.

    Raises:
        UserError: If there is no such edit or option.
    """
    if isinstance(edits, (str, Mapping)) or not isinstance(edits, Sequence):
        raise UserError(f"edits: must be a list of names or of mappings with a type, not {quoted(edits)}")
    return tuple(RECORD_EDITS.build({"type": edit} if isinstance(edit, str) else edit) for edit in edits)


class MediaInFront:
    """All media of a conversation of several before the text of its first turn; a mark stays where each was.

    LLaVA-NeXT-Interleave trains on half of its records in this form and on the others as they are ("mixed placement").

    Args:
        share: Part of the records that are edited, between 0 and 1; which ones depends on their texts and `seed`.
        mark: Text in place of a media item; `{}` in it is the media item's kind.
        seed: Of the choice.
    """

    def __init__(self, *, share: float = 1.0, mark: str = "[{}]", seed: int = 0) -> None:
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
            raise UserError(f"media_in_front: share must be a number from 0 to 1, not {quoted(share)}")
        if not isinstance(mark, str):
            raise UserError(f"media_in_front: mark must be a text, not {quoted(mark)}")
        self.share, self.mark, self.seed = share, mark, seed

    def __call__(self, messages: Sequence[Message]) -> list[Message]:
        first = next((n for n, message in enumerate(messages) if message["role"] == "user"), None)
        if len(media_of(messages)) < 2 or first is None or not self._chosen(messages):
            return list(messages)
        front: list[Part] = []
        edited = []
        for message in messages:
            texts: list[Part] = []
            for part in message["content"]:
                if is_media(part):
                    front += [part, {"type": "text", "text": ""}]  # an empty text keeps a template from breaking lines
                    texts.append({"type": "text", "text": self.mark.replace("{}", part["type"])})
                elif part["type"] == "boxes":
                    front.insert(len(front) - 1, part)
                else:
                    texts.append(part)
            text = "".join(part["text"] for part in texts)
            edited.append(message | {"content": [{"type": "text", "text": text}]})
        edited[first] = edited[first] | {"content": [*front, *edited[first]["content"]]}
        return edited

    def _chosen(self, messages: Sequence[Message]) -> bool:
        said = [[m["role"], *(part.get("text", part["type"]) for part in m["content"])] for m in messages]
        digest = hashlib.sha256(json.dumps([self.seed, said]).encode()).digest()
        return int.from_bytes(digest[:8], "big") < self.share * 2**64


class LeadWithMedia:
    """The only media item of a turn in front of its text; turns that begin with it, or have several, stay.

    The template `qwen_1_5` does the same while it renders; this is for templates that do not (LLaVA-OneVision).
    """

    def __call__(self, messages: Sequence[Message]) -> list[Message]:
        moved = []
        for message in messages:
            media = [part for part in message["content"] if is_media(part)]
            if len(media) == 1 and not is_media(message["content"][0]):
                text = text_of(message).strip()
                boxes = [part for part in message["content"] if part["type"] == "boxes"]
                content: list[Part] = [media[0], *boxes, {"type": "text", "text": f"\n{text}" if text else ""}]
                message = message | {"content": content}
            moved.append(message)
        return moved


class RemoveText:
    """Without certain strings, such as `QA_GT_caption_based_noisy`, a left-over in the answers of VideoInstruct-100K.

    Args:
        texts: The strings.
    """

    def __init__(self, *, texts: Sequence[str]) -> None:
        if isinstance(texts, str) or not all(isinstance(text, str) and text for text in texts):
            raise UserError(f"remove_text: texts must be a list of strings, not {quoted(texts)}")
        self.texts = tuple(texts)

    def __call__(self, messages: Sequence[Message]) -> list[Message]:
        return [message | {"content": list(map(self._clean, message["content"]))} for message in messages]

    def _clean(self, part: Part) -> Part:
        if part["type"] != "text":
            return part
        text = part["text"]
        for unwanted in self.texts:
            text = text.replace(unwanted, "")
        return part | {"text": text}
