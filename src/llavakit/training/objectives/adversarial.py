"""FARE and TeCoA: fine-tune a vision encoder so that attacks on its pictures hardly move its embeddings.

    FARE    max over the ball of || phi(z) - phi_org(x) ||^2; no labels. phi_org is the encoder before.
    TeCoA   max over the ball of the cross entropy of phi(z) against the classes' text embeddings.

Both minimise what an inner PGD attack maximises. Source: Schlarmann et al., "Robust CLIP" (arXiv 2402.12336); TeCoA is
Mao et al. (arXiv 2212.07016). The stage leaves an encoder that `llavakit convert --exchange-vision-tower` puts into a
finished model, and that another recipe takes as `parts.init.vision_tower`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor, nn
from transformers import AutoModel, CLIPVisionModelWithProjection

from llavakit.checkpoints.encoders import read_projection
from llavakit.checkpoints.files import assign_state, read_file, read_folder, read_json
from llavakit.checkpoints.opening import local_folder
from llavakit.conversation.messages import FieldError
from llavakit.data.records import Record, belongs_to
from llavakit.errors import RecipeError, UserError, quoted
from llavakit.model.configuration import build_config
from llavakit.robustness.balls import at_least_single, check_eps, fraction
from llavakit.robustness.embedding import Embedder
from llavakit.robustness.losses import class_loss, squared_distance, unit
from llavakit.robustness.pgd import pgd, uniform_start
from llavakit.training.objectives.base import Loss, Run, Step
from llavakit.training.objectives.encoder import VIEWS, EncoderObjective, ImageViews, ViewCollator
from llavakit.training.recipe import ObjectiveOptions, Recipe

PROJECTION = "visual_projection.weight"
LossName = Literal["l2", "ce"]


class AdversarialOptions(ObjectiveOptions):
    """Options of `fare` and `tecoa`; pixels are in 0..1, and numbers may be written "4/255".

    Attributes:
        eps: Radius of the attack; 0 trains without one.
        norm: "linf" or "l2".
        steps, step: Number and length of the inner attack's steps.
        loss, inner_loss: "l2" (distance of embeddings) or "ce" (classes), of the training and of the attack.
        normalise: Whether embeddings have length one.
        clean_weight: Share of the distance of the clean picture's embedding in the loss.
        trades: Whether the attacked picture's embedding is drawn to the present clean one instead of the original.
        original: Folder of the encoder whose embeddings are kept; default: what the stage starts from.
        classes: File of class names, one a line; for "ce".
        text: Folder of the CLIP model whose text side embeds the classes, or a .safetensors file that holds their
            embeddings as `text` [classes, width]; for "ce".
        template: What the text side reads, with {} for the class name.
    """

    eps: float = Field(4 / 255, ge=0, allow_inf_nan=False)
    norm: Literal["linf", "l2"] = "linf"
    steps: int = Field(10, ge=0, lt=2**31)
    step: float = Field(1 / 255, gt=0, allow_inf_nan=False)
    loss: LossName = "l2"
    inner_loss: LossName = "l2"
    normalise: bool = False
    clean_weight: float = Field(0.0, ge=0, le=1)
    trades: bool = False
    original: str | None = None
    classes: str | None = None
    text: str | None = None
    template: str = "This is a photo of a {}"

    @field_validator("eps", "step", mode="before")
    @classmethod
    def _fractions(cls, value: Any) -> Any:
        return fraction(value)

    @model_validator(mode="after")
    def _radius_in_pixels(self) -> AdversarialOptions:
        if self.norm == "linf" and self.eps > 1:  # a Euclidean radius grows with the picture
            try:
                check_eps(self.eps)
            except UserError as error:
                raise PydanticCustomError("contradiction", "{problem}", {"problem": str(error)}) from None
        return self

    @property
    def needs_classes(self) -> bool:
        """Whether records need labels."""
        return "ce" in (self.loss, self.inner_loss)


class FareOptions(AdversarialOptions):
    """FARE's defaults."""


