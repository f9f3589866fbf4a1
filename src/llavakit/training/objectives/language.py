"""What objectives share that train a vision-language model, or a part of it, on conversations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llavakit.checkpoints.convert import save
from llavakit.conversation.labels import label_policy
from llavakit.conversation.template import template_for
from llavakit.data.records import Record
from llavakit.errors import RecipeError, RecordError, UserError
from llavakit.language.packed import can_narrow, can_share, packed_attention, packed_row, switch_on
from llavakit.model.configuration import LlavakitConfig
from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.model.processing import LlavakitProcessor, architecture_of
from llavakit.model.routes import MediaSpec
from llavakit.model.visuals import gather_media
from llavakit.training import distributed
from llavakit.training.build import build_model, build_processor, config_of, load_checkpoint, merged_media
from llavakit.training.dataset import Conversations, PreparedSamples, StageCollator, stand_ins
from llavakit.training.features import FeatureCache
from llavakit.training.objectives.base import Objective, Run
from llavakit.training.parameter_groups import part_of, public_name
from llavakit.training.recipe import Recipe

TEXT_PARTS = ("language_model", "lm_head", "language_adapter")


class LanguageObjective(Objective):
    """Base of objectives whose module is the whole model and whose samples are tokens with media among them.

    A subclass defines `items` and `loss`, and calls `forward` there. What it learns from need not be one conversation
    per record: then it defines `read`, `encode`, `check`, `length` and `collator` too.

    Attributes:
        by_position: Whether `loss` looks at a batch by its labels or targets alone. Packed rows may then hold once what
            their samples begin with, and the decoder leaves out what is not read.
        shares, narrow: Set by `begin`: whether rows and decoder of the stage do so.
    """

    by_position = False
    shares = False
    narrow = False

    uses = frozenset(
        {
            *("template", "labels", "media", "packing", "max_length", "group_by_modality", "group_by_length"),
            *("cache_features", "loss_weights", "lora", "shard"),
        }
    )

    # the module

    def describe(self, recipe: Recipe) -> tuple[LlavakitConfig, LlavakitProcessor]:
        """Configuration and processor."""
        config = config_of(recipe)
        return config, build_processor(recipe, config)

    def skeleton(self, config: LlavakitConfig) -> LlavakitForConditionalGeneration:
        """The model on meta tensors with the stage's own media."""
        with torch.device("meta"):
            return LlavakitForConditionalGeneration(merged_media(config, self.stage.media))

    def build(self, recipe: Recipe) -> tuple[LlavakitForConditionalGeneration, LlavakitProcessor]:
        """Model and processor of the recipe."""
        return build_model(recipe)

    def load(self, folder: Path) -> tuple[LlavakitForConditionalGeneration, LlavakitProcessor]:
        """Model and processor of a checkpoint in any layout."""
        return load_checkpoint(folder)

    def save(self, state: Mapping[str, Tensor], config: Any, processor: Any, folder: Path) -> None:
        """A llavakit checkpoint."""
        save(state, config, processor, folder)

    def fit(self, module: LlavakitForConditionalGeneration) -> None:
        """Give the network the stage's own media."""
        if self.stage.media:
            try:
                module.model.media = MediaSpec(merged_media(module.config, self.stage.media))
            except UserError as error:
                raise RecipeError(f"media: {error}") from error

    # from records to batches

    def bind(self, config: LlavakitConfig, processor: LlavakitProcessor) -> None:
        """Make the stage's processor: that of the model with the stage's own media and template.

        What is saved keeps the recipe's media and template.
        """
        stage = self.stage
        if stage.media or stage.template is not None:
            processor = type(processor)(
                type(processor.image_processor)(architecture_of(merged_media(config, stage.media))),
                processor.tokenizer,
                template=stage.template or processor.template,
                sampling=processor.sampling,
                reading=processor.reading,
                time_instruction=processor.time_instruction,
            )
        self.processor = processor
        options = {}
        if stage.labels is not None:
            try:
                label_policy(stage.labels, template_for(processor.template, processor.tokenizer))
            except UserError as error:
                raise RecipeError(f"labels: {error}") from error
            options["labels"] = stage.labels
        stream = stage.packing == "stream"  # cuts wherever a row ends
        longest = None if stream else stage.max_length
        positions = None if stream else getattr(getattr(config, "text_config", None), "max_position_embeddings", None)
        self.conversations = Conversations(processor, max_length=longest, positions=positions, options=options)

    def encode(self, record: Record, *, media: bool = True) -> dict[str, Any]:
        """The record's conversation as ids, labels and views."""
        return self.conversations.encode(record, media=media)

    def check(self, sample: dict[str, Any], record: Record) -> dict[str, Any]:
        """The sample, cut to `max_length` behind its media; one without labels is refused."""
        return self.conversations.check(sample, record)

    def length(self, sample: Mapping[str, Any]) -> int:
        """Tokens, negative without media."""
        return self.conversations.length(sample)

    def collator(self, run: Run) -> Callable[[Sequence[Any]], Any]:
        """Padded or packed batches."""
        tokenizer = self.processor.tokenizer
        pad = tokenizer.pad_token_id
        return StageCollator(
            pad if pad is not None else tokenizer.eos_token_id or 0,
            self.stage.max_length,
            packing=self.stage.packing,
            features=self.conversations.features is not None,
            flat=self.flat,
            placeholder=self.processor.image_token_id if self.shares else None,
            stand_ins=self._stand_ins(run),
        )

    def _stand_ins(self, run: Run) -> dict[Any, Any]:
        """Blank media for batches without any: where processes share layers, or where text alone trains nothing."""
        text = (p.requires_grad and part_of(public_name(n), TEXT_PARTS) for n, p in run.wrapped.named_parameters())
        if run.world == 1 and any(text):
            return {}
        return stand_ins(run.module, features=self.conversations.features is not None)

    # learning

    def begin(self, run: Run) -> None:
        """Fill the cache of features; let the decoder attend sample by sample where it can."""
        stage = self.stage
        self.net = run.module
        self.flat = stage.packing is True and switch_on(run.module)
        if self.flat and self.by_position:
            self.shares, self.narrow = can_share(run.module), can_narrow(run.module)
        if stage.cache_features:
            dtype = "float16" if stage.cache_features is True else stage.cache_features
            cache = FeatureCache(run.cache, run.module, self.processor, dtype)
            self.conversations.features = cache
            if distributed.is_main():
                self._fill(cache, run)
            distributed.barrier()
            cache.reload()

    def _fill(self, cache: FeatureCache, run: Run) -> None:
        skips = run.recipe.on_bad_record == "skip"
        was_training = cache.model.training
        cache.model.eval()
        with run.console.status(f"{self.stage.name}: encoding media once"):
            cache.fill(_readable(run.samples), on_bad=run.samples.dataset.bad.add if skips else None)
        cache.model.train(was_training)

    def forward(self, model: nn.Module, batch: Mapping[str, Any], **options: Any) -> Any:
        """The model's output for a batch of the stage's collator, from pixels or from cached features.

        Args:
            options: Of `LlavakitForConditionalGeneration.forward`.
        """
        inputs = dict(batch) | {"use_cache": False} | options
        inputs.pop("tokens", None)
        features = inputs.pop("features", None)
        if features is not None:
            names = ("visual_sizes", "visual_modalities", "visual_regions")
            modalities, plans = self.net.model.plan_media((), *(inputs.pop(name, None) for name in names))
            inputs["visuals"] = gather_media(self.net.model.media, modalities, plans, list(features), reduced=True)
        if not self.flat:
            return model(**inputs)
        with packed_attention():
            return model(**inputs, packed_row=packed_row(inputs["position_ids"][0].tolist()), narrow=self.narrow)


def _readable(samples: PreparedSamples) -> Iterator[Record]:
    """All records that can be read; with "skip" broken ones are noted."""
    for index in range(len(samples)):
        try:
            yield samples.dataset.records[index]
        except RecordError as error:
            if samples.dataset.on_bad_record == "stop":
                raise
            samples.dataset.bad.add(error)
