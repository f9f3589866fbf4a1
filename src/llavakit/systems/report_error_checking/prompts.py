"""What a model is asked about a draft, and the records that teach it. Source: spec sections 4.3 and 5.

SIMPLE is the wording of the authors' later code; that of COMPLEX is not public, it follows SIMPLE's form.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llavakit.errors import FieldError, quoted

SIMPLE = (
    "Please choose the most suitable one between Y and N as the answer to this question. Does this findings report "
    "about the given chest x-ray, contain any mistakes or errors?\n\n{findings}\nY. mistakes or errors in findings.\n"
    "N. no mistakes or no errors in findings.\n"
)
COMPLEX = (
    "Please choose the most suitable one among A, B and C as the answer to this question. The findings report about "
    "the given chest x-ray contains a mistake. Which type of mistake is it?\n\n{findings}\nA. insert: a statement that "
    "does not belong to the image was added.\nB. remove: a statement about the image is missing.\nC. substitute: a "
    "statement was changed into a wrong one.\n"
)
GAZE = (
    "The chest x-ray image has red dots on top which indicate the eye gaze of the radiologist. The duration of eye "
    "gaze is represented as the darkness of the dots. Use this eye gaze information to answer the question.\n"
)
TYPES = {"insert": "A", "remove": "B", "substitute": "C"}
ANSWERS = {"original": "N", "insert": "Y", "remove": "Y", "replace": "Y", "substitute": "Y"}


def simple_prompt(findings: str, gaze: bool = False) -> str:
    """Whether a draft has a mistake.

    Args:
        gaze: Whether the picture has a radiologist's gaze drawn on it.
    """
    return (GAZE if gaze else "") + SIMPLE.replace("{findings}", findings, 1)


def complex_prompt(findings: str) -> str:
    """Which type of mistake a draft has."""
    return COMPLEX.replace("{findings}", findings, 1)


def conversation(prompt: str, answer: str, picture: bool = True) -> list[dict[str, str]]:
    """Both turns of a training record in LLaVA's form."""
    return [{"from": "human", "value": f"<image>\n{prompt}" if picture else prompt}, {"from": "gpt", "value": answer}]


def gaze_record(entry: Mapping[str, Any], dataset: str, number: int, gaze: bool = True) -> dict[str, Any]:
    """A SIMPLE record of the later project's annotations.

    Args:
        entry: `heatmap_image_id`, `findings_mod` and `label`: original, insert, remove or replace.
        dataset: Beginning of the id.
        number: Of the entry.
        gaze: Whether the pictures are heat maps.

    Raises:
        FieldError: If a field is missing or the label is unknown.
    """
    for name in ("heatmap_image_id", "findings_mod", "label"):
        if not isinstance(entry.get(name), str):
            raise FieldError(name, "is missing; give a text" if name not in entry else "must be a text")
    label = entry["label"].strip()
    if label not in ANSWERS:
        raise FieldError("label", f"must be one of {', '.join(ANSWERS)}, is {quoted(label)}")
    return {
        "id": f"{dataset}_err_{number}",
        "image": entry["heatmap_image_id"].strip(),
        "conversations": conversation(simple_prompt(entry["findings_mod"], gaze), ANSWERS[label]),
    }
