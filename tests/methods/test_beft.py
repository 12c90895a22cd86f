"""BEFT against arXiv 2509.15974, section 3: the bias of the value projection is trained, b' = b + d."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from deltatune import BeftConfig, get_peft_model
from deltatune.errors import MergeError, TargetError


def adapted(layer: nn.Module, shake: bool = True, **options):
    torch.manual_seed(0)
    model = get_peft_model(nn.ModuleDict({"layer": layer}).double(), BeftConfig(target_modules=["layer"], **options))
    wrapper = model.get_base_model()["layer"]
    beft = wrapper.adapters["default"]
    if shake:
        nn.init.normal_(beft.beft_bias)
    return model, wrapper, beft.beft_bias


@pytest.mark.parametrize("bias", [True, False])
def test_the_output_is_shifted_by_one_number_per_feature(bias):
    _, wrapper, d = adapted(nn.Linear(8, 5, bias=bias))
    assert d.shape == (1, 5)
    x, base = torch.randn(7, 8, dtype=torch.float64), wrapper.base_layer
    for row, out in zip(x, wrapper(x)):
        for k in range(5):
            expected = base.weight[k] @ row + d[0, k] + (base.bias[k] if bias else 0)
            assert_close(out[k], expected)


def test_of_a_convolution_each_channel_is_shifted():
    _, wrapper, d = adapted(nn.Conv2d(3, 5, 2))
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    assert_close(wrapper(x), wrapper.base_layer(x) + d.reshape(5, 1, 1))


def test_merging_puts_the_vector_into_the_bias_and_leaves_the_weight():
    model, wrapper, d = adapted(nn.Linear(8, 5))
    weight, bias = wrapper.base_layer.weight.detach().clone(), wrapper.base_layer.bias.detach().clone()
    model.base_model.merge_adapter()
    assert_close(wrapper.base_layer.bias, (bias + d[0]).detach())
    assert torch.equal(wrapper.base_layer.weight, weight)


def test_a_layer_without_bias_refuses_to_merge_and_stays():
    model, wrapper, d = adapted(nn.Linear(8, 5, bias=False))
    with pytest.raises(MergeError, match="bias"):
        model.base_model.merge_adapter()
    x = torch.randn(3, 8, dtype=torch.float64)
    assert not wrapper.merged and wrapper.base_layer.bias is None
    assert_close(wrapper(x), x @ wrapper.base_layer.weight.T + d)


def test_it_trains_one_number_per_output_and_starts_at_zero():
    model, wrapper, d = adapted(nn.Linear(8, 5), shake=False)
    assert model.get_nb_trainable_parameters()[0] == 5 and not d.any()
    x = torch.randn(3, 8, dtype=torch.float64)
    wrapper(x).sum().backward()
    assert_close(d.grad, torch.full((1, 5), 3.0, dtype=torch.float64))
    _, _, d = adapted(nn.Linear(8, 5), shake=False, init_weights=False)
    assert d.all()


def test_an_embedding_has_no_bias_and_is_refused():
    with pytest.raises(TargetError, match="Embedding"):
        adapted(nn.Embedding(8, 5))
