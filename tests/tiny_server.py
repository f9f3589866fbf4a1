"""A tiny served model, and requests for it, that the server's tests share."""

from __future__ import annotations

import base64
import io
import socket
import threading
import time
from collections.abc import Callable
from ipaddress import ip_network
from typing import Any

import tiny
import torch
from PIL import Image

from llavakit.generation.chat import Chat
from llavakit.media.policy import MediaPolicy
from llavakit.model.processing import LlavakitProcessor
from llavakit.phantom.tokenizer import tiny_tokenizer
from llavakit.serving.app import Settings, create_app
from llavakit.serving.process import http_server

LOOPBACK = ip_network("127.0.0.0/8")


def small_chat(positions: int = 512, **fields: Any) -> Chat:
    """A tiny random model; `fields` of its configuration."""
    tokenizer = tiny_tokenizer(["What is in this picture? A red square and a blue disc."], vocab_size=600)
    torch.manual_seed(0)
    text = {**tiny.DECODERS["llama"], "vocab_size": len(tokenizer), "max_position_embeddings": positions}
    net = tiny.LlavakitForConditionalGeneration(
        tiny.config(text_config=text, image_token_id=tokenizer.convert_tokens_to_ids("<image>"), **fields)
    ).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    return Chat(net, LlavakitProcessor.from_config(net.config, tokenizer), name="tiny", max_batch=8)


class Running:
    """A server in a thread, on a free port."""

    def __init__(self, chat: Chat, settings: Settings, mount: Callable[[Any], Any] = lambda app: app) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.app = create_app(chat, settings)
        self.server = http_server(mount(self.app), settings.connections, port=self.port, log_level="error")
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.02)
        self.url = f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(20)

    def client(self, key: str = "none") -> Any:
        import openai

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)


def strict_server(chat: Chat) -> Running:
    """A server that may read from this machine, but little and not for long."""
    media = MediaPolicy(networks=(LOOPBACK,), seconds=2.0, idle_seconds=0.7, file_bytes=200_000, images=3)
    return Running(chat, Settings(names=("tiny",), media=media, default_tokens=12))


def png(colour="red", size=(40, 30)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def ask(text="What is in this picture?", url=None):
    parts = [{"type": "text", "text": text}]
    if url is not None:
        parts.insert(0, {"type": "image_url", "image_url": {"url": url}})
    return [{"role": "user", "content": parts}]


def expected(chat, text="What is in this picture?", image=None, **sampling):
    parts = [{"type": "text", "text": text}]
    if image is not None:
        parts.insert(0, {"type": "image", "image": image})
    return chat.chat([{"role": "user", "content": parts}], **sampling)


def media(kind: str, url: str, text: str = "What is this?") -> list[dict[str, Any]]:
    """A message with a media item of a kind such as "video_url"."""
    return [{"role": "user", "content": [{"type": kind, kind: {"url": url}}, {"type": "text", "text": text}]}]
