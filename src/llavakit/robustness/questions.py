"""Pictures of questions attacked, through a model's own preprocessing or as its encoder's inputs, and asked about anew.

Pixels stand in rows of one tensor, a row per question with all its pictures and frames; what pads a row is never seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from llavakit.conversation.template import template_for
from llavakit.errors import UserError
from llavakit.evaluation.benchmarks.base import Question
from llavakit.generation.chat import Chat
from llavakit.model.routes import MODALITIES, read_region_tensor
from llavakit.robustness.apgd import Attacked, Judged, apgd
from llavakit.robustness.balls import check_eps, check_norm
from llavakit.robustness.ensemble import Stage
from llavakit.robustness.model_attack import TextLoss
from llavakit.robustness.tasks import Task
from llavakit.views.differentiable import cut
from llavakit.views.plan import MediaSize

AT = ("pixels", "views")
GREY = 255
SURE = math.log(2)  # a token's loss below which it is likelier than all others together


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
