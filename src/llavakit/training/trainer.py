"""transformers' Trainer for one stage: our batches, groups, objective and checkpoints.

Everything that makes training repeatable lives in a checkpoint: weights, optimiser, schedule, random states and the
step, from which the position in the planned batches follows. Checkpoints appear whole or not at all.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainingArguments

from llavakit.checkpoints.files import clear_write_errors, move_durably
from llavakit.training import distributed
from llavakit.training.dataset import Batches, Failure, PreparedSamples
from llavakit.training.fingerprint import STAMP
from llavakit.training.lora import load_adapter, save_adapter
from llavakit.training.lora_targets import GradientCheck
from llavakit.training.objectives.base import Objective, Step
from llavakit.training.parameter_groups import Rates, core, optimizer_groups, progress_hooks
from llavakit.training.recipe import Stage
from llavakit.training.schedules import SET_AFTER_STEP, STEP, set_after_step, step_decay
from llavakit.training.streaming import StreamBatches, StreamSamples

PREFIX = "checkpoint-"


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints of a stage, oldest first."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)))


def _warmed_up(rate: Callable[[int], float], steps: int) -> Callable[[int], float]:
    """A schedule whose warm-up ends one step earlier, so that the first step has a rate above zero."""
    return lambda step: (step + 1) / steps if step < steps else rate(step)


class StageTrainer(Trainer):
    """Trains one stage.

    Args:
        model: Prepared by `lora.prepare`, perhaps sharded by `distributed.shard`.
        args: See `training_arguments`.
        stage: The stage.
        objective: What it learns.
        samples: What to learn from.
        batches: This process's batches of the whole stage, see `plan_batches`, or those of a stream.
        collator: Lays samples together, see `Objective.collator`.
        processor: Saved with every checkpoint.
        seed: Of the data loader's workers.
        base: With LoRA the folder of the model that is adapted.

    Attributes:
        stamp: What the stage is made of, see `fingerprint`; written into every checkpoint.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        stage: Stage,
        objective: Objective,
        samples: PreparedSamples | StreamSamples,
        batches: Sequence[Sequence[int]] | StreamBatches,
        collator: Callable[[Sequence[Any]], Any],
        processor: Any,
        seed: int = 0,
        base: Path | None = None,
    ) -> None:
        self.base = base
        self.stage, self.samples = stage, samples
        self.batches = batches if isinstance(batches, StreamBatches) else Batches(batches)
        self.objective, self.processor, self.data_seed = objective, processor, seed
        self._logged: dict[str, list[Tensor]] = {}
        self._spoken = time.monotonic()
        self._uncounted: Tensor | int = 0
        self.stamp: str | None = None
        self._scratch: Path | None = None
        self.net = core(model)
        self._hooks = progress_hooks(self.net)
        self._adapters = GradientCheck(self.net, model) if stage.lora is not None else None
        config = getattr(self.net, "config", None)
        use_cache = getattr(config, "use_cache", None)
        super().__init__(model=model, args=args, data_collator=collator, train_dataset=samples)
        self.remove_callback(PrinterCallback)
        if config is not None:  # only the decoder's own setting matters, and objectives ask for no cache
            config.use_cache = use_cache

    # data and optimiser

    def get_train_dataloader(self) -> DataLoader:
        """Batches as planned; every process has its own list, so nothing is dealt again here."""
        return DataLoader(
            self.samples,
            batch_sampler=self.batches,
            collate_fn=self.data_collator,
            num_workers=self.stage.workers,
            persistent_workers=False,
            pin_memory=self.args.dataloader_pin_memory,
            # A generator of its own: the loader must not draw from the random state that dropout uses.
            generator=torch.Generator().manual_seed(self.data_seed),
        )

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimiser with one pair of groups per part."""
        if self.optimizer is None:
            groups = optimizer_groups(self.model, Rates.of(self.stage))
            for group in groups:
                del group["names"]
            cls, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = cls(groups, **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """transformers' schedule, but with a rate in the first step: warm-up step k of w has k / w of it, not k - 1."""
        fresh = self.lr_scheduler is None
        own = self.optimizer if optimizer is None else optimizer
        if fresh and self.stage.schedule == SET_AFTER_STEP:
            own_warmup = self.args.get_warmup_steps(int(self.stage.schedule_options.get("steps", num_training_steps)))
            self.lr_scheduler = set_after_step(own, own_warmup, num_training_steps, **self.stage.schedule_options)
            return self.lr_scheduler
        # some schedules divide by what a warm-up leaves
        warmup = self.args.warmup_steps = min(self.args.get_warmup_steps(num_training_steps), num_training_steps - 1)
        if fresh and self.stage.schedule == STEP:
            self.lr_scheduler = step_decay(own, warmup, num_training_steps, **self.stage.schedule_options)
        schedule = super().create_scheduler(num_training_steps, optimizer)
        if fresh and isinstance(schedule, LambdaLR) and warmup and schedule.lr_lambdas[0](0) == 0:
            schedule.lr_lambdas = [_warmed_up(rate, warmup) for rate in schedule.lr_lambdas]
            for group, base, rate in zip(
                schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
            ):
                group["lr"] = base * rate(0)
            schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]
        return schedule

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """Not counted while training; `llavakit cost` does that."""
        return 0

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm that clipping found; without clipping it is only computed for steps that are logged."""
        if grad_norm is not None or (self.state.global_step + 1) % self.stage.log_steps in (0, 1):
            return super()._get_grad_norm(model, grad_norm)
        return None

    # loss

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor:
        """The objective's items of all accumulated batches of all processes: the loss's denominator, at least 1."""
        for batch in batch_samples:
            if isinstance(batch, Failure):
                raise batch.error
        items = sum(torch.as_tensor(self.objective.items(batch)) for batch in batch_samples)
        tokens = torch.tensor(sum(batch["tokens"] for batch in batch_samples))
        counts = torch.stack([torch.as_tensor(items), tokens]).to(device)
        if self.args.world_size > 1:
            counts = self.accelerator.gather(counts[None]).sum(0)
        self._uncounted = self._uncounted + counts[1]
        return counts[0].clamp(min=1)

    def count_tokens(self) -> int:
        """Tokens of all processes since the stage began; part of a checkpoint, so a kill counts none of them twice."""
        self.state.num_input_tokens_seen += int(self._uncounted)
        self._uncounted = 0
        return self.state.num_input_tokens_seen

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """The objective's loss of a batch, as its share of the optimiser step."""
        step = Step(num_items_in_batch, self.current_gradient_accumulation_steps * self.args.world_size)
        loss = self.objective.loss(model, inputs, step)
        for name, value in loss.logged.items():
            self._logged.setdefault(name, []).append(value.detach())
        # gradients are averaged over processes, but the denominator counts all of them already
        value = loss.value * self.args.world_size
        return (value, {}) if return_outputs else value

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One batch, forward and backward."""
        for hook in self._hooks:
            hook(self.state.global_step / max(self.state.max_steps, 1))
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._adapters is not None and self._adapters.pending:
            self._adapters.after_batch(inputs, self.accelerator.sync_gradients)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add throughput and the objective's own values to what is logged."""
        if "loss" in logs:
            now, tokens = time.monotonic(), int(self._uncounted)
            self.count_tokens()
            logs["tokens_per_second"] = round(tokens / max(now - self._spoken, 1e-9), 1)
            self._spoken = now
            logs |= {name: torch.stack(values).float().mean().item() for name, values in self._logged.items()}
            self._logged.clear()
        super().log(logs, *args, **kwargs)

    # checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._scratch) if self._scratch is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint beside its place and move it there when it is whole; then remove old ones."""
        self.count_tokens()
        if self.state.global_step >= self.state.max_steps:
            return  # the finished model is about to be written
        root = Path(self.args.output_dir)
        target = root / f"{PREFIX}{self.state.global_step}"
        scratch = Path(tempfile.mkdtemp(prefix=".saving-", dir=root)) if self.is_world_process_zero() else None
        self._scratch = distributed.from_main(scratch)
        whole = checkpoints(root)
        kept = f"{whole[-1].name} is whole, " if whole else ""
        try:
            with clear_write_errors(target, f"{kept}make room and start again to go on from there"):
                super()._save_checkpoint(model, trial)
                if isinstance(self.batches, StreamBatches):
                    self.batches.save(self._scratch / target.name, self.state.global_step * self.stage.accumulation)
                distributed.barrier()
                if self.is_world_process_zero():
                    if self.stamp is not None:
                        (self._scratch / target.name / STAMP).write_text(self.stamp, encoding="utf-8")
                    shutil.rmtree(target, ignore_errors=True)
                    move_durably(self._scratch / target.name, target)
        finally:
            if self.is_world_process_zero():
                shutil.rmtree(self._scratch, ignore_errors=True)
            self._scratch = None
        if self.is_world_process_zero():
            for old in checkpoints(root)[: -self.stage.keep]:
                shutil.rmtree(old)
        distributed.barrier()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """A loadable checkpoint; with LoRA the adapter, the other trained parameters and the processor."""
        folder = Path(output_dir or self.args.output_dir)
        state = distributed.full_state(self.model)
        if self.is_world_process_zero():
            if hasattr(self.model, "peft_config"):
                place = Path(self.args.output_dir) / folder.name  # it is written beside its place
                save_adapter(self.model, state, self.processor, folder, self.base, place)
            else:
                self.objective.save(state, getattr(self.net, "config", None), self.processor, folder)
        distributed.barrier()  # the folder appears whole, so what other processes add to it must come later

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """LoRA only: a full model was built from the checkpoint already."""
        if hasattr(self.model, "peft_config"):
            load_adapter(self.model, Path(resume_from_checkpoint))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not distributed.is_sharded(self.model):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = distributed.full_optimizer_state(self.model, self.optimizer)
        if self.is_world_process_zero():
            torch.save(state, Path(output_dir) / "optimizer.pt")
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not distributed.is_sharded(self.model):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state = torch.load(Path(checkpoint) / "optimizer.pt", map_location="cpu", weights_only=True)
        distributed.load_optimizer_state(self.model, self.optimizer, state)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))

    def _wrap_model(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """A sharded model gets a wrapper that keeps accelerate from wrapping it once more."""
        if distributed.is_sharded(model):
            return distributed.Sharded(model)
        return super()._wrap_model(model, *args, **kwargs)
