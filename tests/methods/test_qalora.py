"""QA-LoRA against arXiv 2309.14717, algorithm 1: A reads the pooled groups of x."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from deltatune import LoraConfig, get_peft_model
from deltatune.errors import ConfigError


def adapted(layer: nn.Module, **options):
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["layer"], use_qalora=True, **{"r": 2, "lora_alpha": 6, **options})
    model = get_peft_model(nn.ModuleDict({"layer": layer.double()}), config).double()
    wrapper = model.get_base_model()["layer"]
    lora = wrapper.adapters["default"]
    for parameter in lora.parameters():
        nn.init.normal_(parameter)
    return wrapper.eval(), lora


@pytest.mark.parametrize("layer", [nn.Linear(12, 4), Conv1D(4, 12)])
def test_a_reads_sums_over_groups_of_inputs(layer):
    """y = W x + s B A (D_in / L) avg_pool(x): as PEFT, whose files do not tell it."""
    wrapper, lora = adapted(layer, qalora_group_size=3)
    A, B = lora.lora_A.weight, lora.lora_B.weight
    assert A.shape == (2, 4) and B.shape == (4, 2)
    x = torch.randn(5, 12, dtype=torch.float64)
    pooled = torch.stack([x[:, 3 * j : 3 * j + 3].mean(dim=1) for j in range(4)], dim=1) * 4
    assert_close(wrapper(x), wrapper.base_layer(x) + 3 * pooled @ A.T @ B.T)


def test_its_weight_moves_by_the_same_in_all_inputs_of_a_group():
    """So that it merges into the zero points of a quantised layer, the paper's point."""
    wrapper, _ = adapted(nn.Linear(12, 4), qalora_group_size=4)
    delta = wrapper.get_delta_weight("default").unflatten(1, (3, 4))
    assert_close(delta, delta[..., :1].expand_as(delta))
    assert delta.abs().min() > 0


def test_a_starts_as_a_linear_layer_of_the_pooled_width():
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["layer"], use_qalora=True, qalora_group_size=16, r=50)
    layer = get_peft_model(nn.ModuleDict({"layer": nn.Linear(6400, 60)}), config).get_base_model()["layer"]
    A = layer.adapters["default"].lora_A.weight
    assert A.abs().max() <= 400**-0.5 and A.std().item() == pytest.approx(400**-0.5 / 3**0.5, rel=0.03)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match=r"qalora_group_size=5 does not divide the 12 inputs of layer.* is 4"):
        adapted(nn.Linear(12, 4), qalora_group_size=5)
    with pytest.raises(ConfigError, match=r"use_qalora is for linear layers, and layer is one of kind 'embedding'"):
        adapted(nn.Embedding(12, 4), qalora_group_size=2)
    with pytest.raises(ConfigError, match="qalora_group_size=0"):
        LoraConfig(use_qalora=True, qalora_group_size=0)
