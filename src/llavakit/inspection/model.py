"""The processor that looks at a sample: of a model's folder, or of a stage of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llavakit.data.edits import build_edits
from llavakit.data.records import Record
from llavakit.errors import UserError
from llavakit.inspection.sample import Seen, look, read_sample, stops_of
from llavakit.registry import nearest


def look_with(
    sample: str,
    model: str,
    *,
    prompt: str | None = None,
    images: str | Path | None = None,
    stage: str | None = None,
    **sources: Any,
) -> Seen:
    """What a model sees of a sample.

    Args:
        sample: See `llavakit.inspection.sample.read_sample`; a record is shown as a training sample.
        model: Folder, hub id, or the YAML file of a recipe.
        stage: Of the recipe; default the last.
        sources: `base` and `template`, see `llavakit.load`.

    Raises:
        UserError: If the sample or the model cannot be read, or they do not fit.
    """
    images = None if images is None else Path(images)
    if model.endswith((".yaml", ".yml")):
        if sources:
            raise UserError(f"--{next(iter(sources))}: the recipe says it")
        return _in_recipe(sample, model, prompt, images, stage)
    if stage is not None:
        raise UserError(f"--stage: belongs to a recipe, {model} is a model")
    from llavakit.checkpoints.opening import load_processor, open_checkpoint

    found = read_sample(sample, prompt, images)
    checkpoint = open_checkpoint(model, **sources)
    processor = load_processor(checkpoint)
    seen = _look(found, processor)
    seen.stops += [stop for stop in stops_of(checkpoint.folder, processor.tokenizer) if stop not in seen.stops]
    return seen


def _in_recipe(sample: str, path: str, prompt: str | None, images: Path | None, stage: str | None) -> Seen:
    from llavakit.training.objectives.base import objective_of
    from llavakit.training.objectives.language import LanguageObjective
    from llavakit.training.recipe import load_recipe

    recipe = load_recipe(path)
    names = [one.name for one in recipe.stages]
    if stage is not None and stage not in names:
        raise UserError(f"--stage {stage}: {path} has no such stage{nearest(stage, names)}")
    number = names.index(stage) if stage is not None else len(names) - 1
    objective = objective_of(recipe.stages[number])
    if not isinstance(objective, LanguageObjective):
        raise UserError(f"{path}: stage {names[number]!r} trains an encoder alone, which sees no tokens")
    objective.bind(*objective.describe(recipe))
    file = Path(sample.rpartition(":")[0] or sample).resolve()
    source = next((one for one in recipe.data if Path(one.path).resolve() == file), None)
    if source is not None and images is None and source.images is not None:
        images = Path(source.images)
    found = read_sample(sample, prompt, images)
    if isinstance(found, Record) and source is not None:
        for edit in build_edits(source.edits):
            found.messages[:] = edit(found.messages)
    options = {} if recipe.stages[number].labels is None else {"labels": recipe.stages[number].labels}
    return _look(found, objective.processor, **options)


def _look(found: Any, processor: Any, **options: Any) -> Seen:
    if isinstance(found, Record):
        return look(found.messages, processor, training=True, **options)
    return look(found.messages(), processor, training=False)
