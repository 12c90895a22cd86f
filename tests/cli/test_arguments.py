"""How settings are read from a command line."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltatune.cli.arguments import parse, value_of
from deltatune.errors import ConfigError

FLAGS = {"gradient_checkpointing", "eval_before"}


@pytest.mark.parametrize(
    "words",
    [
        ["--learning_rate", "1e-4"],
        ["--learning-rate", "1e-4"],
        ["--learning_rate=1e-4"],
        ["--learning-rate=1e-4"],
        ["learning_rate=1e-4"],
        ["learning-rate=1e-4"],
    ],
)
def test_all_ways_of_writing_a_setting_mean_the_same(words):
    assert parse(words).settings == {"learning_rate": 1e-4}


def test_the_settings_file_may_stand_anywhere():
    for words in (["a.yaml", "r=4"], ["r=4", "a.yaml"], ["--r", "4", "a.yaml"]):
        found = parse(words)
        assert (found.config, found.settings) == ("a.yaml", {"r": 4})


def test_a_flag_takes_no_value_unless_it_is_a_truth_value():
    assert parse(["--gradient_checkpointing", "a.yaml"], FLAGS).config == "a.yaml"
    assert parse(["--gradient_checkpointing", "false"], FLAGS).settings == {"gradient_checkpointing": False}
    assert parse(["--no-eval-before"], FLAGS).settings == {"eval_before": False}
    assert parse(["--gradient-checkpointing"], FLAGS).settings == {"gradient_checkpointing": True}


def test_a_negative_number_is_a_value_and_no_option():
    assert parse(["--max_steps", "-1", "--seed", "3"]).settings == {"max_steps": -1, "seed": 3}


def test_names_of_layers_become_a_list_and_patterns_stay_text():
    assert parse(["--target_modules", "q,v"]).settings == {"target_modules": ["q", "v"]}
    assert parse(["--lora_target", "q"]).settings == {"lora_target": ["q"]}
    assert parse(["target_modules=all-linear"]).settings == {"target_modules": "all-linear"}
    assert parse([r"target_modules=.*\.(q|v)"]).settings == {"target_modules": r".*\.(q|v)"}


@pytest.mark.parametrize("words", [["a.yaml", "b.yaml"], ["-z"], ["r=4", "--r", "8"]])
def test_what_cannot_be_meant_is_refused(words):
    with pytest.raises(ConfigError):
        parse(words)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_are_read_as_python_writes_them(number):
    assert value_of(repr(number)) == number


@given(st.integers())
def test_whole_numbers_stay_whole(number):
    found = value_of(str(number))
    assert found == number
    assert type(found) is int


def test_what_a_run_goes_on_from_may_be_a_folder_or_nothing():
    flags = {*FLAGS, "resume", "resume_from_checkpoint"}
    assert parse(["--resume", "out/checkpoint-5"], flags).settings == {"resume": "out/checkpoint-5"}
    assert parse(["--resume_from_checkpoint", "true"], flags).settings == {"resume_from_checkpoint": True}
    found = parse(["--resume", "run.yaml"], flags)
    assert (found.config, found.settings) == ("run.yaml", {"resume": True})
    assert parse(["--resume", "r=4"], flags).settings == {"resume": True, "r": 4}
