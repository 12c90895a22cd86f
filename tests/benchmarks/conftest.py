"""The benchmarks are scripts beside a package `harness`; tests import both as the scripts do."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

FOLDER = str(Path(__file__).resolve().parents[2] / "benchmarks")
if FOLDER not in sys.path:
    sys.path.insert(0, FOLDER)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    from harness.data import data_folder

    folder = data_folder()
    if not folder.is_dir():
        pytest.skip(f"no data sets at {folder}; set DELTATUNE_SHARED")
    return folder
