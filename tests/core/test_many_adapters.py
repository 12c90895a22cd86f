"""Loading and switching look at the adapters concerned alone, however many there are; flags of the others stay."""

import copy
import pickle

import pytest
import torch

from deltatune import LoraConfig, PrefixTuningConfig, get_peft_model, inject_adapter_in_model
from deltatune.errors import PeftError
from deltatune.inject import adapted_layers, adapter_parameters
from tests.core.tiny import tiny

OTHERS = ("b", "c", "d")


def lora():
    return LoraConfig(task_type="CAUSAL_LM", r=2)


@pytest.fixture
def model():
    made = get_peft_model(tiny("llama"), lora(), adapter_name="a")
    for name in OTHERS:
        made.add_adapter(name, lora())
    return made


def training(model):
    """The adapters of which any, and all, parameters train."""
    base = model.get_base_model()
    flags = {name: {p.requires_grad for p in adapter_parameters(base, name)} for name in model.peft_config}
    assert all(len(found) < 2 for found in flags.values())
    return {name for name, found in flags.items() if True in found}


def untouchable(model, *names):
    """From now on whoever looks into one of these adapters fails."""

    def touched(*args, **kwargs):
        pytest.fail("an adapter that is not concerned was looked into")

    for _, layer in adapted_layers(model.get_base_model()):
        for name in names:
            for verb in ("requires_grad_", "parameters", "named_parameters", "modules", "file_tensors", "to", "train"):
                vars(layer.adapters[name])[verb] = touched


def test_switching_looks_at_what_trained_and_what_is_to_train(model):
    untouchable(model, "c", "d")
    model.set_adapter("b")
    model.set_adapter(["a", "b"])
    model.set_adapter("b")
    untouchable(model, "a")
    model.set_adapter("b")


def test_adding_loading_and_deleting_look_at_that_adapter_alone(model, tmp_path):
    model.save_pretrained(tmp_path, selected_adapters=["a"])
    untouchable(model, "a", *OTHERS)
    model.add_adapter("e", lora())
    model.load_adapter(tmp_path / "a", "f")
    model.delete_adapter("e")
    assert set(model.peft_config) == {"a", *OTHERS, "f"}


def test_the_active_ones_train_after_every_switch(model):
    assert training(model) == {"a"}
    for names in (["b"], ["c", "d"], ["d"], ["a", "b", "c", "d"], ["b"]):
        model.set_adapter(names)
        assert training(model) == set(names)
    model.set_adapter("c", inference_mode=True)
    assert training(model) == set()
    model.set_adapter("c")
    assert training(model) == {"c"}


def test_what_set_requires_grad_has_let_train_stops_at_the_next_switch(model):
    model.set_requires_grad(["b", "c"])
    assert training(model) == {"a", "b", "c"}
    model.set_requires_grad("a", False)
    assert training(model) == {"b", "c"}
    model.set_adapter("d")
    assert training(model) == {"d"}


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_clone_knows_what_trains(model, clone):
    model.set_adapter(["b", "c"])
    made = clone(model)
    made.set_adapter("a")
    assert training(made) == {"a"} and training(model) == {"b", "c"}


def test_adding_or_deleting_another_leaves_flags_as_they_are(model, tmp_path):
    model.set_requires_grad("a", False)
    model.set_requires_grad("b")
    model.add_adapter("e", lora())
    assert training(model) == {"b"}
    model.delete_adapter("e")
    assert training(model) == {"b"}
    with pytest.raises(PeftError):
        model.load_adapter(tmp_path / "nowhere", "e")
    with pytest.raises(PeftError):
        model.add_adapter("e", LoraConfig(target_modules=["nowhere"]))
    assert training(model) == {"b"}


def test_a_loaded_adapter_does_not_start_to_train_when_another_is_deleted(model, tmp_path):
    model.save_pretrained(tmp_path, selected_adapters=["a"])
    loaded = type(model).from_pretrained(tiny("llama"), tmp_path / "a", "a")
    loaded.add_adapter("b", lora())
    loaded.delete_adapter("b")
    assert training(loaded) == set()


def test_prefixes_follow_as_layer_adapters_do(model):
    model.add_adapter("p", PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    encoder = model.prompt_encoder["p"]
    assert not any(p.requires_grad for p in encoder.parameters())
    model.set_adapter("p")
    assert all(p.requires_grad for p in encoder.parameters()) and training(model) == set()
    model.set_adapter("a")
    assert not any(p.requires_grad for p in encoder.parameters()) and training(model) == {"a"}


def test_a_failed_injection_leaves_flags_and_layers_as_they_were():
    model = tiny("llama")
    before = [p.requires_grad for p in model.parameters()]
    wrong = {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(3, 3)}
    with pytest.raises(PeftError):
        inject_adapter_in_model(lora(), model, "a", state_dict=wrong)
    assert [p.requires_grad for p in model.parameters()] == before and not list(adapted_layers(model))
