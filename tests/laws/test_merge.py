"""Merging puts the adapted weight into the layer; unmerging puts back the very same parameters."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from deltatune.errors import MergeError
from tests.laws.examples import PLAIN, Case, adapters, base_values, cases, same

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
MERGEABLE = [case for case in cases() if case.values[0].mergeable or case.values[0].adds_bias]


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).double().norm() / expected.double().norm()).item()


@pytest.mark.parametrize("case", MERGEABLE)
def test_merged_equals_unmerged_and_unmerge_gives_the_parameters_back(case: Case):
    model = case.model()
    layer = model.get_base_model().layer
    if case.adds_bias:
        before = base_values(model)
        with pytest.raises(MergeError, match="bias"):
            model.base_model.merge_adapter()
        assert same(base_values(model), before) and not layer.merged
        return
    x, stored, bias = case.batch(), layer.base_layer.weight, getattr(layer.base_layer, "bias", None)
    before, kept, apart = base_values(model), stored.detach().clone(), model(x)
    model.base_model.merge_adapter()
    assert layer.merged and layer.merged_adapters == ["default"]
    assert relative(layer.base_layer(x), apart) < TOLERANCE[torch.float32]
    assert torch.equal(model(x), layer.base_layer(x))
    with model.disable_adapter():
        assert_close(model(x), layer.as_map().apply(x, layer.as_map().matrix(kept), bias), rtol=1e-5, atol=1e-6)
    model.base_model.unmerge_adapter()
    assert layer.base_layer.weight is stored and getattr(layer.base_layer, "bias", None) is bias
    assert same(base_values(model), before) and torch.equal(stored, kept)
    assert torch.equal(model(x), apart)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [case for case in cases(options=False) if case.values[0].mergeable])
def test_in_half_precision_too(case: Case, dtype):
    model = case.model(dtype)
    layer = model.get_base_model().layer
    before, x = base_values(model), case.batch(dtype=dtype)
    apart = model(x)
    assert apart.dtype == dtype
    for _ in range(3):
        model.base_model.merge_adapter()
        assert layer.base_layer.weight.dtype == dtype
        assert relative(model(x), apart) < TOLERANCE[dtype]
        model.base_model.unmerge_adapter()
        assert same(base_values(model), before)
    assert torch.equal(model(x), apart)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", cases(PLAIN, options=False, weights=True))
def test_while_merged_a_disabled_call_is_the_base_bit_for_bit(case: Case, dtype):
    model = case.model(dtype)
    x = case.batch(dtype=dtype)
    base = model.get_base_model().layer.base_layer(x)
    model.base_model.merge_adapter()
    merged = model(x)
    with model.disable_adapter():
        assert torch.equal(model(x), base)
    assert torch.equal(model(x), merged) and not torch.equal(merged, base)


@pytest.mark.parametrize("case", [case for case in cases(options=False) if case.values[0].mergeable])
def test_merge_and_unload_leaves_a_plain_model(case: Case):
    model = case.model()
    x = case.batch()
    apart, kind = model(x), type(model.get_base_model().layer.base_layer)
    plain = model.merge_and_unload()
    assert type(plain.layer) is kind
    assert relative(plain(x), apart) < TOLERANCE[torch.float32]
    assert not any("adapters" in name or "base_layer" in name for name, _ in plain.named_modules())


@pytest.mark.parametrize("case", cases(options=False))
def test_unload_gives_the_base_back(case: Case):
    model = case.model()
    x, stored = case.batch(), model.get_base_model().layer.base_layer
    expected = stored(x)
    plain = model.unload()
    assert plain.layer is stored and torch.equal(plain(x), expected)


@pytest.mark.parametrize("case", cases(("conv2d-grouped", "conv2d-depthwise-reflect"), options=False, weights=True))
def test_a_grouped_convolution_is_merged_right_or_refused_whole(case: Case):
    model = case.model()
    x, before = case.batch(), base_values(model)
    apart = model(x)
    try:
        model.base_model.merge_adapter()
    except MergeError as error:
        assert "groups" in str(error) and "layer" in str(error)
        assert same(base_values(model), before) and torch.equal(model(x), apart)
    else:
        assert relative(model(x), apart) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("case", cases(PLAIN, options=False, weights=True))
def test_a_broken_adapter_is_refused_before_any_weight_changes(case: Case):
    model = case.model()
    before = base_values(model)
    with torch.no_grad():
        adapters(model)[0].fill_(float("nan"))
    with pytest.raises(MergeError, match=r"layer.*not finite"):
        model.base_model.merge_adapter(safe_merge=True)
    assert same(base_values(model), before)


@pytest.mark.parametrize("case", cases(("linear", "embedding"), options=False, weights=True))
def test_merging_leaves_a_layer_that_shares_the_weight_alone(case: Case):
    """A head tied to the layer keeps the weight that it had."""
    model = case.model()
    layer = model.get_base_model().layer.base_layer
    other = copy.copy(layer)
    other._parameters = {**layer._parameters}
    kept = {name: parameter.detach().clone() for name, parameter in other.named_parameters()}
    model.base_model.merge_adapter()
    assert isinstance(other, nn.Module) and same(dict(other.named_parameters()), kept)
    assert not same(dict(layer.named_parameters()), kept)


@pytest.mark.parametrize("case", cases(options=False, weights=False))
def test_what_no_weight_can_hold_is_refused_in_words(case: Case):
    model = case.model()
    layer, x, before = model.get_base_model().layer, case.batch(), base_values(model)
    apart = model(x)
    for merge in (model.base_model.merge_adapter, model.merge_and_unload, lambda: layer.stored_weight(["default"])):
        with pytest.raises(MergeError, match=r"no weight|has no weight"):
            merge()
        assert same(base_values(model), before) and not layer.merged and torch.equal(model(x), apart)
