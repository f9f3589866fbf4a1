"""vLLM: which checkpoints it can run, and llavakit's entry in its plugin system.

vLLM runs LLaVA-1.5 and LLaVA-OneVision natively from `llavakit convert --to hf`. Plain llavakit checkpoints run
through its Transformers back end. What that back end cannot express (a connector that reads the prompt, tokens
dropped inside the decoder) is refused in one line instead of being served with wrong answers.
"""

from __future__ import annotations

from pathlib import Path

from llavakit.errors import UserError


def register() -> None:
    """Entry point of `vllm.general_plugins`; called in every process of vLLM, possibly more than once."""
    import transformers.models.auto.modeling_auto  # noqa: F401  the Auto classes learn of llavakit with it
    from vllm import ModelRegistry

    from llavakit.model import registration

    registration.register_config()
    registration.register_models()
    registration.register_processors()
    backend = "vllm.model_executor.models.transformers:TransformersMultiModalForCausalLM"
    if "LlavakitForConditionalGeneration" not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model("LlavakitForConditionalGeneration", backend)


def check(model: str | Path) -> None:
    """Refuse what vLLM would serve wrongly.

    Raises:
        UserError: With the reason and what to do.
    """
    from llavakit.model.checkpoint import read_json
    from llavakit.model.configuration import LlavakitConfig

    path = Path(model)
    if not path.is_dir():
        return  # a hub id; vLLM reads its configuration itself
    raw = read_json(path / "config.json")
    if raw.get("model_type") != LlavakitConfig.model_type:
        if "text_config" not in raw:
            raise UserError(
                f"{model}: vLLM does not read this layout; convert it first: llavakit convert {model} NEW --to hf"
            )
        return
    config = LlavakitConfig.from_dict(raw)
    from llavakit.model.media import MediaSpec

    routes = MediaSpec(config).routes
    readers = [route.connector_options["type"] for route in routes.values() if route.connector_cls.needs_prompt]
    if readers:
        raise UserError(
            f"{model}: connector {readers[0]!r} reads the prompt, which vLLM's back end cannot express; "
            "serve it with --engine native"
        )
    if config.language_adapter is not None:
        raise UserError(
            f"{model}: language adapter {config.language_adapter['type']!r} runs the decoder in its own way, which "
            "vLLM's back end cannot express; serve it with --engine native"
        )
    others = sorted(set(routes) - {"image", "multi_image"})
    if "image" not in routes:
        raise UserError(f"{model}: takes {', '.join(others)} only, which llavakit's vLLM plugin does not pass on")
