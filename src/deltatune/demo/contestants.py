"""Who takes part in the demo: the same rows and batches for all, each its own learning rate and number of steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Contestant:
    """A way to train. `settings` are those of `deltatune train`; without any, the base stays as it is."""

    key: str
    title: str
    settings: dict[str, Any] = field(default_factory=dict)
    share_of_steps: float = 1.0  # LoRA and full fine-tuning have settled when the prefix is half way


@dataclass(frozen=True)
class Sizes:
    """How many rows and steps a run has."""

    train: int
    dev: int
    test: int
    steps: int
    batch: int = 8


FULL_RUN = Sizes(train=1200, dev=64, test=96, steps=400)
QUICK_RUN = Sizes(train=64, dev=16, test=16, steps=6)

CONTESTANTS = (
    Contestant("base", "untouched base"),
    Contestant(
        "prefix",
        "prefix tuning",
        {"method": "prefix_tuning", "num_virtual_tokens": 40, "sites": "all", "learning_rate": 0.1},
    ),
    Contestant("lora", "LoRA", {"method": "lora", "r": 8, "learning_rate": 5e-3}, 0.4),
    Contestant("full", "full fine-tuning", {"method": "full", "learning_rate": 1e-3}, 0.4),
)


def settings_of(contestant: Contestant, sizes: Sizes, output: Path) -> dict[str, Any]:
    """Everything `deltatune train` is told, the common part included."""
    steps = max(1, round(sizes.steps * contestant.share_of_steps))
    return {
        "model_name_or_path": "demo",
        "input_column": "input",
        "target_column": "target",
        "output_dir": str(output),
        "overwrite_output_dir": True,
        "max_steps": steps,
        "per_device_train_batch_size": sizes.batch,
        "per_device_eval_batch_size": 32,
        "logging_steps": max(1, steps // 40),
        "eval_steps": max(1, steps // 8),
        "save_steps": 0,
        "max_target_length": 96,
        "num_samples": 0,
        "num_scored": 0,
        "seed": 7,
        **contestant.settings,
    }
