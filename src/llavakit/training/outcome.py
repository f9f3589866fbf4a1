"""What came of a training run: held-out questions, asked of the trained model, the untrained one, and without pictures.

    OUTPUT/heldout/
      questions.jsonl, blind.jsonl     what is asked; `blind` has a grey picture of the same size in place of each
      trained.jsonl, blind-answers.jsonl, untrained.jsonl
      blank/                           the grey pictures
    OUTPUT/report.html                 curves, scores with intervals, answers with pictures, what to type next

Interrupted, the same command goes on with the questions that have no answer yet.
"""

from __future__ import annotations

import gc
import html
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from rich.console import Console
from rich.table import Table

from llavakit.errors import UserError
from llavakit.evaluation.cases import Cases, Metrics
from llavakit.evaluation.metrics.intervals import Paired, intervals, paired
from llavakit.evaluation.records import read_answers
from llavakit.evaluation.score import INTERVAL, metrics_of, show, show_interval
from llavakit.generation.request import RequestFailed
from llavakit.media.image import image_size, load_image
from llavakit.pages import curve, document, inline
from llavakit.training.heldout import Questions, read_questions, write_rows
from llavakit.training.recipe import Recipe

if TYPE_CHECKING:
    from llavakit.training.run import TrainResult

GREY, CARDS = 127, 24
NAMES = {"trained": "trained", "untrained": "before training", "blind": "trained, without pictures"}


def conclude(recipe: Recipe, result: TrainResult, console: Console) -> Path | None:
    """Ask, score, compare and write the page; what goes wrong is said in one line, since the model is finished.

    Returns:
        The page.
    """
    page = result.output / "report.html"
    if page.is_file() and not any(stage.ran for stage in result.stages):
        _say(console, f"report: {page}")
        return page
    try:
        questions = read_questions(recipe.heldout)
        folder = result.output / "heldout"
        folder.mkdir(exist_ok=True)
        files = _ask(recipe, result, questions, folder, console)
        outcome = Outcome(recipe, questions, files, folder)
    except (UserError, RequestFailed, OSError) as error:
        said = " ".join(str(error).split())
        console.print(
            f"the model is finished, but not its report: {said}", markup=False, highlight=False, soft_wrap=True
        )
        return None
    console.print(outcome.table())
    for line in outcome.verdicts:
        _say(console, line)
    scratch = page.with_name(f".{page.name}")
    scratch.write_text(outcome.page(result), encoding="utf-8")
    scratch.replace(page)
    _say(console, f"report: {page}")
    return page


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _ask(recipe: Recipe, result: TrainResult, questions: Questions, folder: Path, console: Console) -> dict[str, Path]:
    """Predictions files by name."""
    from llavakit.evaluation.run import evaluate
    from llavakit.generation.load import PLAIN, load

    asked = write_rows(folder / "questions.jsonl", questions.rows)
    models = {"trained": result.final, "untrained": recipe.model}
    found: dict[str, Path] = {}
    for name, model in models.items():
        if model is None:
            continue
        chat = load(model, responder=PLAIN)
        runs = [(name, asked)]
        if name == "trained" and (blind := _without_pictures(questions, folder)) is not None:
            runs.append(("blind", blind))
        for run, file in runs:
            found[run] = folder / f"{run}{'-answers' if run == 'blind' else ''}.jsonl"
            console.print(f"asking {len(questions.rows):,} held-out questions: {NAMES[run]}", highlight=False)
            options = {"images": questions.images, "scored": False, "console": console}
            evaluate(chat, recipe.heldout.task, file, found[run], **options)
        del chat
        gc.collect()
    return found


def _without_pictures(questions: Questions, folder: Path) -> Path | None:
    """The questions with a grey picture of the same size in place of each; None if they are not about pictures."""
    blank: dict[str, str] = {}

    def grey(name: str) -> str:
        if name not in blank:
            size = image_size(questions.images / name)
            path = (folder / "blank" / f"{size.width}x{size.height}.png").resolve()
            if not path.is_file():
                path.parent.mkdir(exist_ok=True)
                scratch = path.with_name(f".{path.name}")
                Image.new("RGB", (size.width, size.height), (GREY,) * 3).save(scratch, "PNG")
                scratch.replace(path)
            blank[name] = str(path)
        return blank[name]

    rows = []
    for row in questions.rows:
        image = row.get("image")
        if image is None or row.get("video") is not None or row.get("volume") is not None:
            return None
        rows.append({**row, "image": [grey(one) for one in image] if isinstance(image, list) else grey(image)})
    return write_rows(folder / "blind.jsonl", rows)


