"""MG-LLaVA's evaluation where it differs: sentences behind questions, and how answers are read (spec section 7).

TextVQA, GQA and VQAv2 are asked and scored as in LLaVA-1.5.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llavakit.evaluation.benchmarks.base import SHORT_ANSWER, Question
from llavakit.evaluation.benchmarks.generic import ExactMatch, ListedBenchmark, RelaxedAccuracy, texts_of
from llavakit.evaluation.benchmarks.mmbench import MMBench
from llavakit.evaluation.benchmarks.mme import MME
from llavakit.evaluation.benchmarks.pope import POPE
from llavakit.evaluation.metrics.answers import edit_distance
from llavakit.evaluation.processors import strip_punctuation
from llavakit.evaluation.records import Record

ONE_NUMBER = "Answer the question using a single number."
YES_OR_NO = "Please answer the question with yes or no."
MME_ASKS, MME_IS_ASKED = "Please answer yes or no.", "Please answer the question only a single word yes or no."
ANLS_THRESHOLD = 0.5
_CHINESE = re.compile("[\u4e00-\u9fff]")


def yes_or_no(text: str) -> str:
    """ "Yes" or "No" if one of them is a word of the text, whatever its case; "Unknown" if both or neither are."""
    words = strip_punctuation(text.lower()).split()
    if ("yes" in words) == ("no" in words):
        return "Unknown"
    return "Yes" if "yes" in words else "No"


def first_letters(text: str) -> str:
    """The first run of the letters A to D anywhere in a text, so "Answer: B" gives "A"; "" if there is none."""
    found = re.search("[A-D]+", text)
    return found[0] if found else ""


def distance(reference: str, prediction: str) -> float:
    """Edit distance of normalised texts over the length of the longer text as it is written."""
    longest = max(len(reference.upper()), len(prediction.upper()))
    a, b = (" ".join(text.lower().split()) for text in (reference, prediction))
    return edit_distance(a, b) / longest if longest else 0.0


class MultipleChoice(MMBench):
    """MMBench, SEED, MMStar, AI2D and ScienceQA in MMBench's table; the answer is the first run of letters."""

    title = "Multiple choice (MG-LLaVA)"
    letters = tuple(string.ascii_uppercase)  # all are shown; only A to D are read in answers

    def is_chinese(self, row: Mapping[str, Any]) -> bool:
        """Whether a hint, question or option has a Chinese character."""
        texts = (row.get(name) for name in ("hint", "question", *self.letters))
        return any(_CHINESE.search(text) for text in texts if isinstance(text, str))

    def chosen(self, record: Record, row: Record) -> str | None:
        """The original letter of the option that a prediction chose."""
        order = record.get("option_char", list, ["A", "B", "C", "D"])
        letters = first_letters(record.get("text", str))
        return order["ABCD".index(letters)] if len(letters) == 1 and "ABCD".index(letters) < len(order) else None


class YesNoPOPE(POPE):
    """POPE; an answer that says neither or both counts as no."""

    title = "POPE (MG-LLaVA)"
    suffix = YES_OR_NO

    def answer(self, text: str) -> str:
        """ "yes" or "no"."""
        return "yes" if yes_or_no(text) == "Yes" else "no"


class YesNoMME(MME):
    """MME with its own sentence; an answer that says neither or both is wrong."""

    title = "MME (MG-LLaVA)"
    suffix = ""

    def questions(self, path: str | Path, images: str | Path | None = None, **options: Any) -> list[Question]:
        """Questions of LLaVA's JSONL, or of the official folder."""
        found = []
        for question in super().questions(path, images, **options):
            text = asked_of_mme(question.text)
            found.append(replace(question, text=text, stored={**question.stored, "prompt": text}))
        return found

    def answer(self, text: str) -> str:
        """What `mme_scores` reads."""
        return yes_or_no(text)


def asked_of_mme(text: str) -> str:
    """MME's question with MG-LLaVA's sentence."""
    return text.replace(MME_ASKS, MME_IS_ASKED)


class ChartQA(RelaxedAccuracy):
    """ChartQA."""

    title = "ChartQA (MG-LLaVA)"
    suffix = SHORT_ANSWER


class OCRVQA(ExactMatch):
    """OCRVQA: exact match."""

    title = "OCRVQA (MG-LLaVA)"
    suffix = SHORT_ANSWER


class TallyQA(ExactMatch):
    """TallyQA: exact match of a number."""

    title = "TallyQA (MG-LLaVA)"
    suffix = ONE_NUMBER


class HallusionBench(ListedBenchmark):
    """Yes/no questions of HallusionBench; an answer that says neither or both is wrong."""

    title = "HallusionBench (MG-LLaVA)"
    suffix = YES_OR_NO

    def value(self, question: Record, text: str) -> float:
        """Whether the answer is that of the record, yes or no."""
        return yes_or_no(text).lower() == texts_of(question)[0].strip().lower()


class DocVQA(ListedBenchmark):
    """DocVQA: ANLS whose distance is divided by the length of the texts as they are written."""

    title = "DocVQA (MG-LLaVA)"
    suffix = SHORT_ANSWER
    metric = "anls"

    def value(self, question: Record, text: str) -> float:
        """Similarity to the nearest answer, 0 below one half."""
        similarity = 1 - min(distance(answer, text) for answer in texts_of(question))
        return similarity if similarity >= ANLS_THRESHOLD else 0.0
