"""What an answer of the Interleave Bench is worth: by the authors' script, and by the evaluation harness's variant.

The two give other numbers for the same answers, the harness usually lower ones. Sources: `evaluate_interleave.py` of
LLaVA-NeXT, and the task `llava_interleave_bench` of lmms-eval.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from llavakit.evaluation.metrics.answers import mean
from llavakit.evaluation.metrics.rouge import rouge_l
from llavakit.evaluation.processors import strip_punctuation

LONGEST = 512  # characters of a prediction that ROUGE-L looks at
OPTIONS = frozenset("abcdefgh")

CATEGORIES: dict[str, tuple[str, ...]] = {
    "spot_the_diff": ("Spot-the-Diff", "Birds-to-Words", "CLEVR-Change"),
    "image_edit_instruct": ("IEdit", "HQ-Edit", "MagicBrush"),
    "visual_story_telling": ("AESOP", "FlintstonesSV", "PororoSV", "VIST"),
    "visual_cloze": ("COMICS_Dialogue", "RecipeQA_VisualCloze"),
    "text_rich_vqa": ("WebQA", "TQA", "OCR-VQA", "DocVQA"),
    "multi_image_vqa": (
        "MIT-States_StateCoherence",
        "MIT-States_PropertyCoherence",
        "VISION",
        "RecipeQA_ImageCoherence",
    ),
    "puzzle": ("RAVEN",),
    "nlrv2": ("NLVR2_Mantis",),
    "qbench": ("QBench",),
}
IN_DOMAIN = tuple(name for name in CATEGORIES if name != "visual_cloze")  # the columns that the paper averages
OUT_OF_DOMAIN = ("MathVerse", "SciVerse", "Mantis", "BLINK", "MMMU-mv")
HARNESS_ALONE = (
    *("ScanQA", "ALFRED", "nuscenes", "ScanNet_chat", "ScanNet_task"),
    *("BLINK", "MathVerse", "SciVerse", "Mantis"),
)
HARNESS_CATEGORIES = CATEGORIES | {name: (name,) for name in HARNESS_ALONE}


def normalised(text: str) -> str:
    """An answer as the authors' script compares it: the punctuation rule of the VQA evaluation, quotes and brackets at
    the ends, lower case; articles and number words stay."""
    text = strip_punctuation(text.replace("\n", " ").replace("\t", " ").strip())
    return text.strip("'").strip('"').strip(")").strip("(").strip().lower()


def overlap(prediction: str, reference: str) -> float | None:
    """ROUGE-L of normalised texts; None for an empty reference, which is not counted."""
    wanted, found = normalised(reference), normalised(prediction)
    if not wanted:
        return None
    return rouge_l(found[:LONGEST], wanted) if found else 0


def chosen(prediction: str, reference: str) -> bool:
    """Whether normalised texts are equal; of a prediction with colons the last part that is one letter from a to h
    counts, if there is one."""
    found = normalised(prediction)
    letters = [part.strip() for part in found.split(":") if part.strip() in OPTIONS] if ":" in found else []
    return (letters[-1] if letters else found) == normalised(reference)


def category_means(datasets: Mapping[str, float | None]) -> dict[str, float]:
    """Unweighted means over the datasets of every category that has one."""
    found = {}
    for category, names in CATEGORIES.items():
        values = [datasets[name] for name in names if datasets.get(name) is not None]
        if values:
            found[category] = sum(values) / len(values)
    return found


# The harness


def harness_letter(text: str) -> str:
    """What the harness compares: the letter of "B. text", else the first isolated letter from A to E (also the article
    "a"), else the normalised text."""
    text = text.strip()
    option = re.match(r"([A-E])\.\s*(.+)$", text, re.IGNORECASE)
    if option:
        return option[1].upper()
    text = normalised(text)
    letter = re.search(r"\b([A-E])\b", text, re.IGNORECASE)
    return letter[1].upper() if letter else text


def harness_chosen(prediction: str, reference: str) -> bool:
    """Whether prediction and reference give the same letter or text."""
    return harness_letter(prediction) == harness_letter(reference)


def harness_overlap(prediction: str, reference: str) -> float:
    """ROUGE-L of the raw texts."""
    return rouge_l(prediction[:LONGEST], reference) if prediction else 0


def harness_overall(scores: Iterable[tuple[str, float]]) -> tuple[dict[str, float], float | None]:
    """Mean per sample of every category, and their unweighted mean.

    Args:
        scores: (dataset, score) of every sample; samples of unknown datasets are not counted.
    """
    of = {name: category for category, names in HARNESS_CATEGORIES.items() for name in names}
    values: dict[str, list[float]] = {}
    for dataset, score in scores:
        if dataset in of:
            values.setdefault(of[dataset], []).append(score)
    means = {category: sum(own) / len(own) for category, own in values.items()}
    return means, mean(means.values())


def harness_question(text: str, kind: str, mcq_post_prompt: str = "", oe_post_prompt: str = "") -> str:
    """A question as the harness asks it.

    A multiple choice with a post-prompt keeps its first line alone; the options behind it are lost, as published.
    """
    if kind == "multi-choice" and mcq_post_prompt:
        return f"{_first_line(text)}\n{mcq_post_prompt}"
    if kind == "open-ended" and oe_post_prompt:
        return f"{text}\n{oe_post_prompt}"
    return text


def _first_line(text: str) -> str:
    return text.split("Your answer is:")[0].split("\n")[0].strip()


def average_of(names: Sequence[str], values: Mapping[str, float | None]) -> float | None:
    """The mean of all named values; None if one is missing."""
    found = [values.get(name) for name in names]
    return None if any(value is None for value in found) else sum(found) / len(found)
