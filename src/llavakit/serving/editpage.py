"""The editing page of the web app: a picture is marked, changed and talked about, see `llavakit.editing`.

The page shows what `desk` says; this module joins the two with Gradio, and hands out pictures and saved sessions.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files as resources
from typing import Any

import gradio as gr
from anyio import to_thread
from fastapi import FastAPI, Request
from starlette.responses import Response as HTTPResponse

from llavakit.errors import UserError
from llavakit.generation.request import RequestFailed
from llavakit.media.image import load_image
from llavakit.media.policy import Refused
from llavakit.media.source import Attached
from llavakit.serving.desk import Desk, Desks, offers
from llavakit.serving.pagefiles import PageFiles
from llavakit.serving.protocol import APIError
from llavakit.serving.service import Service

PATH = "editing"


class Admitted:
    """The model under the server's rules, as `PictureChat` asks it."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def submit(self, messages: Any, sampling: Any) -> Any:
        """See `Responder.submit`."""
        responder = self.service.responder
        with self.service.counting():
            return responder.submit(responder.escape(messages), sampling)


def add_editing(page: gr.Blocks, service: Service, files: PageFiles, desks: Desks, escaped: Any) -> None:
    """Add the page at `PATH`.

    Args:
        page: The web app, closed.
        files: Opens uploads.
        escaped: What the framework is to show of a text.
    """

    def desk_of(request: gr.Request) -> Desk:
        state = request.request.state
        return desks.of(state.session, state.owner)

    def edit(event: gr.EventData, request: gr.Request) -> dict[str, Any]:
        given = event._data if isinstance(event._data, dict) else {}
        try:
            desk = desk_of(request)
        except Refused as refused:  # there is no room for what it holds by now
            return refusal(request, refused)
        try:
            path = given.pop("file", None)
            if path is None:
                return desk.handle(given)
            content = Attached(files.open(request.request.state.session, path), "the picture")
            with service.counting():
                picture = load_image(content, limits=service.limits)
            return desk.handle(given, picture)
        except (UserError, Refused) as error:
            return desk.view() | {"note": str(error), "failed": True}

    def refusal(request: gr.Request, refused: Refused) -> dict[str, Any]:
        known = desks.known(request.request.state.session) or desks.new()
        return known.view() | {"note": str(refused), "failed": True}

    def shown(talk: list[dict[str, Any]]) -> list[gr.ChatMessage]:
        return [
            gr.ChatMessage(
                role=one["role"],
                content=escaped(one["content"]),
                metadata={"title": "Not answered"} if one.get("failed") else {},
            )
            for one in talk
        ]

    def ask(text: str, request: gr.Request) -> Iterator[Any]:
        admitted = False
        try:
            desk = desk_of(request)
            service.admit()
            admitted = True
            for talk in desk.say(text):
                yield shown(talk), ""
        except (UserError, APIError, RequestFailed, Refused) as error:
            raise gr.Error(str(error), print_exception=False) from None
        finally:
            if admitted:
                service.release()

    def forget(request: gr.Request) -> None:
        desk_of(request).forget()

    def visit(request: gr.Request) -> tuple[Any, Any]:
        try:
            desk = desk_of(request)
        except Refused as refused:
            return refusal(request, refused), []
        return desk.view(), shown(desk.talk)

    folder = resources("llavakit.serving") / "editor"
    parts = {ending: (folder / f"editor.{ending}").read_text("utf-8") for ending in ("html", "css", "js")}
    with page.route("Edit pictures", f"/{PATH}"), gr.Row():
        with gr.Column(scale=3, min_width=320):
            editor = gr.HTML(
                html_template=parts["html"],
                css_template=parts["css"],
                js_on_load=parts["js"],
                offers=offers(desks.backends),
                apply_default_css=False,
            )
        with gr.Column(scale=2, min_width=300):
            window = gr.Chatbot(
                height="56vh",
                min_height=240,
                buttons=["copy"],
                label="About the current picture",
                placeholder="Ask about the picture; answers are about what it is by then",
                render_markdown=False,
            )
            text = gr.Textbox(label="Question", placeholder="What is in the picture?", max_length=1536, lines=1)
            with gr.Row():
                send = gr.Button("Ask", variant="primary", size="sm", min_width=80)
                stop = gr.Button("Stop", size="sm", min_width=80)
        window.clear(forget, None, None)
        limits = {"concurrency_limit": service.responder.capacity}
        answering = gr.on([text.submit, send.click], ask, text, [window, text], show_progress="hidden", **limits)
        stop.click(None, cancels=[answering])
        editor.edit(edit, None, editor, show_progress="hidden", trigger_mode="multiple", concurrency_limit=2)
        page.load(visit, None, [editor, window], show_progress="hidden")


def add_downloads(app: FastAPI, desks: Desks) -> None:
    """Pictures and saved sessions, for the browser whose they are."""

    def found(request: Request, identity: str) -> Desk:
        desk = desks.known(request.state.session)
        if desk is None or desk.identity != identity:
            raise APIError(404, "there is no such session here")
        return desk

    @app.get(f"/{PATH}/{{identity}}/session.zip", include_in_schema=False)
    async def session(identity: str, request: Request) -> HTTPResponse:
        content = await to_thread.run_sync(found(request, identity).saved)
        return HTTPResponse(content, media_type="application/zip", headers={"Cache-Control": "no-store"})

    @app.get(f"/{PATH}/{{identity}}/{{number}}.png", include_in_schema=False)
    async def picture(identity: str, number: int, request: Request, small: bool = False) -> HTTPResponse:
        content = await to_thread.run_sync(found(request, identity).picture, number, small)
        if content is None:
            raise APIError(404, "there is no such picture")
        return HTTPResponse(content, media_type="image/png", headers={"Cache-Control": "private, max-age=86400"})
