"""Checkpoints in the authors' layout that the tests share."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

TOKENIZER = Path(__file__).parent / "golden" / "llava-1.5" / "tokenizer-sp" / "tokenizer_nonlegacy.json"
WIDTH, LAYERS, VOCAB, SIDE = 32, 2, 96, 16

TEXT = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 4,
    "projection_dim": 8,
}


def vocabulary() -> int:
    return len(json.loads(TOKENIZER.read_text())["model"]["vocab"])


def language_tensors(generator, vocab):
    names = {
        "model.embed_tokens.weight": (vocab, WIDTH),
        "model.norm.weight": (WIDTH,),
        "lm_head.weight": (vocab, WIDTH),
    }
    for n in range(LAYERS):
        layer = f"model.layers.{n}."
        names |= {f"{layer}self_attn.{p}_proj.weight": (WIDTH, WIDTH) for p in "qkvo"}
        names |= {f"{layer}mlp.{p}_proj.weight": (48, WIDTH) for p in ("gate", "up")}
        names[f"{layer}mlp.down_proj.weight"] = (WIDTH, 48)
        names |= {f"{layer}{p}_layernorm.weight": (WIDTH,) for p in ("input", "post_attention")}
    return {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in names.items()}


def tower_tensors(generator):
    names = {
        "embeddings.class_embedding": (16,),
        "embeddings.patch_embedding.weight": (16, 3, 4, 4),
        "embeddings.position_embedding.weight": (17, 16),
    }
    for norm in ("pre_layrnorm", "post_layernorm"):
        names |= {f"{norm}.weight": (16,), f"{norm}.bias": (16,)}
    for n in range(3):
        layer = f"encoder.layers.{n}."
        for p in ("q_proj", "k_proj", "v_proj", "out_proj"):
            names |= {f"{layer}self_attn.{p}.weight": (16, 16), f"{layer}self_attn.{p}.bias": (16,)}
        for p in ("layer_norm1", "layer_norm2"):
            names |= {f"{layer}{p}.weight": (16,), f"{layer}{p}.bias": (16,)}
        names |= {f"{layer}mlp.fc1.weight": (32, 16), f"{layer}mlp.fc1.bias": (32,)}
        names |= {f"{layer}mlp.fc2.weight": (16, 32), f"{layer}mlp.fc2.bias": (16,)}
    return {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in names.items()}


def projector_tensors(generator):
    shapes = {"0.weight": (WIDTH, 16), "0.bias": (WIDTH,), "2.weight": (WIDTH, WIDTH), "2.bias": (WIDTH,)}
    return {f"model.mm_projector.{n}": torch.randn(s, generator=generator) * 0.2 for n, s in shapes.items()}


def classic_config(**fields):
    return {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        **TEXT,
        "vocab_size": vocabulary(),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "image_aspect_ratio": "pad",
        "mm_hidden_size": 16,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_vision_tower": "encoder",
        "tokenizer_padding_side": "right",
        **fields,
    }


def write_tower(folder: Path, tensors) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": VISION}))
    save_file({f"vision_model.{n}": t for n, t in tensors.items()}, folder / "model.safetensors")
    return folder


def write_tokenizer(folder: Path) -> None:
    shutil.copy(TOKENIZER, folder / "tokenizer.json")
    specials = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **specials})
    )


def write_classic(root: Path, **fields) -> tuple[Path, Path]:
    """A full checkpoint in the authors' layout, pickled shards with an index, and its encoder beside it.

    Returns:
        Both folders.
    """
    generator = torch.Generator().manual_seed(0)
    folder = root / "classic"
    folder.mkdir()
    encoder = tower_tensors(generator)
    parts = [language_tensors(generator, vocabulary()), projector_tensors(generator)]
    parts[1] |= {f"model.vision_tower.vision_tower.vision_model.{n}": t for n, t in encoder.items()}
    weight_map = {}
    for number, tensors in enumerate(parts, start=1):
        name = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save(tensors, folder / name)
        weight_map |= dict.fromkeys(tensors, name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(classic_config(**fields)))
    write_tokenizer(folder)
    return folder, write_tower(root / "encoder", encoder)
