"""Encoders in open_clip's and timm's files as transformers' classes: names, shapes, fused projections.

CLIP ViT      class_embedding, conv1, transformer.resblocks.N.attn.in_proj_weight     clip_vision_model
timm ViT      cls_token, patch_embed.proj, blocks.N.attn.qkv                         dinov2
timm SigLIP   patch_embed.proj, blocks.N.attn.qkv, attn_pool, no class token          siglip_vision_model
timm ConvNeXt stem, stages.N.blocks.M.conv_dw                                         convnext

Sizes follow from the tensors; what no tensor says (heads, activation) is given, or is in open_clip_config.json. A timm
ViT without layer scale is a DINOv2 whose scales are one. The projection into the joint space of images and texts and
the text side are left out; any other tensor that has no place is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llavakit.checkpoints.files import LazyState, read_file, read_json
from llavakit.errors import CheckpointError, quoted

CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
HEAD_WIDTH = 64  # of open_clip's and timm's ViTs, where nothing says otherwise

_TEXT_SIDE = re.compile(
    r"(?:text\.|token_embedding\.|transformer\.resblocks\.|ln_final\.|positional_embedding$|text_projection|"
    r"logit_scale$|logit_bias$|attn_mask$)"
)
_JOINT_SPACE = re.compile(r"(?:proj$|head\.proj\.|head\.mlp\.)")
Renames = tuple[tuple[str, str], ...]


class OpenClipEncoder(NamedTuple):
    """An encoder as transformers describes it.

    Attributes:
        config: Options of its configuration, `model_type` among them.
        state: Tensors under the names that transformers publishes.
    """

    config: dict[str, Any]
    state: LazyState


def is_open_clip(folder: Path) -> bool:
    """Whether a folder holds a model in open_clip's files."""
    return (folder / CONFIG).is_file()


def read_open_clip_folder(folder: Path) -> OpenClipEncoder:
    """The encoder of a folder with open_clip_config.json.

    Raises:
        CheckpointError: If a file is broken or missing, or the encoder is of no known kind.
    """
    path = folder / CONFIG
    model = read_json(path).get("model_cfg")
    vision = model.get("vision_cfg") if isinstance(model, Mapping) else None
    if not isinstance(vision, Mapping):
        raise CheckpointError(f"{path}: model_cfg.vision_cfg is {quoted(vision)}, it should be an object")
    file = _weights(folder)
    width = vision.get("head_width", HEAD_WIDTH)
    if not isinstance(width, int) or width < 1:
        raise CheckpointError(f"{path}: head_width is {quoted(width)}, it should be a number of channels")
    found = read_open_clip(read_file(file), head_width=width, quick_gelu=bool(model.get("quick_gelu", False)))
    side, patch = vision.get("image_size"), found.config.get("patch_size")
    if isinstance(side, int) and patch and side // patch == found.config["image_size"] // patch:
        found.config["image_size"] = side  # the pixels that are left over at the far edges are not seen
    return found


def _weights(folder: Path) -> Path:
    file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise CheckpointError(f"{folder}: no weights; it should hold {' or '.join(WEIGHTS)}")
    return file


def open_clip_projection(folder: Path) -> Tensor | None:
    """The projection [joint width, encoder width] of a folder's CLIP ViT into the joint space; None if it has none."""
    state = read_file(_weights(folder)).renamed(lambda name: name.removeprefix("module."))
    name = next((name for name in ("visual.proj", "proj") if name in state), None)
    return None if name is None else state[name].T.contiguous()


def read_open_clip(
    state: LazyState, *, heads: int | None = None, head_width: int = HEAD_WIDTH, quick_gelu: bool = False
) -> OpenClipEncoder:
    """The encoder in a state dict of open_clip or timm.

    Args:
        state: Names of a visual trunk, with or without `module.`, `visual.` and `trunk.`; a text side beside it.
        heads: Attention heads; default: width over `head_width`.
        quick_gelu: Whether a CLIP ViT was trained with it, as OpenAI's weights and those made from them.

    Raises:
        CheckpointError: If it is of no known kind, or holds a tensor that has no place.
    """
    state = _trunk(state)
    if "class_embedding" in state and "conv1.weight" in state:
        return _clip(state, heads, head_width, quick_gelu)
    if "stem.0.weight" in state:
        return _convnext(state)
    if "patch_embed.proj.weight" in state and "pos_embed" in state:
        kind = _vit if "cls_token" in state else _siglip
        return kind(state, heads, head_width)
    raise CheckpointError(
        "the weights are of no encoder of open_clip or timm that is known; known: CLIP ViT, ViT, SigLIP, ConvNeXt"
    )


