"""The command of robustness: `attack`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from llavakit.cli.common import (
    Base,
    Device,
    Dtype,
    Encoder,
    Json,
    Model,
    Template,
    app,
    given,
    print_json,
    show,
    writing,
)
from llavakit.errors import UserError


class At(StrEnum):
    """What is changed."""

    pixels = "pixels"
    views = "views"


class Norm(StrEnum):
    """How far is measured."""

    linf = "linf"
    l2 = "l2"


@app.command()
def attack(
    model: Model,
    task: Annotated[str, typer.Option(help="captions, jailbreak, zero-shot, or a benchmark as pope or vqav2.")],
    questions: Annotated[Path, typer.Option(help="Its questions with their pictures.")],
    images: Annotated[Path | None, typer.Option(help="Folder of images; default: that of the questions.")] = None,
    gold: Annotated[Path | None, typer.Option(help="Answers as JSONL; default: the questions' own.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the run; default: runs/attack/TASK/MODEL.")] = None,
    eps: Annotated[str, typer.Option(help="Radius in pixels of 0 to 1, also as 4/255.")] = "4/255",
    norm: Annotated[Norm, typer.Option(help="linf: each value by at most eps; l2: all together.")] = Norm.linf,
    steps: Annotated[int, typer.Option(min=1, help="Iterations of every attack.")] = 100,
    target: Annotated[
        list[str] | None, typer.Option(help="Lead the answer to this string instead; may be repeated.")
    ] = None,
    at: Annotated[At, typer.Option(help="views: the encoder's inputs, as published.")] = At.pixels,
    single: Annotated[bool, typer.Option("--single", help="One attack instead of the published ensemble.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures attacked together.")] = 16,
    limit: Annotated[int | None, typer.Option(min=1, help="The first N questions only.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer; default: as published.")] = None,
    classes: Annotated[Path | None, typer.Option(help="zero-shot: class names, one a line.")] = None,
    text: Annotated[
        str | None, typer.Option(help="zero-shot: CLIP folder with its text side, or embeddings in .safetensors.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    base: Base = None,
    vision_tower: Encoder = None,
    template: Template = None,
    as_json: Json = False,
) -> None:
    """Measure a task clean and with invisibly changed pictures, side by side.

    For models that you hold. OUTPUT/report.html shows pictures, answers and curves. Interrupted, the same command goes
    on.

    \b
    Examples:
      llavakit attack MODEL --task captions --questions captions.jsonl --eps 4/255
      llavakit attack MODEL --task captions --questions captions.jsonl --target "a red balloon" --steps 1000
      llavakit attack MODEL --task pope --questions coco_pope_random.json --images val2014 --eps 2/255 --at views
      llavakit attack ENCODER --task zero-shot --questions labels.jsonl --text CLIP --classes names.txt
    """
    from llavakit.robustness.balls import check_eps, fraction

    radius = check_eps(fraction(eps)) if norm == Norm.linf else fraction(eps)
    if not isinstance(radius, float) or radius <= 0:
        raise UserError(f"eps: must be a number above 0, not {eps!r}")
    for place in (questions, images, gold, classes):
        if place is not None and not place.exists():
            raise UserError(f"{place}: no such file")
    name = "--".join(Path(model).resolve().parts[-2:]) if Path(model).exists() else model.replace("/", "--")
    output = output or Path("runs", "attack", task, name)
    if task == "zero-shot":
        from llavakit.robustness.classify import attack_classifier

        options = {"images": images, "text": text, "classes": classes, "limit": limit, "batch_size": batch_size}
        with writing(output):
            result = attack_classifier(
                model, questions, output, eps=radius, norm=norm.value, steps=steps, device=device, **options
            )
    else:
        import llavakit
        from llavakit.robustness.run import AttackSettings, attack_task
        from llavakit.robustness.tasks import open_task

        settings = AttackSettings(
            eps=radius,
            norm=norm.value,
            steps=steps,
            at=at.value,
            targets=tuple(target or ()),
            stages="single" if single else "published",
        )
        opened = open_task(
            task,
            questions,
            images=images,
            gold=gold,
            limit=limit,
            needs_references=not target and task != "jailbreak",
        )
        loaded = llavakit.load(
            model,
            responder="plain",
            **given(device=device, dtype=dtype, base=base, vision_tower=vision_tower, template=template),
        )
        with writing(output):
            result = attack_task(loaded, opened, output, settings, batch_size=batch_size, max_new_tokens=max_new_tokens)
    if as_json:
        print_json(result)
    else:
        from llavakit.robustness.table import table

        show(table(result))
