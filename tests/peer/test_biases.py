"""Trained biases beside adapters, in files of PEFT 0.21.2 and ours."""

import pytest

import deltatune
from tests.core.tiny import TASKS
from tests.peer.crossing import crosses_over, trains_alike
from tests.peer.pairs import ATTENTION, configs, peft


@pytest.mark.parametrize("choice", ["all", "lora_only"])
@pytest.mark.parametrize("arch", ["gpt2", "bert", "bart"])
def test_biases_beside_lora(arch, choice, tmp_path):
    model, made = crosses_over(*configs("lora", arch, target_modules=ATTENTION[arch][:2], bias=choice), arch, tmp_path)
    assert model.get_nb_trainable_parameters()[0] == made.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("choice", ["all", "lora_only"])
def test_training_with_biases(choice, tmp_path):
    trains_alike(configs("lora", "gpt2", target_modules=["c_attn"], bias=choice)[0], "gpt2", tmp_path)


OTHERS = [
    ("OFTConfig", {"oft_block_size": 8}, "oft_only"),
    ("HRAConfig", {"r": 4}, "hra_only"),
    ("VeraConfig", {"r": 4}, "vera_only"),
    ("MissConfig", {"r": 4}, "all"),
    ("FourierFTConfig", {"n_frequency": 20}, "fourier_only"),
]


@pytest.mark.parametrize(("name", "sizes", "choice"), OTHERS, ids=[name for name, _, _ in OTHERS])
def test_biases_beside_other_methods(name, sizes, choice, tmp_path):
    arguments = {"task_type": TASKS["bart"], "target_modules": ["q_proj", "fc1"], "bias": choice, **sizes}
    pair = getattr(peft, name)(**arguments), getattr(deltatune, name)(**arguments)
    crosses_over(*pair, "bart", tmp_path, format="peft")
