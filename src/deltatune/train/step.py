"""One optimizer step: micro-batches forward and backward, clipping, update. Every target of it weighs the same."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn

from deltatune.data.collate import Collator
from deltatune.data.example import TEXT_TASKS
from deltatune.data.features import Features
from deltatune.errors import LimitError, TrainError
from deltatune.memory import ran_out
from deltatune.model import PeftModel
from deltatune.train.base import autocast
from deltatune.train.optim import first_bad_gradient
from deltatune.train.processes import sums
from deltatune.train.settings import TrainSettings


@dataclass(frozen=True)
class Stepped:
    """What a step did."""

    loss: float  # mean over all targets of the step, all processes
    learning_rate: float
    grad_norm: float
    tokens: int  # of all processes


@dataclass
class Stepper:
    """Makes steps.

    Attributes:
        model: As accelerate prepared it; `bare` is the same without its wrapper.
        around: Called with "before_update" and "after_update".
    """

    settings: TrainSettings
    accelerator: Any
    model: nn.Module
    bare: nn.Module
    optimizer: Any
    scheduler: Any
    collator: Collator
    filler: list[Features]  # one row, for a process that has none left
    around: Callable[[str], None] = lambda event: None

    def __call__(self, micro: list[list[Features]], step: int) -> Stepped:
        """Raises TrainError before the update when loss or gradient is not finite: the weights stay good."""
        self.model.train()
        counts = [sum(row.targets for row in rows) for rows in micro]
        mine = sum(row.length for rows in micro for row in rows)
        total, tokens = sums(self.accelerator, float(sum(counts)), float(mine))
        # where the rows of the epoch's end did not reach this process, it takes part with weight zero
        micro = [rows or self.filler for rows in micro]
        try:
            (loss_sum,) = sums(self.accelerator, self._accumulate(micro, counts, total))
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            longest = max(row.length for rows in micro for row in rows)
            raise LimitError(
                f"out of memory at step {step} (rows of up to {longest} tokens)"
                "; lower per_device_train_batch_size or max_length, or set gradient_checkpointing: true",
                field="per_device_train_batch_size",
                key=str(step),
            ) from error
        loss = loss_sum / total
        if not math.isfinite(loss):
            self.refuse(f"loss is {loss} at step {step}", step)
        norm = self._clip(step)
        rate = self.scheduler.get_last_lr()[0]
        self.around("before_update")
        self.optimizer.step()
        if isinstance(self.bare, PeftModel):
            self.bare.after_step(step)
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.around("after_update")
        return Stepped(loss, rate, norm, int(tokens))

    def refuse(self, what: str, step: int) -> NoReturn:
        rate = self.scheduler.get_last_lr()[0]
        raise TrainError(
            f"training stopped: {what}, learning rate {rate:g}; lower learning_rate or raise warmup_ratio, "
            "and look at the rows of this step",
            field="learning_rate",
            key=str(step),
            found=what,
            expected="finite numbers",
        )

    def _accumulate(self, micro: list[list[Features]], counts: list[int], total: float) -> float:
        """The sum of the losses of this process's targets, whose gradients are added up."""
        loss_sum = 0.0
        for number, (rows, count) in enumerate(zip(micro, counts)):
            last = number == len(micro) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                loss = self._loss(rows)
                # gradients are averaged over the processes: undo that, each target counts once
                self.accelerator.backward(loss * (count * self.accelerator.num_processes / total))
                # (a filler's loss counts nothing, not even where it is not finite)
                loss_sum += float(loss.detach()) * count if count else 0.0
        return loss_sum

    def _loss(self, rows: list[Features]) -> torch.Tensor:
        device = self.accelerator.device
        batch: dict[str, Any] = {name: tensor.to(device) for name, tensor in self.collator(rows).items()}
        if self.settings.task in TEXT_TASKS:
            batch["use_cache"] = False
        with autocast(self.settings, device):
            return self.model(**batch).loss

    def _clip(self, step: int) -> float:
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        norm = self.accelerator.clip_grad_norm_(trained, self.settings.max_grad_norm or float("inf"))
        norm = float(norm) if norm is not None else 0.0
        if norm != norm or norm == float("inf"):
            name = first_bad_gradient(self.bare) or "the parameters"
            self.refuse(f"gradient of {name} is not finite at step {step} (norm {norm})", step)
        return norm
