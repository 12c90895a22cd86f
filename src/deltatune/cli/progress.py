"""What a training run shows while it goes: a bar with loss, rate, memory and remaining time; evaluations as lines."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from deltatune.report.words import duration, plural, rate, share, size
from deltatune.train.events import Listener, RunInfo
from deltatune.train.events import Progress as Step
from deltatune.train.result import Evaluation

SMOOTHING = 0.9  # of the loss in the bar: one batch says little


class ProgressBar(Listener):
    """Rich's bar on a terminal; elsewhere a line for every entry of the history."""

    def __init__(self, out: Console) -> None:
        self.out = out
        self.live = out.is_terminal
        self.loss: float | None = None
        self.bar = Progress(
            TextColumn("{task.description:<8}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[note]}"),
            console=out,
            transient=True,
            disable=not self.live,
        )
        self.training: TaskID | None = None
        self.stage: TaskID | None = None

    def __enter__(self) -> ProgressBar:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def line(self, text: str) -> None:
        self.out.print(text, soft_wrap=True, markup=False)

    def on_notice(self, text: str) -> None:
        self.line(f"note: {text}")

    def on_stage(self, name: str, total: int | None = None) -> None:
        if self.stage is not None:
            self.bar.remove_task(self.stage)
        self.stage = self.bar.add_task(name, total=total or 1, note="", visible=total is not None)

    def on_stage_progress(self, done: int) -> None:
        if self.stage is not None:
            self.bar.update(self.stage, completed=done)

    def on_begin(self, run: RunInfo) -> None:
        self._drop_stage()
        trained, total = run.trainable_parameters, run.total_parameters
        self.line(f"{run.settings.method}: {trained:,} of {total:,} parameters train ({share(trained, total)})")
        rows = f"{run.train_rows:,} rows to train on, {run.eval_rows:,} to evaluate on"
        self.line(f"{rows}; {run.total_steps} steps on {run.device}, {plural(run.num_threads, 'thread')}")
        if run.resumed_from is not None:
            self.line(f"resumed from {run.resumed_from} after step {run.start_step}")
        self.training = self.bar.add_task("train", total=run.total_steps, completed=run.start_step, note="")

    def on_step(self, progress: Step) -> None:
        self._drop_stage()
        kept = progress.loss if self.loss is None else self.loss
        self.loss = SMOOTHING * kept + (1 - SMOOTHING) * progress.loss
        note = (
            f"loss {self.loss:.3f}  {rate(progress.tokens_per_second)}  {size(progress.memory_bytes)}  "
            f"{duration(progress.remaining_seconds)} left"
        )
        if self.training is not None:
            self.bar.update(self.training, completed=progress.step, note=note)

    def on_log(self, entry: dict[str, Any]) -> None:
        if not self.live and "loss" in entry:
            rate = entry.get("learning_rate")
            self.line(f"step {entry['step']}  loss {entry['loss']:.4f}" + (f"  lr {rate:.2e}" if rate else ""))

    def on_evaluate(self, evaluation: Evaluation) -> None:
        self._drop_stage()
        scores = "  ".join(f"{name} {value:.4g}" for name, value in evaluation.scores.items())
        best = "  (best so far)" if evaluation.improved else ""
        self.line(f"step {evaluation.step}  evaluation: {scores}{best}")

    def on_checkpoint(self, step: int, folder: Path) -> None:
        if not self.live:
            self.line(f"step {step}  checkpoint {folder}")

    def _drop_stage(self) -> None:
        if self.stage is not None:
            self.bar.remove_task(self.stage)
            self.stage = None
