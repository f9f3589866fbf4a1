"""Rows of ids as conversations: what an original batch holds becomes messages that `LlavakitProcessor.encode` reads.

An original batch has ids with a placeholder for every media item, and labels that are the ids of the answers. Here
every id is one character of a tokenizer made for the row, a stretch that is learned is an assistant turn, and the rest
are user turns, so that encoding the messages must give the row's ids and labels back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from PIL import Image

from llavakit.conversation.labels import IGNORE
from llavakit.conversation.template import Template
from llavakit.data.records import Record
from llavakit.model.configuration import LlavakitConfig
from llavakit.model.processing import IMAGE_TOKEN, LlavakitProcessor
from llavakit.training.dataset import Samples
from llavakit.views.plan import MediaSize

FIRST_CHARACTER = 0xF0000  # private use: no template trims or rewrites such characters

LARGEST = 1 << 24  # pixels or voxels of a blank media item

# Nothing but the turns' texts and placeholders; the assistant's are learned.
VERBATIM = Template(
    "verbatim",
    "",
    placement="keep",
    keeps_first_answer=True,
    jinja=(
        "{%- macro body(message) -%}{%- for part in message['content'] -%}"
        "{{ part['text'] if part['type'] == 'text' else '<image>' }}{%- endfor -%}{%- endmacro -%}"
        "{%- for message in messages -%}{%- if message['role'] == 'assistant' -%}"
        "{%- generation -%}{{ body(message) }}{%- endgeneration -%}"
        "{%- else -%}{{ body(message) }}{%- endif -%}{%- endfor -%}"
    ),
)


def blank_item(modality: str, size: MediaSize) -> Any:
    """An open media item of a size, without content."""
    if modality == "volume":
        return np.zeros(size, np.float32)
    picture = Image.new("L", (size.width, size.height))
    return [picture] * size.depth if modality == "video" else picture


class VerbatimRows:
    """Encodes rows of ids for a model.

    Args:
        config: The model's configuration: its media layouts decide how many tokens a media item takes.
        ids: All ids that the rows hold, placeholders aside.
    """

    def __init__(self, config: LlavakitConfig, ids: set[int]) -> None:
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        self.letters = {token: chr(FIRST_CHARACTER + number) for number, token in enumerate(sorted(ids))}
        vocabulary = {letter: token for token, letter in self.letters.items()}
        marks = {IMAGE_TOKEN: config.image_token_id} if config.media else {}
        backend = Tokenizer(models.BPE(vocabulary | marks, []))
        backend.add_special_tokens(list(marks))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
        self.processor = LlavakitProcessor.from_config(config, tokenizer, template=VERBATIM)

    def messages(
        self, ids: Sequence[int], labels: Sequence[int] | None, media: Mapping[int, tuple[str, MediaSize]]
    ) -> list[dict[str, Any]]:
        """The messages of a row.

        Args:
            media: Modality and size of the media item at a position.
        """
        turns = []
        learned = [False] * len(ids) if labels is None else [label != IGNORE for label in labels]
        for answer, places in groupby(range(len(ids)), key=learned.__getitem__):
            content: list[dict[str, Any]] = []
            for is_media, own in groupby(places, key=media.__contains__):
                if not is_media:
                    content.append({"type": "text", "text": "".join(self.letters[ids[place]] for place in own)})
                    continue
                for modality, size in map(media.__getitem__, own):
                    kind = modality.removeprefix("multi_")
                    content.append({"type": kind, kind: blank_item(kind, size)})
            turns.append({"role": "assistant" if answer else "user", "content": content})
        return turns

    def sample(
        self,
        ids: Sequence[int],
        labels: Sequence[int] | None,
        media: Mapping[int, tuple[str, MediaSize]],
        views: Sequence[Any],
    ) -> dict[str, Any]:
        """The row as a processed sample: of a stage's `Samples` if it has an answer to learn, else as a prompt.

        Args:
            views: Encoder inputs or features of the row's media, which are given ready-made.
        """
        messages = self.messages(ids, labels, media)
        if labels is not None and any(label != IGNORE for label in labels[1:]):
            record = Record(messages, "case", 1, {})
            sample = Samples([record], self.processor, features=lambda *_: list(views))[0]
        else:
            asked = labels is None
            sample = self.processor.encode(messages, pixels=False, add_generation_prompt=asked)
        tokens = {name: [int(value) for value in sample[name]] for name in ("input_ids", "labels")}
        return sample | tokens | {"pixel_values": list(views)}


def is_conversation(
    ids: Sequence[int], labels: Sequence[int] | None, media: Mapping[int, tuple[str, MediaSize]]
) -> bool:
    """Whether messages can say what a row holds.

    They cannot if a label is neither the id at its place nor ignored, if a placeholder is learned, if images are laid
    out in another way than a message with so many images would have them, or if a blank media item would be too large.
    """
    images = [modality for modality, _ in media.values() if modality.endswith("image")]
    as_written = all(modality == ("multi_image" if len(images) > 1 else "image") for modality in images)
    known = labels is None or all(
        label == IGNORE or (label == token and place not in media)
        for place, (token, label) in enumerate(zip(ids, labels, strict=True))
    )
    handy = all(0 < size.depth * size.height * size.width <= LARGEST for _, size in media.values())
    return bool(ids) and min(ids) >= 0 and as_written and known and handy
