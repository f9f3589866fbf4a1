"""What a recipe is about to do and to take, before anything is allocated: `llavakit train RECIPE --plan`.

Records are counted and tokenised as for training, pictures are not opened. The model stands on meta tensors, and a step
on the largest batch is rehearsed without memory (`training.rehearsal`). `measure` then runs a few steps of the real
thing and says how long the whole takes.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from torch import nn
from transformers import TrainerCallback, set_seed

from llavakit.data.packing import pack_rows
from llavakit.data.stream import RecordStream
from llavakit.errors import UserError
from llavakit.language.packed import can_share
from llavakit.model.routes import MODALITIES, MediaSpec
from llavakit.training import summary
from llavakit.training.check import check_names, check_parts, named
from llavakit.training.dataset import (
    MEMORY,
    PreparedSamples,
    StageCollator,
    global_batch,
    open_records,
    plan_batches,
)
from llavakit.training.fingerprint import spread
from llavakit.training.lora import prepare
from llavakit.training.memory import Memory, check_room, in_gb, room_on, static_bytes
from llavakit.training.objectives.base import Objective, Run
from llavakit.training.objectives.dpo import DPO, answers_of, prompt_of
from llavakit.training.objectives.language import LanguageObjective
from llavakit.training.parameter_groups import core, is_lora, public_name, trained_values
from llavakit.training.recipe import Recipe, Stage
from llavakit.training.recompute import recompute
from llavakit.training.rehearsal import Shape, rehearse
from llavakit.views.plan import MediaSize

SAMPLED = 64  # samples whose size in memory is looked at
TIMED = 2  # steps that are timed, behind one that is not
IGNORE = -100
PER_WEIGHT = {"nf4": 0.5 + (1 + 4 / 256) / 64, "int8": 1.0}
"""Bytes of a quantised weight; nf4 has a scale of 8 bits for 64 weights, and one of 32 bits for 256 of those."""


@dataclasses.dataclass
class StagePlan:
    """A stage that has not begun.

    Attributes:
        stage: Its name.
        parts: Parameters, and how many of them train, by part.
        size: Records, steps, tokens, padding.
        visual_tokens: Among the tokens.
        memory: Of a step on the largest batch.
        room: Bytes that this machine has free for it.
        device: Where it would run.
        seconds: How long the stage takes, if it was measured.
    """

    stage: str
    parts: dict[str, tuple[int, int]]
    size: summary.Plan
    visual_tokens: int
    memory: Memory
    room: int
    device: str
    seconds: float | None = None

    @property
    def fits(self) -> bool:
        """Whether there is room for it."""
        return self.memory.total <= self.room

    def facts(self) -> dict[str, Any]:
        """As JSON."""
        sizes = dataclasses.asdict(self.size)
        return {
            "stage": self.stage,
            "parts": {name: {"parameters": total, "trained": own} for name, (total, own) in self.parts.items()},
            **{name: sizes[name] for name in ("records", "samples", "steps", "tokens")},
            "visual_tokens": self.visual_tokens,
            "padding": self.size.padding,
            "padding_without_packing": self.size.unpacked,
            "memory": {**self.memory.terms, "total": self.memory.total, "free": self.room, "fits": self.fits},
            "device": self.device,
            "seconds": self.seconds,
            "notes": self.memory.notes,
        }


def plan_recipe(recipe: Recipe) -> list[StagePlan]:
    """The plans of all stages, each as if nothing of the recipe had run.

    Raises:
        UserError: For whatever would stop the training, in one line.
    """
    found = []
    process = psutil.Process().memory_info().rss
    config = processor = None
    for number, stage in enumerate(recipe.stages):
        objective = check_names(recipe, number)
        if config is None:
            config, processor = objective.describe(recipe)
        found.append(_plan(recipe, number, global_batch(stage, 1), objective, config, processor, process))
    return found


def _plan(
    recipe: Recipe, number: int, stage: Stage, objective: Objective, config: Any, processor: Any, process: int
) -> StagePlan:
    from llavakit.training.run import training_arguments

    tokenizer = getattr(processor, "tokenizer", None)
    check_parts(recipe, number, objective, config, tokenizer)
    with named(number):
        objective.bind(config, processor)
    samples = _samples(recipe, number, stage, objective, memory=0)
    batches = plan_batches(samples, stage, recipe.stage_seed(number))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = _on_meta(stage, objective, config, tokenizer)
    parts = _count(model)
    saved, unpacked = _quantised(model, stage)
    flat = stage.packing is True and isinstance(objective, LanguageObjective) and device == "cpu"
    size = summary.plan_of(samples, stage, batches, 1, flat)
    if isinstance(objective, LanguageObjective):
        largest = max(batches, key=lambda batch: _positions(samples, stage, batch, flat))
        shares = objective.by_position and can_share(core(model))
        shape = shape_of(samples, objective, stage, largest, config, flat=flat, shares=shares)
        arguments = training_arguments(recipe, stage, Path(recipe.output), 0)
        options = {"pairs": isinstance(objective, DPO), "narrow": objective.by_position}
        memory = rehearse(model, stage, shape, arguments, device=device, **options)
        memory.weights -= saved
        memory.activations += unpacked
    else:
        memory = static_bytes(model, stage)
        memory.notes.append(f"the activations of objective {stage.objective.type!r} are not counted")
    if device == "cpu":
        memory.process, memory.samples = process, _remembered(samples, objective, config)
    visual = _visual_tokens(samples, batches, size) if isinstance(objective, LanguageObjective) else 0
    return StagePlan(stage.name, parts, size, visual, memory, room_on(device), device)


def _samples(recipe: Recipe, number: int, stage: Stage, objective: Objective, **options: Any) -> PreparedSamples:
    records = open_records(recipe, number, objective.read)
    if isinstance(records, RecordStream):
        raise UserError(f"stage {stage.name!r}: learns from a stream, whose records nobody has counted; it has no plan")
    options |= {"on_bad_record": recipe.on_bad_record, "seed": recipe.stage_seed(number)}
    return PreparedSamples(records, objective, **options)


def _on_meta(stage: Stage, objective: Objective, config: Any, tokenizer: Any) -> nn.Module:
    with torch.device("meta"):
        model = objective.skeleton(config)
        if stage.dtype == "bfloat16":
            model.to(torch.bfloat16)  # before adapters are added, which stay in float32
        if stage.lora is not None:
            stage = stage.model_copy(update={"lora": stage.lora.model_copy(update={"quantize": None})})
        return prepare(model, stage, tokenizer)


def _quantised(model: nn.Module, stage: Stage) -> tuple[int, int]:
    """Bytes that weights take less once they are quantised, and those of the largest one, unpacked to multiply with."""
    if stage.lora is None or stage.lora.quantize is None:
        return 0, 0
    adapted = [getattr(module, "base_layer", None) for module in model.modules()]
    weights = [layer.weight for layer in adapted if isinstance(layer, nn.Linear)]
    kept = sum(weight.numel() * PER_WEIGHT[stage.lora.quantize] for weight in weights)
    return round(sum(weight.nbytes for weight in weights) - kept), max((weight.nbytes for weight in weights), default=0)


def _count(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Parameters and trained ones by part."""
    counts: dict[str, tuple[int, int]] = {}
    for name, parameter in model.named_parameters():
        part = "lora" if is_lora(name) else public_name(name).partition(".")[0]
        total, trained = counts.get(part, (0, 0))
        own = trained_values(parameter) if parameter.requires_grad else 0
        counts[part] = total + parameter.numel(), trained + own
    return counts


