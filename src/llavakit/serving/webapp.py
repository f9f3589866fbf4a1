"""The web app: chat with pictures, videos and volumes, in the server's own process and over the same engine."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from anyio import to_thread
from fastapi import FastAPI
from PIL import Image
from starlette.middleware import Middleware

from llavakit.editing.session import Backends
from llavakit.errors import UserError
from llavakit.generation.request import RequestFailed
from llavakit.media import load_volume
from llavakit.media.source import Attached, Limits
from llavakit.phantom.write import build_world
from llavakit.serving.desk import Desks
from llavakit.serving.pagefiles import PageFiles, PageGuard
from llavakit.serving.protocol import APIError
from llavakit.serving.service import Service

VIDEOS = (".mp4", ".webm", ".mov", ".mkv", ".avi")
VOLUMES = (".npy", ".nii", ".nii.gz")
NOT_ANSWERED = "Not answered"  # title of what the page shows in place of a reply
REASONING = "Reasoning"  # title of what led to a reply; it is not sent back
# Gradio takes every text as HTML. An invisible word joiner behind the first character keeps what a model writes from
# being a tag or an entity, and the copy button gives what is seen; escaped, it would give `&lt;`.
_TAG = re.compile(r"[<&](?=[A-Za-z/!?#])")
_MARKED = re.compile("([<&])\u2060")
_SAVE = """(text) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], {type: "application/json"}));
    link.download = "conversation.json";
    link.click();
}"""
_CSS = """
footer, button[aria-label="Share"] { display: none !important }
.llavakit-title { padding: 4px 4px 0 }
.llavakit-slice { height: 320px; margin: auto; image-rendering: pixelated }
"""


def modality_of(path: str) -> str:
    """Modality by the file's ending."""
    name = path.lower()
    if name.endswith(VIDEOS):
        return "video"
    return "volume" if name.endswith(VOLUMES) else "image"


Opener = Callable[[Any], bytes]  # from the path that a browser sent to the file's content, or a refusal


def messages_of(history: list[dict[str, Any]], read: Opener) -> list[dict[str, Any]]:
    """Messages for the model from what the chat shows: files become media parts of their turn, called by their names.

    Questions that could not be answered are left out, so that they spoil no later one.

    Args:
        history: What a browser sent.
        read: Opens the files in it.

    Raises:
        UserError: If a file may not be read, or the history holds something else than texts and files.
    """
    messages: list[dict[str, Any]] = []
    for turn in history:
        title = (turn.get("metadata") or {}).get("title")
        if title == NOT_ANSWERED:
            del messages[-1:]
        if title in (NOT_ANSWERED, REASONING):
            continue
        content = turn["content"]
        parts = [_part(piece, read) for piece in (content if isinstance(content, list) else [content])]
        if turn["role"] == "assistant":
            parts = [part | {"text": _MARKED.sub(r"\1", part["text"])} if "text" in part else part for part in parts]
        if messages and messages[-1]["role"] == turn["role"]:
            messages[-1]["content"] += parts
        else:
            messages.append({"role": turn["role"], "content": parts})
    return messages


def _part(piece: Any, read: Opener) -> dict[str, Any]:
    if isinstance(piece, str):
        return {"type": "text", "text": piece}
    if isinstance(piece, dict) and piece.get("type") == "text":
        return {"type": "text", "text": str(piece["text"])}
    if not isinstance(piece, dict) or not isinstance(piece.get("file"), dict):
        raise UserError("a conversation holds texts and files")
    path = piece["file"].get("path")
    content = read(path)
    modality = modality_of(path)
    return {"type": modality, modality: Attached(content, Path(path).name)}


def escaped(text: str) -> str:
    """What Gradio shows as the text that it is."""
    return _TAG.sub("\\g<0>\u2060", text)


def export(history: list[dict[str, Any]], read: Opener) -> str:
    """The conversation as JSON: messages that the API takes as they are, media inside as data URLs."""
    messages = messages_of(history or [], read)
    for message in messages:
        for part in message["content"]:
            modality = part["type"]
            if modality != "text":
                content = base64.b64encode(part.pop(modality)).decode()
                url = f"data:application/octet-stream;base64,{content}"
                part |= {"type": f"{modality}_url", f"{modality}_url": {"url": url}}
    return json.dumps({"messages": messages}, indent=1, ensure_ascii=False)


