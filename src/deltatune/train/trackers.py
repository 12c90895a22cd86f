"""transformers' callbacks (tensorboard, wandb, a user's own) as one listener of our loop."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from deltatune.errors import ConfigError
from deltatune.train.choice import LOWER_IS_BETTER
from deltatune.train.events import Listener, Progress, RunInfo
from deltatune.train.settings import TrainSettings

DEFAULT = "tensorboard"


def tracker_callbacks(names: Iterable[str] | None, tell: Callable[[str], None] = lambda text: None) -> list[Any]:
    """The callbacks of `report_to`, each of which brings its own package; unset, tensorboard's where that is there."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, is_tensorboard_available

    if names is None:
        if not is_tensorboard_available():
            return []
        try:
            made = [INTEGRATION_TO_CALLBACK[DEFAULT]()]
        except Exception as error:  # nobody asked for it: a broken package must not cost a run
            tell(f"tensorboard is installed and does not start ({type(error).__name__}); report_to: none leaves it out")
            return []
        tell("curves also for tensorboard, in the folder runs of the output; report_to: none leaves them out")
        return made
    made = []
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = sorted(INTEGRATION_TO_CALLBACK)
            raise ConfigError(
                f"report_to={name!r} is not known; there are {', '.join(known)}",
                field="report_to",
                found=name,
                expected=known,
            )
        try:
            made.append(INTEGRATION_TO_CALLBACK[name]())
        except (RuntimeError, ImportError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"report_to={name!r} cannot start: {reason}", field="report_to", found=name) from error
    return made


class TransformersCallbacks(Listener):
    """Hands our events to `TrainerCallback` objects, with a state, a control and arguments as the Trainer has them.

    `wants_stop`, `wants_save`, `wants_evaluate` say what a callback asked for through its control.
    """

    def __init__(
        self, callbacks: list[Any], arguments: Any, model: Any, tokenizer: Any, optimizer: Any, scheduler: Any
    ) -> None:
        from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback, TrainerControl, TrainerState

        self.handler = CallbackHandler([*callbacks, _idle(DefaultFlowCallback)], model, tokenizer, optimizer, scheduler)
        self.arguments = arguments
        self.control, self.state = TrainerControl(), TrainerState()
        self.handler.on_init_end(self.arguments, self.state, self.control)

    first = first_of_node = True  # of several processes: trackers write in the first one

    @property
    def wants_stop(self) -> bool:
        return self.control.should_training_stop

    @property
    def wants_save(self) -> bool:
        return self.control.should_save

    @property
    def wants_evaluate(self) -> bool:
        return self.control.should_evaluate

    def resume(self, step: int, history: list[dict[str, Any]], kept: dict[str, Any]) -> None:
        """Continue where a checkpoint left off; callbacks that export a state get it back."""
        self.state.global_step, self.state.log_history = step, list(history)
        for callback in self.handler.callbacks:
            stored = kept.get(type(callback).__name__)
            for name, value in (stored or {}).get("attributes", {}).items():
                setattr(callback, name, value)

    def exported(self) -> dict[str, Any]:
        """The states of callbacks that have one, as JSON values."""
        from transformers.trainer_callback import ExportableState

        members = [c for c in self.handler.callbacks if isinstance(c, ExportableState)]
        return json.loads(json.dumps({type(c).__name__: c.state() for c in members}))  # type: ignore[attr-defined]

    def on_begin(self, run: RunInfo) -> None:
        self.state.is_world_process_zero, self.state.is_local_process_zero = self.first, self.first_of_node
        self.state.max_steps, self.state.global_step = run.total_steps, run.start_step
        self.state.num_train_epochs = -(-run.total_steps // max(run.steps_per_epoch, 1))
        self._call("on_train_begin")

    def begin_epoch(self, epoch: float) -> None:
        self.state.epoch = epoch
        self._call("on_epoch_begin")

    def begin_step(self) -> None:
        self._call("on_step_begin")

    def end_epoch(self) -> None:
        self._call("on_epoch_end")

    def before_update(self) -> None:
        self._call("on_pre_optimizer_step")

    def after_update(self) -> None:
        self._call("on_optimizer_step")

    def on_step(self, progress: Progress) -> None:
        self.state.global_step, self.state.epoch = progress.step, progress.epoch
        self._call("on_step_end")

    def on_log(self, entry: dict[str, Any]) -> None:
        self.state.log_history.append(entry)
        self._call("on_log", logs={key: value for key, value in entry.items() if key != "step"})

    def on_evaluate(self, evaluation: Any) -> None:
        self.state.best_metric = evaluation.best_score
        self._call("on_evaluate", metrics={f"eval_{key}": value for key, value in evaluation.scores.items()})

    def on_checkpoint(self, step: int, folder: Path) -> None:
        self._call("on_save")

    def on_end(self, metrics: dict[str, Any]) -> None:
        self._call("on_train_end")

    def _call(self, event: str, **facts: Any) -> None:
        self.control = getattr(self.handler, event)(self.arguments, self.state, self.control, **facts)


def _idle(default: type) -> Any:
    """The handler warns without a DefaultFlowCallback; ours decides nothing, because the loop does."""
    return type("IdleFlow", (default,), {"on_step_end": _keep, "on_epoch_end": _keep})()


def _keep(self: Any, args: Any, state: Any, control: Any, **facts: Any) -> Any:
    return control


def trainer_arguments(settings: TrainSettings) -> Any:
    """The Trainer's arguments as far as callbacks read them. To be made before accelerate's state, which it resets."""
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=settings.output_dir,
        learning_rate=settings.resolved_learning_rate,
        num_train_epochs=settings.num_train_epochs,
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.per_device_train_batch_size,
        per_device_eval_batch_size=settings.per_device_eval_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        warmup_steps=settings.warmup_steps if settings.warmup_steps is not None else settings.warmup_ratio,
        lr_scheduler_type=settings.lr_scheduler_type,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        logging_steps=settings.logging_steps,
        # our loop decides when; these say to callbacks that it does, and by which score
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model=f"eval_{settings.metric_for_best_model}",
        greater_is_better=settings.metric_for_best_model not in LOWER_IS_BETTER,
        use_cpu=settings.device == "cpu",
        report_to="none",
    )
