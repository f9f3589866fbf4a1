"""vLLM: which checkpoints it can run, and llavakit's entry in its plugin system.

vLLM runs LLaVA-1.5 and LLaVA-OneVision natively from `llavakit convert --to hf`. llavakit's own checkpoints run
through its Transformers back end (`vllm_model`). What that back end cannot express (a connector that reads the
prompt, tokens dropped inside the decoder) is refused in one line instead of being served with wrong answers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llavakit.errors import UserError

NATIVE = "serve it with llavakit serve --engine native"


def register() -> None:
    """Entry point of `vllm.general_plugins`; called in every process of vLLM, possibly more than once."""
    import transformers.models.auto.modeling_auto  # noqa: F401  the Auto classes learn of llavakit with it
    from vllm import ModelRegistry

    from llavakit.model import registration

    registration.register_config()
    registration.register_models()
    registration.register_processors()
    if "LlavakitForConditionalGeneration" not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model("LlavakitForConditionalGeneration", "llavakit.serving.vllm_model:LlavakitForVllm")


def check(model: str | Path) -> list[str]:
    """Refuse what vLLM would serve wrongly or not at all.

    Returns:
        Remarks for whoever starts the server.

    Raises:
        UserError: With the reason and what to do.
    """
    from llavakit.checkpoints import layouts
    from llavakit.checkpoints.files import read_json
    from llavakit.checkpoints.opening import open_checkpoint
    from llavakit.model.configuration import LlavakitConfig

    path = Path(model)
    if not path.is_dir():
        return []  # a hub id: vLLM downloads it, and the model itself refuses
    raw = read_json(path / "config.json")
    own = raw.get("model_type") == LlavakitConfig.model_type
    if not own and "text_config" in raw:
        layout = layouts.published(path, raw)
        for key, value in (layout.vllm_assumes if layout is not None else {}).items():
            if raw.get(key, value) != value:
                raise UserError(
                    f"{model}/config.json: {key} is {raw[key]!r}, but vLLM's class for {raw['model_type']} takes "
                    f"{value!r} for granted; serve it after: llavakit convert {model} NEW --to llavakit"
                )
        return []
    config = open_checkpoint(path).config
    refuse(config, model)
    command = f"llavakit convert {model} NEW --to {'hf' if _has_class_in_vllm(config) else 'llavakit'}"
    if not own:
        raise UserError(f"{model}: vLLM does not read the authors' layout; convert it first: {command}")
    if _has_class_in_vllm(config):
        return [f"runs in vLLM's Transformers back end; vLLM has a class of its own for it after: {command}"]
    return []


def _has_class_in_vllm(config: Any) -> bool:
    """Whether transformers' layout of this model exists and is one that vLLM's own class gets right."""
    from llavakit.checkpoints import layouts

    try:
        layout = layouts.layout_for(config, "hf")
    except UserError:
        return False
    raw = layout.write_config(config)
    return all(raw.get(key, value) == value for key, value in layout.vllm_assumes.items())


def refuse(config: Any, name: str | Path) -> None:
    """Refuse a llavakit model whose maths vLLM's Transformers back end cannot express.

    Raises:
        UserError: With the reason and what to do.
    """
    from llavakit.model.routes import MediaSpec

    routes = MediaSpec(config).routes
    readers = [route.connector_options["type"] for route in routes.values() if route.connector_cls.needs_prompt]
    if readers:
        raise UserError(
            f"{name}: connector {readers[0]!r} reads the prompt, which vLLM's back end cannot express; {NATIVE}"
        )
    if config.language_adapter is not None:
        raise UserError(
            f"{name}: language adapter {config.language_adapter['type']!r} runs the decoder in its own way, which "
            f"vLLM's back end cannot express; {NATIVE}"
        )
    if "image" not in routes:
        raise UserError(
            f"{name}: takes {', '.join(sorted(routes))} only, and llavakit's vLLM plugin passes on images; {NATIVE}"
        )
