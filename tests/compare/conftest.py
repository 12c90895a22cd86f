"""A tiny T5 without dropout, rows for it, and the settings that runs on them share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.train import toys


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("compare")
    toys.t5(root / "t5", dropout=0.0)
    toys.bert(root / "bert", dropout=0.0)
    toys.write_jsonl(root / "train.jsonl", toys.pairs(48))
    toys.write_jsonl(root / "held.jsonl", toys.pairs(32, seed=1))
    toys.write_jsonl(root / "other.jsonl", toys.pairs(8, seed=2))
    toys.write_jsonl(root / "labelled.jsonl", toys.labelled(80))
    return root


@pytest.fixture
def shared(tiny: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model_name_or_path": str(tiny / "t5"),
        "train_file": str(tiny / "train.jsonl"),
        "test_file": str(tiny / "held.jsonl"),
        "output_dir": str(tmp_path / "out"),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "device": "cpu",
        "num_threads": 1,
    }
