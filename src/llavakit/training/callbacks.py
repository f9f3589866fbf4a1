"""Progress bar of a training run, and its loss curve as JSON.

`metrics.json` of a stage is written every few seconds, with every checkpoint and at the end, and holds all that the
trainer logged; `tokens` are those of all processes without padding, `seconds` also count steps that a kill made
necessary again:

    {"stage", "steps", "finished", "seconds", "tokens", "trainable": {part: parameters},
     "log": [{"step", "loss", "learning_rate", "grad_norm", "tokens_per_second"}, ...], "skipped": [...]}

Values that an objective reports are logged beside the loss.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llavakit.data.strict_json import read_json
from llavakit.training.summary import in_time

EVERY = 2.0  # seconds between two writings of what was logged
LEFT_OUT = ("step", "epoch", "num_input_tokens_seen", "total_flos")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(json.dumps(value, indent=1, default=str) + "\n", encoding="utf-8")
    scratch.replace(path)


def curve_of(state: TrainerState) -> list[dict[str, float]]:
    """The logged values by step."""
    return [
        {"step": entry["step"], **{key: value for key, value in entry.items() if key not in LEFT_OUT}}
        for entry in state.log_history
        if "loss" in entry
    ]


class Metrics(TrainerCallback):
    """Writes `metrics.json`.

    Args:
        path: The file.
        facts: What is known before training starts (stage, trainable parameters).
    """

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.path, self.facts = path, facts
        self.began = self.written = time.monotonic()
        self.earlier = read_json(path, kind=dict, finite=False).get("seconds", 0) if path.is_file() else 0

    def write(self, state: TrainerState, finished: bool = False) -> dict[str, Any]:
        """Write what is known now."""
        self.written = time.monotonic()
        values = {
            **self.facts,
            "finished": finished,
            "steps": state.global_step,
            "seconds": round(self.earlier + time.monotonic() - self.began, 3),
            "tokens": state.num_input_tokens_seen,
            "log": curve_of(state),
        }
        if state.is_world_process_zero:
            write_json(self.path, values)
        return values

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The last step is always logged."""
        control.should_log |= state.global_step >= state.max_steps

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Something was logged."""
        if time.monotonic() - self.written > EVERY:
            self.write(state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A checkpoint was written."""
        self.write(state)


class Bar(TrainerCallback):
    """A progress bar on a terminal, a line now and then elsewhere.

    Args:
        title: What the bar is called.
        console: Where it is drawn.
    """

    def __init__(self, title: str, console: Console) -> None:
        self.title, self.console = title, console
        self.progress: Progress | None = None
        self.printed = 0.0
        self.first: tuple[int, float] | None = None  # a step and when it ended, the first of this process

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw the bar."""
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self.progress = Progress(*columns, console=self.console)
            self.progress.start()
            self.task = self.progress.add_task(self.title, total=state.max_steps, completed=state.global_step, note="")
        elif state.global_step:
            self.console.print(f"{self.title}: goes on after step {state.global_step} of {state.max_steps}")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar."""
        self.first = self.first or (state.global_step, time.monotonic())
        if self.progress is not None:
            self.progress.update(self.task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the loss."""
        if not logs or "loss" not in logs:
            return
        note = f"loss {logs['loss']:.4f}"
        if "tokens_per_second" in logs:
            note += f", {logs['tokens_per_second']:,.0f} tokens/s"
        if self.progress is not None:
            self.progress.update(self.task, note=note)
        elif time.monotonic() - self.printed > 10 or state.global_step >= state.max_steps:
            self.printed = time.monotonic()
            note += self._left(state)
            self.console.print(f"{self.title}: step {state.global_step} of {state.max_steps}, {note}")

    def _left(self, state: TrainerState) -> str:
        """How long the rest takes at the pace since the first step, which also warms up; nothing at the end."""
        step, ended = self.first or (state.global_step, 0.0)
        left = state.max_steps - state.global_step
        if left <= 0 or state.global_step <= step:
            return ""
        return f", {in_time((time.monotonic() - ended) / (state.global_step - step) * left)} left"

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the finished bar on screen."""
        self.close()

    def close(self) -> None:
        """Stop drawing, also after an error."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None
