"""What a run leaves: a result in memory, and files in the output folder, the last of which says that all are there."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from deltatune.errors import SaveError
from deltatune.storage.card import CARD_NAME
from deltatune.storage.files import write_files
from deltatune.train.base import quiet
from deltatune.train.settings import TrainSettings

SETTINGS, METRICS, HISTORY, SAMPLES = "settings.json", "metrics.json", "history.jsonl", "samples.json"


@dataclass(frozen=True)
class Sample:
    """One input with what is right and what the model said before and after training."""

    input: str
    references: tuple[str, ...]
    before: str | None
    after: str | None


@dataclass(frozen=True)
class Evaluation:
    """Scores at a step: `loss`, and those of the task (`deltatune.train.scores`), or of text (`bleu`, `rouge_l`)."""

    step: int
    scores: dict[str, float]
    best_score: float | None = None  # of the evaluations before this one, by `metric_for_best_model`
    improved: bool = False


@dataclass(frozen=True)
class TrainResult:
    """The trained model and all that is known about how it came about. The same facts are in the files."""

    output_dir: Path
    settings: TrainSettings
    model: nn.Module
    tokenizer: Any
    steps: int
    metrics: dict[str, Any]
    history: list[dict[str, Any]]
    samples: list[Sample]
    resumed_from: Path | None = None
    stopped_early: bool = False
    checkpoints: list[Path] = field(default_factory=list)


def write_results(result: TrainResult) -> None:
    """Everything is written beside its place first and moved in last; `metrics.json` closes.

    Raises:
        SaveError: The folder could not be written; checkpoints are whole, resuming repeats this step.
    """
    output = result.output_dir
    temporary = output / f".results.{secrets.token_hex(4)}.tmp"
    try:
        temporary.mkdir(parents=True)
        if (output / CARD_NAME).is_file():  # the user's own: saving adds to its head what it lacks
            shutil.copyfile(output / CARD_NAME, temporary / CARD_NAME)
        with quiet():
            result.model.save_pretrained(str(temporary))  # type: ignore[operator]
        result.tokenizer.save_pretrained(str(temporary))
        _move(temporary, output)
    except SaveError:
        raise
    except OSError as error:
        raise SaveError(
            f"{output}: the results cannot be written ({error.strerror or error}); checkpoints are untouched",
            path=str(output),
            found=error.errno,
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    write_files(
        output,
        {
            SETTINGS: as_json(result.settings.resolved()),
            HISTORY: history_lines(result.history),
            SAMPLES: as_json([asdict(sample) for sample in result.samples]),
            METRICS: as_json(result.metrics),
        },
    )


def as_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def history_lines(history: Iterable[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(entry) + "\n" for entry in history).encode()


def _move(source: Path, target: Path) -> None:
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, place)
