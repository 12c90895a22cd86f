"""One graph, and the right numbers after every change of what is active."""

import pytest
import torch
from torch.testing import assert_close

from tests.laws.examples import Case, cases, move

KINDS = ("linear", "embedding", "conv2d-circular", "norm")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("case", cases(KINDS, options=False))
def test_a_compiled_layer_is_one_graph_and_follows_the_standing_choice(case: Case):
    model = case.model()
    model.add_adapter("other", case.config())
    move(model, name="other")
    layer, x = model.get_base_model().layer, case.batch()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")

    def agree():
        assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)
        return compiled(x)

    first = agree()
    model.disable_adapter_layers()
    assert torch.equal(agree(), layer.base_layer(x))
    model.enable_adapter_layers()
    assert torch.equal(agree(), first) and not torch.equal(first, layer.base_layer(x))
    model.set_adapter("other")
    assert not torch.allclose(agree(), first)
    model.set_adapter(["default", "other"])
    agree()


@pytest.mark.parametrize("case", cases(("linear",), options=False))
def test_a_compiled_model_follows_the_choice_of_a_call(case: Case):
    model = case.model()
    model.add_adapter("other", case.config())
    move(model, name="other")
    layer, x = model.get_base_model().layer, case.batch(2)
    compiled = torch.compile(model, backend="aot_eager")
    first = compiled(x)
    with model.disable_adapter():
        assert torch.equal(compiled(x), layer.base_layer(x))
    assert torch.equal(compiled(x), first)
    rows = ["default", "other"]
    assert_close(compiled(x, adapter_names=rows), model(x, adapter_names=rows), rtol=1e-5, atol=1e-5)
    assert torch.equal(compiled(x), first)


@pytest.mark.parametrize("case", cases(("linear",), options=False))
def test_gradients_of_a_compiled_model(case: Case):
    model = case.model()
    x = case.batch()
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    torch.compile(model, backend="aot_eager")(x).square().sum().backward()
    for grad, other in zip(expected, [p.grad for p in model.parameters() if p.requires_grad]):
        assert_close(grad, other, rtol=1e-5, atol=1e-6)
