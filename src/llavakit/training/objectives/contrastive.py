"""Pictures and their texts in one space: the contrastive training of a vision encoder with a text side.

    stages:
      - name: pairs
        train: [all]
        objective:
          type: contrastive
          text: microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract   # weights and tokenizer of the text side
          width: 512
        batch_size: 256

Negatives are the other pairs of a batch, on each process its own. Identical texts share their target: thousands of
normal reports have the same words. What a stage leaves is the vision encoder, with the text side beside it
(`llavakit.vision.pairs`); another recipe takes it as `parts.init.vision_tower`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, set_seed

from llavakit.checkpoints.files import atomic_folder, read_json
from llavakit.checkpoints.opening import local_folder
from llavakit.data.records import Record
from llavakit.errors import CheckpointError, RecipeError, UserError
from llavakit.training.build import checked_config, initialise_encoder
from llavakit.training.objectives.base import Loss, Run, Step
from llavakit.training.objectives.encoder import VIEWS, EncoderObjective, ImageViews, ViewCollator
from llavakit.training.recipe import ObjectiveOptions, Recipe
from llavakit.vision.pairs import (
    MOST,
    TEXT,
    Pair,
    PairConfig,
    contrastive_loss,
    longest_text,
    record_text,
    save_pair,
    text_ids,
)


class ContrastiveOptions(ObjectiveOptions):
    """Options of `contrastive`.

    Attributes:
        text: Folder or hub id of the text side's weights and tokenizer.
        text_config: Configuration of a text side at random; beside `tokenizer`, instead of `text`.
        tokenizer: Folder or hub id; default: that of `text`.
        width: Of the joint space.
        length: Most ids of a text.
        pool: "first" (state of the first token, BERT's [CLS]) or "mean".
        share: Whether identical texts share their target.
    """

    text: str | None = None
    text_config: dict[str, Any] | None = None
    tokenizer: str | None = None
    width: int = Field(512, ge=1, le=65536)
    length: int = Field(256, ge=1, le=65536)
    pool: Literal["first", "mean"] = "first"
    share: bool = True


class PairViews:
    """Views of pictures and the tokenizer of texts; takes the place of a whole model's processor."""

    def __init__(self, views: ImageViews, tokenizer: Any) -> None:
        self.views, self.tokenizer = views, tokenizer

    def save_pretrained(self, folder: Path) -> None:
        """Write `views.json`, and the tokenizer under `text/`."""
        self.views.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder / TEXT)


class PairCollator(ViewCollator):
    """Views with the ids of their texts, and which texts are the same."""

    def __init__(self, tokenizer: Any, length: int) -> None:
        self.tokenizer, self.longest = tokenizer, length

    def __call__(self, samples: Sequence[Any]) -> Any:
        batch = super().__call__(samples)
        if isinstance(batch, dict):
            texts = [sample["text"] for sample in samples]
            batch["input_ids"], batch["attention_mask"] = text_ids(texts, self.tokenizer, self.longest)
            batch["same"] = torch.tensor([[a == b for b in texts] for a in texts])
        return batch


