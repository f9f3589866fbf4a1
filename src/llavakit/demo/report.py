"""A self-contained HTML report: pictures, questions, answers, truth, loss curves. One file, nothing fetched."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llavakit.pages import curve, document


def _image(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _card(row: Mapping[str, Any], guess: Mapping[str, Any], root: Path) -> str:
    question = html.escape(row["text"].splitlines()[0])
    verdict = "right" if row["right"] else "wrong"
    return (
        f'<div class="card"><img alt="{html.escape(row["world"])}" src="{_image(root / row["path"])}"><div>{question}'
        f'<br><b class="{verdict}">{html.escape(row["reply"])}</b>'
        f'<div class="small" style="padding:0">truth: {html.escape(row["answer"])} · '
        f"without picture: {html.escape(guess['reply'])}</div></div></div>"
    )


def write_report(
    path: Path,
    metrics: Mapping[str, Any],
    answers: Sequence[Mapping[str, Any]],
    guesses: Sequence[Mapping[str, Any]],
    root: Path,
    pictures: int = 24,
) -> None:
    """Write the report of a demo run.

    Args:
        metrics: Contents of `metrics.json`.
        answers, guesses: Question rows with `reply` and `right`, with and without pictures, in the same order.
        root: Folder that the rows' `path` is relative to.
        pictures: How many rows to show.
    """
    step = max(len(answers) // pictures, 1)
    shown = list(zip(answers, guesses, strict=True))[::step][:pictures]
    cards = "".join(_card(row, guess, root) for row, guess in shown)
    rows = "".join(
        f"<tr><td>{r['world']}: {r['type']}</td><td>{r['questions']}</td>"
        f"<td>{r['accuracy']}</td><td>{r['text_only']}</td></tr>"
        for r in metrics["by_type"]
    )
    curves = "".join(
        f'<div class="card"><div><b>{html.escape(s["name"])}</b>{curve(s["log"])}</div></div>'
        for s in metrics["stages"]
    )
    body = f"""<h1>A vision-language model, trained from nothing</h1>
<p class="lead">LLaVA-1.5's two stages on phantom patients and scenes; every picture below was held out.</p>
<div class="numbers"><div class="number"><b>{metrics["accuracy"]} %</b>exact match, with pictures</div>
<div class="number"><b>{metrics["text_only"]} %</b>trained without pictures</div>
<div class="number"><b>{metrics["questions"]}</b>held-out questions</div></div>
<h2>By type of question</h2>
<table><tr><th>questions about</th><th>n</th><th>with pictures, %</th><th>text only, %</th></tr>{rows}</table>
<h2>Questions and answers</h2><div class="cards">{cards}</div>
<h2>Loss by step</h2><div class="cards wide">{curves}</div>"""
    path.write_text(document("llavakit demo", body), encoding="utf-8")
