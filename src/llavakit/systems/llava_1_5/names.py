"""What the original tools infer from the name of a published checkpoint.

llavakit goes by the configuration and the tokenizer. The first LLaVA's files name no template in either, so the name of
the model that training started from decides.
"""

from __future__ import annotations

_INFERRED = (
    ("llama-2", "llava_llama_2"),
    ("mistral", "mistral_instruct"),
    ("v1.6-34b", "chatml_direct"),
    ("v1", "llava_v1"),
    ("mpt", "mpt"),
)


def model_name(path: str) -> str:
    """The name of a checkpoint from its path: the last folder, with its parent's name for `checkpoint-N`."""
    folders = path.strip("/").split("/")
    if folders[-1].startswith("checkpoint-") and len(folders) > 1:
        return f"{folders[-2]}_{folders[-1]}"
    return folders[-1]


def inferred_template(name: str) -> str:
    """The template that the original command line infers from a model's name; the first match wins."""
    name = name.lower()
    return next((template for part, template in _INFERRED if part in name), "llava_v0")
