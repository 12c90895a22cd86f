"""Training: `train(TrainSettings(...))`, from Python as from the command line."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltatune.train.events import Listener as Listener
    from deltatune.train.events import Progress as Progress
    from deltatune.train.events import RunInfo as RunInfo
    from deltatune.train.result import Evaluation as Evaluation
    from deltatune.train.result import Sample as Sample
    from deltatune.train.result import TrainResult as TrainResult
    from deltatune.train.run import train as train
    from deltatune.train.settings import TrainSettings as TrainSettings
    from deltatune.train.settings import load_settings as load_settings
    from deltatune.train.signals import TrainingInterrupted as TrainingInterrupted

# loaded when first used: settings need pydantic, the loop needs accelerate and transformers
_HOME = {
    "Listener": "events",
    "Progress": "events",
    "RunInfo": "events",
    "Evaluation": "result",
    "Sample": "result",
    "TrainResult": "result",
    "train": "run",
    "TrainSettings": "settings",
    "load_settings": "settings",
    "TrainingInterrupted": "signals",
}

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'deltatune.train' has no attribute {name!r}")
    return getattr(importlib.import_module(f"deltatune.train.{_HOME[name]}"), name)
