"""Building what a recipe describes: the configuration, the model (with or without memory), the processor.

Knows parts and checkpoints; knows nothing of stages. A part whose weights no file gives starts at random, with the
recipe's seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, set_seed

from llavakit.checkpoints.adapters import CONFIG as ADAPTER
from llavakit.checkpoints.encoders import encoder_options, is_published_form, read_encoder
from llavakit.checkpoints.fields import UNDECLARED
from llavakit.checkpoints.files import read_json
from llavakit.checkpoints.layouts import published
from llavakit.checkpoints.opening import (
    build,
    load_processor,
    load_tokenizer,
    local_folder,
    names_in_memory,
    open_checkpoint,
)
from llavakit.connectors.base import Connector
from llavakit.conversation.template import template_for
from llavakit.errors import CheckpointError, RecipeError, UserError
from llavakit.model.configuration import LlavakitConfig, build_config, register_encoder
from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.model.processing import LlavakitProcessor
from llavakit.model.routes import MediaSpec
from llavakit.registry import ENCODERS, nearest
from llavakit.system import get_system
from llavakit.training.recipe import Parts, Recipe

VOCABULARY_MULTIPLE = 64
# Keys that some releases of transformers take without listing them.
_MORE_KEYS = {"rope_theta", "rope_scaling", "torch_dtype", *UNDECLARED}


def checked_config(
    options: Mapping[str, Any], default_type: str, where: str, below: PreTrainedConfig | None = None
) -> PreTrainedConfig:
    """The configuration of a part, of which every key is known (transformers itself takes any).

    Args:
        options: `model_type` (of transformers, llavakit or a system) and its fields.
        where: Dotted path, for messages.
        below: The configuration of the checkpoint that the part's weights come from: what `options` does not say.

    Raises:
        RecipeError: If the model type or a key is unknown, or a value has the wrong type.
    """
    options = dict(options)
    own_type = below.model_type if below is not None else default_type
    kind = options.pop("model_type", own_type)
    if not isinstance(kind, str) or (kind not in CONFIG_MAPPING and kind not in ENCODERS):
        known = [*CONFIG_MAPPING, *ENCODERS]
        raise RecipeError(f"{where}.model_type: there is no {kind!r}{nearest(str(kind), known)}")
    if below is not None and kind != own_type:
        raise RecipeError(f"{where}.model_type: is {kind!r}, but the checkpoint under parts.init is a {own_type!r}")
    if kind not in CONFIG_MAPPING:
        register_encoder(kind)
    cls = CONFIG_MAPPING[kind]
    known = [*cls().to_dict(), *cls.attribute_map, *_MORE_KEYS]
    for key in options:
        if key not in known:
            raise RecipeError(f"{where}.{key}: unknown key of a {kind} configuration{nearest(key, known)}")
    if below is not None:
        options = _over(below, {cls.attribute_map.get(key, key): value for key, value in options.items()})
    try:
        return cls(**options)
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise RecipeError(f"{where}: {str(error).strip().splitlines()[-1].strip()}") from None


def _over(below: PreTrainedConfig, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options on top of a configuration; lists with an entry per layer go if the number of layers changes."""
    own = {key: value for key, value in below.to_dict().items() if key != "model_type"}
    layers = own.get("num_hidden_layers")
    if layers is not None and options.get("num_hidden_layers", layers) != layers:
        own = {key: value for key, value in own.items() if not (isinstance(value, list) and len(value) == layers)}
    return own | dict(options)


