"""Checks of a whole recipe before its first step, so that no stage trains for another one that cannot start.

Cheap checks come first: names and contradictions of all stages, then the parts on meta tensors, then the files, then
a sample of the records with their media (or all of them). A file may still vanish while training runs.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from llavakit.conversation.template import OWN, get_template
from llavakit.data.dataset import SampleDataset
from llavakit.data.mixture import Mixture
from llavakit.data.shards import Blocks
from llavakit.data.stream import RecordStream
from llavakit.errors import RecipeError, RecordError, UserError
from llavakit.registry import OBJECTIVES
from llavakit.training import distributed
from llavakit.training.dataset import global_batch, open_records
from llavakit.training.features import cacheable
from llavakit.training.fingerprint import spread
from llavakit.training.lora import prepare
from llavakit.training.memory import check_room, room_on, static_bytes
from llavakit.training.objectives.base import Objective, objective_of
from llavakit.training.recipe import Recipe, Stage
from llavakit.training.recompute import parts_to_recompute
from llavakit.training.schedules import check_schedule
from llavakit.training.streaming import StreamSamples

RECORDS = 8  # per source and stage, with "sample"
SHARDS = 4  # of a stream that these are taken from


def check_recipe(recipe: Recipe, numbers: Sequence[int], *, level: str = "sample", records: Any = None) -> None:
    """Check the stages that are still to run.

    Args:
        numbers: Their numbers.
        level: "sample" opens a few records of every source, "all" every record with its media.
        records: What training learns from instead of the recipe's sources.

    Raises:
        RecipeError, RecordError, CheckpointError: The first problem, in one line.
    """
    if not numbers:
        return
    objectives = {number: check_names(recipe, number) for number in numbers}
    config, processor = objectives[numbers[0]].describe(recipe)
    for number, objective in objectives.items():
        room = room_on("cuda" if torch.cuda.is_available() else "cpu")
        room *= distributed.world_size() if recipe.stages[number].shard else 1
        check_parts(recipe, number, objective, config, getattr(processor, "tokenizer", None), room)
    opened = {
        number: open_records(recipe, number, objective.read) if records is None else records
        for number, objective in objectives.items()
    }
    checked: set[str] = set()
    for number, objective in objectives.items():
        with named(number):
            objective.bind(config, processor)
        found = opened[number]
        if isinstance(found, RecordStream):
            check_stream(recipe, number, found, objective, level=level, checked=checked)
        else:
            check_records(recipe, recipe.stages[number], found, objective, level=level, checked=checked)


@contextmanager
def named(number: int, key: str | None = None, *others: type[Exception]) -> Iterator[None]:
    """Errors inside are about this stage (and this key of it)."""
    where = f"stages.{number}." if key is None else f"stages.{number}.{key}: "
    try:
        yield
    except RecordError:
        raise
    except (UserError, *others) as error:
        raise RecipeError(f"{where}{' '.join(str(error).split())}") from error


def check_names(recipe: Recipe, number: int) -> Objective:
    """Objective, template, optimiser, schedule and numbers of a stage; nothing is opened or built."""
    from llavakit.training.run import training_arguments

    stage = recipe.stages[number]
    with named(number):
        objective = objective_of(stage)
    families = [OBJECTIVES.get(other.objective.type).family for other in recipe.stages]
    if families[number] != families[0]:
        raise RecipeError(
            f"stages.{number}.objective: {stage.objective.type!r} trains another kind of module ({families[number]}) "
            f"than the first stage ({families[0]}); all stages of a recipe train the same one, so write two recipes"
        )
    global_batch(stage, distributed.world_size())
    if stage.template not in (None, OWN):
        with named(number, "template"):
            get_template(stage.template)
    if stage.lora is not None and stage.lora.quantize and importlib.util.find_spec("bitsandbytes") is None:
        raise RecipeError(f"stages.{number}.lora.quantize: needs the package bitsandbytes; pip install bitsandbytes")
    with named(number, "optimizer", ValueError, ImportError, RuntimeError):
        Trainer.get_optimizer_cls_and_kwargs(training_arguments(recipe, stage, Path(recipe.output), 0), None)
    with named(number, "schedule_options", ValueError, TypeError, ArithmeticError):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        check_schedule(stage, optimizer)
    return objective


def check_parts(
    recipe: Recipe, number: int, objective: Objective, config: Any, tokenizer: Any = None, room: int | None = None
) -> None:
    """What trains in a stage, its adapters and its media, on meta tensors.

    Args:
        room: Bytes that weights, gradients and the optimiser's averages may take.
    """
    stage = recipe.stages[number]
    with named(number, "media"):
        try:
            model = objective.skeleton(config)
        except (RuntimeError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            said = " ".join(str(error).split())
            raise RecipeError(f"a model of these parts cannot be built ({type(error).__name__}: {said})") from error
    if stage.lora is not None:  # quantising needs weights
        stage = stage.model_copy(update={"lora": stage.lora.model_copy(update={"quantize": None})})
    with named(number), torch.device("meta"):
        model = prepare(model, stage, tokenizer)
    with named(number):
        parts_to_recompute(model, stage.gradient_checkpointing)
        if room is not None and (stage.lora is None or stage.lora.quantize is None):
            check_room(static_bytes(model, stage), room, "train")
    if stage.cache_features and not cacheable(model):
        raise RecipeError(f"stages.{number}.cache_features: an encoder trains in this stage, so its features change")


def check_records(
    recipe: Recipe, stage: Stage, records: Any, objective: Objective, *, level: str, checked: set[str]
) -> None:
    """Records with their media as a stage prepares them.

    Args:
        checked: Stages that prepare the same records alike need no second look; this set is added to.

    Raises:
        RecordError: For a broken record, with `on_bad_record: stop`.
        UserError: If no record of a source is any good.
    """
    if not len(records):
        raise UserError(f"stage {stage.name!r}: there is no record to learn from")
    dataset = SampleDataset(records, objective.encode, check=objective.check, whole_records=True)
    begin = 0
    while begin < len(records):
        same = records.same_source(begin) if isinstance(records, Mixture) else range(len(records))
        key = str((dataset.place(begin) if isinstance(records, Mixture) else "", len(same))) + _preparation(stage)
        if key not in checked:
            checked.add(key)
            _check_source(dataset, same, level, skip=recipe.on_bad_record == "skip")
        begin = same.stop


def _preparation(stage: Stage) -> str:
    return str((stage.template, stage.labels, stage.max_length, stage.media, stage.objective))


def check_stream(
    recipe: Recipe, number: int, stream: RecordStream, objective: Objective, *, level: str, checked: set[str]
) -> None:
    """Whether a stage can learn from a stream, and the first records of some of its shards (or all).

    Raises:
        RecipeError: If the stage would have to know the stream beforehand.
        RecordError, UserError: See `check_records`.
    """
    stage = recipe.stages[number]
    name = next(own.file for own in stream.sources if not isinstance(own, Blocks))
    problem = None
    if stage.max_steps is None:
        problem = "max_steps: is missing; where a stream ends is not known, so the stage must say how long it is"
    elif stage.cache_features:
        problem = "cache_features: takes every record beforehand, a stream does not end"
    elif not objective.streams:
        problem = f"objective: {stage.objective.type!r} looks at every record beforehand, a stream does not end"
    if problem:
        raise RecipeError(f"stages.{number}.{problem} ({name})")
    samples = StreamSamples(stream, objective)
    for source, shards in enumerate(stream.sources):
        key = str((shards.file, len(shards))) + _preparation(stage)
        if key in checked:
            continue
        checked.add(key)
        numbers = range(len(shards)) if level == "all" else spread(len(shards), SHARDS)
        each = None if level == "all" else RECORDS // min(len(numbers), SHARDS)
        entries = (entry for shard in numbers for entry in itertools.islice(stream.entries(source, shard), each))
        usable, bad = 0, None
        while chunk := list(itertools.islice(entries, RECORDS)):
            dataset = samples.dataset(chunk)
            for place in range(len(chunk)):
                try:
                    dataset[place]
                    usable += 1
                except RecordError as error:
                    if recipe.on_bad_record == "stop":
                        raise
                    bad = bad or error
        if bad is not None and not usable:
            raise UserError(f"no usable record among those looked at in {shards.file}; {bad}")
        if not usable:
            raise UserError(f"{shards.file}: holds no record in the shards looked at")


def _check_source(dataset: SampleDataset, numbers: range, level: str, *, skip: bool) -> None:
    chosen = numbers if level == "all" else [numbers[place] for place in spread(len(numbers), RECORDS)]
    bad = []
    for index in chosen:
        try:
            dataset[index]
        except RecordError as error:
            if not skip:
                raise
            bad.append(error)
    if len(bad) < len(chosen):
        return
    for index in numbers:  # those that were looked at may be the only broken ones
        try:
            dataset[index]
        except RecordError:
            continue
        return
    raise UserError(f"no usable record in the source of {bad[0].file}; {bad[0]}")
