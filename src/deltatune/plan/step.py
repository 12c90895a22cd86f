"""Two steps of a job without numbers: what is in memory, part by part, and what they cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltatune.errors import ConfigError
from deltatune.plan.job import Job, Shape
from deltatune.plan.live import LiveBytes
from deltatune.plan.speed import Cost
from deltatune.train.optim import build_optimizer


@dataclass(frozen=True)
class Memory:
    """Bytes of tensors.

    Attributes:
        frozen: Parameters and buffers that do not train.
        activations: What forward leaves for backward, with the batch and the logits.
        logits: Of these, the logits and their copy in single precision; zero where the loss is in chunks.
        peak: The most there is at once.
        peak_in: "forward", "backward" or "update".
    """

    frozen: int
    trained: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    peak: int
    peak_in: str

    @property
    def temporary(self) -> int:
        """At the peak, what is none of the other parts."""
        held = {"forward": self.activations, "backward": self.activations, "update": self.gradients}[self.peak_in]
        return max(0, self.peak - self.frozen - self.trained - self.optimizer - held)


@dataclass(frozen=True)
class Estimate:
    """Of one step: memory, and the cost of a micro-batch (forward, backward) and of an update."""

    memory: Memory
    micro: Cost
    update: Cost
    trained_parameters: int
    parameters: int


def simulate(job: Job, shape: Shape) -> Estimate:
    """Forward, backward, clipping and update as training does them, twice, because states come with the first.

    Raises:
        ConfigError: The model or method decides by numbers.
    """
    try:
        return _simulated(job, shape)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

        if not isinstance(error, (DataDependentOutputException, DynamicOutputShapeException)):
            raise
        raise ConfigError(
            f"{job.settings.method} on {type(job.model).__name__} decides by numbers ({error}), which planning has not",
            field="method",
            found=job.settings.method,
        ) from error


def _simulated(job: Job, shape: Shape) -> Estimate:
    model: Any = job.model
    trains = [parameter for parameter in model.parameters() if parameter.requires_grad]
    micro = update = current = Cost()

    def spent(flop: float, moved: int, drawn: int, dtype: torch.dtype) -> None:
        current.add(flop, moved, drawn, dtype)

    live = LiveBytes(spent)
    peaks: dict[str, int] = {}

    def phase(name: str) -> None:
        peaks[name] = max(peaks.get(name, 0), live.peak)
        live.peak = live.now

    with job.running(), live:
        trained = live.hold(trains)
        frozen = live.hold([*model.parameters(), *model.buffers()])
        optimizer = build_optimizer(model, job.settings)
        if job.device.type == "cuda":
            for group in optimizer.param_groups:
                group["foreach"] = True  # torch's choice there
        for _ in range(2):
            current = micro = Cost()
            before = live.now
            batch = job.batch(shape)
            with job.autocast():
                loss = model(**batch).loss
            activations = live.now - before
            phase("forward")
            loss.backward()
            del loss
            phase("backward")
            current = update = Cost()
            torch.nn.utils.clip_grad_norm_(trains, job.settings.max_grad_norm or float("inf"))
            gradients = sum(p.grad.numel() * p.grad.element_size() for p in trains if p.grad is not None)
            optimizer.step()
            phase("update")
            optimizer.zero_grad(set_to_none=True)
            del batch
        states = _states(optimizer)
    where = max(peaks, key=lambda name: peaks[name])
    memory = Memory(frozen, trained, gradients, states, activations, _logits(job, shape), max(peaks.values()), where)
    return Estimate(memory, micro, update, sum(p.numel() for p in trains), sum(p.numel() for p in model.parameters()))


def _states(optimizer: torch.optim.Optimizer) -> int:
    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )


def _logits(job: Job, shape: Shape) -> int:
    if job.chunked or job.settings.task not in ("seq2seq", "causal", "chat"):
        return 0
    half = job.settings.dtype == "bfloat16" or (job.settings.dtype == "auto" and job.device.type == "cuda")
    rows = shape.rows * (shape.answer or shape.tokens)
    return rows * job.vocabulary * (6 if half else 4)
