"""Norms and other modules of one weight, as a base that adapters may change."""

import threading

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from deltatune import BitFitConfig, LoraConfig, get_peft_model
from deltatune.bases import as_map
from deltatune.errors import TargetError
from tests.laws.examples import Holder, move

KINDS = {
    "layer norm": (lambda: nn.LayerNorm(6), (3, 6)),
    "layer norm without bias": (lambda: nn.LayerNorm((4, 6), bias=False), (3, 4, 6)),
    "rms norm": (lambda: nn.RMSNorm(6), (3, 6)),
    "llama's": (lambda: LlamaRMSNorm(6), (3, 6)),
    "group norm": (lambda: nn.GroupNorm(2, 6), (3, 6, 5)),
    "transposed convolution": (lambda: nn.ConvTranspose1d(4, 6, 3), (3, 4, 5)),
    "prelu": (lambda: nn.PReLU(6), (3, 6)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_runs_with_another_weight_as_if_it_had_it(kind):
    torch.manual_seed(0)
    make, shape = KINDS[kind]
    module, x = make(), torch.randn(shape)
    layer = as_map(module)
    assert layer.kind == "module" and layer.matrix(module.weight).shape == (layer.out_features, layer.in_features)
    assert torch.equal(layer.apply(x, layer.weight, layer.bias), module(x))
    other = make()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
    before = {name: p.clone() for name, p in module.named_parameters()}
    bias = getattr(other, "bias", None)
    assert torch.equal(layer.apply(x, layer.matrix(other.weight), bias), other(x))
    assert torch.equal(layer.store(layer.matrix(other.weight)), other.weight)
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())


class Counting(nn.Module):
    """What it is called with depends on more than its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("steps", torch.zeros(()))


@pytest.mark.parametrize(
    "module",
    [
        *(nn.BatchNorm1d(4), Counting(), nn.LayerNorm(4, elementwise_affine=False), nn.Sequential(nn.LayerNorm(4))),
        *(nn.Tanh(), nn.LSTM(3, 3), nn.Embedding(5, 3, max_norm=1.0)),
    ],
    ids=lambda module: type(module).__name__,
)
def test_modules_with_a_state_with_parts_or_without_a_weight_are_none(module):
    assert as_map(module) is None


def test_methods_of_matrices_refuse_it():
    with pytest.raises(TargetError, match=r"LayerNorm.*LoRA cannot adapt.*linear"):
        get_peft_model(Holder(nn.LayerNorm(4)), LoraConfig(target_modules=["layer"]))


def test_threads_with_and_without_the_adapter_do_not_meet():
    """The module is not changed while it is called."""
    torch.manual_seed(0)
    model = get_peft_model(Holder(nn.LayerNorm(4)).eval(), BitFitConfig(target_modules=["layer"]))
    move(model)
    x = torch.randn(2, 4)
    with torch.no_grad():
        adapted = model(x)
        with model.disable_adapter():
            base = model(x)
    wrong = []

    def call(disabled: bool) -> None:
        with torch.no_grad():
            for _ in range(300):
                if disabled:
                    with model.disable_adapter():
                        wrong.append(not torch.equal(model(x), base))
                else:
                    wrong.append(not torch.equal(model(x), adapted))

    threads = [threading.Thread(target=call, args=(index % 2 == 0,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 1200 and not any(wrong) and not torch.equal(base, adapted)


def test_hooks_of_the_module_run():
    torch.manual_seed(0)
    norm, seen = nn.LayerNorm(4), []
    norm.register_forward_hook(lambda module, args, output: seen.append(output))
    model = get_peft_model(Holder(norm), BitFitConfig(target_modules=["layer"]))
    x = torch.randn(2, 4)
    assert_close(model(x), seen[0])
    assert len(seen) == 1
