"""The planted faults of `scripts/mutants.py` still find their lines; `make mutants` runs whether tests kill them."""

import importlib
import sys
from pathlib import Path

import pytest

import deltatune

ROOT = Path(__file__).parents[2]
PACKAGE = Path(deltatune.__file__).parent


def planted() -> list:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        return importlib.import_module("planted").MUTANTS
    finally:
        sys.path.remove(str(ROOT / "scripts"))


MUTANTS = planted()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.method}: {mutant.fault}")
def test_a_mutant_changes_one_line_that_is_there(mutant):
    text = (PACKAGE / mutant.file).read_text()
    assert mutant.into(text) != text


def test_there_are_thirty():
    assert len(MUTANTS) >= 30
