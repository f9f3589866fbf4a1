"""Request and response types of the generation engine."""

from __future__ import annotations

import itertools
import queue
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from llavakit.errors import UserError

if TYPE_CHECKING:
    from llavakit.generation.engine import Engine

_numbers = itertools.count()


@dataclass(frozen=True)
class SamplingParams:
    """How one request is decoded.

    Attributes:
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_p: Keep the smallest set of tokens whose probability reaches this.
        top_k: Number of most probable tokens to keep; 0 keeps all.
        min_p: Keep tokens at least this fraction as probable as the best one.
        repetition_penalty: Above 1 makes tokens of prompt and reply less likely (as in transformers).
        seed: Makes the reply reproducible, whatever else the engine is doing; None draws one from torch's generator.
        max_new_tokens: Longest reply.
        stop: Strings that end the reply; they are not part of its text. One that is a special token is matched by id.
        eos_token_ids: Ids that end the reply; None takes the model's, () takes none.
        logprobs: None for none, otherwise how many alternatives to report beside the chosen token.
        n: Number of replies; the prompt is computed once.
        skip_special_tokens: Whether special tokens are left out of the text.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_new_tokens: int = 512
    stop: Sequence[str] = ()
    eos_token_ids: Sequence[int] | None = None
    logprobs: int | None = None
    n: int = 1
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        rules = (
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "at least 0 (0 keeps all tokens)"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("stop", all(self.stop), "strings that are not empty"),
            ("logprobs", self.logprobs is None or self.logprobs >= 0, "at least 0"),
            ("n", self.n >= 1, "at least 1"),
        )
        for name, holds, wanted in rules:
            if not holds:
                raise UserError(f"sampling: {name} is {getattr(self, name)!r}, it must be {wanted}")


@dataclass
class Request:
    """One prompt, with the media that belong to it.

    Attributes:
        input_ids: Expanded prompt [length] (one placeholder id per visual token).
        pixel_values: Views of all media, as the model's forward takes them for a single sample.
        visual_sizes: Original (depth, height, width) of every media item [media, 3].
        visual_modalities: Modality of every media item [media], index into `llavakit.model.routes.MODALITIES`.
        visual_regions: Boxes of every media item [regions, 4], corners in pixels of the original picture.
        inputs_embeds: Embedded prompt [length, hidden] instead of media; visual tokens are in place already.
        answers: True at earlier answers of the conversation; connectors that read the prompt may ask for it. As long as
            the prompt, or shorter if none follow.
        generated: How many ids at the end the model has generated itself in answer to this prompt; connectors that read
            the prompt leave them alone.
        sampling: How to decode.
    """

    input_ids: Sequence[int] | Tensor | None = None
    pixel_values: Tensor | Sequence[Tensor] | None = None
    visual_sizes: Tensor | None = None
    visual_modalities: Tensor | None = None
    visual_regions: Sequence[Tensor] | None = None
    inputs_embeds: Tensor | None = None
    answers: Sequence[bool] | Tensor | None = None
    generated: int = 0
    sampling: SamplingParams = field(default_factory=SamplingParams)

    def ids(self) -> list[int]:
        """The prompt's ids as a list; empty if there are embeddings only.

        Raises:
            UserError: If there is no prompt, or it is not one sequence.
        """
        if self.input_ids is None:
            if self.inputs_embeds is None:
                raise UserError("request: give input_ids or inputs_embeds")
            return []
        if isinstance(self.input_ids, Tensor):
            if self.input_ids.dim() != 1:
                raise UserError(f"request: input_ids has shape {tuple(self.input_ids.shape)}, it must be [length]")
            return self.input_ids.tolist()
        return list(self.input_ids)


@dataclass(frozen=True)
class TokenLogprob:
    """Log probability of a chosen token under the model, and of the most probable ones: (id, log probability)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class StreamChunk:
    """What one step added to a reply.

    Attributes:
        index: Number of the reply, below `n`.
        token_ids: New token ids.
        text: New text; may be empty while a character or a stop string is incomplete.
        logprobs: One entry per token, if asked for.
        finish_reason: Set in a reply's last piece: "stop", "length", "cancelled" or "error".
        stop: The stop string that ended the reply, if one did.
    """

    index: int
    token_ids: tuple[int, ...]
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    stop: str | None = None


