"""Open any checkpoint that llavakit knows, and write it in another layout.

`open_checkpoint` gives configuration and lazily read tensors; `build` makes a model of them; `convert` streams the
tensors from one layout to another without building a model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llavakit.checkpoints import adapters, layouts
from llavakit.checkpoints.adapter_base import TRAINED, find_base
from llavakit.checkpoints.classic import ClassicLayout
from llavakit.checkpoints.fields import Fields, check_known
from llavakit.checkpoints.files import (
    LazyState,
    assign_state,
    atomic_folder,
    read_file,
    read_folder,
    read_json,
    write_state,
)
from llavakit.checkpoints.text import GENERATION, eos_ids, read_generation, read_tokenizer, tokenizer_folder, with_ends
from llavakit.errors import CheckpointError, UserError, quoted
from llavakit.model.configuration import LlavakitConfig
from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.model.processing import LlavakitProcessor
from llavakit.model.routes import MediaSpec

FORMS = ("llavakit", "hf", "original")


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
    """

    folder: Path
    layout: str
    config: LlavakitConfig
    state: LazyState
    base: Checkpoint | None = None
    generation: dict[str, Any] = field(default_factory=dict)


def local_folder(model: str | Path) -> Path:
    """A local folder for a folder or a hub id; a hub id is downloaded into the hub's cache (safetensors preferred).

    Raises:
        CheckpointError: If it is neither.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path}: is a file; a model is a folder that holds config.json and weights")
    if str(model).count("/") != 1 or str(model).startswith((".", "/", "~")):
        raise CheckpointError(f"{model}: no such folder; name a model folder or a hub id such as owner/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.bin", "*.model", "*.jinja", "*.txt"]
    try:
        return Path(snapshot_download(str(model), allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{model}: not a local folder, and the hub did not deliver it ({reason})") from None


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """One guard for all that reads a file: whatever transformers, tokenizers or a layout raise becomes one line.

    Args:
        path: The file.

    Raises:
        CheckpointError: In place of any exception; it names the file.
    """
    try:
        yield
    except CheckpointError as error:
        if not str(error).startswith(f"{path.name}: "):
            raise
        raise CheckpointError(f"{path.parent}/{error}") from error
    except Exception as error:  # foreign readers raise anything at all on broken values
        raise CheckpointError(f"{path}: {_said(error)}") from error


def _said(error: Exception) -> str:
    """What an exception says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, UserError) and lines:
        return lines[0]
    if isinstance(error, KeyError):
        return f"{quoted(error.args[0] if error.args else None)} is missing or unknown"
    if not lines:
        return type(error).__name__
    line = lines[0] if isinstance(error, OSError) else lines[-1]  # strict configurations say the reason last
    return line if len(line) <= 300 else line[:297] + "..."


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
    model: str | Path, *, base: str | Path | None = None, vision_tower: str | Path | None = None
) -> Checkpoint:
    """Open a checkpoint in any known layout.

    Args:
        model: Folder or hub id.
        base: Folder or hub id of the language model, for LoRA and connector-only files; of the whole model for a
            folder that holds an adapter alone.
        vision_tower: Folder or hub id of the encoder, for files that do not contain it.

    Raises:
        CheckpointError: One clear line.
    """
    folder = local_folder(model)
    if (folder / adapters.CONFIG).is_file() and not (folder / "config.json").is_file():
        below = open_checkpoint(find_base(folder, base), vision_tower=vision_tower)
        return _with_adapter(below, folder)
    raw = _read_config(folder)
    given = {"base": base, "encoder": vision_tower}
    sources = {name: local_folder(place) for name, place in given.items() if place is not None}
    with _naming(folder / "config.json"):
        if raw.get("model_type") == LlavakitConfig.model_type:
            config, state = _read_own(folder, raw)
            layout, name = None, "llavakit"
        else:
            layout, fields = layouts.detect(folder, raw), Fields(raw)
            config, state = layout.read(folder, fields, sources)
            fields.finish(layout.inert)
            name = f"{layout.system} ({layout.form})"
        config.check()
        MediaSpec(config)
    generation = read_generation(folder, sources.get("base"))
    if ends := eos_ids(generation):
        config.eos_token_id = ends if len(ends) > 1 else ends[0]
    checkpoint = Checkpoint(folder, name, config, state, generation=generation)
    adapted = layout is not None and (folder / adapters.CONFIG).is_file()
    return _with_adapter(checkpoint, folder, layout) if adapted else checkpoint


