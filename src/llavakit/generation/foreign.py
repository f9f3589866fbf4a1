"""`TransformersResponder`: vision-language and language models of transformers that are no llavakit models.

The model's own class, processor and chat template are used; this module brings what `generate` does not have: events,
codecs, a random stream per reply, stop strings that are never shown, likelihoods, forks. The prompt, pictures included,
is computed once for all replies of a request. Requests run one after the other, unlike in the engine.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llavakit.conversation.codecs import Codec, get_codec
from llavakit.conversation.encode import escape_special_tokens
from llavakit.conversation.messages import normalise
from llavakit.conversation.turns import CallEvent, Event
from llavakit.errors import CheckpointError, UserError
from llavakit.generation.foreign_states import ENCODED, Prefixes, States, cut, with_reply
from llavakit.generation.request import PromptTooLong, Reply, SamplingParams, StreamChunk
from llavakit.generation.responder import Call, Messages, Responder
from llavakit.generation.response import Answer, FinishEvent, Response, Usage, chunk_events
from llavakit.generation.sampling import RowRng, TokenSampler, choice_seed
from llavakit.generation.scoring import Score, check_replies, shared_length, text_ids
from llavakit.generation.search import Branch, Count
from llavakit.generation.stopping import StopStrings, check_stops, stop_token_ids
from llavakit.generation.streaming import TextStream
from llavakit.media.image import load_image
from llavakit.media.source import Limits

WEIGHTLESS = ("missing_keys", "unexpected_keys", "mismatched_keys")


def classes_of(raw: Mapping[str, Any]) -> Any:
    """The Auto class that opens a configuration, None if transformers has none of this kind."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto import modeling_auto as names

    kind = raw.get("model_type")
    if kind in names.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM if kind in names.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else None


