"""The command-line application, and what several commands share: options, arguments, printing.

Nothing heavy is imported here or by a module of commands until a command runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from llavakit.errors import UserError

app = typer.Typer(
    name="llavakit",
    help="Train, ask, check, compare and serve the models of the LLaVA family.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Model folder or hub id.")]
Slug = Annotated[str, typer.Argument(metavar="SLUG", help="Name of a system; `llavakit systems` lists them.")]
Judge = Annotated[str | None, typer.Option(help="Model that reviews answers: a folder, hub id, address or API model.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Device = Annotated[str | None, typer.Option(help="Device: cpu, cuda, cuda:1, mps. Default: the best there is.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: what fits the device.")]
Quantize = Annotated[str | None, typer.Option(help="Weights of the decoder in int8 or int4. Default: as --dtype says.")]
QuantizeParts = Annotated[
    str | None,
    typer.Option(metavar="A,B", help="Parts to quantise, as language_model,vision_tower. Default: the decoder."),
]
Base = Annotated[str | None, typer.Option(help="Language model of a LoRA or connector-only checkpoint.")]
Encoder = Annotated[str | None, typer.Option(help="Encoder of a checkpoint that does not contain it.")]
Template = Annotated[
    str | None, typer.Option(help="Chat template instead of the model's own; `tokenizer` is the one in its files.")
]
WayToAnswer = Annotated[
    str | None,
    typer.Option(help="System in whose way to answer, or module:factory; plain is the model alone. Default: its own."),
]
Search = Annotated[
    str | None,
    typer.Option(help="Search over replies, of a responder that has it: best-of-n, sentence, stage, swires."),
]
Knowledge = Annotated[
    str | None,
    typer.Option("--store", help="Store that passages are looked up in, of a responder that reads some."),
]
Tools = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Tools that run here when the model calls them: a YAML file, or `all`."),
]
WayOptions = Annotated[
    list[str] | None, typer.Option(metavar="KEY=VALUE", help="Option of the responder; may be repeated.")
]


class OnBadRecord(StrEnum):
    """What to do with a broken record."""

    stop = "stop"
    skip = "skip"


class RunnerName(StrEnum):
    """Where the work is done."""

    local = "local"
    ray = "ray"


def given(**options: Any) -> dict[str, Any]:
    """The options that were given; the library's defaults apply to the others."""
    return {name: value for name, value in options.items() if value is not None}


def quantization(quantize: str | None, parts: str | None) -> dict[str, Any]:
    """What `llavakit.load` is told of quantised weights."""
    return given(quantize=quantize, quantize_parts=None if parts is None else [one.strip() for one in parts.split(",")])


def assignments(pairs: Sequence[str]) -> dict[str, Any]:
    """`key=value` arguments, the values read as YAML.

    Raises:
        UserError: If one has no `=`, or its value is not YAML.
    """
    import yaml

    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UserError(f"{pair}: not an assignment; write key=value")
        try:
            found[key.replace("-", "_")] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"{pair}: the value is not YAML") from None
    return found


def responder_choice(responder: str | None, options: Sequence[str] | None, **own: str | None) -> dict[str, Any]:
    """What `llavakit.load` is told of the responder.

    Args:
        own: Options of the responder that have an option of their own on the command line (`--search`, `--store`).

    Raises:
        UserError: If one is given twice.
    """
    found = assignments(options or ())
    for name in given(**own):
        if name in found:
            raise UserError(f"--{name}: --responder-option {name}= says it too; leave one of them out")
    return given(responder=responder, responder_options=found | given(**own) or None)


def tool_choice(tools: str | None) -> dict[str, Any]:
    """What `llavakit.load` is told of tools; `all` is every skill that can run."""
    return given(tools=None if tools is None else "" if tools == "all" else tools)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A disk that is full while `path` is written is reported under its name; the system does not say it."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=2, default=str))


def show(*renderables: Any) -> None:
    from rich.console import Console

    console = Console(soft_wrap=False, highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 160)
    for item in renderables:
        console.print(item)
