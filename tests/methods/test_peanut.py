"""PEANuT against arXiv 2410.01870, section 3: W' = W + s f(W), f a network with residuals over the columns of W."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from deltatune import LoraConfig, PeanutConfig, get_peft_model
from deltatune.errors import ConfigError


def adapted(layer: nn.Module, shake: bool = True, **options):
    torch.manual_seed(0)
    config = PeanutConfig(target_modules=["layer"], **{"r": 3, **options})
    wrapper = get_peft_model(nn.ModuleDict({"layer": layer}).double(), config).get_base_model()["layer"]
    peanut = wrapper.adapters["default"]
    if shake:
        for parameter in peanut.parameters():
            nn.init.normal_(parameter)
    return wrapper, peanut


def change(peanut, W: torch.Tensor, depth: int, scaling: float, act=torch.relu) -> torch.Tensor:
    """f over the rows of W^T, as the paper stacks its layers: act(W^T A), encoders, decoders with residuals, B."""
    tensors = {name: tensor.T for name, tensor in peanut.file_tensors().items()}  # as right factors
    kept = [act(W.T @ tensors["peanut_A.weight"])]
    for layer in range(depth):
        kept.append(act(kept[-1] @ tensors[f"peanut_encoders.{layer}.weight"]))
    z = kept[depth]
    for layer in range(depth):
        z = act(z @ tensors[f"peanut_decoders.{layer}.weight"]) + kept[depth - 1 - layer]
    return scaling * (z @ tensors["peanut_B.weight"]).T


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("act_fn,act", [("relu", torch.relu), ("tanh", torch.tanh), ("silu", nn.functional.silu)])
def test_the_summand_is_the_network_over_the_weight(depth, act_fn, act):
    wrapper, peanut = adapted(nn.Linear(8, 5), depth=depth, act_fn=act_fn, scaling=0.7)
    W = wrapper.base_layer.weight
    expected = W + change(peanut, W, depth, 0.7, act)
    assert_close(wrapper.stored_weight(["default"]), expected)
    x = torch.randn(7, 8, dtype=torch.float64)
    assert_close(wrapper(x), x @ expected.T + wrapper.base_layer.bias)


def test_the_number_that_trains_does_not_depend_on_the_inputs():
    for width in (8, 20):
        _, peanut = adapted(nn.Linear(width, 5), depth=2)
        assert sum(p.numel() for p in peanut.parameters()) == 2 * 5 * 3 + 2 * 2 * 3 * 3
    _, peanut = adapted(Conv1D(2304, 768), r=32)
    assert sum(p.numel() for p in peanut.parameters()) == 2 * 2304 * 32


def test_a_forward_builds_nothing_as_large_as_the_weight():
    wrapper, _ = adapted(nn.Linear(40, 30))
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            new = isinstance(out, torch.Tensor) and out.data_ptr() != wrapper.base_layer.weight.data_ptr()
            sizes.append(out.numel() if new else 0)
            return out

    with Sizes():
        wrapper(torch.randn(2, 40, dtype=torch.float64)).sum().backward()
    assert 0 < max(sizes) < 40 * 30


def test_conv1d_of_gpt2_is_seen_as_out_by_in():
    wrapper, peanut = adapted(Conv1D(4, 6), depth=1)
    W = wrapper.base_layer.weight.T
    x = torch.randn(2, 6, dtype=torch.float64)
    assert_close(wrapper(x), x @ (W + change(peanut, W, 1, 1.0)).T + wrapper.base_layer.bias)


class Scaled(nn.Embedding):
    """As word embeddings of BART and Gemma are."""

    embed_scale = 5.0

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale


@pytest.mark.parametrize("kind,factor", [(nn.Embedding, 1.0), (Scaled, 5.0)])
def test_of_an_embedding_only_the_columns_that_are_read_go_through_the_network(kind, factor):
    wrapper, peanut = adapted(kind(9, 6), depth=1)
    W = wrapper.base_layer.weight.T
    ids = torch.randint(9, (2, 3))
    seen = []
    inside = peanut.net
    peanut.net = lambda columns: seen.append(columns.shape) or inside(columns)
    assert_close(wrapper(ids), factor * (W + change(peanut, W, 1, 1.0)).T[ids])
    assert seen == [(6, 6)]


def test_on_another_adapter_the_weight_is_the_adapted_one():
    """Nothing is kept of the weight: it moves when the adapter below is trained."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 5)).double()
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["0"]), adapter_name="below")
    model.add_adapter("above", PeanutConfig(r=3, target_modules=["0"]))
    layer = model.get_base_model()[0]
    for parameter in layer.adapters.parameters():
        nn.init.normal_(parameter)
    model.base_model.set_adapter(["below", "above"])
    x = torch.randn(4, 8, dtype=torch.float64)
    for _ in range(2):
        W = layer.stored_weight(["below"])
        expected = W + change(layer.adapters["above"], W, 0, 1.0)
        assert_close(layer(x), x @ expected.T + layer.base_layer.bias)
        with torch.no_grad():
            layer.adapters["below"].lora_B.weight.mul_(2)


def test_starts():
    wrapper, peanut = adapted(nn.Linear(64, 40), shake=False, depth=1)
    assert torch.equal(wrapper.stored_weight(["default"]), wrapper.base_layer.weight)
    assert 0.8 / math.sqrt(40) < peanut.peanut_A.weight.abs().max() <= 1 / math.sqrt(40)
    assert peanut.peanut_encoders[0].weight.abs().max() <= 1 / math.sqrt(3)
    wrapper, _ = adapted(nn.Linear(8, 5), shake=False, init_weights=False)
    assert not torch.allclose(wrapper.stored_weight(["default"]), wrapper.base_layer.weight)


@pytest.mark.parametrize(
    "options", [{"r": 0}, {"depth": -1}, {"scaling": 0.0}, {"act_fn": "prelu"}, {"act_fn": "softplus"}], ids=str
)
def test_refused_options(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        PeanutConfig(**options)
