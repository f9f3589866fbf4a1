"""vLLM: which checkpoints it can run, and llavakit's entry in its plugin system.

vLLM runs LLaVA-1.5 and LLaVA-OneVision natively from `llavakit convert --to hf`. llavakit's own checkpoints run
through its Transformers back end (`vllm_model`). What that back end cannot express (a connector that reads the
prompt, tokens dropped inside the decoder) is refused in one line instead of being served with wrong answers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llavakit.errors import UserError


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


def check(model: str | Path) -> None:
    """Refuse what vLLM would serve wrongly or not at all.

    Raises:
        UserError: With the reason and what to do.
    """
    from llavakit.model import layouts
    from llavakit.model.checkpoint import read_json
    from llavakit.model.configuration import LlavakitConfig

    path = Path(model)
    if not path.is_dir():
        return  # a hub id; vLLM reads its configuration itself
    raw = read_json(path / "config.json")
    if raw.get("model_type") == LlavakitConfig.model_type:
        refuse(LlavakitConfig.from_dict(raw), model)
    elif "text_config" not in raw:
        layout = layouts.detect(path, raw)
        raise UserError(
            f"{model}: vLLM does not read the layout {layout.system} ({layout.form}); convert it first: "
            f"llavakit convert {model} NEW --to llavakit"
        )


def refuse(config: Any, name: str | Path) -> None:
    """Refuse a llavakit model whose maths vLLM's Transformers back end cannot express.

    Raises:
        UserError: With the reason and what to do.
    """
    from llavakit.model.media import MediaSpec

    native = "serve it with llavakit serve --engine native"
    routes = MediaSpec(config).routes
    readers = [route.connector_options["type"] for route in routes.values() if route.connector_cls.needs_prompt]
    if readers:
        raise UserError(
            f"{name}: connector {readers[0]!r} reads the prompt, which vLLM's back end cannot express; {native}"
        )
    if config.language_adapter is not None:
        raise UserError(
            f"{name}: language adapter {config.language_adapter['type']!r} runs the decoder in its own way, which "
            f"vLLM's back end cannot express; {native}"
        )
    if "image" not in routes:
        raise UserError(
            f"{name}: takes {', '.join(sorted(routes))} only, and llavakit's vLLM plugin passes on images; {native}"
        )