class Contrastive(EncoderObjective):
    """A record is `{"image": path, "text": report}`, or one with a conversation, whose first answer is the text."""

    Options: ClassVar[type[ObjectiveOptions]] = ContrastiveOptions
    family: ClassVar[str] = "pair of encoders"

    # the module

    def describe(self, recipe: Recipe) -> tuple[Any, Any]:
        """The configurations of both sides; views and tokenizer."""
        if self.stage.batch_size < 2:
            raise RecipeError("batch_size: a pair is told from the others of its batch, so there must be at least 2")
        vision, views = super().describe(recipe)
        options = self.options
        if (options.text is None) == (options.text_config is None):
            raise RecipeError("objective: give either text (a folder or hub id) or text_config")
        if options.text is not None:
            raw = read_json(local_folder(options.text) / "config.json")
            text = checked_config(_known(raw), "bert", "objective.text")
        else:
            text = checked_config(options.text_config, "bert", "objective.text_config")
        source = options.tokenizer or options.text
        if source is None:
            raise RecipeError("objective.tokenizer: is missing; a text side at random needs one")
        try:
            tokenizer = AutoTokenizer.from_pretrained(local_folder(source))
        except (OSError, ValueError, KeyError) as error:
            said = str(error).strip().splitlines()[0]
            raise RecipeError(f"objective.tokenizer: {source} holds no tokenizer ({said})") from None
        if len(tokenizer) > text.vocab_size:
            raise RecipeError(
                f"objective.tokenizer: has {len(tokenizer)} pieces, the text side's vocabulary {text.vocab_size}"
            )
        return PairConfig(vision, text, options.width, options.pool), PairViews(views, tokenizer)

    def skeleton(self, config: Any) -> nn.Module:
        """Both sides on meta tensors."""
        with torch.device("meta"):
            return Pair(config)

    def build(self, recipe: Recipe) -> tuple[nn.Module, Any]:
        """The vision side with the weights of `init.vision_tower`, the text side with those of `text`."""
        config, processor = self.describe(recipe)
        set_seed(recipe.seed)
        pair = Pair(config)
        if "vision_tower" in recipe.parts.init:
            initialise_encoder(pair.vision_tower, recipe.parts.init["vision_tower"], "parts.init.vision_tower")
        if self.options.text is not None:
            folder = local_folder(self.options.text)
            found, loading = AutoModel.from_pretrained(folder, config=config.text, output_loading_info=True)
            lacking = [name for name in loading["missing_keys"] if ".pooler." not in f".{name}"]
            if lacking:
                raise CheckpointError(f"{folder}: lacks {sorted(lacking)[0]} of the text side")
            pair.text_tower = found
        return pair, processor

    def load(self, folder: Path) -> tuple[nn.Module, Any]:
        """What `save` wrote; every tensor is checked."""
        views = ImageViews(read_json(folder / VIEWS))
        return Pair.load(folder), PairViews(views, AutoTokenizer.from_pretrained(folder / TEXT))

    def save(self, state: Mapping[str, Tensor], config: Any, processor: Any, folder: Path) -> None:
        """Both sides, the projections, views and tokenizer."""
        with atomic_folder(Path(folder)) as scratch:
            save_pair(dict(state), config, scratch)
            processor.save_pretrained(scratch)

    # from records to batches

    def bind(self, config: Any, processor: Any) -> None:
        """Remember how pictures and texts are read."""
        super().bind(config.vision, processor.views)
        self.tokenizer, self.longest = processor.tokenizer, longest_text(config, self.options.length)

    def read(self, raw: Any, file: str, line: int, **options: Any) -> Record:
        """The image and the text of an entry."""
        found = super().read(raw, file, line, **options)
        record_text(raw, file, line)
        return found

    def encode(self, record: Record, *, media: bool = True) -> dict[str, Any]:
        """One view as `pixel_values`, and `text`."""
        sample = super().encode(record, media=media)
        if len(sample["pixel_values"]) > 1:
            raise UserError(
                f"{record.file}:{record.line}: the views are several per picture; use square, pad or squash"
            )
        text = record_text(record.raw, record.file, record.line)
        return sample | {"text": " ".join(text.split())}

    def collator(self, run: Run) -> Callable[[Sequence[Any]], Any]:
        """Views with texts."""
        return PairCollator(self.tokenizer, self.longest)

    # learning

    def loss(self, model: nn.Module, batch: dict[str, Any], step: Step) -> Loss:
        """Cross entropy in both directions, mean over pairs; logged: share of pictures whose text is the nearest."""
        images, texts, scale = model(batch["pixel_values"], batch["input_ids"], batch["attention_mask"])
        same = batch["same"] if self.options.share else None
        each = contrastive_loss(images, texts, scale, same)
        with torch.no_grad():
            nearest = (nn.functional.normalize(images, dim=-1) @ nn.functional.normalize(texts, dim=-1).T).argmax(1)
            right = batch["same"].gather(1, nearest[:, None]).float().mean()
        logged = {"nearest": right, "scale": scale.detach().clamp(max=MOST).exp()}
        return Loss(each.sum() / step.items, logged)


_UNUSED = frozenset(
    ("architectures", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "gradient_checkpointing")
)


def _known(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a published config.json that describe the network."""
    unused = (
        "architectures",
        "torch_dtype",
        "dtype",
        "transformers_version",
        "_name_or_path",
        "gradient_checkpointing",
    )
    return {key: value for key, value in raw.items() if key not in unused}
