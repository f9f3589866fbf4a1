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
from typing import Annotated

import typer

from llavakit.cli.common import Json, app, print_json, show
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
        str | None, typer.Argument(metavar="[MODEL]", help="With --attack: model or encoder folder.")
    ] = None,
    attack: Annotated[
        bool, typer.Option("--attack", help="How far invisible changes move MODEL's vision tower.")
    ] = False,
    eps: Annotated[str, typer.Option(help="With --attack: radius in pixels of 0 to 1.")] = "4/255",
    as_json: Json = False,
) -> None:
    """Check this installation, or how robust a model's vision tower is.

    Versions, devices and extras, and what to install where something is missing.

    \b
    Examples:
      llavakit doctor
      llavakit doctor --json
      llavakit doctor MODEL --attack
    """
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


def _check_up(model: str | None, attack: bool, eps: str, as_json: bool) -> None:
    if model is None:
        raise UserError("--attack: name the model or the encoder that is looked at")
    if not attack:
        raise UserError(f"{model}: say what to do with it; --attack looks at its vision tower")
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
