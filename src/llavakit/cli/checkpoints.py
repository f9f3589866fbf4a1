"""Commands on checkpoints: `convert` and `inspect`."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from llavakit.cli.common import Base, Encoder, Json, Model, Template, app, given, print_json, show


class Form(StrEnum):
    """Layouts that a checkpoint can be written in."""

    llavakit = "llavakit"
    hf = "hf"
    original = "original"


@app.command()
def convert(
    src: Annotated[str, typer.Argument(metavar="SRC", help="Checkpoint folder, hub id or GGUF file.")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="New folder.")],
    to: Annotated[Form, typer.Option(help="hf is what transformers and vLLM read; original is the paper's own.")],
    base: Base = None,
    vision_tower: Encoder = None,
    template: Template = None,
    exchange_vision_tower: Annotated[
        bool,
        typer.Option("--exchange-vision-tower", help="Put --vision-tower in place of the encoder in SRC."),
    ] = False,
    difference_to: Annotated[
        str | None,
        typer.Option(metavar="BASE", help="Write differences to the weights of this language model (--to original)."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a checkpoint in another layout.

    \b
    Examples:
      llavakit convert liuhaotian/llava-v1.5-7b mine --to llavakit --vision-tower openai/clip-vit-large-patch14-336
      llavakit convert lora-folder mine --to llavakit --base lmsys/vicuna-7b-v1.5
      llavakit convert runs/demo/final exported --to hf
      llavakit convert SmolLM2-135M-Instruct.Q4_1.gguf smollm2 --to hf
    """
    from llavakit.checkpoints.convert import convert as run_conversion

    sources = given(base=base, vision_tower=vision_tower, template=template, difference_to=difference_to)
    done = run_conversion(src, dst, to=to.value, exchange_vision_tower=exchange_vision_tower, **sources)
    if as_json:
        print_json(done)
    else:
        print(f"{src} ({done['from']}) -> {dst} ({done['to']}), {done['tensors']} tensors")
        for note in done["notes"]:
            print(f"note: {note}", file=sys.stderr)
        if not done.get("tokenizer", True):
            print("no tokenizer was found, so none was written; name one with --base", file=sys.stderr)


@app.command()
def inspect(model: Model, base: Base = None, vision_tower: Encoder = None, as_json: Json = False) -> None:
    """Show what a checkpoint consists of.

    Parts, parameters by part, template, tokens per image; weights are not read.

    \b
    Examples:
      llavakit inspect runs/demo/final
      llavakit inspect llava-hf/llava-1.5-7b-hf --json
    """
    from llavakit.checkpoints.inspect import inspect_model

    facts = inspect_model(model, **given(base=base, vision_tower=vision_tower))
    if as_json:
        print_json(facts)
        return
    from rich.table import Table

    head = Table(show_header=False, box=None, pad_edge=False)
    for name in ("folder", "layout", "system", "template"):
        head.add_row(name, str(facts[name] or "-"))
    if facts["adapter"]:
        head.add_row("adapter on", facts["adapter"])
    parts = Table("part", "type", title=f"{facts['parameters']:,} parameters", title_justify="left")
    parts.add_column("parameters", justify="right")
    for part in facts["parts"]:
        parts.add_row(part["name"], part["type"] or "-", f"{part['parameters']:,}")
    tokens = Table("modality", "size", "planner", title="visual tokens of some media", title_justify="left")
    tokens.add_column("views", justify="right")
    tokens.add_column("tokens", justify="right")
    for row in facts["tokens"]:
        size = " x ".join(map(str, row["size"]))
        tokens.add_row(row["modality"], size, row["planner"], str(row["views"]), str(row["tokens"]))
    show(head, parts, tokens)