def _trunk(state: LazyState) -> LazyState:
    """The visual trunk's tensors under their bare names."""
    bare = state.renamed(lambda name: name.removeprefix("module."))
    if any(name.startswith("visual.") for name in bare):
        bare = bare.renamed(lambda name: None if _TEXT_SIDE.match(name) else name)
        bare = bare.renamed(lambda name: name.removeprefix("visual."))
    bare = bare.renamed(lambda name: name.removeprefix("trunk."))
    return bare.renamed(lambda name: None if _JOINT_SPACE.match(name) else name)


def _placed(state: LazyState, rules: Renames) -> LazyState:
    """Tensors under the names of the rules.

    Raises:
        CheckpointError: If no rule has a place for one.
    """
    compiled = [(re.compile(pattern), target) for pattern, target in rules]

    def rename(name: str) -> str:
        for pattern, target in compiled:
            if pattern.fullmatch(name):
                return pattern.sub(target, name)
        raise CheckpointError(f"{state.origin.get(name, '')}: tensor {quoted(name)} has no place in the encoder")

    return state.renamed(rename)


def _split(state: LazyState, fused: str, parts: tuple[str, str, str]) -> LazyState:
    """Every fused projection that matches as query, key and value."""
    for name in [name for name in state if re.fullmatch(fused, name)]:
        state = state.split(name, [re.sub(fused, part, name) for part in parts])
    return state


def _layers(state: LazyState, pattern: str) -> int:
    numbers = {int(found[1]) for name in state if (found := re.match(pattern, name))}
    if numbers != set(range(len(numbers))):
        raise CheckpointError(f"the weights hold layers {sorted(numbers)[:50]}, with gaps")
    return len(numbers)


def _side(positions: int, patch: int) -> int:
    side = round(positions**0.5)
    if side * side != positions:
        raise CheckpointError(f"the weights hold {positions} positions, which are no square")
    return side * patch


def _heads(width: int, heads: int | None, head_width: int) -> int:
    count = heads or width // head_width
    if not count or width % count:
        raise CheckpointError(f"{count} attention heads do not divide the width {width}; give their number")
    return count


