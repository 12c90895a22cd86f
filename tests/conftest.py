"""What all tests share: one thread, no network, and the place of the data sets that stand beside the project."""

import importlib.util
import os
from datetime import date
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") and not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on a CPU too; read when triton is imported

import torch
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
settings.register_profile("same", derandomize=True, deadline=None)  # a failure is there every time, or never
settings.load_profile("same")
# Which part of the law cases a run draws: another one each day. Set before worker processes start, which inherit it.
os.environ.setdefault("DELTATUNE_LAW_SEED", str(date.today().toordinal()))
torch.set_num_threads(1)  # results do not depend on the machine, and two test processes share two cores


def pytest_report_header() -> str:
    return f"law cases drawn with DELTATUNE_LAW_SEED={os.environ['DELTATUNE_LAW_SEED']}"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of data sets and small real models, which a user does not have."""
    folder = Path(os.environ.get("DELTATUNE_SHARED") or Path(__file__).parents[2] / "shared")
    if not folder.is_dir():
        pytest.skip("the shared data is not here; set DELTATUNE_SHARED to its folder")
    return folder