def config_of(recipe: Recipe, *, read_sources: bool = True) -> LlavakitConfig:
    """The configuration of the recipe's model.

    Args:
        read_sources: Take what `text_config` and `vision_config` leave open from the checkpoints under `parts.init`;
            otherwise from transformers' defaults, without looking for the checkpoints.

    Raises:
        RecipeError: If a part is misspelt or does not fit.
    """
    if recipe.parts is None:
        return open_checkpoint(str(recipe.model)).config
    if recipe.system is not None:
        try:
            get_system(recipe.system)
        except UserError as error:
            raise RecipeError(f"system: {error}") from None
    parts = recipe.parts
    fields: dict[str, Any] = {
        name: getattr(parts, name)
        for name in LlavakitConfig.__annotations__
        if name in Parts.model_fields and getattr(parts, name) is not None
    }
    for name in ("text_config", "vision_config"):
        if name == "text_config" or parts.media != {} or parts.vision_config or "vision_tower" in parts.init:
            fields[name] = part_config(parts, name, read_sources=read_sources)
    for name, encoder in (parts.extra_encoders or {}).items():
        if "config" in encoder:
            where = f"parts.extra_encoders.{name}.config"
            config = checked_config(encoder["config"], "clip_vision_model", where)
            fields["extra_encoders"] = fields["extra_encoders"] | {name: encoder | {"config": config.to_dict()}}
    text = fields["text_config"]
    fields.setdefault("image_token_id", text.vocab_size)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(text, key, None) is not None:
            fields[key] = getattr(text, key)
    try:
        config = LlavakitConfig(**fields, system=recipe.system)
        MediaSpec(config).check_vocabulary(text.vocab_size + len(parts.tokens))
    except UserError as error:
        raise RecipeError(f"parts: {error}") from None
    except (TypeError, ValueError, KeyError, StrictDataclassError) as error:
        raise RecipeError(f"parts: {str(error).strip().splitlines()[-1].strip()}") from None
    return config


def part_config(parts: Parts, name: str, *, read_sources: bool = True) -> PreTrainedConfig:
    """`text_config` or `vision_config` of a recipe's parts; see `config_of`.

    Raises:
        RecipeError: If neither the recipe nor a checkpoint gives it.
    """
    part, default = {
        "text_config": ("language_model", "llama"),
        "vision_config": ("vision_tower", "clip_vision_model"),
    }[name]
    given, source = getattr(parts, name), parts.init.get(part)
    below = None
    if source is not None and (given is None or read_sources):
        below = _config_in(local_folder(source), name)
    if given is not None:
        return checked_config(given, default, f"parts.{name}", below)
    if below is None:
        raise RecipeError(f"parts.{name}: is missing; give it, or a checkpoint under parts.init")
    return below


def _config_in(folder: Path, name: str) -> PreTrainedConfig:
    """The configuration `text_config` or `vision_config` of a checkpoint, or of a model that is that part alone."""
    if name == "vision_config" and is_published_form(folder):
        options = encoder_options(folder)
        return build_config(options, options["model_type"])
    raw = read_json(folder / "config.json")
    layout = published(folder, raw)
    if layout is not None:
        options = layout.part_config(folder, raw, name)
        return build_config(options, options["model_type"])
    if raw.get("model_type") in ENCODERS and raw["model_type"] not in CONFIG_MAPPING:
        register_encoder(raw["model_type"])
    config = AutoConfig.from_pretrained(folder)
    nested = getattr(config, name, None)
    return nested if nested is not None and hasattr(nested, "model_type") else config


def build_meta(recipe: Recipe) -> LlavakitForConditionalGeneration:
    """The recipe's model on meta tensors: every name and shape at published scale, no memory."""
    config = config_of(recipe, read_sources=False)
    with torch.device("meta"):
        return LlavakitForConditionalGeneration(config)


def build_model(recipe: Recipe) -> tuple[LlavakitForConditionalGeneration, LlavakitProcessor]:
    """The model and processor that the first stage starts from, float32 unless a checkpoint says otherwise.

    Raises:
        RecipeError, CheckpointError: One clear line.
    """
    if recipe.parts is None:
        return load_checkpoint(str(recipe.model))
    config = config_of(recipe)
    processor = build_processor(recipe, config)
    config.image_token_id = processor.image_token_id
    set_seed(recipe.seed)
    model = LlavakitForConditionalGeneration(config)
    for part, source in recipe.parts.init.items():
        _initialise(model, part, source)
    _start_at_mean(model, recipe.parts)
    _fit_vocabulary(model, processor)
    return model, processor


