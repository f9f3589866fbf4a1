"""The page of an attack: pictures clean and attacked, their difference, answers, curves. One file, nothing fetched."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageChops

from llavakit.pages import document, inline

if TYPE_CHECKING:
    from llavakit.robustness.ensemble import Schedule
    from llavakit.robustness.run import Run
    from llavakit.robustness.tasks import Task

SHOWN = 24
_STYLE = """
.card { margin: 1rem 0; padding: .8rem }
.three { display: grid; grid-template-columns: repeat(3, 1fr); gap: .5rem; text-align: center; font-size: .85rem }
svg { max-width: 30rem }
"""


def write_report(path: Path, result: Mapping[str, Any], task: Task, run: Run, schedule: Schedule) -> None:
    """Write the page of a finished run."""
    numbers = "".join(
        f'<div class="number"><b>{result[key]["mean"]:g}</b>{name}<br><span class="soft">95 %: '
        f"{result[key]['interval'][0]:g} to {result[key]['interval'][1]:g}</span></div>"
        for key, name in (("clean", "clean"), ("attacked", "attacked"), ("lost", "lost"))
        if key in result
    )
    by_change = sorted(task.questions, key=lambda name: -schedule.best_stage.get(name, 0))
    cards = "".join(_card(name, task, run, schedule) for name in by_change[:SHOWN])
    stages = result.get("after_stage", [])
    told = "".join(f"<p class='soft'>{html.escape(note)}</p>" for note in result.get("notes", []))
    body = f"""<h1>{html.escape(str(result["task"]))}: clean and attacked</h1>
<p class="soft">{html.escape(str(result["model"]))} &middot; {result["pictures"]} pictures &middot; eps {result["eps"]}
({result["norm"]}, at {result["at"]}) &middot; {result["steps"]} steps &middot; {html.escape(result["unit"])}</p>{told}
<div class="numbers">{numbers}</div>
{"<h2>Score after each stage</h2>" + _line(stages) if len(stages) > 1 else ""}
<h2>Pictures</h2>{cards}
<p class="soft">A model that stands these attacks may fall to others. Attacks belong on models that you hold.</p>"""
    path.write_text(document("Attack report", body, _STYLE), encoding="utf-8")


def _card(name: str, task: Task, run: Run, schedule: Schedule) -> str:
    references = task.references.get(name)
    clean, stage = run.lines[name, 0], schedule.best_stage.get(name, 0)
    attacked = [run.lines[key] for key in run.lines if key[0] == name and "picture" in run.lines[key]]
    line = run.lines[name, stage] if stage else (attacked[-1] if attacked else clean)
    pictures = ""
    if "picture" in line:
        file = run.folder / "pictures" / line["picture"]
        before, after = (Image.open(place) for place in (file.with_name(f"{file.stem}-clean.png"), file))
        factor, difference = _difference(before, after)
        shown = (("clean", before), (f"difference x {factor}", difference), ("attacked", after))
        pictures = "".join(f'<div><img alt="{label}" src="{inline(picture)}">{label}</div>' for label, picture in shown)
    texts = [("question", task.questions[name].text), ("clean answer", clean["answer"])]
    texts.append(
        (f"attacked answer (stage {line['stage']})", line["answer"]) if "picture" in line else ("", "not attacked")
    )
    if references:
        texts.append(("references", " / ".join(references)))
    if "largest_change" in line:
        texts.append(("largest change", f"{line['largest_change']:g} grey levels of 255"))
    listed = "".join(f"<dt>{html.escape(label)}</dt><dd>{html.escape(text)}</dd>" for label, text in texts)
    curve = _line(line["curve"]) if len(line.get("curve", [])) > 1 else ""
    return f'<div class="card"><div class="three">{pictures}</div><dl>{listed}</dl>{curve}</div>'


def _difference(before: Image.Image, after: Image.Image) -> tuple[int, Image.Image]:
    """How often a difference is enlarged to be seen, and it, around middle grey."""
    far = ImageChops.difference(before, after)
    most = max((high for _, high in far.getextrema()), default=0)
    factor = max(127 // most, 1) if most else 1
    bands = [_shifted(*pair, factor) for pair in zip(before.split(), after.split(), strict=True)]
    return factor, Image.merge("RGB", bands)


def _shifted(before: Image.Image, after: Image.Image, factor: int) -> Image.Image:
    moved = np.asarray(after, np.int32) - np.asarray(before, np.int32)
    return Image.fromarray((moved * factor + 128).clip(0, 255).astype(np.uint8))


def _line(values: Sequence[float], width: int = 420, height: int = 140) -> str:
    """Values in order as an inline curve."""
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    across = [40 + (width - 50) * number / (len(values) - 1) for number in range(len(values))]
    down = [height - 20 - (height - 35) * (value - low) / span for value in values]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(across, down, strict=True))
    return (
        f'<svg viewBox="0 0 {width} {height}" font-size="11" fill="var(--soft)" role="img" aria-label="curve">'
        f'<text x="2" y="18">{high:.3g}</text><text x="2" y="{height - 20}">{low:.3g}</text>'
        f'<polyline points="{points}" fill="none" stroke="var(--accent)" stroke-width="2"/></svg>'
    )
