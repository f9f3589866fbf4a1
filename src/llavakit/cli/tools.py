"""The command on skills: `tools`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from llavakit.cli.common import Json, app, print_json, show
from llavakit.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from llavakit.tools.skill import Skill
    from llavakit.tools.toolbox import Toolbox


@app.command("tools")
def tools(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show one skill with its schema.")] = None,
    config: Annotated[
        str | None, typer.Option(metavar="FILE", help="YAML file that chooses and configures skills; default: all.")
    ] = None,
    call: Annotated[
        str | None, typer.Option(metavar="JSON", help="Call the skill with these arguments and print what it finds.")
    ] = None,
    image: Annotated[str | None, typer.Option(help="Picture that the call is about.")] = None,
    output: Annotated[str | None, typer.Option(metavar="FILE", help="File for a picture that the call makes.")] = None,
    mcp: Annotated[bool, typer.Option("--mcp", help="Serve the skills by MCP on standard input and output.")] = False,
    http: Annotated[bool, typer.Option("--http", help="With --mcp: serve by HTTP instead, at /mcp.")] = False,
    host: Annotated[str, typer.Option(help="With --http: address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="With --http.")] = 8765,
    api_key: Annotated[list[str] | None, typer.Option(help="With --http: key that clients must send.")] = None,
    as_json: Json = False,
) -> None:
    """List skills and whether they can run here, call one, or serve them by MCP.

    \b
    Examples:
      llavakit tools
      llavakit tools segment
      llavakit tools ocr --call '{}' --image page.png
      llavakit tools --config tools.yaml --mcp
      llavakit tools --mcp --http --port 8765
    """
    from llavakit.tools.configuration import load_toolbox

    toolbox = load_toolbox(config)
    if mcp or http:
        from llavakit.tools import mcp_server

        if not mcp:
            raise UserError("--http: belongs to --mcp")
        if http:
            mcp_server.serve_http(toolbox, host=host, port=port, keys=tuple(api_key or ()))
        else:
            mcp_server.serve_stdio(toolbox)
        return
    if name is None:
        if call is not None:
            raise UserError("--call: name the skill")
        rows = [_facts(toolbox, skill) for skill in toolbox.skills.values()]
        print_json(rows) if as_json else show(_table(rows))
        return
    if name not in toolbox:
        from llavakit.registry import nearest

        raise UserError(f"unknown skill {name!r}{nearest(name, list(toolbox.skills))}")
    if call is None:
        skill = toolbox.skills[name]
        print_json(_facts(toolbox, skill) | {"parameters": skill.parameters})
        return
    _call(toolbox, name, call, image, output)


def _call(toolbox: Toolbox, name: str, arguments: str, image: str | None, output: str | None) -> None:
    from llavakit.media.image import load_image
    from llavakit.tools.artefacts import Artefacts

    result = toolbox.call(name, arguments, Artefacts(None if image is None else load_image(image)))
    if result.error is not None:
        raise UserError(result.error)
    found = result.whole()
    found.pop("artefacts", None)
    for key, made in result.pictures.items():
        if output is None:
            found[key] = f"{made.width} x {made.height} pixels; --output FILE keeps it"
        else:
            made.save(output)
            found[key] = output
    print_json(found)


def _facts(toolbox: Toolbox, skill: Skill) -> dict[str, Any]:
    return {
        "name": skill.name,
        "description": skill.description,
        "needs": list(skill.needs),
        "effects": sorted(skill.effects),
        "runs": toolbox.state(skill) is None,
        "missing": toolbox.state(skill),
    }


def _table(rows: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    table = Table("skill", "runs here", "needs", "what it does")
    for row in rows:
        state = "yes" if row["runs"] else f"no: {row['missing']}"
        table.add_row(row["name"], state, ", ".join(row["needs"]), row["description"])
    return table
