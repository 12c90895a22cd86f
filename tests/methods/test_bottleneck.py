"""Bottleneck adapters against arXiv 2110.04366, table 1: h <- h + s f(h W_down) W_up, or of the layer's input x."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from deltatune import BottleneckConfig, LoraConfig, get_peft_model
from deltatune.errors import ConfigError, TargetError
from tests.core.tiny import batch, logits, tiny


def adapted(layer: nn.Module, shake: bool = True, **options):
    torch.manual_seed(0)
    config = BottleneckConfig(target_modules=["layer"], **options)
    wrapper = get_peft_model(nn.ModuleDict({"layer": layer}).double(), config).get_base_model()["layer"]
    part = wrapper.adapters["default"]
    if shake:
        for parameter in part.parameters():
            nn.init.normal_(parameter)
    return wrapper, part


def vector(part, z: torch.Tensor, f) -> torch.Tensor:
    """s f(z W_down + b) W_up + s c for one vector, entry by entry."""
    D, b, U, c = part.adapter_down.weight, part.adapter_down.bias, part.adapter_up.weight, part.adapter_up.bias
    narrow = [f(sum(D[i, j] * z[j] for j in range(len(z))) + b[i]) for i in range(len(D))]
    return torch.stack([sum(U[k, i] * narrow[i] for i in range(len(D))) + c[k] for k in range(len(U))])


BENT = {
    "relu": lambda z: z * (z > 0),
    "gelu": lambda z: z * (1 + torch.erf(z / math.sqrt(2))) / 2,
    "swish": lambda z: z / (1 + torch.exp(-z)),
    "tanh": lambda z: (torch.exp(z) - torch.exp(-z)) / (torch.exp(z) + torch.exp(-z)),
}


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("bend", BENT)
def test_it_is_the_equation_of_the_paper(bend, parallel):
    wrapper, part = adapted(nn.Linear(7, 5), size=3, non_linearity=bend, parallel=parallel, scaling=0.5)
    x = torch.randn(4, 7, dtype=torch.float64)
    h = wrapper.base_layer(x)
    expected = torch.stack([row + 0.5 * vector(part, z, BENT[bend]) for row, z in zip(h, x if parallel else h)])
    assert_close(wrapper(x), expected)


@pytest.mark.parametrize("parallel", [False, True])
def test_on_a_convolution_it_bends_the_channels_at_every_place(parallel):
    wrapper, part = adapted(nn.Conv2d(3, 5, 2), size=4, parallel=parallel)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    h = wrapper.base_layer(x)
    out = wrapper(x)
    for row, i, j in ((0, 0, 0), (1, 2, 1)):
        z = x[row, :, i : i + 2, j : j + 2].flatten() if parallel else h[row, :, i, j]
        assert_close(out[row, :, i, j], h[row, :, i, j] + vector(flat(part), z, BENT["gelu"]))


def flat(part):
    """With the kernel positions of the down-projection in one axis with its channels."""
    part.adapter_down.weight = nn.Parameter(part.adapter_down.weight.flatten(1))
    return part


@pytest.mark.parametrize("parallel", [False, True])
def test_on_an_embedding(parallel):
    wrapper, part = adapted(nn.Embedding(9, 5), size=4, parallel=parallel)
    ids = torch.tensor([3, 8, 3])
    h = wrapper.base_layer(ids)
    z = torch.eye(9, dtype=torch.float64)[ids] if parallel else h
    assert_close(wrapper(ids), torch.stack([a + vector(part, b, BENT["gelu"]) for a, b in zip(h, z)]))


def test_a_bottleneck_starts_at_zero_change_and_trains_so_many_numbers():
    wrapper, part = adapted(nn.Linear(7, 5), shake=False, size=3)
    x = torch.randn(4, 7, dtype=torch.float64)
    assert torch.equal(wrapper(x), wrapper.base_layer(x)) and part.adapter_down.weight.abs().min() > 0
    assert sum(p.numel() for p in part.parameters()) == 3 * 5 + 3 + 5 * 3 + 5
    _, part = adapted(nn.Linear(7, 5), size=3, parallel=True)
    assert sum(p.numel() for p in part.parameters()) == 3 * 7 + 3 + 5 * 3 + 5
    wrapper, _ = adapted(nn.Linear(7, 5), shake=False, size=3, init_weights=False)
    assert not torch.allclose(wrapper(x), wrapper.base_layer(x))


@pytest.mark.parametrize("factor,out,size", [(2, 12, 6), (16, 40, 2), (16, 8, 1), (0.5, 8, 16)])
def test_the_reduction_factor_gives_the_width(factor, out, size):
    _, part = adapted(nn.Linear(7, out), reduction_factor=factor)
    assert part.adapter_down.weight.shape == (size, out)


PLACES = {
    ("houlsby", "llama"): {"self_attn.o_proj", "mlp.down_proj"},
    ("pfeiffer", "llama"): {"mlp.down_proj"},
    ("parallel", "llama"): {"mlp"},
    ("houlsby", "bert"): {"attention.output.dense", "layer.0.output.dense", "layer.1.output.dense"},
    ("pfeiffer", "bert"): {"layer.0.output.dense", "layer.1.output.dense"},
    ("houlsby", "gpt2"): {"attn.c_proj", "mlp.c_proj"},
    ("parallel", "t5"): {"layer.1.DenseReluDense", "layer.2.DenseReluDense"},
    ("pfeiffer", "bart"): {"fc2"},
}


@pytest.mark.parametrize("preset,arch", PLACES)
def test_each_preset_has_its_places_in_an_architecture(preset, arch):
    model = get_peft_model(tiny(arch), BottleneckConfig(preset=preset))
    paths, wanted = model.base_model.targeted_module_names, PLACES[preset, arch]
    assert paths and all(any(path.endswith(name) for name in wanted) for path in paths)
    assert all(any(path.endswith(name) for path in paths) for name in wanted)
    config = model.peft_config["default"]
    expected = {"houlsby": (False, 16, "gelu", 1), "pfeiffer": (False, 16, "relu", 1), "parallel": (True, 2, "relu", 4)}
    assert (config.parallel, config.reduction_factor, config.non_linearity, config.scaling) == expected[preset]


def test_the_parallel_adapter_reads_the_input_of_a_whole_feed_forward_block():
    model, inputs = get_peft_model(tiny("llama"), BottleneckConfig(preset="parallel")).eval(), batch("llama")
    torch.manual_seed(1)
    parts = [layer.mlp.adapters["default"] for layer in model.get_base_model().model.layers]
    for part in parts:
        nn.init.normal_(part.adapter_up.weight, std=0.1)
    bare = tiny("llama")
    for layer, part in zip(bare.model.layers, parts):
        layer.mlp.register_forward_hook(
            lambda module, args, y, part=part: (
                y
                + 4
                * torch.relu(args[0] @ part.adapter_down.weight.T + part.adapter_down.bias)
                @ part.adapter_up.weight.T
            )
        )
    assert_close(logits(model, inputs), logits(bare, inputs), rtol=1e-5, atol=1e-5)


def test_a_changed_weight_below_it_changes_what_it_reads():
    model = get_peft_model(
        nn.ModuleDict({"layer": nn.Linear(7, 5)}).double(), LoraConfig(r=2, target_modules=["layer"])
    )
    model.add_adapter("b", BottleneckConfig(size=3, target_modules=["layer"]))
    layer = model.get_base_model()["layer"]
    for parameter in layer.adapters.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(4, 7, dtype=torch.float64)
    h = x @ layer.stored_weight(["default"]).T + layer.base_layer.bias
    expected = torch.stack([row + vector(layer.adapters["b"], row, BENT["gelu"]) for row in h])
    for names in (["default", "b"], ["b", "default"]):
        model.set_adapter(names)
        assert_close(layer(x), expected)


def test_dropout_acts_on_the_bottleneck_in_training_only():
    wrapper, _ = adapted(nn.Linear(7, 5), size=64, dropout=0.5)
    x = torch.randn(1, 7, dtype=torch.float64)
    wrapper.eval()
    assert torch.equal(wrapper(x), wrapper(x))
    wrapper.train()
    assert not torch.allclose(wrapper(x), wrapper(x))


def test_what_makes_no_sense_is_refused():
    for options in ({"preset": "none"}, {"non_linearity": "step"}, {"size": 0}, {"size": 2, "reduction_factor": 2.0}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            BottleneckConfig(**options)
    with pytest.raises(TargetError, match="no usual target_modules"):
        get_peft_model(tiny("bert"), BottleneckConfig(preset="parallel"))  # BERT has no feed-forward block
