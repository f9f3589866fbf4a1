"""LLaVA-Plus's training data: its records as those of LLaVA, records of annotations, and records of phantom scenes.

    llavakit prepare llava_plus llava-plus-v1-117k-tool-merge.json train.json
    llavakit prepare llava_plus_grounding annotations.json published.json
    llavakit prepare llava_plus_scenes data/scene published.json mode=fly

A published record has `thoughts`, `actions` and `value` in the turns that are not the human's; they become the three
lines that the model writes (`grammar.join`). Source: `reorganize_source_for_tool_use_batch` and
`playground/llava-plus-data/grounding/collect_data.py` of the published code.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from llavakit.data.preparation import Left, write_records
from llavakit.data.readers import open_source
from llavakit.errors import FieldError, MediaError, RecordError, UserError, quoted
from llavakit.media.image import load_image
from llavakit.phantom import words
from llavakit.phantom.base import check_choice
from llavakit.systems.llava_plus.agent import published
from llavakit.systems.llava_plus.grammar import FIELDS, NOTICE, asked_again, join, written
from llavakit.systems.llava_plus.results import result_text, rounded
from llavakit.tools.artefacts import Artefacts
from llavakit.tools.configuration import build_skill
from llavakit.tools.toolbox import Toolbox, renamed

HUMAN, MODEL = "human", "gpt"
MARK = "<image>"
DETECTOR = "grounding_dino"
THANKS = "Thanks to the output of {}. I can answer the question better."
THOUGHTS = (
    "The question needs the position of objects. A detector will find them.",
    "To answer well I should look for the objects in the image with a detector first.",
    "This asks where something is, so I will call a detector and read its boxes.",
)
NAMED = "grounding dino"  # an answer that says so is dropped, as published


def merged(turns: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Turns in which the three fields of those that are not the human's are lines of `value`; other fields stay."""
    found = []
    for turn in turns:
        if turn["from"].lower() == HUMAN:
            found.append(dict(turn))
        else:
            rest = {name: own for name, own in turn.items() if name not in FIELDS}
            found.append(rest | {"value": join(turn)})
    return found


def _checked(turns: Any, where: str = "conversations") -> Sequence[Mapping[str, Any]]:
    """Turns of a published record.

    Raises:
        FieldError: If a turn has another form.
    """
    if isinstance(turns, (str, bytes)) or not isinstance(turns, Sequence):
        raise FieldError(where, f"must be a list of turns, not {type(turns).__name__}")
    for number, turn in enumerate(turns):
        place = f"{where}.{number}"
        speaker = turn.get("from") if isinstance(turn, Mapping) else None
        if not isinstance(speaker, str):
            raise FieldError(place, f"must be an object with from, not {quoted(turn)}")
        for name in ("thoughts", "value"):
            if name in turn and not isinstance(turn[name], str):
                raise FieldError(f"{place}.{name}", f"must be text, not {quoted(turn[name])}")
        if speaker.lower() == HUMAN:
            if "value" not in turn:
                raise FieldError(f"{place}.value", "is missing")
        elif not any(name in turn for name in FIELDS):
            raise FieldError(place, f"needs one of {', '.join(FIELDS)}")
    return turns


def _entries(source: Path, bad: Left) -> Iterator[tuple[int, Any]]:
    """Entries of a data file with their lines."""
    entries = open_source(source)
    for number in range(len(entries)):
        try:
            yield entries.line(number), entries[number]
        except RecordError as error:
            bad(error)


def training_records(source: Path, output: Path, bad: Left) -> dict[str, Any]:
    """Published records as LLaVA's, with the picture's name under `image` and one marker for it."""

    def records() -> Iterator[dict[str, Any]]:
        for line, raw in _entries(source, bad):
            try:
                yield _training_record(raw)
            except FieldError as error:
                bad(RecordError(str(source), line, error.field, error.problem))

    return {"records": write_records(output, records())}


def _training_record(raw: Any) -> dict[str, Any]:
    if not isinstance(raw, Mapping):
        raise FieldError("record", f"must be an object, not {quoted(raw)}")
    turns = [
        {"from": HUMAN if turn["from"].lower() == HUMAN else MODEL, "value": turn["value"]}
        for turn in merged(_checked(raw.get("conversations")))
    ]
    name = raw.get("image") or raw.get("file_name")
    seen = False
    for turn in turns:
        if turn["from"] != HUMAN or MARK not in turn["value"]:
            continue
        turn["value"] = turn["value"].replace(MARK, "").strip()
        if not seen:
            turn["value"] = f"{MARK}\n{turn['value']}"
        seen = True
    if name is not None and not seen:
        raise FieldError("conversations", f"no place for {MARK} in a record with a picture")
    if name is None and seen:
        raise FieldError("image", f"is missing, though {MARK} stands in the text")
    kept = {"id": raw["unique_id"]} if "unique_id" in raw else {"id": raw["id"]} if "id" in raw else {}
    return kept | ({"image": name} if name is not None else {}) | {"conversations": turns}


