"""The setting `loss`: whether a run computes the loss of a text model in chunks."""

from __future__ import annotations

from deltatune.data.encode import answer_length
from deltatune.data.example import TEXT_TASKS
from deltatune.errors import ConfigError
from deltatune.kernels.linear_cross_entropy import rows_at_once
from deltatune.loss.stage import chunk_loss
from deltatune.loss.trial import why_not
from deltatune.train.base import Base
from deltatune.train.events import Listener
from deltatune.train.settings import TrainSettings


def choose_loss(base: Base, settings: TrainSettings, listener: Listener) -> None:
    """Put `chunk_loss` on the model where it was asked for, or where it saves memory and a trial shows that it serves.

    Raises:
        ConfigError: It was asked for, and does not serve this task or model.
    """
    if settings.loss == "model" or (settings.loss == "auto" and not _saves_memory(base, settings)):
        return
    reason = f"task {settings.task} has no logits over a vocabulary"
    if settings.task in TEXT_TASKS:
        reason = why_not(base.model)
    if reason is None:
        chunk_loss(base.model)
    elif settings.loss == "chunked":
        raise ConfigError(
            f"loss='chunked' does not serve {type(base.model).__name__}: {reason}; use loss: auto, or model",
            field="loss",
            found="chunked",
            expected=["auto", "model"],
        )
    else:
        listener.on_notice(f"the loss is computed from all logits at once: {reason}")


def _saves_memory(base: Base, settings: TrainSettings) -> bool:
    """Whether the logits of a batch can be more than are made at a time."""
    if settings.task not in TEXT_TASKS or base.vocabulary is None:
        return False
    length = settings.max_length if settings.task == "causal" else answer_length(settings.max_target_length)
    return settings.per_device_train_batch_size * length > rows_at_once(base.vocabulary)
