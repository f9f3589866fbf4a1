"""The contract of a training objective."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from llavakit.data.records import Record, read_record
from llavakit.errors import RecipeError
from llavakit.registry import OBJECTIVES
from llavakit.training.recipe import ObjectiveOptions, Recipe, Stage

if TYPE_CHECKING:
    from rich.console import Console

    from llavakit.training.dataset import PreparedSamples

# Keys of a stage that say how its samples are prepared: an objective honours those that it names in `uses`.
PREPARING = (
    "template",
    "labels",
    "media",
    "packing",
    "max_length",
    "group_by_modality",
    "group_by_length",
    "cache_features",
    "loss_weights",
    "lora",
    "shard",
)


@dataclass(frozen=True)
class Loss:
    """What an objective gives for a batch.

    Attributes:
        value: The sum over what `Objective.items` counts in this batch, divided by `Step.items`; gradients flow from
            it.
        logged: Further values for the loss curve by name; each is averaged over the batches between two log lines.
    """

    value: Tensor
    logged: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """Position of a batch within an optimiser step.

    Attributes:
        items: Sum of `Objective.items` over all batches of the step, of all processes, at least 1.
        batches: Number of these batches.
    """

    items: Tensor
    batches: int


@dataclass(frozen=True)
class Run:
    """A stage that is about to train, for `Objective.begin`.

    Attributes:
        recipe, stage, seed: What is run; `seed` is the stage's.
        folder: Of the stage.
        cache: Folder for what is worth keeping between stages and runs.
        module: The module that is trained, without any wrapper.
        wrapped: What the trainer trains: with LoRA the module inside PEFT's.
        processor: Of the module.
        samples: Of the stage; `llavakit.training.streaming.StreamSamples` where it learns from a stream.
        start: Makes what the stage started from once more, also where it goes on after a kill: (module, processor),
            for a frozen reference.
        console: Where progress is shown.
        world: Number of processes.
    """

    recipe: Recipe
    stage: Stage
    seed: int
    folder: Path
    cache: Path
    module: nn.Module
    wrapped: nn.Module
    processor: Any
    samples: PreparedSamples
    start: Callable[[], tuple[nn.Module, Any]]
    console: Console
    world: int


class Objective:
    """Base class; instances live as long as one stage, or its check, and are registered by class.

    The methods are called in this order: `describe`, `skeleton`, `bind` and the sample methods when a recipe is
    checked; then, in a new instance, `build` or `load`, `fit`, `bind`, `begin`, `collator`, and in every step `items`
    of all batches and `loss` of each; at last `save`. Sample methods also run in the worker processes of a data loader.

    Attributes:
        Options: Class of `Stage.objective`: pydantic fields are the options.
        uses: Keys of the stage, of `PREPARING`, that it honours; others are refused where they are given.
        family: What kind of module it trains. All stages of a recipe train the same, one after the other.
        streams: Whether it can learn from a stream: its samples must not be looked at before they are trained.
        flat: Set by `begin`: whether packed batches are one row without padding.
    """

    Options: ClassVar[type[ObjectiveOptions]] = ObjectiveOptions
    uses: ClassVar[frozenset[str]] = frozenset()
    family: ClassVar[str] = "model"
    streams: ClassVar[bool] = True
    flat: bool = False

    def __init__(self, stage: Stage) -> None:
        self.stage, self.options = stage, stage.objective

    # the module

    def describe(self, recipe: Recipe) -> tuple[Any, Any]:
        """Configuration and processor of the module that a recipe starts from, without its weights.

        Raises:
            RecipeError, CheckpointError: One clear line.
        """
        raise NotImplementedError(f"{type(self).__name__} must define describe")

    def skeleton(self, config: Any) -> nn.Module:
        """The module on meta tensors, as this stage trains it."""
        raise NotImplementedError(f"{type(self).__name__} must define skeleton")

    def build(self, recipe: Recipe) -> tuple[nn.Module, Any]:
        """Module and processor that the first stage starts from."""
        raise NotImplementedError(f"{type(self).__name__} must define build")

    def load(self, folder: Path) -> tuple[nn.Module, Any]:
        """Module and processor that `save` wrote."""
        raise NotImplementedError(f"{type(self).__name__} must define load")

    def save(self, state: Mapping[str, Tensor], config: Any, processor: Any, folder: Path) -> None:
        """Write the module.

        Args:
            state: All its tensors, under the names of its `state_dict`.
            config: The configuration of the module as it was loaded.
        """
        raise NotImplementedError(f"{type(self).__name__} must define save")

    def fit(self, module: nn.Module) -> None:
        """Change what of the module belongs to this stage alone, before anything is frozen or wrapped."""

    # from records to batches

    def bind(self, config: Any, processor: Any) -> None:
        """Get ready to prepare samples for a module."""

    def read(self, raw: Any, file: str, line: int, **options: Any) -> Record:
        """A checked record; `messages` hold its media, whatever else it needs stays in `raw`.

        Args:
            options: See `llavakit.data.records.read_record`.

        Raises:
            RecordError: With the field that is wrong.
        """
        return read_record(raw, file, line, **options)

    def encode(self, record: Record, *, media: bool = True) -> dict[str, Any]:
        """The sample of a record.

        Args:
            media: Whether media are decoded; without them the sample must still have its `length`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define encode")

    def check(self, sample: dict[str, Any], record: Record) -> dict[str, Any]:
        """The sample, perhaps cut.

        Raises:
            RecordError: If nothing can be learned from it.
        """
        return sample

    def length(self, sample: Mapping[str, Any]) -> int:
        """Positions that a sample takes in a row, negative if it has no media."""
        return 1

    def size(self, sample: Mapping[str, Any]) -> int:
        """Bytes of memory that a sample takes while it is remembered."""
        return 512 + sum(tensor.nbytes for value in sample.values() for tensor in _tensors(value))

    def collator(self, run: Run) -> Callable[[Sequence[Any]], Any]:
        """Makes a batch of samples: a dict, with `tokens`, the number of positions that are no padding.

        A sample may be a `llavakit.training.dataset.Failure`, which is then the batch. It must be small, since it goes
        to the workers of data loaders.
        """
        raise NotImplementedError(f"{type(self).__name__} must define collator")

    # learning

    def begin(self, run: Run) -> None:
        """Once per process, before batches are planned: fill caches, freeze a copy of what the stage starts from."""

    def items(self, batch: Mapping[str, Any]) -> Tensor | int:
        """How many items the loss of a batch is a sum of."""
        raise NotImplementedError(f"{type(self).__name__} must define items")

    def loss(self, model: nn.Module, batch: dict[str, Any], step: Step) -> Loss:
        """The loss of a batch.

        Args:
            model: The module in whatever the trainer wrapped it (PEFT, DDP, shards).
            batch: As `collator` made it, on the module's device.
        """
        raise NotImplementedError(f"{type(self).__name__} must define loss")


def _tensors(value: Any) -> list[Tensor]:
    items = value if isinstance(value, (list, tuple)) else [value]
    return [item for item in items if isinstance(item, Tensor)]


def objective_of(stage: Stage) -> Objective:
    """The objective of a stage.

    Raises:
        RecipeError: If the stage has keys that the objective does not honour.
    """
    cls = OBJECTIVES.get(stage.objective.type)
    for key in PREPARING:
        if key not in cls.uses and getattr(stage, key) != Stage.model_fields[key].get_default(
            call_default_factory=True
        ):
            known = ", ".join(sorted(cls.uses)) or "none of its kind"
            raise RecipeError(f"{key}: objective {stage.objective.type!r} does not use it; it uses {known}")
    return cls(stage)