class TecoaOptions(AdversarialOptions):
    """TeCoA's defaults."""

    loss: LossName = "ce"
    inner_loss: LossName = "ce"
    normalise: bool = True


class LabelledCollator(ViewCollator):
    """Views with the labels of their records, and their first perturbations if records bring any."""

    def __call__(self, samples: Sequence[Any]) -> Any:
        batch = super().__call__(samples)
        if isinstance(batch, dict):
            for key in ("labels", "start"):
                if samples and key in samples[0]:
                    batch[key] = torch.stack([sample[key] for sample in samples])
        return batch


class AdversarialEncoder(EncoderObjective):
    """Base of both objectives.

    A record is `{"image": path}`, with `label` (number or name of the class) where classes are learned. Records that
    are handed over in Python may hold an open picture, or pixels [3, height, width] in 0..1 as a tensor, and under
    `start` the first perturbation of the inner attack.
    """

    Options: ClassVar[type[ObjectiveOptions]] = AdversarialOptions
    jointly = False  # whether the projection into the joint space is part of the module; `describe` finds out

    # the module: an encoder with its projection into the joint space

    def skeleton(self, config: Any) -> nn.Module:
        """The encoder on meta tensors."""
        with torch.device("meta"):
            return _module(config, self.jointly)

    def describe(self, recipe: Recipe) -> tuple[Any, ImageViews]:
        """The encoder's configuration, and its views."""
        config, views = super().describe(recipe)
        self.jointly = False
        if recipe.parts is not None and config.model_type == "clip_vision_model":
            source = recipe.parts.init.get("vision_tower")
            projection = None if source is None else read_projection(local_folder(source))
            if projection is not None:
                self.jointly, config.projection_dim = True, len(projection)
        return config, views

    def build(self, recipe: Recipe) -> tuple[nn.Module, ImageViews]:
        """The encoder and its projection with the weights of `init.vision_tower`."""
        encoder, views = super().build(recipe)
        config, _ = self.describe(recipe)
        if not self.jointly:
            return encoder, views
        whole = _module(config, True)
        state = {f"vision_model.{n.removeprefix('vision_model.')}": t for n, t in encoder.state_dict().items()}
        projection = read_projection(local_folder(recipe.parts.init["vision_tower"]))
        whole.load_state_dict(state | {PROJECTION: projection.float()})
        return whole, views

    def load(self, folder: Path) -> tuple[nn.Module, ImageViews]:
        """What `save` wrote; every tensor is checked."""
        raw, state = read_json(folder / "config.json"), read_folder(folder)
        encoder = _module(build_config(raw, raw["model_type"]), PROJECTION in state)
        assign_state(encoder, state, where=str(folder))
        return encoder, ImageViews(read_json(folder / VIEWS))

    # from records to batches

    def bind(self, config: Any, processor: ImageViews) -> None:
        """Remember how images are cut: to pixels in 0..1, which the attacked function normalises."""
        super().bind(config, processor)
        planner = processor.planner
        if not hasattr(planner, "image_mean"):
            raise RecipeError(f"parts.media.image.views: a {processor.options['type']!r} planner does not normalise")
        self.mean, self.std = planner.image_mean, planner.image_std
        options = {**processor.options, "image_mean": (0.0, 0.0, 0.0), "image_std": (1.0, 1.0, 1.0)}
        if processor.options["type"] == "pad":
            options.setdefault("background", planner.background)
        self.views = ImageViews(options)
        self.names = self._names()

    def _names(self) -> list[str]:
        if not self.options.needs_classes:
            return []
        if self.options.text is None:
            raise RecipeError(
                "objective.text: the loss 'ce' needs embeddings of the classes; name a CLIP folder with its text side, "
                "and their names under objective.classes"
            )
        if self.options.classes is None:
            return []
        try:
            lines = Path(self.options.classes).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            said = getattr(error, "strerror", None) or "not a text file"
            raise RecipeError(f"objective.classes: {self.options.classes} cannot be read ({said})") from None
        return [line.strip() for line in lines if line.strip()]

    def read(self, raw: Any, file: str, line: int, **options: Any) -> Record:
        """The image of an entry, and its label where classes are learned."""
        found = super().read(raw, file, line, **options)
        if self.options.needs_classes:
            with belongs_to(file, line):
                self._label(raw)
        return found

    def _label(self, raw: Mapping[str, Any]) -> int:
        label = raw.get("label")
        if isinstance(label, str) and self.names:
            if label not in self.names:
                raise FieldError("label", f"{quoted(label)} is no class of {self.options.classes}")
            return self.names.index(label)
        if isinstance(label, bool) or not isinstance(label, int):
            raise FieldError("label", f"must be the number or the name of a class, not {quoted(label)}")
        if label < 0 or (self.names and label >= len(self.names)):
            raise FieldError("label", f"{label} is no class; there are {len(self.names)}, counted from 0")
        return label

    def encode(self, record: Record, *, media: bool = True) -> dict[str, Any]:
        """`pixel_values` in 0..1, one tensor per view, `labels` and `start` where the record has them."""
        pixels = record.raw.get("image") if isinstance(record.raw, Mapping) else None
        if isinstance(pixels, Tensor):
            sample: dict[str, Any] = {"pixel_values": [at_least_single(pixels)] if media else [], "tokens": 1}
        else:
            sample = super().encode(record, media=media)
        if len(sample["pixel_values"]) > 1:
            raise UserError(
                f"{record.file}:{record.line}: the views are several per picture; use square, pad or squash"
            )
        if self.options.needs_classes:
            with belongs_to(record.file, record.line):
                sample["labels"] = torch.tensor(self._label(record.raw))
        if isinstance(record.raw, Mapping) and isinstance(record.raw.get("start"), Tensor):
            sample["start"] = at_least_single(record.raw["start"])
        return sample

    def collator(self, run: Run) -> Callable[[Sequence[Any]], Any]:
        """Views with labels."""
        return LabelledCollator()

    # learning

    def begin(self, run: Run) -> None:
        """Freeze the original encoder; embed the classes."""
        options = self.options
        if options.original is None:
            original = run.start()[0]
        else:
            original = self._original(run, options.original)
        original = original.eval().requires_grad_(False)
        device = next(iter(run.module.parameters())).device
        self.embed_original = Embedder(original.to(device), self.mean, self.std, normalise=options.normalise)
        self.embed = Embedder(run.module, self.mean, self.std, normalise=options.normalise)
        self.text = None
        if options.needs_classes:
            self.text = class_embeddings(options.text, self.names, options.template).T.contiguous().to(device)
            if self.text.shape[0] != self.embed.width():
                raise RecipeError(
                    f"objective.text: the classes' embeddings have {self.text.shape[0]} numbers, those of the pictures "
                    f"{self.embed.width()}; the text side belongs to another encoder"
                )

    def _original(self, run: Run, folder: str) -> nn.Module:
        init = {**run.recipe.parts.init, "vision_tower": folder}
        parts = run.recipe.parts.model_copy(update={"init": init, "vision_config": None})
        return self.build(run.recipe.model_copy(update={"parts": parts}))[0]

    def attack(self, pixels: Tensor, wanted: Tensor, labels: Tensor | None, start: Tensor | None) -> Tensor:
        """Pictures [pictures, 3, height, width] in the ball that raise the inner loss.

        Args:
            pixels: Clean pictures in 0..1.
            wanted: The original encoder's embeddings of them.
        """
        options = self.options
        if options.eps == 0:
            return pixels
        start = uniform_start(pixels, options.eps, options.norm) if start is None else start

        def loss(points: Tensor) -> Tensor:
            return self._loss(options.inner_loss, self.embed(points), wanted, labels).mean()

        with _without_gradients(self.embed.encoder):
            return pgd(
                loss, pixels, eps=options.eps, step=options.step, steps=options.steps, norm=options.norm, start=start
            )

    def _loss(self, name: str, embeddings: Tensor, wanted: Tensor, labels: Tensor | None) -> Tensor:
        """A loss [pictures] by name."""
        if name == "l2":
            return squared_distance(embeddings, wanted)
        if labels.max() >= self.text.shape[1]:
            raise UserError(f"label: {int(labels.max())} is no class; there are {self.text.shape[1]}, counted from 0")
        return class_loss(embeddings, self.text, labels)

    def loss(self, model: nn.Module, batch: dict[str, Any], step: Step) -> Loss:
        """Mean over pictures of the loss of attacked ones, and of clean ones if they count."""
        options, pixels, labels = self.options, batch["pixel_values"], batch.get("labels")
        with torch.no_grad():
            wanted = self.embed_original(pixels)
        attacked = self.attack(pixels, wanted, labels, batch.get("start"))
        logged: dict[str, Tensor] = {}
        clean = target = None
        if options.clean_weight or options.trades:
            clean = self.embed(pixels, self._whole(model))
            target = clean.detach() if options.trades else wanted
        hard = self._loss(
            options.loss, self.embed(attacked, self._whole(model)), target if options.trades else wanted, labels
        )
        value = (1 - options.clean_weight) * hard
        if options.clean_weight:
            easy = squared_distance(clean, wanted)
            value = options.clean_weight * easy + value
            logged["loss_clean"] = easy.detach().mean()
        logged["loss_adversarial"] = hard.detach().mean()
        return Loss(value.sum() / step.items, logged)

    def _whole(self, model: nn.Module) -> nn.Module | None:
        """The trainer's wrapper if there is one, which must see the pass; else None: the embedder steps the encoder."""
        return None if model is self.embed.encoder else model


