"""The command on editing sessions: `replay`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llavakit.cli.common import Device, Dtype, Json, app, given, print_json, show
from llavakit.errors import UserError


@app.command()
def replay(
    folder: Annotated[Path, typer.Argument(metavar="SESSION", help="Folder or ZIP archive of an editing session.")],
    model: Annotated[
        str | None, typer.Option(help="Model that is talked to; needed if the session has a chat.")
    ] = None,
    tools: Annotated[
        str | None, typer.Option(metavar="FILE", help="Configuration of skills, as `llavakit tools` takes it.")
    ] = None,
    output: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Where to write the pictures.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Carry out the events of a saved editing session again, and compare the pictures.

    Exit status 1 if a picture is another one than then: with classical skills all are equal.

    \b
    Examples:
      llavakit replay session
      llavakit replay session --model runs/demo/final --output pictures
    """
    from PIL import Image
    from rich.table import Table

    import llavakit
    from llavakit.editing.backends import backends_of
    from llavakit.editing.chat import PictureChat
    from llavakit.editing.log import read_log
    from llavakit.editing.log import replay as run
    from llavakit.editing.session import Session
    from llavakit.tools.configuration import load_toolbox

    events = read_log(folder)["events"]
    talks = any(isinstance(event, dict) and event.get("op") == "chat" for event in events)
    if talks and model is None:
        raise UserError(f"{folder}: talks to a model; name it with --model")
    if output is not None and output.exists():
        raise UserError(f"{output}: exists; name another folder")
    chat = None if model is None else PictureChat(llavakit.load(model, **given(device=device, dtype=dtype)))
    session = Session(backends_of(load_toolbox(tools) if tools else None), chat)
    others = run(folder, session)
    if output is not None:
        output.mkdir(parents=True)
        for version in session.versions:
            Image.fromarray(version.image).save(output / f"{version.number:03d}-{version.op}.png")
    rows = [
        {
            "version": version.number,
            "op": version.op,
            "parent": version.parent,
            "size": [version.image.shape[1], version.image.shape[0]],
            "equal": version.number not in others,
        }
        for version in session.versions
    ]
    if as_json:
        print_json({"events": len(events), "versions": rows, "answers": session.answers})
    else:
        table = Table(title=f"{len(events)} events")
        for heading in ("version", "made by", "of", "size", "as it was"):
            table.add_column(heading)
        for row in rows:
            parent = "" if row["parent"] is None else str(row["parent"])
            size = " x ".join(map(str, row["size"]))
            table.add_row(str(row["version"]), row["op"], parent, size, "yes" if row["equal"] else "no")
        show(table)
        for question, answer in session.answers:
            print(f"{question}\n  {answer}")
    if others:
        raise typer.Exit(1)
