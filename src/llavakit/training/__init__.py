"""Training: recipes, stages, distributed launch.

A recipe (`recipe.py`, its `overrides.py`, `scaling.py` for tiny ones) is read, built (`build.py`), checked (`check.py`)
and run stage by stage (`run.py`, `stage.py`) on transformers' Trainer (`trainer.py`). What trains and how fast is
`parameter_groups.py` and `lora.py`; samples and batches are `dataset.py`; features of frozen encoders are kept by
`features.py`; `fingerprint.py` knows what a run was made of; `attention.py` makes packed rows cheap on CPUs;
`distributed.py` shards the model; `summary.py` and `callbacks.py` show and write progress.
"""

from __future__ import annotations

from llavakit.training.recipe import Recipe, load_recipe, parse_recipe
from llavakit.training.scaling import scale

__all__ = ["Recipe", "load_recipe", "parse_recipe", "scale"]
