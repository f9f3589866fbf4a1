"""How LLaVA-o1 judges two candidates: the published prompts, what the judge is shown, and what its reply means.

The prompts are byte for byte the published ones, slips included ("Repsonse"). A candidate without the stage that is
judged loses without a call; the published code dropped it from the list and judged the wrong pair, or failed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from llavakit.systems.llava_o1.stages import NAMES, sections

ALL, SENTENCE = "ALL", "SENTENCE"
_TASK = "Now you act as a judge, helping me determine which of the two texts I provide "
_FORMAT = (
    " Please strictly follow the following format requirements when outputting, and don’t have any other unnecessary "
    'words.\n\nOutput format: "Since [reason], I choose response [1/2]."'
)
_THOROUGH = (
    "Begin by thoroughly reviewing the question, followed by an in-depth examination of each answer individually, "
    "noting "
    "any differences. Subsequently, analyze these differences to determine which response demonstrates stronger "
    "reasoning and provide a clear conclusion."
)
_OUTLINE = (
    "should focus on outlining the main approach instead of stating specific analytical reasoning or math formula."
)
_DETAILS = (
    "as thorough as possible while remaining accurate, capturing as many details as possible rather than providing "
    "only "
    "general commentary."
)
_ALIGNED = (
    "should align with the reasoning presented in the hint. The conclusion should never refuse to answer the question."
)


class Wording(NamedTuple):
    """What a judge is asked about one kind of text, and reminded of at the end."""

    task: str
    reminder: str


WORDINGS = {
    "SUMMARY": Wording(
        f"better provides a summary of what it should do to solve the question. The summary {_OUTLINE}",
        f"Please note that a better summary {_OUTLINE}",
    ),
    "CAPTION": Wording(
        "better summarizes the information in the image related to the question, and has fewer errors. It is essential "
        f"that the captions are {_DETAILS}",
        f"Please note that a better caption should be {_DETAILS}",
    ),
    "REASONING": Wording(
        f"better explains the reasoning process to solve the question, and has fewer errors. {_THOROUGH}", _THOROUGH
    ),
    "CONCLUSION": Wording(
        f"offers a more effective conclusion to the question. The conclusion {_ALIGNED}",
        f"Please note that a better conclusion {_ALIGNED}",
    ),
    ALL: Wording("better answers the question.", ""),
    SENTENCE: Wording("is a better next sentence for the answer to the question.", ""),
}
_CHECK = (
    "Now you act as a judge, helping me determine whether the reasoning process in the given text is correct and "
    "accurate "
    "based on the given information.",
    "You should assume that the given information about the image is correct.",
    "You should only consider the reasoning process itself, not the correctness of the background information.  ",
    "If the reasoning process invovles any calculations, you should verify the accuracy of the calculations.",
    "You should output 'correct' if you don't find any errors in the reasoning process, and 'incorrect' if you find "
    "any "
    "errors.",
)
INDENT = 8  # of the lines of the check; the published files differ in it


def comparison_prompt(kind: str, question: str, first: str, second: str, hint: str | None = None) -> str:
    """What the judge is asked about two texts; an empty hint is none."""
    wording = WORDINGS[kind]
    hinted = f"\n\nHint about the Question: {hint}" if hint else ""
    shown = "".join(f"\nRepsonse {number}: {text}" for number, text in ((1, first), (2, second)))
    return f"{_TASK}{wording.task}\n\nQuestion: {question}{hinted}{shown}\n\n{wording.reminder}{_FORMAT}"


def check_prompt(given: str, reasoning: str, indent: int = INDENT) -> str:
    """What the judge is asked about one reasoning, without the image."""
    lines = f"\n{' ' * indent}".join(_CHECK)
    return f"{lines}\n\nGiven Information: {given}\n\nReasoning Process: {reasoning}"


def chosen(reply: str) -> int:
    """0 for the first response, 1 for whatever else a reply says."""
    return 0 if "I choose response 1" in reply else 1


def shown_text(kind: str, text: str) -> tuple[str | None, str | None]:
    """What a judge sees of a candidate, None if it has not come to that stage, and the hint that goes with it."""
    if kind == ALL:
        return text, None
    if kind == SENTENCE:
        sentences = text.split(".")
        place = max(len(sentences) - 2, 0)
        return sentences[place], " ".join(sentences[:place]) if place else None
    found = sections(text)
    needed = NAMES[: NAMES.index(kind) + 1]
    if any(found[name] is None for name in needed):
        return None, None
    hint = {"REASONING": ("CAPTION",), "CONCLUSION": ("CAPTION", "REASONING")}.get(kind)
    return found[kind], None if hint is None else "".join(found[name] for name in hint)


class Judge:
    """Compares two candidates of a stage.

    Args:
        ask: Gives the judge's reply to a text; the second argument says whether it sees the image.
        question: The user's question.
        indent: See `INDENT`.
    """

    def __init__(self, ask: Callable[[str, bool], str], question: str, indent: int = INDENT) -> None:
        self.ask, self.question, self.indent = ask, question, indent

    def __call__(self, kind: str, first: str, second: str) -> int:
        """0 if the first candidate is kept, 1 if the second is.

        Args:
            kind: A stage, `ALL` or `SENTENCE`.
            first, second: Whole texts so far.
        """
        (text, hint), (other, later) = shown_text(kind, first), shown_text(kind, second)
        if text is None or other is None:
            return int(text is None and other is not None)
        hint = hint if later is None else later  # if the earlier text differs, the last candidate's counts
        if kind == "REASONING":
            for place, reasoning in enumerate((text, other)):
                if "incorrect" in self.ask(check_prompt(hint or "", reasoning, self.indent), False):
                    return 1 - place
        return chosen(self.ask(comparison_prompt(kind, self.question, text, other, hint), True))
