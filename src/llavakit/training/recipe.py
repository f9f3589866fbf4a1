"""Recipes: one validated YAML file says what a model is made of, what it learns from, and in which stages.

This module knows keys, types and dotted paths. It does not know PyTorch: building what a recipe describes is
`training.build`, running it is `training.run`. `docs/recipes.md` explains every key.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from llavakit.data.edits import build_edits
from llavakit.data.paths import is_stream, split_part
from llavakit.data.strict_yaml import YamlError, parse_yaml
from llavakit.errors import RecipeError, UserError, quoted
from llavakit.registry import OBJECTIVES, nearest
from llavakit.training.overrides import override

Schedule = Literal[
    "cosine",
    "linear",
    "constant",
    "constant_with_warmup",
    "cosine_with_min_lr",
    "polynomial",
    "step",
    "cosine_set_after_step",
]
Recomputed = bool | Literal["light"]
Reporter = Literal["tensorboard", "wandb", "trackio", "mlflow"]
Count = Annotated[int, Field(gt=0, lt=2**31)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what NumPy takes
Momentum = Annotated[float, Field(ge=0, lt=1)]
MAX_BYTES = 1 << 24  # of a recipe's file


class Section(BaseModel):
    """Base of all parts of a recipe: unknown keys are errors that name the nearest known key."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_keys_only(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            for key in data:
                if key not in cls.model_fields:
                    hint = nearest(str(key), list(cls.model_fields))
                    raise PydanticCustomError("unknown_key", "{key}: unknown key{hint}", {"key": key, "hint": hint})
            for key, value in data.items():
                types = _types(cls.model_fields[key].annotation)
                if isinstance(value, bool) and bool not in types and types & {int, float}:  # true is not 1
                    said = {"problem": f"{key}: should be a number, not {str(value).lower()}"}
                    raise PydanticCustomError("contradiction", "{problem}", said)
        return data


def _types(annotation: Any) -> set[Any]:
    inner = get_args(annotation)
    return set().union(*map(_types, inner)) if inner else {annotation}


S = TypeVar("S", bound=Section)


class Source(Section):
    """One file or folder of records.

    Attributes:
        path: LLaVA JSON or JSONL, OpenAI-style JSONL, or a Hugging Face dataset on disk; `path#500` takes 500 of it.
            Or a stream: `{000..123}.tar`, `*.parquet`, `hf://NAME`; see `llavakit.data.shards`.
        images: Folder that relative media paths are relative to; default: the folder of `path`.
        weight: How often each record is seen in an epoch, on average (2 is twice, 0.5 is half of them).
        subset: `first:N`, `end:N`, `random:N` or `all`; N a number or a percentage.
        name: What stages call it; default: the file's stem.
        edits: What is done to every conversation, in order: names, or mappings with `type` and options; see
            `llavakit.data.edits`.
        boxes: Box file of its pictures, see `llavakit.data.boxes`.
        split, config: Which part of a Hugging Face dataset (`hf://NAME`).
    """

    path: str
    images: str | None = None
    weight: float = Field(1.0, gt=0, le=1e6)
    subset: str | None = Field(None, pattern=r"^(all|(first|end|random):[\d.]+%?)$")
    name: str = ""
    boxes: str | None = None
    edits: list[str | dict[str, Any]] = Field(default_factory=list)
    split: str | None = None
    config: str | None = None

    @field_validator("edits")
    @classmethod
    def _registered_edits(cls, value: list[Any]) -> list[Any]:
        try:
            build_edits(value)
        except UserError as error:
            raise PydanticCustomError("contradiction", "{problem}", {"problem": str(error)}) from None
        return value

    @model_validator(mode="after")
    def _default_name(self) -> Source:
        path = Path(split_part(self.path)[0])
        pattern = is_stream(self.path) and not re.search(r"\w", re.sub(r"\{[^{}]*\}", "", path.stem))
        self.name = self.name or (path.parent.name if pattern else path.stem)
        return self


