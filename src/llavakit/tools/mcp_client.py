"""Tools of MCP servers as skills: every server that a configuration names.

    mcp:
      files: {command: [python, server.py], env: {ROOT: /data}}
      remote: {url: "https://tools.example/mcp", headers: {Authorization: "Bearer ..."}, prefix: ""}

A connection lives in a thread of its own and is opened again when a call finds it gone. What a server sends is data:
schemas are checked against nothing outside themselves, results pass the limits of `Toolbox`.
"""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import contextlib
import io
import json
import re
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from llavakit.errors import UserError, quoted, shorten
from llavakit.media.image import load_image
from llavakit.media.policy import MediaPolicy
from llavakit.registry import nearest
from llavakit.tools.mcp_server import need_mcp
from llavakit.tools.rle import decode_mask, encode_mask
from llavakit.tools.skill import FETCHES, WRITES, Outcome, Skill, SkillError

_KEYS = ("command", "env", "cwd", "url", "headers", "prefix", "seconds", "tools")
_FOREIGN = re.compile(r"[^A-Za-z0-9_.+-]")
MOST_TOOLS = 200
LIMITS = MediaPolicy().limits  # of pictures that a server sends


class Connection:
    """A connection to one server.

    Args:
        name: What the configuration calls it.
        target: Options of the configuration.
        seconds: Longest time to connect, and for a call.
    """

    def __init__(self, name: str, target: Mapping[str, Any], seconds: float) -> None:
        self.name, self.target, self.seconds = name, target, seconds
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._client: Any = None
        self._closing: asyncio.Event | None = None

    def list_tools(self) -> list[Any]:
        """The server's tools.

        Raises:
            SkillError: If it does not answer.
        """

        async def all_pages(client: Any) -> list[Any]:
            found, cursor = [], None
            while len(found) < MOST_TOOLS:
                page = await client.list_tools(cursor=cursor)
                found += page.tools
                cursor = page.next_cursor
                if not cursor:
                    break
            return found[:MOST_TOOLS]

        return self._run(all_pages)

    def call(self, tool: str, arguments: Mapping[str, Any]) -> Any:
        """What a tool answers.

        Raises:
            SkillError: If the server does not answer.
        """
        return self._run(lambda client: client.call_tool(tool, dict(arguments)))

    def close(self) -> None:
        """Hang up."""
        with self._lock:
            loop, closing, self._client = self._loop, self._closing, None
        if loop is not None and closing is not None:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(closing.set)

    def _run(self, work: Any) -> Any:
        client, loop = self._connected()
        future = asyncio.run_coroutine_threadsafe(_awaited(work, client), loop)
        try:
            return future.result(timeout=self.seconds)
        except (TimeoutError, concurrent.futures.TimeoutError):
            future.cancel()
            raise SkillError(f"MCP server {self.name}: gave no answer within {self.seconds:g} s") from None
        except concurrent.futures.CancelledError:
            self.close()
            raise SkillError(f"MCP server {self.name}: is gone") from None
        except Exception as error:  # of the SDK, or what the server sent
            if not _answered(error):
                self.close()
            raise SkillError(f"MCP server {self.name}: {_reason(error)}") from None

    def _connected(self) -> tuple[Any, asyncio.AbstractEventLoop]:
        with self._lock:
            if self._client is not None and self._loop is not None and not self._loop.is_closed():
                return self._client, self._loop
            ready: concurrent.futures.Future[Any] = concurrent.futures.Future()
            threading.Thread(target=self._live, args=(ready,), name=f"mcp-{self.name}", daemon=True).start()
            try:
                self._client, self._loop, self._closing = ready.result(timeout=self.seconds)
            except (TimeoutError, concurrent.futures.TimeoutError):
                raise SkillError(f"MCP server {self.name}: did not answer within {self.seconds:g} s") from None
            except Exception as error:
                raise SkillError(f"MCP server {self.name}: cannot be reached ({_reason(error)})") from None
            return self._client, self._loop

    def _live(self, ready: concurrent.futures.Future[Any]) -> None:
        client = None

        async def life() -> None:
            nonlocal client
            closing = asyncio.Event()
            async with contextlib.AsyncExitStack() as stack:
                client = await stack.enter_async_context(await self._client_of(stack))
                ready.set_result((client, asyncio.get_running_loop(), closing))
                await closing.wait()

        try:
            asyncio.run(life())
        except BaseException as error:  # whatever the transport raises
            if not ready.done():
                ready.set_exception(error)
        finally:
            with self._lock:
                if self._client is client:
                    self._client = None

    async def _client_of(self, stack: contextlib.AsyncExitStack) -> Any:
        import os

        import httpx2
        from mcp.client import Client
        from mcp.client.stdio import StdioServerParameters, stdio_client
        from mcp.client.streamable_http import streamable_http_client

        if "url" in self.target:
            http = await stack.enter_async_context(
                httpx2.AsyncClient(headers=dict(self.target.get("headers") or {}), timeout=self.seconds)
            )
            transport: Any = streamable_http_client(self.target["url"], http_client=http)
        else:
            command, *arguments = self.target["command"]
            parameters = StdioServerParameters(
                command=command, args=arguments, env=self.target.get("env"), cwd=self.target.get("cwd")
            )
            quiet = stack.enter_context(open(os.devnull, "w"))  # noqa: SIM115
            transport = stdio_client(parameters, errlog=quiet)
        return Client(transport, read_timeout_seconds=self.seconds)