def grounding_record(
    item: Mapping[str, Any], thoughts: str, draws: random.Random, *, repeat_marker: bool = False
) -> tuple[dict[str, Any], bool]:
    """A published record of a labelled detection, and whether the pipeline drops it, since the answer names the tool.

    Args:
        item: `question`, `grounding_dino_input` and `_output`, `answer`, and the picture's names.
        thoughts: Of the first answer.
        draws: Puts the marker before or after a question that has none, with equal chance.
        repeat_marker: Whether the marker is in the result's turn too, as published: two places for one picture.

    Raises:
        FieldError: If a field is missing or of another type.
    """
    texts = {}
    for name in ("question", "grounding_dino_input", "answer"):
        texts[name] = item.get(name)
        if not isinstance(texts[name], str):
            raise FieldError(name, f"must be text, not {quoted(texts[name])}")
    result = item.get("grounding_dino_output")
    if not isinstance(result, Mapping):
        raise FieldError("grounding_dino_output", f"must be an object, not {quoted(result)}")
    question = texts["question"]
    if MARK not in question:
        question = draws.choice((f"{MARK}\n{question}", f"{question}\n{MARK}"))
    asked = question if repeat_marker else question.replace(MARK, "").strip()
    told = {key: value for key, value in result.items() if key != "size"}
    found = f"{DETECTOR} output: {told}\n\nAnswer my first question: {asked}"
    call = [written(DETECTOR, {"caption": texts["grounding_dino_input"]})]
    record = {
        "unique_id": item.get("unique_id"),
        "image_id": item.get("image_id"),
        "file_name": item.get("image_file_name"),
        "data_source": item.get("data_source", "coco"),
        "conversations": [
            {"from": HUMAN, "value": question},
            {"from": MODEL, "thoughts": thoughts, "actions": call, "value": NOTICE.format(DETECTOR)},
            {"from": HUMAN, "value": found},
            {"from": MODEL, "thoughts": THANKS.format(DETECTOR), "actions": [], "value": texts["answer"]},
        ],
    }
    return record, NAMED in texts["answer"].lower()


def grounding_records(
    source: Path, output: Path, bad: Left, *, seed: int = 0, repeat_marker: bool = False
) -> dict[str, Any]:
    """Labelled detections as published records; those whose answer names the tool are dropped."""
    draws, ideas = random.Random(seed), random.Random(seed + 1)
    dropped = 0

    def records() -> Iterator[dict[str, Any]]:
        nonlocal dropped
        for line, item in _entries(source, bad):
            try:
                if not isinstance(item, Mapping):
                    raise FieldError("record", f"must be an object, not {quoted(item)}")
                record, filtered = grounding_record(item, ideas.choice(THOUGHTS), draws, repeat_marker=repeat_marker)
            except FieldError as error:
                bad(RecordError(str(source), line, error.field, error.problem))
                continue
            dropped += filtered
            if not filtered:
                yield record

    count = write_records(output, records())
    return {"records": count, "dropped": dropped}


# Phantom scenes with the real skills

PLAIN_THOUGHTS = "The questions can be answered by the information in the context, without need any external tools."
NEED = "To answer this I need {}, so I will use a tool."
_GROUND = re.compile(rf"^{re.escape(words.GROUND)} (.+)\.$")
_RELATION = re.compile(r"^Is the (.+) (?:left of|right of|above|below) the (.+)\?$")
_COUNT = "How many objects are there?"
_SIGN = "What does the sign say?"
MODES = ("fly", "all")


