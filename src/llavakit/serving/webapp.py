"""The web app: chat with pictures, videos and volumes, in the server's own process and over the same engine."""

from __future__ import annotations

import base64
import functools
import hmac
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from fastapi import FastAPI
from PIL import Image

from llavakit.conversation.encode import escape_special_tokens
from llavakit.errors import UserError
from llavakit.generation.chat import Chat
from llavakit.generation.request import RequestFailed
from llavakit.media import load_volume
from llavakit.media.policy import MediaPolicy
from llavakit.phantom.write import build_world

VIDEOS = (".mp4", ".webm", ".mov", ".mkv", ".avi")
VOLUMES = (".npy", ".nii", ".nii.gz")
NOT_ANSWERED = "Not answered"  # title of what the page shows in place of a reply
_SAVE = """(text) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], {type: "application/json"}));
    link.download = "conversation.json";
    link.click();
}"""
_CSS = """
footer, button[aria-label="Share"] { display: none !important }
.llavakit-title { padding: 4px 4px 0 }
"""


def modality_of(path: str) -> str:
    """Modality by the file's ending."""
    name = path.lower()
    if name.endswith(VIDEOS):
        return "video"
    return "volume" if name.endswith(VOLUMES) else "image"


def messages_of(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages for the model from what the chat shows: files become media parts of their turn.

    Questions that could not be answered are left out, so that they spoil no later one.
    """
    messages: list[dict[str, Any]] = []
    for turn in history:
        if (turn.get("metadata") or {}).get("title") == NOT_ANSWERED:
            messages.pop()
            continue
        content = turn["content"]
        parts: list[dict[str, Any]] = []
        for piece in content if isinstance(content, list) else [content]:
            if isinstance(piece, str):
                parts.append({"type": "text", "text": piece})
                continue
            if isinstance(piece, dict) and piece.get("type") == "text":
                parts.append({"type": "text", "text": piece["text"]})
                continue
            file = piece.get("file", piece) if isinstance(piece, dict) else piece
            path = file["path"] if isinstance(file, dict) else file[0] if isinstance(file, tuple) else str(file)
            modality = modality_of(path)
            parts.append({"type": modality, modality: path})
        if messages and messages[-1]["role"] == turn["role"]:
            messages[-1]["content"] += parts
        else:
            messages.append({"role": turn["role"], "content": parts})
    return messages


def export(history: list[dict[str, Any]]) -> str:
    """The conversation as JSON: messages that the API takes as they are, media inside as data URLs."""
    messages = messages_of(history or [])
    for message in messages:
        for part in message["content"]:
            modality = part["type"]
            if modality != "text":
                content = base64.b64encode(Path(part.pop(modality)).read_bytes()).decode()
                url = f"data:application/octet-stream;base64,{content}"
                part |= {"type": f"{modality}_url", f"{modality}_url": {"url": url}}
    return json.dumps({"messages": messages}, indent=1, ensure_ascii=False)


@functools.lru_cache(maxsize=2)
def _values(path: str) -> np.ndarray:
    return load_volume(path, limits=MediaPolicy().limits, fill=0.0).values


def slice_of(path: str | None, number: int | None) -> tuple[Image.Image | None, Any]:
    """One slice of a volume (None: the middle one) as a grey picture, and the slider for its depth."""
    if path is None:
        return None, gr.update(visible=False)
    try:
        values = _values(path)
    except UserError as error:
        raise gr.Error(str(error)) from None
    last = len(values) - 1
    number = last // 2 if number is None else int(min(max(number, 0), last))
    low, high = np.percentile(values, (1, 99))
    grey = np.clip((values[number] - low) / max(high - low, 1e-6) * 255, 0, 255).astype(np.uint8)
    return Image.fromarray(grey), gr.update(maximum=last, value=number, visible=True)


def attached_volume(message: dict[str, Any] | None) -> Any:
    """A volume that was added to the question, for the viewer."""
    found = [path for path in (message or {}).get("files", ()) if modality_of(path) == "volume"]
    return gr.update(value=found[-1]) if found else gr.skip()


def examples() -> list[dict[str, Any]]:
    """A few pictures of the phantom world with a question, made on the spot."""
    folder = Path(tempfile.mkdtemp(prefix="llavakit-examples-"))
    found = []
    for world in ("scene", "thorax"):
        item = build_world(world, size=96, difficulty="easy").sample(seed=5, index=9).items[0]
        path = folder / f"{world}.png"
        Image.fromarray(item.media[0]).save(path)
        found.append({"text": item.questions[0].text, "files": [str(path)]})
    return found


def build(chat: Chat) -> gr.Blocks:
    """The page."""

    def answer(
        message: dict[str, Any],
        history: list[dict[str, Any]],
        temperature: float,
        top_p: float,
        length: int,
    ) -> Iterator[str | gr.ChatMessage]:
        files = [{"type": "file", "file": {"path": path}} for path in message.get("files", [])]
        turn = {"role": "user", "content": [*files, {"type": "text", "text": message.get("text", "")}]}
        try:
            messages = escape_special_tokens(messages_of([*history, turn]), chat.processor.tokenizer)
            text = ""
            handle = chat.submit(messages, temperature=temperature, top_p=top_p, max_new_tokens=int(length))
            try:
                for piece in handle:
                    text += piece.text
                    yield text.strip()
            finally:
                handle.cancel()  # of a reply that was stopped
        except (UserError, RequestFailed) as error:  # raised, it would leave the page without a text box
            line = str(error)
            for path in message.get("files", []):
                line = line.replace(path, Path(path).name)
            yield gr.ChatMessage(role="assistant", content=line, metadata={"title": NOT_ANSWERED})

    modalities = chat.processor.spec.routes
    media = [f"{modality}s" for modality in ("image", "video", "volume") if modality in modalities]
    endings = (
        ["image"] * ("image" in modalities)
        + ["video"] * ("video" in modalities)
        + [*VOLUMES] * ("volume" in modalities)
    )
    name = Path(chat.name).name
    about = f"Ask about {', '.join(media)}" if media else "Ask"
    options = {"fill_height": True, "delete_cache": (3600, 86400), "analytics_enabled": False}
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
            height="62vh", min_height=280, buttons=["copy"], show_label=False, placeholder=f"### {about}", render=False
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
            examples=[[example, None, None, None] for example in examples()] if "image" in modalities else None,
            cache_examples=False,
            concurrency_limit=chat.engine.max_batch,
        )
        if "volume" in modalities:
            with gr.Accordion("Volume viewer", open=False):
                file = gr.File(label="Volume", file_types=[*VOLUMES])
                depth = gr.Slider(0, 1, value=0, step=1, label="Slice, from feet to head", visible=False)
                view = gr.Image(label="Slice", interactive=False, height=320)
                box.change(attached_volume, box, file, show_progress="hidden")
                file.change(lambda path: slice_of(path, None), file, [view, depth])
                depth.input(slice_of, [file, depth], [view, depth], show_progress="hidden")
        text = gr.Textbox(visible="hidden")
        gr.Button("Export conversation", size="sm").click(export, window, text).then(None, text, None, js=_SAVE)
    return page


def mount(app: FastAPI, chat: Chat, api_keys: Sequence[str] = ()) -> FastAPI:
    """The page at `/` of an application; with keys it asks for one as a password."""

    def known(user: str, password: str) -> bool:
        matches = [hmac.compare_digest(password.encode(), key.encode()) for key in api_keys]
        return any(matches)

    asking = {"auth": known, "auth_message": "Any name, and an API key as password"} if api_keys else {}
    limit = MediaPolicy().file_bytes
    theme = gr.themes.Soft(font=["system-ui", "sans-serif"])
    options = {"theme": theme, "css": _CSS, "max_file_size": limit, "footer_links": []}
    return gr.mount_gradio_app(app, build(chat), path="/", **options, **asking)
