"""What a model sees of one sample.

The ids, labels and views are those that training, chat and serving get, from the same processor; this module only says
which of them is what. No weights are read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from llavakit.conversation.template import template_for
from llavakit.conversation.tokens import special_tokens, stop_token_ids
from llavakit.data.readers import open_source
from llavakit.data.records import Record, read_record
from llavakit.errors import UserError
from llavakit.evaluation.benchmarks.base import Question, media_parts
from llavakit.evaluation.records import Record as Line
from llavakit.model.processing import LlavakitProcessor
from llavakit.model.routes import MODALITIES
from llavakit.splice.scatter import IGNORE

TEXT, SPECIAL, VISUAL, SEPARATOR = "text", "special", "visual", "separator"
_SUFFIXES = {
    "video": (".mp4", ".avi", ".mkv", ".mov", ".webm"),
    "volume": (".npy", ".nii", ".gz"),
}


@dataclass(frozen=True)
class Token:
    """One position of the prompt.

    Attributes:
        id: Its id.
        text: What it stands for.
        kind: "text", "special", "visual" (filled with a vector), or "separator" (an id that a layout of media writes).
        learned: Whether training learns to say it.
        media: Number of its media item.
        weight: Its weight in the loss, if the label policy weights tokens.
    """

    id: int
    text: str
    kind: str
    learned: bool
    media: int | None = None
    weight: float | None = None


@dataclass(frozen=True)
class SeenView:
    """One encoder input: its role, place and size in pixels, and the grid of its features."""

    role: str
    row: int
    col: int
    height: int
    width: int
    depth: int
    encoder: str
    grid: tuple[int, ...]


@dataclass(frozen=True)
class SeenMedia:
    """One media item.

    Attributes:
        modality: As the model takes it; "multi_image" is an image among several.
        name: File name.
        size: (depth, height, width) of the original.
        planner: Name of the class that cut it.
        tiles: (rows, columns); (0, 0) if it is not tiled.
        views: Encoder inputs.
        grids: What comes out of the connector.
        visual, separators: Positions that are filled with vectors, and ids between them.
    """

    modality: str
    name: str
    size: tuple[int, int, int]
    planner: str
    tiles: tuple[int, int]
    views: list[SeenView]
    grids: list[tuple[int, ...]]
    visual: int
    separators: int


@dataclass
class Seen:
    """A sample as the model gets it.

    Attributes:
        template: Name of the template.
        training: Whether it is a training sample; otherwise a prompt that ends where the model answers.
        tokens: All positions.
        media: Media items in the order of their places.
        stops: What ends a reply: texts, and special tokens with their ids.
        notes: What was left out or masked, in words.
        pictures: Encoder inputs as tensors, in the order of the views of all media.
    """

    template: str
    training: bool
    tokens: list[Token]
    media: list[SeenMedia]
    stops: list[str]
    notes: list[str] = field(default_factory=list)
    pictures: list[Tensor] = field(default_factory=list, repr=False)

    def count(self, kind: str) -> int:
        """Positions of a kind."""
        return sum(token.kind == kind for token in self.tokens)

    @property
    def learned(self) -> int:
        """Positions that training learns."""
        return sum(token.learned for token in self.tokens)

    def facts(self) -> dict[str, Any]:
        """JSON-able, without the pictures."""
        counts = {kind: self.count(kind) for kind in (TEXT, SPECIAL, VISUAL, SEPARATOR)}
        return {
            "template": self.template,
            "training": self.training,
            "positions": {"all": len(self.tokens), **counts, "learned": self.learned},
            "media": [asdict(item) for item in self.media],
            "stops": self.stops,
            "notes": self.notes,
            "tokens": [asdict(token) for token in self.tokens],
        }


# what is looked at


def read_sample(sample: str, prompt: str | None = None, images: Path | None = None) -> Record | Question:
    """What a name on the command line means.

    Args:
        sample: `FILE:LINE` of records or questions (the first without a line), or a media file.
        prompt: What is asked about a media file.
        images: Folder that the media of records are relative to; default: that of the file.

    Raises:
        UserError: If it is none of these.
    """
    found = re.fullmatch(r"(.+\.(?:jsonl?|ndjson))(?::(\d+))?", sample)
    if found is None:
        path = Path(sample)
        if not path.exists():
            raise UserError(f"{sample}: no such file; name a media file, or a record as FILE:LINE")
        kind = next((kind for kind, ends in _SUFFIXES.items() if path.suffix.lower() in ends), None)
        kind = kind or ("volume" if path.is_dir() else "image")
        return Question("sample", prompt or "What is in the picture?", ({"type": kind, kind: str(path)},))
    if prompt is not None:
        raise UserError("--prompt: belongs to a media file; a record says itself what is asked")
    source, line = open_source(found[1]), int(found[2] or 0)
    numbers = (number for number in range(len(source)) if line in (0, source.line(number)))
    if (number := next(numbers, None)) is None:
        raise UserError(f"{sample}: there is no record in this line; the file holds {len(source)}")
    raw = source[number]
    place = source.file, source.line(number)
    if isinstance(raw, Mapping) and "text" in raw and not {"conversations", "messages"} & raw.keys():
        row = Line(*place, dict(raw))
        return Question(
            row.data.get("question_id", ""), row.get("text", str), media_parts(row, images or Path(place[0]).parent)
        )
    return read_record(raw, *place, media_root=images)


# what the model sees of it


def look(
    messages: Sequence[Mapping[str, Any]], processor: LlavakitProcessor, *, training: bool, **options: Any
) -> Seen:
    """A conversation as a model gets it.

    Args:
        training: Whether as a training sample, with labels, or as a prompt that the model answers.
        options: Of `LlavakitProcessor.encode` (`labels`, `max_length`).
    """
    sample = processor.encode(messages, add_generation_prompt=not training, **options)
    tokenizer = processor.tokenizer
    template = template_for(processor.template, tokenizer)
    layouts, media = _media(messages, sample, processor)
    ends = {tokenizer.eos_token_id: tokenizer.eos_token, **stop_token_ids(template.stop, tokenizer)}
    stops = [f"{name} ({number})" for number, name in ends.items() if number is not None]
    notes = list(sample["notes"])
    if sample["fully_masked"]:
        notes.append("the label policy masked the whole sample: nothing of it is learned")
    elif training and all(label == IGNORE for label in sample["labels"]):
        notes.append("no token is learned")
    return Seen(
        template=str(processor.template),
        training=training,
        tokens=_tokens(sample, layouts, processor),
        media=media,
        stops=stops + [repr(text) for text in template.stop if text not in ends.values()],
        notes=notes,
        pictures=sample["pixel_values"],
    )


def _media(
    messages: Sequence[Any], sample: Mapping[str, Any], processor: LlavakitProcessor
) -> tuple[list, list[SeenMedia]]:
    from llavakit.conversation.encode import collect_media
    from llavakit.conversation.messages import normalise
    from llavakit.media.source import name_of
    from llavakit.model.routes import read_region_tensor

    spec = processor.spec
    regions = sample["visual_regions"] or [None] * len(sample["visual_sizes"])
    parts = collect_media(normalise(messages))
    layouts, media = [], []
    for number, (size, modality) in enumerate(zip(sample["visual_sizes"], sample["visual_modalities"], strict=True)):
        kind = MODALITIES[modality]
        own = read_region_tensor(regions[number])
        route, plan = spec.route(kind), spec.plan(kind, size, own)
        layouts.append(spec.layout(kind, size, own))
        views = [
            SeenView(v.role, v.row, v.col, v.height, v.width, v.depth, route.encoders[v.encoder], tuple(grid))
            for v, grid in zip(plan.views, route.feature_grids(plan), strict=True)
        ]
        part = parts[number] if number < len(parts) else None
        media.append(
            SeenMedia(
                modality=kind,
                name=Path(name_of(part[part["type"]])).name if part is not None else kind,
                size=tuple(size),
                planner=type(route.planner).__name__,
                tiles=(plan.rows, plan.cols),
                views=views,
                grids=[tuple(grid) for grid in route.token_grids(plan)],
                visual=sum(run.visual for run in layouts[-1]),
                separators=sum(len(run.ids) for run in layouts[-1]),
            )
        )
    return layouts, media


def _tokens(sample: Mapping[str, Any], layouts: Sequence[Any], processor: LlavakitProcessor) -> list[Token]:
    """All positions; a layout begins where its ids and placeholders are next met."""
    ids, labels = list(map(int, sample["input_ids"])), list(map(int, sample["labels"]))
    weights = sample.get("label_weights")
    special = set(special_tokens(processor.tokenizer).values())
    owner: list[tuple[str, int] | None] = [None] * len(ids)
    begin = 0
    for number, layout in enumerate(layouts):
        expected = [i for run in layout for i in ([processor.image_token_id] * run.visual + list(run.ids))]
        kinds = [k for run in layout for k in ([VISUAL] * run.visual + [SEPARATOR] * len(run.ids))]
        lead = next((place for place, kind in enumerate(kinds) if kind == VISUAL), 0)
        while begin < len(ids) and ids[begin : begin + len(expected)] != expected:
            begin += 1
            while begin < len(ids) - lead and ids[begin + lead] != processor.image_token_id:
                begin += 1
        for place, kind in enumerate(kinds[: max(len(ids) - begin, 0)]):
            owner[begin + place] = (kind, number)
        begin += len(expected)
    found = []
    for place, (token, label) in enumerate(zip(ids, labels, strict=True)):
        kind, number = owner[place] or (SPECIAL if token in special else TEXT, None)
        text = "" if kind == VISUAL else text_of_token(token, processor.tokenizer)
        weight = None if weights is None else float(weights[place])
        found.append(Token(token, text, kind, label != IGNORE, number, weight))
    return found


def text_of_token(token: int, tokenizer: Any) -> str:
    """What a token adds to a text, its leading space included."""
    piece = tokenizer.convert_ids_to_tokens(token)
    if piece is None:
        return f"<{token}>"
    if re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
        byte = bytes([int(piece[3:5], 16)])
        return byte.decode("utf-8") if byte.isascii() else piece
    if "▁" in piece:
        return piece.replace("▁", " ")
    return tokenizer.convert_tokens_to_string([piece]) or piece


def stops_of(folder: Path, tokenizer: Any) -> list[str]:
    """Further ids that end a reply, from a checkpoint's generation_config.json."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return []
    try:
        ids = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError):
        return []
    ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
    return [f"{tokenizer.convert_ids_to_tokens(i)} ({i})" for i in ids if isinstance(i, int)]
