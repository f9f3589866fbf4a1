"""Training: recipes, stages, distributed launch.

A recipe (`recipe.py`) is read, built (`build.py`) and run stage by stage (`run.py`) on transformers' Trainer
(`trainer.py`). What trains and how fast is `select.py`; samples and batches are `dataset.py`; features of frozen
encoders are kept by `features.py`; `attention.py` makes packed rows cheap on CPUs; `distributed.py` shards the model;
`report.py` shows and writes progress.
"""

from __future__ import annotations

from llavakit.training.recipe import Recipe, load_recipe, parse_recipe, scale

__all__ = ["Recipe", "load_recipe", "parse_recipe", "scale"]
