"""`llavakit studio`: the page, under the rules of the server's web app."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from rich.console import Console

from llavakit.errors import UserError
from llavakit.serving.access import Access, AccessPolicy, Sessions, hosts_of
from llavakit.serving.run import check_port, need

_NOT_THE_PAGE = re.compile(r"^/health$")


def serve_studio(
    workspace: Path,
    *,
    source: str = "",
    model: str = "",
    host: str = "127.0.0.1",
    port: int = 7860,
    api_keys: tuple[str, ...] = (),
    allowed_hosts: tuple[str, ...] = (),
    console: Console | None = None,
) -> None:
    """Serve the page until interrupted; what it started goes on.

    Args:
        workspace: Folder of the projects.
        source, model: What the fields hold at first.
        api_keys: Keys of which a browser must give one; also read from LLAVAKIT_API_KEYS, separated by commas.
        allowed_hosts: Names by which browsers call the server, as in `llavakit serve`.

    Raises:
        UserError: If an extra is missing, the port is taken, or other machines could start commands without a key.
    """
    console = console or Console(stderr=True)
    keys = (*api_keys, *filter(None, os.environ.get("LLAVAKIT_API_KEYS", "").split(",")))
    if host not in ("127.0.0.1", "localhost", "::1") and not keys:
        raise UserError(f"--host {host}: whoever opens the page can read files and start commands here; give --api-key")
    for module, extra in (("uvicorn", "serve"), ("fastapi", "serve"), ("gradio", "web"), ("openai", "eval")):
        need(module, extra)
    check_port(host, port)
    from llavakit.serving.process import http_server, run_until_stopped
    from llavakit.studio.actions import KEY, Studio

    if keys:
        os.environ[KEY] = keys[0]
    studio = Studio(workspace, host=host, keys=keys, allowed_hosts=allowed_hosts)
    policy = AccessPolicy(keys, hosts_of(socket.gethostname(), host, allowed_hosts))
    app = create_app(studio, policy, source=source, model=model)
    console.print(f"studio   http://{'localhost' if host in ('127.0.0.1', '0.0.0.0') else host}:{port}/")
    try:
        run_until_stopped(http_server(app, 64, host=host, port=port, log_level="warning"))
    finally:
        for job in studio.running():
            console.print(f"goes on without the studio: llavakit {' '.join(job.command)}")


def create_app(studio: Any, policy: AccessPolicy, *, source: str = "", model: str = "") -> Any:
    """The page as an ASGI application."""
    import gradio as gr
    from fastapi import FastAPI
    from starlette.middleware import Middleware

    from llavakit.serving.pagefiles import PageFiles, PageGuard
    from llavakit.studio.page import CSS, build

    folder = Path(tempfile.mkdtemp(prefix="llavakit-studio-"))  # only this user may enter it
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    files, sessions = PageFiles(folder, 2**20), Sessions()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        tidying = asyncio.create_task(_tidy(files))
        try:
            yield
        finally:
            tidying.cancel()
            shutil.rmtree(folder, ignore_errors=True)

    app = FastAPI(lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    sessions.page = True
    guard = {"files": files, "sessions": sessions, "others": _NOT_THE_PAGE}
    app.user_middleware += [
        Middleware(Access, policy=policy, sessions=sessions, refused=lambda status: None),
        Middleware(PageGuard, **guard),
    ]
    theme = gr.themes.Soft(font=["system-ui", "sans-serif"])
    options = {"theme": theme, "css": CSS, "footer_links": [], "run_history": False}
    return gr.mount_gradio_app(app, build(studio, source=source, model=model), path="/", **options)


async def _tidy(files: Any) -> None:
    from anyio import to_thread

    while True:
        await asyncio.sleep(60)
        await to_thread.run_sync(files.tidy)
