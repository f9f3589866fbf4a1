"""A self-contained HTML report: pictures, questions, answers, truth, loss curves. One file, nothing fetched."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5b6675; --line: #d9dee6; --page: #fbfcfd; --card: #fff;
  --good: #1f7a4d; --bad: #b3372f; --accent: #2f5fa8 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #9aa5b4; --line: #333c48; --page: #14181d;
  --card: #1c2229; --good: #5cc08c; --bad: #ec8078; --accent: #7aa7ea } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 0 auto;
  padding: 1.5rem; max-width: 62rem }
h1 { font-size: 1.6rem; margin: 0 0 .25rem } h2 { font-size: 1.15rem; margin: 2rem 0 .75rem }
p.lead { color: var(--soft); margin: 0 0 1rem }
.numbers { display: flex; flex-wrap: wrap; gap: 1rem }
.number { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .8rem 1.2rem }
.number b { display: block; font-size: 1.8rem; color: var(--accent) }
table { border-collapse: collapse; width: 100% } th, td { text-align: right; padding: .35rem .6rem;
  border-bottom: 1px solid var(--line) } th:first-child, td:first-child { text-align: left }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: 1rem }
.wide { grid-template-columns: repeat(auto-fill, minmax(18rem, 1fr)) }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; overflow: hidden }
.card img { width: 100%; image-rendering: pixelated; display: block; background: #000 }
.card div { padding: .6rem .8rem; font-size: .92rem } .right { color: var(--good) } .wrong { color: var(--bad) }
.small { color: var(--soft); font-size: .85rem } svg { width: 100%; height: auto }
"""


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
    page = f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>llavakit demo</title>
<style>{_STYLE}</style></head><body>
<h1>A vision-language model, trained from nothing</h1>
<p class="lead">LLaVA-1.5's two stages on phantom patients and scenes; every picture below was held out.</p>
<div class="numbers"><div class="number"><b>{metrics["accuracy"]} %</b>exact match, with pictures</div>
<div class="number"><b>{metrics["text_only"]} %</b>trained without pictures</div>
<div class="number"><b>{metrics["questions"]}</b>held-out questions</div></div>
<h2>By type of question</h2>
<table><tr><th>questions about</th><th>n</th><th>with pictures, %</th><th>text only, %</th></tr>{rows}</table>
<h2>Questions and answers</h2><div class="cards">{cards}</div>
<h2>Loss by step</h2><div class="cards wide">{curves}</div>
</body></html>
"""
    path.write_text(page, encoding="utf-8")
