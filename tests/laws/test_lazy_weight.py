"""Code that reads a layer's weight gets the adapted one, and pays for it only when it uses the numbers."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from deltatune import get_peft_model
from deltatune.adapter import Applied
from deltatune.bases import as_map
from deltatune.errors import MergeError, StateError
from tests.core.tiny import TASKS, batch, tiny
from tests.laws.examples import LAYER_METHODS, Case, adapters, cases, config_of, move

KINDS = ("linear", "transposed", "embedding", "conv2d-circular", "norm")


@pytest.fixture
def dense(monkeypatch):
    """Counts the dense weights that are built."""
    built = []
    inside = Applied.weight.fget
    monkeypatch.setattr(Applied, "weight", property(lambda self: built.append(self) or inside(self)))
    return built


@pytest.mark.parametrize("name", LAYER_METHODS)
@pytest.mark.parametrize("architecture", ["t5", "llama", "gpt2", "bert"])
def test_a_forward_and_backward_of_a_model_builds_no_dense_weight(name, architecture, dense):
    # three labels, of the head of `tiny`, would have no half
    sizes = {"t5": {"feed_forward_proj": "gated-gelu"}, "bert": {"num_labels": 4}}.get(architecture, {})
    config = config_of(name, target_modules="all-linear", task_type=TASKS[architecture])  # heads fit no block size
    base = tiny(architecture, **sizes)
    layers = [layer for module in base.modules() if (layer := as_map(module)) and layer.kind == "linear"]
    if not any(LAYER_METHODS[name].adapter.fits(layer) is True for layer in layers):
        pytest.skip(f"no linear layer of {architecture} is one for {name}")
    model = get_peft_model(base, config)
    move(model, 0.1)
    out = model(**batch(architecture))
    out.loss.backward()
    assert len(dense) == 0
    assert all(p.grad is not None for p in adapters(model))


@pytest.mark.parametrize("case", cases(KINDS, options=False))
def test_questions_about_the_weight_build_nothing(case: Case, dense):
    layer = case.model(torch.bfloat16).get_base_model().layer
    stored = layer.base_layer.weight
    weight = layer.weight
    assert (weight.dtype, weight.shape, weight.device) == (stored.dtype, stored.shape, stored.device)
    assert (weight.ndim, weight.dim(), weight.numel(), len(weight)) == (
        *(stored.ndim, stored.dim(), stored.numel(), len(stored)),
    )
    assert weight.size(0) == stored.size(0) and weight.is_floating_point() and weight.stride() == stored.stride()
    assert isinstance(weight, nn.Parameter) and "shape" in repr(weight)
    assert dense == []


@pytest.mark.parametrize(
    "case", [case for case in cases() if case.values[0].mergeable and case.values[0].changes_weight]
)
def test_using_the_weight_gives_the_adapted_values_with_their_gradient(case: Case, dense):
    model = case.model()
    layer = model.get_base_model().layer
    expected, own = layer.stored_weight(["default"]), adapters(model)
    of_weight = torch.autograd.grad(expected.square().sum(), own, allow_unused=True)  # a bias has no part in it
    dense.clear()
    used = layer.weight + 0
    assert len(dense) == 1
    assert type(used) is torch.Tensor and used.shape == layer.base_layer.weight.shape
    assert_close(used, expected)
    assert not torch.allclose(used, layer.base_layer.weight)
    used.square().sum().backward()
    assert any(grad is not None for grad in of_weight)
    for parameter, grad in zip(own, of_weight):
        assert_close(parameter.grad, grad) if grad is not None else None
        assert grad is None or not grad.numel() or grad.abs().max() > 0


@pytest.mark.parametrize("case", cases(KINDS, weights=False))
def test_using_a_weight_that_there_is_not_raises_in_words(case: Case):
    """And never gives the base's, which would be another map."""
    model = case.model()
    layer = model.get_base_model().layer
    with pytest.raises(MergeError, match="no weight can hold"):
        layer.weight + 0
    with model.disable_adapter():
        assert torch.equal(layer.weight + 0, layer.base_layer.weight)


@pytest.mark.parametrize("case", cases(("linear",), options=False, weights=True))
def test_many_ways_of_using_it(case: Case):
    layer = case.model().get_base_model().layer
    expected = layer.stored_weight(["default"])
    x = torch.randn(3, 12)
    assert_close(nn.functional.linear(x, layer.weight, layer.bias), layer(x), rtol=1e-4, atol=1e-5)
    assert_close(x @ layer.weight.T, x @ expected.T)
    assert_close(layer.weight.t().contiguous(), expected.T)
    assert_close(layer.weight[2:4], expected[2:4])
    assert_close(torch.cat([layer.weight, layer.weight]), torch.cat([expected, expected]))
    assert_close(layer.weight.to(torch.float64), expected.double())
    assert_close(layer.weight.detach(), expected.detach())
    assert_close(layer.weight.float().norm(), expected.norm())
    assert_close(layer.weight.data + 0, expected.detach())
    assert layer.weight.tolist() == expected.tolist()


@pytest.mark.parametrize("case", cases(KINDS, options=False))
def test_writing_into_it_is_refused(case: Case):
    layer = case.model().get_base_model().layer
    kept = layer.base_layer.weight.detach().clone()
    with torch.no_grad():
        for write in (
            lambda: layer.weight.add_(1),
            lambda: layer.weight.zero_(),
            lambda: layer.weight.copy_(kept + 1),
            lambda: nn.init.normal_(layer.weight),
            lambda: layer.weight.__setitem__(0, 0.0),
            lambda: layer.weight.data.mul_(2),
            lambda: torch.add(kept, 1, out=layer.weight),
        ):
            with pytest.raises(StateError, match="base_layer"):
                write()
    assert torch.equal(layer.base_layer.weight, kept)


@pytest.mark.parametrize("case", cases(KINDS, options=False, weights=True))
def test_without_active_adapters_it_is_the_stored_parameter(case: Case):
    model = case.model()
    layer = model.get_base_model().layer
    stored = layer.base_layer.weight
    assert layer.weight is not stored
    with model.disable_adapter():
        assert layer.weight is stored
    model.base_model.merge_adapter()
    assert layer.weight is layer.base_layer.weight
    model.base_model.unmerge_adapter()
    model.disable_adapter_layers()
    assert layer.weight is stored


@pytest.mark.parametrize("case", cases(("linear",), options=False))
def test_assigning_a_weight_reaches_the_base_layer(case: Case):
    """As tying and resizing do."""
    layer = case.model().get_base_model().layer
    new = nn.Parameter(torch.randn(8, 12))
    layer.weight = new
    assert layer.base_layer.weight is new


@pytest.mark.parametrize("case", cases(("linear",), options=False, weights=True))
def test_a_tied_reader_sees_the_adapted_weight(case: Case):
    """A head that reads the weight of an adapted layer, as some models tie their heads."""
    model = case.model()
    layer, x = model.get_base_model().layer, torch.randn(3, 12)
    head = lambda x: nn.functional.linear(x, layer.weight, layer.bias)
    assert_close(head(x), layer(x), rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(head(x), layer(x))
