"""Several candidates in one pass over one frozen base: each batch is there once per candidate, rows under their own.

loss of a pass    mean over C times the same rows; times C it is the sum of the candidates' own losses
gradients         of a candidate's parameters: those of its lone run, because no other candidate's loss reaches them
step              one optimizer, schedule and clipping per candidate

The base's weights are read once for all. With dropout in the base or the adapters each candidate has masks of its own,
as in lone runs, but others than its lone run would draw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.data.example import TEXT_TASKS
from deltatune.data.features import Features
from deltatune.data.order import Order
from deltatune.data.prepare import Corpus
from deltatune.errors import TrainError
from deltatune.model import PeftModel
from deltatune.prompts.key_values import Prefix
from deltatune.registry import METHODS
from deltatune.tasks import get_peft_model
from deltatune.train import randomness
from deltatune.train.base import autocast
from deltatune.train.defaults import FULL
from deltatune.train.method import peft_config
from deltatune.train.optim import build_optimizer, build_scheduler
from deltatune.train.pace import Clock, Pace
from deltatune.train.settings import UNKNOWN_STEPS, TrainSettings

# what candidates in one pass may set as they like; all other settings are those of the pass
OWN = {
    "method", "method_options", "learning_rate", "weight_decay", "optimizer", "loraplus_lr_ratio", "adam_beta1",
    "adam_beta2", "adam_epsilon", "max_grad_norm", "lr_scheduler_type", "warmup_ratio", "warmup_steps", "output_dir",
}  # fmt: skip
_PLAIN_STARTS = (None, True, False, "gaussian")  # others change the base, or need data


def why_alone(settings: TrainSettings) -> str | None:
    """Why a candidate cannot share a pass with others; None where it may."""
    if settings.method == FULL:
        return "it trains the base"
    config: Any = peft_config(settings.method, settings.task, settings.options_of(UNKNOWN_STEPS))
    method = METHODS[config.peft_type]
    if method.graft not in (None, Prefix):
        return "its adapter is not on the layers"
    if method.schedule is not None or (method.adapter is not None and method.adapter.penalises(config)):
        return "its method has a schedule or a loss of its own"
    if getattr(config, "init_lora_weights", None) not in _PLAIN_STARTS:
        return "its start changes the base, or needs data"
    if settings.optimizer not in ("adamw", "loraplus"):
        return f"optimizer {settings.optimizer} is not for some of the parameters only"
    if settings.packing or settings.gradient_checkpointing:
        return "packing and gradient_checkpointing have not been made for rows of several adapters"
    if settings.load_best_model_at_end or settings.early_stopping_patience or settings.eval_steps != 0:
        return "evaluations while it trains are its own"
    return None


def shared_settings(settings: TrainSettings) -> str:
    """Equal for candidates that can be in one pass."""
    return settings.model_copy(update=dict.fromkeys(OWN)).model_dump_json(warnings=False)


@dataclass
class Member:
    """A candidate in the pass: its adapter's name, and what moves its parameters."""

    name: str
    settings: TrainSettings
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    scheduler: Any
    failed: str | None = None


