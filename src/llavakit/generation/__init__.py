"""Generation: one engine for chat, evaluation and serving; sampling, streaming, search."""

from llavakit.generation.engine import Engine
from llavakit.generation.request import (
    Reply,
    Request,
    RequestFailed,
    RequestHandle,
    SamplingParams,
    StreamChunk,
    TokenLogprob,
)

__all__ = [
    "Engine",
    "Reply",
    "Request",
    "RequestFailed",
    "RequestHandle",
    "SamplingParams",
    "StreamChunk",
    "TokenLogprob",
]