def needs_own_class(raw: Mapping[str, Any]) -> bool:
    """Whether the engine has no rows for a language model: it keeps other states than keys and values (Mamba and its
    hybrids), or attends in another way than to all positions or a window.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    cls = AutoModelForCausalLM._model_mapping.get(CONFIG_MAPPING[raw["model_type"]], None)
    layers = set(raw.get("layer_types") or ()) - {"full_attention", "sliding_attention"}
    return bool(layers or getattr(cls, "_is_stateful", False))


def load_foreign(
    folder: Path,
    raw: Mapping[str, Any],
    *,
    name: str,
    dtype: torch.dtype,
    device: str,
    max_batch: int,
    codec: str | Codec | None,
) -> TransformersResponder:
    """A folder that transformers' own classes read.

    Raises:
        CheckpointError: If something of it is missing or does not fit; never executes code from the folder.
    """
    from transformers import AutoConfig, AutoProcessor

    cls = classes_of(raw)
    try:
        config = AutoConfig.from_pretrained(folder)
        if getattr(config, "is_encoder_decoder", False):
            raise CheckpointError(
                f"{folder}: {raw['model_type']} is an encoder-decoder; only decoders can be asked here"
            )
        processor = AutoProcessor.from_pretrained(folder)
        if not getattr(processor, "chat_template", None):
            raise CheckpointError(f"{folder}: has no chat template (chat_template.jinja); messages cannot be written")
        model, found = cls.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    except CheckpointError:
        raise
    except Exception as error:  # configurations, processors and loaders raise what they happen to run into
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"{folder}: transformers cannot open it ({lines[0][:200]})") from error
    for problem in WEIGHTLESS:
        if found[problem]:
            tensor = sorted(map(str, found[problem]))[0]
            raise CheckpointError(f"{folder}: tensor {tensor} is {problem.removesuffix('_keys')}")
    return TransformersResponder(model.to(device), processor, name=name, max_batch=max_batch, codec=codec)


class TransformersResponder(Responder):
    """Any model of `AutoModelForImageTextToText` or `AutoModelForCausalLM` with its processor.

    Args:
        model: The network.
        processor: Its processor, or its tokenizer, with a chat template.
        name: What to call it in messages.
        max_batch: Most replies of one request.
        codec: How the model writes reasoning and tool calls.
        prefix_bytes: Memory for states of prompts, from which prompts that begin in the same way go on.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        name: str = "model",
        max_batch: int = 16,
        codec: str | Codec | None = None,
        prefix_bytes: int = 1 << 30,
    ) -> None:
        super().__init__(name=name, capacity=max_batch)
        self.model, self.processor, self.codec = model.eval(), processor, get_codec(codec)
        self._limits = Limits()
        self._turn = threading.Lock()
        self._stateful = bool(getattr(model, "_is_stateful", False))
        text = model.config.get_text_config()
        self._positions = getattr(text, "max_position_embeddings", None)
        generation = model.generation_config
        ends = generation.eos_token_id if generation is not None else None
        ends = ends if isinstance(ends, (list, tuple)) else [ends]
        self.eos_token_ids = tuple(sorted({i for i in [*ends, self.tokenizer.eos_token_id] if i is not None}))
        placeholders = [getattr(processor, f"{kind}_token", None) for kind in ("image", "video", "audio")]
        self._prefixes = Prefixes(prefix_bytes if self._forks_anywhere else 0)
        self._placeholders = re.compile("|".join(re.escape(str(one)) for one in placeholders if one) or r"(?!)")

    @property
    def _forks_anywhere(self) -> bool:
        """Whether states depend on nothing but what lies in front of them: not so where the model itself remembers
        positions of its last prompt.
        """
        inner = getattr(self.model, "model", self.model)
        return not (self._stateful or hasattr(inner, "rope_deltas") or hasattr(self.model, "rope_deltas"))

    @property
    def tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def gives_logprobs(self) -> bool:
        return True

    @property
    def positions(self) -> int | None:
        return self._positions

    @property
    def modalities(self) -> tuple[str, ...]:
        return ("image",) if hasattr(self.processor, "image_processor") else ()

    def escape(self, messages: Messages) -> list[Any]:
        return escape_special_tokens(messages, self.tokenizer)

    def restrict(self, limits: Any) -> None:
        self._limits = limits

    # ------------------------------------------------------------------ answers

    def _calls(self, call: Call, response: Response) -> list[Call]:
        return [call.together(response)]

    def run(self, call: Call) -> Iterator[Event]:
        params = call.sampling
        if params.n > self.capacity:
            raise UserError(f"sampling: n is {params.n}, this model gives at most {self.capacity} replies")
        prepared = self.codec.prepare(call.messages, call.tools, call.tool_choice)
        opening, parser = self.codec.reply(call.tools, call.tool_choice, parallel=call.parallel_calls)
        inputs = self._inputs(prepared, opening, call.before_media)
        parsers = [parser() for _ in range(params.n)]
        called = [False] * params.n
        for chunk in self._chunks(inputs, params, call.check, call.count):
            call.count(Usage(completion_tokens=len(chunk.token_ids)))
            for event in chunk_events(chunk, parsers[chunk.index]):
                if isinstance(event, FinishEvent) and event.reason == "stop" and called[chunk.index]:
                    event = replace(event, reason="tool_calls")
                called[chunk.index] |= isinstance(event, CallEvent)
                yield event

    def begin(
        self,
        messages: Messages,
        prefix: str = "",
        before_media: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> Branch:
        """The root of a search, see `llavakit.generation.search`.

        Args:
            prefix: Beginning of the reply, which every branch continues.
            before_media: See `Responder.submit`.
        """
        return Branch(self._inputs(self.codec.prepare(messages), prefix, before_media))

    def expand(
        self,
        branches: Sequence[Branch],
        sampling: SamplingParams,
        count: Count | None = None,
        call: Call | None = None,
    ) -> list[list[Branch]]:
        """Continue every branch `sampling.n` times; a branch that is finished comes back alone.

        Args:
            count: Called with what was used.
            call: The request that this is done for; it ends with it.

        Raises:
            Cancelled: If the request was cancelled.
        """
        note = count or _uncounted
        stopping = {} if call is None else {"check": call.check}
        grown = []
        for number, branch in enumerate(branches):
            if branch.finished:
                grown.append([branch])
                continue
            seed = None if sampling.seed is None else choice_seed(sampling.seed, number * sampling.n)
            replies = [Reply(index) for index in range(sampling.n)]
            longer = with_reply(branch.request, branch.ids)
            for chunk in self._chunks(longer, replace(sampling, seed=seed), count=note, **stopping):
                note(Usage(completion_tokens=len(chunk.token_ids)))
                reply = replies[chunk.index]
                reply.token_ids += chunk.token_ids
                reply.text += chunk.text
                reply.finish_reason, reply.stop = chunk.finish_reason, chunk.stop
            grown.append(
                [
                    Branch(
                        branch.request,
                        (*branch.ids, *reply.token_ids),
                        branch.text + reply.text + (reply.stop or ""),
                        reply,
                    )
                    for reply in replies
                ]
            )
        return grown

    def continue_from(
        self, messages: Messages, prefix: str, sampling: SamplingParams | None = None, **fields: Any
    ) -> list[Answer]:
        (branches,) = self.expand([self.begin(messages, prefix)], replace(sampling or SamplingParams(), **fields))
        return [Answer.continued(self.codec.parser(), prefix, branch.last) for branch in branches]

    def score(self, context: Messages | str, replies: Sequence[str]) -> list[Score]:
        check_replies(replies)
        if isinstance(context, str):
            found = [text_ids(self.tokenizer, context, reply) for reply in replies]
            shared = min(length for _, length in found)
            inputs = self._text_inputs(found[0][0][:shared])
        else:
            messages = self.codec.prepare(context)
            inputs = self._inputs(messages)
            known = self._without_blanks(messages, inputs["input_ids"][0].tolist())
            found = []
            for reply in replies:
                ids = self._inputs(messages, reply)["input_ids"][0].tolist()
                found.append((ids, shared_length(known, ids)))
            shared = min(length for _, length in found)
            inputs = cut(inputs, shared)
        self._check_length(max(len(ids) for ids, _ in found))
        with self._turn, torch.inference_mode():
            logits = self._continuations(inputs, [ids[shared:] for ids, _ in found])
        scores = []
        for (ids, length), values, reply in zip(found, logits, replies, strict=True):
            rest = torch.tensor(ids[shared:], device=values.device)
            logprobs = values.float().log_softmax(-1).gather(-1, rest.unsqueeze(-1)).squeeze(-1)
            likeliest = bool((values.argmax(-1) == rest)[length - shared :].all())
            scores.append(
                Score(tuple(ids[length:]), tuple(logprobs[length - shared :].tolist()), len(reply), likeliest)
            )
        return scores

    def _continuations(self, inputs: Mapping[str, Tensor], replies: Sequence[Sequence[int]]) -> list[Tensor]:
        """Logits [tokens, vocabulary] in front of every id of given replies to one prompt."""
        if self._stateful:  # their states do not take several ids at once
            whole = [self.model(**with_reply(inputs, ids)).logits[0] for ids in replies]
            return [logits[-len(ids) - 1 : -1] for logits, ids in zip(whole, replies, strict=True)]
        states, first, _ = self._prompt_states(inputs)
        found = []
        for ids in replies:
            fed = torch.tensor([list(ids[:-1])], device=self.model.device, dtype=torch.long)
            found.append(torch.cat([first, states.forked(1).step(fed)[0]]) if len(ids) > 1 else first)
        return found

    # ------------------------------------------------------------------ prompts

    def _inputs(
        self,
        messages: Sequence[Mapping[str, Any]],
        prefix: str = "",
        before_media: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> dict[str, Tensor]:
        """Model inputs of a conversation, batch of one; with a prefix the reply has begun.

        Raises:
            UserError: If the chat template or the processor cannot express it.
        """
        conversation = self._conversation(messages, before_media)
        if prefix:
            content: Any = [{"type": "text", "text": prefix}] if self.modalities else prefix
            conversation.append({"role": "assistant", "content": content})
        try:
            found = self.processor.apply_chat_template(
                conversation,
                add_generation_prompt=not prefix,
                continue_final_message=bool(prefix),
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
        except Exception as error:  # templates and processors raise what they like for conversations they do not know
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(
                f"{self.name}: its processor does not take this conversation ({lines[-1][:200]})"
            ) from error
        inputs = {name: value.to(self.model.device) for name, value in found.items() if isinstance(value, Tensor)}
        self._check_length(inputs["input_ids"].shape[1] + 1)
        return inputs

    def _text_inputs(self, ids: Sequence[int]) -> dict[str, Tensor]:
        input_ids = torch.tensor([list(ids)], device=self.model.device)
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}

    def _conversation(
        self,
        messages: Sequence[Mapping[str, Any]],
        before_media: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> list[dict[str, Any]]:
        conversation = []
        for number, message in enumerate(normalise(messages)):
            parts: list[dict[str, Any]] = []
            for place, part in enumerate(message["content"]):
                where = f"messages.{number}.content.{place}"
                if part["type"] == "text":
                    text = self._placeholders.sub(lambda found: found[0][0] + "\u2060" + found[0][1:], part["text"])
                    parts.append({"type": "text", "text": text})
                elif part["type"] in self.modalities:
                    if before_media is not None:
                        before_media(part)
                    parts.append({"type": "image", "image": load_image(part["image"], limits=self._limits)})
                else:
                    takes = f"it takes {', '.join(self.modalities)}" if self.modalities else "it takes text alone"
                    raise UserError(f"{where}: this model takes no {part['type']} here; {takes}")
            content = parts if self.modalities else "".join(part["text"] for part in parts)
            conversation.append({"role": message["role"], "content": content})
        return conversation

    def _without_blanks(self, messages: Sequence[Mapping[str, Any]], ids: list[int]) -> list[int]:
        """Ids of a prompt without those of blanks at its end."""
        conversation = self._conversation(messages)
        text = self.processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        bare = text.rstrip(" ")
        if bare == text:
            return ids
        count = [len(self.tokenizer(one, add_special_tokens=False).input_ids) for one in (text, bare)]
        return ids[: len(ids) - (count[0] - count[1])]

    def _check_length(self, length: int) -> None:
        if self._positions is not None and length > self._positions:
            raise PromptTooLong(f"request: {length} positions are needed, this model has {self._positions}")

    # ------------------------------------------------------------------ decoding

    def _prefill(self, inputs: Mapping[str, Tensor]) -> tuple[States, Tensor]:
        """States behind a prompt, and the logits of its last position [1, vocabulary]."""

        def prefill(model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, **kwargs: Any) -> Any:
            kwargs = {name: value for name, value in kwargs.items() if name not in ("generation_config", "streamer")}
            return States.behind(model, input_ids, kwargs)

        # `generate` prepares what its decoding loops get (positions, cache), for every class as it needs it
        return self.model.generate(**inputs, custom_generate=prefill, do_sample=False, max_new_tokens=1, use_cache=True)

    def _prompt_states(self, inputs: Mapping[str, Tensor]) -> tuple[States, Tensor, Usage]:
        """States behind a prompt, the logits of its last position, and what was computed for them.

        States of a few prompts are kept. One that begins like a kept one, with the same media in the part that is
        shared, goes on from there; so forks and further questions about a picture do not encode it again.
        """
        length, media = inputs["input_ids"].shape[1], self._media_in(inputs)
        shared, states = self._prefixes.find(inputs, media.ends)
        if states is None:
            states, logits = self._prefill(inputs)
        else:
            logits = states.step(inputs["input_ids"][:, shared:])[:, -1]
        self._prefixes.put(inputs, states)
        return states, logits, Usage(length, cached_tokens=shared, encoded=0 if shared else media.count)

    def _media_in(self, inputs: Mapping[str, Tensor]) -> _Media:
        if not any(ENCODED.match(name) for name in inputs):
            return _Media(0, 0)
        names = [getattr(self.processor, f"{kind}_token", None) for kind in ("image", "video", "audio")]
        ids = [self.tokenizer.convert_tokens_to_ids(str(name)) for name in names if name]
        ids += [getattr(self.model.config, f"image_token_{end}", None) for end in ("id", "index")]
        marked = torch.isin(inputs["input_ids"][0].cpu(), torch.tensor([i for i in ids if i is not None]))
        if not marked.any():  # where they are is not known, so no part of this prompt is shared
            return _Media(1, inputs["input_ids"].shape[1])
        begins = int((marked[1:] & ~marked[:-1]).sum()) + int(marked[0])
        return _Media(begins, int(marked.nonzero()[-1]) + 1)

    def _chunks(
        self,
        inputs: Mapping[str, Tensor],
        params: SamplingParams,
        check: Callable[[], None] = lambda: None,
        count: Count | None = None,
    ) -> Iterator[StreamChunk]:
        """Pieces of all replies, token by token.

        Args:
            check: Called before every step; raises to stop.
            count: Called with what the prompt took.
        """
        check_stops(params, self.tokenizer)
        eos = frozenset(self.eos_token_ids if params.eos_token_ids is None else params.eos_token_ids)
        length = inputs["input_ids"].shape[1]
        budget = params.max_new_tokens
        if self._positions is not None:
            budget = min(budget, self._positions - length)
        rows = [_Row(index, params, self.tokenizer, eos, budget) for index in range(params.n)]
        sampler = TokenSampler([params] * params.n, self.model.device)
        with self._turn:
            check()
            with torch.inference_mode():
                if self._stateful and params.n > 1:  # such states cannot be repeated
                    ids, further = self.model._expand_inputs_for_generation(expand_size=params.n, **inputs)
                    states, logits = self._prefill({"input_ids": ids, **further})
                    used = Usage(length, encoded=self._media_in(inputs).count)
                else:
                    states, logits, used = self._prompt_states(inputs)
                    states = states if self._stateful else states.forked(params.n)  # what is kept stays as it is
                    logits = logits.expand(params.n, -1)
            if count is not None:
                count(used)
            if params.repetition_penalty != 1:
                for row in rows:
                    row.seen = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
                    row.seen[inputs["input_ids"][0].clamp(max=logits.shape[-1] - 1)] = True
            while True:
                with torch.inference_mode():
                    tokens, sound, logprobs = sampler.choose(
                        logits, [row.rng for row in rows], [row.seen for row in rows]
                    )
                if not all(sound):
                    raise FloatingPointError("the model gave logits that are not finite")
                for row, token in zip(rows, tokens, strict=True):
                    if not row.done:
                        yield row.push(token, logprobs.get(row.index))
                if all(row.done for row in rows):
                    return
                check()
                with torch.inference_mode():
                    logits = states.step(torch.tensor(tokens, device=self.model.device).unsqueeze(-1))[:, -1]


class _Row:
    """One reply in progress."""

    def __init__(self, index: int, params: SamplingParams, tokenizer: Any, eos: frozenset[int], budget: int) -> None:
        self.index, self.eos, self.left, self.done = index, eos, budget, False
        self.rng = RowRng(params.seed, index) if params.temperature > 0 else None
        self.seen: Tensor | None = None
        self._text = TextStream(tokenizer, params.skip_special_tokens)
        self._stop, self._stop_ids = StopStrings(params.stop), stop_token_ids(params.stop, tokenizer)

    def push(self, token: int, logprob: Any) -> StreamChunk:
        """The piece that a token adds."""
        self.left -= 1
        if self.seen is not None:
            self.seen[token] = True
        text, ended = self._stop.push(self._text.push(token))
        stop = self._stop.met
        if not ended and token in self._stop_ids and token not in self.eos:
            ended, stop = True, self._stop_ids[token]
        reason = "stop" if ended or token in self.eos else "length" if self.left <= 0 else None
        if reason is not None:
            self.done = True
            if self._stop.met is None:
                more, met = self._stop.push(self._text.flush())
                text += more if met else more + self._stop.flush()
                stop = self._stop.met or stop
        return StreamChunk(self.index, (token,), text, () if logprob is None else (logprob,), reason, stop)


class _Media(NamedTuple):
    """How many media a prompt holds, and the position behind the last one."""

    count: int
    ends: int


def _uncounted(usage: Usage) -> None:
    """Nobody wants to know."""


__all__ = ["TransformersResponder", "classes_of", "load_foreign"]
