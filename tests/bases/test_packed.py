"""Quantised linear layers: every method on every way of packing, with the layer's own kernel underneath.

bitsandbytes and torchao run here on the CPU. The kind that covers all other packings is shown a layer that packs as
GPTQ does: 4-bit codes in int32 words, scales and zero points in half precision, no `weight` at all.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from deltatune import DoraCaching, LoraConfig, PeftModel, get_peft_model
from deltatune.bases import as_map
from deltatune.errors import MergeError, PeftWarning
from tests.laws.examples import LAYER_METHODS, adapters, config_of, drawn, move


class Holder(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Words(nn.Module):
    """y = x W^T + b with W = (code - zero) * scale, eight codes in a word."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
        self.register_buffer("scales", (high - low) / 15)
        self.register_buffer("zeros", low / self.scales)
        codes = ((weight / self.scales - self.zeros).round().clamp(0, 15)).to(torch.int32)
        words = sum(codes[:, k::8] << (4 * k) for k in range(8))
        self.register_buffer("qweight", words)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        codes = torch.stack([(self.qweight >> (4 * k)) & 15 for k in range(8)], dim=2).flatten(1)
        return nn.functional.linear(x, ((codes + self.zeros) * self.scales).to(x.dtype), self.bias)


def four_bits(linear: nn.Linear, kind: str = "nf4") -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(*linear.weight.shape[::-1], linear.bias is not None, torch.float32, quant_type=kind)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def eight_bits(linear: nn.Linear) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(*linear.weight.shape[::-1], linear.bias is not None, has_fp16_weights=False)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def torchao(config: str, **options: Any) -> Callable[[nn.Linear], nn.Module]:
    """Options that are functions are handed torchao's module of quantisation."""

    def made(linear: nn.Linear) -> nn.Module:
        library = pytest.importorskip("torchao.quantization")
        given = {name: value(library) if callable(value) else value for name, value in options.items()}
        library.quantize_(linear, getattr(library, config)(**given))
        return linear

    return made


PACKED = {
    "bitsandbytes-nf4": four_bits,
    "bitsandbytes-fp4": lambda linear: four_bits(linear, "fp4"),
    "bitsandbytes-8bit": eight_bits,
    "torchao-int8": torchao("Int8WeightOnlyConfig"),
    "torchao-int8-tensor": torchao("Int8WeightOnlyConfig", granularity=lambda library: library.PerTensor()),
    "torchao-int4": torchao(
        "IntxWeightOnlyConfig",
        weight_dtype=torch.int4,
        granularity=lambda library: library.PerGroup(32),
        mapping_type=lambda library: library.MappingType.ASYMMETRIC,
    ),
    "torchao-int3": torchao("IntxWeightOnlyConfig", weight_dtype=torch.int3),
    "torchao-float8": torchao("Float8WeightOnlyConfig"),
    "torchao-int8-both": torchao("Int8DynamicActivationInt8WeightConfig"),
    "words": Words,
}


def tolerance(layer: nn.Module, otherwise: float) -> dict[str, float]:
    """Of the layer's own kernel: 8 bits of input, or bfloat16 where the CPU has instructions for it."""
    if hasattr(layer, "state") or hasattr(getattr(layer, "weight", None), "act_quant_scale"):
        return {"rtol": 1e-3, "atol": 3e-2}
    rounds = getattr(layer, "support_avx512bf16_for_cpu", False)
    return {"rtol": 2e-2, "atol": 2e-2} if rounds else {"rtol": 1e-3, "atol": otherwise}


REPACKED = [name for name in PACKED if name != "words"]
METHODS = [name for name, method in LAYER_METHODS.items() if "linear" in method.adapter.base_kinds]


def base(packing: str, bias: bool = True) -> Holder:
    torch.manual_seed(0)
    return Holder(PACKED[packing](nn.Linear(64, 32, bias=bias))).eval()


