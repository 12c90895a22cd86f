"""One training run of a cell through `deltatune.train`, continued where a stopped one left off."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from deltatune.errors import ResumeError
from deltatune.train import TrainResult, TrainSettings, train
from harness.cells import Spec
from harness.data import Row
from harness.progress import Line

Made = TypeVar("Made")


def settings_of(spec: Spec) -> dict[str, Any]:
    """Budget and hyper-parameters carry the names of `TrainSettings`; the budget also counts rows, which is not one."""
    known = {name: value for name, value in spec.budget.items() if name in TrainSettings.model_fields}
    hyper = {name: value for name, value in spec.hyper.items() if name != "start"}
    return {**known, **hyper, "seed": spec.seed}


def start_options(spec: Spec, text: Callable[[], str], tokenizer: str) -> dict[str, Any]:
    """A start from text in the method's own words; a cell says "text" only, because paths differ by machine."""
    if spec.hyper.get("start") != "text":
        return {}
    if spec.hyper["method"] == "prompt_tuning":
        named = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": text()}
    else:
        named = {"init_text": text()}
    return {**named, "tokenizer_name_or_path": tokenizer}


def train_cell(
    settings: dict[str, Any], work: Path, line: Line, train_rows: list[Row], eval_rows: list[Row],
    test_rows: list[Row] | None = None,
) -> TrainResult:  # fmt: skip
    """Train with the library's own loop. SIGTERM leaves a checkpoint in `work`; the next call goes on from it."""

    def attempt() -> TrainResult:
        asked = TrainSettings(
            **settings,
            output_dir=str(work),
            resume_from_checkpoint=any(work.glob("checkpoint-*")),
            overwrite_output_dir=True,
            eval_steps=0,
            save_steps=0,
            save_total_limit=1,
            num_samples=0,
            num_scored=0,
            eval_before=False,
            device="cpu",
            dtype="float32",
        )
        return train(asked, callbacks=[line], train_rows=train_rows, eval_rows=eval_rows, test_rows=test_rows)

    try:
        return attempt()
    except ResumeError as error:  # left by another version or thread count
        line.on_notice(f"starting anew: {error}")
        shutil.rmtree(work)
        return attempt()


def facts(result: TrainResult, rows: int, batch: int) -> dict[str, Any]:
    """What every trained cell tells beside its scores."""
    metrics = result.metrics
    passes, rest = divmod(result.steps, -(-rows // batch))
    return {
        "trainable_parameters": metrics["trainable_parameters"],
        "all_parameters": metrics["total_parameters"],
        "steps": result.steps,
        "examples": passes * rows + rest * batch,
        "train_seconds": metrics["train_seconds"],
        "train_loss": metrics["train_loss"],
    }


def in_folder(work: Path, make: Callable[[Path], Made]) -> Made:
    """Run in a folder that is removed on success and kept on a stop, for the checkpoint in it."""
    work.mkdir(parents=True, exist_ok=True)
    made = make(work)
    shutil.rmtree(work, ignore_errors=True)
    return made