def _start_at_mean(model: LlavakitForConditionalGeneration, parts: Parts) -> None:
    """Let connectors start where every visual token is the mean of the embeddings."""
    connectors = {name: part for name, part in model.model.named_children() if isinstance(part, Connector)}
    for number, name in enumerate(parts.start_at_mean):
        where = f"parts.start_at_mean.{number}"
        if name not in connectors:
            raise RecipeError(f"{where}: the model has no connector {name!r}{nearest(name, list(connectors))}")
        if name in parts.init:
            raise RecipeError(f"{where}: {name} gets its weights from {parts.init[name]}; leave one of them out")
        try:
            connectors[name].start_at(model.get_input_embeddings().weight.detach().mean(0))
        except UserError as error:
            raise RecipeError(f"{where}: {error}") from None


def build_processor(recipe: Recipe, config: LlavakitConfig) -> LlavakitProcessor:
    """The processor that the first stage starts from.

    Raises:
        RecipeError, CheckpointError: One clear line.
    """
    if recipe.parts is None:
        return load_processor(open_checkpoint(str(recipe.model)))
    parts = recipe.parts
    known = ("sampling", "reading")
    for key in parts.processor:
        if key not in known:
            raise RecipeError(f"parts.processor.{key}: unknown key{nearest(str(key), list(known))}")
    try:
        tokenizer = _tokenizer(parts, config)
        template_for(parts.template, tokenizer)
        return LlavakitProcessor.from_config(config, tokenizer, template=parts.template, **parts.processor)
    except (RecipeError, CheckpointError):
        raise
    except UserError as error:
        raise RecipeError(f"parts: {error}") from None


def load_checkpoint(folder: str | Path) -> tuple[LlavakitForConditionalGeneration, LlavakitProcessor]:
    """Model and processor of a checkpoint in any known layout."""
    checkpoint = open_checkpoint(folder)
    model, processor = build(checkpoint), load_processor(checkpoint)
    model.config.image_token_id = processor.image_token_id
    _fit_vocabulary(model, processor)
    return model, processor


def _tokenizer(parts: Parts, config: LlavakitConfig) -> Any:
    source = parts.tokenizer or parts.init.get("language_model")
    if source is None:
        raise RecipeError("parts.tokenizer: is missing; name the folder of a tokenizer")
    tokenizer = load_tokenizer(local_folder(source), config=config)
    for token in parts.tokens:  # one by one: a set of new tokens would be sorted
        tokenizer.add_special_tokens({"additional_special_tokens": [token]}, replace_extra_special_tokens=False)
    return tokenizer


def _fit_vocabulary(model: LlavakitForConditionalGeneration, processor: LlavakitProcessor) -> None:
    """Grow the embedding if the tokenizer has ids beyond it; new rows are the mean of the old ones."""
    text = model.config.text_config
    known = text.vocab_size
    own = (number for number in processor.tokenizer.get_vocab().values() if number != processor.image_token_id)
    highest = max(own)  # the placeholder is never looked up, so it may lie outside
    if highest < known:
        return
    model.resize_token_embeddings(highest + 1, pad_to_multiple_of=VOCABULARY_MULTIPLE, mean_resizing=False)
    tables = {id(layer.weight): layer.weight for layer in (model.get_input_embeddings(), model.lm_head)}
    with torch.no_grad():
        for table in tables.values():
            table[known:] = table[:known].mean(0)
    text.vocab_size = len(model.get_input_embeddings().weight)