def scene_records(
    source: Path,
    output: Path,
    bad: Left,
    *,
    mode: str = "fly",
    read: bool = True,
    detector: str = "detect_shapes",
    reader: str = "ocr",
) -> dict[str, Any]:
    """Published records of scenes of `llavakit phantom scene`, with what the real skills find in them.

    Args:
        source: The folder, or one of its record files (`heldout.json`).
        mode: "fly": a call in every turn that needs one; "all": what both tools find stands in front of the first
            question, and no turn calls one.
        read: Whether signs are read, about a second a picture; if not, questions about them are left out.
        detector, reader: What the two skills are called.

    Raises:
        UserError: If the mode is unknown or the skills cannot run here.
    """
    check_choice("mode", mode, MODES)
    source = source / "train.json" if source.is_dir() else source
    box = Toolbox([renamed(build_skill("detect_shapes"), detector), renamed(build_skill("ocr"), reader)])
    maker = _Scenes(box, detector, reader if read else None, mode)
    for name in (detector, *([reader] if read else [])):
        if why := box.state(box.skills[name]):
            raise UserError(f"{name}: {why}")

    def records() -> Iterator[dict[str, Any]]:
        for line, raw in _entries(source, bad):
            try:
                record = maker.record(raw, source.parent)
            except (FieldError, MediaError) as error:
                field = error.field if isinstance(error, FieldError) else "image"
                bad(RecordError(str(source), line, field, str(error)))
                continue
            if record is not None:
                yield record

    count = write_records(output, records())
    return {"records": count, "calls": maker.calls, "questions left out": maker.dropped}


class _Scenes:
    """Makes records of scenes.

    Attributes:
        calls, dropped: Calls in the records, and questions that the skills could not help with.
    """

    def __init__(self, toolbox: Toolbox, detector: str, reader: str | None, mode: str) -> None:
        self.toolbox, self.detector, self.reader, self.mode = toolbox, detector, reader, mode
        self.calls = self.dropped = 0

    def record(self, raw: Any, folder: Path) -> dict[str, Any] | None:
        """A published record; None if no question of the scene is left."""
        turns = raw.get("conversations") if isinstance(raw, Mapping) else None
        if not isinstance(turns, list) or not isinstance(raw.get("image"), str):
            raise FieldError("conversations", "must be a scene's turns, beside its image")
        image = load_image(folder / raw["image"])
        made: list[dict[str, Any]] = []
        for asked, answered in zip(turns[::2], turns[1::2], strict=False):
            question = str(asked["value"]).replace(MARK, "").strip().partition("\n")[0]
            own = self._turns(question, str(answered["value"]), image, first=not made)
            self.dropped += not own
            made += own
        if not made:
            return None
        made[0]["value"] = f"{MARK}\n{made[0]['value']}"
        return {"unique_id": raw.get("id"), "image": raw["image"], "data_source": "phantom", "conversations": made}

    def _turns(self, question: str, answer: str, image: Image.Image, first: bool) -> list[dict[str, Any]]:
        name, params = self._call(question)
        if name == "":
            return []
        result = None if name is None else self._run(name, params, image)
        value = self._value(question, answer, result)
        if value is None:
            return []
        asked = {"from": HUMAN, "value": question}
        plain = {"from": MODEL, "thoughts": PLAIN_THOUGHTS, "actions": [], "value": value}
        if self.mode == "all":
            if first:
                tools = [(self.detector, {}), *([(self.reader, {})] if self.reader else [])]
                told = [result_text(own, self._run(own, given, image)) for own, given in tools]
                asked["value"] = "\n".join(told) + f"\n\n{question}"
            return [asked, plain]
        if name is None:
            return [asked, plain]
        self.calls += 1
        thoughts = NEED.format("the positions of objects" if name == self.detector else "the text in the image")
        return [
            asked,
            {"from": MODEL, "thoughts": thoughts, "actions": [written(name, params)], "value": NOTICE.format(name)},
            {"from": HUMAN, "value": asked_again(result_text(name, result), question)},
            plain | {"thoughts": THANKS.format(name)},
        ]

    def _call(self, question: str) -> tuple[str | None, dict[str, Any]]:
        """The tool that a question needs, with its arguments; None for no tool, "" for one that is not used."""
        if found := _GROUND.match(question):
            return self.detector, {"caption": found[1].lower()}
        if found := _RELATION.match(question):
            return self.detector, {"caption": f"{found[1]} . {found[2]}"}
        if question == _COUNT:
            return self.detector, {"caption": "object"}
        if question == _SIGN:
            return self.reader or "", {}
        return None, {}

    def _run(self, name: str, params: Mapping[str, Any], image: Image.Image) -> dict[str, Any]:
        return published(self.toolbox.call(name, params, Artefacts(image)))

    def _value(self, question: str, answer: str, result: Mapping[str, Any] | None) -> str | None:
        """The answer as the tool bears it out; None where it does not."""
        if result is None or _RELATION.match(question):
            return answer
        if question == _SIGN:
            word = answer.rstrip(".").split()[-1]
            return answer if word in [text.strip() for text in result.get("texts", ())] else None
        if found := _GROUND.match(question):
            boxes = rounded(result.get("boxes", []))
            return f"The {found[1].lower()} is at {boxes[0]}." if len(boxes) == 1 else None
        return answer
