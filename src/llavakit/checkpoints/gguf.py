"""Language models in GGUF, llama.cpp's format: one file with quantised weights, tokenizer and chat template.

transformers reads them and makes floats of the weights; what it can read depends on it. The file becomes a folder in
transformers' layout, which everything else reads.
"""

from __future__ import annotations

from pathlib import Path

import torch

from llavakit.checkpoints.files import write_state
from llavakit.checkpoints.transformers_layout import write_json
from llavakit.errors import CheckpointError

SUFFIX = ".gguf"
_MAGIC = b"GGUF"


def is_gguf(source: str | Path) -> bool:
    """Whether a source is a GGUF file, by its name."""
    return Path(source).suffix == SUFFIX and Path(source).is_file()


def unpack(file: Path, folder: Path) -> None:
    """Write a GGUF file as a folder: config.json, float32 weights as safetensors, tokenizer and chat template.

    Args:
        folder: An existing, empty folder.

    Raises:
        CheckpointError: If it is no GGUF file, or of an architecture that transformers does not read.
        ModuleNotFoundError: If the package `gguf` is not installed.
    """
    import gguf  # noqa: F401  (transformers needs it, and says so in many lines)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with file.open("rb") as opened:
        if opened.read(4) != _MAGIC:
            raise CheckpointError(f"{file}: is no GGUF file, it does not begin with GGUF")
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    except (ValueError, KeyError, NotImplementedError, OSError, RuntimeError) as error:
        said = " ".join(str(error).split())
        raise CheckpointError(f"{file}: transformers cannot read this GGUF file ({said})") from None
    config = model.config
    known = type(config)().to_dict()  # transformers keeps further facts of the file, which no class reads
    options = {name: value for name, value in config.to_dict().items() if name in known}
    write_json(folder / "config.json", options | {"architectures": [type(model).__name__]})
    model.generation_config.save_pretrained(folder)
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if config.tie_word_embeddings else set()
    write_state(folder, ((name, tensor) for name, tensor in model.state_dict().items() if name not in tied))
    tokenizer.save_pretrained(folder)