def adapted(packing: str, method: str) -> PeftModel:
    config = config_of(method)
    model = get_peft_model(base(packing), config)
    torch.manual_seed(1)  # whatever the start has drawn
    move(model, 0.1)
    return model


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("packing", PACKED)
@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_is_the_map_of_its_unpacked_weight(packing, bias, x):
    layer = base(packing, bias).layer
    seen = as_map(layer)
    assert seen.kind == "linear" and seen.weight.shape == (32, 64) and seen.weight.dtype == seen.dtype == torch.float32
    assert_close(seen.apply(x, seen.weight, seen.bias), layer(x), **tolerance(layer, 1e-5))


@pytest.mark.parametrize("packing", PACKED)
@pytest.mark.parametrize(
    "options",
    [{"use_dora": True}, {"use_qalora": True, "use_dora": True, "lora_bias": True}, {"kasa_config": {}, "r": 4}],
    ids=str,
)
def test_variants_of_lora_adapt_it(options, packing, x):
    model = get_peft_model(base(packing), LoraConfig(target_modules=["layer"], **options))
    move(model, 0.1)
    layer = model.get_base_model().layer
    weight, plain = layer.as_map(["default"]), layer.as_map()
    out = model(x)
    assert_close(out, plain.apply(x, weight.weight, weight.bias), **tolerance(layer.base_layer, 1e-4))
    out.square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in adapters(model))
    with torch.no_grad(), DoraCaching():
        assert torch.equal(model(x), model(x))


@pytest.mark.parametrize(
    "method,packing",
    [pytest.param(m, p, id=f"{m}-{p}", marks=drawn(0.3, "packed", m, p)) for m in METHODS for p in PACKED],
)
def test_every_method_adapts_it(method, packing, x):
    model = adapted(packing, method)
    plain = copy.deepcopy(base(packing).layer)
    before = plain(x)
    layer = model.get_base_model().layer
    out = model(x)
    weight = layer.as_map(["default"])
    if weight.adapter.mergeable is True:
        expected = layer.as_map().apply(x, weight.weight, weight.bias)
        assert_close(out, expected, **tolerance(plain, 1e-4))
    assert not torch.allclose(out, before, atol=1e-3), "the adapter had no effect"
    with model.disable_adapter():
        assert torch.equal(model(x), before)
    out.square().sum().backward()
    for parameter in adapters(model):
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("packing", ["bitsandbytes-nf4", "bitsandbytes-fp4"])
def test_a_call_in_evaluation_leaves_the_weight_and_the_gradient_of_the_input(packing, x):
    """On CPUs with bfloat16 instructions such a call lays the codes out anew, for a kernel without gradient."""
    layer = base(packing).layer
    before = as_map(layer).weight
    layer(x)
    assert_close(as_map(layer).weight, before, rtol=2**-8, atol=0)
    inputs = x.clone().requires_grad_()
    as_map(layer)(inputs).sum().backward()
    assert_close(inputs.grad, before.sum(0).expand_as(x), rtol=2e-2, atol=2e-2)


@pytest.mark.filterwarnings("ignore:merge_adapter")
@pytest.mark.parametrize("packing", REPACKED)
def test_merging_packs_again_says_what_that_lost_and_unmerging_is_exact(packing, x):
    model = adapted(packing, "lora")
    adapted_layer = model.get_base_model().layer
    before, unpacked = model(x), adapted_layer.as_map(["default"]).weight.detach()
    plain_weight = adapted_layer.as_map().weight
    with model.disable_adapter():
        plain = model(x)
    model.base_model.merge_adapter()
    layer = model.get_base_model().layer
    rounding = (as_map(layer.base_layer).weight - unpacked).norm() / unpacked.norm()
    assert 0 < rounding < (0.2 if "int3" in packing else 0.15)
    assert_close(model(x), before, rtol=0, atol=1.0 if "int3" in packing else 0.5)
    layer_alone, update = as_map(layer.base_layer), unpacked - plain_weight
    assert model.base_model.merge_loss["layer"] == pytest.approx(
        ((layer_alone.weight - unpacked).norm() / update.norm()).item(), rel=1e-2
    )
    model.base_model.unmerge_adapter()
    assert torch.equal(model(x), before)
    with model.disable_adapter():
        assert torch.equal(model(x), plain)


