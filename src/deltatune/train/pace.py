"""When to log, evaluate and save, and how fast the run goes."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from deltatune.train.settings import TrainSettings


@dataclass(frozen=True)
class Pace:
    """Which steps are due for what. The last step is always due for everything."""

    total_steps: int
    steps_per_epoch: int
    log_every: int
    eval_every: int | None  # None: at the end of each epoch; 0: only at the end of the run
    save_every: int | None

    @classmethod
    def of(cls, settings: TrainSettings, steps_per_epoch: int) -> Pace:
        total = settings.max_steps
        if total < 0:
            total = max(1, math.ceil(settings.num_train_epochs * steps_per_epoch - 1e-9))

        def steps(value: float | None) -> int | None:
            return (
                None if value is None else int(value) if value >= 1 or value == 0 else max(1, math.ceil(value * total))
            )

        return cls(
            total,
            steps_per_epoch,
            steps(settings.logging_steps) or 1,
            steps(settings.eval_steps),
            steps(settings.save_steps),
        )

    def log(self, step: int) -> bool:
        return step % self.log_every == 0 or step == self.total_steps

    def evaluate(self, step: int) -> bool:
        return self._due(self.eval_every, step)

    def save(self, step: int) -> bool:
        return self._due(self.save_every, step)

    def _due(self, every: int | None, step: int) -> bool:
        every = self.steps_per_epoch if every is None else every
        return step == self.total_steps or (every > 0 and step % every == 0)


@dataclass
class Clock:
    """Rates over the last steps, so that evaluations in between do not slow the estimate."""

    window: int = 50
    steps: list[tuple[float, int]] = field(default_factory=list)  # (seconds, tokens) of each
    _start: float = 0.0

    def begin(self) -> None:
        self._start = time.perf_counter()

    def end(self, tokens: int) -> float:
        seconds = time.perf_counter() - self._start
        self.steps = [*self.steps[-self.window + 1 :], (seconds, tokens)]
        return seconds

    @property
    def steps_per_second(self) -> float:
        return len(self.steps) / max(sum(seconds for seconds, _ in self.steps), 1e-9)

    @property
    def tokens_per_second(self) -> float:
        return sum(tokens for _, tokens in self.steps) / max(sum(seconds for seconds, _ in self.steps), 1e-9)
