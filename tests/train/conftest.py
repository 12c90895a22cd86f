"""Small bases, small files, and settings that train on them in about a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deltatune.train import TrainSettings
from tests.train import toys


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {
        "seq2seq": toys.t5(root / "t5"),
        "causal": toys.llama(root / "llama"),
        "classification": toys.bert(root / "bert"),
    }


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("files")
    pairs = toys.write_jsonl(root / "pairs.jsonl", toys.pairs(24))
    labelled = toys.write_jsonl(root / "labelled.jsonl", toys.labelled(24))
    return {"seq2seq": pairs, "causal": pairs, "classification": labelled}


@pytest.fixture(scope="session")
def settings_into(bases: dict[str, Path], files: dict[str, Path]) -> Any:
    """A function: the settings of a short run into a folder, with the changes it is given."""

    def make(output: Path, task: str = "seq2seq", **changes: Any) -> TrainSettings:
        values: dict[str, Any] = {
            "model_name_or_path": str(bases.get(task, "demo")),
            "task": task,
            "train_file": str(files[task]) if task in files else None,
            "output_dir": str(output),
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "device": "cpu",
            "num_threads": 1,
            "num_samples": 0,
            "num_scored": 0,
            "eval_before": False,
        }
        return TrainSettings(**{**values, **changes})

    return make


@pytest.fixture
def settings(settings_into: Any, tmp_path: Path) -> Any:
    """The same, into the folder `out` of the test."""

    def make(task: str = "seq2seq", **changes: Any) -> TrainSettings:
        return settings_into(tmp_path / "out", task, **changes)

    return make
