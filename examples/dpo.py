"""Learn from preferences (DPO): python examples/dpo.py MODEL PAIRS.jsonl OUTPUT [KEY=VALUE]...

A pair is {"prompt": ..., "chosen": ..., "rejected": ..., "image": ...}, see docs/data.md.
"""

import sys

from llavakit.training.recipe import parse_recipe
from llavakit.training.run import train

model_path, pairs, output, *overrides = sys.argv[1:]
stage = {
    "name": "prefer",
    "objective": {"type": "dpo", "beta": 0.1},
    "train": ["multi_modal_projector"],
    "lora": {"rank": 16, "alpha": 32},  # on the language model
    "learning_rate": 5e-5,
    "batch_size": 4,
    "log_steps": 1,
}
recipe = {"model": model_path, "data": [pairs], "stages": [stage], "output": output}
result = train(parse_recipe(recipe, overrides))
last = result.stages[-1].metrics["log"][-1]
print(f"{result.final}: {100 * last['reward_accuracy']:.0f} % of the pairs are told apart")