def _with_adapter(below: Checkpoint, folder: Path, layout: layouts.Layout | None = None) -> Checkpoint:
    """An opened checkpoint with the adapter of a folder merged.

    Args:
        below: The model that was adapted.
        layout: The layout of `folder`, if the folder holds more than an adapter.
    """
    with _naming(folder / adapters.CONFIG):
        options = adapters.adapter_options(read_json(folder / adapters.CONFIG), str(folder / adapters.CONFIG))
    state = adapters.merge(
        below.state,
        read_folder(folder, "adapter_model"),
        options,
        _skeleton(below),
        str(folder),
        namings=[layouts.rename_with(layout.renames_out(below.config))] if isinstance(layout, ClassicLayout) else (),
        optional=lambda name: layout is not None and "vision_tower." in name,  # the authors adapted before adding it
    )
    if (folder / TRAINED).is_file():
        state = state.joined(_native_names(read_file(folder / TRAINED)))
    config = adapters.untied(below.config, state)
    base = below if layout is None else None
    return Checkpoint(folder, below.layout, config, state, base=base, generation=below.generation)


def _read_own(folder: Path, raw: dict[str, Any]) -> tuple[LlavakitConfig, LazyState]:
    """Configuration and tensors of llavakit's own layout."""
    config = LlavakitConfig.from_dict(raw)
    check_known(config, raw, "config.json")
    for part in ("text_config", "vision_config"):
        if raw.get(part):
            check_known(getattr(config, part), raw[part], f"config.json: {part}")
    return config, _native_names(read_folder(folder))


def _native_names(state: LazyState) -> LazyState:
    """Some transformers releases wrap CLIP and SigLIP encoders in one more level; names on disk never have it."""
    return state.renamed(lambda name: name.replace("_tower.vision_model.", "_tower."))


def names_in_memory(model: torch.nn.Module, state: LazyState) -> LazyState:
    """Tensors under the names that the installed transformers release gives them."""
    wrapped = any("_tower.vision_model." in name for name in model.state_dict())
    return state.renamed(lambda n: n.replace("_tower.", "_tower.vision_model.", 1)) if wrapped else state


