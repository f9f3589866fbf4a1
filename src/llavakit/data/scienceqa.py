"""ScienceQA: problems of the public files to prompts, answers and LLaVA records.

A format is two words of letters, question side and answer side, in the order in which the pieces appear: Question,
Context, Multiple choices, Answer, Lecture, Explanation (`QCM-LEA`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from llavakit.errors import UserError

LETTERS = ("A", "B", "C", "D", "E")

_QUESTION_SIDES = ("CQM", "QCM", "QCML", "QCME", "QCMLE", "QCLM", "QCEM", "QCLEM")
_ANSWER_SIDES = ("A", "AL", "AE", "ALE", "AEL", "LA", "EA", "LEA", "ELA", "LEPA")


def prompt(
    problem: Mapping[str, Any],
    form: str = "QCM-LEA",
    *,
    use_caption: bool = False,
    test: bool = False,
    letters: Sequence[str] = LETTERS,
) -> tuple[str, str]:
    """Question text and answer text of a problem.

    Args:
        problem: `question`, `choices`, `answer` (index), `hint`, `caption`, `lecture`, `solution`.
        form: Format such as "QCM-LEA" or "CQM-A"; "LEPA" on the answer side marks the parts by headings.
        use_caption: Whether the picture's caption is part of the context.
        test: Whether the answer is left open (`Answer:`).

    Raises:
        UserError: If the format is not one of the published ones.
    """
    question_side, _, answer_side = form.partition("-")
    if question_side not in _QUESTION_SIDES or answer_side not in _ANSWER_SIDES:
        raise UserError(
            f"ScienceQA format {form!r}: must be one of {', '.join(_QUESTION_SIDES)}, a dash, and one of "
            f"{', '.join(_ANSWER_SIDES)}"
        )
    context = " ".join([problem["hint"], problem["caption"] if use_caption else ""]).strip()
    pieces = {
        "Q": f"Question: {problem['question']}",
        "C": f"Context: {context or 'N/A'}",
        "M": "Options: " + " ".join(f"({letters[n]}) {choice}" for n, choice in enumerate(problem["choices"])),
    }
    # The published script writes newlines as backslash-n and back, so one that a text spells out becomes a newline.
    reasons = {key: problem[name].replace("\\n", "\n") for key, name in (("L", "lecture"), ("E", "solution"))}
    lines = []
    for is_reason, run in groupby(question_side, key=lambda letter: letter in reasons):
        if is_reason:
            lines.append("BECAUSE: " + " ".join(reasons[letter] for letter in run))
        else:
            lines += [pieces[letter] for letter in run]
    answer = "Answer:" if test else _answer(answer_side, letters[problem["answer"]], reasons)
    return _tidy("\n".join(lines)), _tidy(answer)


def _answer(side: str, letter: str, reasons: Mapping[str, str]) -> str:
    conclusion = f"The answer is {letter}."
    if side == "LEPA":
        headed = [("LECTURE", reasons["L"]), ("SOLUTION", reasons["E"])]
        blocks = [f"{head}: {text}\n" for head, text in headed if text.strip()]
        return "".join(blocks) + f"###\nANSWER: {letter}."
    if side == "A":
        return f"Answer: {conclusion}"
    if side[0] == "A":
        # The published code takes the solution for L and the lecture for E where only one of them follows.
        order = {"L": "E", "E": "L"}.get(side[1:], side[1:])
        return f"Answer: {conclusion} BECAUSE: " + " ".join(reasons[part] for part in order)
    return "Answer: " + " ".join(reasons[part] for part in side[:-1]) + f" {conclusion}"


def _tidy(text: str) -> str:
    text = text.replace("  ", " ").strip()  # once, as published: three spaces stay two
    return text.replace("BECAUSE:", "").strip() if text.endswith("BECAUSE:") else text


def to_llava(
    problems: Mapping[str, Mapping[str, Any]], ids: Iterable[str] | None = None, form: str = "CQM-A"
) -> list[dict[str, Any]]:
    """LLaVA records of problems; the image placeholder comes last, as in the published files.

    Args:
        problems: Problems by id; `image` is a file name or None.
        ids: Which problems, in which order; default all.
        form: See `prompt`.
    """
    records = []
    for number in problems if ids is None else ids:
        problem = problems[number]
        question, answer = prompt(problem, form)
        if question.startswith("Question: "):
            question = question.replace("Question: ", "")
        if answer.startswith("Answer: "):
            answer = answer.replace("Answer: ", "")
        record: dict[str, Any] = {"id": number}
        if problem["image"] is not None:
            record["image"] = f"{number}/{problem['image']}"
            question += "\n<image>"
        record["conversations"] = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        records.append(record)
    return records
