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
    *("asking", "training", "evaluation", "reports", "robustness", "checkpoints"),
    *("retrieval", "synthesis", "systems", "tools", "editing"),
):
    importlib.import_module(f"llavakit.cli.{_group}")


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check this installation.

    Versions, devices and extras, and what to install where something is missing.

    \b
    Examples:
      llavakit doctor
      llavakit doctor --json
    """
    from llavakit.cli.doctor import examine, table

    report = examine()
    if as_json:
        print_json(report)
    else:
        show(table(report))
    if report["problems"]:
        raise typer.Exit(1)


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
