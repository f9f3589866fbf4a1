"""Open any checkpoint that llavakit knows.

`open_checkpoint` gives configuration and lazily read tensors; `build` makes a model of them, `load_processor` its
processor.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from llavakit.checkpoints import adapters, layouts
from llavakit.checkpoints.adapter_base import TRAINED, find_base
from llavakit.checkpoints.classic import ClassicLayout
from llavakit.checkpoints.encoder_names import to_disk, to_memory
from llavakit.checkpoints.encoders import encoder_options, read_encoder
from llavakit.checkpoints.fields import Fields, check_known, compare_values
from llavakit.checkpoints.files import (
    LazyState,
    assign_state,
    naming,
    read_file,
    read_folder,
    read_json,
)
from llavakit.checkpoints.text import (
    chat_template_of,
    eos_ids,
    known_template,
    read_generation,
    read_tokenizer,
    tokenizer_folder,
)
from llavakit.conversation.template import OWN, PLACEHOLDER, get_template
from llavakit.errors import CheckpointError, UserError, quoted
from llavakit.model.configuration import LlavakitConfig, build_config
from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.model.processing import LlavakitImageProcessorPil, LlavakitProcessor, architecture_of
from llavakit.model.routes import MediaSpec


@dataclass
class Checkpoint:
    """An opened checkpoint.

    Attributes:
        folder: Where its files are.
        layout: "llavakit" or the name of the published layout.
        config: llavakit's configuration.
        state: Tensors under llavakit's names, read when asked for.
        base: What an adapter folder's adapter was put on.
        generation: The object in generation_config.json, empty if there is none.
        template: The template that was asked for instead of the model's own.
        exchanged: Whether the encoder is another one than that of the files.
    """

    folder: Path
    layout: str
    config: LlavakitConfig
    state: LazyState
    base: Checkpoint | None = None
    generation: dict[str, Any] = field(default_factory=dict)
    template: str | None = None
    exchanged: bool = False


def local_folder(model: str | Path) -> Path:
    """A local folder for a folder or a hub id; a hub id is downloaded into the hub's cache (safetensors preferred).

    Raises:
        CheckpointError: If it is neither.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.suffix == ".gguf" and path.exists():
        raise CheckpointError(
            f"{path}: is a GGUF file; llavakit convert {path.name} FOLDER --to hf makes a model of it"
        )
    if path.exists():
        raise CheckpointError(f"{path}: is a file; a model is a folder that holds config.json and weights")
    if str(model).count("/") != 1 or str(model).startswith((".", "/", "~")):
        raise CheckpointError(f"{model}: no such folder; name a model folder or a hub id such as owner/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.bin", "*.model", "*.jinja", "*.txt", "*_checkpoint.pt"]
    try:
        return Path(snapshot_download(str(model), allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{model}: not a local folder, and the hub did not deliver it ({reason})") from None


def local_file(source: str | Path, name: str) -> Path:
    """A local file for a file, a folder that holds `name`, or a hub id, from which `name` is downloaded.

    Raises:
        CheckpointError: If there is no such file.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir() or str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        if not (path / name).is_file():
            raise CheckpointError(f"{path / name}: no such file")
        return path / name
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(str(source), name))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{source}: no local folder, and the hub did not deliver {name} ({reason})") from None


def _read_config(folder: Path) -> dict[str, Any]:
    """The object in config.json; the keys by which layouts are told apart have their types."""
    raw = read_json(folder / "config.json")
    if not isinstance(raw.get("model_type", ""), str):
        raise CheckpointError(f"{folder / 'config.json'}: model_type is {quoted(raw['model_type'])}, not a string")
    names = raw.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise CheckpointError(f"{folder / 'config.json'}: architectures is {quoted(names)}, not a list of strings")
    return raw


def open_checkpoint(
    model: str | Path,
    *,
    base: str | Path | None = None,
    vision_tower: str | Path | None = None,
    template: str | None = None,
    exchange_vision_tower: bool = False,
) -> Checkpoint:
    """Open a checkpoint in any known layout.

    Args:
        model: Folder or hub id.
        base: Folder or hub id of the language model, for LoRA and connector-only files; of the whole model for a
            folder that holds an adapter alone.
        vision_tower: Folder or hub id of the encoder, for files that do not contain it; of several encoders
            `NAME=FOLDER,NAME=FOLDER` with the names that they have in the model.
        template: Name of the template to use instead of the model's own.
        exchange_vision_tower: Use the encoder `vision_tower` in place of the one that the files contain.

    Raises:
        CheckpointError: One clear line.
        UserError: If there is no such template.
    """
    if template is not None and template != OWN:
        get_template(template)
    folder = local_folder(model)
    if (folder / adapters.CONFIG).is_file() and not (folder / "config.json").is_file():
        below = open_checkpoint(find_base(folder, base), vision_tower=vision_tower, template=template)
        return _with_adapter(below, folder)
    given = {"base": base, **_encoder_sources(vision_tower)}
    sources = {name: local_folder(place) for name, place in given.items() if place is not None}
    implied = None if (folder / "config.json").is_file() else layouts.implied_config(folder, sources.get("base"))
    raw = _read_config(folder) if implied is None else implied
    if exchange_vision_tower:
        new = next((place for name, place in sources.items() if name.partition(".")[0] == "encoder"), None)
        if new is None:
            raise UserError("--exchange-vision-tower: name the new encoder with --vision-tower")
        sources["exchange"] = new
    with naming(folder / "config.json"):
        if raw.get("model_type") == LlavakitConfig.model_type:
            config, state = read_own(folder, raw)
            layout, name = None, "llavakit"
        else:
            layout, fields = layouts.detect(folder, raw), Fields(raw)
            config, state = layout.read(folder, fields, sources)
            fields.finish(layout.inert)
            name = f"{layout.system} ({layout.form})"
        if exchange_vision_tower and not isinstance(layout, ClassicLayout):  # those do it while they read
            config, state = exchange_encoder(config, state, sources["exchange"])
        config.check()
        MediaSpec(config)
    generation = read_generation(folder, sources.get("base"))
    if ends := eos_ids(generation):
        config.eos_token_id = ends if len(ends) > 1 else ends[0]
    if template is not None:
        config.template = template
    checkpoint = Checkpoint(
        folder, name, config, state, generation=generation, template=template, exchanged=exchange_vision_tower
    )
    adapted = layout is not None and (folder / adapters.CONFIG).is_file()
    return _with_adapter(checkpoint, folder, layout) if adapted else checkpoint


def exchange_encoder(config: LlavakitConfig, state: LazyState, folder: Path) -> tuple[LlavakitConfig, LazyState]:
    """A model with another main encoder; connector and language model stay as they are.

    Views as large as the old encoder's pictures get the size of the new one's.

    Args:
        folder: Of the new encoder.

    Raises:
        CheckpointError: If the folder holds no encoder, or one whose features the connector cannot read.
    """
    options, old = encoder_options(folder), config.vision_config
    if options is None or old is None:
        raise CheckpointError(f"{folder if options is None else 'config.json'}: there is no vision encoder to exchange")
    new = build_config(options, options["model_type"])
    width, known = getattr(new, "hidden_size", None), getattr(old, "hidden_size", None)
    if width != known:
        raise CheckpointError(
            f"{folder}: the encoder's features have {width} channels, the connector was trained for {known}; "
            "name an encoder of the same width"
        )
    raw, before = config.to_dict(), getattr(old, "image_size", None)
    raw["vision_config"] = new.to_dict()
    raw["media"] = _resized(raw["media"], before, getattr(new, "image_size", before))
    rest = state.renamed(lambda name: None if name.startswith("model.vision_tower.") else name)
    tower = read_encoder(folder).renamed(lambda name: f"model.vision_tower.{name}")
    changed = LlavakitConfig.from_dict(raw)
    return changed, rest.joined(to_disk(changed, tower))


def _resized(value: Any, before: int | None, after: int | None) -> Any:
    """Media options with the sizes of views that were `before` set to `after`."""
    if not isinstance(value, dict):
        return value
    return {
        key: after if key in ("size", "crop") and item == before else _resized(item, before, after)
        for key, item in value.items()
    }


def _encoder_sources(vision_tower: str | Path | None) -> dict[str, str | Path | None]:
    """Sources of the encoders: one, or several as `NAME=FOLDER,NAME=FOLDER`."""
    if "=" not in str(vision_tower):
        return {"encoder": vision_tower}
    found: dict[str, str | Path | None] = {}
    for part in str(vision_tower).split(","):
        name, equals, place = part.partition("=")
        if not (name and equals and place):
            raise UserError(f"--vision-tower: {quoted(part)} should be NAME=FOLDER, the name that of an encoder")
        found[f"encoder.{name}"] = place
    return found


def _with_adapter(below: Checkpoint, folder: Path, layout: layouts.Layout | None = None) -> Checkpoint:
    """An opened checkpoint with the adapter of a folder merged.

    Args:
        below: The model that was adapted.
        layout: The layout of `folder`, if the folder holds more than an adapter.
    """
    with naming(folder / adapters.CONFIG):
        options = adapters.adapter_options(read_json(folder / adapters.CONFIG), str(folder / adapters.CONFIG))
    state = adapters.merge(
        to_memory(below.config, below.state),
        read_folder(folder, "adapter_model"),
        options,
        skeleton(below),
        str(folder),
        namings=[layouts.rename_with(layout.renames_out(below.config))] if isinstance(layout, ClassicLayout) else (),
        optional=lambda name: layout is not None and "vision_tower." in name,  # the authors adapted before adding it
    )
    if (folder / TRAINED).is_file():
        state = state.joined(to_memory(below.config, read_file(folder / TRAINED)))
    state = to_disk(below.config, state)
    config = adapters.untied(below.config, state)
    base = below if layout is None else None
    return Checkpoint(folder, below.layout, config, state, base, below.generation, below.template)


def read_own(folder: Path, raw: dict[str, Any]) -> tuple[LlavakitConfig, LazyState]:
    """Configuration and tensors of llavakit's own layout."""
    config = LlavakitConfig.from_dict(raw)
    check_known(config, raw, "config.json")
    for part in ("text_config", "vision_config"):
        if raw.get(part):
            check_known(getattr(config, part), raw[part], f"config.json: {part}")
    return config, to_disk(config, read_folder(folder))


def names_in_memory(model: torch.nn.Module, state: LazyState) -> LazyState:
    """Tensors under the names that the installed transformers release gives them."""
    state = to_memory(model.config, state)
    wrapped = any("_tower.vision_model." in name for name in model.state_dict())
    return state.renamed(lambda n: n.replace("_tower.", "_tower.vision_model.", 1)) if wrapped else state


def build(
    checkpoint: Checkpoint, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> LlavakitForConditionalGeneration:
    """The model of an opened checkpoint, in evaluation mode; every tensor is checked.

    Raises:
        CheckpointError: If a tensor is missing, superfluous or misshaped.
    """
    model = skeleton(checkpoint)
    check_tied(model, checkpoint)
    state = names_in_memory(model, checkpoint.state)
    assign_state(model, state, where=str(checkpoint.folder), dtype=dtype, device=device)
    _materialise_buffers(model, device)
    model.tie_weights()
    return model.eval()


def skeleton(checkpoint: Checkpoint) -> LlavakitForConditionalGeneration:
    """The model on meta tensors: every name and shape."""
    with torch.device("meta"), naming(checkpoint.folder / "config.json"):
        return LlavakitForConditionalGeneration(checkpoint.config)


def check_tied(model: LlavakitForConditionalGeneration, checkpoint: Checkpoint) -> None:
    """A head that the configuration ties to the embedding, and the files hold all the same, must equal it."""
    state = checkpoint.state
    for head, table in model._tied_weights_keys.items():
        if head in state and table in state and not torch.equal(state[head], state[table]):
            raise CheckpointError(
                f"{checkpoint.folder}: config.json ties {head} to {table}, and the files hold two different tensors; "
                "set tie_word_embeddings to false, or take the wrong tensor out"
            )


def _materialise_buffers(model: torch.nn.Module, device: str | torch.device) -> None:
    """Buffers that no file holds (rotary frequencies, position ids) are computed by their modules' constructors.

    A module that owns such buffers is constructed again off the meta device from the configuration it keeps, or as a
    part of the nearest model around it.
    """
    models: dict[str, torch.nn.Module] = {}
    for path, module in model.named_modules():
        pending = [name for name, buffer in module._buffers.items() if buffer is not None and buffer.is_meta]
        if not pending:
            continue
        fresh = type(module)(module.config) if hasattr(module, "config") else _built_around(model, path, models)
        for name in pending:
            module.register_buffer(name, fresh._buffers[name].to(device), persistent=False)


def _built_around(model: torch.nn.Module, path: str, built: dict[str, torch.nn.Module]) -> torch.nn.Module:
    """A part without a configuration, newly constructed within the nearest model around it that needs nothing else."""
    steps = path.split(".")
    for length in range(len(steps) - 1, -1, -1):
        owner = ".".join(steps[:length])
        around = model.get_submodule(owner)
        if not isinstance(around, PreTrainedModel):
            continue
        if owner not in built:
            try:
                built[owner] = type(around)(around.config)
            except TypeError:  # a part of a model that is a model by its class alone
                continue
        return built[owner].get_submodule(".".join(steps[length:]))
    raise ValueError(f"{path}: its buffers belong to no model")


def load_tokenizer(folder: Path, base: Path | None = None, config: LlavakitConfig | None = None) -> Any:
    """The tokenizer in a model folder, or in its language model's folder.

    Raises:
        CheckpointError: If there is none.
    """
    place = tokenizer_folder(folder, base)
    if place is None:
        raise CheckpointError(f"{folder}: no tokenizer; it should hold tokenizer.json, tokenizer.model or vocab.json")
    with naming(place / "tokenizer.json"):
        tokenizer = read_tokenizer(place, config and config.text_config)
        tokenizer("a b")  # some values of tokenizer_config.json are looked at no sooner
        return tokenizer


def load_processor(checkpoint: Checkpoint, base: Path | None = None) -> LlavakitProcessor:
    """The processor of an opened checkpoint: its own, or the one that its layout implies."""
    folder, config = checkpoint.folder, checkpoint.config
    if checkpoint.base is not None and not (folder / "processor_config.json").is_file():
        return load_processor(checkpoint.base, base)
    if (folder / "processor_config.json").is_file() and checkpoint.layout == "llavakit":
        load_tokenizer(folder, config=config)  # says clearly what is wrong with its files
        with naming(folder / "processor_config.json"):
            if not checkpoint.exchanged:
                _check_own_processor(folder / "processor_config.json", config)
            processor = LlavakitProcessor.from_pretrained(folder)
        if checkpoint.exchanged:
            processor.image_processor = LlavakitImageProcessorPil(architecture_of(config))
        if checkpoint.template is not None:
            processor.use_template(checkpoint.template)
        return processor
    tokenizer = load_tokenizer(folder, base, config)
    _check_placeholder(checkpoint, tokenizer)
    if config.template == OWN:
        tokenizer.chat_template = chat_template_of(folder) or tokenizer.chat_template
        if checkpoint.template is None:
            config.template = known_template(tokenizer) or OWN
    processor = LlavakitProcessor.from_config(config, tokenizer, **(config.extras or {}).get("processor", {}))
    # published vocabularies have spare rows, so the id that the tokenizer gives <image> may lie inside
    config.image_token_id = processor.image_token_id
    return processor


def _check_own_processor(path: Path, config: LlavakitConfig) -> None:
    """Refuse a processor's file with unknown keys, wrong types, or that was made for another configuration."""
    fields = Fields(read_json(path), "processor_config.json")
    inert = dict.fromkeys(("processor_class", "auto_map"), "names what llavakit's folders always have")
    for name, kind in (("template", str), ("sampling", dict), ("reading", dict), ("image_processor", dict)):
        value = fields.get(name)
        if value is not None and not isinstance(value, kind):
            kinds = {str: "a string", dict: "an object"}
            raise CheckpointError(f"{fields.where}: {name} is {quoted(value)}, it should be {kinds[kind]}")
    if fields.get("template") not in (None, OWN):
        get_template(fields["template"])
    image = Fields(fields["image_processor"] or {}, f"{fields.where}: image_processor")
    made_for = image.get("architecture")
    if made_for is not None:
        if not isinstance(made_for, dict):
            raise CheckpointError(f"{image.where}: architecture is {quoted(made_for)}, it should be an object")
        both = [
            architecture_of(config),
            architecture_of(LlavakitConfig(**made_for)),
        ]  # defaults filled in on both sides
        ours, theirs = json.loads(json.dumps(both, default=str))
        compare_values(ours, theirs, "config.json", fields.where)
    image.finish(dict.fromkeys(("image_processor_type", "auto_map"), "names what llavakit's folders always have"))
    fields.finish(inert)


def _check_placeholder(checkpoint: Checkpoint, tokenizer: Any) -> None:
    """In transformers' folders configuration and tokenizer both say which id <image> has."""
    known = tokenizer.get_vocab().get(PLACEHOLDER)
    wanted = checkpoint.config.image_token_id
    if checkpoint.layout.endswith("(hf)") and known not in (None, wanted):
        raise CheckpointError(
            f"{checkpoint.folder}: {PLACEHOLDER} has id {wanted} in config.json and {known} in the tokenizer's files"
        )
