"""Trained side by side from the same start, the losses are the same."""

import pytest

import deltatune
from tests.core.tiny import tiny
from tests.peer.crossing import losses
from tests.peer.pairs import ATTENTION, configs, saved_by_peft, theirs


@pytest.mark.parametrize("arch", ATTENTION)
def test_thirty_steps_of_lora(arch, tmp_path):
    quiet = {"attention_dropout": 0.0} if arch == "bart" else {}
    config, _ = configs("lora", arch, target_modules=ATTENTION[arch][:3], lora_alpha=8)
    model = theirs(arch, config)
    folder = saved_by_peft(model, tmp_path)
    ours = deltatune.PeftModel.from_pretrained(tiny(arch, **quiet), folder, is_trainable=True)
    assert ours.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()
    expected = losses(model, arch, 30)
    assert expected[28] < 0.99 * expected[0]  # the same batch
    assert losses(ours, arch, 30) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("method", ["ia3", "oft", "hra"])
def test_ten_steps_of_the_others(method, tmp_path):
    config, _ = configs(method, "llama")
    model = theirs("llama", config)
    ours = deltatune.PeftModel.from_pretrained(tiny("llama"), saved_by_peft(model, tmp_path), is_trainable=True)
    assert losses(ours, "llama", 10) == pytest.approx(losses(model, "llama", 10), abs=1e-4)
