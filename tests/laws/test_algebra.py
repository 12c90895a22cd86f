"""Birth, agreement, disabled: what an adapter computes, against the base and against the adapted weight."""

import pytest
import torch
from torch.testing import assert_close

from deltatune.layer import AdaptedLayer
from tests.laws.examples import BASES, Case, adapters, cases


@pytest.mark.parametrize("case", cases())
def test_a_fresh_adapter_changes_nothing_unless_it_says_so(case: Case):
    model = case.model(torch.float64, moved=False)  # what is made from the base has its precision
    x = case.batch(dtype=torch.float64)
    with torch.no_grad(), model.disable_adapter():
        base = model(x)
    out = model(x)
    declared = model.get_base_model().layer.adapters["default"].identity_at_birth
    if declared is True:
        assert_close(out, base, rtol=1e-12, atol=1e-12)
    else:
        assert not torch.allclose(out, base), f"declared as {declared!r}, but the output is the base's"


@pytest.mark.parametrize("case", cases(weights=True))
def test_forward_is_the_layers_operation_with_the_adapted_weight(case: Case):
    model = case.model().double()
    layer = model.get_base_model().layer
    assert isinstance(layer, AdaptedLayer)
    plain = layer.as_map()
    adapted = layer.as_map(["default"])
    x = case.batch(dtype=torch.float64)
    expected = plain.apply(x, adapted.weight, adapted.bias)
    assert_close(model(x), expected, rtol=1e-7, atol=1e-7)
    with model.disable_adapter():
        assert not torch.allclose(model(x), expected, rtol=1e-4, atol=1e-6), "the adapter had no effect"


# A padded embedding gives its padding row no gradient, which the two ways of computing it meet at different tensors.
@pytest.mark.parametrize("case", cases((base for base in BASES if base != "embedding-padded"), weights=True))
def test_the_gradient_is_that_of_the_adapted_weight(case: Case):
    model = case.model().double()
    layer = model.get_base_model().layer
    x = case.batch(dtype=torch.float64)
    given = x.requires_grad_() if x.is_floating_point() else None
    wanted = [*adapters(model), *([] if given is None else [given])]
    fast = torch.autograd.grad(layer(x).square().sum(), wanted)
    adapted = layer.as_map(["default"])
    slow = torch.autograd.grad(layer.as_map().apply(x, adapted.weight, adapted.bias).square().sum(), wanted)
    for one, other in zip(fast, slow):
        assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", cases(options=False, weights=True))
def test_the_base_layers_own_operation_is_recovered_from_its_weight(case: Case):
    """`apply` with the layer's own weight is the layer, so that agreement says something about the layer itself."""
    torch.manual_seed(0)
    plain = case.model().double().get_base_model().layer.as_map()
    x = case.batch(dtype=torch.float64)
    assert_close(plain.apply(x, plain.weight, plain.bias), plain(x), rtol=1e-10, atol=1e-10)
    assert torch.equal(plain.store(plain.weight), plain.module.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", cases(options=False))
def test_disabled_is_the_base_bit_for_bit(case: Case, dtype):
    model = case.model(dtype)
    x = case.batch(dtype=dtype)
    expected = model.get_base_model().layer.base_layer(x)
    with model.disable_adapter():
        assert torch.equal(model(x), expected)
    assert not torch.equal(model(x), expected)
    model.disable_adapter_layers()
    assert torch.equal(model(x), expected)
    model.enable_adapter_layers()
    assert not torch.equal(model(x), expected)
