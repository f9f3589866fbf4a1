"""MCP both ways: our skills seen by the official client, and a stranger's server seen by us."""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("mcp")
pytest.importorskip("cv2")

import anyio
from mcp.client import Client
from mcp.client.stdio import StdioServerParameters

from llavakit.errors import UserError
from llavakit.phantom.scene import Scene
from llavakit.tools import Artefacts, Limits, Toolbox, load_toolbox
from llavakit.tools.mcp_client import skills_of
from llavakit.tools.mcp_server import create_server, http_app, serve_http

STRANGER = [sys.executable, str(Path(__file__).parent / "mcp_stranger.py")]
SOURCE = str(Path(__file__).parents[1] / "src")


def scene(index=1):
    return Image.fromarray(Scene(size=96).sample(3, index).items[0].media[0])


def data_url(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


async def exercise(client):
    """What an inspector does: list, call, chain results, call wrongly."""
    tools = {tool.name: tool for tool in (await client.list_tools()).tools}
    assert {"detect_shapes", "segment", "inpaint"} <= set(tools)
    assert "grounding_dino" not in tools
    assert tools["segment"].annotations.read_only_hint is True
    assert tools["inpaint"].input_schema["type"] == "object"
    assert "image" in tools["inpaint"].input_schema["required"]
    found = await client.call_tool("detect_shapes", {"image": data_url(scene())})
    assert not found.is_error
    text = json.loads(found.content[0].text)
    assert text["boxes"] == found.structured_content["boxes"]
    assert "masks_rle" in found.structured_content
    assert "masks_rle" not in text
    plain = base64.b64encode(base64.b64decode(data_url(scene()).partition(",")[2])).decode()
    edited = await client.call_tool("inpaint", {"image": plain, "mask": text["artefacts"]["mask"]})
    (picture,) = [block for block in edited.content if block.type == "image"]
    assert picture.mime_type == "image/png"
    assert Image.open(io.BytesIO(base64.b64decode(picture.data))).size == (96, 96)
    again = await client.call_tool(
        "detect_shapes", {"image": edited.structured_content["artefacts"]["edited_image"], "caption": "object"}
    )
    assert len(again.structured_content["boxes"]) < len(text["boxes"]) or len(text["boxes"]) == 0
    for name, arguments, said in (
        ("detect_shapes", {}, "needs a picture"),
        ("detect_shapes", {"image": "picture-unknown"}, "in this session"),
        ("detect_shapes", {"image": "http://127.0.0.1/x.png"}, "not fetched here"),
        ("segment", {"image": data_url(scene()), "box": [1]}, "box"),
        ("nothing", {}, "no tool"),
    ):
        wrong = await client.call_tool(name, arguments)
        assert wrong.is_error, name
        assert said in wrong.content[0].text


@pytest.mark.parametrize("mode", ["auto", "legacy", "2026-07-28"])
def test_the_official_client_talks_to_the_server(mode):
    async def run():
        async with Client(create_server(load_toolbox()), mode=mode) as client:
            await exercise(client)

    anyio.run(run)


def test_the_command_serves_standard_input_and_output():
    environment = {"PYTHONPATH": SOURCE, "PATH": os.environ["PATH"]}
    command = StdioServerParameters(command=sys.executable, args=["-m", "llavakit", "tools", "--mcp"], env=environment)

    async def run():
        with anyio.fail_after(90):
            async with Client(command) as client:
                await exercise(client)

    anyio.run(run)


@pytest.fixture
def address():
    """The address of a running HTTP server that asks for a key."""
    uvicorn = pytest.importorskip("uvicorn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    app = http_app(load_toolbox(), keys=["secret"])
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}/mcp"
    server.should_exit = True
    thread.join(10)


def test_http_asks_for_a_key_and_serves_both_protocols(address):
    import httpx2
    from mcp.client.streamable_http import streamable_http_client

    async def run():
        async with httpx2.AsyncClient() as http:
            assert (await http.post(address, json={})).status_code == 401
            wrong = await http.post(address, json={}, headers={"Authorization": "Bearer other"})
            assert wrong.status_code == 401
        async with httpx2.AsyncClient(headers={"Authorization": "Bearer secret"}) as http:
            for mode in ("auto", "legacy"):
                transport = streamable_http_client(address, http_client=http)
                async with Client(transport, mode=mode) as client:
                    await exercise(client)

    anyio.run(run)


def test_other_machines_need_a_key():
    with pytest.raises(UserError, match="--api-key"):
        serve_http(load_toolbox(), host="0.0.0.0")


def test_our_skills_travel_to_a_client_of_ours(address):
    options = {"url": address, "headers": {"Authorization": "Bearer secret"}, "prefix": "far_"}
    box = Toolbox(skills_of("far", options))
    assert box.call("far_detect_shapes", {}, Artefacts(scene())).data == (
        load_toolbox().call("detect_shapes", {}, Artefacts(scene())).data
    )
    masked = box.call("far_segment", {"points": [[0.5, 0.5]]}, Artefacts(scene()))
    assert masked.masks[0].shape == (96, 96)
    with pytest.raises(UserError, match="cannot be reached"):
        skills_of("far", {"url": address})


# A stranger's server


def test_a_stranger_s_tools_become_skills_and_their_faults_become_one_line():
    box = Toolbox(skills_of("other", {"command": STRANGER, "seconds": 20}), limits=Limits(result_bytes=100_000))
    assert set(box.skills) >= {"other_add", "other_greet", "other_write"}
    assert box.call("other_add", {"a": 2, "b": 3}).data == {"result": 5}
    assert "Hello Ada" in json.dumps(box.call("other_greet", {"name": "Ada"}).data)
    for name, arguments, said in (
        ("other_add", {"a": "x", "b": 3}, "a: 'x' is not of type 'integer'"),
        ("other_add", {"a": 1}, "'b' is a required property"),
        ("other_fail", {}, "Error executing tool fail"),
        ("other_huge", {}, "100000 are allowed"),
        ("other_write", {"text": "x"}, "not allowed"),
        ("other_leave", {}, "MCP server other"),
    ):
        error = box.call(name, arguments).error
        assert error is not None, name
        assert said in error, (name, error)
        assert "\n" not in error
    assert box.call("other_add", {"a": 1, "b": 1}).data == {"result": 2}  # a new process


def test_a_stranger_who_hangs_is_left():
    box = Toolbox(skills_of("other", {"command": STRANGER, "seconds": 20, "tools": ["slow", "add"]}))
    box.limits = Limits(seconds=0.5)
    began = time.perf_counter()
    assert "no answer" in box.call("other_slow").error
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "needs a command, or a url"),
        ({"command": "python x.py"}, "list of texts"),
        ({"url": "ftp://x"}, "http"),
        ({"command": ["x"], "seconds": 0}, "above 0"),
        ({"comand": ["x"]}, "did you mean 'command'"),
        ({"command": ["/nowhere/at/all"]}, "cannot be reached"),
        ({"command": [sys.executable, "-c", "print('no protocol')"], "seconds": 5}, "MCP server"),
        ({"command": STRANGER, "tools": ["ad"]}, "did you mean 'add'"),
    ],
)
def test_mistakes_in_a_server_s_options_are_named(options, said):
    with pytest.raises(UserError, match=said):
        skills_of("other", options)
