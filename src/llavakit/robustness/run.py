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
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import Tensor

from llavakit.conversation.template import template_for
from llavakit.errors import UserError
from llavakit.evaluation.benchmarks.base import Question
from llavakit.evaluation.metrics.intervals import Measure, intervals
from llavakit.generation.chat import Chat
from llavakit.model.routes import MODALITIES, read_region_tensor
from llavakit.robustness.apgd import Attacked, Judged, apgd
from llavakit.robustness.balls import check_eps, check_norm
from llavakit.robustness.ensemble import Job, Schedule, Stage, contains
from llavakit.robustness.model_attack import TextLoss
from llavakit.robustness.tasks import Task
from llavakit.views.differentiable import cut
from llavakit.views.plan import MediaSize

AT = ("pixels", "views")
GREY = 255
SURE = math.log(2)  # a token's loss below which it is likelier than all others together
ANSWERS, SETTINGS, RESULT, REPORT, PICTURES = "answers.jsonl", "settings.json", "result.json", "report.html", "pictures"


@dataclass(frozen=True)
class AttackSettings:
    """What is done to the pictures.

    Args:
        eps: Radius in pixels of 0..1.
        norm: "linf" or "l2".
        steps: Iterations of every attack; 100 as published, 10,000 for targets.
        first_step: In units of eps.
        at: "pixels" of the picture, or "views", the encoder's inputs before they are normalised.
        targets: Strings to lead to, tried one after another; without any, attacks lead away from the references.
        stages: "published", the task's ensemble, or "single", one attack on the first reference.
        half: Whether stages that were published in half precision run so; only on a GPU.
    """

    eps: float = 4 / 255
    norm: str = "linf"
    steps: int = 100
    first_step: float = 1.0
    at: str = "pixels"
    targets: tuple[str, ...] = ()
    stages: str = "published"
    half: bool = True

    def __post_init__(self) -> None:
        check_norm(self.norm)
        if self.norm == "linf":  # a Euclidean radius grows with the picture
            check_eps(self.eps)
        if self.at not in AT:
            raise UserError(f"at: must be {' or '.join(AT)}, not {self.at!r}")
        if self.stages not in ("published", "single"):
            raise UserError(f"stages: must be published or single, not {self.stages!r}")
        if self.steps < 1:
            raise UserError(f"steps: must be at least 1, not {self.steps}")
        if any(not target.strip() for target in self.targets):
            raise UserError("--target: is empty; name the string that the attack leads to")

    def plan(self, task: Task) -> list[Stage]:
        """The stages of a task."""
        clean = Stage(attack=False, half=False)
        if task.targets or self.targets:
            return [clean, *(Stage(half=False, target=text) for text in self.targets or ("",))]
        if self.stages == "single":
            return [clean, Stage(half=False)]
        return list(task.stages)


@dataclass
class Row:
    """A question on its way through an attack.

    Attributes:
        sample: As `LlavakitProcessor.encode` gives it, with the attacked text's labels.
        clean: Pixels [frames of all media, 3, height, width] in 0..1, or the encoder's inputs, padded to one shape.
        items: Per media item or input its (frames, height, width) and what cuts it.
    """

    question: Question
    messages: list[dict[str, Any]]
    sample: dict[str, Any]
    clean: Tensor
    items: list[_Item]


@dataclass
class _Item:
    modality: str
    frames: int
    size: tuple[int, int]
    views: Callable[[Tensor], list[Tensor]]


