"""The language experts: an untouched decoder, some of whose layers have a generated adapter beside their MLP.

    layers 0 .. g-1 ─▶ guidance at the end of each prompt ─▶ weights ─▶ expert layers with them ─▶ layers above

Paper equation 7. The doubled residual of the equation and the figure is read as a drawing of the ordinary one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from llavakit.errors import UserError
from llavakit.language.adapter import LanguageAdapter, PrefixKeys
from llavakit.language.layers import check_decoder, check_inside, decoder_masks, run_layers
from llavakit.model.prompt import PromptInfo
from llavakit.splice.scatter import IGNORE
from llavakit.systems.hyper_llava.cache import ExpertCache
from llavakit.systems.hyper_llava.experts import GATED, ExpertLayer, ExpertShape, Hypernetwork, check_options
from llavakit.systems.hyper_llava.rows import ExpertRows
from llavakit.systems.hyper_llava.segments import Segments, Spread, find_segments

NAME = "language_experts"
PLACES = ("posterior", "anterior", "all")


class LanguageExperts(LanguageAdapter):
    """Generated experts inside any decoder with Llama's layers.

    Args:
        text_config: Configuration of the decoder.
        layers: Which layers have an expert: "posterior" (the upper half, published), "anterior" (the lower half) or
            "all".
        split: Layer at which the posterior half begins; default half of the layers, rounded down.
        guidance_layer: Guidance is read from the hidden states that enter this layer; default the first posterior
            layer, and the embeddings (0) for "anterior" and "all".
        embed_dim, hyper_hidden, bottleneck, activation: See `experts`.
    """

    def __init__(
        self,
        text_config: Any,
        *,
        layers: str = "posterior",
        split: int | None = None,
        guidance_layer: int | None = None,
        embed_dim: int = 64,
        hyper_hidden: int = 64,
        bottleneck: int = 16,
        activation: str = GATED,
    ) -> None:
        super().__init__(text_config)
        where, depth = "language_adapter", text_config.num_hidden_layers
        check_options(
            where, embed_dim=embed_dim, hyper_hidden=hyper_hidden, bottleneck=bottleneck, activation=activation
        )
        if layers not in PLACES:
            raise UserError(f"{where}.layers is {layers!r}, it must be posterior, anterior or all")
        half = depth // 2 if split is None else split
        _check_number(f"{where}.split", half, depth)
        first, end = {"posterior": (half, depth), "anterior": (0, half), "all": (0, depth)}[layers]
        if first == end:
            raise UserError(f"{where}.split is {half}: no layer of {depth} is {layers} to it")
        guidance = (first if layers == "posterior" else 0) if guidance_layer is None else guidance_layer
        _check_number(f"{where}.guidance_layer", guidance, first, "the first layer with an expert")
        self.first, self.end, self.guidance_layer = first, end, guidance
        width = text_config.hidden_size
        self.shape = ExpertShape(width, width, bottleneck, activation)
        self.hyper = Hypernetwork(self.shape, embed_dim, hyper_hidden)
        self.experts = nn.ModuleDict(
            {str(number): ExpertLayer(self.shape, width, embed_dim) for number in range(first, end)}
        )

    def check(self, decoder: nn.Module) -> None:
        check_decoder(decoder, NAME)
        for layer in decoder.layers[self.first : self.end]:
            check_inside(layer, NAME)

    def make_cache(self) -> ExpertCache:
        """A new, empty cache with room for generated weights."""
        return ExpertCache()

    def rows(self, model: Any, states: ExpertCache, **size: int) -> ExpertRows:
        """Rows with a weight set each; see `LanguageAdapter.rows`."""
        return ExpertRows(model, states, **size)

    def prefix_keys(self, keys: np.ndarray, answers: np.ndarray) -> PrefixKeys:
        """Keys that hold, beside its own content, all that the guidance of a position's segment depends on."""
        found = find_segments(torch.from_numpy(answers)[None])
        guides = found.guide_column[found.number].numpy()
        return PrefixKeys.behind(keys, guides)

    def generate(self, guidance: Tensor) -> list[Tensor]:
        """Weights of every expert layer [sets, size], at least float32, from guidance [sets, hidden]."""
        return [expert(guidance, self.hyper) for expert in self.experts.values()]

    def add(self, weights: list[Tensor], spread: Spread | None = None) -> Callable[..., Tensor]:
        """What `run_layers` adds inside the expert layers.

        Args:
            spread: Where the tokens of each weight set are; None if every row has one set.
        """

        def added(number: int, y: Tensor, own: Tensor) -> Tensor:
            if spread is None:
                return self.shape.apply(y, own)
            return spread.scatter(self.shape.apply(spread.gather(y), own), y.shape)

        return added

    def forward(
        self,
        decoder: nn.Module,
        *,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: Any,
        visual: Tensor | None,
        input_ids: Tensor | None,
        labels: Tensor | None,
        segments: Tensor | None,
        prompt_info: PromptInfo | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> tuple[BaseModelOutputWithPast, Tensor | None]:
        """Run the decoder; see `LanguageAdapter.forward`.

        Which tokens are answers is known from `labels`, from `prompt_info`, and behind a cache from their number: one
        token alone is generated text, several are the next prompt.
        """
        self._check(attention_mask, labels, prompt_info, past_key_values, kwargs)
        cache = self._cache(decoder, past_key_values, use_cache, labels, segments)
        batch, length = inputs_embeds.shape[:2]
        seen = 0 if cache is None else cache.get_seq_length()
        if position_ids is None:
            position_ids = torch.arange(seen, seen + length, device=inputs_embeds.device)[None]
        masks = decoder_masks(decoder, inputs_embeds, attention_mask, position_ids, cache)
        layers = decoder.layers[: decoder.config.num_hidden_layers]

        def run(start: int, stop: int, hidden: Tensor, **inside: Any) -> Tensor:
            return run_layers(
                layers[start:stop],
                hidden,
                decoder.rotary_emb,
                position_ids,
                attention_mask=masks,
                cache=cache,
                **inside,
            )

        hidden = run(0, self.guidance_layer, inputs_embeds)
        real = None if attention_mask is None else attention_mask[:, -length:].bool().cpu()
        answer = self._answers(batch, length, seen, labels, prompt_info)
        weights, spread = self._weights(hidden, answer, real, segments, seen, cache)
        hidden = run(self.guidance_layer, self.first, hidden)
        inputs = [(own,) for own in weights]
        hidden = run(self.first, self.end, hidden, mlp_add=self.add(weights, spread), mlp_inputs=inputs)
        hidden = run(self.end, len(layers), hidden)
        return BaseModelOutputWithPast(last_hidden_state=decoder.norm(hidden), past_key_values=cache), None

    def _weights(
        self,
        hidden: Tensor,
        answer: Tensor,
        real: Tensor | None,
        samples: Tensor | None,
        seen: int,
        cache: ExpertCache | None,
    ) -> tuple[list[Tensor], Spread | None]:
        """Weights of every expert layer [sets, size], and where each set's tokens are unless every row has one set."""
        batch, length = hidden.shape[:2]
        held = None if cache is None else cache.weights
        found = find_segments(answer, real, None if samples is None else samples.cpu(), continues=seen > 0)
        if seen:
            _check_continued(found, real, answer, cache)
        device = hidden.device
        mixed = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if mixed else hidden.dtype
        if found.count:
            guidance = hidden[found.guide_row.to(device), found.guide_column.to(device)]
            weights = [own.to(dtype) for own in self.generate(guidance)]
        else:
            weights = [hidden.new_zeros(0, self.shape.size, dtype=dtype)] * len(self.experts)
        if held is not None:
            weights = [torch.cat([new, old]) for new, old in zip(weights, held, strict=True)]
        elif not found.count:  # nothing but padding
            weights = [hidden.new_zeros(1, self.shape.size, dtype=dtype)] * len(self.experts)
        last = found.last.to(device)
        if cache is not None:
            self._hold(cache, found, weights, seen)
        if found.one_per_row:
            return [own[last] for own in weights], None
        return weights, Spread.of(found, len(weights[0]), batch, length, device)

    @staticmethod
    def _hold(cache: ExpertCache, found: Segments, weights: list[Tensor], seen: int) -> None:
        places = (seen + found.guide_column).tolist() + (cache.guides or [0] * len(found.last))
        ends = found.ends_in_prompt.clone()
        if cache.ends_in_prompt is not None:  # a row of padding stays as it was
            silent = torch.ones_like(ends)
            silent[found.rows] = False
            ends |= silent & torch.tensor(cache.ends_in_prompt)
        last = found.last.to(weights[0].device)
        cache.hold([own[last] for own in weights], ends.tolist(), [places[number] for number in found.last.tolist()])

    @staticmethod
    def _answers(batch: int, length: int, seen: int, labels: Tensor | None, info: PromptInfo | None) -> Tensor:
        """True at answer tokens [batch, length], on the CPU."""
        info = info or PromptInfo()
        answer = torch.zeros(batch, length, dtype=torch.bool)
        if labels is not None:
            answer |= (labels != IGNORE).cpu()
        known = info.for_batch(batch, length, seen)
        if known is not None:
            answer |= known.bool().cpu()
        if info.length is not None:
            answer[:, max(info.length - seen, 0) :] = True
        told = labels is not None or info.length is not None or (known is not None and seen < info.answers.shape[1])
        if not told and seen and length == 1:
            answer[:] = True
        return answer

    def _cache(
        self, decoder: nn.Module, given: Any, use_cache: bool | None, labels: Tensor | None, segments: Tensor | None
    ) -> ExpertCache | None:
        if given is not None:
            if not isinstance(given, ExpertCache):
                raise UserError(
                    f"{NAME} keeps weights in a cache of its own, not in {type(given).__name__}: pass "
                    "model.model.language_adapter.make_cache() as past_key_values, or leave it out"
                )
            return given
        wanted = getattr(decoder.config, "use_cache", True) if use_cache is None else use_cache
        return self.make_cache() if wanted and not self.training and labels is None and segments is None else None

    def _check(
        self,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        info: PromptInfo | None,
        cache: Any,
        kwargs: dict[str, Any],
    ) -> None:
        for name in ("output_attentions", "output_hidden_states"):
            if kwargs.get(name):
                raise UserError(f"{NAME} has no {name}")
        if attention_mask is not None and attention_mask.dim() != 2:
            raise UserError(f"{NAME} takes a 2-D attention_mask [batch, positions]")
        told = labels is not None or (info is not None and (info.answers is not None or info.length is not None))
        if self.training and not told and cache is None:
            raise UserError(
                f"{NAME}: training needs labels, or the answers in prompt_info: without them the weights that predict "
                "an answer would be made from its end"
            )


def _check_number(name: str, value: Any, most: int, what: str = "the number of layers") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise UserError(f"{name} is {value!r}, it must be a whole number from 0 to {most}, {what}")


def _check_continued(found: Segments, real: Tensor | None, answer: Tensor, cache: ExpertCache) -> None:
    """Refuse tokens that cannot go on from what the cache holds.

    Raises:
        UserError: If a prompt comes in pieces, or an answer without the prompt that its weights come from.
    """
    if cache.weights is None and bool((found.number >= found.count).any()):
        raise UserError(f"{NAME}: the cache lacks the prompt that these tokens answer; compute the prompt again")
    if cache.ends_in_prompt is None:
        return
    seen_rows: set[int] = set()
    for row, column in zip(found.rows.tolist(), found.columns.tolist(), strict=True):
        if row not in seen_rows:
            seen_rows.add(row)
            if cache.ends_in_prompt[row] and not answer[row, column]:
                raise UserError(
                    f"{NAME} needs the whole prompt at once: these tokens continue a prompt that was computed before "
                    "(leave out prefill_chunk_size)"
                )
