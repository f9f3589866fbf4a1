"""Training lists: three files of dialogues as one file in the order in which the original trains on them.

    llavakit prepare reflective_list data/ReflectiVA-Data train.json seed=42

The source is a folder with `train_multiturn_infoseek.json`, `train_multiturn_encyclopedic.json` and
`train_multiturn_mix.json`, or some of them. Dialogues of the first two ask for a passage and say whether it helps;
those of the third are visual instructions that need none.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from llavakit.data.preparation import Left, write_records
from llavakit.errors import UserError
from llavakit.evaluation.records import Record, read_records
from llavakit.systems.reflectiva.prompts import DEFAULT, Frame, frame_of

FILES = ("infoseek", "encyclopedic", "mix")
IDS = {"infoseek": "__key__", "encyclopedic": "unique_id", "mix": "id"}
PARAGRAPH = 2  # number of the turn with the paragraph


def framed(record: Record, frame: Frame) -> dict[str, Any]:
    """A dialogue whose third turn, if there is one, has the text around its paragraph.

    Raises:
        RecordError: If it is no dialogue.
    """
    data = copy.deepcopy(record.data)
    turns = record.get("conversations", list)
    if not all(isinstance(turn, dict) and isinstance(turn.get("value"), str) for turn in turns):
        raise record.error("conversations", "must be a list of turns with a text `value`")
    if len(turns) > PARAGRAPH:
        data["conversations"][PARAGRAPH]["value"] = f"{frame.before}{turns[PARAGRAPH]['value']}{frame.after}"
    return data


def ordered(
    asking: Sequence[Any],
    direct: Sequence[Any],
    *,
    resampler: str,
    shuffle: Callable[[list[Any]], None],
) -> list[Any]:
    """Both kinds of dialogues as one shuffled list.

    Args:
        asking: Dialogues that ask for a passage.
        direct: Dialogues that need none.
        resampler: "vanilla" takes all; "multiply" repeats those that ask as often as they go into the others; "divide"
            takes as many of the others, drawn at random.
        shuffle: Shuffles a list in place.

    Raises:
        UserError: If there is nothing to repeat.
    """
    asking, direct = list(asking), list(direct)
    if resampler == "multiply":
        if not asking:
            raise UserError("resampler: multiply has no dialogue that asks for a passage to repeat")
        asking *= len(direct) // len(asking)
    elif resampler == "divide":
        shuffle(direct)
        direct = direct[: len(asking)]
    found = direct + asking
    shuffle(found)
    return found


def reflective_list(
    source: Path,
    output: Path,
    bad: Left,
    *,
    template_paragraph: str = DEFAULT,
    resampler: Literal["vanilla", "multiply", "divide"] = "vanilla",
    repeats: int = 3,
    seed: int = 42,
) -> dict[str, Any]:
    """Preparation of ReflectiVA's training data.

    Args:
        template_paragraph: Name of the text around paragraphs, see `prompts.FRAMES`.
        resampler: See `ordered`.
        repeats: How often the dialogues that need no passage are taken.
        seed: Of the order.

    Raises:
        UserError: If a file is missing.
    """
    frame = frame_of(template_paragraph)
    if repeats < 0:
        raise UserError(f"repeats: must be at least 0, not {repeats}")
    found: dict[str, list[dict[str, Any]]] = {}
    for name in FILES:
        file = source / f"train_multiturn_{name}.json"
        found[name] = []
        if not file.is_file():
            continue
        for record in read_records(file, bad):
            try:
                made = framed(record, frame if name != "mix" else Frame(""))
            except UserError as error:
                bad(error)
                continue
            key = IDS[name]
            number = {"id": made[key]} if key in made else {}
            found[name].append({**made, **number, "asks_for_passage": name != "mix"})
    if not any(found.values()):
        raise UserError(f"{source}: holds no dialogue in train_multiturn_NAME.json, NAME one of {', '.join(FILES)}")
    shuffle = random.Random(seed).shuffle
    asking, direct = found["infoseek"] + found["encyclopedic"], found["mix"] * repeats
    records = ordered(asking, direct, resampler=resampler, shuffle=shuffle)
    return {"records": write_records(output, records), **{name: len(rows) for name, rows in found.items()}}
