"""VeLoRA against arXiv 2405.17991: forward is exact; the gradient of A sees groups of x projected onto one vector."""

import itertools

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from deltatune import LoraConfig, VeloraConfig, get_peft_model
from deltatune.errors import ConfigError


def adapted(width: int = 12, **options):
    torch.manual_seed(0)
    more = {name: options.pop(name) for name in ("lora_dropout", "use_dora") if name in options}
    velora = VeloraConfig(**{"num_groups": 4, **options})
    config = LoraConfig(target_modules=["layer"], r=2, lora_alpha=6, velora_config=velora, **more)
    model = get_peft_model(nn.ModuleDict({"layer": nn.Linear(width, 5).double()}), config).double()
    wrapper = model.get_base_model()["layer"]
    lora = wrapper.adapters["default"]
    for parameter in lora.parameters():
        nn.init.normal_(parameter)
    return wrapper.train(), lora


def projected(x: torch.Tensor, v: torch.Tensor, groups: int) -> torch.Tensor:
    """Every group of every row replaced by its projection onto v."""
    size = len(v)
    wide = nn.functional.pad(x, (0, groups * size - x.shape[-1]))
    rows = [torch.cat([(part @ v) * v for part in row.split(size)]) for row in wide.flatten(0, -2)]
    return torch.stack(rows)[:, : x.shape[-1]]


@pytest.mark.parametrize("width", [12, 11])  # one that the groups do not divide
def test_the_gradient_of_a_sees_projections_and_everything_else_is_exact(width):
    wrapper, lora = adapted(width, scale=1.5)
    x = torch.randn(3, 7, width, dtype=torch.float64, requires_grad=True)
    A, B = lora.lora_A.weight, lora.lora_B.weight
    out = wrapper(x)
    assert_close(out, wrapper.base_layer(x) + 3 * x @ A.T @ B.T)
    grad = torch.randn_like(out)
    of_x, of_A, of_B = torch.autograd.grad(out, [x, A, B], grad)
    assert_close(of_x, grad @ (wrapper.base_layer.weight + 3 * B @ A))
    assert_close(of_B, 3 * grad.flatten(0, 1).T @ (x @ A.T).flatten(0, 1))
    v = lora.lora_velora_embed
    mean = nn.functional.pad(x, (0, 12 - width)).detach().reshape(-1, 3).mean(dim=0)
    assert_close(v, mean / mean.norm())
    assert_close(of_A, 1.5 * (3 * grad @ B).flatten(0, 1).T @ projected(x, v, 4))


def test_groups_of_one_number_are_exact():
    wrapper, lora = adapted(num_groups=12, init_type="random")
    lora.lora_velora_embed.fill_(-1.0)
    x = torch.randn(4, 12, dtype=torch.float64)
    got = torch.autograd.grad(wrapper(x).square().sum(), lora.lora_A.weight)[0]
    wrapper.eval()
    assert_close(got, torch.autograd.grad(wrapper(x).square().sum(), lora.lora_A.weight)[0])


def test_only_the_projections_are_kept_for_the_gradient():
    wrapper, _ = adapted(use_dora=False)
    x = torch.randn(50, 12, dtype=torch.float64)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        wrapper(x)
    assert not any(t.shape == x.shape for t in kept) and any(t.shape == (50, 4) for t in kept)
    wrapper.eval()
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        wrapper(x)
    assert any(t.shape == x.shape for t in kept), "plain LoRA keeps its input"


@pytest.mark.parametrize("kind,changes", [("batch_average", 2), ("batch_average_once", 1), ("random", 0)])
def test_v_comes_from_every_batch_or_the_first_or_none(kind, changes):
    wrapper, lora = adapted(init_type=kind)
    seen = [lora.lora_velora_embed.clone()]
    for _ in range(2):
        wrapper(torch.randn(4, 12, dtype=torch.float64) + 1)
        seen.append(lora.lora_velora_embed.clone())
    assert sum(not torch.equal(one, other) for one, other in itertools.pairwise(seen)) == changes
    assert lora.lora_velora_embed.norm().item() == pytest.approx(1)
    before = lora.lora_velora_embed.clone()
    wrapper.eval()(torch.randn(4, 12, dtype=torch.float64))
    with torch.no_grad():
        wrapper.train()(torch.randn(4, 12, dtype=torch.float64))
    assert torch.equal(lora.lora_velora_embed, before), "outside of training it stays"


def test_a_batch_of_zeros_gives_a_direction_all_the_same():
    wrapper, lora = adapted()
    wrapper(torch.zeros(4, 12, dtype=torch.float64)).sum().backward()
    assert_close(lora.lora_velora_embed, torch.full((3,), 3**-0.5, dtype=torch.float64))


def test_under_autocast_and_with_dropout_and_dora():
    wrapper, lora = adapted(lora_dropout=0.2, use_dora=True)
    wrapper.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wrapper(torch.randn(4, 3, 12)).float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in lora.parameters())


def test_wrong_values_and_layers_are_refused():
    for field, value in [("num_groups", 0), ("scale", 0), ("init_type", "mean")]:
        with pytest.raises(ConfigError, match=f"VeloraConfig: {field}="):
            VeloraConfig(**{field: value})
    with pytest.raises(ConfigError, match="velora_config is for linear layers, and layer is one of kind 'conv'"):
        config = LoraConfig(velora_config={}, target_modules=["layer"], r=2)
        get_peft_model(nn.ModuleDict({"layer": nn.Conv1d(4, 4, 2)}), config)
