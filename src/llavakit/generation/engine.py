"""The engine: many requests decoded together, each as if it were alone.

One step admits waiting requests (prefill, one prompt at a time, nothing padded), then decodes one token for every
active row. A row that finishes leaves at once and the last row takes its place, so a step computes active rows
only. The chat API, evaluation and the server all use this one class.

Prompts with media, sampling and text are the neighbours' business (`prompt`, `sampling`, `streaming`); this file
schedules.
"""

from __future__ import annotations

import functools
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from llavakit.errors import UserError
from llavakit.generation.cache import PrefixStore, one_row_cache, shared_prefix, stack_layers
from llavakit.generation.prompt import Prompt, PromptReader
from llavakit.generation.request import PromptTooLong, Request, RequestHandle, SamplingParams, StreamChunk, TokenLogprob
from llavakit.generation.rows import PlainRows, sliding_window
from llavakit.generation.sampling import RowRng, TokenSampler
from llavakit.generation.stopping import StopStrings, check_stops, stop_token_ids
from llavakit.generation.streaming import TextStream
from llavakit.language.likelihood import Likelihood, token_logps
from llavakit.language.rows import DecodingRows, decode_given

_LEAST_REUSE = 16  # copying a shorter prefix costs more than computing it


class _Row:
    """One reply in progress.

    Attributes:
        last: The newest token, which the next step feeds.
        written: Positions whose states the rows hold.
        stop_ids: Stop strings that are one special token, by id.
        stopped_by: The stop string among `stop_ids` that ended the reply.
    """

    def __init__(self, handle: RequestHandle, index: int, prompt: Prompt, budget: int, eos: frozenset[int]) -> None:
        self.handle, self.index, self.prompt = handle, index, prompt
        self.params: SamplingParams = handle.request.sampling
        self.budget, self.eos = budget, eos
        self.new: list[int] = []
        self.last = 0
        self.written = prompt.length
        self.text: TextStream | None = None
        self.stop: StopStrings | None = None
        self.stop_ids: dict[int, str] = {}
        self.stopped_by: str | None = None
        self.rng = RowRng(self.params.seed, index) if self.params.temperature > 0 else None
        self.seen: Tensor | None = None