class Outcome:
    """Scores and answers of the models on the same questions.

    Attributes:
        metric: Name of the main metric.
        scores: By name: value and 95 % interval.
        verdicts: What the paired differences show, in words.
    """

    def __init__(self, recipe: Recipe, questions: Questions, files: Mapping[str, Path], folder: Path) -> None:
        self.recipe, self.questions = recipe, questions
        self.answers = {
            name: {r.id: str(r.data["text"]) for r in read_answers(files[name])} for name in NAMES if name in files
        }
        self.scores: dict[str, tuple[float | None, Sequence[float] | None]] = {}
        self.verdicts: list[str] = []
        self.right: dict[str, dict[str, float]] = {}
        gold = folder / "questions.jsonl"
        cases = {name: _cases(recipe.heldout.task, files[name], gold) for name in NAMES if name in files}
        first = cases["trained"]
        self.metric, groups = first.main, first.groups
        for name, own in cases.items():
            measure = own.measures[own.main]
            self.scores[name] = measure.whole, intervals({name: measure}, groups)[name]
            self.right[name] = _each(own)
            if name != "trained":
                self.verdicts.append(_verdict(name, paired(first.measures[first.main], measure, groups)))

    def table(self) -> Table:
        """The scores."""
        table = Table("held out", title=f"{len(self.questions.rows):,} questions, {self.metric}", title_justify="left")
        table.add_column("value", justify="right")
        table.add_column(INTERVAL, justify="right")
        for name, (value, interval) in self.scores.items():
            table.add_row(NAMES[name], show(None if value is None else round(value, 1)), show_interval(interval))
        return table

    def page(self, result: TrainResult) -> str:
        """The page of the run."""
        numbers = "".join(
            f'<div class="number"><b>{show(None if value is None else round(value, 1))}</b>{NAMES[name]}'
            f'<br><span class="soft">{show_interval(interval)}</span></div>'
            for name, (value, interval) in self.scores.items()
        )
        curves = "".join(
            f'<div class="card"><div><b>{html.escape(stage.name)}</b>{curve(stage.metrics.get("log", []))}</div></div>'
            for stage in result.stages
        )
        step = max(1, len(self.questions.rows) // CARDS)
        cards = "".join(map(self._card, range(0, len(self.questions.rows), step)[:CARDS]))
        said = "".join(f"<p>{html.escape(line[0].upper() + line[1:])}.</p>" for line in self.verdicts)
        final = os.path.relpath(result.final)
        final = shlex.quote(str(result.final.resolve()) if final.startswith("..") else final)
        return document(
            f"{result.output.parent.name} {result.output.name}",
            f"""<h1>What the model learned</h1>
<p class="lead">{len(self.questions.rows):,} held-out questions; {html.escape(self.metric)} with 95 % intervals</p>
<div class="numbers">{numbers}</div>{said}
<h2>Go on</h2><pre>llavakit chat {html.escape(final)} --image PICTURE
llavakit serve {html.escape(final)}</pre>
<h2>Questions and answers</h2><div class="cards">{cards}</div>
<h2>Loss by step</h2><div class="cards wide">{curves}</div>""",
            "pre { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .8rem; "
            "overflow-x: auto }",
        )

    def _card(self, number: int) -> str:
        question = self.questions.asked[number]
        key = str(question.question_id)
        pictures = "".join(map(_picture, question.media[:1]))
        lines = ""
        for name, answers in self.answers.items():
            worth = self.right.get(name, {}).get(key)
            kind = "" if worth is None else ' class="right"' if worth >= 1 else ' class="wrong"' if worth <= 0 else ""
            text = html.escape(answers.get(key, "-")[:400])
            if name == "trained":
                lines += f"<br><b{kind}>{text}</b>"
            else:
                lines += f'<div class="small" style="padding:0">{NAMES[name]}: <span{kind}>{text}</span></div>'
        truth = html.escape(self.questions.truth(number)[:400])
        asked = html.escape(question.text.splitlines()[0])
        return (
            f'<div class="card">{pictures}<div>{asked}<br><span class="small">truth: {truth}</span>{lines}</div></div>'
        )


def _cases(task: str, predictions: Path, gold: Path) -> Cases:
    """A score, case by case in the order of the questions.

    Raises:
        UserError: If the benchmark has no value per question.
    """
    found = metrics_of(task, predictions, gold)
    if not isinstance(found, Metrics) or not found.cases.measures:
        raise UserError(f"{task}: has no value per question")
    return found.cases


def _each(cases: Cases) -> dict[str, float]:
    """What every answer is worth by the id of its question, from 0 to 1."""
    scale = cases.measures[cases.main].scale
    values = cases.each / scale
    return {gold.id: float(value) for (gold, _), value in zip(cases.pairs, values, strict=True)}


def _verdict(other: str, found: Paired) -> str:
    low, high = found.interval or (None, None)
    by = "" if low is None else f" ({found.value:+.1f}, 95 % {low:+.1f} to {high:+.1f})"
    if other == "untrained":
        if low is not None and low > 0:
            return f"it learned: better than before training{by}"
        if high is not None and high < 0:
            return f"it is worse than before training{by}: lower the learning rate, or look at the records"
        return f"no difference from before training is shown{by}: more held-out questions, or more steps, would tell"
    if low is not None and low > 0:
        return f"it looks at the picture: better than with a grey one in its place{by}"
    return f"whether it looks at the picture is not shown{by}: more held-out questions would tell"


def _picture(part: Mapping[str, Any]) -> str:
    if part["type"] != "image":
        return (
            f'<div class="small">{html.escape(part["type"])}: {html.escape(Path(str(part[part["type"]])).name)}</div>'
        )
    return f'<img alt="held-out picture" src="{inline(load_image(part["image"]))}">'
