"""Commands of training: `train`, and what writes its records: `prepare`, `boxes`, `phantom`."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from llavakit.cli.common import Device, Json, OnBadRecord, app, assignments, print_json, writing


class Check(StrEnum):
    """How many records are opened before training begins."""

    sample = "sample"
    all = "all"


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file of parts, data and stages.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Values by dotted path.")
    ] = None,
    on_bad_record: Annotated[
        OnBadRecord | None, typer.Option(help="Stop at a broken record, or skip it and list it at the end.")
    ] = None,
    check: Annotated[
        Check, typer.Option(help="Records that are opened before the first step: some of every source, or all.")
    ] = Check.sample,
    plan: Annotated[
        bool, typer.Option("--plan", help="Train nothing: print sizes, steps, tokens and peak memory of every stage.")
    ] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="With --plan: run a few steps of every stage and say how long it takes.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a model through the stages of a recipe.

    After a kill, the same command continues where training was. Prints the folder of the finished model; with --plan
    what the recipe would do and take, and ends with 1 if that does not fit in memory.

    \b
    Examples:
      llavakit train recipe.yaml
      llavakit train recipe.yaml output=runs/mine stages.1.epochs=2 stages.1.learning_rate=1e-5
      llavakit train recipe.yaml --plan --measure
      torchrun --nproc-per-node 8 -m llavakit.cli train recipe.yaml stages.tune.shard=true
    """
    extra = [f"on_bad_record={on_bad_record}"] if on_bad_record else []
    if plan or measure:
        _print_plan(recipe, [*(overrides or ()), *extra], timed=measure, as_json=as_json)
        return
    from llavakit.training.run import train as run_training

    result = run_training(recipe, [*(overrides or ()), *extra], check=check.value)
    for stage in result.stages:
        print(f"{stage.name}: {'trained' if stage.ran else 'was finished before'}, {stage.folder}", file=sys.stderr)
    if as_json:
        print_json({"final": str(result.final), "stages": [stage.metrics for stage in result.stages]})
        return
    print(result.final)


def _print_plan(recipe: Path, overrides: list[str], *, timed: bool, as_json: bool) -> None:
    from llavakit.training import plan as planning
    from llavakit.training.recipe import load_recipe

    read = load_recipe(recipe, overrides)
    plans = planning.plan_recipe(read)
    if timed:
        for number, own in enumerate(plans):
            own.seconds = planning.measure(read, number, own)
    if as_json:
        print_json({"stages": [own.facts() for own in plans]})
    else:
        print("\n".join(line for own in plans for line in planning.lines(own)))
    if not all(own.fits for own in plans):
        raise typer.Exit(1)


@app.command()
def prepare(
    name: Annotated[str, typer.Argument(metavar="NAME", help="video_instruct, surgical_dialogues, ...")],
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Annotations or records: a file or a folder.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Records to write: .json or .jsonl.")],
    key_values: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Options of the preparation.")
    ] = None,
    on_bad_record: Annotated[OnBadRecord, typer.Option(help="What to do with a broken record.")] = OnBadRecord.stop,
    as_json: Json = False,
) -> None:
    """Make training records of annotations or of other people's files.

    What a model was asked is kept beside OUT; interrupted, the same command goes on.

    \b
    Examples:
      llavakit prepare video_instruct VideoInstruct100K.json train.json suffix=.mp4
      llavakit prepare surgical_dialogues cholec80 dialogues.jsonl teacher=http://localhost:8000/v1
    """
    options = assignments(key_values or ())
    from llavakit.data.preparation import prepare as run_preparation

    with writing(output):
        found = run_preparation(name, source, output, on_bad_record=on_bad_record.value, **options)
    if as_json:
        print_json(found)
        return
    left_out = found.pop("left_out")
    print(f"{output}: {', '.join(f'{value} {key}' for key, value in found.items())}")
    for line in left_out:
        print(f"left out: {line}", file=sys.stderr)