class ModelAttack:
    """Attacks questions of a model, many at a time.

    Args:
        chat: A model whose weights are here.
        settings: What is done.

    Raises:
        UserError: If the model is no such model.
    """

    def __init__(self, chat: Any, settings: AttackSettings) -> None:
        if not isinstance(chat, Chat):
            raise UserError(
                f"{getattr(chat, 'name', chat)}: attacks need a model whose weights are here and run by llavakit's own "
                "network; a service, another library's class and a system above a model have no gradients to give"
            )
        if not chat.processor.image_processor.takes_media:
            raise UserError(f"{chat.name}: is a language model without a vision side; there are no pictures to attack")
        self.chat, self.settings = chat, settings
        chat.model.eval().requires_grad_(False)

    # from questions to rows

    def row(self, question: Question, text: str) -> Row:
        """A question with the text that an attack leads to or away from."""
        processor = self.chat.processor
        asked = self.opened(question)
        placement = template_for(processor.template, processor.tokenizer).placement
        answered = [*asked, {"role": "assistant", "content": [{"type": "text", "text": text}]}]
        sample = processor.encode(answered, placement=placement)
        items = list(self._items(asked, sample))
        frames = [frame for item, frames in items for frame in frames]
        return Row(question, asked, sample, _padded(frames), [item for item, _ in items])

    def opened(self, question: Question) -> list[dict[str, Any]]:
        """The question's messages with their media opened."""
        messages = []
        for message in question.messages():
            content = []
            for part in message["content"]:
                if part["type"] in ("image", "video"):
                    item, _ = self.chat.processor.read_media(part)
                    part = {**part, part["type"]: item}
                elif part["type"] == "volume":
                    raise UserError(
                        f"question {question.question_id!r}: volumes are not attacked; pictures and videos are"
                    )
                content.append(part)
            messages.append({**message, "content": content})
        return messages

    def _items(
        self, messages: Sequence[Mapping[str, Any]], sample: Mapping[str, Any]
    ) -> Iterator[tuple[_Item, list[Tensor]]]:
        """What is attacked of every media item, and how it becomes encoder inputs."""
        parts = [part for message in messages for part in message["content"] if part["type"] in ("image", "video")]
        spec, rest = self.chat.processor.spec, list(sample["pixel_values"])
        media = zip(parts, sample["visual_modalities"], sample["visual_sizes"], strict=True)
        for place, (part, number, size) in enumerate(media):
            modality = MODALITIES[number]
            planner = spec.route(modality).planner
            boxes = sample["visual_regions"][place] if sample["visual_regions"] else None
            plan = spec.plan(modality, MediaSize(*size), read_region_tensor(boxes))
            own, rest = rest[: len(plan.views)], rest[len(plan.views) :]
            if self.settings.at == "pixels":
                opened = part[part["type"]]
                frames = [_pixels(frame) for frame in (opened if part["type"] == "video" else [opened])]
                views = _planned(planner, plan)
                views(torch.stack(frames))  # says at once if there are no gradients to be had
                yield _Item(modality, len(frames), tuple(frames[0].shape[-2:]), views), frames
                continue
            mean, std = _normalisation(planner)
            for view in own:
                if view.dim() != 3:
                    raise UserError("at=views: encoder inputs with a depth are not attacked; use at=pixels")
                frame = (view * std + mean).clamp(0, 1)
                yield _Item("view", 1, tuple(frame.shape[-2:]), _normalised(mean, std)), [frame]

    def views(self, row: Row, pixels: Tensor) -> list[Tensor]:
        """Encoder inputs of a row's pixels."""
        found, begin = [], 0
        for item in row.items:
            height, width = item.size
            found += item.views(pixels[begin : begin + item.frames, :, :height, :width])
            begin += item.frames
        return found

    # attack

    def attack(
        self,
        rows: Sequence[Row],
        *,
        towards: bool,
        starts: Sequence[Tensor | None] = (),
        progress: Callable[[int, Tensor], None] | None = None,
    ) -> list[tuple[Tensor, dict[str, Any]]]:
        """Attacked pixels of every row, and figures of the course.

        Args:
            towards: Lead to the rows' texts instead of away from them; a row whose every token is sure leaves.
            starts: First points, None for the clean ones.
        """
        device, dtype = self.chat.model.device, torch.float32
        clean = _stacked([row.clean for row in rows]).to(device, dtype)
        loss = TextLoss(
            self.chat.model, [row.sample for row in rows], lambda pixels, number: self.views(rows[number], pixels)
        )
        given = [
            row.clean if start is None else start for row, start in zip(rows, starts or [None] * len(rows), strict=True)
        ]

        def judge(points: Tensor, which: Tensor) -> Judged:
            value = loss(points, which)
            return Judged(-value if towards else value, loss.worst < SURE if towards else None)

        found = apgd(
            judge,
            clean,
            eps=self.settings.eps,
            steps=self.settings.steps,
            norm=self.settings.norm,
            first_step=self.settings.first_step,
            start=_stacked(given).to(device, dtype),
            leave=towards,
            progress=progress,
        )
        return [self._result(row, found, number, -1 if towards else 1) for number, row in enumerate(rows)]

    def _result(self, row: Row, found: Attacked, number: int, sign: int) -> tuple[Tensor, dict[str, Any]]:
        point = found.broken_at[number] if bool(found.broken[number]) else found.best[number]
        frames, _, height, width = row.clean.shape
        point = point[:frames, :, :height, :width].cpu().float()
        if self.settings.at == "pixels":
            point = whole_levels(point, row.clean, self.settings.eps if self.settings.norm == "linf" else None)
        moved = (point - row.clean).flatten()
        curve = [sign * float(value) for value in found.curve[:, number]]
        figures = {
            "loss_start": round(curve[0], 6),
            "loss": round(curve[-1], 6),
            "gradients": int(found.steps[number]),
            "largest_change": round(float(moved.abs().max()) * GREY, 4),
            "l2_change": round(float(moved.norm()), 5),
            "curve": [round(value, 4) for value in curve[:: max(len(curve) // 50, 1)]],
        }
        return point, figures

    # answers

    def answer(self, rows: Sequence[tuple[Question, Row | None, Tensor | None]], max_new_tokens: int) -> list[str]:
        """Greedy answers about attacked pixels, or about the clean pictures where there are none."""
        if self.settings.at == "pixels":
            asked = [
                self.opened(question) if pixels is None else _with_pictures(row, pixels)
                for question, row, pixels in rows
            ]
            found = self.chat.answer_all(asked, max_new_tokens=max_new_tokens)
            for answer in found:
                if isinstance(answer, UserError):
                    raise answer
            return [answer.content for answer in found]
        requests = []
        for question, row, pixels in rows:
            asked = self.opened(question) if row is None else row.messages
            request = self.chat.request(self.chat.codec.prepare(asked), max_new_tokens=max_new_tokens)
            if pixels is not None:
                request.pixel_values = [view.to(request.pixel_values[0]) for view in self.views(row, pixels)]
            requests.append(request)
        return [reply.text for reply in self.chat.engine.generate(requests)]


def whole_levels(point: Tensor, clean: Tensor, eps: float | None) -> Tensor:
    """Pixels of whole grey levels, as a file holds them; rounding does not leave a linf ball."""
    base = (clean * GREY).round()
    moved = (point * GREY).round() - base
    if eps is not None:
        reach = math.floor(eps * GREY + 1e-6)
        moved = moved.clamp(-reach, reach)
    return ((base + moved).clamp(0, GREY)) / GREY


def _pixels(picture: Any) -> Tensor:
    array = np.asarray(picture.convert("RGB") if isinstance(picture, Image.Image) else picture, np.uint8)
    return torch.from_numpy(array.copy()).permute(2, 0, 1).float() / GREY


def to_picture(pixels: Tensor) -> Image.Image:
    """A picture of pixels [3, height, width] of whole grey levels."""
    return Image.fromarray((pixels * GREY).round().to(torch.uint8).permute(1, 2, 0).numpy())


def _planned(planner: Any, plan: Any) -> Callable[[Tensor], list[Tensor]]:
    return lambda pixels: cut(planner, plan, pixels)


def _normalised(mean: Tensor, std: Tensor) -> Callable[[Tensor], list[Tensor]]:
    return lambda pixels: [(pixels[0] - mean.to(pixels)) / std.to(pixels)]


def _normalisation(planner: Any) -> tuple[Tensor, Tensor]:
    inner = planner
    while not hasattr(inner, "image_mean"):
        inner = next((getattr(inner, name) for name in ("frame", "view") if hasattr(inner, name)), None)
        if inner is None:
            raise UserError(f"at=views: views of type {type(planner).__name__} are not normalised per channel")
    return tuple(torch.tensor(values).view(3, 1, 1) for values in (inner.image_mean, inner.image_std))


def _padded(frames: Sequence[Tensor]) -> Tensor:
    height, width = (max(frame.shape[side] for frame in frames) for side in (-2, -1))
    out = torch.zeros(len(frames), 3, height, width)
    for place, frame in enumerate(frames):
        out[place, :, : frame.shape[-2], : frame.shape[-1]] = frame
    return out


def _stacked(rows: Sequence[Tensor]) -> Tensor:
    """Rows of several sizes in one tensor; what is added is never seen, so no gradient moves it."""
    frames, height, width = (max(row.shape[side] for row in rows) for side in (0, -2, -1))
    out = rows[0].new_zeros(len(rows), frames, 3, height, width)
    for place, row in enumerate(rows):
        out[place, : row.shape[0], :, : row.shape[-2], : row.shape[-1]] = row
    return out


def _with_pictures(row: Row, pixels: Tensor) -> list[dict[str, Any]]:
    """The row's messages with attacked pictures in place of the clean ones."""
    begin, items, messages = 0, iter(row.items), []
    for message in row.messages:
        content = []
        for part in message["content"]:
            if part["type"] in ("image", "video"):
                item = next(items)
                height, width = item.size
                frames = [to_picture(f[:, :height, :width]) for f in pixels[begin : begin + item.frames]]
                begin += item.frames
                part = {**part, part["type"]: frames if part["type"] == "video" else frames[0]}
            content.append(part)
        messages.append({**message, "content": content})
    return messages


# A whole run


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


def _measured(values: Sequence[float]) -> dict[str, Any]:
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
        result |= {"unit": "answers that say the target, %", "clean": _measured(clean), "attacked": _measured(reached)}
        if task.name == "jailbreak":
            free = [
                100.0 * (value > 0) for value in task.scores({n: run.lines[n, 0]["answer"] for n in names}).values()
            ]
            best = {n: run.lines[n, schedule.best_stage[n]]["answer"] for n in names}
            result["not_refused"] = {
                "clean": _measured(free),
                "attacked": _measured(list(task.scores(best).values())),
            }
        return result
    clean = [run.lines[name, 0]["score"] for name in names]
    attacked = [schedule.best[name] for name in names]
    result |= {"unit": task.unit, "clean": _measured(clean), "attacked": _measured(attacked)}
    result["after_stage"] = [round(value, 4) for value in after]
    result["lost"] = _measured([a - b for a, b in zip(clean, attacked, strict=True)])
    return result
