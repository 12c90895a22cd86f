"""What a run tells while it goes: listeners with one method per event, transformers' callbacks among them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltatune.train.result import Evaluation
    from deltatune.train.settings import TrainSettings


@dataclass(frozen=True)
class RunInfo:
    """What is known before the first step."""

    settings: TrainSettings
    total_steps: int
    start_step: int  # above 0 after a resume
    steps_per_epoch: int
    train_rows: int
    eval_rows: int
    trainable_parameters: int
    total_parameters: int
    device: str
    num_threads: int
    resumed_from: Path | None


@dataclass(frozen=True)
class Progress:
    """After a step. Times and rates are of this process and know nothing of what was before a resume."""

    step: int
    total_steps: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    steps_per_second: float
    tokens_per_second: float
    remaining_seconds: float
    memory_bytes: int


class Listener:
    """Base of everything that watches a run; every method may be left out."""

    def on_notice(self, text: str) -> None:
        """Something the user should know, in one line."""

    def on_stage(self, name: str, total: int | None = None) -> None:
        """A part without steps of its own begins: 'data', 'model', 'evaluate', 'samples', 'save', ..."""

    def on_stage_progress(self, done: int) -> None:
        """How many of the stage's `total` are done."""

    def on_begin(self, run: RunInfo) -> None:
        """Everything is loaded, the first step comes next."""

    def on_step(self, progress: Progress) -> None:
        """A step is done."""

    def on_log(self, entry: dict[str, Any]) -> None:
        """An entry of the history: `step`, `epoch` and `loss`, or `eval_loss` and other scores."""

    def on_evaluate(self, evaluation: Evaluation) -> None:
        """An evaluation is done."""

    def on_checkpoint(self, step: int, folder: Path) -> None:
        """A checkpoint is whole on the disk."""

    def on_end(self, metrics: dict[str, Any]) -> None:
        """All results are written."""


class Listeners(Listener):
    """Several listeners as one."""

    def __init__(self, members: Iterable[Listener]) -> None:
        self.members = list(members)

    def on_notice(self, text: str) -> None:
        for member in self.members:
            member.on_notice(text)

    def on_stage(self, name: str, total: int | None = None) -> None:
        for member in self.members:
            member.on_stage(name, total)

    def on_stage_progress(self, done: int) -> None:
        for member in self.members:
            member.on_stage_progress(done)

    def on_begin(self, run: RunInfo) -> None:
        for member in self.members:
            member.on_begin(run)

    def on_step(self, progress: Progress) -> None:
        for member in self.members:
            member.on_step(progress)

    def on_log(self, entry: dict[str, Any]) -> None:
        for member in self.members:
            member.on_log(entry)

    def on_evaluate(self, evaluation: Evaluation) -> None:
        for member in self.members:
            member.on_evaluate(evaluation)

    def on_checkpoint(self, step: int, folder: Path) -> None:
        for member in self.members:
            member.on_checkpoint(step, folder)

    def on_end(self, metrics: dict[str, Any]) -> None:
        for member in self.members:
            member.on_end(metrics)
