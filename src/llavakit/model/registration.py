"""Make transformers' Auto classes know llavakit's model. Called once by the package, after transformers is there."""

from __future__ import annotations


def register_config() -> None:
    """`AutoConfig` for llavakit's model."""
    from transformers import AutoConfig

    from llavakit.model.configuration import LlavakitConfig

    AutoConfig.register(LlavakitConfig.model_type, LlavakitConfig, exist_ok=True)


def register_models() -> None:
    """`AutoModel` and `AutoModelForImageTextToText`."""
    from transformers import AutoModel, AutoModelForImageTextToText

    from llavakit.model.configuration import LlavakitConfig
    from llavakit.model.modeling import LlavakitForConditionalGeneration, LlavakitModel

    AutoModel.register(LlavakitConfig, LlavakitModel, exist_ok=True)
    AutoModelForImageTextToText.register(LlavakitConfig, LlavakitForConditionalGeneration, exist_ok=True)


def register_processors() -> None:
    """`AutoImageProcessor` and `AutoProcessor`."""
    from transformers import AutoProcessor

    # Without torchvision, the package of older releases offers a stand-in that only complains; the class itself works.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    from llavakit.model.configuration import LlavakitConfig
    from llavakit.model.processing import LlavakitImageProcessorPil, LlavakitProcessor

    classes = {"pil": LlavakitImageProcessorPil}
    AutoImageProcessor.register(LlavakitConfig, image_processor_classes=classes, exist_ok=True)
    AutoProcessor.register(LlavakitConfig, LlavakitProcessor, exist_ok=True)
