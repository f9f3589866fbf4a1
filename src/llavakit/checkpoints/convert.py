"""Write checkpoints: llavakit's own, and any checkpoint in another layout.

`convert` streams the tensors from one layout to another without building a model. What was written is read back and
compared before it is published.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llavakit.checkpoints import layouts
from llavakit.checkpoints.classic import grows
from llavakit.checkpoints.encoder_names import to_disk
from llavakit.checkpoints.export import rehearse
from llavakit.checkpoints.files import (
    LazyState,
    atomic_folder,
    read_folder,
    read_json,
    write_state,
)
from llavakit.checkpoints.gguf import is_gguf, unpack
from llavakit.checkpoints.opening import (
    Checkpoint,
    build,
    check_tied,
    load_processor,
    local_folder,
    open_checkpoint,
    read_own,
    skeleton,
)
from llavakit.checkpoints.readback import Noted, compare_configs, compare_tensors
from llavakit.checkpoints.text import (
    GENERATION,
    tokenizer_folder,
    with_ends,
)
from llavakit.checkpoints.transformers_layout import TransformersLayout, write_json
from llavakit.errors import CheckpointError, UserError
from llavakit.model.configuration import LlavakitConfig
from llavakit.model.modeling import LlavakitForConditionalGeneration
from llavakit.model.processing import LlavakitProcessor

FORMS = ("llavakit", "hf", "original")


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
    own = to_disk(config, model_state)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    noted = Noted(own)
    with atomic_folder(Path(folder)) as scratch:
        write_json(
            scratch / "config.json", config.to_dict() | {"architectures": [LlavakitForConditionalGeneration.__name__]}
        )
        write_state(scratch, ((name, noted[name]) for name in noted if name not in tied))
        if processor is not None:
            processor.save_pretrained(scratch)
        _write_generation(scratch, with_ends(generation, processor))
        again, state = read_own(scratch, read_json(scratch / "config.json"))
        compare_configs(config, again)
        compare_tensors(noted, state, tied)


def _write_generation(folder: Path, generation: Mapping[str, Any] | None) -> None:
    if generation:
        write_json(folder / GENERATION, generation)


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    to: str,
    base: str | Path | None = None,
    vision_tower: str | Path | None = None,
    template: str | None = None,
    exchange_vision_tower: bool = False,
    difference_to: str | Path | None = None,
) -> dict[str, Any]:
    """Write a checkpoint in another layout.

    What was written is read back and compared before it is published; for transformers' class a copy is loaded by
    transformers first, and answers like the source.

    Args:
        src: Folder or hub id in any known layout, or a GGUF file of a language model.
        dst: New folder; must not exist or be empty.
        to: "llavakit", "hf" (transformers' class, which vLLM reads too) or "original".
        template: Name of the template, instead of the source's own.
        exchange_vision_tower: Write the encoder `vision_tower` in place of the source's own.
        difference_to: Folder or hub id of the language model that this one was trained from: written are differences
            to its weights, which give the model back to the precision of its type (layout "original" only).

    Returns:
        What was done: layouts, number of tensors, whether there was a tokenizer, and notes on what the new layout has
        no place for.

    Raises:
        UserError: If the layout cannot hold the model; the message names the option.
    """
    if to not in FORMS:
        raise UserError(f"--to {to}: unknown layout; known: {', '.join(FORMS)}")
    if difference_to is not None and to != "original":
        raise UserError(f"--difference-to: weight differences are a form of --to original, not of --to {to}")
    dst = Path(dst)
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise UserError(f"{dst}: is not empty; name a new folder")
    if is_gguf(src):
        with tempfile.TemporaryDirectory(dir=dst.parent) as scratch:
            unpack(Path(src), Path(scratch))
            done = convert(scratch, dst, to=to, template=template)
        return done | {"from": f"GGUF, {done['from']}"}
    checkpoint = open_checkpoint(
        src, base=base, vision_tower=vision_tower, template=template, exchange_vision_tower=exchange_vision_tower
    )
    base_folder = local_folder(base) if base is not None else None
    _check_names(checkpoint)
    empty = to_disk(checkpoint.config, skeleton(checkpoint).state_dict())
    checkpoint.state = checkpoint.state.checked({name: empty[name].shape for name in empty}, checkpoint.folder)
    # weights alone can be converted; the result says so
    below = checkpoint.base.folder if checkpoint.base is not None else None
    has_tokenizer = tokenizer_folder(checkpoint.folder, base_folder, below) is not None
    processor = load_processor(checkpoint, base_folder) if has_tokenizer else None
    notes: list[str] = []
    if to == "llavakit":
        save(checkpoint.state, checkpoint.config, processor, dst, checkpoint.generation)
    else:
        below = None if difference_to is None else local_folder(difference_to)
        notes = _write(layouts.layout_for(checkpoint.config, to), checkpoint, processor, dst, below)
    return {
        "from": checkpoint.layout,
        "to": to,
        "folder": str(dst),
        "tensors": len(checkpoint.state),
        "tokenizer": processor is not None,
        "notes": notes,
    }


def _write(
    layout: layouts.Layout,
    checkpoint: Checkpoint,
    processor: LlavakitProcessor | None,
    target: Path,
    below: Path | None = None,
) -> list[str]:
    """Write a checkpoint in a published layout, and read it back before it is published.

    Args:
        below: Folder of the language model to whose weights differences are written.

    Returns:
        Remarks: what this layout has no place for.

    Raises:
        CheckpointError: If what would be published is another model.
    """
    config, noted = checkpoint.config, Noted(checkpoint.state)
    if isinstance(layout, TransformersLayout):
        rehearse(layout, config, checkpoint.state, processor, _built)
    with atomic_folder(target) as scratch:
        write_json(scratch / "config.json", layout.write_config(config))
        layout.write_parts(config, scratch)
        tensors = layout.write_state(config, noted)
        write_state(scratch, tensors if below is None else _differences(tensors, below))
        if processor is not None:
            layout.write_processor(processor, config, scratch)
        _write_generation(scratch, with_ends(checkpoint.generation, processor))
        again = open_checkpoint(scratch, base=below)
        notes = compare_configs(
            config, again.config, grown=isinstance(layout, TransformersLayout), known=layout.known_changes
        )
        tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
        compare_tensors(noted, again.state, tied, rounded=None if below is None else checkpoint.state)
        return notes + ([] if processor is None else _lost(processor, load_processor(again)))


def _differences(tensors: Iterable[tuple[str, Tensor]], folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Tensors under published names, less what the model in a folder has under the same name.

    Raises:
        CheckpointError: If that model has a tensor which is not among them, or of another shape.
    """
    base = read_folder(folder)
    left = set(base)
    for name, tensor in tensors:
        if name in left:
            left.remove(name)
            tensor = LazyState.of({name: tensor}).subtracted(LazyState.of({name: base[name]}), grows)[name]
        yield name, tensor
    if left:
        raise CheckpointError(
            f"{folder}: has {min(left)!r}, which the model does not have; is it what it was trained from?"
        )


def _built(config: LlavakitConfig, state: LazyState) -> LlavakitForConditionalGeneration:
    return build(Checkpoint(Path("export"), "llavakit", config, state), dtype=torch.float32)


def _lost(processor: LlavakitProcessor, again: LlavakitProcessor) -> list[str]:
    """What a published layout has no place for, of how a processor reads."""
    found = []
    if processor.chat_template != again.chat_template and processor.template != again.template:
        found.append(f"the files do not hold the template {processor.template!r}; give it with --template")
    for name in ("sampling", "reading"):
        if getattr(processor, name) != getattr(again, name):
            found.append(f"the files do not hold processor.{name} {getattr(processor, name)}; give it with --processor")
    return found


def _check_names(checkpoint: Checkpoint) -> None:
    """Missing or unknown tensors are errors before anything is written."""
    model = skeleton(checkpoint)
    own = set(to_disk(checkpoint.config, model.state_dict()))
    tied = set(model._tied_weights_keys or {})
    missing = sorted(own - set(checkpoint.state) - tied)
    extra = sorted(set(checkpoint.state) - own)
    if missing:
        raise CheckpointError(f"{checkpoint.folder}: tensor {missing[0]!r} is missing; the configuration calls for it")
    if extra:
        file = checkpoint.state.origin.get(extra[0], "")
        raise CheckpointError(f"{checkpoint.folder}/{file}: tensor {extra[0]!r} is unknown to the configuration")
    check_tied(model, checkpoint)