def _answered(error: Exception) -> bool:
    """Whether an error is the server's answer, and the connection as good as before."""
    from mcp import MCPError
    from mcp.types import CONNECTION_CLOSED

    return isinstance(error, MCPError) and error.error.code != CONNECTION_CLOSED


async def _awaited(work: Any, client: Any) -> Any:
    return await work(client)


def _reason(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup) and error.exceptions:
        error = error.exceptions[0]
    said = shorten(" ".join(str(error).split()))
    return said or type(error).__name__


def skills_of(name: str, options: Mapping[str, Any]) -> list[Skill]:
    """The tools of a server as skills.

    Args:
        name: What the configuration calls it.
        options: `command` or `url`, with `env`, `cwd` or `headers`; `prefix` of the skills' names (default the server's
            name and `_`); `seconds` for a call; `tools`, the names of those that are wanted.

    Raises:
        UserError: If the options are wrong, or the server cannot be reached.
    """
    need_mcp()
    where = f"mcp.{name}"
    for key in options:
        if key not in _KEYS:
            raise UserError(f"{where}: unknown key {quoted(key)}{nearest(str(key), list(_KEYS))}")
    command, url = options.get("command"), options.get("url")
    if (command is None) == (url is None):
        raise UserError(f"{where}: needs a command, or a url")
    if command is not None and (not isinstance(command, list) or not command or not all(map(_is_text, command))):
        raise UserError(f"{where}.command: must be a list of texts, not {quoted(command)}")
    if url is not None and not str(url).startswith(("http://", "https://")):
        raise UserError(f"{where}.url: must be an http(s) address, not {quoted(url)}")
    seconds = options.get("seconds", 30)
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or seconds <= 0:
        raise UserError(f"{where}.seconds: must be a number above 0, not {quoted(seconds)}")
    connection = Connection(name, options, float(seconds))
    prefix, wanted = options.get("prefix", f"{name}_"), options.get("tools")
    listed = connection.list_tools()
    known = [tool.name for tool in listed]
    for one in wanted or ():
        if one not in known:
            raise UserError(f"{where}.tools: the server has no {quoted(one)}{nearest(str(one), known)}")
    return [_skill(connection, tool, str(prefix)) for tool in listed if wanted is None or tool.name in wanted]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _skill(connection: Connection, tool: Any, prefix: str) -> Skill:
    hints = tool.annotations
    effects = set() if hints is not None and hints.read_only_hint else {WRITES}
    if hints is not None and hints.open_world_hint:
        effects.add(FETCHES)
    schema = dict(tool.input_schema or {})
    properties = schema.get("properties")
    schema |= {"type": "object", "properties": properties if isinstance(properties, dict) else {}}

    def run(**arguments: Any) -> Outcome:
        return outcome(tool.name, connection.call(tool.name, {key: _sent(one) for key, one in arguments.items()}))

    return Skill(
        name=prefix + _FOREIGN.sub("_", tool.name)[:64],
        description=shorten(tool.description or tool.name, 1000),
        parameters=schema,
        function=run,
        needs=(f"MCP server {connection.name}",),
        effects=frozenset(effects),
    )


def _sent(value: Any) -> Any:
    """An argument as JSON: pictures become data URLs, masks run lengths."""
    if isinstance(value, Image.Image):
        buffer = io.BytesIO()
        value.save(buffer, "PNG")
        return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return encode_mask(value) if isinstance(value, np.ndarray) else value


def outcome(name: str, answer: Any) -> Outcome:
    """A tool's answer: structured content, else its JSON or its text; image blocks are pictures.

    Raises:
        SkillError: If the tool says that it failed, or a picture cannot be read.
    """
    texts = [block.text for block in answer.content if block.type == "text"]
    if answer.is_error:
        raise SkillError(f"{name}: {shorten(' '.join(' '.join(texts).split()), 500) or 'failed'}")
    data = answer.structured_content
    if data is None and len(texts) == 1:
        try:
            data = json.loads(texts[0])
        except (ValueError, RecursionError):
            data = None
    if not isinstance(data, dict):
        data = {"text": "\n".join(texts)} if data is None else {"result": data}
    data = {key: value for key, value in data.items() if key != "artefacts"}
    masks = data.pop("masks_rle", [])
    pictures = {}
    for number, block in enumerate(block for block in answer.content if block.type == "image"):
        try:
            image = load_image(base64.b64decode(block.data, validate=True), limits=LIMITS)
        except (ValueError, UserError) as error:
            raise SkillError(f"{name}: sent a picture that cannot be read ({_reason(error)})") from None
        pictures["edited_image" if number == 0 else f"picture_{number + 1}"] = image
    return Outcome(data, pictures, tuple(decode_mask(mask) for mask in masks) if isinstance(masks, list) else ())
