"""The training loop: one for every method and task, on accelerate, resumable to the bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from deltatune.data.features import Features
from deltatune.data.order import Order
from deltatune.data.prepare import Corpus
from deltatune.errors import LimitError, SaveError, TrainError
from deltatune.report.words import plural
from deltatune.train import checkpoint as checkpoints
from deltatune.train import snapshot
from deltatune.train.choice import answers_wanted, better, refuse_missing
from deltatune.train.events import Listener, Progress
from deltatune.train.judge import Judge, StopAsked
from deltatune.train.memory import MemoryMeter
from deltatune.train.optim import first_bad_parameter
from deltatune.train.pace import Clock, Pace
from deltatune.train.processes import by_first, largest, lost
from deltatune.train.result import HISTORY, Evaluation, history_lines
from deltatune.train.settings import TrainSettings
from deltatune.train.signals import StopSignals, TrainingInterrupted
from deltatune.train.step import Stepped, Stepper
from deltatune.train.trackers import TransformersCallbacks


@dataclass
class Position:
    """Where a run is: all that a checkpoint holds beside tensors. Epoch and place in it follow from the step."""

    step: int = 0
    loss_sum: float = 0.0  # of the steps since the last log
    loss_count: int = 0
    best_score: float | None = None  # by the metric that was chosen
    best_loss: float | None = None  # of that evaluation
    best_step: int | None = None
    without_gain: int = 0  # evaluations since the best one
    evaluation_due: bool = False  # a signal came before it was done
    stopped_early: bool = False
    tokens: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    before: dict[str, Any] = field(default_factory=dict)  # scores and answers of the base
    callbacks: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, progress: dict[str, Any]) -> Position:
        known = {part.name for part in fields(cls)}
        progress = {"best_score": progress.get("best_loss"), **progress}  # without a choice it was the loss
        return cls(**{key: value for key, value in progress.items() if key in known})


@dataclass
class Loop:
    """Steps from `position` to the end. Everything it needs is built by `deltatune.train.run`."""

    settings: TrainSettings
    accelerator: Any
    stepper: Stepper
    optimizer: torch.optim.Optimizer  # without accelerate's wrapper
    corpus: Corpus
    order: Order
    pace: Pace
    judge: Judge
    listener: Listener
    trackers: TransformersCallbacks | None
    conditions: dict[str, Any]
    memory: MemoryMeter
    position: Position = field(default_factory=Position)

    def __post_init__(self) -> None:
        self.output = Path(self.settings.output_dir)
        self.clock = Clock()
        self.last_saved: Path | None = None
        self.signals = StopSignals()
        self.stop_by = 0  # the number of the signal
        self._last: Stepped
        self.stepper.around = self._track
        self.judge.stop = self._stop_asked

    def run(self, finish: Callable[[], Any]) -> Any:
        """Train to the end and return what `finish` makes of it; signals are obeyed in both.

        Raises:
            TrainingInterrupted: A signal came; a checkpoint was written.
            TrainError: Loss, gradient or weights are no longer finite; earlier checkpoints are whole.
        """
        with self.signals:
            try:
                self._steps()
                return finish()
            except StopAsked:
                self._interrupt()
            except RuntimeError as error:
                told = lost(error) if self.accelerator.num_processes > 1 else None
                if told is None:
                    raise
                raise self._with_last(told) from error

    # ------------------------------------------------------------------------------------------------------ one step

    def _steps(self) -> None:
        position, pace = self.position, self.pace
        if position.evaluation_due:
            self._evaluate()
        rows: list[int] = []
        while position.step < pace.total_steps and not position.stopped_early:
            if self.judge.stop():
                raise StopAsked
            epoch, index = divmod(position.step, pace.steps_per_epoch)
            if not rows or index == 0:
                rows = self.order.epoch(epoch)
                self._track("begin_epoch", float(epoch))
            self._track("begin_step")
            micro = self.order.step(rows, index, self.accelerator.process_index)
            self._step([[self.corpus.train.features[i] for i in part] for part in micro])
            self._after_step()

    def _stop_asked(self) -> bool:
        """Whether a signal has come to any process: all stop at the same place."""
        self.stop_by = largest(self.accelerator, self.signals.received or 0)
        return self.stop_by > 0

    def _step(self, micro: list[list[Features]]) -> None:
        position = self.position
        self.clock.begin()
        try:
            done = self.stepper(micro, position.step + 1)
        except (TrainError, LimitError) as error:
            raise self._with_last(error) from error.__cause__
        position.step += 1
        position.loss_sum += done.loss
        position.loss_count += 1
        position.tokens += done.tokens
        position.seconds += self.clock.end(done.tokens)
        self._last = done
        self.listener.on_step(
            Progress(
                step=position.step,
                total_steps=self.pace.total_steps,
                epoch=self._epoch(),
                loss=done.loss,
                learning_rate=done.learning_rate,
                grad_norm=done.grad_norm,
                steps_per_second=self.clock.steps_per_second,
                tokens_per_second=self.clock.tokens_per_second,
                remaining_seconds=(self.pace.total_steps - position.step) / self.clock.steps_per_second,
                memory_bytes=self.memory.measure(),
            )
        )

    # --------------------------------------------------------------------------------------------------- after a step

    def _after_step(self) -> None:
        position, pace, step = self.position, self.pace, self.position.step
        asked = self.trackers
        if pace.log(step):
            mean = position.loss_sum / position.loss_count
            position.loss_sum, position.loss_count = 0.0, 0
            facts = {"learning_rate": self._last.learning_rate, "grad_norm": self._last.grad_norm}
            self._log({"step": step, "epoch": self._epoch(), "loss": mean, **facts})
        if step % pace.steps_per_epoch == 0:
            self._track("end_epoch")
        improved = False
        if pace.evaluate(step) or (asked is not None and asked.wants_evaluate):
            position.evaluation_due = True
            improved = self._evaluate()
        if asked is not None and asked.wants_stop:
            position.stopped_early = True
        keep_best = improved and (pace.save_every != 0 or self.settings.load_best_model_at_end)
        if pace.save(step) or keep_best or position.stopped_early or (asked is not None and asked.wants_save):
            self.save()

    def _evaluate(self) -> bool:
        """Scores over the evaluation rows; whether they are the best so far."""
        position, part = self.position, self.corpus.eval
        if part is None:
            position.evaluation_due = False
            return False
        scores = self.judge.loss(self.stepper.bare, part)
        if answers_wanted(self.settings):
            scores |= self.judge.written(self.stepper.bare, part)
        metric = self.settings.metric_for_best_model
        refuse_missing(metric, scores)
        position.evaluation_due = False
        improved = better(metric, scores[metric], position.best_score)
        told = Evaluation(position.step, scores, position.best_score, improved)
        if improved:
            position.best_score, position.best_loss = scores[metric], scores["loss"]
            position.best_step, position.without_gain = position.step, 0
        else:
            position.without_gain += 1
        self._log({"step": position.step, "epoch": self._epoch(), **{f"eval_{key}": v for key, v in scores.items()}})
        self.listener.on_evaluate(told)
        patience = self.settings.early_stopping_patience
        if patience is not None and position.without_gain >= patience:
            position.stopped_early = True
            self.listener.on_notice(
                f"stopping after step {position.step}: {plural(patience, 'evaluation')} without a better {metric}"
            )
        return improved

    def _log(self, entry: dict[str, Any]) -> None:
        self.position.history.append(entry)
        if self.accelerator.is_main_process:
            with open(self.output / HISTORY, "ab") as file:  # for those who watch; written again, whole, at the end
                file.write(history_lines([entry]))
        self.listener.on_log(entry)

    def save(self) -> Path:
        """A checkpoint of this moment, then rotation."""
        position = self.position
        bad = first_bad_parameter(self.stepper.bare)
        if bad is not None:
            try:
                self.stepper.refuse(f"weights of {bad} are not finite after step {position.step}", position.step)
            except TrainError as error:
                raise self._with_last(error) from None
        position.callbacks = self.trackers.exported() if self.trackers is not None else position.callbacks
        epoch, index = divmod(position.step, self.pace.steps_per_epoch)
        progress = {**asdict(position), "epoch": epoch, "step_in_epoch": index}
        taken = snapshot.take(
            self.stepper.bare, self.optimizer, self.stepper.scheduler, progress, self.conditions, self.accelerator
        )

        def write() -> Path:
            folder = checkpoints.write(self.output, position.step, taken, self._adapter)
            checkpoints.rotate(self.output, self.settings.save_total_limit, position.best_step)
            return folder

        folder = by_first(self.accelerator, write)
        self.last_saved = folder
        self.listener.on_checkpoint(position.step, folder)
        return folder

    def _adapter(self, folder: Path) -> None:
        """The adapter as users load it, beside our tensors. A whole model is not stored twice."""
        if self.settings.method != "full":
            self.stepper.bare.save_pretrained(str(folder))  # type: ignore[operator]

    def _interrupt(self) -> None:
        number = self.stop_by
        saved = self.last_saved
        if saved is None or saved != checkpoints.folder_of(self.output, self.position.step):
            try:
                saved = self.save()
            except SaveError as error:
                self.listener.on_notice(str(error))
        raise TrainingInterrupted(number, self.position.step, saved)

    # --------------------------------------------------------------------------------------------------------- helpers

    def _epoch(self) -> float:
        return round(self.position.step / self.pace.steps_per_epoch, 4)

    def _track(self, event: str, *facts: Any) -> None:
        if self.trackers is not None:
            getattr(self.trackers, event)(*facts)

    def _with_last(self, error: TrainError | LimitError) -> TrainError | LimitError:
        """The same error, told where to go on from."""
        kept = f"last good checkpoint: {self.last_saved}" if self.last_saved else "no checkpoint had been written"
        facts = {"field": error.field, "key": error.key, "found": error.found, "expected": error.expected}
        return type(error)(f"{error}; {kept}", path=str(self.last_saved) if self.last_saved else None, **facts)