# Sizes of batches


def _positions(samples: PreparedSamples, stage: Stage, batch: Sequence[int], flat: bool) -> int:
    lengths = [abs(samples.length(index)) for index in batch]
    if stage.packing and not flat:
        return len(pack_rows(lengths, stage.max_length)) * stage.max_length
    return sum(lengths) if flat else len(lengths) * max(lengths)


def _sample(samples: PreparedSamples, index: int) -> dict[str, Any]:
    """A sample without its pixels."""
    return samples.dataset.sample(int(index), lambda record: samples.maker.encode(record, media=False))


def shape_of(
    samples: PreparedSamples,
    objective: Any,
    stage: Stage,
    batch: Sequence[int],
    config: Any,
    *,
    flat: bool,
    shares: bool = False,
) -> Shape:
    """The sizes of a batch, without opening its pictures.

    Args:
        flat: Whether it is one row, see `StageCollator`.
        shares: Whether that row holds once what its samples begin with.
    """
    chosen = [_sample(samples, index) for index in batch]
    if chosen and "fork" in chosen[0] and not flat:
        chosen = [row for pair in chosen for row in answers_of(pair)]
    lengths = [len(sample["input_ids"]) for sample in chosen]
    rows, row = (len(lengths), max(lengths)), None
    if flat:
        collator = StageCollator(0, flat=True, placeholder=objective.processor.image_token_id if shares else None)
        cut = collator.cut([prompt_of(sample) if "fork" in sample else sample for sample in chosen])
        cuts = [0, *[cut] * (len(chosen) - 1)]
        row = [place for length, own in zip(lengths, cuts, strict=True) for place in range(own, length)]
        rows = (1, len(row))
    if stage.packing and not flat:
        lengths = [abs(samples.length(index)) for index in batch]
        rows = (len(pack_rows(lengths, stage.max_length)), stage.max_length)
    targets = sum(int((torch.as_tensor(sample["labels"])[1:] != IGNORE).sum()) for sample in chosen)
    spec = objective.processor.spec
    views, sizes, modalities = [], [], []
    for sample in chosen:
        for size, modality in zip(sample["visual_sizes"], sample["visual_modalities"], strict=True):
            views += view_shapes(config, spec, size, int(modality))
            sizes.append(list(map(int, size)))
            modalities.append(int(modality))
    return Shape(rows, row, targets, views, sizes, modalities)


