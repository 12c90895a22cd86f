"""GLoRA against arXiv 2306.07967, equation (10): f(x) = (W + W o A + B) x + C W + D b + E + b."""

import itertools

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from deltatune import GloraConfig, get_peft_model
from deltatune.errors import ConfigError


def adapted(layer: nn.Module, shake: bool = True, **options):
    torch.manual_seed(0)
    model = get_peft_model(
        nn.ModuleDict({"layer": layer}).double(), GloraConfig(**{"target_modules": ["layer"], "r": 2, **options})
    )
    wrapper = model.get_base_model()["layer"]
    glora = wrapper.adapters["default"]
    if shake:
        for parameter in glora.parameters():
            nn.init.normal_(parameter)
    return model, wrapper, glora


def entry(support: nn.Module | None, *place: int) -> torch.Tensor | float:
    """One entry of a support as the paper's table reads it."""
    if support is None:
        return 0.0
    if hasattr(support, "Xd"):
        row, column = place
        return sum(support.Xd[row, k] * support.Xu[k, column] for k in range(2))
    return support.X[0] if support.X.shape == (1,) else support.X[place[0]].squeeze()


SUPPORTS = list(itertools.product(["lora", "vector", "constant", "none"], ["lora", "vector", "none"],
                                  ["vector", "constant", "none"]))[:-1]  # fmt: skip


@pytest.mark.parametrize("weights,coupling,biases", SUPPORTS)
def test_every_combination_of_supports_is_the_papers_equation(weights, coupling, biases):
    _, wrapper, glora = adapted(nn.Linear(5, 3), config_A_B=weights, config_C=coupling, config_D_E=biases)
    W, b = wrapper.base_layer.weight, wrapper.base_layer.bias
    x = torch.randn(4, 5, dtype=torch.float64)
    expected = torch.empty(4, 3, dtype=torch.float64)
    for row, o in itertools.product(range(4), range(3)):
        expected[row, o] = b[o] + entry(glora.glora_D, o) * b[o] + entry(glora.glora_E, o)
        for i in range(5):
            changed = W[o, i] + W[o, i] * entry(glora.glora_A, o, i) + entry(glora.glora_B, o, i)
            expected[row, o] += changed * x[row, i] + W[o, i] * entry(glora.glora_C, i, 0)
    assert_close(wrapper(x), expected)
    adapted_map = wrapper.as_map(["default"])
    assert_close(x @ adapted_map.weight.T + adapted_map.bias, expected)


@pytest.mark.parametrize("weights,count", [("lora", 2 * 2 * (5 + 3)), ("vector", 2 * 3), ("constant", 2), ("none", 0)])
def test_counts(weights, count):
    model, _, _ = adapted(nn.Linear(5, 3), config_A_B=weights, config_C="lora", config_D_E="constant")
    assert model.get_nb_trainable_parameters()[0] == count + 2 * (5 + 1) + 2
    model, _, _ = adapted(nn.Linear(5, 3), config_A_B=weights, config_C="vector", config_D_E="vector")
    assert model.get_nb_trainable_parameters()[0] == count + 5 + 2 * 3
    if count:  # without a bias there is nothing that C, D and E could change
        model, _, _ = adapted(nn.Linear(5, 3, bias=False), config_A_B=weights)
        assert model.get_nb_trainable_parameters()[0] == count


def test_it_starts_as_the_identity_unless_told_otherwise():
    x = torch.randn(4, 5, dtype=torch.float64)
    _, wrapper, _ = adapted(nn.Linear(5, 3), shake=False)
    assert torch.equal(wrapper(x), wrapper.base_layer(x))
    for weights in ("lora", "vector", "constant"):
        _, wrapper, glora = adapted(nn.Linear(5, 3), shake=False, config_A_B=weights, init_weights=False)
        assert not torch.allclose(wrapper(x), wrapper.base_layer(x))
        assert all(parameter.all() for parameter in glora.parameters())


def test_nothing_to_train_is_refused():
    with pytest.raises(ConfigError, match="config_A_B='none' leaves nothing"):
        adapted(nn.Linear(5, 3), config_A_B="none", config_C="none", config_D_E="none")
    with pytest.raises(ConfigError, match="layer, which has no bias"):
        adapted(nn.Linear(5, 3, bias=False), config_A_B="none")


@pytest.mark.parametrize("field", ["config_A_B", "config_C", "config_D_E"])
def test_an_unknown_support_is_refused_by_name(field):
    with pytest.raises(ConfigError, match=rf"{field}='LoRA' is not allowed, expected one of .*'vector'"):
        GloraConfig(**{field: "LoRA"})


def test_a_vector_keeps_the_forward_free_of_the_weight():
    """y = (1 + a) o W x: nothing of the size of W is remembered for the backward pass."""
    _, wrapper, _ = adapted(nn.Linear(64, 48), config_A_B="vector", config_C="none")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        wrapper(torch.randn(2, 64, dtype=torch.float64))
    assert saved and max(saved) < 64 * 48
