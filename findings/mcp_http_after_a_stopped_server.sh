#!/usr/bin/env bash
# Once a signal has stopped any uvicorn server of a process, every MCP server over HTTP that the process starts later breaks:
# the 2025-11-25 handshake of a client ends with "SSE stream ended without a response" and uvicorn logs "ASGI callable
# returned without completing response". sse-starlette, which mcp answers through, replaces `uvicorn.Server.handle_exit` on
# import and keeps the signal in `AppStatus.should_exit`, a value of the whole process that nothing resets. It bites test
# suites and programs that stop one server (any application, no MCP in it) and start another.
#
# Seen with mcp 2.3.0, sse-starlette 3.7.0, uvicorn 0.54.0 and starlette 1.10.0: the same server and client work before the
# first stop and fail each time after it. What works: a process for each server, or `AppStatus.should_exit = False` between.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet mcp==2.3.0 sse-starlette==3.7.0 uvicorn==0.54.0 starlette==1.10.0
cat >"$folder/check.py" <<'PYTHON'
import asyncio
import signal
import sys
import threading
import time

import uvicorn
from mcp.client.client import Client
from mcp.client.streamable_http import streamable_http_client
from mcp.server.mcpserver import MCPServer
from sse_starlette.sse import AppStatus


async def plain(scope, receive, send):
    while scope["type"] == "lifespan":
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return


def server_of(app):
    return uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical"))


def when_started(server):
    while not server.started:
        time.sleep(0.01)


def answer():
    """What a client of a fresh MCP server gets."""
    adder = MCPServer("adder", log_level="CRITICAL")

    @adder.tool()
    def add(a: int, b: int) -> int:
        return a + b

    server = server_of(adder.streamable_http_app(host="127.0.0.1"))
    threading.Thread(target=server.run, daemon=True).start()
    when_started(server)
    port = server.servers[0].sockets[0].getsockname()[1]

    async def ask():
        async with Client(streamable_http_client(f"http://127.0.0.1:{port}/mcp"), mode="legacy") as client:
            return str((await client.call_tool("add", {"a": 1, "b": 2})).structured_content)

    try:
        return asyncio.run(ask())
    except BaseException as error:
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        return str(error)


def stop(server):
    when_started(server)
    signal.raise_signal(signal.SIGTERM)


before = answer()
other = server_of(plain)
signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises the signal again when it has stopped
threading.Thread(target=stop, args=(other,)).start()
other.run()
after = [answer(), answer()]
AppStatus.should_exit = False
reset = answer()
print("before:", before)
print("after: ", *after, sep="\n  ")
print("reset: ", reset)
works = "{'result': 3}"
sys.exit(not (before == reset == works and all("without a response" in text for text in after)))
PYTHON
"$folder/venv/bin/python" "$folder/check.py" 2>/dev/null
