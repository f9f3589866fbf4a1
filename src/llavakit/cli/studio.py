"""The command of the page for training: `studio`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llavakit.cli.common import app


@app.command()
def studio(
    source: Annotated[
        str, typer.Argument(metavar="[PICTURES_OR_FILE]", help="Folder of pictures, or a table of them.")
    ] = "",
    model: Annotated[str, typer.Option(help="Model folder or hub id to start from.")] = "",
    workspace: Annotated[Path, typer.Option(help="Folder of the projects.")] = Path("runs"),
    host: Annotated[str, typer.Option(help="Address to listen on; others than this machine's own need a key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=1, max=65535)] = 7860,
    api_key: Annotated[list[str] | None, typer.Option(help="Key that browsers must give; may be repeated.")] = None,
    allowed_host: Annotated[list[str] | None, typer.Option(help="Name that browsers call the server by.")] = None,
) -> None:
    """Open a page on which pictures become a trained, evaluated and served model.

    The page starts the commands of llavakit: `new`, `train`, `eval`, `compare` and `serve`. They outlive it.

    \b
    Examples:
      llavakit studio
      llavakit studio pets.csv --model runs/demo/parts/final
    """
    from llavakit.studio.run import serve_studio

    serve_studio(
        workspace,
        source=source,
        model=model,
        host=host,
        port=port,
        api_keys=tuple(api_key or ()),
        allowed_hosts=tuple(allowed_host or ()),
    )