class Parts(Section):
    """The parts of a new model: fields of `LlavakitConfig`, the tokenizer, and where weights come from.

    Attributes:
        vision_config: Configuration of the encoder, or the name of a known one.
        tokenizer: Folder of the tokenizer; default: that of `init.language_model`.
        tokens: Tokens that are added to its vocabulary, in this order; their rows begin as the mean of the others.
        init: Part -> checkpoint folder or hub id that its weights are taken from; other parts start at random.
        start_at_mean: Connectors that start with every visual token at the mean embedding of the decoder's vocabulary.
    """

    text_config: dict[str, Any] | None = None
    vision_config: dict[str, Any] | None = None
    connector: dict[str, Any] | None = None
    media: dict[str, dict[str, Any]] | None = None
    extra_encoders: dict[str, dict[str, Any]] | None = None
    extra_connectors: dict[str, dict[str, Any]] | None = None
    language_adapter: dict[str, Any] | None = None
    vision_feature_layer: int | list[int] = -2
    vision_feature_select_strategy: Literal["default", "full", "drop_first"] = "default"
    image_token_id: int | None = None
    template: str = "v1"
    extras: dict[str, Any] | None = None
    processor: dict[str, Any] = Field(default_factory=dict)
    tokenizer: str | None = None
    tokens: list[str] = Field(default_factory=list)
    init: dict[str, str] = Field(default_factory=dict)
    start_at_mean: list[str] = Field(default_factory=list)

    @field_validator("vision_config", mode="before")
    @classmethod
    def _known_tower(cls, value: Any) -> Any:
        if isinstance(value, str):
            from llavakit.vision.known import KNOWN_ENCODERS

            if value not in KNOWN_ENCODERS:
                raise PydanticCustomError(
                    "unknown_tower",
                    "unknown encoder {value}{hint}",
                    {"value": repr(value), "hint": nearest(value, list(KNOWN_ENCODERS))},
                )
            return dict(KNOWN_ENCODERS[value])
        return value


class PartTraining(Section):
    """How one part trains.

    Attributes:
        learning_rate: Its own rate; default: the stage's.
        weight_decay: Its own decay; default: the stage's.
        freeze: Leave it frozen although a larger part that contains it trains.
        rows: Of a table with one row per token (`language_model.embed_tokens`, `lm_head`): train the rows of these
            tokens alone, without weight decay.
    """

    learning_rate: float | None = Field(None, ge=0)
    weight_decay: float | None = Field(None, ge=0)
    freeze: bool = False
    rows: list[str] | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _rows_do_not_decay(self) -> PartTraining:
        if self.rows is not None and self.weight_decay:
            problem = "weight_decay: would also change the rows that do not train; leave it out"
            raise PydanticCustomError("contradiction", "{problem}", {"problem": problem})
        return self


class Lora(Section):
    """Low-rank adapters instead of full training of some parts.

    Attributes:
        parts: Parts whose linear layers get an adapter; they need not be named under `train`.
        targets: Names of linear layers inside the parts (`q_proj`); default: all of them, the head excepted.
        quantize: Keep the frozen weights of the language model in 4 bit (`nf4`) or 8 bit (`int8`); needs bitsandbytes.
        merge: Add the adapter to the weights at the end of the stage; otherwise `final` holds the adapter alone.
    """

    rank: Count = 128
    alpha: float = Field(256, gt=0)
    dropout: float = Field(0.05, ge=0, lt=1)
    parts: list[str] = Field(default_factory=lambda: ["language_model"])
    targets: list[str] | None = None
    quantize: Literal["nf4", "int8"] | None = None
    merge: bool = True


class LossWeights(Section):
    """Factors of the loss terms.

    Attributes:
        text: Next-token cross entropy.
        auxiliary: The term that a language adapter adds (sparsity, balance).
    """

    text: float = 1.0
    auxiliary: float = 1.0


class ObjectiveOptions(Section):
    """What a stage learns; an objective with options of its own has a subclass.

    Attributes:
        type: Name of a registered objective.
    """

    type: str


