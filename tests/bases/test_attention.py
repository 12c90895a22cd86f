"""`nn.MultiheadAttention`: the joint projection and the output projection, under every method."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from deltatune import LoraConfig, PeftModel, get_peft_model
from deltatune.errors import MergeError, PeftWarning, StateError
from deltatune.layer import AdaptedLayer
from tests.laws.examples import LAYER_METHODS, adapters, config_of, move

METHODS = [
    name
    for name, method in LAYER_METHODS.items()
    if "linear" in method.adapter.base_kinds and method.adapter.mergeable is True
]


class Holder(nn.Module):
    def __init__(self, batch_first: bool = True, bias: bool = True) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(16, 4, bias=bias, batch_first=batch_first)
        if bias:  # which would start at zero
            nn.init.normal_(self.layer.in_proj_bias, std=0.2)
            nn.init.normal_(self.layer.out_proj.bias, std=0.2)

    def forward(self, x, memory=None, **options):
        memory = x if memory is None else memory
        return self.layer(x, memory, memory, **options)


def base(batch_first: bool = True, bias: bool = True) -> Holder:
    torch.manual_seed(0)
    return Holder(batch_first, bias).eval()


def adapted(method: str = "lora", batch_first: bool = True, bias: bool = True) -> PeftModel:
    model = get_peft_model(base(batch_first, bias), config_of(method))
    move(model, 0.2)
    return model


def plain(model: PeftModel, batch_first: bool = True, bias: bool = True) -> Holder:
    """The bare module with the adapted matrices written into it."""
    twin, layer = base(batch_first, bias), model.get_base_model().layer
    with torch.no_grad():
        projection, out = layer.as_map(["default"]), layer.base_layer.out_proj.as_map(["default"])
        for target, source in (
            (twin.layer.in_proj_weight, projection.weight),
            (twin.layer.in_proj_bias, projection.bias),
            (twin.layer.out_proj.weight, out.weight),
            (twin.layer.out_proj.bias, out.bias),
        ):
            if target is not None:
                target.copy_(source)
    return twin


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_it_is_the_attention_of_the_adapted_matrices(method, batch_first):
    model = adapted(method, batch_first)
    assert model.base_model.targeted_module_names == ["layer", "layer.base_layer.out_proj"]
    x, memory = torch.randn(5, 5, 16), torch.randn(5, 5, 16)
    mask = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)
    twin = plain(model, batch_first)
    for given in ((x,), (x, memory)):
        output, weights = model(*given, attn_mask=mask)
        wanted, wanted_weights = twin(*given, attn_mask=mask)
        assert_close(output, wanted, rtol=1e-4, atol=1e-5)
        assert_close(weights, wanted_weights, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert_close(model(x)[0], base(batch_first)(x)[0])  # without gradients torch takes a fused path
    model(x)[0].square().sum().backward()
    for parameter in adapters(model):
        assert parameter.grad is not None and parameter.grad.abs().max() > 0


@pytest.mark.parametrize("method", METHODS)
def test_saved_loaded_merged_and_unmerged(method, tmp_path):
    model = adapted(method)
    x = torch.randn(2, 4, 16)
    expected = model(x)[0]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    assert_close(loaded(x)[0], expected, rtol=1e-5, atol=1e-5)  # without gradients torch takes a fused path
    before = {name: p.clone() for name, p in base().named_parameters()}
    try:
        model.base_model.merge_adapter()
    except MergeError as error:
        pytest.skip(f"this method does not merge here: {error}")
    assert_close(model(x)[0], expected, rtol=1e-4, atol=1e-5)
    model.base_model.unmerge_adapter()
    unloaded = model.unload()
    assert isinstance(unloaded.layer, nn.MultiheadAttention) and isinstance(unloaded.layer.out_proj, nn.Linear)
    assert all(torch.equal(p, before[name]) for name, p in unloaded.named_parameters())


def test_merge_and_unload_leaves_the_plain_module():
    model = adapted()
    x = torch.randn(2, 4, 16)
    expected = model(x)[0]
    merged = model.merge_and_unload()
    assert not any(isinstance(module, AdaptedLayer) for module in merged.modules())
    assert_close(merged(x)[0], expected, rtol=1e-4, atol=1e-5)


def test_a_second_adapter_a_copy_and_a_deletion():
    model = adapted()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["layer"]))
    move(model, 0.2, "other")
    x = torch.randn(2, 4, 16)
    first = model(x)[0]
    model.set_adapter("other")
    second = copy.deepcopy(model)(x)[0]
    assert not torch.allclose(first, second)
    assert torch.equal(model(x)[0], second)
    with pytest.warns(PeftWarning, match="'default' is active now"):
        model.delete_adapter("other")
    assert torch.equal(model(x)[0], first)


def test_rows_are_one_for_all_or_refused():
    model = adapted()
    x = torch.randn(2, 4, 16)
    assert torch.equal(model(x, adapter_names=["default"] * 2)[0], model(x)[0])
    with pytest.raises(StateError, match="rows cannot differ in a MultiheadAttention"):
        model(x, adapter_names=["default", "__base__"])


def test_all_linear_takes_the_output_projection_alone_and_the_attention_uses_it():
    model = get_peft_model(base(), LoraConfig(target_modules="all-linear", r=2))
    assert model.base_model.targeted_module_names == ["layer.out_proj"]
    move(model, 0.5)
    x = torch.randn(2, 4, 16)
    assert not torch.allclose(model(x)[0], base()(x)[0])


def test_the_fused_path_of_a_transformer_layer_does_not_pass_it_by():
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    x = torch.randn(2, 4, 16)
    with torch.no_grad():
        before = block(x)
    model = get_peft_model(block, LoraConfig(target_modules=["self_attn"], r=2))
    move(model, 0.5)
    slow = model(x)
    with torch.no_grad():  # only without gradients the fused path is taken
        assert_close(model(x), slow, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(model(x), before)
        with model.disable_adapter():
            assert_close(model(x), before, rtol=1e-5, atol=1e-6)


def test_attention_with_keys_of_another_width_is_refused_by_name():
    from deltatune.errors import TargetError

    with pytest.raises(TargetError, match="MultiheadAttention"):
        get_peft_model(
            nn.ModuleDict({"layer": nn.MultiheadAttention(16, 4, kdim=8)}), LoraConfig(target_modules=["layer"])
        )


@pytest.fixture
def quiet_peft():
    peft = pytest.importorskip("peft", reason="peft, the peer, is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield peft


def test_lora_files_cross_over_with_peft(quiet_peft, tmp_path):
    """On the joint projection; of the output projection PEFT 0.21.2 adds the update twice (the next test)."""
    x = torch.randn(2, 4, 16)
    theirs = quiet_peft.get_peft_model(base(), quiet_peft.LoraConfig(r=2, target_modules=["layer"])).eval()
    ours = get_peft_model(base(), LoraConfig(r=2, target_modules=["layer"]))
    for model in (theirs, ours):
        move(model, 0.2) if model is ours else None
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and model is theirs:
                    parameter.add_(0.2 * torch.randn_like(parameter))
                if "out_proj" in name and "lora_B" in name:
                    parameter.zero_()
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    loaded = PeftModel.from_pretrained(base(), tmp_path / "theirs")
    assert_close(loaded(x)[0], theirs(x)[0], rtol=1e-5, atol=1e-5)
    loaded = quiet_peft.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    assert_close(loaded(x)[0], ours(x)[0], rtol=1e-5, atol=1e-5)


def test_the_output_projections_update_counts_once_here_and_twice_in_peft(quiet_peft):
    model = quiet_peft.get_peft_model(base(), quiet_peft.LoraConfig(r=2, target_modules=["layer"]))
    projection = model.base_model.model.layer.base_layer.out_proj
    nn.init.normal_(projection.lora_B["default"].weight)
    once = projection.get_delta_weight("default")
    merged = model.merge_and_unload().layer.out_proj.weight
    assert_close(merged, base().layer.out_proj.weight + 2 * once)
