"""The one model: encoders, connectors, splice, language model.

    pixel_values ─▶ vision_tower ─▶ multi_modal_projector ─▶ arrange ─▶ scatter into embeddings ─▶ language_model

Parts are chosen by the configuration. The model knows modalities and plans, but not which published system it is.
Names of weights follow transformers' LLaVA.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput
from transformers.utils import can_return_tuple

from llavakit.connectors.base import Connector, Prompt
from llavakit.language.head import Head
from llavakit.language.likelihood import Likelihood, cross_entropy, token_logps
from llavakit.language.packed import last_layer_at
from llavakit.model.configuration import MAIN_CONNECTOR, LlavakitConfig
from llavakit.model.prompt import (
    PromptInfo,
    make_prompt,
    media_segments,
    packed_segments,
    positions_of,
    samples_without_media,
)
from llavakit.model.routes import MODALITIES, MediaSpec, encoder_widths, read_region_tensor
from llavakit.model.visuals import Visuals, gather_media, run_encoders, streamed, view_jobs
from llavakit.registry import ADAPTERS, CONNECTORS
from llavakit.splice.layout import Arrangement
from llavakit.splice.scatter import IGNORE, scatter
from llavakit.views.plan import MediaSize, Plan
from llavakit.vision.activations import with_lean_activations

BLANK = MediaSize(1, 336, 336)  # size of the image of zeros that some connectors want for samples without media
STREAM_ABOVE = 64  # above this many views, encode lazily (inference only)


@dataclass
class LlavakitModelOutput(ModelOutput):
    """Output of `LlavakitModel`; `aux_loss` is what a language adapter adds to the loss."""

    last_hidden_state: Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None
    aux_loss: Tensor | None = None


@dataclass
class LlavakitOutput(ModelOutput):
    """Output of `LlavakitForConditionalGeneration`."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None
    aux_loss: Tensor | None = None
    likelihood: Likelihood | None = None


class LlavakitPreTrainedModel(PreTrainedModel):
    config_class = LlavakitConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _skip_keys_device_placement = ["past_key_values"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.MultiheadAttention):
            init.xavier_uniform_(module.in_proj_weight)
            init.zeros_(module.in_proj_bias)
        if isinstance(module, LlavakitModel) and module.image_newline is not None:
            init.normal_(module.image_newline, std=self.config.hidden_size**-0.5)
        if hasattr(module, "init_parameters"):  # parts with bare parameters say how to initialise them
            module.init_parameters()