def _clip(state: LazyState, heads: int | None, head_width: int, quick_gelu: bool) -> OpenClipEncoder:
    width, _, patch, _ = state["conv1.weight"].shape
    block, layer = r"transformer\.resblocks\.(\d+)\.", r"encoder.layers.\1."
    config = {
        "model_type": "clip_vision_model",
        "hidden_size": width,
        "intermediate_size": state["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        "num_hidden_layers": _layers(state, block),
        "num_attention_heads": _heads(width, heads, head_width),
        "image_size": _side(state["positional_embedding"].shape[0] - 1, patch),
        "patch_size": patch,
        "hidden_act": "quick_gelu" if quick_gelu else "gelu",
    }
    attention = layer + "self_attn."
    state = _split(state, block + r"attn\.in_proj_(weight|bias)", tuple(rf"{attention}{x}_proj.\2" for x in "qkv"))
    rules = (
        (r"class_embedding", "embeddings.class_embedding"),
        (r"positional_embedding", "embeddings.position_embedding.weight"),
        (r"conv1\.weight", "embeddings.patch_embedding.weight"),
        (r"ln_pre\.(weight|bias)", r"pre_layrnorm.\1"),
        (r"ln_post\.(weight|bias)", r"post_layernorm.\1"),
        (block + r"ln_(\d)\.(weight|bias)", layer + r"layer_norm\2.\3"),
        (block + r"attn\.out_proj\.(weight|bias)", attention + r"out_proj.\2"),
        (block + r"mlp\.c_fc\.(weight|bias)", layer + r"mlp.fc1.\2"),
        (block + r"mlp\.c_proj\.(weight|bias)", layer + r"mlp.fc2.\2"),
        (r"(encoder\.layers\.\d+\.self_attn\.[qkv]_proj\.(?:weight|bias))", r"\1"),
    )
    return OpenClipEncoder(config, _placed(state, rules))


_CLIP_OUT: Renames = (
    (r"embeddings\.class_embedding", "class_embedding"),
    (r"embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"embeddings\.patch_embedding\.weight", "conv1.weight"),
    (r"pre_layrnorm\.(weight|bias)", r"ln_pre.\1"),
    (r"post_layernorm\.(weight|bias)", r"ln_post.\1"),
    (r"encoder\.layers\.(\d+)\.layer_norm(\d)\.(weight|bias)", r"transformer.resblocks.\1.ln_\2.\3"),
    (r"encoder\.layers\.(\d+)\.self_attn\.out_proj\.(weight|bias)", r"transformer.resblocks.\1.attn.out_proj.\2"),
    (r"encoder\.layers\.(\d+)\.mlp\.fc1\.(weight|bias)", r"transformer.resblocks.\1.mlp.c_fc.\2"),
    (r"encoder\.layers\.(\d+)\.mlp\.fc2\.(weight|bias)", r"transformer.resblocks.\1.mlp.c_proj.\2"),
    (r"(transformer\.resblocks\.\d+\.attn\.in_proj_(?:weight|bias))", r"\1"),
)
_CLIP_QUERY = re.compile(r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)")


def clip_vit(state: LazyState) -> LazyState:
    """A `clip_vision_model`'s tensors under open_clip's names, the way back from `read_open_clip`.

    Args:
        state: With or without `vision_model.`, and with `visual_projection.weight` where there is a joint space.

    Raises:
        CheckpointError: If a tensor has no place there.
    """
    state = state.renamed(lambda name: name.removeprefix("vision_model."))
    rest = state.renamed(lambda name: None if name == "visual_projection.weight" else name)
    fused = _fused(rest, _CLIP_QUERY, ("q_proj", "k_proj", "v_proj"), "transformer.resblocks.{}.attn.in_proj_{}")
    found = _placed(fused, _CLIP_OUT)
    if "visual_projection.weight" not in state:
        return found
    return found.joined({"proj": state["visual_projection.weight"].T.contiguous()})


def _vit(state: LazyState, heads: int | None, head_width: int) -> OpenClipEncoder:
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    block, layer = r"blocks\.(\d+)\.", r"encoder.layer.\1."
    depth, scaled = _layers(state, block), "blocks.0.ls1.gamma" in state
    config = {
        "model_type": "dinov2",
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": _heads(width, heads, head_width),
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] // width,
        "image_size": _side(state["pos_embed"].shape[1] - 1, patch),
        "patch_size": patch,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "layer_norm_eps": 1e-6,
    }
    attention = layer + "attention.attention."
    parts = tuple(rf"{attention}{part}.\2" for part in ("query", "key", "value"))
    state = _split(state, block + r"attn\.qkv\.(weight|bias)", parts)
    rules = (
        (r"cls_token", "embeddings.cls_token"),
        (r"pos_embed", "embeddings.position_embeddings"),
        (r"patch_embed\.proj\.(weight|bias)", r"embeddings.patch_embeddings.projection.\1"),
        (r"norm\.(weight|bias)", r"layernorm.\1"),
        (block + r"(norm[12])\.(weight|bias)", layer + r"\2.\3"),
        (block + r"attn\.proj\.(weight|bias)", layer + r"attention.output.dense.\2"),
        (block + r"ls([12])\.gamma", layer + r"layer_scale\2.lambda1"),
        (block + r"mlp\.(fc[12])\.(weight|bias)", layer + r"mlp.\2.\3"),
        (r"(encoder\.layer\.\d+\.attention\.attention\.\w+\.(?:weight|bias))", r"\1"),
    )
    state = _placed(state, rules)
    made: dict[str, Tensor] = {"embeddings.mask_token": torch.zeros(1, width)}  # only masked training reads it
    if not scaled:
        names = [f"encoder.layer.{n}.layer_scale{which}.lambda1" for n in range(depth) for which in (1, 2)]
        made |= {name: torch.ones(width) for name in names}
    return OpenClipEncoder(config, state.joined(made))


_VIT_OUT: Renames = (
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.(weight|bias)", r"patch_embed.proj.\1"),
    (r"layernorm\.(weight|bias)", r"norm.\1"),
    (r"encoder\.layer\.(\d+)\.(norm[12])\.(weight|bias)", r"blocks.\1.\2.\3"),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.(weight|bias)", r"blocks.\1.attn.proj.\2"),
    (r"encoder\.layer\.(\d+)\.layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
    (r"encoder\.layer\.(\d+)\.mlp\.(fc[12])\.(weight|bias)", r"blocks.\1.mlp.\2.\3"),
    (r"(blocks\.\d+\.attn\.qkv\.(?:weight|bias))", r"\1"),
)
_QUERY = re.compile(r"encoder\.layer\.(\d+)\.attention\.attention\.query\.(weight|bias)")


def timm_vit(state: LazyState) -> LazyState:
    """A `dinov2` encoder's tensors under timm's names, the way back from `read_open_clip`.

    Raises:
        CheckpointError: If a tensor has no place there.
    """
    rest = state.renamed(lambda name: None if name == "embeddings.mask_token" else name)
    return _placed(_fused(rest, _QUERY, ("query", "key", "value"), "blocks.{}.attn.qkv.{}"), _VIT_OUT)


def _fused(state: LazyState, query: re.Pattern[str], parts: Sequence[str], target: str) -> LazyState:
    """Queries, keys and values of every layer as one tensor.

    Args:
        query: Name of a query's tensor; its groups are the layer, and weight or bias.
        parts: What the three are called.
        target: Name of the fused tensor, with a place for each group.
    """
    readers, taken = {}, set()
    for name in state:
        if found := query.fullmatch(name):
            names = [name.replace(f".{parts[0]}.", f".{part}.") for part in parts]
            taken.update(names)
            readers[target.format(*found.groups())] = lambda names=names: torch.cat([state[one] for one in names])
    return state.renamed(lambda name: None if name in taken else name).joined(LazyState(readers, {}))


def _siglip(state: LazyState, heads: int | None, head_width: int) -> OpenClipEncoder:
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    block, layer = r"blocks\.(\d+)\.", r"encoder.layers.\1."
    pooled = "attn_pool.latent" in state
    config = {
        "model_type": "siglip_vision_model",
        "hidden_size": width,
        "intermediate_size": state["blocks.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": _layers(state, block),
        "num_attention_heads": _heads(width, heads, head_width),
        "image_size": _side(state["pos_embed"].shape[1], patch),
        "patch_size": patch,
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu_pytorch_tanh",
        "vision_use_head": pooled,
    }
    attention = layer + "self_attn."
    state = _split(state, block + r"attn\.qkv\.(weight|bias)", tuple(rf"{attention}{x}_proj.\2" for x in "qkv"))
    table, pool = state["pos_embed"], {}
    if pooled:
        pool = {
            f"head.attention.in_proj_{kind}": torch.cat([state[f"attn_pool.q.{kind}"], state[f"attn_pool.kv.{kind}"]])
            for kind in ("weight", "bias")
        }
    joined = {"pos_embed", *(f"attn_pool.{part}.{kind}" for part in ("q", "kv") for kind in ("weight", "bias"))}
    rules = (
        (r"patch_embed\.proj\.(weight|bias)", r"embeddings.patch_embedding.\1"),
        (r"norm\.(weight|bias)", r"post_layernorm.\1"),
        (block + r"norm([12])\.(weight|bias)", layer + r"layer_norm\2.\3"),
        (block + r"attn\.proj\.(weight|bias)", attention + r"out_proj.\2"),
        (block + r"mlp\.(fc[12])\.(weight|bias)", layer + r"mlp.\2.\3"),
        (r"attn_pool\.latent", "head.probe"),
        (r"attn_pool\.proj\.(weight|bias)", r"head.attention.out_proj.\1"),
        (r"attn_pool\.norm\.(weight|bias)", r"head.layernorm.\1"),
        (r"attn_pool\.mlp\.(fc[12])\.(weight|bias)", r"head.mlp.\1.\2"),
        (r"(encoder\.layers\.\d+\.self_attn\.[qkv]_proj\.(?:weight|bias))", r"\1"),
    )
    state = _placed(state.renamed(lambda name: None if name in joined else name), rules)
    return OpenClipEncoder(config, state.joined({"embeddings.position_embedding.weight": table[0], **pool}))


def _convnext(state: LazyState) -> OpenClipEncoder:
    stages = _layers(state, r"stages\.(\d+)\.")
    depths = [_layers(state, rf"stages\.{stage}\.blocks\.(\d+)\.") for stage in range(stages)]
    widths = [state[f"stages.{stage}.blocks.0.conv_dw.weight"].shape[0] for stage in range(stages)]
    config = {
        "model_type": "convnext",
        "depths": depths,
        "hidden_sizes": widths,
        "num_stages": stages,
        "patch_size": state["stem.0.weight"].shape[2],
    }
    block, layer = r"stages\.(\d+)\.blocks\.(\d+)\.", r"encoder.stages.\1.layers.\2."
    rules = (
        (r"stem\.0\.(weight|bias)", r"embeddings.patch_embeddings.\1"),
        (r"stem\.1\.(weight|bias)", r"embeddings.layernorm.\1"),
        (r"stages\.(\d+)\.downsample\.([01])\.(weight|bias)", r"encoder.stages.\1.downsampling_layer.\2.\3"),
        (block + r"gamma", layer + "layer_scale_parameter"),
        (block + r"conv_dw\.(weight|bias)", layer + r"dwconv.\3"),
        (block + r"norm\.(weight|bias)", layer + r"layernorm.\3"),
        (block + r"mlp\.fc([12])\.(weight|bias)", layer + r"pwconv\3.\4"),
        (r"head\.norm\.(weight|bias)", r"layernorm.\1"),
    )
    final = {"layernorm.weight": torch.ones(widths[-1]), "layernorm.bias": torch.zeros(widths[-1])}
    state = _placed(state, rules)
    return OpenClipEncoder(config, LazyState.of(final).joined(state))
