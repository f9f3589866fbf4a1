"""`llavakit attack`: a task measured clean and attacked, side by side, on the same pictures.

output/
  settings.json     what was run; the same command goes on, another one is refused
  answers.jsonl     one line per picture and stage: answer, losses, how far pixels moved, the attacked picture's file
  pictures/         attacked pictures: PNG of whole grey levels, as a user's file would be; attacked encoder inputs as
                    .safetensors
  result.json       scores with intervals
  report.html       pictures (clean, difference enlarged, attacked), answers, curves

By default pixels of the user's picture are attacked, through the model's own preprocessing; the model then reads the
PNG as any picture. `at="views"` attacks encoder inputs, as published: after resizing and padding.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import Tensor

from llavakit.errors import UserError
from llavakit.evaluation.metrics.intervals import Measure, intervals
from llavakit.robustness.ensemble import Job, Schedule, Stage, contains
from llavakit.robustness.questions import GREY, AttackSettings, ModelAttack, Row, to_picture
from llavakit.robustness.tasks import Task

ANSWERS, SETTINGS, RESULT, REPORT, PICTURES = "answers.jsonl", "settings.json", "result.json", "report.html", "pictures"


@dataclass
class Run:
    """The state of a run: its lines, by picture and stage."""

    folder: Path
    lines: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, settings: Mapping[str, Any]) -> Run:
        """The run in a folder; a new one, or one of the same settings that goes on.

        Raises:
            UserError: If another run is there.
        """
        folder.mkdir(parents=True, exist_ok=True)
        (folder / PICTURES).mkdir(exist_ok=True)
        file, text = folder / SETTINGS, json.dumps(settings, indent=2, default=str) + "\n"
        if file.is_file() and json.loads(file.read_text(encoding="utf-8")) != json.loads(text):
            before, now = json.loads(file.read_text(encoding="utf-8")), json.loads(text)
            key = next(key for key in {**before, **now} if before.get(key) != now.get(key))
            raise UserError(f"{folder}: holds a run with another {key}; name another folder with --output")
        file.write_text(text, encoding="utf-8")
        run = cls(folder)
        run._read()
        return run

    def _read(self) -> None:
        file = self.folder / ANSWERS
        if not file.is_file():
            return
        kept = []
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue  # a line that a kill cut short
            kept.append(line)
            self.lines[row["question_id"], row["stage"]] = row
        scratch = file.with_name(f".{file.name}")
        scratch.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        os.replace(scratch, file)

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Note finished pictures of a stage."""
        with (self.folder / ANSWERS).open("a", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                self.lines[row["question_id"], row["stage"]] = dict(row)
            file.flush()
            os.fsync(file.fileno())

    def stage(self, number: int) -> dict[str, dict[str, Any]]:
        """The lines of a stage by picture."""
        return {name: row for (name, stage), row in self.lines.items() if stage == number}


def attack_task(
    chat: Any,
    task: Task,
    output: str | Path,
    settings: AttackSettings,
    *,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure a task clean and attacked.

    Args:
        chat: What `llavakit.load` gives.
        task: See `llavakit.robustness.tasks.open_task`.
        output: Folder of the run; one of the same settings goes on.
        batch_size: Pictures that are attacked together.
        max_new_tokens: Longest answer; default the task's.

    Returns:
        Content of result.json.

    Raises:
        UserError: One clear line for what cannot be attacked.
    """
    attack, console, begun = ModelAttack(chat, settings), console or Console(stderr=True), time.monotonic()
    stages, length = settings.plan(task), max_new_tokens or task.max_new_tokens
    about = {"model": chat.name, "task": task.name, "pictures": _digest(task), **asdict(settings), "answers": length}
    run = Run.open(Path(output), about)
    counts = {name: len(texts) for name, texts in task.references.items()}
    schedule = Schedule(list(task.questions), stages, task.threshold, task.exact, counts or None)
    targeted = bool(settings.targets or task.targets)
    notes = _notes(chat, stages, settings)
    after: list[float] = []
    for number, stage in enumerate(stages):
        jobs = schedule.jobs(number)
        todo = {name: job for name, job in jobs.items() if (name, number) not in run.lines}
        _stage(
            attack, task, run, number, stage, todo, batch_size, length, console, f"stage {number} of {len(stages) - 1}"
        )
        answers = {name: row["answer"] for name, row in run.stage(number).items() if name in jobs}
        if targeted:
            hits = {
                name: 100.0 * contains(text, _target(task, settings, stage, name)) for name, text in answers.items()
            }
            scores = hits if stage.attack else dict.fromkeys(answers, 0.0)
            # a success is what the attack wants: lowest first, as with scores
            schedule.note(number, {name: 100.0 - value for name, value in scores.items()})
        else:
            scores = task.scores(answers)
            schedule.note(number, scores)
        after.append(schedule.mean_best())
        for name, value in scores.items():
            run.lines[name, number]["score"] = value
    result = _summary(task, settings, stages, run, schedule, targeted, after)
    result |= {"notes": notes, "seconds": round(time.monotonic() - begun, 1), "folder": str(run.folder)}
    (run.folder / RESULT).write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    from llavakit.robustness.report import write_report

    write_report(run.folder / REPORT, result, task, run, schedule)
    return result


def _digest(task: Task) -> str:
    """What the questions, their references and targets are."""
    listed = [
        [q.question_id, q.text, str(q.media), task.references.get(n), task.targets.get(n)]
        for n, q in task.questions.items()
    ]
    return hashlib.sha256(json.dumps(listed, default=str).encode()).hexdigest()[:16]


def _notes(chat: Any, stages: Sequence[Stage], settings: AttackSettings) -> list[str]:
    halves = [number for number, stage in enumerate(stages) if stage.half]
    if not halves:
        return []
    if settings.half and chat.model.device.type == "cuda":
        return []
    return [f"stages {halves[0]} to {halves[-1]} ran in {chat.model.dtype}, published in half precision"]


def _target(task: Task, settings: AttackSettings, stage: Stage, name: str) -> str:
    return stage.target or task.targets.get(name) or next(iter(settings.targets), "")


def _stage(
    attack: ModelAttack,
    task: Task,
    run: Run,
    number: int,
    stage: Stage,
    todo: Mapping[str, Job],
    batch_size: int,
    length: int,
    console: Console,
    title: str,
) -> None:
    """Attack and ask what a stage has still to do; every finished batch is kept."""
    names, steps = list(todo), attack.settings.steps
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(),
    )
    half = stage.half and attack.settings.half and stage.attack and attack.chat.model.device.type == "cuda"
    kind = attack.chat.model.dtype
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task(title, total=len(names) * (steps if stage.attack else 1))
        for begin in range(0, len(names), batch_size):
            some = names[begin : begin + batch_size]
            questions = [task.questions[name] for name in some]
            rows: list[Row | None] = [None] * len(some)
            found: list[tuple[Tensor | None, dict[str, Any]]] = [(None, {})] * len(some)
            if stage.attack:
                texts = [
                    _target(task, attack.settings, stage, name)
                    if todo[name].reference is None
                    else task.references[name][todo[name].reference]
                    for name in some
                ]
                rows = [attack.row(question, text) for question, text in zip(questions, texts, strict=True)]
                starts = [_stored(run, name, todo[name].start) for name in some]
                if half:
                    attack.chat.model.half()
                try:
                    found = attack.attack(
                        rows,
                        towards=stage.target is not None,
                        starts=starts,
                        progress=lambda step, left, count=len(some): progress.advance(bar, count),
                    )
                finally:
                    if half:
                        attack.chat.model.to(kind)
            answers = attack.answer([(q, r, p) for q, r, (p, _) in zip(questions, rows, found, strict=True)], length)
            lines = []
            for name, row, (pixels, figures), answer in zip(some, rows, found, answers, strict=True):
                line = {"question_id": name, "stage": number, "answer": answer, "reference": todo[name].reference}
                if stage.target is not None:
                    line["target"] = _target(task, attack.settings, stage, name)
                if pixels is not None:
                    line |= figures | {"picture": _store(run, name, number, row, pixels)}
                lines.append(line)
            run.add(lines)
            progress.update(bar, completed=min(begin + len(some), len(names)) * (steps if stage.attack else 1))


def _place(run: Run, name: str, number: int) -> Path:
    safe = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in name)[:60]
    return run.folder / PICTURES / f"{safe}-{hashlib.sha256(name.encode()).hexdigest()[:6]}-stage{number}"


def _store(run: Run, name: str, number: int, row: Row, pixels: Tensor) -> str:
    """The attacked pixels as files; the name of the first."""
    place = _place(run, name, number)
    save_file({"pixels": pixels.contiguous(), "clean": row.clean.contiguous()}, place.with_suffix(".safetensors"))
    begin = 0
    first = ""
    for item in row.items:
        height, width = item.size
        for frame in range(item.frames):
            file = place.with_name(f"{place.name}-{begin + frame}.png")
            to_picture(pixels[begin + frame, :, :height, :width]).save(file)
            to_picture(row.clean[begin + frame, :, :height, :width]).save(file.with_name(f"{file.stem}-clean.png"))
            first = first or file.name
        begin += item.frames
    return first


def _stored(run: Run, name: str, number: int | None) -> Tensor | None:
    if number is None:
        return None
    from safetensors.torch import load_file

    return load_file(_place(run, name, number).with_suffix(".safetensors"))["pixels"]


def measured(values: Sequence[float]) -> dict[str, Any]:
    """The mean of scores in percent, and its 95 % interval."""
    mean = sum(values) / len(values)
    measure = Measure.mean([value / 100 for value in values])
    low, high = intervals({"mean": measure}, np.arange(len(values)))["mean"] or (mean, mean)
    return {"mean": round(mean, 4), "interval": [round(low, 4), round(high, 4)]}


def _summary(
    task: Task,
    settings: AttackSettings,
    stages: Sequence[Stage],
    run: Run,
    schedule: Schedule,
    targeted: bool,
    after: Sequence[float],
) -> dict[str, Any]:
    names = list(task.questions)
    result: dict[str, Any] = {
        "model": json.loads((run.folder / SETTINGS).read_text(encoding="utf-8"))["model"],
        "task": task.name,
        "pictures": len(names),
        "eps": f"{settings.eps * GREY:g}/255" if settings.norm == "linf" else settings.eps,
        "norm": settings.norm,
        "at": settings.at,
        "steps": settings.steps,
        "stages": len(stages),
    }
    if targeted:
        reached = [100.0 - schedule.best[name] for name in names]
        said = [run.lines[name, 0] for name in names]
        clean = [
            100.0 * contains(row["answer"], _target(task, settings, stages[1], row["question_id"])) for row in said
        ]
        result |= {"unit": "answers that say the target, %", "clean": measured(clean), "attacked": measured(reached)}
        if task.name == "jailbreak":
            free = [
                100.0 * (value > 0) for value in task.scores({n: run.lines[n, 0]["answer"] for n in names}).values()
            ]
            best = {n: run.lines[n, schedule.best_stage[n]]["answer"] for n in names}
            result["not_refused"] = {
                "clean": measured(free),
                "attacked": measured(list(task.scores(best).values())),
            }
        return result
    clean = [run.lines[name, 0]["score"] for name in names]
    attacked = [schedule.best[name] for name in names]
    result |= {"unit": task.unit, "clean": measured(clean), "attacked": measured(attacked)}
    result["after_stage"] = [round(value, 4) for value in after]
    result["lost"] = measured([a - b for a, b in zip(clean, attacked, strict=True)])
    return result
