"""Train with a vision encoder of your own: python examples/own_encoder.py RECIPE [KEY=VALUE]..."""

import sys

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from llavakit.registry import ENCODERS
from llavakit.training import load_recipe
from llavakit.training.run import train


class PatchesConfig(PreTrainedConfig):
    model_type = "own_patches"
    hidden_size: int = 64
    patch_size: int = 8
    prefix_tokens: int = 0  # class tokens in front of the grid
    feature_stride = property(lambda self: (1, self.patch_size, self.patch_size))  # pixels per feature
    feature_width = property(lambda self: self.hidden_size)


class Patches(PreTrainedModel):
    config_class, main_input_name = PatchesConfig, "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Conv2d(3, config.hidden_size, config.patch_size, config.patch_size)
        self.post_init()

    def features(self, pixel_values, layer, strategy="default"):
        return self.embed(pixel_values).flatten(2).transpose(1, 2)  # [views, features, width]


ENCODERS.add("own_patches", Patches)
own = ["parts.vision_config={model_type: own_patches}", "parts.init={}"]
print(train(load_recipe(sys.argv[1], [*own, *sys.argv[2:]])).final)
