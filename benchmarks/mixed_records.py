"""Training records of the phantom world in the proportions of LLaVA's, for the benchmarks of training."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from llavakit.phantom.write import write_world


def mixed_records(folder: Path, count: int) -> list[dict[str, Any]]:
    """Records in LLaVA's proportions: dialogues about a picture, single questions, and a sixth text alone."""
    write_world("scene", folder, n=count, seed=0, formats="short,sentence", progress=False)
    dialogues = json.loads((folder / "train.json").read_text())
    rng = random.Random(0)
    records = []
    for number in range(count):
        source = dialogues[number % len(dialogues)]
        turns = source["conversations"]
        if number % 6 < 2:  # a whole dialogue
            records.append(source)
        elif number % 6 < 5:  # one question
            place = 2 * rng.randrange(len(turns) // 2)
            question = turns[place]["value"].removeprefix("<image>\n")
            single = [{"from": "human", "value": f"<image>\n{question}"}, turns[place + 1]]
            records.append({"image": source["image"], "conversations": single})
        else:  # text alone: two dialogues as a story
            other = dialogues[(number * 7 + 1) % len(dialogues)]["conversations"]
            answers = " ".join(turn["value"] for turn in [*turns, *other] if turn["from"] == "gpt")
            text = [{"from": "human", "value": "Describe a picture."}, {"from": "gpt", "value": answers}]
            records.append({"conversations": text})
    return records