def _initialise(model: LlavakitForConditionalGeneration, part: str, source: str) -> None:
    """Give one part the weights of a checkpoint."""
    where = f"parts.init.{part}"
    single = dict(model.model.named_parameters(recurse=False))  # image_newline
    known = [*(name for name, _ in model.model.named_children()), *single]
    if part not in known:
        raise RecipeError(f"{where}: the model has no such part{nearest(part, known)}")
    folder = local_folder(source)
    module = None if part in single else model.model.get_submodule(part)
    raw = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    layout = published(folder, raw)
    if layout is None and raw.get("model_type") != LlavakitConfig.model_type:
        if part == "language_model":
            source_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            _copy(module, source_model.base_model.state_dict(), where)
            head = source_model.get_output_embeddings()
            if head is not None and not model.config.tie_word_embeddings:
                _copy(model.lm_head, head.state_dict(), where)
            return
        if part == "vision_tower" or part in model.config.extra_encoders:
            initialise_encoder(module, source, where)
            return
    adapted = (folder / ADAPTER).is_file() and part == "language_model"
    own = layout is not None and not adapted
    state = layout.read_own(folder, raw) if own else open_checkpoint(folder).state
    state = names_in_memory(model, state)
    if module is None:
        if f"model.{part}" not in state:
            raise RecipeError(f"{where}: {source} holds no {part}")
        given = state[f"model.{part}"]
        if given.shape != single[part].shape:
            raise RecipeError(f"{where}: has {list(given.shape)} in {source}, {list(single[part].shape)} in the model")
        single[part].data.copy_(given)
        return
    prefix = f"model.{part}."
    _copy(module, {name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)}, where)
    if part == "language_model" and not model.config.tie_word_embeddings:
        head = {name.removeprefix("lm_head."): state[name] for name in state if name.startswith("lm_head.")}
        _copy(model.lm_head, head, where)


def initialise_encoder(module: nn.Module, source: str, where: str) -> None:
    """Give an encoder the weights of a checkpoint: of an encoder, of a model of two towers, or of a whole model.

    Raises:
        CheckpointError: If they do not fit.
    """
    folder = local_folder(source)
    own_form = is_published_form(folder)
    raw = {} if own_form else read_json(folder / "config.json")
    layout = None if own_form else published(folder, raw)
    if layout is not None or raw.get("model_type") == LlavakitConfig.model_type:
        state: Mapping[str, Tensor] = layout.read_own(folder, raw) if layout else open_checkpoint(folder).state
        state = {n.removeprefix("model.vision_tower."): state[n] for n in state if n.startswith("model.vision_tower.")}
    elif own_form:
        state = read_encoder(folder)
    else:
        if raw.get("model_type") in ENCODERS and raw["model_type"] not in CONFIG_MAPPING:
            register_encoder(raw["model_type"])
        whole = AutoModel.from_pretrained(folder, dtype=torch.float32)
        state = getattr(whole, "vision_model", whole).state_dict()
    if all(
        name.startswith("vision_model.") for name in module.state_dict()
    ):  # some transformers releases wrap encoders
        state = {f"vision_model.{name.removeprefix('vision_model.')}": tensor for name, tensor in state.items()}
    with torch.no_grad():
        _copy(module, state, where)


def _copy(module: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    own = module.state_dict()
    missing = [name for name in own if name not in state]
    if missing:
        raise CheckpointError(f"{where}: tensor {missing[0]!r} is missing from the checkpoint")
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise CheckpointError(
                f"{where}: tensor {name!r} has shape {list(state[name].shape)}, "
                f"the recipe calls for {list(tensor.shape)}"
            )
        tensor.copy_(state[name])


def merged_media(config: LlavakitConfig, changes: Mapping[str, Mapping[str, Any]] | None) -> LlavakitConfig:
    """The configuration with a stage's own `media`: whole sections (`views`, `arrange`) are replaced."""
    if not changes:
        return config
    media = {kind: {**config.media.get(kind, {}), **sections} for kind, sections in changes.items()}
    copied = LlavakitConfig.from_dict(config.to_dict())
    copied.media = {**config.media, **media}
    return copied
