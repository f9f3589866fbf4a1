"""Does a model see? The same questions with the right picture, a blank one, and another sample's.

A model that ignores its pictures scores alike with all three, whatever its score is. The gains of the right picture
over the two controls are paired question by question, with 95 % intervals (`metrics.intervals.paired`):

*uses the picture*   both intervals lie above 0.
*does not*           that over another sample's picture includes 0 and stays below `MARGIN`, or below half of what
                     could be gained at all, where the questions are mostly answered without pictures.
*cannot tell*        anything else: too few questions, or a task that asks little of pictures.

This finds pictures that do not arrive, or arrive as garbage. It cannot find damage that leaves part of the use intact:
swapped colour channels, a normalisation that is slightly off, a lower resolution lose points, and the model sees still.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llavakit.errors import UserError
from llavakit.evaluation.benchmarks.base import Question
from llavakit.evaluation.compare import Comparison, compare, shown
from llavakit.evaluation.controls import blanked, is_pictured, spread_over, swapped
from llavakit.evaluation.metrics.intervals import intervals, paired
from llavakit.evaluation.run import evaluate
from llavakit.evaluation.score import benchmark

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from llavakit.generation.responder import Responder

USES, DOES_NOT, CANNOT_TELL = "uses the picture", "does not", "cannot tell"
RIGHT, BLANK, OTHER = "right", "blank", "other"
MARGIN = 10.0  # percent of the whole scale
LIMIT, DONORS = 300, 1000


def check_blind(
    model: Responder,
    task: str,
    questions: str | Path,
    folder: str | Path,
    *,
    images: str | Path | None = None,
    gold: str | Path | None = None,
    limit: int = LIMIT,
    seed: int = 0,
    batch_size: int = 8,
    question_options: Mapping[str, Any] | None = None,
    score_options: Mapping[str, Any] | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Ask a model with the right, blank, and other samples' pictures.

    Args:
        task, questions, images, gold: As for `evaluate`; the task must have a value per question.
        folder: Where answers are kept: `right.jsonl`, `blank.jsonl`, `other.jsonl`. What is there is not asked again.
        limit: Most questions that are asked, each three times; spread evenly over those with a picture.
        seed: Of the choice of other samples' pictures.

    Returns:
        `model`, `task`, `n`, `pictures`, `metric`; `scores` with each picture (value and interval); `gains` over blank
        and other ones (`difference`, `low`, `high`, `p`); `changed`, percent of the answers that another picture
        changes; `verdict` and `why`.

    Raises:
        UserError: If no question has a picture, all have the same one, or the task has no value per question.
    """
    folder = Path(folder)
    for name in (RIGHT, BLANK, OTHER):

        def asked(whole: list[Question], name: str = name) -> list[Question]:
            pictured = [question for question in whole if is_pictured(question)]
            if not pictured:
                raise UserError(f"{questions}: no question of it has a picture")
            chosen = spread_over(pictured, limit)
            if name == OTHER:
                return swapped(chosen, spread_over(pictured, DONORS), seed)
            return blanked(chosen) if name == BLANK else chosen

        evaluate(
            model,
            task,
            questions,
            folder / f"{name}.jsonl",
            images=images,
            batch_size=batch_size,
            scored=False,
            change=asked,
            question_options=dict(question_options or {}),
            console=console,
        )
    gold = questions if gold is None and benchmark(task).questions_are_gold else gold
    pairing = {"common": True, "control": True, "options": score_options}
    files = {name: folder / f"{name}.jsonl" for name in (RIGHT, BLANK, OTHER)}
    sides = {name: compare(task, files[RIGHT], files[name], gold, **pairing) for name in (BLANK, OTHER)}
    return {"model": model.name, "task": task} | judged(sides)


def judged(sides: Mapping[str, Comparison]) -> dict[str, Any]:
    """What the answers with the right picture against those with blank and other ones say."""
    one = sides[OTHER].cases[0]
    groups, metric = one.groups, one.by_case
    found: dict[str, Any] = {"n": len(one.pairs), "pictures": len(set(one.pictures)), "metric": metric}
    measures = {RIGHT: one.measures[metric]} | {name: side.cases[1].measures[metric] for name, side in sides.items()}
    found["scores"] = {
        name: {"value": measure.whole, "interval": intervals({name: measure}, groups)[name]}
        for name, measure in measures.items()
    }
    found["gains"] = {
        name: shown(paired(side.cases[0].measures[metric], measures[name], side.cases[0].groups))
        for name, side in sides.items()
    }
    found["changed"] = {name: _changed(side) for name, side in sides.items()}
    scale = one.measures[metric].scale
    verdict, why = _verdict(found, scale)
    return found | {"verdict": verdict, "why": why}


def _changed(side: Comparison) -> float:
    texts = [[answer.data.get("text") for _, answer in cases.pairs if answer is not None] for cases in side.cases]
    return 100 * float(np.mean([first != second for first, second in zip(*texts, strict=True)]))


def _verdict(found: Mapping[str, Any], scale: float) -> tuple[str, str]:
    blank, other = found["gains"][BLANK], found["gains"][OTHER]
    if other["low"] is None or blank["low"] is None:
        same = found["scores"][RIGHT]["value"] == found["scores"][OTHER]["value"]
        if same and found["changed"][OTHER] == 0:
            return DOES_NOT, "no answer changes with the picture"
        return CANNOT_TELL, "too few questions"
    if other["low"] > 0 and blank["low"] > 0:
        return USES, "the right picture is better than a blank one and than another sample's"
    left = scale - found["scores"][OTHER]["value"]
    margin = min(MARGIN * scale / 100, left / 2)
    if other["low"] <= 0 and other["high"] < margin:
        changed = found["changed"][OTHER]
        if changed == 0:
            return DOES_NOT, "no answer changes with the picture: it does not reach the decoder"
        how = f"{changed:.0f} % of the answers change with the picture, and none the better for it"
        return DOES_NOT, how
    if other["low"] > 0:
        return CANNOT_TELL, "the right picture is better than another sample's, but is not shown to be better than none"
    if left < scale * 0.2:
        return CANNOT_TELL, "these questions are answered without their pictures; take a task that needs them"
    return CANNOT_TELL, "the interval is too wide; ask more questions (--limit)"


def table(found: Mapping[str, Any]) -> Table:
    """The scores, the gains and the verdict for a terminal."""
    from rich.markup import escape
    from rich.table import Table

    title = f"{found['task']}: {found['n']} questions about {found['pictures']} pictures, {found['metric']}"
    out = Table("picture", title=escape(title), caption=escape(f"{found['verdict']}: {found['why']}"))
    for column in ("score", "95 % interval", "right minus this", "95 % interval", "answers changed"):
        out.add_column(column, justify="right")
    for name, row in found["scores"].items():
        bounds = row["interval"]
        cells = ["-" if row["value"] is None else f"{row['value']:.1f}"]
        cells.append("-" if bounds is None else f"{bounds[0]:.1f} to {bounds[1]:.1f}")
        if name in found["gains"]:
            gain = found["gains"][name]
            cells.append("-" if gain["difference"] is None else f"{gain['difference']:+.1f}")
            cells.append("-" if gain["low"] is None else f"{gain['low']:+.1f} to {gain['high']:+.1f}")
            cells.append(f"{found['changed'][name]:.0f} %")
        out.add_row(name, *cells)
    return out
