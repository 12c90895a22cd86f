"""Where an adapter comes from: what `deltatune train` or `combine` left beside it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

from deltatune.config import read_json
from deltatune.errors import PeftError
from deltatune.storage.locate import Place

SETTINGS, METRICS, COMBINATION = "settings.json", "metrics.json", "combination.json"
DATA = ("train_file", "eval_file", "test_file", "dataset", "dataset_config", "eval_split")


@dataclass(frozen=True)
class Origin:
    """One run, of training or of combining.

    Attributes:
        command: What repeats it, given the folder.
        data: What was trained and evaluated on, by setting.
        scores: Before and after training, by part.
        steps: Optimizer steps taken.
        versions: Of the packages that it ran with.
    """

    command: str
    data: dict[str, Any]
    scores: dict[str, Any]
    steps: int | None
    train_rows: int | None
    seconds: float | None
    versions: dict[str, Any]


def origin(where: Place, folder: str) -> Origin | None:
    """The run that wrote a folder; None where nothing beside the adapter says."""
    if (combination := _read(where, COMBINATION)) is not None:
        return _combined(combination)
    settings = _read(where, SETTINGS)
    if settings is None:
        return None
    metrics = _read(where, METRICS) or {}
    conditions = metrics.get("conditions")
    return Origin(
        command=f"deltatune train {shlex.quote(f'{folder}/{SETTINGS}')}",
        data={name: settings[name] for name in DATA if settings.get(name)},
        scores={name: metrics[name] for name in ("before", "after") if metrics.get(name)},
        steps=metrics.get("steps"),
        train_rows=metrics.get("train_rows"),
        seconds=metrics.get("train_seconds"),
        versions=conditions if isinstance(conditions, dict) else {},
    )


def _combined(held: dict[str, Any]) -> Origin:
    recipe = held.get("recipe") or {}
    parts = {part["adapter"]: part["weight"] for part in recipe.get("parts") or ()}
    scores = {f"on {held['eval_file']}": held["scores"]} if held.get("scores") else {}
    return Origin(held.get("command") or "deltatune combine", {"adapters": parts}, scores, None, None, None, {})


def _read(where: Place, name: str) -> dict[str, Any] | None:
    """None where the file is missing or is no JSON: an adapter is an adapter without it."""
    if not where.local:
        return None
    try:
        file = where.find(name)
        return None if file is None else read_json(file)
    except PeftError:
        return None
