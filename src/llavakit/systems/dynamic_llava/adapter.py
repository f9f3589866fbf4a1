"""The language adapter: runs an untouched decoder, and from one layer on only with the tokens that matter.

    layers 0 .. l-1 with every token ─▶ decide ─▶ gather ─▶ layers l .. L-1 with the kept ones ─▶ scatter back

Training keeps all tokens in the tensors and weighs keys by sampled decisions, so that gradients reach the
predictors; inference gathers, so that time and memory fall. Three inference modes share one path: prefill (image
tokens by rank), decoding with a cache (a new token is stored or not), decoding without (recompute, dropped tokens
left out). Paper sections 3.2 to 3.4; the original's batching defects are not reproduced.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from llavakit.errors import UserError
from llavakit.language.adapter import LanguageAdapter
from llavakit.language.layers import check_decoder, run_layers
from llavakit.model.prompt import PromptInfo
from llavakit.splice.scatter import IGNORE
from llavakit.systems.dynamic_llava.attention import EPS, PolicyMask, allowed_pairs, as_layer_mask
from llavakit.systems.dynamic_llava.cache import SelectiveCache
from llavakit.systems.dynamic_llava.decisions import (
    gumbel_keep,
    gumbel_noise,
    rate_penalty,
    temperature,
    threshold_keep,
    top_keep,
)
from llavakit.systems.dynamic_llava.predictors import ImagePredictor, TextPredictor
from llavakit.systems.dynamic_llava.roles import USER_MARKER, token_roles, trim_unsupervised
from llavakit.systems.dynamic_llava.rows import SparseRows

Places = tuple[int, Tensor]  # row of the batch, columns [tokens]


class Sample(NamedTuple):
    """One sample of a batch: a row without its padding, or a segment of a packed row.

    Attributes:
        row: Row of the batch.
        image, answer, last_instruct: Columns [tokens] that play these roles.
        counts: Whether it is a real sample and not the filling of a packed row.
    """

    row: int
    image: Tensor
    answer: Tensor
    last_instruct: Tensor
    counts: bool


@dataclass
class Decisions:
    """What training decided.

    Attributes:
        policy: Weight of every token as a key [batch, length], differentiable.
        penalty: Weighted keep-rate penalty.
        image, answer, instruct: Decisions [tokens] of every sample that has such tokens.
    """

    policy: Tensor
    penalty: Tensor
    image: list[Tensor] = field(default_factory=list)
    answer: list[Tensor] = field(default_factory=list)
    instruct: list[Tensor] = field(default_factory=list)


@dataclass
class Selection:
    """What inference decided; all [batch, length].

    Attributes:
        run: Tokens that go through the upper layers.
        stored: Those of them that enter the cache; None is all.
        visible: Those that later tokens see; None is all.
    """

    run: Tensor
    stored: Tensor | None = None
    visible: Tensor | None = None


class DynamicSparsification(LanguageAdapter):
    """Token predictors inside any Llama-shaped decoder (`layers`, `norm`, `rotary_emb`).

    Options have the names of the published `sparse_config`.

    Args:
        text_config: Configuration of the decoder.
        use_vision_predictor: Drop image tokens.
        vision_keep_rate: Fraction of image tokens that is kept.
        use_text_predictor: Master switch of the two text predictors.
        use_output_text_predictor: Drop generated tokens.
        output_text_keep_rate: Fraction of generated tokens that training aims at.
        output_text_len_for_training: Shorter answers are not sparsified in training.
        use_instruct_predictor: Drop tokens of the last instruction.
        instruct_keep_rate: Fraction of instruction tokens that training aims at.
        instruct_len_for_training: Shorter instructions are not sparsified in training.
        sparse_layer: Decisions are taken from the hidden states that enter this layer.
        d_model, nhead, dim_feedforward, num_layers: Sizes of the image predictor; `d_model` of all predictors.
        mask_loss_weight: Weight of the keep-rate penalty.
        user_marker: Ids with which a user turn begins, to find the last instruction.
        softmax_eps: Floor of the masked softmax in training.
        tau_start, tau_end: Gumbel temperature at the first and after the last optimiser step.

    Attributes:
        tau: Present Gumbel temperature; `set_progress` moves it.
    """

    def __init__(
        self,
        text_config: Any,
        *,
        use_vision_predictor: bool = True,
        vision_keep_rate: float = 0.2,
        use_text_predictor: bool = True,
        use_output_text_predictor: bool = True,
        output_text_keep_rate: float = 0.5,
        output_text_len_for_training: int = 50,
        use_instruct_predictor: bool = False,
        instruct_keep_rate: float = 0.7,
        instruct_len_for_training: int = 25,
        sparse_layer: int = 2,
        d_model: int = 512,
        nhead: int = 8,
        dim_feedforward: int = 2048,
        num_layers: int = 2,
        mask_loss_weight: float = 100.0,
        user_marker: tuple[int, ...] | list[int] = USER_MARKER,
        softmax_eps: float = EPS,
        tau_start: float = 1.0,
        tau_end: float = 0.1,
    ) -> None:
        super().__init__(text_config)
        rates = {
            "vision_keep_rate": vision_keep_rate,
            "output_text_keep_rate": output_text_keep_rate,
            "instruct_keep_rate": instruct_keep_rate,
        }
        for name, rate in rates.items():
            if not 0 <= rate <= 1:
                raise UserError(f"language_adapter.{name} is {rate}, it must be between 0 and 1")
        if not 0 <= sparse_layer <= text_config.num_hidden_layers:
            raise UserError(
                f"language_adapter.sparse_layer is {sparse_layer}, but the decoder has "
                f"{text_config.num_hidden_layers} layers"
            )
        if d_model % 4 or d_model % nhead:
            raise UserError(f"language_adapter.d_model is {d_model}, it must be a multiple of 4 and of nhead ({nhead})")
        self.vision_keep_rate, self.output_text_keep_rate = vision_keep_rate, output_text_keep_rate
        self.instruct_keep_rate, self.sparse_layer = instruct_keep_rate, sparse_layer
        self.output_text_len_for_training = output_text_len_for_training
        self.instruct_len_for_training = instruct_len_for_training
        self.mask_loss_weight, self.softmax_eps = mask_loss_weight, softmax_eps
        self.user_marker = tuple(user_marker)
        self.tau_start, self.tau_end, self.tau = tau_start, tau_end, tau_start
        # Switches may be turned off after loading ("image only" is the use of a full model without its text half).
        self.use_vision_predictor, self.use_text_predictor = use_vision_predictor, use_text_predictor
        self.use_output_text_predictor = use_output_text_predictor
        self.use_instruct_predictor = use_instruct_predictor
        width = text_config.hidden_size
        self.image_predictor = (
            ImagePredictor(width, d_model, nhead, dim_feedforward, num_layers) if use_vision_predictor else None
        )
        self.text_predictor = (
            TextPredictor(width, d_model) if use_text_predictor and use_output_text_predictor else None
        )
        self.instruct_predictor = (
            TextPredictor(width, d_model) if use_text_predictor and use_instruct_predictor else None
        )

    def make_cache(self) -> SelectiveCache:
        """A new, empty cache whose upper layers store selectively."""
        return SelectiveCache(self.text_config.num_hidden_layers, self.sparse_layer)

    @property
    def max_positions(self) -> int | None:
        """The sliding window of the decoder, if it has one: inside it all positions are visible."""
        config = self.text_config
        sliding = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
        return getattr(config, "sliding_window", None) if sliding else None

    def rows(self, model: Any, states: SelectiveCache, **size: int) -> SparseRows:
        """Rows in which every request keeps its own number of tokens; see `LanguageAdapter.rows`."""
        return SparseRows(model, states, **size)

    def set_progress(self, fraction: float) -> None:
        """Set the Gumbel temperature for an optimiser step, of which `fraction` (0 to 1) of all are done."""
        self.tau = temperature(self.tau_start, self.tau_end, fraction, 1)

    # Which predictors act now

    @property
    def prunes_images(self) -> bool:
        return self.use_vision_predictor and self.image_predictor is not None

    @property
    def prunes_answers(self) -> bool:
        return self.use_text_predictor and self.use_output_text_predictor and self.text_predictor is not None

    @property
    def prunes_instructions(self) -> bool:
        return self.use_text_predictor and self.use_instruct_predictor and self.instruct_predictor is not None

    # Running the decoder

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

        In training mode decisions are sampled and the keep-rate penalty is returned. In evaluation mode with `labels`
        every answer token sees what it would see in decoding. Hidden states of dropped tokens come back as zeros.

        Args:
            prompt_info: Without a cache: columns from its `length` on are generated text, of which dropped tokens are
                left out; without a length the whole sequence is prompt.
        """
        cache = self._cache(past_key_values, use_cache, decoder, labels, segments)
        self._check(decoder, inputs_embeds, attention_mask, cache, kwargs)
        batch, length = inputs_embeds.shape[:2]
        seen = 0 if cache is None else cache.rows.seen
        valid = None if attention_mask is None else attention_mask[:, -length:].bool()
        if valid is not None and bool(valid.all()):
            valid = None
        if position_ids is None:
            position_ids = torch.arange(seen, seen + length, device=inputs_embeds.device)[None]
        position_ids = position_ids.expand(batch, length)

        if (
            self.training and valid is not None
        ):  # the floor of the masked softmax reaches padding: the original has zeros
            inputs_embeds = inputs_embeds.masked_fill(~valid.unsqueeze(-1), 0.0)
        hidden = self._lower(decoder, inputs_embeds, attention_mask, position_ids, segments, cache)
        if self.training and cache is None:
            samples = self._samples(batch, length, visual, labels, input_ids, valid, segments)
            decisions = self.decide(hidden, samples)
            allowed = allowed_pairs(length, hidden.device, valid, segments)
            mask = PolicyMask.of(allowed, decisions.policy, self.softmax_eps)
            hidden = self._layers(decoder, self._upper(decoder), hidden, mask, position_ids, None)
            output = BaseModelOutputWithPast(last_hidden_state=decoder.norm(hidden))
            return output, decisions.penalty

        own = None if prompt_info is None else prompt_info.length
        selection = self.select(hidden, visual, labels, input_ids, valid, segments, seen, cache is not None, own)
        hidden = self._run_selected(decoder, hidden, position_ids, segments, selection, cache)
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=cache), None

    def _cache(
        self, given: Any, use_cache: bool | None, decoder: nn.Module, labels: Tensor | None, segments: Tensor | None
    ) -> SelectiveCache | None:
        if given is not None:
            if not isinstance(given, SelectiveCache):
                raise UserError(
                    f"dynamic_sparsification needs its own cache, not {type(given).__name__}: pass "
                    "model.model.language_adapter.make_cache() as past_key_values, or leave it out"
                )
            return given
        wanted = getattr(decoder.config, "use_cache", True) if use_cache is None else use_cache
        return self.make_cache() if wanted and not self.training and labels is None and segments is None else None

    def _check(
        self,
        decoder: nn.Module,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        cache: SelectiveCache | None,
        kwargs: dict[str, Any],
    ) -> None:
        config = decoder.config
        check_decoder(decoder, "dynamic_sparsification")
        for name in ("output_attentions", "output_hidden_states"):
            if kwargs.get(name):
                raise UserError(f"dynamic_sparsification has no {name}: its layers see different tokens")
        if config._attn_implementation not in ("sdpa", "eager"):
            raise UserError(
                f"dynamic_sparsification runs with attn_implementation sdpa or eager, not {config._attn_implementation}"
            )
        if attention_mask is not None and attention_mask.dim() != 2:
            raise UserError("dynamic_sparsification takes a 2-D attention_mask [batch, positions]")
        total = inputs_embeds.shape[1] + (0 if cache is None else cache.rows.seen)
        if self.max_positions is not None and total > self.max_positions:
            raise UserError(
                f"dynamic_sparsification has no sliding windows: {total} positions do not fit into one of "
                f"{self.max_positions}"
            )

    def _upper(self, decoder: nn.Module) -> list[nn.Module]:
        return list(decoder.layers[self.sparse_layer : decoder.config.num_hidden_layers])

    def _layers(
        self,
        decoder: nn.Module,
        layers: list[nn.Module],
        hidden: Tensor,
        mask: Tensor | None,
        position_ids: Tensor,
        cache: SelectiveCache | None,
    ) -> Tensor:
        return run_layers(layers, hidden, decoder.rotary_emb, position_ids, attention_mask=mask, cache=cache)

    def _mask(self, decoder: nn.Module, allowed: Tensor | None, hidden: Tensor) -> Tensor | None:
        return as_layer_mask(allowed, decoder.config._attn_implementation, hidden.dtype)

    def _lower(
        self,
        decoder: nn.Module,
        hidden: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        segments: Tensor | None,
        cache: SelectiveCache | None,
    ) -> Tensor:
        """Layers 0 .. sparse_layer-1 on every token."""
        length = hidden.shape[1]
        seen = 0 if cache is None else cache.rows.seen
        valid = None if attention_mask is None else attention_mask.bool()
        if valid is not None and bool(valid.all()):
            valid = None
        plain = valid is None and segments is None and (length == 1 or seen == 0)
        allowed = None
        if not plain or (length > 1 and decoder.config._attn_implementation == "eager"):
            allowed = allowed_pairs(seen + length, hidden.device, valid, segments, queries=length)
        layers = list(decoder.layers[: self.sparse_layer])
        return self._layers(decoder, layers, hidden, self._mask(decoder, allowed, hidden), position_ids, cache)

    def _run_selected(
        self,
        decoder: nn.Module,
        hidden: Tensor,
        position_ids: Tensor,
        segments: Tensor | None,
        selection: Selection,
        cache: SelectiveCache | None,
    ) -> Tensor:
        """Upper layers and the final norm on the selected tokens, scattered back to their columns."""
        length = hidden.shape[1]
        counts = selection.run.sum(-1).tolist()
        columns = max(max(counts), 1)
        everything = min(counts) == length
        # A stable sort puts the tokens that run, in order, at the right end of every row.
        order = None if everything else selection.run.int().argsort(dim=-1, stable=True)[:, -columns:]

        def take(values: Tensor | None) -> Tensor | None:
            return values if order is None or values is None else values.gather(1, order)

        kept = hidden if order is None else hidden.gather(1, order[..., None].expand(-1, -1, hidden.shape[-1]))
        real = None if min(counts) == columns else take(selection.run)
        visible = take(selection.visible)
        segments = take(segments)
        first = cache is None or cache.rows.empty
        if cache is not None:
            cache.rows.begin(counts, length)
        if not first:
            allowed = cache.rows.visible(columns, hidden.device)
        elif real is None and visible is None and segments is None and decoder.config._attn_implementation == "sdpa":
            allowed = None
        else:
            allowed = allowed_pairs(columns, hidden.device, real, segments, visible)
        mask = self._mask(decoder, allowed, hidden)
        kept = self._layers(decoder, self._upper(decoder), kept, mask, take(position_ids), cache)
        if cache is not None:
            cache.commit(take(selection.stored))
        kept = decoder.norm(kept)
        if order is None:
            return kept
        if real is not None:
            kept = kept * real[..., None]
        return torch.zeros_like(hidden).scatter_add(1, order[..., None].expand_as(kept), kept)

    # Who is who

    def _samples(
        self,
        batch: int,
        length: int,
        visual: Tensor | None,
        labels: Tensor | None,
        input_ids: Tensor | None,
        valid: Tensor | None,
        segments: Tensor | None,
    ) -> list[Sample]:
        """All samples of a batch with the columns of their roles."""
        # One transfer per tensor, not one per row: the roles are worked out in plain lists.
        visuals, targets, ids = (None if t is None else t.tolist() for t in (visual, labels, input_ids))
        valid, segments = (None if t is None else t.cpu() for t in (valid, segments))
        everything = torch.arange(length)
        samples = []
        for row in range(batch):
            columns = everything if valid is None else valid[row].nonzero().squeeze(-1)
            numbers = None if segments is None else segments[row][columns]
            parts = [columns] if numbers is None else [columns[numbers == n] for n in numbers.unique().tolist()]
            for part in parts:
                places = part.tolist()
                is_visual = [visuals is not None and visuals[row][place] for place in places]
                own = None if targets is None else [targets[row][place] for place in places]
                own_ids = None if ids is None else [ids[row][place] for place in places]
                end = len(places) if own is None else trim_unsupervised(own)
                roles = token_roles(is_visual[:end], own[:end] if own else None, own_ids, self.user_marker)
                samples.append(
                    Sample(
                        row,
                        part[torch.tensor(is_visual, dtype=torch.bool)],
                        part[slice(*roles.answer)] if own is not None else part[:0],
                        part[slice(*roles.last_instruct)],
                        any(is_visual) or own is None or any(label != IGNORE for label in own),
                    )
                )
        return samples

    def _image_logits(self, hidden: Tensor, places: list[Places]) -> list[Tensor]:
        """Image logits [tokens, 2] of every sample; samples with equally many tokens go through together."""
        groups: dict[int, list[int]] = {}
        for number, (_, columns) in enumerate(places):
            groups.setdefault(len(columns), []).append(number)
        logits: dict[int, Tensor] = {}
        for numbers in groups.values():
            x = torch.stack([hidden[places[n][0], places[n][1].to(hidden.device)] for n in numbers])
            logits |= dict(zip(numbers, self.image_predictor(x), strict=True))
        return [logits[number] for number in range(len(places))]

    @staticmethod
    def _flat(hidden: Tensor, places: list[Places]) -> Tensor:
        """Hidden states of all places, one after another [tokens, width]."""
        return torch.cat([hidden[row, columns.to(hidden.device)] for row, columns in places])

    # Training

    def noise(self, role: str, logits: Tensor) -> Tensor:
        """Gumbel noise for the decisions of a role ("image", "answer", "instruct") [tokens, 2]."""
        return gumbel_noise(logits)

    def _sampled(self, role: str, logits: Tensor, places: list[Places], shortest: int) -> list[Tensor]:
        """Sampled decisions per place; all ones for places with fewer than `shortest` tokens."""
        keep = gumbel_keep(logits, self.tau, self.noise(role, logits))
        parts = keep.split([len(columns) for _, columns in places])
        return [part if len(part) >= shortest else torch.ones_like(part) for part in parts]

    def decide(self, hidden: Tensor, samples: list[Sample]) -> Decisions:
        """Sample decisions for all samples, and weigh how far their rates are off."""
        total = sum(sample.counts for sample in samples)
        policy = torch.ones(hidden.shape[:2], dtype=torch.float32, device=hidden.device)
        penalty = policy.new_zeros(())
        decided: dict[str, list[Tensor]] = {"image": [], "answer": [], "instruct": []}

        def settle(
            role: str, places: list[Places], masks: list[Tensor], rate: float, shortest: int, count: int
        ) -> None:
            nonlocal policy, penalty
            rows = torch.cat([torch.full_like(columns, row) for row, columns in places]).to(hidden.device)
            columns = torch.cat([columns for _, columns in places]).to(hidden.device)
            policy = policy.index_put((rows, columns), torch.cat(masks))
            penalty = penalty + rate_penalty(masks, rate, shortest, count)
            decided[role] = masks

        def placed(role: str) -> list[Places]:
            found = [(sample.row, getattr(sample, role)) for sample in samples]
            return [(row, columns) for row, columns in found if len(columns)]

        places = placed("image") if self.prunes_images else []
        if places:
            logits = torch.cat(self._image_logits(hidden, places))
            masks = self._sampled("image", logits, places, 0)
            settle("image", places, masks, self.vision_keep_rate, 0, len(places))
        text = (
            ("answer", "answer", self.prunes_answers, self.text_predictor),
            ("instruct", "last_instruct", self.prunes_instructions, self.instruct_predictor),
        )
        limits = {
            "answer": (self.output_text_keep_rate, self.output_text_len_for_training),
            "instruct": (self.instruct_keep_rate, self.instruct_len_for_training),
        }
        for role, attribute, active, predictor in text:
            places = placed(attribute) if active else []
            if places:
                masks = self._sampled(role, predictor(self._flat(hidden, places)), places, limits[role][1])
                settle(role, places, masks, *limits[role], total)
        # Every predictor takes part in every backward pass: distributed training waits for all gradients.
        idle = sum((p.float().sum() for p in self.parameters() if p.requires_grad), start=policy.new_zeros(()))
        return Decisions(policy, self.mask_loss_weight * penalty + 0.0 * idle, **decided)

    # Inference

    def select(
        self,
        hidden: Tensor,
        visual: Tensor | None,
        labels: Tensor | None,
        input_ids: Tensor | None,
        valid: Tensor | None,
        segments: Tensor | None,
        seen: int,
        cached: bool,
        prompt_length: int | None,
    ) -> Selection:
        """Decide by the three inference modes, or by the labels of an answer that is to be evaluated."""
        batch, length = hidden.shape[:2]
        run = torch.ones(batch, length, dtype=torch.bool, device=hidden.device) if valid is None else valid.clone()
        if seen and length == 1:  # one new token behind a cache: a generated one
            keep = threshold_keep(self.text_predictor(hidden)) if self.prunes_answers else None
            return Selection(run, None if keep is None else keep & run)
        sees_answers = labels is not None and self.prunes_answers
        if not (visual is not None and self.prunes_images) and not sees_answers and not self.prunes_instructions:
            samples = []
        else:
            samples = self._samples(batch, length, visual, labels, input_ids, valid, segments)
        if self.prunes_images:
            self._drop_image_tokens(hidden, samples, run)
        if seen:  # a later user turn
            if not self.prunes_instructions:
                return Selection(run)
            stored = threshold_keep(self.instruct_predictor(hidden))
            stored[:, -1] = True
            return Selection(run, stored & run)
        if self.prunes_instructions:
            places = [(sample.row, sample.last_instruct[:-1]) for sample in samples]
            self._clear(run, hidden, [place for place in places if len(place[1])], self.instruct_predictor)
        visible = None
        if sees_answers:
            visible = torch.ones_like(run)
            places = [(sample.row, sample.answer) for sample in samples if len(sample.answer)]
            self._clear(visible, hidden, places, self.text_predictor)
        elif not cached and prompt_length is not None and self.prunes_answers and prompt_length < length - 1:
            run[:, prompt_length:-1] &= threshold_keep(self.text_predictor(hidden[:, prompt_length:-1]))
        return Selection(run, None, visible)

    def _drop_image_tokens(self, hidden: Tensor, samples: list[Sample], run: Tensor) -> None:
        """Leave the best image tokens of every sample in `run`."""
        places = [(sample.row, sample.image) for sample in samples if len(sample.image)]
        for (row, columns), logits in zip(places, self._image_logits(hidden, places), strict=True):
            columns = columns.to(run.device)
            run[row, columns] = False
            run[row, columns[top_keep(logits[None], self.vision_keep_rate)[0]]] = True

    def _clear(self, mask: Tensor, hidden: Tensor, places: list[Places], predictor: nn.Module) -> None:
        """Set `mask` to False where the predictor drops a token of the places."""
        if not places:
            return
        keep = threshold_keep(predictor(self._flat(hidden, places)))
        for (row, columns), part in zip(places, keep.split([len(c) for _, c in places]), strict=True):
            mask[row, columns.to(mask.device)] &= part
