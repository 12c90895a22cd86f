"""BD-LoRA against arXiv 2510.23346: A or B is block-diagonal, the blocks stored one below the other."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from deltatune import BdLoraConfig, LoraConfig, get_peft_model
from deltatune.errors import ConfigError


def adapted(layer: nn.Module | None = None, **options):
    torch.manual_seed(0)
    layer = nn.Linear(8, 6) if layer is None else layer
    more = {
        name: options.pop(name) for name in ("use_qalora", "qalora_group_size", "init_lora_weights") if name in options
    }
    bd = BdLoraConfig(**{"nblocks": 2, **options})
    config = LoraConfig(target_modules=["layer"], r=4, lora_alpha=12, use_bdlora=bd, **more)
    model = get_peft_model(nn.ModuleDict({"layer": layer.double()}), config).double()
    wrapper = model.get_base_model()["layer"]
    lora = wrapper.adapters["default"]
    for parameter in lora.parameters():
        nn.init.normal_(parameter)
    return wrapper.eval(), lora


def test_with_blocks_in_a_each_shard_of_the_input_has_its_own_ranks():
    wrapper, lora = adapted(target_modules_bd_a=["layer"])
    A, B = lora.lora_A.weight, lora.lora_B.weight
    assert A.shape == (4, 4) and B.shape == (6, 4)
    x = torch.randn(5, 8, dtype=torch.float64)
    h = torch.cat([x[:, :4] @ A[:2].T, x[:, 4:] @ A[2:].T], dim=1)
    assert_close(wrapper(x), wrapper.base_layer(x) + 3 * h @ B.T)


def test_with_blocks_in_b_each_shard_of_the_output_has_its_own_ranks():
    wrapper, lora = adapted(target_modules_bd_b=["lay"])
    A, B = lora.lora_A.weight, lora.lora_B.weight
    assert A.shape == (4, 8) and B.shape == (6, 2)
    x = torch.randn(5, 8, dtype=torch.float64)
    h = x @ A.T
    update = torch.cat([h[:, :2] @ B[:3].T, h[:, 2:] @ B[3:].T], dim=1)
    assert_close(wrapper(x), wrapper.base_layer(x) + 3 * update)


def test_the_blocks_may_read_pooled_groups():
    wrapper, lora = adapted(target_modules_bd_a=["layer"], use_qalora=True, qalora_group_size=2)
    A, B = lora.lora_A.weight, lora.lora_B.weight
    assert A.shape == (4, 2)
    x = torch.randn(5, 8, dtype=torch.float64)
    pooled = x.unflatten(1, (4, 2)).mean(dim=2) * 4
    h = torch.cat([pooled[:, :2] @ A[:2].T, pooled[:, 2:] @ A[2:].T], dim=1)
    assert_close(wrapper(x), wrapper.base_layer(x) + 3 * h @ B.T)


def test_layers_that_neither_list_names_are_plain_or_an_error():
    _, lora = adapted(target_modules_bd_a=["other"], match_strict=False)
    assert lora.lora_A.weight.shape == (4, 8) and lora.lora_B.weight.shape == (6, 4)
    with pytest.raises(ConfigError, match=r"neither .* names layer.*match_strict=False"):
        adapted(target_modules_bd_a=["other"])
    with pytest.raises(ConfigError, match="both target_modules_bd_a and target_modules_bd_b name layer"):
        adapted(target_modules_bd_a=["layer"], target_modules_bd_b=["lay"])


def test_what_does_not_fit_is_refused():
    for options, word in [
        ({"target_modules_bd_a": ["layer"], "nblocks": 3}, r"rank \(4\) of layer"),
        ({"target_modules_bd_b": ["layer"], "nblocks": 4}, r"outputs \(6\) of layer"),
        ({"target_modules_bd_a": ["layer"], "nblocks": 0}, "nblocks=0"),
        ({"target_modules_bd_a": ["a"], "target_modules_bd_b": ["a"]}, "target_modules_bd_b"),
        ({"target_modules_bd_a": "layer"}, "target_modules_bd_a"),
    ]:
        with pytest.raises(ConfigError, match=word):
            adapted(**options)
    with pytest.raises(ConfigError, match=r"use_bdlora has no 'nblock'; did you mean 'nblocks'"):
        LoraConfig(use_bdlora={"nblock": 2})
    with pytest.raises(ConfigError, match="use_bdlora=True"):
        LoraConfig(use_bdlora=True)
