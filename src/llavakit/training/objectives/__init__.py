"""Training objectives: what a stage learns, by registered name.

    stages:
      - name: tune
        objective: supervised            # the default
      - name: align
        objective: {type: my_objective, temperature: 0.1}

An objective owns the way from a record to a loss: reading records, samples, batches, the loss, and which module is
trained and saved. Stages, packing, checkpoints, resuming and progress know none of them.
"""

from llavakit.training.objectives.base import Loss, Objective, Run, Step, objective_of

__all__ = ["Loss", "Objective", "Run", "Step", "objective_of"]
