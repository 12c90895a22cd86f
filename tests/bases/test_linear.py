"""Plain linear layers: what is put on a layer by others still runs when layer and update are one operation."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from deltatune import LoraConfig, get_peft_model

HOOKS = ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook")


def adapted(layer: nn.Module):
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["layer"], r=2, init_lora_weights=False)
    return get_peft_model(nn.ModuleDict({"layer": layer}), config).get_base_model()["layer"]


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 4), lambda: Conv1D(4, 6)], ids=["linear", "transposed"])
def test_hooks_of_the_layer_run_and_change_nothing(make, hook):
    wrapper, x, called = adapted(make()), torch.randn(3, 6, requires_grad=True), []
    expected = wrapper(x)
    getattr(wrapper.base_layer, hook)(lambda *_: called.append(hook))
    found = wrapper(x)
    found.sum().backward()
    assert called == [hook]
    assert_close(found, expected)


def test_a_forward_that_was_put_on_the_layer_is_the_one_that_runs():
    wrapper, x = adapted(nn.Linear(6, 4)), torch.randn(3, 6)
    plain, expected = wrapper.base_layer(x), wrapper(x)
    wrapper.base_layer.forward = lambda x: nn.functional.linear(x, wrapper.base_layer.weight) + 1
    assert_close(wrapper(x), expected - plain + wrapper.base_layer(x))
