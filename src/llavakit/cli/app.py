"""The command line: parses arguments, calls the library, prints.

A group of commands is one module beside this one; importing it adds its commands to the application. Nothing heavy is
imported until a command runs. A mistake of the user is one line on standard error and exit status 2. Machine-readable
output goes to standard output alone, so that it can be piped.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from llavakit.cli.common import Device, Dtype, Json, app, given, print_json, show, writing
from llavakit.errors import UserError

_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS)


def _version(wanted: bool) -> None:
    if wanted:
        import llavakit

        print(f"llavakit {llavakit.__version__}")
        raise typer.Exit


@app.callback()
def overview(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Train, ask, check, compare and serve the models of the LLaVA family.

    \b
    Start here:
      llavakit doctor
      llavakit systems
      llavakit chat MODEL --image photo.jpg --prompt "What is this?"
    """


for _group in (
    *("asking", "projects", "training", "evaluation", "comparison", "reports", "robustness", "checkpoints"),
    *("retrieval", "synthesis", "systems", "tools", "editing", "studio"),
):
    importlib.import_module(f"llavakit.cli.{_group}")


@app.command()
def doctor(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="With --attack or --blind: what is looked at.")
    ] = None,
    attack: Annotated[
        bool, typer.Option("--attack", help="How far invisible changes move MODEL's vision tower.")
    ] = False,
    eps: Annotated[str, typer.Option(help="With --attack: radius in pixels of 0 to 1.")] = "4/255",
    blind: Annotated[
        bool, typer.Option("--blind", help="Whether MODEL uses its pictures: right, blank and other ones.")
    ] = False,
    task: Annotated[str | None, typer.Option(help="With --blind: benchmark, for instance pope, phantom.")] = None,
    questions: Annotated[Path | None, typer.Option(help="With --blind: the benchmark's question file.")] = None,
    images: Annotated[Path | None, typer.Option(help="With --blind: folder of images.")] = None,
    gold: Annotated[Path | None, typer.Option(help="With --blind: the benchmark's answers.")] = None,
    limit: Annotated[int, typer.Option(min=2, help="With --blind: most questions, each asked three times.")] = 300,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Check this installation, whether a model uses its pictures, or how robust its vision tower is.

    Without MODEL: versions, devices and extras, and what to install where something is missing.

    --blind asks the same questions with the right picture, a blank one and another question's, and says whether the
    model uses the picture, does not, or whether these questions cannot tell. It ends with status 1 if it does not.

    \b
    Examples:
      llavakit doctor
      llavakit doctor --json
      llavakit doctor MODEL --attack
      llavakit doctor MODEL --blind --task pope --questions coco_pope_random.json --images val2014
    """
    if blind and attack:
        raise UserError("--attack and --blind: one at a time")
    if blind:
        _check_blind(model, task, questions, images, gold, limit, given(device=device, dtype=dtype), as_json)
        return
    if task is not None or questions is not None:
        raise UserError("--task and --questions: belong to --blind")
    if attack or model is not None:
        _check_up(model, attack, eps, as_json)
        return

    from llavakit.cli.doctor import examine, table

    report = examine()
    if as_json:
        print_json(report)
    else:
        show(table(report))
    if report["problems"]:
        raise typer.Exit(1)


def _check_blind(
    model: str | None,
    task: str | None,
    questions: Path | None,
    images: Path | None,
    gold: Path | None,
    limit: int,
    loading: dict[str, Any],
    as_json: bool,
) -> None:
    if model is None or task is None or questions is None:
        raise UserError("--blind: name the model, --task TASK and --questions FILE")
    for place in (questions, images, gold):
        if place is not None and not place.exists():
            raise UserError(f"{place}: no such file")
    from llavakit.cli.evaluation import output_of
    from llavakit.evaluation.blind import DOES_NOT, check_blind, table
    from llavakit.evaluation.score import benchmark

    benchmark(task)
    import llavakit

    folder = Path("runs", "doctor", *output_of(model, task).with_suffix("").parts[2:])
    with writing(folder):
        loaded = llavakit.load(model, **loading)
        found = check_blind(loaded, task, questions, folder, images=images, gold=gold, limit=limit)
    if as_json:
        print_json(found)
    else:
        show(table(found))
    if found["verdict"] == DOES_NOT:
        raise typer.Exit(1)


def _check_up(model: str | None, attack: bool, eps: str, as_json: bool) -> None:
    if model is None:
        raise UserError("--attack: name the model or the encoder that is looked at")
    if not attack:
        raise UserError(f"{model}: say what to do with it; --attack looks at its vision tower, --blind at its answers")
    from llavakit.robustness import checkup
    from llavakit.robustness.balls import check_eps, fraction

    found = checkup.examine(model, eps=check_eps(fraction(eps)))
    if as_json:
        print_json(found)
    else:
        show(checkup.table(found))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    Mistakes of the user end as one line on standard error and status 2; set LLAVAKIT_DEBUG=1 to see where they arose.
    """
    try:
        return app(arguments, standalone_mode=False) or 0
    except (KeyboardInterrupt, typer.Abort):
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output is gone, so no message can reach it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # wrong usage; click's class or typer's copy of it
            error.show()
            return error.exit_code
        line = _user_line(error)
        if line is None or os.environ.get("LLAVAKIT_DEBUG"):
            raise
        print(f"llavakit: {line}", file=sys.stderr)
        return 2


def _user_line(error: Exception) -> str | None:
    """What to tell the user, or None if the fault is ours."""
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in _REFUSALS:
        return f"{error.filename or 'output'}: {error.strerror}"
    if isinstance(error, ModuleNotFoundError) and error.name:
        from llavakit.cli.doctor import extra_with

        extra = extra_with(error.name.partition(".")[0])
        return extra and f"this needs {error.name}: pip install 'llavakit[{extra}]'"
    return None


def main() -> None:
    """Entry point of the `llavakit` command."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its advice is for programmers
    sys.exit(run())


if __name__ == "__main__":
    main()
