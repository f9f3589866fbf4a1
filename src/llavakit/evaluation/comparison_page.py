"""The page of a comparison: numbers, tables, and the questions on which the two differ, with their pictures."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from llavakit.errors import UserError
from llavakit.evaluation.benchmarks.base import Question
from llavakit.evaluation.compare import Comparison, verdict
from llavakit.evaluation.predictions import question_key
from llavakit.evaluation.records import Record
from llavakit.pages import document, inline

MOST = 200
_GOLD = ("answer", "answers", "label", "gt_answer", "ground_truth")
_STYLE = "td.row { text-align: left } .cards { grid-template-columns: repeat(auto-fill, minmax(16rem, 1fr)) }"


def write_page(
    path: Path,
    comparison: Comparison,
    result: Mapping[str, Any],
    questions: Sequence[Question] = (),
    most: int = MOST,
) -> None:
    """Write the page.

    Args:
        questions: The benchmark's questions, for pictures and prompts; without them there are none.
        most: How many of the differing questions are shown.
    """
    asked = {question_key(question.question_id, question.stored): question for question in questions}
    asked |= {(str(question.question_id), ""): question for question in questions}
    differing = comparison.differing()
    names = [html.escape(name) for name in comparison.names]
    row = result["metrics"][result["metric"]]
    numbers = "".join(
        f'<div class="number"><b>{_number(row[side]["value"])}</b>{name}<br><span class="soft">{_bounds(row[side])}'
        "</span></div>"
        for side, name in zip(("first", "second"), names, strict=True)
    )
    tables = "".join(_table(name, rows) for name, rows in {"metric": result["metrics"], **result["tables"]}.items())
    cards = "".join(_card(comparison, number, asked) for number in differing[:most])
    hidden = f" The {most} with the largest differences are shown." if len(differing) > most else ""
    body = f"""<h1>{html.escape(result["task"])}: {names[0]} and {names[1]}</h1>
<p class="lead">{html.escape(verdict(result))}. {result["n"]} questions.</p>
<div class="numbers">{numbers}</div>{tables}
<p class="small">The p values of rows are not corrected for their number.</p>
<h2>{len(differing)} questions on which they differ</h2><p class="soft">{hidden}</p>
<div class="cards">{cards}</div>"""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(document(f"{result['task']}: comparison", body, _STYLE), encoding="utf-8")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _bounds(side: Mapping[str, Any]) -> str:
    return "" if side["interval"] is None else f"95 %: {side['interval'][0]:.1f} to {side['interval'][1]:.1f}"


def _table(name: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    head = "".join(f"<th>{title}</th>" for title in ("first", "second", "first minus second", "95 %", "p"))
    count = "<th>n</th>" if name != "metric" else ""
    lines = ""
    for key, row in rows.items():
        interval = "-" if row["low"] is None else f"{row['low']:+.1f} to {row['high']:+.1f}"
        cells = [_number(row["first"]["value"]), _number(row["second"]["value"]), _number(row["difference"]), interval]
        cells = [*([str(row["n"])] if count else []), *cells, "-" if row["p"] is None else f"{row['p']:.4f}"]
        lines += f"<tr><td>{html.escape(str(key))}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
    return f"<h2>{html.escape(name)}</h2><table><tr><th></th>{count}{head}</tr>{lines}</table>"


def _card(comparison: Comparison, number: int, asked: Mapping[Any, Question]) -> str:
    one, other = comparison.cases
    record, prediction = one.pairs[number]
    question = _question(record, prediction, asked)
    text = question.text if question is not None else _asked(record, prediction)
    gold = next((record.data[name] for name in _GOLD if record.data.get(name) is not None), None)
    values = [float(cases.each[number]) for cases in comparison.cases]
    told = "" if gold is None else f'<div class="small" style="padding:0">truth: {html.escape(_plain(gold))}</div>'
    for name, cases, texts, value in zip(comparison.names, (one, other), comparison.answers, values, strict=True):
        answer = cases.pairs[number][1]
        said = str(answer.data.get("text", "")) if answer is not None else texts.get(_id(record), "")
        kind = "right" if value >= max(values) else "wrong"
        worth = "" if value in (0.0, 100.0) else f" ({_number(value)})"
        told += f'<div class="small" style="padding:0">{html.escape(name)}</div>'
        told += f'<b class="{kind}">{html.escape(said)}</b>{worth}'
    pictures = "".join(map(_picture, question.media)) if question is not None else ""
    return f'<div class="card">{pictures}<div>{html.escape(text)}<br>{told}</div></div>'


def _id(record: Record) -> str:
    return str(next((record.data[name] for name in ("question_id", "id", "index") if name in record.data), ""))


def _question(record: Record, prediction: Record | None, asked: Mapping[Any, Question]) -> Question | None:
    if prediction is not None:
        found = asked.get(question_key(prediction.id, prediction.data))
        if found is not None:
            return found
    return asked.get((_id(record), ""))


def _asked(record: Record, prediction: Record | None) -> str:
    """What was asked, as far as the files say it."""
    stored = None if prediction is None else prediction.data.get("prompt")
    return str(stored or record.data.get("text") or record.data.get("question") or _id(record))


def _plain(gold: Any) -> str:
    return ", ".join(map(_plain, gold)) if isinstance(gold, list) else str(gold)


def _picture(part: Mapping[str, Any]) -> str:
    """A picture, or a frame from the middle of a video; for what cannot be shown its name."""
    try:
        shown = _image(part)
    except UserError as error:
        return f'<div class="small">{html.escape(str(error))}</div>'
    if shown is None:
        name = part[part["type"]]
        named = name if isinstance(name, (str, Path)) else ""
        return f'<div class="small">{html.escape(part["type"])}: {html.escape(str(named))}</div>'
    return f'<img alt="{html.escape(part["type"])}" src="{inline(shown)}">'


def _image(part: Mapping[str, Any]) -> Image.Image | None:
    if part["type"] == "image":
        from llavakit.media.image import load_image

        return load_image(part["image"])
    if part["type"] == "video":
        from llavakit.media.video import load_video

        frames = load_video(part["video"]).frames
        return frames[len(frames) // 2]
    return None
