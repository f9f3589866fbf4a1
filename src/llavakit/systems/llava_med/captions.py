"""Figures and their captions as instructions of one turn, for the alignment of the connector.

    llavakit prepare figure_captions captions.jsonl alignment.json

A caption of up to 30 words answers a question for a brief description, a longer one a question for a detailed one.
Which question of a list is asked, and whether the picture stands before or behind it, depends on the figure's id alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llavakit.data.preparation import Left, write_records
from llavakit.data.readers import open_source
from llavakit.errors import RecordError, quoted
from llavakit.systems.llava_med.instruct import with_image

MOST_WORDS = 30  # of a caption that is called brief
IDS, CAPTIONS = ("pair_id", "id"), ("fig_caption", "caption")  # names of the fields

BRIEF = (
    "Describe the image concisely.",
    "Say briefly what the image shows.",
    "Give a short description of the figure.",
    "Summarise in a few words what can be seen.",
    "What does this image show, in brief?",
    "Write a terse account of the image.",
    "Name the main content of the picture shortly.",
    "Give a compact explanation of the figure.",
    "In one sentence, what is shown here?",
    "Provide a brief account of this biomedical image.",
)
DETAILED = (
    "Describe the image in detail.",
    "Explain thoroughly what the image shows.",
    "Give an extensive description of the figure.",
    "What can be seen in this image? Go through the details.",
    "Write a full account of this biomedical image.",
    "Walk through everything that the figure presents.",
    "Analyse the picture and describe its contents in depth.",
    "Explain the various aspects of the figure that you see.",
    "Provide a comprehensive description of the image.",
    "Describe what is shown, part by part.",
)


def alignment_record(figure: Mapping[str, Any], most_words: int = MOST_WORDS) -> dict[str, Any]:
    """A figure's caption as the answer to a question.

    Args:
        figure: `pair_id` (or `id`), `fig_caption` (or `caption`), and optionally `image` and `domain`.
        most_words: Of a caption that is called brief.
    """
    name, caption = (next(figure[key] for key in keys if figure.get(key) is not None) for keys in (IDS, CAPTIONS))
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    questions = BRIEF if len(caption.split()) <= most_words else DETAILED
    turns = [{"from": "human", "value": questions[number // 2 % len(questions)]}, {"from": "gpt", "value": caption}]
    made = {"id": name, "image": figure.get("image") or f"{name}.jpg", "conversations": turns}
    if figure.get("domain") is not None:
        made["domain"] = figure["domain"]
    return with_image(made, image_behind=bool(number % 2))


def figure_captions(source: Path, output: Path, bad: Left, *, most_words: int = MOST_WORDS) -> dict[str, Any]:
    """Alignment records of figures.

    Args:
        most_words: Of a caption that is asked for with a brief question.
    """
    entries = open_source(source)

    def kept() -> Iterator[dict[str, Any]]:
        for number in range(len(entries)):
            try:
                figure = entries[number]
                _check(figure, str(source), entries.line(number))
            except RecordError as error:
                bad(error)
                continue
            yield alignment_record(figure, most_words)

    written = write_records(output, kept())
    return {"records": len(entries), "written": written}


def _check(figure: Any, file: str, line: int) -> None:
    if not isinstance(figure, Mapping):
        raise RecordError(file, line, "record", f"is {quoted(figure)}, it should be an object")
    for keys in (IDS, CAPTIONS):
        field = next((key for key in keys if figure.get(key) is not None), keys[0])
        value = figure.get(field)
        if not isinstance(value, str) or not value.strip():
            raise RecordError(file, line, field, f"is {quoted(value)}, it should be a text")
    if not isinstance(figure.get("image"), str | None):
        raise RecordError(file, line, "image", f"is {quoted(figure['image'])}, it should be the name of a file")