@dataclass
class Reply:
    """One finished reply.

    Attributes:
        token_ids: All new ids, an end-of-sequence id included.
        text: The text without stop string, if the engine has a tokenizer.
        stop: The stop string that ended it; its tokens are part of `token_ids`.
    """

    index: int
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    stop: str | None = None


@dataclass(frozen=True)
class Usage:
    """Tokens of a response, hidden calls included.

    Attributes:
        prompt_tokens: Positions of all prompts.
        completion_tokens: Generated tokens.
        cached_tokens: Prompt positions whose states were reused.
        details: Generated tokens by purpose ("judged"), where hidden calls name one.
        encoded: Media that went through an encoder; others were remembered. Known of models that run here.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    details: Mapping[str, int] = field(default_factory=dict)
    encoded: int = 0

    def __add__(self, other: Usage) -> Usage:
        details = dict(self.details)
        for name, count in other.details.items():
            details[name] = details.get(name, 0) + count
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.cached_tokens + other.cached_tokens,
            details,
            self.encoded + other.encoded,
        )


class PromptTooLong(UserError):
    """A prompt that has more positions than the model takes."""


class RequestFailed(RuntimeError):
    """A request that failed inside the engine; others went on."""


class RequestHandle:
    """A submitted request: iterate for its pieces, or ask for the result.

    Iterating drives the engine, unless a thread of the engine's own does (`Engine.start`).
    """

    def __init__(self, engine: Engine, request: Request) -> None:
        self.number = next(_numbers)
        self.request = request
        self.replies = [Reply(index) for index in range(request.sampling.n)]
        self.error: Exception | None = None
        self.cancelled = False
        self.prompt_tokens = 0
        self.reused_tokens = 0
        self.encoded = 0
        self.listener: Any = None
        self.stream = True
        self._engine = engine
        self._pieces: queue.SimpleQueue[StreamChunk] = queue.SimpleQueue()
        self._open = self._unread = request.sampling.n

    @property
    def done(self) -> bool:
        """Whether every reply is finished."""
        return self._open == 0

    @property
    def usage(self) -> Usage:
        """What it took so far."""
        generated = sum(len(reply.token_ids) for reply in self.replies)
        return Usage(self.prompt_tokens, generated, self.reused_tokens, encoded=self.encoded)

    def cancel(self) -> None:
        """Stop; the row is free before the engine's next step. May be called from any thread."""
        self.cancelled = True

    def __iter__(self) -> Iterator[StreamChunk]:
        """Pieces as they come, of all replies.

        Raises:
            RequestFailed: If the request failed.
        """
        while self._unread:
            piece = self._engine.wait_for(self._pieces)
            self._unread -= piece.finish_reason is not None
            if piece.finish_reason == "error" and self.error is not None:
                raise RequestFailed(str(self.error)) from self.error
            yield piece

    def result(self) -> Reply | list[Reply]:
        """The finished reply (with n above 1: a list of them).

        Raises:
            RequestFailed: If the request failed.
        """
        for _ in self:
            pass
        if self.error is not None:
            raise RequestFailed(str(self.error)) from self.error
        return self.replies[0] if len(self.replies) == 1 else self.replies

    def deliver(self, piece: StreamChunk) -> None:
        """Engine's side: record a piece and hand it on."""
        reply = self.replies[piece.index]
        reply.token_ids += piece.token_ids
        reply.text += piece.text
        reply.logprobs += piece.logprobs
        if piece.finish_reason is not None:
            reply.finish_reason, reply.stop = piece.finish_reason, piece.stop
            self._open -= 1
        self._pieces.put(piece)
        if self.listener is not None:
            self.listener(piece)