class FARE(AdversarialEncoder):
    """Embeddings of attacked pictures stay near those that the original encoder gives the clean ones."""

    Options = FareOptions


class TeCoA(AdversarialEncoder):
    """Attacked pictures stay in their class, by the text embeddings of the classes."""

    Options = TecoaOptions


def _module(config: Any, jointly: bool) -> nn.Module:
    return CLIPVisionModelWithProjection(config) if jointly else AutoModel.from_config(config)


@contextmanager
def _without_gradients(module: nn.Module) -> Iterator[None]:
    """Parameters take part without gradients, so that only the pixels' is kept and computed."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def class_embeddings(text: str, names: Sequence[str], template: str) -> Tensor:
    """Unit embeddings [classes, width] of class names.

    Args:
        text: Folder of a CLIP or SigLIP model with its text side, or a .safetensors file with `text` [classes, width].
        template: With {} for the name.

    Raises:
        RecipeError: If there is neither.
    """
    if text.endswith(".safetensors"):
        if not Path(text).is_file():
            raise RecipeError(f"objective.text: {text}: there is no such file")
        state = read_file(Path(text))
        if "text" not in state or state["text"].dim() != 2:
            raise RecipeError(f"objective.text: {text} should hold one tensor, `text` [classes, width]")
        if names and len(names) != len(state["text"]):
            raise RecipeError(f"objective.classes: {len(names)} names, but {len(state['text'])} embeddings in {text}")
        return unit(state["text"].float())
    if not names:
        raise RecipeError("objective.classes: is missing; name a file of class names, one a line")
    if template.count("{}") != 1:
        raise RecipeError(f"objective.template: should hold {{}} once for the class name, not {quoted(template)}")
    from transformers import AutoTokenizer

    folder = local_folder(text)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    if not hasattr(model, "get_text_features"):
        raise RecipeError(f"objective.text: {text} has no text side")
    tokens = AutoTokenizer.from_pretrained(folder)(
        [template.format(n) for n in names], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        found = model.get_text_features(**tokens)
    return unit(found if isinstance(found, Tensor) else found.pooler_output)
