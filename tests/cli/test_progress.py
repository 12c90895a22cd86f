"""What the bar of a run says, and that it fits a terminal of 80 columns."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from deltatune.cli.progress import ProgressBar
from deltatune.train.events import Progress, RunInfo


def shown(settings: Any, step: Progress) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, color_system=None, legacy_windows=False)
    bar = ProgressBar(console)
    bar.on_begin(RunInfo(settings, step.total_steps, 0, 10, 100, 0, 1000, 100000, "cpu", 1, None))
    bar.on_step(step)
    out.truncate(0)
    out.seek(0)
    console.print(bar.bar.get_renderable())
    return out.getvalue().rstrip("\n")


def a_step(**facts: Any) -> Progress:
    values: dict[str, Any] = {
        "step": 5, "total_steps": 40, "epoch": 0.1, "loss": 1.25, "learning_rate": 1e-3, "grad_norm": 1.0,
        "steps_per_second": 2.0, "tokens_per_second": 850.0, "remaining_seconds": 185.0, "memory_bytes": 721_400_000,
    }  # fmt: skip
    return Progress(**{**values, **facts})


def test_the_bar_tells_loss_rate_memory_and_what_remains():
    from deltatune.train import TrainSettings

    line = shown(TrainSettings(), a_step())
    for part in ("5/40", "loss 1.250", "850 tok/s", "721.4 MB", "3 min 05 s left"):
        assert part in line


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"step": 99999, "total_steps": 100000, "loss": 12.5, "tokens_per_second": 123456.0},
        {"remaining_seconds": 99 * 3600.0, "memory_bytes": 78_900_000_000},
    ],
)
def test_it_is_one_line_of_at_most_80_columns_that_cuts_nothing(facts: dict[str, Any]):
    from deltatune.train import TrainSettings

    lines = shown(TrainSettings(), a_step(**facts)).split("\n")
    assert len(lines) == 1
    assert len(lines[0].rstrip()) <= 80
    assert lines[0].rstrip().endswith("left")