def greyscale(content: bytes, limits: Limits) -> np.ndarray:
    """A volume as pictures, uint8 [slices, rows, columns]: from its 1st to its 99th percentile."""
    values = load_volume(content, limits=limits, fill=0.0).values
    low, high = np.percentile(values[:: max(1, len(values) // 32)], (1, 99))
    grey = np.empty(values.shape, np.uint8)
    for number, part in enumerate(values):
        grey[number] = np.clip((part - low) / max(high - low, 1e-6) * 255, 0, 255)
    return grey


def slice_of(volume: np.ndarray | None, number: int | None) -> tuple[str, Any]:
    """One slice of a grey volume (None: the middle one) as HTML, and the slider for its depth."""
    if volume is None:
        return "", gr.update(visible=False)
    last = len(volume) - 1
    number = last // 2 if number is None else int(min(max(number, 0), last))
    file = io.BytesIO()
    Image.fromarray(volume[number]).save(file, "PNG")
    picture = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    shown = f'<img class="llavakit-slice" alt="Slice {number}" src="{picture}">'
    return shown, gr.update(maximum=last, value=number, visible=True)


class Viewer:
    """The volume that was looked at last, so that a slider need not decode it again."""

    def __init__(self, service: Service) -> None:
        self._service, self._lock = service, threading.Lock()
        self._key, self._volume = b"", None

    def volume(self, content: bytes) -> np.ndarray:
        """A volume in grey; one is decoded at a time."""
        key = hashlib.sha256(content).digest()
        with self._lock:
            if key != self._key:
                with self._service.counting():
                    self._volume = greyscale(content, self._service.limits)
                self._key = key
            return self._volume


def attached_volume(message: dict[str, Any] | None, shown: str | None) -> Any:
    """A volume that was added to the question, for the viewer, unless it shows it already."""
    found = [path for path in (message or {}).get("files", ()) if modality_of(path) == "volume"]
    return gr.update(value=found[-1]) if found and found[-1] != shown else gr.skip()


def examples(files: PageFiles) -> list[dict[str, Any]]:
    """A few pictures of the phantom world with a question, made on the spot and offered to every session."""
    folder = files.folder / "examples"
    folder.mkdir()
    found = []
    for world in ("scene", "thorax"):
        item = build_world(world, size=96, difficulty="easy").sample(seed=5, index=9).items[0]
        path = folder / f"{world}.png"
        Image.fromarray(item.media[0]).save(path)
        files.share(path)
        found.append({"text": item.questions[0].text, "files": [str(path)]})
    return found


def build(service: Service, files: PageFiles) -> gr.Blocks:
    """The page; its files are opened through `files`, and only there."""
    responder, viewer = service.responder, Viewer(service)

    def opener(request: gr.Request) -> Opener:
        session = request.request.state.session
        return lambda path: files.open(session, path)

    def answer(
        message: dict[str, Any],
        history: list[dict[str, Any]],
        temperature: float,
        top_p: float,
        length: int,
        request: gr.Request,
    ) -> Iterator[Any]:
        attached = [{"type": "file", "file": {"path": path}} for path in message.get("files", [])]
        turn = {"role": "user", "content": [*attached, {"type": "text", "text": message.get("text", "")}]}
        admitted = False
        try:
            service.admit()
            admitted = True
            messages = messages_of([*history, turn], opener(request))
            service.check_messages(messages)
            with service.counting():
                response = responder.submit(
                    responder.escape(messages),
                    temperature=temperature,
                    top_p=top_p,
                    max_new_tokens=int(length),
                    owner=request.request.state.session,
                )
            said = response.answers[0]
            try:
                for _ in response:
                    text, reasoning = escaped(said.content), escaped(said.reasoning)
                    thought = [gr.ChatMessage(content=reasoning, metadata={"title": REASONING})]
                    yield [*thought, text] if reasoning else text
            finally:
                response.cancel()  # of a reply that was stopped
        except (UserError, APIError, RequestFailed) as error:  # raised, it would leave the page without a text box
            yield gr.ChatMessage(role="assistant", content=str(error), metadata={"title": NOT_ANSWERED})
        finally:
            if admitted:
                service.release()

    def view_slice(path: Any, number: int | None, request: gr.Request) -> tuple[str, Any]:
        with _told():
            return slice_of(None if path is None else viewer.volume(opener(request)(path)), number)

    def view_middle(path: Any, request: gr.Request) -> tuple[str, Any]:
        return view_slice(path, None, request)

    def save(history: list[dict[str, Any]], request: gr.Request) -> str:
        with _told():
            return export(history, opener(request))

    modalities = responder.modalities
    media = [f"{modality}s" for modality in ("image", "video", "volume") if modality in modalities]
    endings = (
        ["image", ".dcm"] * ("image" in modalities)
        + ["video"] * ("video" in modalities)
        + [*VOLUMES] * ("volume" in modalities)
    )
    name = Path(responder.name).name
    about = f"Ask about {', '.join(media)}" if media else "Ask"
    options = {"fill_height": True, "analytics_enabled": False}
    with gr.Blocks(title=f"{name} - llavakit", **options) as page:
        gr.Markdown(f"### {name}", elem_classes="llavakit-title")
        box = gr.MultimodalTextbox(
            placeholder=f"{about}; add files with the clip, or paste or drop them",
            file_types=endings,
            file_count="multiple",
            sources=["upload"],
            stop_btn=True,
            autofocus=True,
            render=False,
        )
        window = gr.Chatbot(
            height="62vh",
            min_height=280,
            buttons=["copy"],
            show_label=False,
            placeholder=f"### {about}",
            render_markdown=False,  # rendered, tags and marks of the model would vanish from what it wrote
            render=False,
        )
        settings = [
            gr.Slider(0, 2, value=0, step=0.05, label="Temperature (0: most probable)", render=False),
            gr.Slider(0.05, 1, value=1, step=0.05, label="Top-p", render=False),
            gr.Slider(1, 2048, value=256, step=1, label="Longest reply, in tokens", render=False),
        ]
        gr.ChatInterface(
            answer,
            multimodal=True,
            chatbot=window,
            textbox=box,
            additional_inputs=settings,
            additional_inputs_accordion=gr.Accordion("Settings", open=False, render=False),
            examples=[[example, None, None, None] for example in examples(files)] if "image" in modalities else None,
            cache_examples=False,
            concurrency_limit=responder.capacity,
        )
        if "volume" in modalities:
            with gr.Accordion("Volume viewer", open=False):
                file = gr.File(label="Volume", file_types=[*VOLUMES])
                depth = gr.Slider(0, 1, value=0, step=1, label="Slice, from feet to head", visible=False)
                view = gr.HTML()
                box.change(attached_volume, [box, file], file, show_progress="hidden")
                file.change(view_middle, file, [view, depth])
                depth.input(view_slice, [file, depth], [view, depth], show_progress="hidden")
        text = gr.Textbox(visible="hidden")
        gr.Button("Export conversation", size="sm").click(save, window, text).then(None, text, None, js=_SAVE)
    return page


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """What is wrong with a file is shown on the page."""
    try:
        yield
    except UserError as error:
        raise gr.Error(str(error), print_exception=False) from None


# Paths of the API and of what the editing page hands out itself; all others are Gradio's.
_API = re.compile(
    r"^/(v1/.*|health|metrics|docs(/.*)?|openapi\.json|editing/[0-9a-f]{16}/(session\.zip|\d{1,6}\.png))$"
)


def mount(app: FastAPI, backends: Backends | None = None) -> FastAPI:
    """The page at `/` of an application that `create_app` made, under the same settings.

    Uploads lie in a folder of this process alone, which goes when the application ends.

    Args:
        backends: Who edits pictures, for the editing page; without them there is none.
    """
    service, sessions = app.state.service, app.state.sessions
    settings = service.settings
    folder = Path(tempfile.mkdtemp(prefix="llavakit-page-"))  # only this user may enter it
    os.environ["GRADIO_TEMP_DIR"] = str(folder)  # where Gradio keeps uploads; it has no other setting for it
    files = PageFiles(folder, settings.media.file_bytes, settings.uploads)
    theme = gr.themes.Soft(font=["system-ui", "sans-serif"])
    page = build(service, files)
    desks = None
    if backends is not None:
        from llavakit.serving.editpage import Admitted, add_downloads, add_editing

        desks = Desks(backends, Admitted(service), settings.editing)
        add_editing(page, service, files, desks, escaped)
        add_downloads(app, desks)
    guard = {"files": files, "sessions": sessions, "others": _API, "event_bytes": settings.json_bytes}
    app.user_middleware.append(Middleware(PageGuard, **guard))  # the one nearest to the page
    options = {"theme": theme, "css": _CSS, "footer_links": [], "run_history": False}
    app = gr.mount_gradio_app(app, page, path="/", max_file_size=settings.media.file_bytes, **options)
    sessions.page = True
    inner = app.router.lifespan_context

    async def tidy() -> None:
        while True:
            await asyncio.sleep(60)
            await to_thread.run_sync(files.tidy)
            if desks is not None:
                desks.expire()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
        tidying = asyncio.create_task(tidy())
        try:
            async with inner(app) as state:
                yield state
        finally:
            tidying.cancel()
            shutil.rmtree(folder, ignore_errors=True)

    app.router.lifespan_context = lifespan
    return app