def test_a_merge_that_loses_much_of_the_update_says_so():
    model = adapted("bitsandbytes-nf4", "lora")
    with pytest.warns(PeftWarning, match=r"rounding to the base's precision lost up to .* of the update"):
        model.base_model.merge_adapter()


@pytest.mark.parametrize("packing", [name for name in PACKED if name not in REPACKED])
def test_what_cannot_be_packed_again_refuses_to_merge(packing, x):
    model = adapted(packing, "lora")
    before = model(x)
    with pytest.raises(MergeError, match=r"layer: .* cannot be packed again"):
        model.base_model.merge_adapter()
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("packing", PACKED)
def test_an_adapter_trained_on_the_plain_base_loads_onto_the_packed_one(packing, x, tmp_path):
    torch.manual_seed(0)
    plain = get_peft_model(Holder(nn.Linear(64, 32)).eval(), config_of("lora"))
    move(plain, 0.1)
    plain.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(packing), tmp_path)
    assert_close(loaded(x), plain(x), rtol=0, atol=0.5)


@pytest.mark.parametrize("packing", PACKED)
@pytest.mark.parametrize("method", [name for name in ("lora", "ia3", "vera", "oft") if name in LAYER_METHODS])
def test_it_trains_as_on_the_unpacked_base_and_the_base_stays(method, packing, x):
    """Three steps of SGD on the packed layer and on a plain layer with its unpacked weight."""
    packed = adapted(packing, method)
    layer = packed.get_base_model().layer.as_map()
    kept = layer.weight.clone()
    torch.manual_seed(0)
    plain = Holder(nn.Linear(64, 32)).eval()
    plain.layer.weight.data.copy_(layer.weight)
    plain.layer.bias.data.copy_(layer.bias)
    unpacked = get_peft_model(plain, config_of(method))
    for mine, other in zip(adapters(packed), adapters(unpacked)):
        other.data.copy_(mine)
    for mine, other in zip(tensors_of(packed), tensors_of(unpacked)):
        other.copy_(mine)
    for model in (packed, unpacked):
        optimizer = torch.optim.SGD(adapters(model), lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    for mine, other in zip(adapters(packed), adapters(unpacked)):
        assert_close(mine, other, rtol=2e-2, atol=2e-4)
    assert_close(layer.weight, kept, rtol=2**-8, atol=0)  # some kernels round their scales at a call


def tensors_of(model: PeftModel) -> list[Tensor]:
    """What an adapter computes with and does not train."""
    return [buffer for _, buffer in sorted(model.named_buffers()) if buffer.is_floating_point() and "base" not in _]


@pytest.mark.parametrize("packing", PACKED)
def test_gradients_reach_what_is_below_the_layer(packing, x):
    """Also through kernels without a gradient of their own, where the unpacked matrix stands in."""
    layer = base(packing).layer
    seen, inputs = as_map(layer), x.clone().requires_grad_()
    target = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(2))
    (seen(inputs) * target).sum().backward()
    assert_close(inputs.grad, target @ seen.weight, **tolerance(layer, 1e-4))


@pytest.mark.filterwarnings("ignore:merge_adapter")
@pytest.mark.parametrize("packing", REPACKED)
def test_a_copy_of_a_merged_model_unmerges_too(packing, x):
    model = adapted(packing, "lora")
    before = model(x)
    model.base_model.merge_adapter()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    twin.base_model.unmerge_adapter()
    assert torch.equal(twin(x), before) and not torch.equal(model(x), before)
