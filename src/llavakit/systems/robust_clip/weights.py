"""The authors' raw files (`fare_eps_2.pt`, `tecoa_eps_4.pt`, ...) as an encoder's folder.

They hold a CLIP ViT's visual tower in open_clip's names, without a configuration. The hub's folders
(open_clip_config.json) need none of this: every command that takes an encoder reads them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from llavakit.checkpoints.files import LazyState, atomic_folder, read_file, read_folder, write_state
from llavakit.checkpoints.transformers_layout import write_json
from llavakit.data.preparation import Left
from llavakit.errors import CheckpointError, UserError
from llavakit.vision.open_clip import clip_vit, read_open_clip

INNER = "vision_encoder_state_dict"


def robust_encoder(source: Path, output: Path, bad: Left, *, quick_gelu: bool = True, heads: int = 0) -> dict[str, Any]:
    """Write a raw file as a folder in transformers' files, the projection into the joint space included.

    Args:
        source: A .pt or .safetensors file.
        output: A new folder.
        quick_gelu: Whether the encoder comes from OpenAI's weights; those of LAION use the exact GELU.
        heads: Attention heads; 0 means one for every 64 channels.
    """
    state = raw_state(source)
    found = read_open_clip(state, heads=heads or None, quick_gelu=quick_gelu)
    config = {**found.config, "architectures": ["CLIPVisionModelWithProjection"]}
    names = {f"vision_model.{name}": found.state[name] for name in found.state}
    if "proj" in state:
        names["visual_projection.weight"] = state["proj"].T.contiguous()
        config["projection_dim"] = len(names["visual_projection.weight"])
    with atomic_folder(output) as scratch:
        write_json(scratch / "config.json", config)
        write_state(scratch, names.items())
    return {"tensors": len(names), "parameters": sum(tensor.numel() for tensor in names.values())}


def open_clip_encoder(source: Path, output: Path, bad: Left) -> dict[str, Any]:
    """Write an encoder's folder as the authors publish it: one file in open_clip's names.

    Args:
        source: Folder in transformers' files, for instance what a stage with `objective: fare` left.
        output: A new .safetensors file.
    """
    if output.suffix != ".safetensors":
        raise UserError(f"{output}: name a .safetensors file; nothing else is written")
    state = clip_vit(read_folder(source))
    output.parent.mkdir(parents=True, exist_ok=True)
    scratch = output.with_name(f".{output.name}")
    save_file({name: state[name].contiguous() for name in state}, scratch)
    scratch.replace(output)
    return {"tensors": len(state), "parameters": sum(state[name].numel() for name in state)}


def raw_state(source: Path) -> LazyState:
    """The tensors of a raw file; some hold them under `vision_encoder_state_dict`."""
    if source.suffix != ".safetensors":
        try:
            whole = torch.load(source, map_location="cpu", weights_only=True)
        except Exception as error:
            raise CheckpointError(f"{source}: not a readable state dict ({type(error).__name__})") from None
        if isinstance(whole, dict) and isinstance(whole.get(INNER), dict):
            return LazyState.of(whole[INNER])
    return read_file(source)
