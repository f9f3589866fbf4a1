"""`Chat`: one model with its processor, codec and engine; the plain responder.

model = llavakit.load("runs/demo/final")
print(model.chat([{"role": "user", "content": [{"type": "image", "image": "x.png"},
                                               {"type": "text", "text": "What is this?"}]}]))
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from llavakit.conversation.codecs import Codec, Parser, get_codec
from llavakit.conversation.encode import encode, escape_special_tokens, tokenize
from llavakit.conversation.messages import media_of, normalise
from llavakit.conversation.template import template_for
from llavakit.conversation.turns import Event
from llavakit.errors import UserError
from llavakit.generation.engine import Engine
from llavakit.generation.request import PromptTooLong, Request, RequestHandle, SamplingParams, StreamChunk
from llavakit.generation.responder import Call, Messages, Responder
from llavakit.generation.response import Answer, FinishEvent, Listener, Response, chunk_events
from llavakit.generation.scoring import Score, check_replies, one_begin, shared_length, text_ids
from llavakit.generation.search import Branch, Count, expand_branches
from llavakit.generation.stopping import before_stop, generate_options, stop_token_ids
from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.model.processing import LlavakitProcessor
from llavakit.model.prompt import PromptInfo
from llavakit.splice.scatter import IGNORE


class Chat(Responder):
    """A model with its processor and a generation engine.

    Args:
        model: The network, in evaluation mode.
        processor: Its processor.
        name: What to call it in messages.
        max_batch: Requests that are decoded together.
        codec: How the model writes reasoning and tool calls, a codec or its name; default: what its configuration says.
    """

    def __init__(
        self,
        model: LlavakitForConditionalGeneration,
        processor: LlavakitProcessor,
        name: str = "model",
        max_batch: int = 16,
        codec: str | Codec | None = None,
    ) -> None:
        super().__init__(name=name)
        self.model, self.processor = model, processor
        self.codec = get_codec(codec or getattr(model.config, "codec", None))
        self.engine = Engine(model, max_batch=max_batch, tokenizer=processor.tokenizer)

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.model.config

    @property
    def capacity(self) -> int:
        return self.engine.max_batch

    @property
    def waiting(self) -> int:
        return self.engine.waiting

    @property
    def active(self) -> int:
        return self.engine.active

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(modality for modality in self.processor.spec.routes if modality != "multi_image")

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @property
    def positions(self) -> int | None:
        return self.engine.max_length

    @property
    def gives_logprobs(self) -> bool:
        return True

    def escape(self, messages: Messages) -> list[Any]:
        return escape_special_tokens(messages, self.processor.tokenizer)

    def restrict(self, limits: Any) -> None:
        reading = self.processor.reading or {}
        own = {"limits": limits}
        self.processor.reading = {kind: {**reading.get(kind, {}), **own} for kind in ("image", "video", "volume")}

    def configure(self, changes: Mapping[str, Any]) -> None:
        self.processor.configure(changes)

    def start(self) -> None:
        self.engine.start()

    def stop(self, *, drain: bool = True) -> None:
        self.engine.stop(drain=drain)

    # ------------------------------------------------------------------ requests

    def request(
        self,
        messages: Messages,
        *,
        continue_final_message: bool = False,
        before_media: Callable[[Mapping[str, Any]], None] | None = None,
        **sampling: Any,
    ) -> Request:
        """Messages as a request for the engine.

        Args:
            continue_final_message: Whether the reply continues the last message.
            before_media: See `LlavakitProcessor.encode`.
            sampling: Fields of `SamplingParams` (`max_new_tokens`, `temperature`, `top_p`, `stop`, `seed`, ...).
        """
        sample = self.processor.encode(
            messages,
            add_generation_prompt=not continue_final_message,
            continue_final_message=continue_final_message,
            before_media=before_media,
        )
        params = SamplingParams(**sampling)
        stop = (*params.stop, *template_for(self.processor.template, self.tokenizer).stop)
        eos = self.eos_token_ids if params.eos_token_ids is None else params.eos_token_ids
        views = sample["pixel_values"]
        return Request(
            input_ids=torch.tensor(sample["input_ids"], device=self.model.device),
            pixel_values=views or None,
            visual_sizes=torch.tensor(sample["visual_sizes"]) if views else None,
            visual_modalities=torch.tensor(sample["visual_modalities"]) if views else None,
            visual_regions=sample["visual_regions"] or None,
            answers=[label != IGNORE for label in sample["labels"]],
            sampling=SamplingParams(**sampling | {"stop": stop, "eos_token_ids": eos}),
        )

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: the tokenizer's, those of the generation configuration, and the template's."""
        tokenizer = self.processor.tokenizer
        configured = self.model.generation_config.eos_token_id
        configured = configured if isinstance(configured, (list, tuple)) else [configured]
        ends = stop_token_ids(template_for(self.processor.template, self.tokenizer).stop, tokenizer)
        return tuple(sorted({i for i in [tokenizer.eos_token_id, *configured, *ends] if i is not None}))

    def _open(self, call: Call, stream: bool, listener: Listener | None) -> Response:
        prepared = self.codec.prepare(call.messages, call.tools, call.tool_choice)
        opening, parser = self.codec.reply(call.tools, call.tool_choice, parallel=call.parallel_calls)
        if opening:  # the reply is begun for the model, so that it cannot be anything but this call
            prepared = [*prepared, {"role": "assistant", "content": opening}]
        request = self.request(
            prepared,
            continue_final_message=bool(opening),
            before_media=call.before_media,
            **_given(call.sampling),
        )
        parsers = [parser() for _ in range(call.sampling.n)]
        response = EngineResponse(self.engine, parsers, listener)
        response.held_bytes = sum(view.nbytes for view in request.pixel_values or ())
        response.submit(request, stream)
        return response

    # ------------------------------------------------------------------ prefixes and likelihoods

    def begin(
        self,
        messages: Messages,
        prefix: str = "",
        before_media: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> Branch:
        """The root of a search: the prompt with its media, read once.

        Args:
            prefix: Beginning of the reply, which every branch continues.
            before_media: See `Responder.submit`.
        """
        messages = self.codec.prepare(messages)
        if prefix:
            messages = [*messages, {"role": "assistant", "content": prefix}]
        return Branch(self.request(messages, continue_final_message=bool(prefix), before_media=before_media))

    def expand(
        self,
        branches: Sequence[Branch],
        sampling: SamplingParams,
        count: Count | None = None,
        call: Call | None = None,
    ) -> list[list[Branch]]:
        """Continue every branch `sampling.n` times, all of them together; see `llavakit.generation.search`."""
        return expand_branches(self.engine, branches, sampling, count, call)

    def continue_from(
        self, messages: Messages, prefix: str, sampling: SamplingParams | None = None, **fields: Any
    ) -> list[Answer]:
        (branches,) = self.expand([self.begin(messages, prefix)], replace(sampling or SamplingParams(), **fields))
        return [Answer.continued(self.codec.parser(), prefix, branch.last) for branch in branches]

    def next_logits(self, conversations: Sequence[Messages]) -> Tensor:
        """Logits of the first token of the reply to each of several conversations, [conversations, vocabulary].

        What they share at their beginning, media included, is read and computed once; see `Engine.next_logits`.

        Raises:
            UserError: If there is none, or one cannot be answered.
        """
        if not conversations:
            raise UserError("next_logits: give at least one conversation")
        prepared = [normalise(self.codec.prepare(messages)) for messages in conversations]
        first = self.request(prepared[0])
        requests = [first]
        for messages in prepared[1:]:
            if not _same_media(messages, prepared[0]):
                requests.append(self.request(messages))
                continue
            sample = self.processor.encode(messages, add_generation_prompt=True, pixels=False)
            answers = [label != IGNORE for label in sample["labels"]]
            requests.append(replace(first, input_ids=sample["input_ids"], answers=answers))
        for request in requests:
            if len(request.ids()) >= self.engine.max_length:
                raise PromptTooLong(
                    f"a conversation has {len(request.ids())} positions, this model takes {self.engine.max_length - 1}"
                )
        return self.engine.next_logits(requests)

    def score(self, context: Messages | str, replies: Sequence[str]) -> list[Score]:
        check_replies(replies)
        request, wanted = (
            self._text_parts(context, replies) if isinstance(context, str) else self._parts(context, replies)
        )
        length = len(request.ids()) + max(len(ids) for ids, _ in wanted)
        if length > self.engine.max_length:
            raise UserError(
                f"score: context and reply have {length} positions, this model takes {self.engine.max_length}"
            )
        scores = []
        found = self.engine.reply_likelihoods(request, [ids for ids, _ in wanted])
        for (ids, skipped), likelihood, reply in zip(wanted, found, replies, strict=True):
            own = ids[skipped:]
            likeliest = likelihood.likeliest[skipped:].tolist() == own
            scores.append(Score(tuple(own), tuple(likelihood.logps[skipped:].tolist()), len(reply), likeliest))
        return scores

    def _text_parts(self, context: str, replies: Sequence[str]) -> tuple[Request, list[tuple[list[int], int]]]:
        """A plain context as a request, and per reply the ids behind it and how many of them are the context's."""
        found = [text_ids(self.tokenizer, context, reply) for reply in replies]
        shared = min(length for _, length in found)
        return Request(input_ids=found[0][0][:shared]), [(ids[shared:], length - shared) for ids, length in found]

    def _parts(self, context: Messages, replies: Sequence[str]) -> tuple[Request, list[tuple[list[int], int]]]:
        """The same for a conversation, whose media positions lie in front of what a reply can change."""
        messages, begin = self.codec.prepare(context), self.tokenizer.bos_token_id
        template = self.processor.template
        opened = encode(messages, template, self.tokenizer, add_generation_prompt=True)
        known = one_begin(opened.ids, begin)
        blanks = len(tokenize(opened.text, self.tokenizer)[0]) - len(
            tokenize(opened.text.rstrip(" "), self.tokenizer)[0]
        )
        known = known[: len(known) - blanks]
        found = []
        for reply in replies:
            whole = encode(
                [*messages, {"role": "assistant", "content": reply}],
                template,
                self.tokenizer,
                continue_final_message=True,
            )
            ids = one_begin(whole.ids, begin)
            found.append((ids, shared_length(known, ids)))
        shared = min(length for _, length in found)
        request = self.request(messages)
        cut = len(one_begin(opened.ids, begin)) - shared
        expanded = one_begin(request.ids(), begin)
        dropped = len(request.ids()) - len(expanded)
        request.input_ids = expanded[: len(expanded) - cut]
        request.answers = list(request.answers)[dropped:][: len(request.input_ids)]
        return request, [(ids[shared:], length - shared) for ids, length in found]

    # ------------------------------------------------------------------ transformers' own generation

    def generate(self, messages: Messages, **options: Any) -> str:
        """The next turn by transformers' `generate`, with all its options (`num_beams`, ...).

        Args:
            options: Of `generate`; `stop` (a string or several) ends the reply as in `chat`.
        """
        request = self.request(self.codec.prepare(messages), stop=options.pop("stop", None))
        tokenizer = self.processor.tokenizer
        inputs: dict[str, Any] = {"input_ids": request.input_ids[None]}
        if request.pixel_values is not None:
            views = request.pixel_values
            inputs["pixel_values"] = torch.stack(views) if len({v.shape for v in views}) == 1 else views
            inputs |= {"visual_sizes": request.visual_sizes, "visual_modalities": request.visual_modalities}
            inputs["visual_regions"] = request.visual_regions
        inputs["prompt_info"] = PromptInfo(torch.tensor(request.answers, device=self.model.device)[None])
        options = generate_options(request.sampling, tokenizer, self.eos_token_ids) | options
        out = self.model.generate(**inputs, **options)
        text = tokenizer.decode(out[0, request.input_ids.shape[0] :], skip_special_tokens=True)
        return before_stop(text, request.sampling.stop).strip()


def _same_media(one: Messages, other: Messages) -> bool:
    """Whether two normalised conversations show the very same media, without boxes in them."""
    if any(part["type"] == "boxes" for messages in (one, other) for turn in messages for part in turn["content"]):
        return False
    sources = [[(part["type"], id(part.get(part["type"]))) for part in media_of(messages)] for messages in (one, other)]
    stretches = [[(part.get("start"), part.get("end")) for part in media_of(messages)] for messages in (one, other)]
    return sources[0] == sources[1] and stretches[0] == stretches[1]


def _given(sampling: SamplingParams) -> dict[str, Any]:
    return {entry.name: getattr(sampling, entry.name) for entry in fields(sampling)}


class EngineResponse(Response):
    """A response of the engine, whose text goes through the codec as it comes.

    Args:
        engine: Iterating drives it, unless a thread of its own does.
        parsers: One per reply.
    """

    handle: RequestHandle

    def __init__(self, engine: Engine, parsers: Sequence[Parser], listener: Listener | None) -> None:
        super().__init__(len(parsers), listener)
        self._engine, self._parsers = engine, parsers
        self._submitting = threading.Lock()
        self._tokens = 0

    def submit(self, request: Request, stream: bool) -> None:
        """Queue the request.

        Raises:
            UserError: If the engine refuses it.
        """
        with self._submitting:  # the first piece may come before `handle` is known
            self.handle = self._engine.submit(request, stream=stream, listener=self._listen)

    def cancel(self) -> None:
        super().cancel()
        self.handle.cancel()

    def _listen(self, chunk: StreamChunk) -> None:
        """A piece from the engine, in the thread that steps it."""
        with self._submitting:
            pass
        try:
            self._take(chunk)
        except Exception as error:  # of a codec; raised, it would leave the request without an end
            self.fail(error)

    def _take(self, chunk: StreamChunk) -> None:
        answer, handle = self.answers[chunk.index], self.handle
        if answer.finish_reason is not None:  # it failed
            return
        self._tokens += len(chunk.token_ids)
        self.usage = replace(handle.usage, completion_tokens=self._tokens)
        for event in chunk_events(chunk, self._parsers[chunk.index]):
            if not isinstance(event, FinishEvent):
                self.deliver(event)
                continue
            if event.reason == "error":
                self.fail(handle.error or RuntimeError("the engine failed"))
            reason = "tool_calls" if answer.calls and event.reason == "stop" else event.reason
            self.finish(event.index, reason, event.stop)

    def _next(self) -> Event:
        return self._engine.wait_for(self._events)
