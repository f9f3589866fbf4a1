"""Questions about findings with retrieved triplets in front, and training records made of them.

llavakit prepare kg_conversations mimic_nle.json train.json retrieved=retrieved_triplets.json
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llavakit.data.preparation import Left, write_records
from llavakit.data.readers import open_source
from llavakit.data.strict_json import read_json
from llavakit.errors import RecordError, UserError, quoted

TRIPLETS, SEED = 7, 42
DIAGNOSES = (
    "Atelectasis",
    "Consolidation",
    "Edema",
    "Enlarged Cardiomediastinum",
    "Lung Lesion",
    "Lung Opacity",
    "Pleural Effusion",
    "Pleural Other",
    "Pneumonia",
    "Pneumothorax",
)
QUESTIONS = (
    "Which signs show that the patient has {pathologies}?",
    "Explain why these {pathologies} are present in the image.",
    "What evidence in the image indicates {pathologies}?",
    "How can you tell that the patient has {pathologies} from the image?",
    "What features suggest the presence of {pathologies} in this image?",
)
SPLITS = ("train", "val")


def pathologies(labels: Sequence[Sequence[Any]]) -> str:
    """Which diagnoses a picture has, in words; negatives are not mentioned.

    Args:
        labels: `[negative, uncertain, positive]` of every diagnosis, in the order of `DIAGNOSES`.
    """
    found = []
    for name, (_, uncertain, positive) in zip(DIAGNOSES, labels, strict=False):
        found += [f"uncertain {name}"] * bool(uncertain) + [f"positive {name}"] * bool(positive)
    return ", ".join(found)


def question(labels: Sequence[Sequence[Any]], template: int) -> str:
    """One of the five questions."""
    return QUESTIONS[template].format(pathologies=pathologies(labels))


def with_triplets(triplets: Sequence[str], asked: str, most: int = TRIPLETS) -> str:
    """A question behind the first of the triplets; without any, as published, an empty list stands there."""
    listed = "; ".join(triplets[:most])
    return f"The image-specific triplets from the knowledge graph are: {listed}. And for the given image, {asked}"


def kg_conversations(
    source: Path,
    output: Path,
    bad: Left,
    *,
    retrieved: str,
    triplets: int = TRIPLETS,
    seed: int = SEED,
    splits: Sequence[str] | str = SPLITS,
    image: bool = True,
) -> dict[str, Any]:
    """Training records of MIMIC-NLE's explanations and the triplets that were retrieved for their pictures.

    As published, records are told apart by the picture alone: of several explanations of a picture the last is kept,
    in the place of the first. `template` in a record is the number of its question.

    Args:
        retrieved: JSON file of picture ids and their triplets, from `kg_triplets` or the original code.
        triplets: Most triplets of a prompt.
        seed: Of the draws of questions, one for every record that is written, in order.
        splits: Splits that are kept.
        image: Write the picture's mark into the question; test files of the original code go without.
    """
    found = read_json(retrieved, kind=dict)
    kept = (splits,) if isinstance(splits, str) else tuple(splits)
    if isinstance(triplets, bool) or not isinstance(triplets, int) or triplets < 0:
        raise UserError(f"triplets {quoted(triplets)}: must be a number from 0 on")
    for key, listed in found.items():
        if not isinstance(listed, list) or not all(isinstance(one, str) for one in listed):
            raise UserError(f"{retrieved}: {quoted(key)}: is {quoted(listed)}, it should be a list of triplets")
    by_image: dict[str, Mapping[str, Any]] = {}
    entries = open_source(source)
    for number in range(len(entries)):
        try:
            record = entries[number]
            check(record, str(source), entries.line(number), kept)
        except RecordError as error:
            bad(error)
            continue
        by_image[str(record["img_id"])] = record
    draws = random.Random(seed)

    def records() -> Iterator[dict[str, Any]]:
        for key, record in by_image.items():
            if record["split"] not in kept:
                continue
            template = draws.choice(range(len(QUESTIONS)))
            asked = with_triplets(found.get(key, ()), question(record["img_labels"], template), triplets)
            turns = [("human", f"<image>\n{asked}" if image else asked), ("gpt", record["nle"])]
            yield {
                "id": key,
                "split": record["split"],
                "image": record["img_path"],
                "conversations": [{"from": who, "value": value} for who, value in turns],
                "template": template,
            }

    written = write_records(output, records())
    without = sum(1 for key in by_image if not found.get(key))
    return {"records": len(entries), "written": written, "without_triplets": without}


def check(record: Any, file: str, line: int, splits: Sequence[str] = SPLITS) -> None:
    """The fields of a MIMIC-NLE record; of one that is not kept, its id and split.

    Raises:
        RecordError: Naming the first that is not as it should be.
    """

    def refuse(field: str, wanted: str) -> RecordError:
        value = record.get(field) if isinstance(record, Mapping) else record
        return RecordError(file, line, field, f"is {quoted(value)}, it should be {wanted}")

    if not isinstance(record, Mapping):
        raise refuse("record", "an object")
    if isinstance(record.get("img_id"), bool) or not isinstance(record.get("img_id"), (str, int, float)):
        raise refuse("img_id", "the picture's id")
    if not isinstance(record.get("split"), str):
        raise refuse("split", "text")
    if record["split"] not in splits:
        return
    for field in ("nle", "img_path"):
        if not isinstance(record.get(field), str):
            raise refuse(field, "text")
    labels = record.get("img_labels")
    triples = isinstance(labels, list) and all(isinstance(one, list) and len(one) == 3 for one in labels)
    if not triples or len(labels) > len(DIAGNOSES):
        raise refuse("img_labels", f"up to {len(DIAGNOSES)} triples of negative, uncertain and positive")
