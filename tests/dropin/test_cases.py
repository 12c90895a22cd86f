"""Small programs against the documented behaviour of PEFT, each run under PEFT and under deltatune.

What they tell has to be the same: names, shapes, counts and printed lines exactly, numbers to 1e-4, and an error of
ours has to be caught by whatever catches PEFT's. The cases of `apart` differ on purpose, and docs/migrate.md says each.
Those that are quick run beside the programs of `test_programs`, which pays for the imports once.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.dropin.side_by_side import CASES, differences, observed
from tests.dropin.test_programs import QUICK_CASES, agree

SLOW = ("models", "states", "merging", "methods", "uses", "others")
MIGRATE = Path(__file__).parents[2] / "docs" / "migrate.md"


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_what_models_files_and_sums_do_is_the_same(name):
    agree((name,))


@pytest.mark.slow
def test_what_differs_on_purpose_differs_and_is_said():
    theirs, ours = (observed(("apart",), ours)["apart"] for ours in (False, True))
    words = {name.removesuffix(" says"): told for name, told in theirs.items() if name.endswith(" says")}
    cases = {name: told for name, told in theirs.items() if name in words}
    assert len(theirs) == 2 * len(cases)
    assert [name for name, told in cases.items() if not differences(told, ours[name])] == []
    text = " ".join(MIGRATE.read_text().split())
    assert [said for said in words.values() if said not in text] == []


def test_every_module_of_cases_is_run():
    assert {path.stem for path in CASES.glob("*.py")} == {*QUICK_CASES, *SLOW, "apart", "kit"}


def test_an_error_that_handlers_of_pefts_do_not_catch_is_noticed():
    assert differences({"raises": ["ValueError"]}, {"raises": ["TypeError", "ValueError"]}) == []
    assert differences([{"raises": ["KeyError"]}], [{"raises": ["ValueError"]}])
    assert differences({"raises": ["ValueError"]}, "nothing") and differences("nothing", {"raises": ["ValueError"]})
