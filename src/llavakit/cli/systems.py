"""Commands on systems: `systems`, `parity`, `cost`, `reproduce`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llavakit.cli.common import Json, Slug, app, given, print_json, show

if TYPE_CHECKING:
    from llavakit.proof.golden import Report


@app.command("systems")
def list_systems(
    slug: Annotated[str | None, typer.Argument(metavar="[SLUG]", help="Show all about one system.")] = None,
    as_json: Json = False,
) -> None:
    """List the published systems, or show one.

    \b
    Examples:
      llavakit systems
      llavakit systems llava-1.5
      llavakit systems --json
    """
    from llavakit.cli import catalogue
    from llavakit.system import get_system, systems

    cards = sorted(systems().values(), key=lambda card: card.slug) if slug is None else [get_system(slug)]
    if as_json:
        rows = [catalogue.facts(card) for card in cards]
        print_json(rows if slug is None else rows[0])
    elif slug is None:
        show(catalogue.table(cards))
    else:
        print(catalogue.page(cards[0]))


@app.command()
def parity(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Golden cases, or folders of them.")],
    only: Annotated[str | None, typer.Option(metavar="SLUG", help="Only cases of this system.")] = None,
    trace: Annotated[bool, typer.Option("--trace", help="Show where an adapter raised.")] = False,
    as_json: Json = False,
) -> None:
    """Recompute golden cases and compare.

    One line per case; exit status 1 if one fails.

    \b
    Examples:
      llavakit parity tests/golden
      llavakit parity path/to/golden --only llava-1.5
      llavakit parity path/to/golden/llava-1.5/projector --json
    """
    from llavakit.proof.golden import run_parity, summary

    reports = []
    for report in run_parity(paths, only):
        reports.append(report)
        if not as_json:
            print(_line(report), flush=True)
        if trace and report.traceback:
            print(report.traceback, file=sys.stderr)
    result = summary(reports)
    if as_json:
        print_json(result)
    else:
        print(f"{result['passed']} passed, {result['failed']} failed, {result['declined']} declined")
    if result["failed"]:
        raise typer.Exit(1)


def _line(report: Report) -> str:
    colours = {"passed": "green", "failed": "red", "declined": "yellow"}
    status = f"{report.status:9}"
    if sys.stdout.isatty():
        status = typer.style(status, fg=colours[report.status])
    error = "" if report.max_abs_error is None else f"{report.max_abs_error:.1e}"
    line = f"{status} {report.component:28} {error:8} {report.path}"
    return f"{line}: {report.reason}" if report.reason else line


@app.command()
def cost(slug: Slug, as_json: Json = False) -> None:
    """Count FLOPs, visual tokens and cache bytes.

    At published size, beside the paper's claim.

    \b
    Examples:
      llavakit cost llava-1.5
      llavakit cost llava-1.5 --json
    """
    from llavakit.system import get_system

    report = get_system(slug).load("cost")()
    if as_json:
        print_json(report.to_dict())
    else:
        show(report.table())


@app.command()
def reproduce(
    slug: Slug,
    seeds: Annotated[int | None, typer.Option(min=1, help="Number of seeds; default: the miniature's own.")] = None,
    as_json: Json = False,
) -> None:
    """Re-test a paper's main claim with tiny models.

    Ends with a verdict: supported, not supported or inconclusive.

    \b
    Examples:
      llavakit reproduce llava-1.5
      llavakit reproduce llava-1.5 --seeds 5 --json
    """
    from llavakit.system import get_system

    chosen = given(seeds=range(seeds) if seeds else None)
    verdict = get_system(slug).load("miniature")(**chosen, progress=lambda line: print(line, file=sys.stderr))
    if as_json:
        print_json(verdict.to_dict())
    else:
        show(verdict.table())