def view_shapes(config: Any, spec: MediaSpec, size: Sequence[int], modality: int) -> list[tuple[int, ...]]:
    """Shapes of the views of a media item, [channels, (depth,) height, width] each."""
    name = MODALITIES[modality]
    route = spec.route(name)
    channels = [getattr(config.encoder_config(encoder)[0], "num_channels", 3) for encoder in route.encoders]
    found = []
    for view in spec.plan(name, MediaSize(*map(int, size))).views:
        deep = view.depth > 1 or route.geometries[view.encoder].volumetric
        found.append((channels[view.encoder], *((view.depth,) if deep else ()), view.height, view.width))
    return found


def _remembered(samples: PreparedSamples, objective: Objective, config: Any) -> int:
    """Bytes of prepared samples that training remembers."""
    numbers, total = spread(len(samples), SAMPLED), 0
    for index in numbers:
        sample = _sample(samples, index)
        total += objective.size({**sample, "pixel_values": []})
        if objective.stage.cache_features or "visual_sizes" not in sample:
            continue
        for size, modality in zip(sample["visual_sizes"], sample["visual_modalities"], strict=True):
            shapes = view_shapes(config, objective.processor.spec, size, int(modality))
            total += 4 * sum(math.prod(shape) for shape in shapes)
    return min(MEMORY, round(total / max(len(numbers), 1) * len(samples)))


def _visual_tokens(samples: PreparedSamples, batches: Sequence[Sequence[int]], size: summary.Plan) -> int:
    """Of all samples of the stage, from as many as are looked at."""
    planned = [index for batch in batches for index in batch]
    visual = tokens = 0
    for place in spread(len(planned), SAMPLED):
        sample = _sample(samples, planned[place])
        ids = torch.as_tensor(sample["input_ids"])
        visual += int((ids == samples.maker.processor.image_token_id).sum())
        tokens += len(ids)
    return round(size.tokens * visual / max(tokens, 1))


# What is said


