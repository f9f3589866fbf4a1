"""Generation: one engine for chat, evaluation and serving; sampling, streaming, search."""

from llavakit.generation.engine import Engine
from llavakit.generation.request import Handle, Piece, Reply, Request, RequestFailed, SamplingParams, TokenLogprob

__all__ = ["Engine", "Handle", "Piece", "Reply", "Request", "RequestFailed", "SamplingParams", "TokenLogprob"]
