"""Tiny models of other families, as folders that transformers reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedTokenizerFast

from llavakit.phantom.tokenizer import tiny_tokenizer

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}IMAGE{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% endif %}<|end|>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def _tokenizer(**special: str) -> Any:
    tokenizer = tiny_tokenizer(["What is in this picture? A red square and a blue disc."], vocab_size=600)
    tokenizer.add_special_tokens({"additional_special_tokens": [*special.values(), "<|end|>"]})
    names = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **names, extra_special_tokens=special)


def _save(cls: Any, config: Any, processor: Any, folder: Path) -> Path:
    torch.manual_seed(0)
    model = cls.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name and parameter.dim() == 1:
                parameter.fill_(0.7)  # cross-attention starts closed
            elif parameter.dim() > 1 and "A_log" not in name:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def mllama(folder: Path) -> Path:
    """Pictures enter by cross-attention (Llama 3.2 Vision, LLaVA-CoT)."""
    from transformers import MllamaProcessor
    from transformers.models.mllama import MllamaImageProcessorPil

    tokenizer = _tokenizer(image_token="<|image|>", python_token="<|python_tag|>")
    images = MllamaImageProcessorPil(size={"height": 16, "width": 16}, max_image_tiles=2)
    vision = {
        "hidden_size": 16,
        "attention_heads": 2,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "image_size": 16,
        "patch_size": 8,
        "max_num_tiles": 2,
        "intermediate_layers_indices": [0],
        "vision_output_dim": 32,
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
    }
    text = {**TEXT, "vocab_size": len(tokenizer), "num_hidden_layers": 3, "cross_attention_layers": [1]}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    placeholder = tokenizer.convert_tokens_to_ids("<|image|>")
    config = CONFIG_MAPPING["mllama"](vision_config=vision, text_config=text | rope, image_token_index=placeholder)
    processor = MllamaProcessor(images, tokenizer, chat_template=TEMPLATE.replace("IMAGE", "<|image|>"))
    return _save(AutoModelForImageTextToText, config, processor, folder)


def gemma3(folder: Path) -> Path:
    """Pictures are spliced, and attend to each other; sliding windows."""
    from transformers import Gemma3Processor
    from transformers.models.gemma3 import Gemma3ImageProcessorPil

    tokenizer = _tokenizer(image_token="<img>", boi_token="<boi>", eoi_token="<eoi>")
    ids = {name: tokenizer.convert_tokens_to_ids(f"<{name}>") for name in ("img", "boi", "eoi")}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
    }
    layers = ["sliding_attention", "full_attention"]
    text = {**TEXT, "vocab_size": len(tokenizer), "num_hidden_layers": 2, "head_dim": 8, "layer_types": layers}
    config = CONFIG_MAPPING["gemma3"](
        vision_config=vision,
        text_config=text | {"sliding_window": 16},
        mm_tokens_per_image=4,
        image_token_index=ids["img"],
        boi_token_index=ids["boi"],
        eoi_token_index=ids["eoi"],
    )
    images = Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    template = TEMPLATE.replace("IMAGE", "<boi>")
    processor = Gemma3Processor(images, tokenizer, chat_template=template, image_seq_length=4)
    return _save(AutoModelForImageTextToText, config, processor, folder)


def mamba(folder: Path) -> Path:
    """A language model without attention."""
    tokenizer = _tokenizer()
    tokenizer.chat_template = TEMPLATE
    config = CONFIG_MAPPING["mamba"](
        vocab_size=len(tokenizer),
        hidden_size=32,
        state_size=8,
        num_hidden_layers=2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return _save(AutoModelForCausalLM, config, tokenizer, folder)
