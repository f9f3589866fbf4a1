"""Connectors: feature grids to visual tokens. Names are registered here, code is imported on first use."""

from llavakit.registry import CONNECTORS

for _name, _cls in {"mlp": "MLP", "pooling": "Pooling", "resampler": "Resampler"}.items():
    CONNECTORS.add(_name, f"llavakit.connectors.general:{_cls}")
