"""The web app: chat with pictures, videos and volumes, in the server's own process and over the same engine."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from fastapi import FastAPI
from PIL import Image

from llavakit.api import Chat
from llavakit.conversation.encode import disarm
from llavakit.errors import UserError
from llavakit.generation.request import RequestFailed
from llavakit.phantom.write import build_world
from llavakit.views.media import Limits, load_image, load_volume

LIMITS = Limits(pixels=50_000_000, file_bytes=256 * 2**20)
VIDEOS = (".mp4", ".webm", ".mov", ".mkv", ".avi")
VOLUMES = (".npy", ".nii", ".nii.gz")


def kind_of(path: str) -> str:
    """Kind of medium by the file's ending."""
    name = path.lower()
    if name.endswith(VIDEOS):
        return "video"
    return "volume" if name.endswith(VOLUMES) else "image"


def messages_of(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages for the model from what the chat shows: files become media parts of the turn that they belong to."""
    messages: list[dict[str, Any]] = []
    for turn in history:
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
            kind = kind_of(path)
            parts.append({"type": kind, kind: path})
        if messages and messages[-1]["role"] == turn["role"]:
            messages[-1]["content"] += parts
        else:
            messages.append({"role": turn["role"], "content": parts})
    return messages


def slice_of(path: str | None, number: int) -> tuple[Image.Image | None, Any]:
    """One slice of a volume as a grey picture, and the slider for its depth."""
    if not path or kind_of(path) != "volume":
        return None, gr.update(maximum=1, visible=False)
    values = load_volume(path, limits=LIMITS).values
    number = int(min(max(number, 0), len(values) - 1))
    low, high = np.percentile(values, (1, 99))
    grey = np.clip((values[number] - low) / max(high - low, 1e-6) * 255, 0, 255).astype(np.uint8)
    return Image.fromarray(grey), gr.update(maximum=len(values) - 1, visible=True)


def examples_of(chat: Chat) -> list[list[Any]]:
    """A few pictures of the phantom world, made on the spot."""
    folder = Path(tempfile.mkdtemp(prefix="llavakit-examples-"))
    found = []
    for world in ("scene", "thorax"):
        item = build_world(world, size=96, difficulty="easy").sample(seed=5, index=9).items[0]
        path = folder / f"{world}.png"
        Image.fromarray(item.media[0]).save(path)
        found.append([{"text": item.questions[0].text, "files": [str(path)]}])
    return found


def build(chat: Chat) -> gr.Blocks:
    """The page."""

    def answer(
        message: dict[str, Any],
        history: list[dict[str, Any]],
        temperature: float,
        top_p: float,
        length: int,
    ) -> Iterator[str]:
        files = [{"type": "file", "file": {"path": path}} for path in message.get("files", [])]
        turn = {"role": "user", "content": [*files, {"type": "text", "text": message.get("text", "")}]}
        try:
            for path in message.get("files", []):
                if kind_of(path) == "image":
                    load_image(path, limits=LIMITS)
            messages = disarm(messages_of([*history, turn]), chat.processor.tokenizer)
            text = ""
            handle = chat.submit(messages, temperature=temperature, top_p=top_p, max_new_tokens=int(length))
            try:
                for piece in handle:
                    text += piece.text
                    yield text.strip()
            finally:
                if not handle.done:
                    handle.cancel()
        except (UserError, RequestFailed) as error:
            raise gr.Error(str(error)) from None

    def export(history: list[dict[str, Any]]) -> str:
        path = Path(tempfile.mkdtemp(prefix="llavakit-export-")) / "conversation.json"
        path.write_text(json.dumps(messages_of(history or []), indent=1, ensure_ascii=False), encoding="utf-8")
        return str(path)

    kinds = chat.processor.spec.routes
    endings = ["image"] * ("image" in kinds) + ["video"] * ("video" in kinds) + [*VOLUMES] * ("volume" in kinds)
    with gr.Blocks(title="llavakit", fill_height=True) as page:
        gr.Markdown(f"### {chat.name}\nAsk about pictures" + (", videos" if "video" in kinds else "") + ".")
        with gr.Accordion("Settings", open=False):
            temperature = gr.Slider(0, 2, value=0, step=0.05, label="temperature (0: most probable)")
            top_p = gr.Slider(0.05, 1, value=1, step=0.05, label="top-p")
            length = gr.Slider(1, 2048, value=256, step=1, label="longest reply, tokens")
        box = gr.MultimodalTextbox(
            placeholder="Ask, and add or paste pictures", file_types=endings, file_count="multiple", sources=["upload"]
        )
        window = gr.Chatbot(label="conversation", height=480)
        gr.ChatInterface(
            answer,
            multimodal=True,
            chatbot=window,
            textbox=box,
            additional_inputs=[temperature, top_p, length],
            examples=[[*example, 0, 1, 64] for example in examples_of(chat)] if "image" in kinds else None,
            cache_examples=False,
            stop_btn=True,
        )
        with gr.Row():
            save = gr.Button("Export conversation", size="sm")
            saved = gr.File(label="conversation.json", visible=True)
        save.click(export, window, saved)
        if "volume" in kinds:
            with gr.Accordion("Volume viewer", open=False):
                file = gr.File(label="volume", file_types=[*VOLUMES])
                depth = gr.Slider(0, 1, value=0, step=1, label="slice", visible=False)
                view = gr.Image(label="slice", interactive=False)
                file.change(slice_of, [file, depth], [view, depth])
                depth.change(slice_of, [file, depth], [view, depth])
    return page


def mount(app: FastAPI, chat: Chat) -> FastAPI:
    """The page at `/` of an application."""
    return gr.mount_gradio_app(app, build(chat), path="/")