class LlavakitModel(LlavakitPreTrainedModel):
    """Encoders, connectors and decoder without the language-model head."""

    def __init__(self, config: LlavakitConfig) -> None:
        super().__init__(config)
        self.media = MediaSpec(config)
        for name in config.encoder_names():
            setattr(self, name, with_lean_activations(AutoModel.from_config(config.encoder_config(name)[0])))
        if config.vision_config is not None:
            setattr(self, MAIN_CONNECTOR, self._build_connector(MAIN_CONNECTOR))
        for name in config.extra_connectors:
            setattr(self, name, self._build_connector(name))
        self.language_model = AutoModel.from_config(config.text_config)
        self.image_newline = self._build_newline(self.media.newline_vectors)
        self.language_adapter = (
            ADAPTERS.build(config.language_adapter, text_config=config.text_config) if config.language_adapter else None
        )
        if self.language_adapter is not None:
            self.language_adapter.check(self.language_model)
        self.post_init()

    def _build_newline(self, vectors: int) -> nn.Parameter | None:
        """The learned separator: [hidden] if there is one, [vectors, hidden] if there are several."""
        width = self.config.hidden_size
        return nn.Parameter(torch.zeros(*([vectors] if vectors > 1 else []), width)) if vectors else None

    def _newline_for(self, arrangement: Arrangement) -> Tensor | None:
        """The separator as an arrangement takes it."""
        newline = self.image_newline
        several = newline is not None and newline.dim() == 2
        return newline[0] if several and arrangement.newline_vectors == 1 else newline

    def _build_connector(self, name: str) -> Connector:
        options = self.config.connector_options(name)
        cls = CONNECTORS.get(options["type"])
        read = [encoder_widths(self.config, encoder) for encoder in self.config.connector_encoders(name)]
        widths, region_widths = zip(*read, strict=True)
        several = cls.encoders > 1
        given: dict[str, Any] = {"vision_width": widths if several else widths[0]}
        if "region_width" in inspect.signature(cls.__init__).parameters:
            given["region_width"] = region_widths if several else region_widths[0]
        return CONNECTORS.build(
            options, **given, hidden_size=self.config.hidden_size, text_config=self.config.text_config
        )

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    @property
    def reads_prompt(self) -> bool:
        """Whether a connector reads the prompt, so that visual tokens cannot be computed from pixels alone."""
        return any(route.connector_cls.needs_prompt for route in self.media.routes.values())

    def plan_media(
        self,
        pixel_values: Tensor | Sequence[Tensor],
        visual_sizes: Tensor | None,
        visual_modalities: Tensor | None,
        visual_regions: Sequence[Tensor] | None = None,
    ) -> tuple[list[str], list[Plan]]:
        """Modalities and plans of the media of a batch; without sizes every row of `pixel_values` is one image."""
        if visual_sizes is None:
            sizes = [MediaSize(1, int(view.shape[-2]), int(view.shape[-1])) for view in pixel_values]
        else:
            sizes = [MediaSize(*size) for size in visual_sizes.tolist()]
        modalities = (
            ["image"] * len(sizes)
            if visual_modalities is None
            else [MODALITIES[modality] for modality in visual_modalities.tolist()]
        )
        regions = map(read_region_tensor, visual_regions or [None] * len(sizes))
        plans = [
            self.media.plan(modality, size, own) for modality, size, own in zip(modalities, sizes, regions, strict=True)
        ]
        return modalities, plans

    def encode_media(
        self,
        pixel_values: Tensor | Sequence[Tensor],
        visual_sizes: Tensor | None = None,
        visual_modalities: Tensor | None = None,
        visual_regions: Sequence[Tensor] | None = None,
    ) -> Visuals:
        """Encoder features of all views; views of one shape and encoder are encoded together.

        Args:
            pixel_values: [views, channels, (depth,) height, width], or a list of such views of several shapes.
            visual_sizes: Original (depth, height, width) of every media item [media, 3].
            visual_modalities: Index into `llavakit.model.routes.MODALITIES` of every media item [media].
            visual_regions: Boxes [regions, 4] of every media item, corners in pixels of the original picture.
        """
        modalities, plans = self.plan_media(pixel_values, visual_sizes, visual_modalities, visual_regions)
        jobs = view_jobs(self.media, modalities, plans)
        if len(jobs) != len(pixel_values):
            raise ValueError(f"{len(pixel_values)} views in pixel_values, but the plans need {len(jobs)}")
        connectors = {self.media.route(modality).connector for modality in modalities}
        if len(jobs) > STREAM_ABOVE and len(connectors) == 1 and not torch.is_grad_enabled():
            name = connectors.pop()
            if getattr(self, name).streams:

                def read(start: int, stop: int) -> Tensor:
                    return torch.cat(run_encoders(self, pixel_values[start:stop], jobs[start:stop]))

                return Visuals(modalities, plans, {name: (streamed(self.media, modalities, plans, read),)})
        return gather_media(self.media, modalities, plans, run_encoders(self, pixel_values, jobs))

    def connect(self, visuals: Visuals, prompt: Prompt | None = None) -> tuple[list[Tensor], Tensor | None]:
        """Visual vectors of every media item in prompt order, and the prompt's embeddings if a connector changed them.

        Returns:
            One [visual tokens, hidden] tensor per media item, and [batch, length, hidden] or None.
        """
        vectors: dict[int, Tensor] = {}
        changed = None
        marks: list[Tensor | None] = []
        routes = [self.media.route(modality) for modality in visuals.modalities]
        for name, several in visuals.features.items():
            media = [item for item, route in enumerate(routes) if route.connector == name]
            plans = [visuals.plans[item] for item in media]
            connector = getattr(self, name)
            parameter = next(connector.parameters(), None)
            if parameter is not None:
                several = tuple(features.to(parameter.dtype) for features in several)
            features = several if connector.encoders > 1 else several[0]
            if connector.needs_prompt:
                if prompt is None:
                    raise ValueError(f"connector {name!r} reads the prompt, which was not given")
                prompt.media, prompt.changed = media, None
                tokens, prompt.embeds = connector(features, plans, prompt)
                marks.append(prompt.changed)
                changed = prompt.embeds
            else:
                tokens = connector(features, plans)
            split = tokens.split()
            for item, own_entries in zip(media, tokens.by_media(len(media)), strict=True):
                vectors[item] = routes[item].arrangement.arrange(
                    visuals.plans[item],
                    [tokens.grids[entry] for entry in own_entries],
                    [split[entry] for entry in own_entries],
                    self._newline_for(routes[item].arrangement),
                )
        if marks and all(mark is not None for mark in marks):
            prompt.changed = torch.stack(marks).any(0)
        return [vectors[item] for item in range(len(visuals.modalities))], changed

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor | Sequence[Tensor],
        visual_sizes: Tensor | None = None,
        visual_modalities: Tensor | None = None,
        visual_regions: Sequence[Tensor] | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Visual tokens of every media item; see `encode_media` for the arguments.

        Raises:
            UserError: If the model has no vision side.

        Returns:
            `pooler_output` is a list with one [visual tokens, hidden] tensor per media item, `last_hidden_state` what
            the connector read: [views, tokens, width], or [tokens, width] if views differ in size.
        """
        visuals = self.encode_media(pixel_values, visual_sizes, visual_modalities, visual_regions)
        vectors, _ = self.connect(visuals)
        features = next(iter(visuals.features.values()))[0]
        read = features.values
        if len(set(features.grids)) == 1:
            read = read.view(len(features.grids), -1, read.shape[-1])
        wanted = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        wanted = {key: getattr(self.config, key) if value is None else value for key, value in wanted.items()}
        encoder: dict[str, Any] = {}
        if any(wanted.values()):  # by tools that look inside the main encoder
            encoder = self.vision_tower(pixel_values, return_dict=True, **wanted)
        return BaseModelOutputWithPooling(
            last_hidden_state=read,
            pooler_output=vectors,
            hidden_states=encoder.get("hidden_states"),
            attentions=encoder.get("attentions"),
        )

    def embed_ids(self, input_ids: Tensor) -> Tensor:
        """Embeddings of ids [batch, length, hidden]; the placeholder id may lie outside the vocabulary."""
        if self.config.image_token_id >= self.config.text_config.vocab_size:
            input_ids = input_ids.masked_fill(input_ids == self.config.image_token_id, 0)
        return self.get_input_embeddings()(input_ids)

    def get_placeholder_mask(self, input_ids: Tensor | None, inputs_embeds: Tensor) -> Tensor:
        """True at visual positions [batch, length]."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)

    def embed(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None = None,
        *,
        pixel_values: Tensor | Sequence[Tensor] | None = None,
        visual_sizes: Tensor | None = None,
        visual_modalities: Tensor | None = None,
        visual_regions: Sequence[Tensor] | None = None,
        visuals: Visuals | None = None,
        vectors: Sequence[Tensor] | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        segments: Tensor | None = None,
        info: PromptInfo | None = None,
        prompt: Prompt | None = None,
        continues: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The embedded prompt with its visual tokens in place.

        Args:
            visuals: Features that were encoded before (a frozen encoder's cache), instead of `pixel_values`.
            vectors: Visual vectors that were computed before, one tensor per media item.
            info: For connectors that read the prompt.
            prompt: What they get to see, if it was made before by `read_prompt`.
            continues: Whether the ids go on with a prompt that was embedded before.

        Returns:
            Embeddings [batch, length, hidden], visual mask [batch, length] or None, visual vectors or None.
        """
        blank = self.reads_blank_image and input_ids is not None and not continues
        if inputs_embeds is None:
            inputs_embeds = self.embed_ids(input_ids)
        if visuals is None and pixel_values is not None:
            visuals = self.encode_media(pixel_values, visual_sizes, visual_modalities, visual_regions)
        if visuals is None and vectors is None and not blank:
            return inputs_embeds, None, None
        if vectors is not None or not self.reads_prompt:
            mask = self.get_placeholder_mask(input_ids, inputs_embeds)
            vectors = self.connect(visuals)[0] if vectors is None else vectors
        else:
            if prompt is None:
                given = {"attention_mask": attention_mask, "labels": labels, "segments": segments, "info": info}
                prompt = self.read_prompt(input_ids, inputs_embeds, **given)
            mask = prompt.visual
            visuals = visuals or Visuals([], [], {})
            prompt.media_segments, media = media_segments(self.media, prompt, visuals), len(visuals.modalities)
            if blank:
                visuals = self._with_blank_images(prompt, visuals)
            if not visuals.modalities:
                return inputs_embeds, None, None
            vectors, changed = self.connect(visuals, prompt)
            vectors, inputs_embeds = vectors[:media], inputs_embeds if changed is None else changed
        flat = torch.cat(list(vectors)) if len(vectors) else inputs_embeds[0, :0]
        return scatter(inputs_embeds, mask, flat), mask, flat

    def read_prompt(self, input_ids: Tensor | None, inputs_embeds: Tensor | None = None, **given: Any) -> Prompt:
        """What connectors that read the prompt get to see; see `llavakit.model.prompt.make_prompt`."""
        inputs_embeds = self.embed_ids(input_ids) if inputs_embeds is None else inputs_embeds
        mask = self.get_placeholder_mask(input_ids, inputs_embeds)
        return make_prompt(input_ids, inputs_embeds, mask, **given)

    @property
    def reads_blank_image(self) -> bool:
        """Whether a connector wants an image of zeros for samples without media."""
        return any(getattr(self, route.connector).blank_image for route in self.media.routes.values())

    def _with_blank_images(self, prompt: Prompt, visuals: Visuals) -> Visuals:
        """The media and, for every sample that has none, an image of zeros; notes in `prompt` whose it is."""
        lone = samples_without_media(prompt)
        if not lone:
            return visuals
        views = self.media.plan("image", BLANK).views
        pixels = [prompt.embeds.new_zeros(3, view.height, view.width) for view in views] * len(lone)
        prompt.media_segments = prompt.media_segments + lone
        if prompt.digests is not None:
            prompt.digests = prompt.digests + [b"blank"] * len(lone)
        return visuals.joined(self.encode_media(pixels, torch.tensor([BLANK] * len(lone))))

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | Sequence[Tensor] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        visual_sizes: Tensor | None = None,
        visual_modalities: Tensor | None = None,
        visual_regions: Sequence[Tensor] | None = None,
        visuals: Visuals | None = None,
        visual_mask: Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        labels: Tensor | None = None,
        prompt_info: PromptInfo | None = None,
        **kwargs: Any,
    ) -> LlavakitModelOutput:
        """Run the pipeline up to the last hidden state.

        Args:
            input_ids: Expanded prompt [batch, length].
            pixel_values: Views of all media of the batch, see `encode_media`.
            attention_mask: [batch, length so far]; leave it out for packed rows.
            position_ids: [batch, length]; positions that start again at 0 mark packed samples.
            visual_mask: Visual positions, if `inputs_embeds` are given that hold visual tokens already.
            labels: Only connectors and adapters that treat answers in a special way look at them here.
            prompt_info: What connectors and adapters may know of the prompt beside its ids.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        segments = None
        if kwargs.get("use_cache") is not False or self.reads_prompt or self.language_adapter is not None:
            segments = packed_segments(position_ids, attention_mask, past_key_values)
        if segments is not None:
            kwargs["use_cache"] = False  # the decoder only sees that rows are packed while it has no cache
        given = (mm_encoder_outputs or {}).get("image")
        inputs_embeds, mask, vectors = self.embed(
            input_ids,
            inputs_embeds,
            pixel_values=pixel_values,
            visual_sizes=visual_sizes,
            visual_modalities=visual_modalities,
            visual_regions=visual_regions,
            visuals=visuals,
            vectors=None if given is None else given.pooler_output,
            attention_mask=attention_mask,
            labels=labels,
            segments=segments,
            info=prompt_info,
            continues=self.reads_blank_image and past_key_values is not None and past_key_values.get_seq_length() > 0,
        )
        if position_ids is None and attention_mask is not None and attention_mask.dim() == 2:
            position_ids = positions_of(attention_mask)[:, -inputs_embeds.shape[1] :]
        inputs = {
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
        }
        aux_loss = None
        if self.language_adapter is None:
            outputs = self.language_model(**inputs, **kwargs)
        else:
            outputs, aux_loss = self.language_adapter(
                self.language_model,
                **inputs,
                visual=mask if mask is not None else visual_mask,
                input_ids=input_ids,
                labels=labels,
                segments=segments,
                prompt_info=prompt_info or PromptInfo(),
                **kwargs,
            )
        return LlavakitModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=vectors,
            aux_loss=aux_loss,
        )


class LlavakitForConditionalGeneration(LlavakitPreTrainedModel, GenerationMixin):
    """The model with its language-model head; what `llavakit.load` and `AutoModelForImageTextToText` return."""

    _tp_plan = {"lm_head": "colwise_gather_output"}
    media_inputs = ("pixel_values", "visual_sizes", "visual_modalities", "visual_regions")

    def __init__(self, config: LlavakitConfig) -> None:
        super().__init__(config)
        self.model = LlavakitModel(config)
        text = config.text_config
        self.lm_head = Head.of(text)
        names = {id(module): name for name, module in self.named_modules()}
        table = names[id(self.get_input_embeddings())]
        self._tied_weights_keys = {"lm_head.weight": f"{table}.weight"} if config.tie_word_embeddings else {}
        self.post_init()
        if 0 <= config.image_token_id < text.vocab_size:  # a placeholder in a reply would ask for visual tokens
            self.generation_config.suppress_tokens = [config.image_token_id]

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = self.lm_head.holding(value) if type(value) is nn.Linear else value

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """See `LlavakitModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | Sequence[Tensor] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        visual_sizes: Tensor | None = None,
        visual_modalities: Tensor | None = None,
        visual_regions: Sequence[Tensor] | None = None,
        visual_mask: Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        labels: Tensor | None = None,
        prompt_info: PromptInfo | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool = False,
        skip_loss: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        label_weights: Tensor | None = None,
        targets: tuple[Tensor, Tensor] | None = None,
        likeliest: bool = False,
        narrow: bool = False,
        **kwargs: Any,
    ) -> LlavakitOutput:
        """Logits and loss; see `LlavakitModel.forward` for what is not explained here.

        Args:
            labels: [batch, length], -100 where nothing is to be learned.
            logits_to_keep: Number of last positions to compute logits for (0: all).
            skip_loss: Labels are only for connectors and adapters that look at them.
            skip_logits: With `labels`, compute logits only where there is a label and do not return them.
            num_items_in_batch: Number of labels over all accumulated batches, the loss's denominator.
            label_weights: [batch, length], factors of the cross entropy of each label; the denominator stays the number
                of labels.
            targets: Positions (indices into the flattened rows) and the tokens that they predict [targets] each; the
                output has their `likelihood` instead of logits and loss.
            likeliest: Whether the likeliest tokens there are wanted too.
            narrow: Whether the decoder's last layer may leave out what neither loss nor likelihood reads; for packed
                rows, see `llavakit.language.packed.can_narrow`.

        Returns:
            Loss is the mean next-token cross entropy over labels, plus the adapter's own term.
        """
        media = {"pixel_values": pixel_values, "visual_sizes": visual_sizes, "visual_modalities": visual_modalities}
        places = ids = factors = None
        if targets is not None:
            places, ids = targets
        elif labels is not None and not skip_loss and (skip_logits or label_weights is not None):
            places, ids, factors = _supervised(labels, label_weights)
        narrows = nullcontext()
        if narrow and places is not None and len(places) and (targets is not None or skip_logits):
            kept, places = places.unique(return_inverse=True)
            narrows = last_layer_at(self.model.language_model, kept.tolist())
        with narrows:
            outputs = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                visual_regions=visual_regions,
                visual_mask=visual_mask,
                mm_encoder_outputs=mm_encoder_outputs,
                labels=labels,
                prompt_info=prompt_info,
                **media,
                **kwargs,
            )
        hidden = outputs.last_hidden_state
        loss = logits = likelihood = None
        if places is not None:
            read = hidden.flatten(0, 1).index_select(0, places)
            if targets is not None:
                likelihood = token_logps(self.lm_head, read, ids, likeliest=likeliest)
            else:
                items = num_items_in_batch if num_items_in_batch is not None else max(len(ids), 1)
                loss = cross_entropy(self.lm_head, read, ids, factors) / items
        if targets is None and (labels is None or skip_loss or not skip_logits):
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, keep] if logits_to_keep is not None else hidden)
            if labels is not None and not skip_loss and loss is None:
                loss = self.loss_function(
                    logits=logits,
                    labels=labels,
                    vocab_size=self.config.text_config.vocab_size,
                    num_items_in_batch=num_items_in_batch,
                )
        if loss is not None and outputs.aux_loss is not None:
            loss = loss + outputs.aux_loss
        return LlavakitOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            aux_loss=outputs.aux_loss,
            likelihood=likelihood,
        )

    def _supports_mm_encoder_outputs(self) -> bool:
        """Whether transformers' `generate` may encode media alone, in front of everything else."""
        return not self.model.reads_prompt and super()._supports_mm_encoder_outputs()

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """transformers' `generate`; see `GenerationMixin.generate`.

        With a cache, a connector that reads the prompt runs once here, in front of prefill; a language adapter brings
        its cache.
        """
        input_ids = inputs if inputs is not None else kwargs.pop("input_ids", None)
        settings = kwargs.get("generation_config") or self.generation_config
        cached = kwargs.get("use_cache", settings.use_cache) is not False
        adapter = self.model.language_adapter
        reads = self.model.reads_prompt and input_ids is not None
        info = kwargs.pop("prompt_info", None) or PromptInfo()
        if reads and cached and (kwargs.get("pixel_values") is not None or self.model.reads_blank_image):
            given = {name: kwargs.pop(name, None) for name in self.media_inputs}
            mask = kwargs.get("attention_mask")
            embeds, visual, _ = self.model.embed(input_ids, attention_mask=mask, info=info, **given)
            kwargs |= {"inputs_embeds": embeds, "visual_mask": visual}
        if adapter is not None or (reads and not cached):
            prompt = input_ids if input_ids is not None else kwargs["inputs_embeds"]
            kwargs["prompt_info"] = replace(info, length=prompt.shape[1]) if info.length is None else info
        fresh = cached and adapter is not None and kwargs.get("past_key_values") is None
        if fresh and (cache := adapter.make_cache()) is not None:
            kwargs["past_key_values"] = cache
        if input_ids is not None:
            kwargs["input_ids"] = input_ids
        return super().generate(**kwargs)


def _supervised(labels: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Positions in the flattened rows that predict a label, the labels, and their factors [targets] each.

    Prompt and visual positions never reach the head.
    """
    targets = F.pad(labels, (0, 1), value=IGNORE)[:, 1:].reshape(-1)
    places = torch.nonzero(targets != IGNORE).squeeze(-1)
    factors = None if weights is None else F.pad(weights, (0, 1), value=1.0)[:, 1:].reshape(-1)[places]
    return places, targets[places], factors


__all__ = ["LlavakitForConditionalGeneration", "LlavakitModel", "LlavakitPreTrainedModel"]
