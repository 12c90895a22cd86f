"""A half-precision base under float32 adapters: what is kept for the backward pass, and what the gradients lose by it.

With u = 2^-8, half a unit in the last place of bfloat16, every rounding of a tensor t is off by at most u |t|, and sums
are taken in float32. Of h = x A^T, m = h B^T, y = s m with an upstream gradient g:

    dB = (s g)^T h     s g, A, h and dB itself are rounded          |error| <= 4 u s |g|^T |x| |A|^T
    dA = (s g B)^T x   s g, B, their product and dA are rounded     |error| <= 4 u s (|g| |B|)^T |x|

up to terms in u^2, for which the bound below has a fifth u.
"""

import copy

import peft
import pytest
import torch
from torch import Tensor, nn

import deltatune
from tests.core.tiny import tiny

U = 2.0**-8
S = 3.0


class Holder(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def both() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    layer = nn.Linear(96, 160).to(torch.bfloat16)
    models = []
    for library in (deltatune, peft):
        config = library.LoraConfig(r=4, lora_alpha=4 * S, target_modules=["layer"])
        models.append(library.get_peft_model(Holder(copy.deepcopy(layer)), config))
    tensors = {key: torch.randn_like(t) / 8 for key, t in deltatune.get_peft_model_state_dict(models[0]).items()}
    deltatune.set_peft_model_state_dict(models[0], tensors)
    peft.set_peft_model_state_dict(models[1], tensors)
    return models[0], models[1]


def gradients(model: nn.Module, x: Tensor, g: Tensor) -> list[Tensor]:
    model(x).backward(g)
    trained = [p for name, p in sorted(model.named_parameters()) if p.requires_grad]
    assert [p.dtype for p in trained] == [torch.float32] * 2
    return [p.grad.double() for p in trained]


def test_gradients_are_within_the_derived_bound_of_exact_ones_and_of_the_peers():
    ours, theirs = both()
    x, g = torch.randn(64, 96).bfloat16(), torch.randn(64, 160).bfloat16()
    A, B = (p.detach().double() for name, p in sorted(ours.named_parameters()) if p.requires_grad)
    X, G = x.double(), g.double()
    exact = [S * (G @ B).T @ X, S * G.T @ (X @ A.T)]
    bounds = [5 * U * S * (G.abs() @ B.abs()).T @ X.abs(), 5 * U * S * G.abs().T @ (X.abs() @ A.abs().T)]
    for found, other, true, bound in zip(gradients(ours, x, g), gradients(theirs, x, g), exact, bounds):
        assert ((found - true).abs() <= bound).all()
        assert ((found - other).abs() <= bound).all()
        assert (found - true).norm() <= 2 * U * true.norm()  # roundings of many terms cancel


def kept_bytes(model: nn.Module, *args, **kwargs) -> int:
    """What the forward pass keeps for the backward pass beside parameters and buffers, each storage once."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    found: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(*args, **kwargs)
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


def test_of_the_input_no_second_copy_is_kept():
    ours, theirs = both()
    x = torch.randn(512, 96).bfloat16().requires_grad_()
    inputs, ranks, factors = 512 * 96 * 2, 512 * 4 * 2, (96 + 160) * 4 * 2
    assert kept_bytes(ours, x) <= inputs + ranks + factors
    assert kept_bytes(theirs, x) >= 2 * inputs


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
def test_a_whole_model_keeps_less_than_under_the_peer(targets):
    base = tiny("llama").to(torch.bfloat16).train()
    ids = torch.arange(128)[None].expand(4, -1) % 16
    sizes = []
    for library in (deltatune, peft):
        config = library.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
        sizes.append(kept_bytes(library.get_peft_model(copy.deepcopy(base), config), input_ids=ids, use_cache=False))
    assert sizes[0] < 0.95 * sizes[1]
