"""Train with a connector of your own: python examples/own_connector.py RECIPE [KEY=VALUE]..."""

import sys

from torch import nn

from llavakit.connectors.base import Connector, Features
from llavakit.registry import CONNECTORS
from llavakit.training import load_recipe
from llavakit.training.run import train


class Gated(Connector):
    """Every feature is projected, and scaled by a gate that it computes itself."""

    def __init__(self, *, vision_width, hidden_size, text_config=None):  # options of your own as keywords
        super().__init__(vision_width=vision_width, hidden_size=hidden_size)
        self.project, self.gate = nn.Linear(vision_width, hidden_size), nn.Linear(vision_width, 1)

    @classmethod
    def token_grids(cls, options, plan, grids):
        return list(grids)  # as many tokens as features

    def forward(self, features, plans, prompt=None):
        tokens = self.project(features.values) * self.gate(features.values).sigmoid()
        return Features(tokens, features.grids, features.media_index)


CONNECTORS.add("own_gated", Gated)
print(train(load_recipe(sys.argv[1], ["parts.connector={type: own_gated}", *sys.argv[2:]])).final)