def build(
    checkpoint: Checkpoint, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> LlavakitForConditionalGeneration:
    """The model of an opened checkpoint, in evaluation mode; every tensor is checked.

    Raises:
        CheckpointError: If a tensor is missing, superfluous or misshaped.
    """
    model = _skeleton(checkpoint)
    _check_tied(model, checkpoint)
    state = names_in_memory(model, checkpoint.state)
    assign_state(model, state, where=str(checkpoint.folder), dtype=dtype, device=device)
    _materialise_buffers(model, device)
    model.tie_weights()
    return model.eval()


def _skeleton(checkpoint: Checkpoint) -> LlavakitForConditionalGeneration:
    """The model on meta tensors: every name and shape."""
    with torch.device("meta"), _naming(checkpoint.folder / "config.json"):
        return LlavakitForConditionalGeneration(checkpoint.config)


def _check_tied(model: LlavakitForConditionalGeneration, checkpoint: Checkpoint) -> None:
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

    A module that owns such buffers is constructed again off the meta device from the configuration it keeps.
    """
    for module in model.modules():
        pending = [name for name, buffer in module._buffers.items() if buffer is not None and buffer.is_meta]
        if not pending:
            continue
        fresh = type(module)(module.config)
        for name in pending:
            module.register_buffer(name, fresh._buffers[name].to(device), persistent=False)


def load_tokenizer(folder: Path, base: Path | None = None, config: LlavakitConfig | None = None) -> Any:
    """The tokenizer in a model folder, or in its language model's folder.

    Raises:
        CheckpointError: If there is none.
    """
    place = tokenizer_folder(folder, base)
    if place is None:
        raise CheckpointError(f"{folder}: no tokenizer; it should hold tokenizer.json, tokenizer.model or vocab.json")
    with _naming(place / "tokenizer.json"):
        return read_tokenizer(place, config and config.text_config)


def load_processor(checkpoint: Checkpoint, base: Path | None = None) -> LlavakitProcessor:
    """The processor of an opened checkpoint: its own, or the one that its layout implies."""
    if checkpoint.base is not None and not (checkpoint.folder / "processor_config.json").is_file():
        return load_processor(checkpoint.base, base)
    if (checkpoint.folder / "processor_config.json").is_file() and checkpoint.layout == "llavakit":
        read_json(checkpoint.folder / "processor_config.json")
        load_tokenizer(checkpoint.folder, config=checkpoint.config)  # says clearly what is wrong with its files
        with _naming(checkpoint.folder / "processor_config.json"):
            return LlavakitProcessor.from_pretrained(checkpoint.folder)
    tokenizer = load_tokenizer(checkpoint.folder, base, checkpoint.config)
    extras = checkpoint.config.extras or {}
    processor = LlavakitProcessor.from_config(checkpoint.config, tokenizer, **extras.get("processor", {}))
    # published vocabularies have spare rows, so the id that the tokenizer gives <image> may lie inside
    checkpoint.config.image_token_id = processor.image_token_id
    return processor


def save(
    model_state: Mapping[str, torch.Tensor],
    config: LlavakitConfig,
    processor: Any,
    folder: str | Path,
    generation: Mapping[str, Any] | None = None,
) -> None:
    """Write a llavakit checkpoint; if anything fails, what was there before stays whole.

    Args:
        generation: Content of generation_config.json; without it no such file is written.
    """
    with atomic_folder(Path(folder)) as scratch:
        raw = config.to_dict() | {"architectures": [LlavakitForConditionalGeneration.__name__]}
        (scratch / "config.json").write_text(json.dumps(raw, indent=2, default=str) + "\n", encoding="utf-8")
        names = (
            (name.replace("_tower.vision_model.", "_tower."), tensor)
            for name, tensor in model_state.items()
            if not (config.tie_word_embeddings and name == "lm_head.weight")
        )
        write_state(scratch, names)
        if processor is not None:
            processor.save_pretrained(scratch)
        _write_generation(scratch, with_ends(generation, processor))


def _write_generation(folder: Path, generation: Mapping[str, Any] | None) -> None:
    if generation:
        (folder / GENERATION).write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    to: str,
    base: str | Path | None = None,
    vision_tower: str | Path | None = None,
) -> dict[str, Any]:
    """Write a checkpoint in another layout.

    Args:
        src: Folder or hub id in any known layout.
        dst: New folder; must not exist or be empty.
        to: "llavakit", "hf" (transformers' class, which vLLM reads too) or "original".

    Returns:
        What was done: layouts, number of tensors, parameters.
    """
    if to not in FORMS:
        raise UserError(f"--to {to}: unknown layout; known: {', '.join(FORMS)}")
    dst = Path(dst)
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise UserError(f"{dst}: is not empty; name a new folder")
    checkpoint = open_checkpoint(src, base=base, vision_tower=vision_tower)
    base_folder = local_folder(base) if base is not None else None
    _check_names(checkpoint)
    shapes = {name: tensor.shape for name, tensor in _skeleton(checkpoint).state_dict().items()}
    checkpoint.state = checkpoint.state.checked(
        {name.replace("_tower.vision_model.", "_tower."): shape for name, shape in shapes.items()}, checkpoint.folder
    )
    try:
        processor = load_processor(checkpoint, base_folder)
    except CheckpointError:
        processor = None  # weights alone can be converted; the result says so
    if to == "llavakit":
        save(checkpoint.state, checkpoint.config, processor, dst, checkpoint.generation)
    else:
        layout = layouts.layout_for(checkpoint.config, to)
        with atomic_folder(dst) as scratch:
            raw = layout.write_config(checkpoint.config)
            (scratch / "config.json").write_text(json.dumps(raw, indent=2, default=str) + "\n", encoding="utf-8")
            layout.write_parts(checkpoint.config, scratch)
            write_state(scratch, layout.write_state(checkpoint.config, checkpoint.state))
            if processor is not None:
                layout.write_processor(processor, checkpoint.config, scratch)
            _write_generation(scratch, with_ends(checkpoint.generation, processor))
    return {
        "from": checkpoint.layout,
        "to": to,
        "folder": str(dst),
        "tensors": len(checkpoint.state),
        "tokenizer": processor is not None,
    }


def _check_names(checkpoint: Checkpoint) -> None:
    """Missing or unknown tensors are errors before anything is written."""
    model = _skeleton(checkpoint)
    own = {name.replace("_tower.vision_model.", "_tower.") for name in model.state_dict()}
    tied = set(model._tied_weights_keys or {})
    missing = sorted(own - set(checkpoint.state) - tied)
    extra = sorted(set(checkpoint.state) - own)
    if missing:
        raise CheckpointError(f"{checkpoint.folder}: tensor {missing[0]!r} is missing; the configuration calls for it")
    if extra:
        file = checkpoint.state.origin.get(extra[0], "")
        raise CheckpointError(f"{checkpoint.folder}/{file}: tensor {extra[0]!r} is unknown to the configuration")
    _check_tied(model, checkpoint)
