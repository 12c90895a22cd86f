"""Several adapters on one layer are composed; one layer under several names is adapted once, under all of them."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from deltatune import get_peft_model
from deltatune.adapter import Applied
from deltatune.errors import PeftWarning
from deltatune.layer import AdaptedLayer
from tests.laws.examples import (
    BASES,
    LAYER_METHODS,
    Case,
    Holder,
    allows,
    base_values,
    cases,
    config_of,
    move,
    pairs,
    same,
)

PAIRS = pairs("stacking")
KINDS = ("linear", "transposed", "conv2d-circular", "norm")


class Dense(Applied):
    """An adapter after a map, computed with its weight."""

    def __call__(self, x):
        return self.inner.apply(x, self.weight, self.bias)


def stacked(first: str, second: str, base: str):
    torch.manual_seed(0)
    model = get_peft_model(Holder(BASES[base].make()).double().eval(), config_of(first), adapter_name="a")
    model.add_adapter("b", config_of(second))
    move(model, name="a"), move(model, name="b")
    return model


@pytest.mark.parametrize("base", KINDS)
@pytest.mark.parametrize("first,second", PAIRS)
def test_two_active_adapters_are_the_second_after_the_first(first, second, base):
    if not (allows(first, base) and allows(second, base)):
        pytest.skip(f"{base} is no layer for both")
    model = stacked(first, second, base)
    model.set_adapter(["a", "b"])
    layer = model.get_base_model().layer
    x, composed = BASES[base].batch(dtype=torch.float64), layer.as_map()
    own = [layer.adapters["a"], layer.adapters["b"]]
    weights = [adapter for adapter in own if adapter.mergeable is True]
    for adapter in weights:
        composed = Dense(adapter, composed)
    for adapter in own:  # what no weight can hold acts on what a layer computes, with whatever weight it has
        composed = composed if adapter in weights else Applied(adapter, composed)
    expected = composed(x)
    assert_close(model(x), expected, rtol=1e-7, atol=1e-7)
    if len(weights) == 2:
        model.base_model.merge_adapter()
        assert_close(model(x), expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("first,second", PAIRS)
def test_removing_one_gives_the_other_back_bit_for_bit(first, second):
    model = stacked(first, second, "linear")
    x = BASES["linear"].batch(dtype=torch.float64)
    model.set_adapter("a")
    only_a = model(x)
    model.set_adapter("b")
    only_b = model(x)
    model.set_adapter(["a", "b"])
    model(x)
    model.delete_adapter("b")
    assert model.active_adapters == ["a"] and torch.equal(model(x), only_a)
    assert not any(".b." in f"{name}." for name, _ in model.named_modules())
    model.add_adapter("b", config_of(second))
    model.set_adapter("b")
    assert not torch.equal(model(x), only_b), "a new adapter of an old name starts anew"


@pytest.mark.parametrize("case", cases(("linear",), options=False))
def test_removing_the_last_adapter_leaves_the_base(case: Case):
    model = case.model()
    x = case.batch()
    with model.disable_adapter():
        base = model(x)
    model.delete_adapter("default")
    assert torch.equal(model(x), base)
    assert type(model.get_base_model().layer) is nn.Linear


@pytest.mark.parametrize("case", cases(("linear",), options=False))
def test_removing_the_active_adapter_makes_another_active_and_says_so(case: Case):
    model = case.model()
    model.add_adapter("other", case.config())
    with pytest.warns(PeftWarning, match="'other' is active now"):
        model.delete_adapter("default")
    assert model.active_adapters == ["other"]


class Twice(nn.Module):
    """One layer reachable under two names, one of them inside a list."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.block = nn.ModuleList([nn.Identity(), nn.Module()])
        self.block[1].layer = self.layer

    def forward(self, x):
        return self.block[1].layer(self.layer(x).tanh())


@pytest.mark.parametrize("name", LAYER_METHODS)
@pytest.mark.parametrize("targets", [["layer"], ["block.1.layer"], r"layer"])
def test_a_shared_layer_is_adapted_once_and_under_both_names(name, targets):
    torch.manual_seed(0)
    model = get_peft_model(Twice().double().eval(), config_of(name, target_modules=targets))
    base = model.get_base_model()
    assert isinstance(base.layer, AdaptedLayer) and base.layer is base.block[1].layer
    move(model)
    x = torch.randn(3, 8, dtype=torch.float64)
    once = base.layer.as_map(["default"])
    assert_close(model(x), once(once(x).tanh()), rtol=1e-7, atol=1e-7)
    expected, before = model(x), base_values(model)
    if base.layer.adapters["default"].mergeable is True:
        model.base_model.merge_adapter()
        assert_close(model(x), expected, rtol=1e-7, atol=1e-7)
        model.base_model.unmerge_adapter()
    assert same(base_values(model), before)
    plain_model = model.unload()
    assert type(plain_model.layer) is nn.Linear and plain_model.layer is plain_model.block[1].layer


@pytest.mark.parametrize("name", LAYER_METHODS)
def test_a_shared_layer_can_get_a_second_adapter_under_its_other_name(name):
    model = get_peft_model(Twice().eval(), config_of(name))
    model.add_adapter("other", config_of(name, target_modules=["block.1.layer"]))
    base = model.get_base_model()
    assert base.layer is base.block[1].layer and set(base.layer.adapters) == {"default", "other"}
    model.set_adapter("other")
    model.delete_adapter("default")
    assert base.layer is base.block[1].layer and set(base.layer.adapters) == {"other"}