class Stage(Section):
    """One training stage; see `docs/recipes.md` for every key."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    data: list[str] | None = None
    train: dict[str, PartTraining]
    objective: SerializeAsAny[ObjectiveOptions] = ObjectiveOptions(type="supervised")
    lora: Lora | None = None
    learning_rate: float = Field(ge=0, le=1e6)
    epochs: float = Field(1.0, gt=0, le=1e6)
    max_steps: Count | None = None
    batch_size: Count = 8
    accumulation: Count = 1
    global_batch: Count | None = None
    schedule: Schedule = "cosine"
    schedule_options: dict[str, float] = Field(default_factory=dict)
    warmup: float = Field(0.03, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    decay_rms_norms: bool = False
    decay_everything: bool = False
    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
    epsilon: float = Field(1e-8, gt=0)
    optimizer: str = "adamw_torch_fused"
    clip: float | None = Field(None, gt=0)
    bf16: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: Recomputed | dict[str, Recomputed] = False
    template: str | None = None
    labels: str | dict[str, Any] | None = None
    media: dict[str, dict[str, Any]] | None = None
    packing: bool | Literal["stream"] = False
    max_length: int | None = Field(None, gt=1, lt=2**31)
    group_by_modality: bool = False
    group_by_length: bool = False
    grouping: Literal["megabatch", "stretch", "band"] = "megabatch"
    buffer: Count = 1024
    cache_features: bool | Literal["float16", "float32"] = False
    loss_weights: LossWeights = Field(default_factory=LossWeights)
    save_steps: Count | None = None
    keep: Count = 1
    log_steps: Count = 10
    workers: int = Field(0, ge=0, le=1024)
    shard: bool = False
    seed: Seed | None = None

    @field_validator("train", mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = [value]
        if isinstance(value, Sequence):
            wrong = next((part for part in value if not isinstance(part, str)), None)
            if wrong is not None:
                problem = f"names of parts would be right in the list, not {quoted(wrong)}"
                raise PydanticCustomError("contradiction", "{problem}", {"problem": problem})
            value = dict.fromkeys(value, True)
        if not isinstance(value, Mapping):
            return value
        return {part: _part_training(options) for part, options in value.items()}

    @field_validator("objective", mode="before")
    @classmethod
    def _registered_objective(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {"type": value}
        if not isinstance(value, Mapping):
            return value
        try:
            name = value.get("type", "supervised")
            options = ObjectiveOptions if name == "supervised" else OBJECTIVES.get(name).Options
            return options.model_validate({"type": name, **value})
        except ValidationError as error:
            problem = _first_problem(error)
        except (UserError, TypeError) as error:  # TypeError: a name that is a list
            problem = f"type: {error}"
        raise PydanticCustomError("contradiction", "{problem}", {"problem": problem})

    @field_validator("lora", mode="before")
    @classmethod
    def _lora_switch(cls, value: Any) -> Any:
        return {} if value is True else None if value is False else value

    @model_validator(mode="after")
    def _consistent(self) -> Stage:
        problem = None
        if self.packing and self.max_length is None:
            problem = "packing: needs max_length, the number of tokens in a row"
        elif self.packing and (self.group_by_length or self.group_by_modality):
            problem = "packing: rows are equally long already; switch group_by_length and group_by_modality off"
        elif self.group_by_length and self.group_by_modality:
            problem = "group_by_length: group_by_modality groups by length too; keep one of them"
        elif self.grouping != "megabatch" and not (self.group_by_length or self.group_by_modality):
            problem = "grouping: says how group_by_length or group_by_modality group; switch one of them on"
        elif not any(not part.freeze for part in self.train.values()) and self.lora is None:
            problem = "train: nothing trains; name at least one part"
        elif self.lora and self.lora.quantize and self.shard:
            problem = "shard: quantised weights cannot be sharded; drop lora.quantize or shard"
        if problem:
            raise PydanticCustomError("contradiction", "{problem}", {"problem": problem})
        return self


class HeldOut(Section):
    """Held-out questions, see `llavakit.training.heldout`.

    Attributes:
        questions: Question file of `task` that holds the answers too.
        images: Folder of their media; default: that of the file.
        task: Benchmark that scores the answers.
        every: Steps between two answers while training; default: a fifth of the stage.
        limit: Most questions that are asked at the end.
    """

    questions: str
    images: str | None = None
    task: str = "exact_match"
    every: Count | None = None
    limit: Count = 200


class Recipe(Section):
    """A whole recipe: a checkpoint or parts, data, stages.

    Attributes:
        system: Slug of the published system, recorded in the checkpoint.
        model: Checkpoint to start from, in any known layout; instead of `parts`.
        on_bad_record: What to do with a broken record.
        heldout: Questions that are asked while it trains and at the end.
        output: Folder of all results; see `docs/recipes.md` for its layout.
    """

    system: str | None = None
    model: str | None = None
    parts: Parts | None = None
    data: list[Source] = Field(default_factory=list)
    on_bad_record: Literal["stop", "skip"] = "stop"
    heldout: HeldOut | None = None
    stages: list[Stage] = Field(min_length=1)
    output: str = "runs/unnamed"
    run_name: str | None = None
    report_to: list[Reporter] = Field(default_factory=list)
    seed: Seed = 0

    @field_validator("data", mode="before")
    @classmethod
    def _paths(cls, value: Any) -> Any:
        if isinstance(value, list):
            return [{"path": item} if isinstance(item, str) else item for item in value]
        return value

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        problem = None
        if (self.model is None) == (self.parts is None):
            problem = "model: give either `model` (a checkpoint) or `parts` (a new model)"
        sources = [source.name for source in self.data]
        stages = [stage.name for stage in self.stages]
        for names, where in ((sources, "data"), (stages, "stages")):
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                problem = f"{where}: two are called {twice!r}; give them different names"
        for number, stage in enumerate(self.stages):
            for place, name in enumerate(stage.data or []):
                if name not in sources:
                    problem = f"stages.{number}.data.{place}: no source is called {name!r}{nearest(name, sources)}"
            if stage.lora and not stage.lora.merge and number + 1 < len(self.stages):
                problem = f"stages.{number}.lora.merge: the next stage starts from whole weights; leave merge on"
            if stage.name == "final":
                problem = f"stages.{number}.name: 'final' is the folder of the finished model; choose another"
        if problem:
            raise PydanticCustomError("contradiction", "{problem}", {"problem": problem})
        return self

    def stage_seed(self, number: int) -> int:
        """Seed of a stage: its own, or the recipe's with the stage's number, so that stages differ."""
        own = self.stages[number].seed
        return (self.seed + number) % 2**32 if own is None else own

    def sources_of(self, number: int) -> list[Source]:
        """Sources of a stage, in the order of `data`.

        Raises:
            RecipeError: If it has none.
        """
        wanted = self.stages[number].data
        found = [source for source in self.data if wanted is None or source.name in wanted]
        if not found:
            raise RecipeError(f"stages.{number}.data: there is no data; add sources under `data`")
        return found


def _part_training(options: Any) -> Any:
    if isinstance(options, bool):
        return {"freeze": not options}
    if isinstance(options, (int, float)):
        return {"learning_rate": options}
    return {} if options is None else options


# Reading


def read_yaml(text: str, where: str) -> Any:
    """YAML with numbers such as 1e-3.

    Raises:
        RecipeError: With the line, if it is not YAML.
    """
    try:
        return parse_yaml(text)
    except YamlError as error:
        raise RecipeError(f"{where}{f':{error.line}' if error.line else ''}: {error}") from None


def load_recipe(path: str | Path, overrides: Sequence[str] = (), kind: type[S] = Recipe) -> S:
    """Read and validate a recipe file.

    Args:
        path: YAML file.
        overrides: `dotted.key=value` assignments, values in YAML; list items by number or by their `name`.
        kind: What the file holds.

    Raises:
        RecipeError: One line that names file, dotted path and what would be right.
    """
    path = Path(path)
    try:
        if path.is_file() and path.stat().st_size > MAX_BYTES:
            raise RecipeError(f"{path}: has more than {MAX_BYTES} bytes; name a recipe")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}); name a YAML file") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: is not a text file; name a YAML file") from None
    return parse_recipe(read_yaml(text, str(path)), overrides, str(path), kind)


def parse_recipe(raw: Any, overrides: Sequence[str] = (), where: str = "recipe", kind: type[S] = Recipe) -> S:
    """A recipe from its dict form; see `load_recipe`."""
    if not isinstance(raw, Mapping):
        wanted = next((name for name, field in kind.model_fields.items() if field.is_required()), "model")
        raise RecipeError(f"{where}: holds a {type(raw).__name__}, it should hold a mapping with `{wanted}`")
    raw = copy.deepcopy(dict(raw))  # also what several aliases share
    for assignment in overrides:
        override(raw, assignment)
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(f"{where}: {_first_problem(error)}") from None


def _first_problem(error: ValidationError) -> str:
    details = error.errors()
    unknown = [item for item in details if item["type"] == "unknown_key"]
    return _describe((unknown or details)[0])


_WANTED = {
    "float": "a number",
    "int": "a whole number",
    "bool": "true or false",
    "string": "text",
    "list": "a list",
    "tuple": "a list",
    "dict": "a mapping",
    "model": "a mapping",
}


def _describe(item: ErrorDetails) -> str:
    path = ".".join(str(part) for part in item["loc"] if not str(part).startswith(("function-", "literal[")))
    kind, value = item["type"], item["input"]
    if kind in ("unknown_key", "contradiction"):
        glue = "." if re.match(r"[\w.-]+:", item["msg"]) else ": "
        return f"{path}{glue}{item['msg']}" if path else item["msg"]
    if kind == "string_pattern_mismatch" and path.endswith("subset"):
        return f"{path}: should be all, first:N, end:N or random:N, not {quoted(value)}"
    if kind == "missing":
        return f"{path}: is missing"
    if kind == "literal_error":
        known = re.findall(r"'([^']*)'", item["ctx"]["expected"])
        return f"{path}: {quoted(value)} is not possible{nearest(str(value), known)}"
    wanted = _WANTED.get(kind.split("_")[0])
    if wanted and kind.endswith(("_type", "_parsing", "_from_float", "_attributes_type")):
        path = re.sub(r"\.(bool|int|str|list\[int\])$", "", path)
        return f"{path}: should be {wanted}, not {quoted(value)}"
    message = item["msg"].removeprefix("Input ")
    return f"{path}: {message}, not {quoted(value)}" if message.startswith("should") else f"{path}: {message}"
