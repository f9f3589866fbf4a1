"""Questions as LLaVA-o1 was evaluated with them, per benchmark; others are asked as they are. Source: VLMEvalKit.

llavakit prepare staged_questions AI2D_TEST.tsv ai2d.jsonl dataset=AI2D_TEST
llavakit eval MODEL --task exact_match --questions ai2d.jsonl --responder llava-o1 --max-new-tokens 2048
"""

from __future__ import annotations

import ast
import base64
import binascii
import string
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llavakit.data.preparation import Left, write_records
from llavakit.errors import RecordError, UserError
from llavakit.evaluation.records import Record, read_records, read_table

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


PUBLISHED = "Xkev/Llama-3.2V-11B-cot"
SIZES = ("11B", "90B")
WORDED_BY_SIZE = ("AI2D", "ChartQA")
WORDED = ("AI2D", "MMMU", "MathVista", "ChartQA", "DocVQA")
LONGEST_NAME = 256  # characters of a file name; a longer cell is a picture in base64


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


def staged_questions(
    source: Path, output: Path, bad: Left, *, dataset: str, model: str = PUBLISHED, images: str | None = None
) -> dict[str, Any]:
    """Preparation of a benchmark's questions in the words of the published evaluation.

    Args:
        source: VLMEvalKit's table (`.tsv`), or JSON lines with its columns: `index` or `question_id`, `question`,
            options under single letters, `answer`, and `image`: a file name, base64 data, or a list of them.
        output: Question file; pictures in base64 are written into a folder of its name beside it.
        dataset: See `asked`.
        model: Name of the model, whose size words some benchmarks.
        images: Folder of pictures that are named; default: that of the source.

    Returns:
        `questions` (number) and `max_new_tokens`, which the published evaluation allows an answer.

    Raises:
        UserError: If the benchmark has no wording of its own.
    """
    size = size_of(model)
    known = asked(dataset, "", {}, size)
    if known is None:
        raise UserError(
            f"dataset={dataset}: is asked as it is; worded are {', '.join(WORDED)}, of which "
            f"{' and '.join(WORDED_BY_SIZE)} need a model whose name says {' or '.join(SIZES)}"
        )
    folder = Path(images) if images is not None else source.parent
    rows = read_table(source, ("question",)) if source.suffix == ".tsv" else read_records(source)

    def written() -> Iterator[dict[str, Any]]:
        for number, row in enumerate(rows):
            try:
                yield _question(row, number, dataset, size, folder, output)
            except RecordError as error:
                bad(error)

    return {"questions": write_records(output, written()), "max_new_tokens": known[1]}


def _question(row: Record, number: int, dataset: str, size: str | None, folder: Path, output: Path) -> dict[str, Any]:
    name = row.data.get("question_id", row.data.get("index", number))
    pictures = [_picture(row, cell, f"{name}-{place}", folder, output) for place, cell in enumerate(_pictures(row))]
    options = {letter: row.data[letter] for letter in string.ascii_uppercase if row.data.get(letter) is not None}
    found = asked(dataset, row.get("question", str), options, size, len(pictures))
    assert found is not None  # the benchmark has a wording
    answer = {"answer": row.data["answer"]} if row.data.get("answer") is not None else {}
    return {"question_id": name, "image": pictures, "text": found[0], **answer}


def _pictures(row: Record) -> list[str]:
    """The names or base64 data of a row's pictures; a table holds several as a list in Python's form."""
    cell = row.get("image", (str, list), [])
    if isinstance(cell, str) and cell.startswith("["):
        try:
            cell = ast.literal_eval(cell)
        except (ValueError, SyntaxError):
            raise row.error("image", "must be a file name, base64 data, or a list of them") from None
    cells = [cell] if isinstance(cell, str) else cell
    if not all(isinstance(one, str) and one for one in cells):
        raise row.error("image", "must be a file name, base64 data, or a list of them")
    return cells


def _picture(row: Record, cell: str, name: str, folder: Path, output: Path) -> str:
    """The path of a picture; data become a file."""
    if len(cell) < LONGEST_NAME:
        return str((folder / cell).resolve())
    try:
        data = base64.b64decode(cell, validate=True)
    except (binascii.Error, ValueError):
        raise row.error("image", "is longer than a file name and not base64 data") from None
    file = output.with_suffix("") / name
    if file.name != name:
        raise row.error("index", "must be usable as a file name")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    return str(file.resolve())