def lines(plan: StagePlan) -> Iterable[str]:
    """What `--plan` prints of a stage."""
    size, memory = plan.size, plan.memory
    about = "" if size.exact else "about "
    padding = f"{100 * size.padding:.0f} % padding"
    if size.unpacked is not None:
        padding += f" ({100 * size.unpacked:.0f} % without packing)"
    yield (
        f"{plan.stage}: {size.records:,} records, {size.samples:,} samples in {size.steps:,} steps, {about}"
        f"{size.tokens:,} tokens, {plan.visual_tokens:,} of them visual, {padding}"
    )
    yield f"  {'part':28}{'parameters':>16}{'trained':>16}"
    for name, (total, trained) in plan.parts.items():
        yield f"  {name:28}{total:>16,}{trained:>16,}"
    totals = [sum(column) for column in zip(*plan.parts.values(), strict=True)]
    yield f"  {'all':28}{totals[0]:>16,}{totals[1]:>16,}"
    yield f"  {'peak memory, ' + plan.device:28}{'bytes':>16}"
    for name, value in memory.terms.items():
        yield f"  {name:28}{in_gb(value):>16}"
    verdict = "fits" if plan.fits else "does NOT fit"
    yield f"  {'all':28}{in_gb(memory.total):>16}  {verdict}: {in_gb(plan.room)} are free"
    for note in memory.notes:
        yield f"  note: {note}"
    if plan.seconds is not None:
        yield f"  time, from {TIMED} timed steps: {summary.in_time(plan.seconds)}"


# Time


class _Clock(TrainerCallback):
    """Ends of steps."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Note the time."""
        self.ends.append(time.monotonic())


def measure(recipe: Recipe, number: int, plan: StagePlan) -> float:
    """Seconds that a stage takes from its first step to its last, from a few steps of it; nothing is written.

    Weights are those that the recipe starts from, whatever earlier stages would make of them.

    Raises:
        RecipeError: If it does not fit in memory.
    """
    from llavakit.training.run import training_arguments
    from llavakit.training.trainer import StageTrainer

    check_room(plan.memory, plan.room, f"stage {plan.stage!r}")
    stage = global_batch(recipe.stages[number], 1).model_copy(update={"cache_features": False, "save_steps": None})
    objective = check_names(recipe, number)
    objective.stage = stage
    module, processor = objective.build(recipe)
    with named(number):
        objective.fit(module)
        objective.bind(module.config if hasattr(module, "config") else None, processor)
    set_seed(recipe.stage_seed(number))
    if stage.dtype == "bfloat16":
        module.to(torch.bfloat16)
    net = prepare(module.train(), stage, getattr(processor, "tokenizer", None))
    samples = _samples(recipe, number, stage, objective)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(
            recipe=recipe,
            stage=stage,
            seed=recipe.stage_seed(number),
            folder=Path(folder),
            cache=Path(folder) / "cache",
            module=module,
            wrapped=net,
            processor=processor,
            samples=samples,
            start=lambda: objective.build(recipe),
            console=Console(quiet=True),
            world=1,
        )
        batches = plan_batches(samples, stage, recipe.stage_seed(number))
        steps = min(TIMED + 1, -(-len(batches) // stage.accumulation))
        chosen = [batches[place] for place in spread(len(batches), steps * stage.accumulation)]
        objective.begin(run)
        recompute(net, stage.gradient_checkpointing)
        clock = _Clock()
        trainer = StageTrainer(
            net,
            training_arguments(recipe, stage, Path(folder), 0),
            stage=stage,
            objective=objective,
            samples=samples,
            batches=chosen,
            collator=objective.collator(run),
            processor=processor,
        )
        trainer.add_callback(clock)
        began = time.monotonic()
        trainer.train()
    ends = clock.ends if len(clock.ends) == 1 else clock.ends[1:]
    first = began if len(clock.ends) == 1 else clock.ends[0]
    timed = chosen[-len(ends) * stage.accumulation :]
    tokens = sum(abs(samples.length(index)) for batch in timed for index in batch)
    return (ends[-1] - first) * plan.size.tokens / max(tokens, 1)
