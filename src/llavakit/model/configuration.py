"""The configuration of the one model class: parts by registered name, media by modality.

media:
  image:                     # modality: image, video, volume, or multi_image (an image among several)
    encoder: vision_tower      # which encoder, or a list of several; default: what the connector reads
    connector: multi_modal_projector   # ... and which connector it goes through (default)
    views: {type: pad, size: 336}      # planner and its options
    arrange: {type: flat}              # layout of the visual tokens in the prompt
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, PreTrainedConfig

from llavakit.errors import UserError
from llavakit.registry import ENCODERS, nearest

_KINDS: dict[str, type] = {
    "connector": dict,
    "media": dict,
    "extra_encoders": dict,
    "extra_connectors": dict,
    "image_token_id": int,
    "template": str,
}
MAIN_ENCODER, MAIN_CONNECTOR = "vision_tower", "multi_modal_projector"
NO_PLACEHOLDER = -1  # `image_token_id` of a model without a vision side
ROUTE_KEYS = ("encoder", "connector", "views", "arrange")
MOST_LAYERS = 1000  # of a part; more would be built for hours before a tensor is found missing
STRATEGIES = ("default", "full", "drop_first")
ENCODER_KEYS = ("config", "layer", "strategy")
DEFAULT_MEDIA = {"image": {"views": {"type": "pad", "size": 336}, "arrange": {"type": "flat"}}}


def build_config(config: dict[str, Any] | PreTrainedConfig | None, default_type: str) -> PreTrainedConfig:
    """A transformers configuration from its dict form; None gives the defaults of `default_type`."""
    if isinstance(config, PreTrainedConfig):
        if config.model_type not in CONFIG_MAPPING:
            register_encoder(config.model_type)
        return config
    options = dict(config or {})
    model_type = options.pop("model_type", default_type)
    if model_type not in CONFIG_MAPPING:
        if model_type not in ENCODERS:
            raise UserError(f"model_type {model_type!r}: neither transformers nor llavakit has one of that name")
        register_encoder(model_type)
    return CONFIG_MAPPING[model_type](**options)


def check_keys(options: Any, known: Sequence[str], where: str) -> None:
    """Refuse what is no mapping or has an unknown key.

    Raises:
        UserError: Naming the key and the nearest known one.
    """
    if not isinstance(options, Mapping):
        raise UserError(f"{where}: is {options!r}, it should be a mapping with {', '.join(known)}")
    for key in options:
        if key not in known:
            raise UserError(f"{where}.{key}: unknown key{nearest(str(key), list(known))}")


def register_encoder(model_type: str) -> None:
    """Make transformers know an encoder of llavakit's own or of a system by the model type in its configuration.

    Raises:
        UserError: If none of that type is registered.
    """
    cls = ENCODERS.get(model_type)
    AutoConfig.register(model_type, cls.config_class, exist_ok=True)
    AutoModel.register(cls.config_class, cls, exist_ok=True)


@strict
class LlavakitConfig(PreTrainedConfig):
    """Configuration of `LlavakitForConditionalGeneration`.

    Args:
        text_config: Any transformers causal language model.
        vision_config: The main encoder (`model.vision_tower`), any transformers vision model; None together with an
            empty `media` for a language model without a vision side.
        connector: `{"type": name, **options}` of the main connector (`model.multi_modal_projector`).
        media: Per modality how it is cut, encoded and laid out; see the module's docstring. None takes one padded image
            of 336 pixels, an empty mapping takes no media at all.
        extra_encoders: Further encoders by attribute name: `{"config": {...}, "layer": -2, "strategy": "default"}`.
        extra_connectors: Further connectors by attribute name, each with the `encoder` it reads from (a name, or a list
            for connectors that read several).
        language_adapter: `{"type": name, **options}` of an adapter that runs the decoder, or None.
        vision_feature_layer: Hidden state(s) of the main encoder that the connector reads.
        vision_feature_select_strategy: "default" drops class and register tokens, "full" keeps them, "drop_first"
            drops one token, whatever it is (what transformers' classes mean by "default").
        image_token_id: Placeholder id; one per visual token in expanded prompts. -1 for a model that takes no media.
        template: Name of the chat template the weights were trained with.
        codec: Name of the codec of reasoning and tool calls, or None for that of the system.
        system: Slug of the published system, or None for a free combination.
        extras: Values that only a system's own parts read (declared in the system's documentation).
    """

    model_type = "llavakit"
    attribute_map = {"image_token_index": "image_token_id"}
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    connector: dict | None = None
    media: dict | None = None
    extra_encoders: dict | None = None
    extra_connectors: dict | None = None
    language_adapter: dict | None = None
    vision_feature_layer: int | list | tuple = -2
    vision_feature_select_strategy: str = "default"
    image_token_id: int = 32000
    template: str = "v1"
    codec: str | None = None
    system: str | None = None
    extras: dict | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.text_config = build_config(self.text_config, "llama")
        self.media = DEFAULT_MEDIA if self.media is None else self.media
        if self.media or self.vision_config is not None:
            self.vision_config = build_config(self.vision_config, "clip_vision_model")
        self.connector = self.connector or {"type": "mlp"}
        self.extra_encoders = self.extra_encoders or {}
        self.extra_connectors = self.extra_connectors or {}
        if isinstance(self.language_adapter, (list, tuple)):
            names = [part.get("type") if isinstance(part, Mapping) else part for part in self.language_adapter]
            raise UserError(
                f"language_adapter: {' and '.join(map(repr, names))} cannot run one decoder together; name one of them"
            )
        self.tie_word_embeddings = self.tie_word_embeddings or bool(
            getattr(self.text_config, "tie_word_embeddings", False)
        )
        super().__post_init__(**kwargs)

    def check(self) -> None:
        """Look at what transformers takes without looking.

        Raises:
            UserError: If a field has a wrong type or value; the message names it.
        """
        for name, kind in _KINDS.items():
            if not isinstance(value := getattr(self, name), kind):
                raise UserError(f"{name}: is {value!r}, it should be of type {kind.__name__}")
        for where, part in (("text_config", self.text_config), ("vision_config", self.vision_config)):
            depth = getattr(part, "num_hidden_layers", 1)
            if isinstance(depth, bool) or not isinstance(depth, int) or not 0 <= depth <= MOST_LAYERS:
                raise UserError(f"{where}.num_hidden_layers: is {depth!r}, it should be a number up to {MOST_LAYERS}")
        layers = self.vision_feature_layer
        depth = getattr(self.vision_config, "num_hidden_layers", None)
        for layer in layers if isinstance(layers, (list, tuple)) else [layers]:
            if not isinstance(layer, int):
                raise UserError(f"vision_feature_layer: is {layer!r}, it should be the number of a layer, or several")
            if depth is not None and not -depth - 1 <= layer <= depth:
                raise UserError(f"vision_feature_layer: is {layer}, the encoder has {depth} layers")
        if self.vision_feature_select_strategy not in STRATEGIES:
            raise UserError(
                f"vision_feature_select_strategy: is {self.vision_feature_select_strategy!r}, "
                "it should be 'default' or 'full' (or 'drop_first')"
            )

    @property
    def hidden_size(self) -> int:
        """Width of the language model."""
        return self.text_config.hidden_size

    def encoder_names(self) -> list[str]:
        """Attribute names of all encoders."""
        return [MAIN_ENCODER] * (self.vision_config is not None) + list(self.extra_encoders)

    def encoder_config(self, name: str) -> tuple[PreTrainedConfig, int | list, str]:
        """Configuration, feature layer and select strategy of an encoder by attribute name.

        Raises:
            UserError: If there is no encoder of this name, or it has an unknown key.
        """
        if name == MAIN_ENCODER and self.vision_config is not None:
            return self.vision_config, self.vision_feature_layer, self.vision_feature_select_strategy
        if name not in self.extra_encoders:
            raise UserError(f"encoder {name!r}: the configuration has none{nearest(name, self.encoder_names())}")
        extra = self.extra_encoders[name]
        check_keys(extra, ENCODER_KEYS, f"extra_encoders.{name}")
        config = build_config(extra.get("config"), "clip_vision_model")
        return config, extra.get("layer", -2), extra.get("strategy", "default")

    def _connector(self, name: str) -> dict[str, Any]:
        if name == MAIN_CONNECTOR:
            return self.connector
        if name not in self.extra_connectors:
            known = [MAIN_CONNECTOR, *self.extra_connectors]
            raise UserError(f"connector {name!r}: the configuration has none{nearest(name, known)}")
        return self.extra_connectors[name]

    def connector_options(self, name: str) -> dict[str, Any]:
        """`{"type": ..., **options}` of a connector by attribute name, without its `encoder`."""
        return {key: value for key, value in self._connector(name).items() if key != "encoder"}

    def connector_encoders(self, name: str) -> tuple[str, ...]:
        """Attribute names of the encoders that a connector reads."""
        names = self._connector(name).get("encoder", MAIN_ENCODER)
        return (names,) if isinstance(names, str) else tuple(names)


__all__ = ["LlavakitConfig"]
