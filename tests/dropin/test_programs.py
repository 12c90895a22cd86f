"""Programs that say `import peft` observe the same under deltatune as under PEFT, to 1e-4."""

from __future__ import annotations

import importlib.util

import pytest

from tests.dropin.side_by_side import PROGRAMS, differences, observed

QUICK = ("quickstart", "adapters", "native", "trainer", "lowlevel", "accelerated", "virtual")
QUICK_CASES = ("configs", "targets", "layers")  # `test_cases` has the others
SLOW = {
    "recipes": "trl",
    "sft": "trl",
    "dpo": "trl",
    "grpo": "trl",
    "sentences": "sentence_transformers",
    "diffusion": "diffusers",
}


def agree(names: tuple[str, ...]) -> None:
    theirs, ours = observed(names, ours=False), observed(names, ours=True)
    assert list(theirs) == list(ours) == list(names)
    for name in names:
        assert theirs[name], f"{name} observes nothing"
        assert [key for key, value in theirs[name].items() if isinstance(value, dict) and "died" in value] == []
        assert list(theirs[name]) == list(ours[name])
        found = [
            d for key, value in theirs[name].items() for d in differences(value, ours[name][key], f"{name}: {key}")
        ]
        assert not found, "\n".join(found)


def test_programs_of_peft_and_transformers_observe_the_same():
    agree((*QUICK, *QUICK_CASES))


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_programs_of_other_libraries_observe_the_same(name):
    if importlib.util.find_spec(SLOW[name]) is None:
        pytest.skip(f"{SLOW[name]} is not installed")
    agree((name,))


def test_every_program_is_run():
    assert {path.stem for path in PROGRAMS.glob("*.py")} == {*QUICK, *SLOW}


def test_a_difference_is_noticed():
    assert differences([1.0, {"a": [2]}], [1.00001, {"a": [2]}]) == []
    for other in ([1.001, {"a": [2]}], [1.0, {"b": [2]}], [1.0, {"a": [2, 3]}], [True, {"a": [2]}]):
        assert differences([1.0, {"a": [2]}], other)