class Together:
    """A model with the adapters of all candidates, and the steps that train them.

    Attributes:
        counts: All parameters that a candidate's lone run would count.
    """

    def __init__(
        self, base: nn.Module, corpus: Corpus, settings: Sequence[TrainSettings], device: torch.device
    ) -> None:
        self.corpus, self.device, self.shared = corpus, device, settings[0]
        self.order = Order(
            [row.length for row in corpus.train.features],
            self.shared.seed,
            self.shared.per_device_train_batch_size,
            self.shared.gradient_accumulation_steps,
            1,
            self.shared.group_by_length,
        )
        self.pace = Pace.of(self.shared, self.order.steps_per_epoch)
        self.clock, self.seconds, self.step = Clock(), 0.0, 0
        size = _count(base)
        self.counts: list[int] = []
        model: PeftModel | None = None
        for number, own in enumerate(settings):
            randomness.seed_all(own.seed)  # as a lone run does before it adapts the base
            config = peft_config(own.method, own.task, own.options_of(self.pace.total_steps))
            before = size if model is None else _count(model)
            if model is None:
                model = get_peft_model(base, config, _name(number))  # type: ignore[arg-type, assignment]
            else:
                model.add_adapter(_name(number), config)
            self.counts.append(size + _count(model) - before)
        assert model is not None
        self.model = model
        self.members = [self._member(number, own) for number, own in enumerate(settings)]
        self.all_train()
        randomness.seed_all(self.shared.seed)

    def _member(self, number: int, settings: TrainSettings) -> Member:
        self.model.set_adapter(_name(number))
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for parameter in parameters:
            if parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.float()
        optimizer = build_optimizer(self.model, settings)
        for group in optimizer.param_groups:  # one call for all tensors: with six candidates they are many and small
            group.update(fused=True, foreach=False)
        scheduler = build_scheduler(optimizer, settings, self.pace.total_steps)
        return Member(_name(number), settings, parameters, optimizer, scheduler)

    @property
    def training(self) -> list[Member]:
        return [member for member in self.members if member.failed is None]

    def train(self, after_step: Callable[[], object] = lambda: None) -> None:
        """All steps.

        Raises:
            TrainError: No candidate is left with finite numbers.
        """
        rows: list[int] = []
        while self.step < self.pace.total_steps:
            epoch, index = divmod(self.step, self.pace.steps_per_epoch)
            if not rows or index == 0:
                rows = self.order.epoch(epoch)
            micro = self.order.step(rows, index)
            self.clock.begin()
            self.make_step([[self.corpus.train.features[i] for i in part] for part in micro])
            self.seconds += self.clock.end(sum(len(part) for part in micro))
            after_step()

    def make_step(self, micro: list[list[Features]]) -> None:
        """One optimizer step of every candidate, over these micro-batches."""
        self.model.train()
        members = self.training
        counts = [sum(row.targets for row in rows) for rows in micro]
        for rows, count in zip(micro, counts):
            loss = self.loss(rows, [member.name for member in members])
            (loss * (count / sum(counts))).backward()
        self.step += 1
        for member in members:
            norm = nn.utils.clip_grad_norm_(member.parameters, member.settings.max_grad_norm or float("inf"))
            if not torch.isfinite(norm):  # one candidate's numbers reach no other's
                self._drop(member, f"its gradient is not finite at step {self.step}")
                continue
            member.optimizer.step()
            member.scheduler.step()
            member.optimizer.zero_grad(set_to_none=True)
        if not self.training:
            raise TrainError(
                "no candidate is left: " + "; ".join(str(member.failed) for member in self.members),
                field="candidates",
                found=[str(member.failed) for member in self.members],
                expected="a candidate that trains",
            )

    def loss(self, rows: list[Features], names: Sequence[str]) -> Tensor:
        """The sum of the losses that the candidates have on these rows, each its mean over the targets."""
        by_row = [name for name in names for _ in rows]
        with autocast(self.shared, self.device):
            return self.model(**self._batch(rows, len(names)), adapter_names=by_row).loss * len(names)

    def lone_loss(self, rows: list[Features]) -> Tensor:
        """The loss of the active adapter on these rows, without rows of others beside them."""
        with autocast(self.shared, self.device):
            return self.model(**self._batch(rows, 1)).loss

    def _batch(self, rows: list[Features], times: int) -> dict[str, Any]:
        assert self.corpus.collator is not None
        batch: dict[str, Any] = {
            name: tensor.to(self.device).repeat(times, *[1] * (tensor.ndim - 1))
            for name, tensor in self.corpus.collator(rows).items()
        }
        return {**batch, "use_cache": False} if self.shared.task in TEXT_TASKS else batch

    def _drop(self, member: Member, why: str) -> None:
        member.failed = f"training stopped: {why}; lower its learning_rate"
        for parameter in member.parameters:
            parameter.grad = None
            parameter.requires_grad_(False)

    def all_train(self) -> None:
        for member in self.members:
            for parameter in member.parameters:
                parameter.requires_grad_(member.failed is None)


def _name(number: int) -> str:
    return f"candidate{number}"


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
