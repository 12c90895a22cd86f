"""Starts of LoRA that need data get them from the training rows."""

import json

import pytest
import torch

from deltatune.errors import DataError
from deltatune.train import train
from tests.train.test_loop import adapter

STARTS = ("eva", "corda", "lora_ga")


def options(init, **changes):
    return {"method": "lora", "method_options": {"init_lora_weights": init, "r": 2}, "max_steps": 2, **changes}


@pytest.mark.parametrize(
    ("task", "init"), [("seq2seq", "eva"), ("causal", "eva"), ("causal", "corda"), ("classification", "lora_ga")]
)
def test_a_start_reads_the_training_rows(settings, task, init, recwarn):
    result = train(settings(task, **options(init)))
    found = adapter(result.output_dir)
    assert not [w for w in recwarn if "has seen no data" in str(w.message)]
    config = json.loads((result.output_dir / "adapter_config.json").read_text())
    if init == "eva":  # ranks went where the inputs vary most
        A = next(A for name, A in found.items() if name.endswith("lora_A.weight"))
        assert config["rank_pattern"], config
        torch.testing.assert_close(A @ A.T, torch.eye(len(A)), atol=0.1, rtol=0)
    else:
        assert any(name.endswith("start_A") for name in found) or len(A_of(found)) == 4


def A_of(found):
    return next(A for name, A in found.items() if name.endswith("lora_A.weight"))


def test_a_resumed_run_ends_as_the_uninterrupted_one(settings_into, tmp_path):
    whole = train(settings_into(tmp_path / "whole", "causal", **options("corda", max_steps=4, save_steps=2)))
    cut = settings_into(tmp_path / "cut", "causal", **options("corda", max_steps=4, save_steps=2))
    train(cut)
    again = train(cut.model_copy(update={"resume_from_checkpoint": str(tmp_path / "cut" / "checkpoint-2")}))
    first, second = adapter(whole.output_dir), adapter(again.output_dir)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_too_few_rows_are_an_error_before_the_first_step(settings):
    with pytest.raises(DataError, match="as many components"):
        train(settings("classification", **options("eva", method_options={"init_lora_weights": "eva", "r": 8})))
