"""A server of MCP that is not llavakit's, made with the official SDK; some of its tools misbehave."""

import os
import time

from mcp.server.mcpserver import MCPServer
from mcp.types import ToolAnnotations

server = MCPServer("stranger")
READ = ToolAnnotations(read_only_hint=True)


@server.tool(annotations=READ)
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@server.tool(annotations=READ)
def greet(name: str) -> str:
    """Greet somebody."""
    return f"Hello {name}"


@server.tool(annotations=READ)
def fail() -> str:
    """Fail."""
    raise ValueError("it is\nbroken")


@server.tool(annotations=READ)
def slow() -> str:
    """Take long."""
    time.sleep(30)
    return "late"


@server.tool(annotations=READ)
def huge() -> str:
    """Say much."""
    return "x" * 2_000_000


@server.tool(annotations=READ)
def leave() -> str:
    """Go away."""
    os._exit(1)


@server.tool()
def write(text: str) -> str:
    """Write somewhere."""
    return "written"


if __name__ == "__main__":
    server.run("stdio")
