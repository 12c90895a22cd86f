"""How strongly adapters act: for the calls of one thread, or in one layer from now on."""

import copy
import threading

import peft
import peft.helpers
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from deltatune import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from deltatune.errors import ConfigError, PeftWarning, StateError
from deltatune.helpers import rescale_adapter_scale, scale_layer, set_scale, unscale_layer
from tests.core.tiny import batch, tiny
from tests.laws.examples import LAYER_METHODS, Holder, config_of, move

SCALED = ("lora", "adalora", "loha", "lokr", "gralora", "shira", "randlora", "peanut")


def adapted(method: str = "lora", seed: int = 0) -> PeftModel:
    torch.manual_seed(seed)
    model = get_peft_model(Holder(nn.Linear(12, 8)).eval(), config_of(method))
    move(model)
    return model


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("method", [name for name in SCALED if name in LAYER_METHODS])
@pytest.mark.parametrize("factor", [0, 0.5, 2.0])
def test_the_update_is_multiplied_and_comes_back(method, factor, x):
    model = adapted(method)
    before = model(x)
    with model.disable_adapter():
        base = model(x)
    with rescale_adapter_scale(model, factor):
        inside, weight = model(x), model.get_base_model().layer.weight.clone()
    layer = model.get_base_model().layer
    assert_close(inside - base, factor * (before - base), rtol=1e-4, atol=1e-5)
    plain = layer.base_layer.weight
    assert_close(weight - plain, factor * (layer.weight - plain), rtol=1e-4, atol=1e-5)
    assert torch.equal(model(x), before)


def test_blocks_inside_of_each_other_multiply_and_disabling_wins(x):
    model = adapted()
    before = model(x)
    with model.disable_adapter():
        base = model(x)
    with rescale_adapter_scale(model, 0.5):
        with rescale_adapter_scale(model, 3):
            assert_close(model(x) - base, 1.5 * (before - base))
        with model.disable_adapter():
            assert torch.equal(model(x), base)
            with rescale_adapter_scale(model, 3):
                assert torch.equal(model(x), base)
        assert_close(model(x) - base, 0.5 * (before - base))


def test_rows_of_a_mixed_batch_are_rescaled_too(x):
    model = adapted()
    model.add_adapter("other", config_of("lora"))
    move(model)
    with model.disable_adapter():
        base = model(x)
    names = ["default", "__base__", "other"]
    before = model(x, adapter_names=names)
    with rescale_adapter_scale(model, 0.25):
        inside = model(x, adapter_names=names)
    assert_close(inside - base, 0.25 * (before - base), rtol=1e-4, atol=1e-6)


def test_what_another_thread_computes_is_not_rescaled(x):
    model = adapted()
    before, found = model(x), []
    with rescale_adapter_scale(model, 0.0):
        thread = threading.Thread(target=lambda: found.append(model(x)))
        thread.start()
        thread.join()
    assert torch.equal(found[0], before)


def test_switching_adapters_inside_of_the_block_still_switches(x):
    model = adapted()
    model.add_adapter("other", config_of("lora"))
    move(model)
    with rescale_adapter_scale(model, 1.0):
        first = model(x)
        model.set_adapter("other")
        assert not torch.allclose(model(x), first)


def test_layers_that_are_recomputed_outside_of_the_block_keep_its_scale():
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
        move(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        with rescale_adapter_scale(model, 0.3):
            loss = model(**batch("llama")).logits.square().sum()
        loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for one, other in zip(*grads):
        assert_close(one, other)


def test_the_peer_rescales_alike(x):
    ours = adapted()
    theirs = peft.get_peft_model(
        copy.deepcopy(ours.unload()), peft.LoraConfig(r=4, target_modules=["layer"], lora_alpha=8)
    )
    ours = adapted()
    peft.set_peft_model_state_dict(theirs, get_peft_model_state_dict(ours))
    for factor in (0.5, 2):
        with rescale_adapter_scale(ours, factor), peft.helpers.rescale_adapter_scale(theirs, factor):
            assert_close(ours(x), theirs(x))


def test_verbs_of_one_layer_are_the_peers(x):
    ours = adapted()
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(12, 8)), peft.LoraConfig(r=4, target_modules=["0"]))
    layer, other = ours.get_base_model().layer, theirs.base_model.model[0]
    steps = [("set_scale", 0.5), ("scale_layer", 3.0), ("unscale_layer", 2.0), ("scale_layer", 4), ("set_scale", 2)]
    verbs = {"set_scale": set_scale, "scale_layer": scale_layer, "unscale_layer": unscale_layer}
    for verb, value in [*steps, ("unscale_layer", None)]:
        arguments = ("default", value) if verb == "set_scale" else (value,)
        verbs[verb](layer, *arguments)
        getattr(other, verb)(*arguments)
        born = other.lora_alpha["default"] / other.r["default"]
        assert layer.scaling["default"] / 2.0 == pytest.approx(other.scaling["default"] / born), verb
    assert layer.scaling["default"] == 2.0
    set_scale(layer, "missing", 2.0)


def test_bad_calls_are_refused(x):
    model = adapted()
    with pytest.raises(TypeError, match="multiplier='1'"), rescale_adapter_scale(model, "1"):
        pass
    with (
        pytest.raises(ValueError, match="no adapter of this model has a scale"),
        rescale_adapter_scale(nn.Linear(2, 2), 1.0),
    ):
        pass
    with (
        pytest.raises(StateError, match="no adapter of this model has a scale"),
        rescale_adapter_scale(adapted("ia3"), 1.0),
    ):
        pass
    with pytest.raises(ConfigError, match="scale=0"):
        unscale_layer(model.get_base_model().layer, 0)
    model.base_model.merge_adapter()
    with pytest.raises(StateError, match="merged"), rescale_adapter_scale(model, 0.5):
        pass
    with pytest.raises(StateError, match="merged"):
        scale_layer(model.get_base_model().layer, 0.5)


def test_an_adapter_without_a_scale_beside_is_told(x):
    model = adapted()
    model.add_adapter("other", config_of("ia3"))
    with pytest.warns(PeftWarning, match="IA3 of this model has no scale"), rescale_adapter_scale(model, 0.5):
        pass


def test_a_failing_block_gives_the_scale_back(x):
    model = adapted()
    before = model(x)
    with pytest.raises(ZeroDivisionError), rescale_adapter_scale(model, 0.5):
        raise ZeroDivisionError
    assert torch.equal(model(x), before)