class Engine:
    """Continuous batching of ragged multimodal requests.

    Args:
        model: A `LlavakitForConditionalGeneration` in eval mode.
        tokenizer: For texts and stop strings; without one the engine speaks token ids.
        max_batch: Most replies decoded together.
        max_length: Most positions of prompt and reply; None takes the decoder's own limit.
        device: Where to run; None leaves the model where it is.
        prefix_bytes: Memory for states of finished requests, reused by prompts that begin in the same way.
        feature_bytes: Memory for visual vectors, reused by prompts with the same media item.
        max_prefill_tokens: Prompt positions to compute in one step before the active rows go on.
        compile: Decode with a compiled graph over `max_batch` rows of `max_length` (see `compiled`).

    Raises:
        UserError: If the decoder cannot be run in rows, with the reason.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        max_batch: int = 16,
        max_length: int | None = None,
        device: torch.device | str | None = None,
        prefix_bytes: int = 256 << 20,
        feature_bytes: int = 256 << 20,
        max_prefill_tokens: int = 4096,
        compile: bool = False,
    ) -> None:
        if hasattr(model, "get_base_model"):  # a PEFT wrapper adds nothing here
            model = model.get_base_model()
        self.model = (model if device is None else model.to(device)).eval()
        self.core = self.model.model
        self.tokenizer = tokenizer
        self.device = self.core.device
        self.max_batch, self.max_prefill_tokens = max_batch, max_prefill_tokens
        self._adapter = self.core.language_adapter
        limits = [position_limit(self.core.config.text_config), getattr(self._adapter, "max_positions", None)]
        limit = min((limit for limit in limits if limit is not None), default=None)
        if max_length is not None and limit is not None and max_length > limit:
            raise UserError(f"max_length {max_length} is more than the decoder's {limit} positions")
        self.max_length = max_length or limit or 4096
        self.prompts = PromptReader(self.core, feature_bytes)
        self.prefixes = PrefixStore(prefix_bytes)
        if self._adapter is None:
            sliding_window(self.core.config.text_config)  # refuses what rows cannot hold
            _check_attention(self.core.language_model)
        generation = getattr(self.model, "generation_config", None)
        self.eos_token_ids = _id_set(getattr(generation, "eos_token_id", None))
        suppressed = getattr(generation, "suppress_tokens", None)
        self._suppressed = torch.tensor(suppressed, device=self.device) if suppressed else None
        self._waiting: deque[RequestHandle] = deque()
        self._rows: list[_Row] = []
        self._states: DecodingRows | None = None
        self._compile = compile
        self._sampler: TokenSampler | None = None
        self._stepping = threading.RLock()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = False

    # ------------------------------------------------------------------ what callers use

    def submit(
        self, request: Request, *, stream: bool = True, listener: Callable[[StreamChunk], None] | None = None
    ) -> RequestHandle:
        """Queue a request; may be called from any thread.

        Args:
            stream: Whether pieces carry text as it comes; without it the last piece carries all of it, cheaper.
            listener: Called in the stepping thread with every piece.

        Raises:
            UserError: If the request cannot be run.
        """
        length = len(request.ids()) if request.inputs_embeds is None else request.inputs_embeds.shape[0]
        if not 0 < length < self.max_length:
            raise PromptTooLong(f"request: the prompt has {length} positions, allowed are 1 to {self.max_length - 1}")
        if request.sampling.n > self.max_batch:
            raise UserError(f"sampling: n is {request.sampling.n}, this engine holds {self.max_batch} replies")
        check_stops(request.sampling, self.tokenizer)
        handle = RequestHandle(self, request)
        handle.prompt_tokens, handle.listener, handle.stream = length, listener, stream
        with self._wake:
            self._waiting.append(handle)
            self._wake.notify()
        return handle

    def step(self) -> bool:
        """Admit, decode one token for every active row, retire; False if nothing was left to do."""
        with self._stepping, torch.inference_mode():
            self._purge()
            self._admit()
            if self._rows:
                self._decode()
            return self.busy

    def run(self) -> None:
        """Step until every submitted request is finished."""
        while self.step():
            pass

    @property
    def busy(self) -> bool:
        """Whether any request is waiting or active."""
        return bool(self._waiting or self._rows)

    @property
    def waiting(self) -> int:
        """Requests that are not yet admitted."""
        return len(self._waiting)

    @property
    def active(self) -> int:
        """Replies being decoded."""
        return len(self._rows)

    def generate(self, requests: Sequence[Request]) -> list[Any]:
        """Results of many requests, in order.

        Raises:
            RequestFailed: If one of them failed.
        """
        handles = [self.submit(request, stream=False) for request in requests]
        return [handle.result() for handle in handles]

    def score(self, request: Request, continuations: Sequence[Sequence[int]]) -> list[Tensor]:
        """Log probability of every token of given replies to one prompt, which is computed once.

        Args:
            continuations: Token ids of every reply, at least one each.

        Returns:
            One tensor [tokens] per reply, float32.
        """
        return [found.logps for found in self.reply_likelihoods(request, continuations)]

    def reply_likelihoods(self, request: Request, replies: Sequence[Sequence[int]]) -> list[Likelihood]:
        """How likely every token of given replies to one prompt is, which is computed once.

        Logits of long replies come stretch by stretch; only those of an adapter's rows are held together.

        Args:
            replies: Token ids of every reply, at least one each.

        Returns:
            Log probability and likeliest token at every place, [tokens] each, per reply.
        """
        with self._stepping, torch.inference_mode():
            targets = [torch.tensor(list(ids), device=self.device) for ids in replies]
            if self._adapter is not None:
                found = self.reply_logits(request, replies)
                return [_likelihood(logits, ids) for logits, ids in zip(found, targets, strict=True)]
            first, later = self._given(request, replies)
            likelihoods = []
            for ids, hidden in zip(targets, later, strict=True):
                begin = _likelihood(first, ids[:1])
                rest = token_logps(self.model.lm_head, hidden, ids[1:], likeliest=True)
                pairs = zip(begin, rest, strict=True)
                likelihoods.append(Likelihood(*(torch.cat(pair) for pair in pairs)))
            return likelihoods

    def reply_logits(self, request: Request, replies: Sequence[Sequence[int]]) -> list[Tensor]:
        """Logits that the model gives for every token of given replies to one prompt, which is computed once.

        Args:
            replies: Token ids of every reply, at least one each.

        Returns:
            One tensor [tokens, vocabulary] per reply; the first row belongs to the prompt's last position.

        Raises:
            PromptTooLong: If a language adapter runs the decoder and prompt and reply have more positions than it has.
        """
        with self._stepping, torch.inference_mode():
            if self._adapter is not None:
                prompt = self.prompts.read(request)
                length = prompt.length + max(len(reply) for reply in replies) - 1  # the last token is not read
                if length > self.max_length:
                    said = f"prompt and reply have {length} positions, this model takes {self.max_length}"
                    raise PromptTooLong(f"reply_logits: {said}")
                states, first = self._run_prompt(RequestHandle(self, request), prompt)
                size = {"max_rows": self.max_batch, "max_length": self.max_length}
                make = functools.partial(self._adapter.rows, self.model, states, **size)
                later = decode_given(make, states, prompt.length, replies, self.max_batch)
                return [torch.cat([first, *rest]) for rest in later]
            first, later = self._given(request, replies)
            return [torch.cat([first, self.model.lm_head(hidden)]) for hidden in later]

    def _given(self, request: Request, replies: Sequence[Sequence[int]]) -> tuple[Tensor, Iterator[Tensor]]:
        """For a plain decoder: logits [1, vocabulary] behind the prompt, and per reply what predicts its later tokens.

        Hidden states [tokens - 1, hidden], computed when they are taken.
        """
        prompt = self.prompts.read(request)
        states, first = self._run_prompt(RequestHandle(self, request), prompt)
        if prompt.keys is not None and self.prefixes.enabled:
            self.prefixes.put(prompt.keys, states)
        return first, (self._continue(states, prompt, list(reply)[:-1]) for reply in replies)

    def next_logits(self, requests: Sequence[Request]) -> Tensor:
        """Logits of the token that follows each of several prompts.

        The beginning that all of them share is computed once, and kept for prompts that come later; the rest of the
        prompts is computed in batches.

        Returns:
            [requests, vocabulary]
        """
        with self._stepping, torch.inference_mode():
            prompts = [self.prompts.read(request) for request in requests]
            keys = [prompt.keys for prompt in prompts]
            shared = 0
            if self._adapter is None and all(own is not None for own in keys):
                shared = min(shared_prefix(keys[0], own[:-1]) for own in keys)
            if shared < _LEAST_REUSE:
                handles = [RequestHandle(self, request) for request in requests]
                found = [self._run_prompt(handle, own)[1] for handle, own in zip(handles, prompts, strict=True)]
                return torch.cat(found)
            states = self._beginning(prompts[0], shared)
        found: dict[int, Tensor] = {}
        order = sorted(range(len(prompts)), key=lambda number: prompts[number].length)
        for start in range(0, len(order), self.max_batch):
            group = order[start : start + self.max_batch]
            with self._stepping, torch.inference_mode():  # other requests may go on between two groups
                found |= dict(zip(group, self._behind(states, [prompts[n] for n in group], shared), strict=True))
        return torch.stack([found[number] for number in range(len(prompts))])

    def _beginning(self, prompt: Prompt, length: int) -> Tensor:
        """States of the first positions of a prompt, which are kept."""
        keys = prompt.keys[:length]
        known, states = self.prefixes.find(keys) if self.prefixes.enabled else (0, None)
        if states is not None and known == length:
            return states
        cache = one_row_cache(states)
        self.core.language_model(
            inputs_embeds=self.prompts.embed(prompt, known)[:, : length - known],
            position_ids=torch.arange(known, length, device=self.device).unsqueeze(0),
            past_key_values=cache,
            use_cache=True,
        )
        states = stack_layers(cache)
        if self.prefixes.enabled:
            self.prefixes.put(keys, states)
        return states

    def _behind(self, states: Tensor, prompts: Sequence[Prompt], start: int) -> Tensor:
        """Logits [prompts, vocabulary] behind prompts that go on from the same states, in one forward pass."""
        lengths = torch.tensor([prompt.length - start for prompt in prompts], device=self.device)
        embeds = [self.prompts.embed(prompt, start)[0] for prompt in prompts]
        embeds = torch.nn.utils.rnn.pad_sequence(embeds, batch_first=True)
        width = embeds.shape[1]
        real = torch.arange(width, device=self.device) < lengths[:, None]
        seen = torch.cat([real.new_ones(len(prompts), start), real], dim=1).long()
        hidden = self.core.language_model(
            inputs_embeds=embeds,
            attention_mask=None if bool(real.all()) else seen,
            position_ids=torch.arange(start, start + width, device=self.device).expand(len(prompts), -1),
            past_key_values=one_row_cache(states, rows=len(prompts)),
            use_cache=True,
        ).last_hidden_state
        return self.model.lm_head(hidden[torch.arange(len(prompts), device=self.device), lengths - 1])

    def forget(self) -> None:
        """Drop kept states and visual vectors; needed when the model's weights have changed."""
        with self._stepping:
            self.prefixes.clear()
            self.prompts.features.clear()

    def start(self) -> None:
        """Step in a thread of the engine's own from now on."""
        if self._thread is None:
            self._stopping = False
            self._thread = threading.Thread(target=self._loop, name="llavakit-engine", daemon=True)
            self._thread.start()

    def stop(self, *, drain: bool = True) -> None:
        """End the thread; with `drain` after all submitted requests are finished, else they are cancelled."""
        if self._thread is None:
            return
        if not drain:
            with self._wake:
                handles = [*self._waiting, *(row.handle for row in self._rows)]
            for handle in handles:
                handle.cancel()
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()
        self._thread = None

    def wait_for(self, pieces: queue.SimpleQueue[StreamChunk]) -> StreamChunk:
        """The next piece of a handle; steps if no thread does."""
        while True:
            alone = self._thread is None
            try:
                return pieces.get_nowait() if alone else pieces.get(timeout=1)  # the thread may be stopped meanwhile
            except queue.Empty:
                if alone and not self.step() and pieces.empty():
                    raise RuntimeError("the engine has no work left, but the request is not finished") from None

    # ------------------------------------------------------------------ admission

    def _loop(self) -> None:
        while True:
            with self._wake:
                while not self.busy and not self._stopping:
                    self._wake.wait()
                if self._stopping and not self.busy:
                    return
            try:
                self.step()
            except Exception as error:  # callers must not wait for a thread that has died
                self._abort(error)

    def _abort(self, error: Exception) -> None:
        """Fail everything that was submitted."""
        handles = {id(row.handle): row.handle for row in self._rows}
        self._rows, self._states, self._sampler = [], None, None
        while self._waiting:
            handle = self._waiting.popleft()
            handles[id(handle)] = handle
        for handle in handles.values():
            self._fail(handle, error)

    def _purge(self) -> None:
        """Let cancelled requests go before anything is computed for them."""
        with self._wake:  # other threads submit meanwhile
            gone = [handle for handle in self._waiting if handle.cancelled]
            for handle in gone:
                self._waiting.remove(handle)
        for handle in gone:
            for reply in handle.replies:
                _deliver(handle, StreamChunk(reply.index, (), finish_reason="cancelled"))
        for row in [row for row in self._rows if row.handle.cancelled]:
            self._finish(row, "cancelled")

    def _admit(self) -> None:
        spent = 0
        while self._waiting and spent < self.max_prefill_tokens:
            if self.active + self._waiting[0].request.sampling.n > self.max_batch:
                return
            handle = self._waiting.popleft()
            try:
                rows, logits = self._prefill(handle)
            except Exception as error:  # whatever a prompt does, it fails alone
                self._fail(handle, error)
                continue
            spent += handle.prompt_tokens - handle.reused_tokens
            self._advance(rows, logits.expand(len(rows), -1))

    def _prefill(self, handle: RequestHandle) -> tuple[list[_Row], Tensor]:
        """Compute a prompt once and place one row per reply; logits of its last position [1, vocabulary]."""
        before = self.prompts.encoded
        prompt = self.prompts.read(handle.request)
        params = handle.request.sampling
        budget = min(params.max_new_tokens, self.max_length - prompt.length)
        eos = self.eos_token_ids if params.eos_token_ids is None else frozenset(params.eos_token_ids)
        rows = [_Row(handle, index, prompt, budget, eos) for index in range(params.n)]
        states, logits = self._run_prompt(handle, prompt)
        handle.encoded = self.prompts.encoded - before
        if not bool(torch.isfinite(logits.max())):
            raise FloatingPointError("the model gave logits that are not finite for this prompt")
        for row in rows:
            if params.repetition_penalty != 1:
                row.seen = torch.zeros(logits.shape[-1], dtype=torch.bool, device=self.device)
                known = [token for token in prompt.ids if token < len(row.seen)]  # the placeholder may be none
                row.seen[torch.tensor(known, dtype=torch.long, device=self.device)] = True
            if self.tokenizer is not None and (handle.stream or params.stop):
                row.text = TextStream(self.tokenizer, params.skip_special_tokens)
                row.stop = StopStrings(params.stop)
                row.stop_ids = stop_token_ids(params.stop, self.tokenizer)
            self._place(row, states)
        return rows, logits

    def _run_prompt(self, handle: RequestHandle, prompt: Prompt) -> tuple[Any, Tensor]:
        """States of a prompt as its rows take them, and logits of its last position [1, vocabulary]."""
        run = self._prefill_states if self._adapter is None else self._prefill_adapter
        return run(handle, prompt)

    def _prefill_states(self, handle: RequestHandle, prompt: Prompt) -> tuple[Tensor, Tensor]:
        shared, states = self._find_prefix(prompt)
        handle.reused_tokens = shared
        embeds = self.prompts.embed(prompt, shared)
        cache = one_row_cache(states)
        positions = torch.arange(shared, prompt.length, device=self.device).unsqueeze(0)
        hidden = self.core.language_model(
            inputs_embeds=embeds, position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state
        return stack_layers(cache), self.model.lm_head(hidden[:, -1])

    def _continue(self, states: Tensor, prompt: Prompt, ids: list[int]) -> Tensor:
        """Hidden states [tokens, hidden] behind a prompt with given ids; the prompt's states stay as they are."""
        embeds = self.core.embed_ids(torch.tensor([ids], dtype=torch.long, device=self.device))
        if not ids:
            return embeds[0]
        length = prompt.length + len(ids)
        return self.core.language_model(
            inputs_embeds=embeds,
            position_ids=torch.arange(prompt.length, length, device=self.device).unsqueeze(0),
            past_key_values=one_row_cache(states),
            use_cache=True,
        ).last_hidden_state[0]

    def _find_prefix(self, prompt: Prompt) -> tuple[int, Tensor | None]:
        """States of the longest known beginning of a prompt; its last position is always computed anew."""
        if prompt.keys is None or not self.prefixes.enabled:
            return 0, None
        keys = prompt.keys[:-1]
        best, states = self.prefixes.find(keys)
        for number, row in enumerate(self._rows):
            if row.prompt.keys is not None and len(row.prompt.keys) > best:
                shared = shared_prefix(row.prompt.keys, keys)
                if shared > best:
                    best, states = shared, self._states.read(number, shared)
        if states is None or prompt.resume(best) < _LEAST_REUSE:
            return 0, None
        best = prompt.resume(best)
        return best, states[:, :, :, :best]

    def _place(self, row: _Row, states: Any) -> None:
        if self._states is None:
            known = [row.handle, *self._waiting]
            count = 1 + sum(handle.request.sampling.n for handle in known[1:])
            size = {"rows": min(count, self.max_batch), "max_rows": self.max_batch, "max_length": self.max_length}
            if self._adapter is None:
                expected = max(one.prompt_tokens + one.request.sampling.max_new_tokens for one in known)
                self._states = PlainRows(self.model, states, **size, expected=expected, compile=self._compile)
            else:
                self._states = self._adapter.rows(self.model, states, **size)
        self._states.insert(len(self._rows), states, row.prompt.length)
        self._rows.append(row)
        self._sampler = None

    # ------------------------------------------------------------------ decoding

    def _decode(self) -> None:
        """One token for every row."""
        rows = list(self._rows)
        try:
            logits = self._states.step([row.last for row in rows])
        except Exception as error:  # no row can be blamed, and the states may be half written
            for row in rows:
                self._fail(row.handle, error)
            self._states = None
            return
        for row in rows:
            row.written += 1
        if self._sampler is None:
            self._sampler = TokenSampler([row.params for row in rows], self.device)
        self._advance(rows, logits, self._sampler)

    def _prefill_adapter(self, handle: RequestHandle, prompt: Prompt) -> tuple[Any, Tensor]:
        """Prefill of a model whose adapter keeps states of its own: the cache and logits [1, vocabulary]."""
        shared, states = self._find_prefix(prompt)
        handle.reused_tokens = shared
        cache = one_row_cache(states, self._adapter.make_cache())
        inputs: dict[str, Any] = {"attention_mask": torch.ones(1, prompt.length, dtype=torch.long, device=self.device)}
        if shared:
            visual = torch.tensor([prompt.ids[shared:]], device=self.device) == self.core.config.image_token_id
            inputs |= {"inputs_embeds": self.prompts.embed(prompt, shared), "visual_mask": visual}
        elif prompt.embeds is not None:
            inputs |= {"inputs_embeds": prompt.embeds, "visual_mask": prompt.visual}
        else:
            inputs["input_ids"] = torch.tensor([prompt.ids], device=self.device)
            if prompt.media:
                vectors = self.prompts.vectors(prompt.media)
                inputs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=vectors)}
        output = self.model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1, prompt_info=prompt.info)
        return output.past_key_values, output.logits[:, -1]

    def _advance(self, rows: list[_Row], logits: Tensor, sampler: TokenSampler | None = None) -> None:
        """Choose every row's next token and hand it on; retire rows that are finished."""
        if self._suppressed is not None:
            logits = logits.index_fill(-1, self._suppressed, -torch.inf)
        sampler = sampler or TokenSampler([row.params for row in rows], self.device)
        tokens, sound, logprobs = sampler.choose(logits, [row.rng for row in rows], [row.seen for row in rows])
        for number, (row, token, good) in enumerate(zip(rows, tokens, sound, strict=True)):
            if row.handle.done:  # an earlier reply of the same request failed, and with it all of them
                continue
            if not good:
                self._fail(row.handle, FloatingPointError("the model gave logits that are not finite"))
                continue
            row.last = token
            row.new.append(token)
            if row.seen is not None:
                row.seen[token] = True
            self._hand_on(row, token, logprobs.get(number))

    def _hand_on(self, row: _Row, token: int, logprob: TokenLogprob | None) -> None:
        ended = token in row.eos
        text = ""
        if row.text is not None:
            text, stopped = row.stop.push(row.text.push(token))
            ended |= stopped
        if not ended and token in row.stop_ids:
            ended, row.stopped_by = True, row.stop_ids[token]
        reason = "stop" if ended else "length" if len(row.new) >= row.budget else None
        self._tell(row, StreamChunk(row.index, (token,), text, () if logprob is None else (logprob,)), reason)

    def _tell(self, row: _Row, piece: StreamChunk, reason: str | None) -> None:
        """Deliver a piece; with a reason it is the row's last one."""
        if reason is not None:
            self._retire(row, keep=True)
            text = piece.text + self._rest(row)
            stop = row.stop.met or row.stopped_by if row.stop is not None else None
            piece = StreamChunk(piece.index, piece.token_ids, text, piece.logprobs, reason, stop)
        _deliver(row.handle, piece)

    def _rest(self, row: _Row) -> str:
        """Text of a finished row that is not out yet."""
        if self.tokenizer is None:
            return ""
        if row.text is None:
            return self.tokenizer.decode(
                row.new, skip_special_tokens=row.params.skip_special_tokens, clean_up_tokenization_spaces=False
            )
        if row.stop.met is not None:
            return ""
        text, stopped = row.stop.push(row.text.flush())
        return text if stopped else text + row.stop.flush()

    def _finish(self, row: _Row, reason: str) -> None:
        self._tell(row, StreamChunk(row.index, ()), reason)

    def _retire(self, row: _Row, *, keep: bool) -> None:
        """Free a row; the last row takes its place. `keep` its states for prompts that begin in the same way."""
        number, last = self._rows.index(row), len(self._rows) - 1
        if not keep:
            self._states.clear(number)
        elif row.prompt.keys is not None and self.prefixes.enabled:
            states = self._states.read(number)
            if states is not None:
                self.prefixes.put(row.prompt.keys_with(row.new)[: row.written], states)
        if number != last:
            self._states.move(last, number)
            self._rows[number] = self._rows[last]
            if not keep:  # the row that moved may be unsound too
                self._states.clear(last)
        self._rows.pop()
        self._sampler = None

    def _fail(self, handle: RequestHandle, error: Exception) -> None:
        """End all replies of a request with an error."""
        handle.error = error
        for row in [row for row in self._rows if row.handle is handle]:
            self._retire(row, keep=False)
        for reply in handle.replies:
            if reply.finish_reason is None:
                _deliver(handle, StreamChunk(reply.index, (), finish_reason="error"))


def _likelihood(logits: Tensor, ids: Tensor) -> Likelihood:
    """Of tokens [tokens] under logits [tokens, vocabulary]."""
    logps = logits.float().log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1)
    return Likelihood(logps, logits.argmax(-1))


def _deliver(handle: RequestHandle, piece: StreamChunk) -> None:
    try:
        handle.deliver(piece)
    except Exception:  # a listener that breaks is a client that went away
        handle.listener = None
        handle.cancel()


def position_limit(text_config: Any) -> int | None:
    """Positions up to which a row's rotary frequencies or position table do not depend on its neighbours."""
    limit = getattr(text_config, "max_position_embeddings", None)
    rope = getattr(text_config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):  # these rescale by the longest row of the batch
        limit = rope.get("original_max_position_embeddings") or limit
    return limit


def _check_attention(decoder: Any) -> None:
    kind = decoder.config._attn_implementation
    if kind not in ("sdpa", "eager"):
        raise UserError(f"the engine needs attn_implementation 'sdpa' or 'eager', the model was loaded with {kind!r}")


def _id_set(ids: int | Sequence[int] | None) -> frozenset[int]:
    return frozenset(() if ids is None else [ids] if isinstance(ids, int) else ids)
