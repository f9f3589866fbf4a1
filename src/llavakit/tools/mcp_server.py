"""Skills as a server of MCP: `llavakit tools --mcp`, over standard input and output or HTTP.

Every skill is a tool. Pictures and masks come as ids, data URLs or base64 and go out as image blocks; figures, boxes
and masks (COCO run lengths) are structured content, with the same figures as JSON text for clients that read text
alone. Ids of what tools made cannot be guessed, so that clients of one server do not see each other's pictures.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from llavakit.errors import UserError
from llavakit.tools.artefacts import Artefacts
from llavakit.tools.skill import IMAGE, MASK, Skill
from llavakit.tools.toolbox import Result, Toolbox

NAME = "llavakit"


def need_mcp() -> None:
    """Refuse to go on without the SDK.

    Raises:
        UserError: If it is missing.
    """
    try:
        import mcp  # noqa: F401
    except ImportError:
        raise UserError("mcp is needed for MCP; pip install 'llavakit[tools]'") from None


def create_server(toolbox: Toolbox, artefacts: Artefacts | None = None) -> Any:
    """The server (`mcp.server.lowlevel.Server`).

    Args:
        toolbox: Its skills; those that cannot run here are not listed.
        artefacts: What its tools make is kept here.
    """
    need_mcp()
    import anyio
    import mcp_types as types
    from mcp.server.lowlevel import Server

    import llavakit

    kept = artefacts or Artefacts()

    async def list_tools(context: Any, params: Any) -> Any:
        return types.ListToolsResult(tools=[_tool(types, skill) for skill in toolbox.ready()])

    async def call_tool(context: Any, params: Any) -> Any:
        arguments = _with_media(toolbox.skills.get(params.name), params.arguments or {})

        def call() -> Result:
            # No picture and no mask of another client fills in for one that this call does not name.
            own = Artefacts(most=kept.most, most_bytes=kept.most_bytes)
            own.share(kept)
            return toolbox.call(params.name, arguments, own)

        return _answer(types, await anyio.to_thread.run_sync(call))

    return Server(
        NAME,
        version=llavakit.__version__,
        instructions="Skills on pictures. Name a picture by data URL or base64, or by the id of an earlier result.",
        on_list_tools=list_tools,
        on_call_tool=call_tool,
    )


def _tool(types: Any, skill: Skill) -> Any:
    writes = "writes" in skill.effects
    return types.Tool(
        name=skill.name,
        description=skill.description,
        input_schema=dict(skill.parameters) | ({"required": skill.needed} if skill.needed else {}),
        annotations=types.ToolAnnotations(
            read_only_hint=not writes, destructive_hint=writes, open_world_hint="fetches" in skill.effects
        ),
    )


def _with_media(skill: Skill | None, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments in which base64 is a data URL."""
    found = dict(arguments)
    for name in [] if skill is None else skill.opened(IMAGE) + skill.opened(MASK):
        value = found.get(name)
        if isinstance(value, str) and len(value) > 100 and ":" not in value[:100]:
            found[name] = f"data:image/png;base64,{value}"
    return found


def _answer(types: Any, result: Result) -> Any:
    if result.error is not None:
        return types.CallToolResult(content=[types.TextContent(text=result.error)], is_error=True)
    shown = result.data | ({"artefacts": result.artefacts} if result.artefacts else {})
    content: list[Any] = [types.TextContent(text=json.dumps(shown, ensure_ascii=False))]
    content += [types.ImageContent(data=_base64(one), mime_type="image/png") for one in result.pictures.values()]
    return types.CallToolResult(content=content, structured_content=result.whole())


def _base64(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def serve_stdio(toolbox: Toolbox) -> None:
    """Serve the process that started this one until it hangs up."""
    need_mcp()
    import anyio
    from mcp.server.stdio import stdio_server

    server = create_server(toolbox)

    async def run() -> None:
        async with stdio_server() as (read, write):
            await server.run(read, write, server.create_initialization_options())

    anyio.run(run)


def http_app(
    toolbox: Toolbox, *, keys: Sequence[str] = (), host: str = "127.0.0.1", body_bytes: int = 64 * 2**20
) -> Any:
    """The server as an ASGI application; its endpoint is `/mcp`.

    Args:
        keys: Of which clients must send one (`Authorization: Bearer KEY`); none asks for none.
        body_bytes: Largest request.
    """
    app = create_server(toolbox).streamable_http_app(host=host, max_request_body_size=body_bytes)
    if keys:
        app.add_middleware(_Keys, keys=tuple(keys))
    return app


class _Keys:
    """Refuses requests without a key."""

    def __init__(self, app: Any, keys: Sequence[str]) -> None:
        self.app, self.keys = app, [key.encode() for key in keys]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        import hmac

        if scope["type"] == "http":
            headers = dict(scope["headers"])
            given = headers.get(b"authorization", b"")
            token = given[7:] if given[:7].lower() == b"bearer " else b""
            matches = [hmac.compare_digest(token, key) for key in self.keys]  # all of them, whichever fits
            if not any(matches):
                head = [(b"content-type", b"text/plain"), (b"www-authenticate", b"Bearer")]
                await send({"type": "http.response.start", "status": 401, "headers": head})
                await send({"type": "http.response.body", "body": b"send Authorization: Bearer KEY\n"})
                return
        await self.app(scope, receive, send)


def serve_http(toolbox: Toolbox, *, host: str = "127.0.0.1", port: int = 8765, keys: Sequence[str] = ()) -> None:
    """Serve by HTTP until interrupted.

    Raises:
        UserError: If other machines could call tools without a key.
    """
    if host not in ("127.0.0.1", "localhost", "::1") and not keys:
        raise UserError(f"--host {host}: other machines can reach this server; give --api-key")
    try:
        import uvicorn
    except ImportError:
        raise UserError("uvicorn is needed to serve; pip install 'llavakit[serve,tools]'") from None
    uvicorn.run(http_app(toolbox, keys=keys, host=host), host=host, port=port, log_level="warning")
