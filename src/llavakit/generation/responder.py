"""Responders: what chat, evaluation, server and judges talk to.

A responder answers a conversation with events (text, reasoning, tool calls, pictures, traces) and ranks given replies
by their likelihood. One model is a responder (`Chat`); so are a remote API, an ensemble, a retrieval loop, a search.
A responder that is composed of others overrides one generator:

    class Twice(Responder):
        def run(self, call):
            draft = call.ask(self.main, call.messages, purpose="drafted")  # hidden, counted, cancelled with the request
            yield TraceEvent(name="draft", data={"text": draft.content})
            yield from call.stream(self.main, [*call.messages, draft.message(), REVISE])

and everything else (batches, streams, several replies, cancelling, the server's queue) comes from the base class: every
reply runs in a thread of its own, and what those threads ask of a model is decoded together by its engine.

A system's card names the factory of its responder (`System.responder`).
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from typing import Any, ClassVar

from llavakit.conversation.turns import Event, TextDelta, Tool
from llavakit.errors import UserError, quoted
from llavakit.generation.request import SamplingParams
from llavakit.generation.response import Answer, Cancellable, Cancelled, FinishEvent, Listener, Response, Usage
from llavakit.generation.sampling import call_seed, choice_seed
from llavakit.generation.scoring import Score
from llavakit.registry import nearest

Messages = Sequence[Mapping[str, Any]]
SAMPLING = frozenset(entry.name for entry in fields(SamplingParams))


class Call:
    """One reply of one request, as `Responder.run` sees it.

    Attributes:
        messages: The conversation.
        sampling: How to decode; `n` is 1 and the seed is this reply's own.
        tools, tool_choice, parallel_calls: See `Responder.submit`.
        options: The responder's own options (an instance of `Responder.options`), or None.
        streamed: Whether somebody wants the text as it comes.
        before_media, owner: See `Responder.submit`.
        indices: Numbers of the replies that `run` is to generate: one, unless the responder takes them together.
        finish_reason, stop: How the reply ended; `stream` sets them, `run` may.
        answer: What the last `stream` brought, whole.
    """

    def __init__(
        self,
        messages: Messages,
        sampling: SamplingParams,
        *,
        tools: Sequence[Tool] = (),
        tool_choice: str = "auto",
        parallel_calls: bool = True,
        options: Any = None,
        streamed: bool = True,
        before_media: Callable[[Mapping[str, Any]], None] | None = None,
        owner: str = "",
    ) -> None:
        self.messages, self.sampling = messages, sampling
        self.tools, self.tool_choice, self.parallel_calls = tuple(tools), tool_choice, parallel_calls
        self.options, self.streamed, self.before_media, self.owner = options, streamed, before_media, owner
        self.indices: tuple[int, ...] = (0,)
        self.finish_reason, self.stop = "stop", None
        self.answer: Answer | None = None
        self._response = Response()
        self._asked = 0

    def choice(self, index: int, response: Response) -> Call:
        """The call of one of `n` replies."""
        seed = self.sampling.seed
        sampling = replace(self.sampling, n=1, seed=None if seed is None else choice_seed(seed, index))
        return self._part(response, sampling, (index,))

    def together(self, response: Response) -> Call:
        """The call of all replies at once; `sampling.n` says how many, and events have their index."""
        return self._part(response, self.sampling, tuple(range(self.sampling.n)))

    def _part(self, response: Response, sampling: SamplingParams, indices: tuple[int, ...]) -> Call:
        one = Call(
            self.messages,
            sampling,
            tools=self.tools,
            tool_choice=self.tool_choice,
            parallel_calls=self.parallel_calls,
            options=self.options,
            streamed=self.streamed,
            before_media=self.before_media,
            owner=self.owner,
        )
        one.indices, one._response = indices, response
        return one

    def count(self, usage: Usage) -> None:
        """Add tokens that were not counted by `ask` or `stream`."""
        self._response.count(usage)

    def ask(
        self,
        responder: Responder,
        messages: Messages | None = None,
        *,
        purpose: str | None = None,
        usage: Callable[[Usage], None] | None = None,
        **fields: Any,
    ) -> Any:
        """A hidden answer of another responder (with n above 1: a list of them).

        Args:
            messages: None asks the conversation itself.
            purpose: Name under which its tokens are counted in `Usage.details`.
            usage: Called with what it used.
            fields: Changes to this call's sampling parameters, `tools`, or the other's options. Calls that follow each
                other draw from different streams unless they name a `seed`.

        Raises:
            Cancelled: If the request was cancelled.
        """
        return self.ask_all([(responder, messages, fields)], purpose=purpose, usage=usage)[0]

    def ask_all(
        self,
        requests: Sequence[tuple[Responder, Messages | None, Mapping[str, Any]]],
        *,
        purpose: str | None = None,
        usage: Callable[[Usage], None] | None = None,
    ) -> list[Any]:
        """Several hidden answers at the same time, in order; see `ask`."""
        responses: list[Response] = []
        with contextlib.ExitStack() as stack:
            for responder, messages, changes in requests:
                responses.append(self._submit(responder, messages, changes, stream=False))
                stack.enter_context(self._response.holding(responses[-1]))
            results = [response.result() for response in responses]
        for response in responses if usage is not None else ():
            usage(response.usage)
        self._count(responses, purpose)
        return results

    def stream(self, responder: Responder, messages: Messages | None = None, **fields: Any) -> Iterator[Event]:
        """Events of another responder's answer, to be passed on; see `ask`. Tools are passed on too.

        Raises:
            Cancelled: If the request was cancelled.
        """
        given = {"tools": self.tools, "tool_choice": self.tool_choice, "parallel_calls": self.parallel_calls}
        response = self._submit(responder, messages, given | {"logprobs": self.sampling.logprobs} | fields, stream=True)
        with self._response.holding(response):
            for event in response:
                if isinstance(event, FinishEvent):
                    self.finish_reason, self.stop = event.reason, event.stop
                else:
                    yield event
        self.answer = response.answers[0]
        self._count([response], None)

    def score(self, responder: Responder, context: Messages | str, replies: Sequence[str]) -> list[Score]:
        """Likelihoods of given replies, see `Responder.score`."""
        self.check()
        return responder.score(context, replies)

    def holding(self, *work: Cancellable) -> AbstractContextManager[None]:
        """Work that is cancelled with the request, and when the block is left."""
        return self._response.holding(*work)

    def check(self) -> None:
        """Raise if the caller has gone; for work between calls.

        Raises:
            Cancelled: If the request was cancelled.
        """
        if self._response.cancelled:
            raise Cancelled

    def _submit(
        self, responder: Responder, messages: Messages | None, changes: Mapping[str, Any], stream: bool
    ) -> Response:
        self.check()
        seed = self.sampling.seed
        base = replace(self.sampling, logprobs=None, seed=None if seed is None else call_seed(seed, self._asked))
        self._asked += 1
        given = {"before_media": self.before_media, "owner": self.owner} | dict(changes)
        return responder.submit(self.messages if messages is None else messages, base, stream=stream, **given)

    def _count(self, responses: Sequence[Response], purpose: str | None) -> None:
        for response in responses:
            self._response.count(response.usage)
            if purpose is not None:
                self._response.count(Usage(details={purpose: response.usage.completion_tokens}))
        self.check()


class Responder:
    """Base class: everything but `run` (and, for a model, `score`).

    Args:
        parts: The responders that this one is composed of; the first is the main one, whose tokenizer and media it
            shares.
        name: What to call it in messages.
        capacity: Replies that run together; default: as many as the main part decodes together.

    Attributes:
        options: A pydantic model of further options that a request may have, or None.
        settings: What it was made with, as far as that decides answers; part of its identity.
    """

    options: ClassVar[type[Any] | None] = None

    def __init__(self, *parts: Responder, name: str | None = None, capacity: int | None = None) -> None:
        self.parts = parts
        self.name = name or (parts[0].name if parts else type(self).__name__)
        self._capacity = capacity or (parts[0].capacity if parts else 8)
        self.settings: Mapping[str, Any] = {}
        self._preset: dict[str, Any] = {}
        self._queue: deque[tuple[contextvars.Context, Call, Response]] = deque()
        self._running: set[Response] = set()
        self._guard = threading.Condition()
        self._active = 0

    def run(self, call: Call) -> Iterator[Event]:
        """Generate one reply; a `FinishEvent` is added where none is given.

        Raises:
            UserError: If the conversation cannot be answered.
        """
        raise NotImplementedError(f"{type(self).__name__} does not answer")
        yield

    def score(self, context: Messages | str, replies: Sequence[str]) -> list[Score]:
        """Likelihoods of given replies, which rank them; the context is computed once.

        Args:
            context: A conversation, to which each reply would be the assistant's next turn, or a plain text that
                each reply would continue.
            replies: At least one.

        Raises:
            UserError: If this responder has no likelihoods, or a reply is empty.
        """
        raise UserError(f"{self.name}: cannot score given replies; that needs a model that runs here")

    def continue_from(
        self, messages: Messages, prefix: str, sampling: SamplingParams | None = None, **fields: Any
    ) -> list[Answer]:
        """Go on from the beginning of a reply, `sampling.n` times.

        Raises:
            UserError: If this responder cannot.
        """
        raise UserError(f"{self.name}: cannot continue the beginning of a reply; that needs a model that runs here")

    # ------------------------------------------------------------------ what callers use

    def submit(
        self,
        messages: Messages,
        sampling: SamplingParams | None = None,
        *,
        tools: Sequence[Tool] = (),
        tool_choice: str = "auto",
        parallel_calls: bool = True,
        stream: bool = True,
        listener: Listener | None = None,
        before_media: Callable[[Mapping[str, Any]], None] | None = None,
        owner: str = "",
        **fields: Any,
    ) -> Response:
        """Queue a conversation; may be called from any thread.

        Args:
            messages: OpenAI-style messages; those of the assistant may have `tool_calls` and `reasoning_content`.
            sampling: How to decode.
            tools: Functions that the model may call.
            tool_choice: "auto", "none", "required", or the name of the function that must be called.
            parallel_calls: Whether one reply may hold several calls.
            stream: Whether text comes as it is generated; without it the last events carry all of it, cheaper.
            listener: Called with every event, in the thread that generates; replies of one request may have several.
            before_media: Called before a media item is read; what it raises ends the request.
            owner: Whose request it is; what a responder remembers of it is of use to nobody else.
            fields: Fields of `SamplingParams` (they win over `sampling`), and this responder's own options.

        Raises:
            UserError: If the request is refused; what is found later ends the response with an error.
        """
        changes = {name: value for name, value in fields.items() if name in SAMPLING}
        own = {name: value for name, value in fields.items() if name not in SAMPLING}
        call = Call(
            messages,
            replace(sampling or SamplingParams(), **changes),
            tools=tools,
            tool_choice=tool_choice,
            parallel_calls=parallel_calls,
            options=self._options(own),
            streamed=stream,
            before_media=before_media,
            owner=owner,
        )
        return self._open(call, stream, listener)

    def respond(self, messages: Messages, sampling: SamplingParams | None = None, **fields: Any) -> Iterator[Event]:
        """The events of an answer; see `submit`. An answer that is not read to its end is cancelled."""
        response = self.submit(messages, sampling, **fields)
        try:
            yield from response
        finally:
            if not response.done:
                response.cancel()

    def answer_all(
        self, conversations: Sequence[Messages], sampling: SamplingParams | None = None, **fields: Any
    ) -> list[Answer | UserError]:
        """Answers to many conversations, generated together; those that cannot be answered are their error.

        With `sampling.n` above one each conversation has a list of answers.

        Raises:
            RequestFailed: If answering one failed for another reason than the user's input.
        """
        opened: list[Response | UserError] = []
        for messages in conversations:
            try:
                opened.append(self.submit(messages, sampling, stream=False, **fields))
            except UserError as error:
                opened.append(error)
        answers: list[Answer | UserError] = []
        for response in opened:
            try:
                answers.append(response if isinstance(response, UserError) else response.result())
            except UserError as error:
                answers.append(error)
        return answers

    def chat(self, messages: Messages, **fields: Any) -> str:
        """The assistant's next turn as text."""
        return self.chat_batch([messages], **fields)[0]

    def chat_batch(self, conversations: Sequence[Messages], **fields: Any) -> list[str]:
        """The next turn of several conversations, generated together.

        Raises:
            UserError: The first one.
        """
        answers = self.answer_all(conversations, **fields)
        for answer in answers:
            if isinstance(answer, UserError):
                raise answer
        return [answer.content for answer in answers]

    def stream(self, messages: Messages, **fields: Any) -> Iterator[str]:
        """The text of the next turn piece by piece."""
        for event in self.respond(messages, **fields):
            if isinstance(event, TextDelta):
                yield event.text

    # ------------------------------------------------------------------ what a host needs

    @property
    def main(self) -> Responder:
        """The first part.

        Raises:
            UserError: If there is none.
        """
        if not self.parts:
            raise UserError(f"{self.name}: is not composed of other responders")
        return self.parts[0]

    @property
    def capacity(self) -> int:
        """Replies that run together."""
        return self._capacity

    @property
    def waiting(self) -> int:
        """Replies that have not begun."""
        return len(self._queue)

    @property
    def active(self) -> int:
        """Replies that are being generated."""
        return self._active

    @property
    def modalities(self) -> tuple[str, ...]:
        """Kinds of media items that a message may hold."""
        return self.parts[0].modalities if self.parts else ()

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that its prompts go through, None if it is not known."""
        return self.parts[0].tokenizer if self.parts else None

    @property
    def positions(self) -> int | None:
        """Positions of prompt and reply together, None if they are not known."""
        return self.parts[0].positions if self.parts else None

    @property
    def gives_logprobs(self) -> bool:
        """Whether answers have log probabilities when they are asked for."""
        return False

    @property
    def identity(self) -> str:
        """What answers, in words, where there is no network whose weights say it; see `generation.identity`."""
        return self.name

    def escape(self, messages: Messages) -> list[Any]:
        """Messages from outside in which no text acts as a special token of the model."""
        return self.parts[0].escape(messages) if self.parts else list(messages)

    def restrict(self, limits: Any) -> None:
        """Limit the media items that are read (`llavakit.media.Limits`)."""
        for part in self.parts:
            part.restrict(limits)

    def configure(self, changes: Mapping[str, Any]) -> None:
        """Change how media are read, by dotted names.

        Raises:
            UserError: If this responder reads none, or a name is unknown.
        """
        if not self.parts:
            raise UserError(f"{self.name}: reads no media items here, so nothing can be configured")
        for part in self.parts:
            part.configure(changes)

    def start(self) -> None:
        """Prepare for requests from many threads."""
        for part in self.parts:
            part.start()

    def stop(self, *, drain: bool = True) -> None:
        """End; with `drain` after all submitted requests are finished, else they are cancelled."""
        with self._guard:
            for response in () if drain else list(self._running):
                response.cancel()
            while self._queue or self._active:
                self._guard.wait()
        for part in self.parts:
            part.stop(drain=drain)

    def preset(self, **options: Any) -> None:
        """Values of this responder's own options for requests that do not give them.

        Raises:
            UserError: If an option is unknown or its value does not fit.
        """
        self._options(options)
        self._preset |= options

    # ------------------------------------------------------------------ running

    def _options(self, given: Mapping[str, Any]) -> Any:
        if self.options is None:
            if given:
                name = next(iter(given))
                raise UserError(f"{self.name}: unknown option {name!r}{nearest(name, sorted(SAMPLING))}")
            return None
        from pydantic import ValidationError

        for name in given:
            if name not in self.options.model_fields:
                raise UserError(
                    f"{self.name}: unknown option {name!r}{nearest(name, [*self.options.model_fields, *SAMPLING])}"
                )
        try:
            return self.options(**self._preset | given)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise UserError(f"{self.name}: {place}: {first['msg']}, not {quoted(first.get('input'))}") from None

    def _open(self, call: Call, stream: bool, listener: Listener | None) -> Response:
        response = Response(call.sampling.n, listener)
        with self._guard:
            self._running.add(response)
            for one in self._calls(call, response):
                self._queue.append((contextvars.copy_context(), one, response))
                if self._active < self.capacity:  # of daemons, so that an endless reply does not outlive the program
                    self._active += 1
                    threading.Thread(target=self._serve, name=f"respond-{self.name}", daemon=True).start()
        return response

    def _serve(self) -> None:
        """Generate waiting replies until there are none."""
        while True:
            with self._guard:
                if not self._queue:
                    self._active -= 1
                    self._guard.notify_all()
                    return
                context, call, response = self._queue.popleft()
            context.run(self._work, call, response)

    def _calls(self, call: Call, response: Response) -> list[Call]:
        """The calls that generate the replies of a request: one each."""
        return [call.choice(index, response) for index in range(call.sampling.n)]

    def _work(self, call: Call, response: Response) -> None:
        try:
            call.check()
            with contextlib.closing(self._events(call)) as events:
                for event in events:
                    index = call.indices[0] if len(call.indices) == 1 else event.index
                    response.deliver(replace(event, index=index))
                    call.check()
        except Cancelled:
            call.finish_reason = "cancelled"
        except Exception as error:  # whatever one request does, it fails alone
            response.fail(error)
        for index in call.indices:
            response.finish(index, call.finish_reason, call.stop)
        if response.done:
            with self._guard:
                self._running.discard(response)

    def _events(self, call: Call) -> Iterator[Event]:
        yield from self.run(call)
