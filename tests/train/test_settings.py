"""Settings: names that are understood, and answers to those that are not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from deltatune.errors import ConfigError
from deltatune.train import TrainSettings, load_settings
from deltatune.train.aliases import ALIASES
from deltatune.train.method import method_fields, method_names


@pytest.mark.parametrize(
    ("given", "named", "value"),
    [
        ({"lr": 3e-4}, "learning_rate", 3e-4),
        ({"batch_size": 3}, "per_device_train_batch_size", 3),
        ({"micro-batch-size": 3}, "per_device_train_batch_size", 3),
        ({"epochs": 2}, "num_train_epochs", 2.0),
        ({"cutoff_len": 99}, "max_length", 99),
        ({"model": "gpt2"}, "model_name_or_path", "gpt2"),
        ({"train_on_inputs": True}, "completion_only_loss", False),
        ({"mask_prompt": True}, "completion_only_loss", True),
        ({"bf16": True}, "dtype", "bfloat16"),
        ({"task": "SEQ_2_SEQ_LM"}, "task", "seq2seq"),
        ({"task_type": "CAUSAL_LM"}, "task", "causal"),
        ({"task": "ner"}, "task", "token_classification"),
        ({"task": "tagging"}, "task", "token_classification"),
        ({"task": "TOKEN_CLS"}, "task", "token_classification"),
        ({"task": "qa"}, "task", "question_answering"),
        ({"task": "QUESTION_ANS"}, "task", "question_answering"),
        ({"finetuning_type": "PREFIX_TUNING"}, "method", "prefix_tuning"),
        ({"method": "prefix"}, "method", "prefix_tuning"),
        ({"report_to": "tensorboard,wandb"}, "report_to", ["tensorboard", "wandb"]),
        ({"report_to": "none"}, "report_to", []),
        ({"val_set_size": 0.1}, "eval_split", 0.1),
        ({"resume": True}, "resume_from_checkpoint", True),
    ],
)
def test_other_programs_names_are_understood(given, named, value):
    assert getattr(TrainSettings(**given), named) == value


def test_options_of_the_method_stand_beside_the_other_settings():
    made = TrainSettings(lora_rank=4, lora_dropout=0.1, lora_target="all")
    assert made.method_options == {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": "all-linear"}
    assert TrainSettings(method="lora", method_options={"lora_r": 4}).method_options["r"] == 4


def test_no_alias_hides_a_setting_or_an_option_of_a_method():
    fields = set(TrainSettings.model_fields)
    options = {option for method in method_names() for option in method_fields(method)}
    for name, aliases in ALIASES.items():
        assert name in fields or name in options, name
        assert not set(aliases) & fields
        assert not set(aliases) & options


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"learning_rat": 1}, "unknown setting 'learning_rat'; did you mean 'learning_rate'?"),
        ({"num_virtual_token": 1, "method": "prefix"}, "did you mean 'num_virtual_tokens'?"),
        ({"method": "prefix", "r": 4}, "'r' is an option of adalora, adamss, deft, delora and"),
        ({"method": "lorra"}, "method='lorra' is not known; did you mean 'lora'?"),
        ({"lr": 1e-4, "learning_rate": 2e-4}, "both set learning_rate"),
        ({"learning_rate": -1}, "learning_rate=-1 is not allowed, expected greater than 0"),
        ({"learning_rate": float("inf")}, "learning_rate=inf is not allowed"),
        ({"num_train_epochs": float("nan")}, "num_train_epochs=nan is not allowed"),
        ({"max_steps": 0}, "max_steps=0 is not allowed, expected a number of 1 or more"),
        ({"batch_size": 0}, "per_device_train_batch_size=0 is not allowed"),
        ({"r": 0}, "r=0 is not allowed"),
        ({"eval_steps": 2.5}, "eval_steps=2.5 is not allowed, expected a whole number of steps"),
        ({"task": "translate"}, "task='translate' is not known"),
        ({"eval_file": "a", "eval_split": 0.5}, "eval_split=0.5 is not allowed, expected 0 beside an eval_file"),
        ({"task_column": "t"}, "task_column='t' is not allowed, expected a method with num_tasks"),
        ({"dtype": "float16"}, "dtype='float16' is not allowed"),
        ({"batch_size": 0, "max_length": 1}, "per_device_train_batch_size=0"),
    ],
)
def test_what_cannot_be_is_answered_in_one_line(given: dict[str, Any], told: str):
    with pytest.raises(ConfigError) as caught:
        TrainSettings(**given)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.field


def test_all_faults_are_told_at_once():
    with pytest.raises(ConfigError, match=r"max_length=1.*; per_device_train_batch_size=0"):
        TrainSettings(batch_size=0, max_length=1)


@pytest.mark.parametrize("ending", ["yaml", "json"])
def test_a_file_is_read_and_overridden(ending, tmp_path):
    file = tmp_path / f"run.{ending}"
    text = {"yaml": "method: lora\nlr: 1.0e-3\nr: 4\n", "json": '{"method": "lora", "lr": 0.001, "r": 4}'}[ending]
    file.write_text(text)
    made = load_settings(file, {"learning_rate": 2e-3, "lora_r": 2})
    assert made.learning_rate == 2e-3
    assert made.method_options["r"] == 2


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("a: [", "is malformed"),
        ("", "is empty"),
        ("- 1", "is a list"),
        ("!!python/name:os.getcwd", "malformed"),
    ],
)
def test_a_broken_settings_file_is_named(content, told, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=told) as caught:
        load_settings(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_resolved_settings_make_the_same_settings_again():
    made = TrainSettings(method="prefix", prefix_projection=True, task="causal", epochs=1)
    resolved = json.loads(json.dumps(made.resolved()))
    assert resolved["learning_rate"] == 1e-3  # through the MLP; a bare prefix starts at 1e-2
    assert TrainSettings(**resolved).resolved() == made.resolved()


def test_assignment_is_checked_too():
    made = TrainSettings()
    with pytest.raises(ValueError, match="max_length"):
        made.max_length = 0


def test_a_preset_is_its_method_with_choices_of_its_own():
    settings = TrainSettings(method="P-Tuning-v2", task="classification", num_virtual_tokens=8)
    assert settings.method == "p_tuning_v2"
    assert settings.method_options == {"sites": "all", "num_virtual_tokens": 8}
    assert settings.resolved_learning_rate == TrainSettings(method="prefix").resolved_learning_rate