@app.command()
def boxes(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Records or questions, a picture, or a folder of them.")
    ],
    detector: Annotated[str, typer.Option(help="Folder or hub id of OWLv2, Grounding DINO or another of their kind.")],
    out: Annotated[Path, typer.Option(help="The box file, .jsonl; an interrupted one is continued.")],
    tags: Annotated[
        str | None, typer.Option(help="What to look for, 'dog, red car'; default: the record's tags or question.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the pictures; default: that of SOURCE.")] = None,
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Least score of a box.")] = 0.2,
    on_bad_record: Annotated[OnBadRecord, typer.Option(help="What to do with a broken record.")] = OnBadRecord.stop,
    device: Device = None,
) -> None:
    """Find objects in pictures, and write a box file for training, eval and chat.

    \b
    Examples:
      llavakit boxes mix.json --images data --detector google/owlv2-large-patch14-ensemble --out boxes.jsonl
      llavakit boxes photos --tags "person, cup, red car" --detector IDEA-Research/grounding-dino-base --out b.jsonl
    """
    from llavakit.checkpoints.identity import model_identity
    from llavakit.checkpoints.opening import local_folder
    from llavakit.data.detection import jobs_of, write_boxes
    from llavakit.generation.load import check_device
    from llavakit.vision.detection import Detector

    jobs = iter(list(jobs_of(source, images=images, tags=tags)))  # what is wrong with the records is said first
    folder = local_folder(detector)
    settings = {"detector": model_identity(folder), "threshold": threshold, "tags": tags}
    find = Detector.load(folder, threshold=threshold, device=check_device(device))
    with writing(out):
        done = write_boxes(jobs, find, out, settings=settings, on_bad_record=on_bad_record.value)
    more = f", {done['kept']} were there" if done["kept"] else ""
    without = f", {done['without']} records have no picture" if done["without"] else ""
    print(f"{out}: boxes of {done['found']} pictures{more}{without}", file=sys.stderr)
    if done["bad"]:
        print(done["bad"].report(), file=sys.stderr)


@app.command()
def phantom(
    world: Annotated[str, typer.Argument(metavar="WORLD", help="thorax, scene, procedure.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    key_values: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Options of the world.")
    ] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Number of cases (patients, scenes).")] = 100,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Same seed, same data.")] = 0,
    as_json: Json = False,
) -> None:
    """Write data of a procedural world.

    Media, records in LLaVA's format, and the truth about every case.

    \b
    Examples:
      llavakit phantom thorax data/thorax --n 1000 --seed 0
      llavakit phantom scene data/scene --n 200 --seed 7 size=64
    """
    options = assignments(key_values or ())
    from llavakit.phantom.write import write_world

    with writing(out):
        manifest = write_world(world, out, n=n, seed=seed, **options)
    if as_json:
        print_json(manifest)
    else:
        counts = ", ".join(f"{count} {name}" for name, count in manifest["counts"].items())
        print(f"{out}: {counts}{' (was there already)' if manifest['reused'] else ''}")


@app.command()
def prefer(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file: policy, judge, prompts, stage.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Values by dotted path.")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print how many calls it takes, and stop.")] = False,
    as_json: Json = False,
) -> None:
    """Let a model learn from what a judge prefers among its own answers, in rounds.

    Killed at any call, the same command goes on. Prints the folder of the last policy.

    \b
    Examples:
      llavakit prefer recipes/preference.yaml policy=runs/demo/final judge=runs/critic prompts.0.path=asked.json
      llavakit prefer recipes/preference.yaml judge=http://localhost:8000/v1#critic comparison=critic rounds=3
      llavakit prefer recipes/preference.yaml --plan
    """
    from llavakit.training.preference_rounds import RoundsRecipe, calls_of, read_questions, run_rounds
    from llavakit.training.recipe import load_recipe

    wanted = load_recipe(recipe, overrides or (), RoundsRecipe)
    if plan:
        counts = calls_of(wanted, sum(1 for _ in read_questions(wanted)))
        if as_json:
            print_json(counts)
        else:
            print(", ".join(f"{what}: at most {count:,} calls" for what, count in counts.items()))
        return
    results = run_rounds(wanted)
    if as_json:
        print_json([vars(result) for result in results])
    else:
        print(Path(wanted.output) / "final")
