"""Questions as LLaVA-o1 was evaluated with them, per benchmark; others are asked as they are. Source: VLMEvalKit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_CHART = "You are provided a chart image and will be asked a question. "
_THINK = "<cot_start>Let's think step by step."
_CHART_11B = (
    _CHART
    + "You have to think through your answer and provide a step-by-step solution. Once you have the solution, write "
    'the final answer in at most a few words at the end with the phrase "FINAL ANSWER:". The question is: {question}'
)
_CHART_90B = (
    _CHART + "Follow these steps carefully:\n"
    " Step 1: Analyze the question to understand what specific data or information is being asked for. Focus on "
    "whether the "
    "question is asking for a specific number or category from the chart image.\n"
    " Step 2: Identify any numbers, categories, or groups mentioned in the question and take note of them. Focus on "
    "detecting and matching them directly to the image. \n"
    "Step 3: Study the image carefully and find the relevant data corresponding to the categories or numbers "
    "mentioned. "
    "Avoid unnecessary assumptions or calculations; simply read the correct data from the image.\n"
    " Step 4: Develop a clear plan to solve the question by locating the right data. Focus only on the specific "
    "category or "
    "group that matches the question. \n"
    "Step 5: Use step-by-step reasoning to ensure you are referencing the correct numbers or data points from the "
    "image, "
    "avoiding unnecessary extra steps or interpretations.\n"
    ' Step 6: Provide the final answer, starting with "FINAL ANSWER:" and using as few words as possible, simply '
    "stating "
    "the number or data point requested. \n\n The question is: {question}"
)
_DOCUMENT = (
    "Read the text in the image carefully and answer the question with the text as seen exactly in the image. For "
    "yes/no "
    "questions, just respond Yes or No. If the answer is numeric, just respond with the number and nothing else. If "
    "the "
    "answer has multiple words, just respond with the words and absolutely nothing else. Never respond in a sentence "
    "or a "
    "phrase.\n Question: {question}"
)
_DIAGRAM = (
    "Look at the scientific diagram carefully and answer the following question: {question}\n"
    "Respond only with the correct option digit."
)
_MMMU = (
    "Look at the image carefully and solve the following question step-by-step. Question: {question} Options: "
    "{options} "
    "Indicate the correct answer at the end."
)
LONG, SHORT = 2048, 512  # most new tokens


SIZES = ("11B", "90B")
WORDED_BY_SIZE = ("AI2D", "ChartQA")


def size_of(model: str) -> str | None:
    """The size that a model's name says; None if it says neither."""
    return next((size for size in SIZES if size in model), None)


def asked(
    dataset: str, question: str, options: Mapping[str, Any], size: str | None = "11B", pictures: int = 1
) -> tuple[str, int] | None:
    """Text and most new tokens of a question; None where the benchmark has no wording of its own.

    Args:
        dataset: VLMEvalKit's name (`AI2D_TEST`, `MMMU_DEV_VAL`, `MathVista_MINI`, `ChartQA_TEST`, `DocVQA_VAL`).
        options: Texts by letter.
        size: "11B" or "90B", for which the chart questions differ; for other models AI2D and ChartQA have no wording.
        pictures: Of the question; their marks (`<image 1>`) are left out of MMMU's.
    """
    if size is None and any(name in dataset for name in WORDED_BY_SIZE):
        return None
    listed = [f"{letter}. {text}" for letter, text in options.items()]
    if "AI2D" in dataset:
        return _DIAGRAM.format(question="\n".join([question, *listed])), LONG
    if "MMMU" in dataset:
        text = _MMMU.format(question=question, options="\n".join(listed))
        for number in range(pictures):
            text = text.replace(f"<image {number + 1}>", "")
        return text, LONG
    if "MathVista" in dataset:
        return question, LONG
    if "ChartQA" in dataset:
        return (_CHART_90B if size == "90B" else _CHART_11B).format(question=question) + _THINK, SHORT
    if "DocVQA" in dataset:
        return _DOCUMENT.format(question=question), SHORT
    return None
