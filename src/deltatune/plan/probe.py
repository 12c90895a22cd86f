"""Real steps at a small size: how far the time of this machine is from what was reckoned, and the memory."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from deltatune.loss.stage import chunk_loss
from deltatune.plan.job import Shape, batch_of, build_job, uses_chunks
from deltatune.plan.live import LiveBytes
from deltatune.plan.speed import Speed, now
from deltatune.plan.step import simulate
from deltatune.train.base import DEMO, auto_class, load_base, quiet, resolve_dtype
from deltatune.train.method import adapt, enable_checkpointing
from deltatune.train.optim import build_optimizer
from deltatune.train.settings import UNKNOWN_STEPS, TrainSettings

STEPS = 3
SHORTEST = 64  # tokens


@dataclass(frozen=True)
class Probe:
    """
    Attributes:
        slower: Measured over reckoned time; the plan is multiplied by it.
        peak: Measured bytes of tensors over reckoned ones.
    """

    shape: Shape
    seconds: float
    slower: float
    peak: float


def bare_base(settings: TrainSettings, device: torch.device) -> nn.Module:
    """The base with its weights, without a tokenizer."""
    if settings.model_name_or_path == DEMO:
        return load_base(settings).model
    with quiet():
        loaded = auto_class(settings.task).from_pretrained(
            settings.model_name_or_path, dtype=resolve_dtype(settings.dtype, device)
        )
    if settings.task == "classification" and getattr(loaded.config, "pad_token_id", None) is None:
        loaded.config.pad_token_id = 0
    return loaded


class RealSteps:
    """The steps of a job with numbers, on random tokens. Weights are loaded; nothing is written."""

    def __init__(self, settings: TrainSettings, device: torch.device, shape: Shape, model: Any = None) -> None:
        self.settings, self.device, self.shape = settings, device, shape
        base: Any = bare_base(settings, device) if model is None else model
        self.vocabulary = base.get_input_embeddings().num_embeddings
        if uses_chunks(settings, self.vocabulary):
            chunk_loss(base)
        made: Any = adapt(base.to(device), settings.method, settings.task, settings.options_of(UNKNOWN_STEPS))
        if settings.gradient_checkpointing:
            enable_checkpointing(made)
        for parameter in made.parameters():
            if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.float()
        self.model: nn.Module = made.train()
        self.trained = [parameter for parameter in made.parameters() if parameter.requires_grad]
        self.optimizer = build_optimizer(made, settings)

    def __call__(self) -> None:
        dtype = resolve_dtype(self.settings.dtype, self.device)
        batch = {
            name: value.to(self.device) if isinstance(value, torch.Tensor) else value
            for name, value in batch_of(self.settings, self.shape, self.vocabulary).items()
        }
        with torch.autocast(self.device.type, dtype, enabled=dtype is not torch.float32):
            loss = self.model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, self.settings.max_grad_norm or float("inf"))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def seconds(self, steps: int = STEPS) -> float:
        took = []
        for _ in range(steps):
            start = now(self.device)
            self()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            took.append(now(self.device) - start)
        return statistics.median(took)

    def peak(self) -> int:
        """Bytes of tensors at most during a step, model and states included."""
        live = LiveBytes()
        live.hold([*self.model.parameters(), *self.model.buffers()])
        for state in self.optimizer.state.values():
            live.hold(value for value in state.values() if isinstance(value, torch.Tensor))
        with live:
            self()
        return live.peak


def probe(settings: TrainSettings, device: torch.device, shape: Shape, speed: Speed) -> Probe:
    """At most two rows of a quarter of the length, or of `SHORTEST` tokens: a shorter step is mostly overhead."""
    small = replace(
        shape,
        rows=min(2, shape.rows),
        tokens=min(shape.tokens, max(SHORTEST, shape.tokens // 4)),
        answer=min(shape.answer, max(SHORTEST // 2, shape.answer // 4)),
    )
    reckoned = simulate(build_job(settings, device), small)
    real = RealSteps(settings, device, small)
    real()  # states and caches
    peak = real.peak()
    seconds = real.seconds()
    expected = speed.seconds(reckoned.micro) + speed.seconds(reckoned.update)
    return Probe(small, seconds, seconds / expected, peak / reckoned.memory.peak)
