"""A self-contained HTML report: pictures, questions, answers, truth, loss curves. One file, nothing fetched."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llavakit.pages import document


def _image(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def curve(log: Sequence[Mapping[str, float]], width: int = 420, height: int = 170) -> str:
    """A loss curve as inline SVG."""
    points = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    if len(points) < 2:
        return '<p class="small">too few steps for a curve</p>'
    left, bottom, top = 40, 24, 10
    last, most = points[-1][0], max(loss for _, loss in points)
    x = lambda step: left + (width - left - 8) * step / last  # noqa: E731
    y = lambda loss: height - bottom - (height - bottom - top) * loss / most  # noqa: E731
    line = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in points)
    marks = "".join(
        f'<line x1="{left}" x2="{width - 8}" y1="{y(v):.1f}" y2="{y(v):.1f}" stroke="var(--line)"/>'
        f'<text x="{left - 6}" y="{y(v) + 4:.1f}" text-anchor="end">{v:.2g}</text>'
        for v in (0, most / 2, most)
    )
    return (
        f'<svg viewBox="0 0 {width} {height}" font-size="11" fill="var(--soft)" role="img" aria-label="loss by step">'
        f'{marks}<polyline points="{line}" fill="none" stroke="var(--accent)" stroke-width="2"/>'
        f'<text x="{width - 8}" y="{height - 6}" text-anchor="end">step {last}</text></svg>'
    )


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
