"""Super-Tuning against arXiv 2607.09287: W' = W + M o D, M the mask of the largest |W|; Supra adds s B A."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

import deltatune
from deltatune import SupertuningConfig, get_peft_model
from deltatune.errors import ConfigError, MismatchError
from deltatune.factors import sparse_linear


def adapted(layer: nn.Module, shake: bool = True, **options):
    torch.manual_seed(0)
    config = SupertuningConfig(**{"target_modules": ["layer"], "sparsity": 0.8, **options})
    model = get_peft_model(nn.ModuleDict({"layer": layer}).double(), config)
    wrapper = model.get_base_model()["layer"]
    made = wrapper.adapters["default"]
    if shake:
        for parameter in made.parameters():
            nn.init.normal_(parameter)
    return model, wrapper, made


@pytest.mark.parametrize("top", [True, False])
@pytest.mark.parametrize("layer", [nn.Linear(10, 6), nn.Conv2d(5, 6, (2, 1)), nn.Embedding(10, 6)], ids=repr)
def test_only_the_largest_or_smallest_entries_change(layer, top):
    _, wrapper, made = adapted(layer, select_top=top)
    plain = wrapper.as_map()
    change = (wrapper.as_map(["default"]).weight - plain.weight).detach()
    order = plain.weight.abs().flatten().argsort(descending=top)
    count = int(60 * (1 - 0.8))
    assert made.supertuning_values.shape == (count,)
    assert_close(change.flatten()[order[:count]], made.supertuning_values.detach())
    assert not change.flatten()[order[count:]].any()


@pytest.mark.parametrize("r,alpha", [(None, None), (2, None), (2, 3.0)])
def test_the_forward_is_the_papers_equation(r, alpha):
    model, wrapper, made = adapted(nn.Linear(10, 6), r=r, lora_alpha=alpha)
    W = wrapper.base_layer.weight.detach()
    D = torch.zeros(6, 10, dtype=torch.float64)
    for place, value in zip(W.abs().flatten().argsort(descending=True), made.supertuning_values):
        D[place // 10, place % 10] = value.detach()
    if r:
        scale = (2 * r if alpha is None else alpha) / r
        D = D + scale * made.supertuning_lora_B.weight @ made.supertuning_lora_A.weight
    x = torch.randn(3, 4, 10, dtype=torch.float64)
    assert_close(wrapper(x), x @ (W + D).T + wrapper.base_layer.bias)
    count = 11 + (r or 0) * (10 + 6)  # int(60 * 0.2) is 11: 1 - 0.8 is a little less than 0.2, as in PEFT's files
    assert model.get_nb_trainable_parameters()[0] == count


def test_dropout_acts_on_the_factors_alone():
    _, wrapper, made = adapted(nn.Linear(10, 6), r=2, lora_dropout=0.5)
    x = torch.randn(400, 10, dtype=torch.float64)
    sure = wrapper.eval()(x)
    wrapper.train()
    assert not torch.allclose(wrapper(x), sure)
    nn.init.zeros_(made.supertuning_lora_B.weight)
    assert torch.equal(wrapper(x), wrapper.eval()(x))


@pytest.mark.parametrize("at_once", [1, 7, 1 << 22])
def test_the_sparse_product_and_its_gradients(at_once, monkeypatch):
    monkeypatch.setattr("deltatune.factors._AT_ONCE", at_once)
    torch.manual_seed(0)
    x, v = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    rows, columns = torch.tensor([0, 3, 3, 1]), torch.tensor([4, 0, 4, 4])
    x.requires_grad_(), v.requires_grad_()
    S = torch.zeros(6, 5, dtype=torch.float64).index_put((rows, columns), v)
    assert_close(sparse_linear(x, v, rows, columns, 6), x @ S.T)
    assert torch.autograd.gradcheck(lambda x, v: sparse_linear(x, v, rows, columns, 6), (x, v))


def test_nothing_of_the_weights_size_is_kept_for_the_backward_pass():
    _, wrapper, _ = adapted(nn.Linear(64, 48), sparsity=0.99)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        wrapper(torch.randn(2, 64, dtype=torch.float64))
    assert kept and max(kept) < 64 * 48


def test_too_high_a_sparsity_is_refused_with_one_that_fits():
    with pytest.raises(ConfigError, match=r"sparsity=0.99 leaves none of the 60 entries .* at most 0.98333") as error:
        adapted(nn.Linear(10, 6), sparsity=0.99)
    assert adapted(nn.Linear(10, 6), sparsity=error.value.expected)[2].supertuning_values.shape == (1,)


@pytest.mark.parametrize("wrong", [{"sparsity": 1.0}, {"r": 0}, {"lora_alpha": 4.0}, {"lora_dropout": 1.0}], ids=str)
def test_values_that_mean_nothing_are_refused_by_name(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SupertuningConfig(**wrong)


def base() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(10, 6)


def saved(folder, **options):
    model, wrapper, _ = adapted(base(), **options)
    model.save_pretrained(folder)
    return wrapper


def loaded(folder, change=lambda weight: None, other: bool = False):
    layer = base().double()
    change(layer.weight.data)
    holder = nn.ModuleDict({"layer": layer})
    return deltatune.PeftModel.from_pretrained(holder, folder, allow_base_mismatch=other).get_base_model()["layer"]


def test_entries_are_chosen_again_on_loading(tmp_path):
    wrapper, x = saved(tmp_path), torch.randn(3, 10, dtype=torch.float64)
    assert torch.equal(loaded(tmp_path)(x), wrapper(x))


def test_a_base_that_chooses_others_is_refused(tmp_path):
    saved(tmp_path)
    with pytest.raises(MismatchError, match="supertuning_indices, derived here"):
        loaded(tmp_path, lambda weight: weight[0, 1].fill_(9))  # which the fingerprint of the base does not sample


def test_saved_entries_are_used_on_any_base(tmp_path):
    wrapper = saved(tmp_path, save_precomputed_indices=True)
    there = loaded(tmp_path, lambda weight: weight.copy_(weight.flip(1)), other=True)
    assert_close(there.get_delta_weight("default"), wrapper.get_delta_weight("default"))


def test_entries_beyond_the_weight_are_refused(tmp_path):
    saved(tmp_path, save_precomputed_indices=True)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.layer.supertuning_indices"][3] = 60
    save_file(tensors, path)
    with pytest.raises(MismatchError, match=r"reach from .* to 60, the layer has 60"):
        loaded(tmp_path)


@pytest.mark.parametrize("rows, dense, small", [(200, True, 0), (200, True, 1 << 18), (1, False, 0)])
def test_many_tokens_go_through_one_product_with_the_same_gradients(rows, dense, small, monkeypatch):
    """Whichever way is taken, output and gradients are those of the equation."""
    from deltatune.methods import supertuning

    monkeypatch.setattr("deltatune.one_product._SMALL", small)  # of which the sum is kept
    layer = nn.Linear(40, 24)
    model = get_peft_model(
        nn.ModuleDict({"a": layer}), SupertuningConfig(target_modules=["a"], sparsity=0.99, init_weights=False)
    )
    taken, through = [], supertuning.through_entries
    monkeypatch.setattr(supertuning, "through_entries", lambda *given: taken.append(1) or through(*given))
    wrapped = model.get_base_model()["a"]
    adapter = wrapped.adapters["default"]
    x = torch.randn(rows, 40, requires_grad=True)
    out = wrapped(x)
    pull = torch.randn_like(out)
    found = torch.autograd.grad(out, (x, adapter.supertuning_values), pull)
    whole = adapter.adapt(wrapped.base_layer.weight)
    expected = x @ whole.T + wrapped.base_layer.bias
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    for one, other in zip(found, torch.autograd.grad(expected, (x, adapter.supertuning_values), pull)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert bool(taken) == dense


def test_the_sum_of_a_large_layer_is_not_kept():
    layer = nn.Linear(1024, 512)
    _, wrapper, _ = adapted(layer, sparsity=0.9)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        wrapper(torch.randn(2, 1024, dtype=torch.float64))
    own = layer.weight.data_ptr()
    assert kept and all(t.numel() < layer.weight.numel() for t in kept if t.data_ptr() != own)


@pytest.mark.parametrize("biased", [True, False])
def test_in_half_precision_an_update_far_below_the_weights_comes_through(biased):
    """Added into the weight it would be rounded away: near 1 the steps of bfloat16 are 2^-7."""
    layer = nn.Linear(32, 24, bias=biased).bfloat16()
    nn.init.ones_(layer.weight)
    model = get_peft_model(nn.ModuleDict({"a": layer}), SupertuningConfig(target_modules=["a"], sparsity=0.5))
    wrapper = model.get_base_model()["a"]
    adapter = wrapper.adapters["default"]
    signs = torch.randint(2, adapter.supertuning_values.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    adapter.supertuning_values.data = signs * 2.0**-10  # of one sign they would cancel, as the layer's own part does
    x = torch.zeros(3, 40, 32, dtype=torch.bfloat16)
    x[..., ::2], x[..., 1::2] = 1, -1  # the layer's own part is nothing, which leaves all digits to the update
    x.requires_grad_()
    with torch.no_grad():
        whole = adapter.adapt(layer.weight)
    expected = x.float() @ (whole - layer.weight).T + (layer.bias.float() if biased else 0)
    assert (x.float() @ (whole - layer.weight).T).abs().max() > 4 * 2.0**-10  # what would be lost
    pull = torch.randn_like(expected)
    out = wrapper(x)
    torch.testing.assert_close(out.float(), expected, rtol=1e-2, atol=1e-3)
    of_x, of_values = torch.autograd.grad(out, (x, adapter.supertuning_values), pull.bfloat16())
    torch.testing.assert_close(of_x.float(), pull @ whole, rtol=2e-2, atol=5e-2)
    places = adapter.supertuning_indices.long()
    of_sum = pull.flatten(0, 1).T @ x.detach().float().flatten(0, 1)
    torch.testing.assert_close(of_values, of_sum.flatten()[places], rtol=2e-2, atol=1e-1)
