"""Every script of measurements runs in its smallest form, so that none rots between two real runs."""

from __future__ import annotations

import importlib
import logging
import sys
from pathlib import Path

import bench
import pytest
import torch
import transformers
from harness.part import Part

# of other shapes, or in processes
OLDER = ("memory", "startup", "decode", "prefix_cost", "experts", "adapters", "step")
SLOW = (*OLDER, "growth", "methods")


@pytest.fixture(autouse=True)
def as_it_was():
    level, threads = transformers.utils.logging.get_verbosity(), torch.get_num_threads()
    yield
    transformers.utils.logging.set_verbosity(level)
    transformers.utils.logging.enable_progress_bar()
    torch.set_num_threads(threads)
    logging.captureWarnings(False)


def parts(older):
    names = [name for name, script in bench.PARTS.items() if script.there(name) and (name in OLDER) == older]
    return [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in names]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", parts(older=False))
def test_a_part_measures_and_shows_what_it_found(name, tmp_path, capsys):
    part: Part = importlib.import_module(name).PART
    importlib.import_module("harness.part").main(part, ["--quick", "--into", str(tmp_path)])
    assert (tmp_path / f"{part.name}.json").exists()
    document = (tmp_path / "performance.md").read_text()
    assert "under a load of" in document and document != (bench.FOLDER.parent / "docs/performance.md").read_text()
    for picture in tmp_path.glob("images/*"):
        assert picture.name in document
    told = capsys.readouterr().out
    assert all(f"{part.name}: {key} done" in told for key in part.trial)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", parts(older=True))
def test_an_older_part_runs(name, monkeypatch):
    module = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *(bench.PARTS[name].quick if name != "experts" else ())])
    assert not module.main()


def test_every_part_is_a_script_with_a_target_of_make():
    assert all(
        Path(bench.FOLDER, f"{name}.py").exists() for name in bench.PARTS if name not in ("memory", "decode", "startup")
    )
    assert "bench-%:" in (bench.FOLDER.parent / "Makefile").read_text()


def test_unknown_parts_are_refused_by_name(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--only", "steps"])
    assert "no part steps" in capsys.readouterr().err
