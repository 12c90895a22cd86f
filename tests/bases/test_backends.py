"""Layers of quantisation and parallelism libraries, each behind the one protocol.

Where its library is installed and runs on a CPU the layer is the real one (HQQ, AWQ, AQLM, INC, Megatron, and FP8 of
transformers, whose kernel is replaced). The others are layers that keep what the library's layer keeps and compute from
it, as its documentation says: GPTQ, EETQ, TransformerEngine.
"""

import copy
import os
import socket
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from deltatune import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from deltatune.bases import as_map
from deltatune.bases.parallel import ParallelLinear
from deltatune.errors import ConfigError, MergeError, TargetError
from tests.laws.examples import LAYER_METHODS, adapters, config_of, move

IN, OUT = 64, 32


class Holder(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        output = self.layer(x)
        return output[0] if isinstance(output, tuple) else output


def plain(bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(IN, OUT, bias=bias)


# ------------------------------------------------------------------------------------------------------- real libraries


def hqq() -> nn.Module:
    library = pytest.importorskip("hqq.core.quantize")
    options = library.BaseQuantizeConfig(nbits=4, group_size=64)
    with torch.no_grad():  # or its scales cannot be copied
        return library.HQQLinear(plain(), options, compute_dtype=torch.float32, device="cpu")


def awq() -> nn.Module:
    library = pytest.importorskip("awq.modules.linear.gemm")
    linear, groups = plain().half(), IN // 32
    values = linear.weight.detach().view(OUT, groups, 32).float()
    low, high = values.amin(2), values.amax(2)
    scales = ((high - low) / 15).half()
    zeros = (-low / scales.float()).round().clamp(0, 15)
    return library.WQLinear_GEMM.from_linear(linear, 4, 32, scales=scales.T, zeros=zeros.T.int())


def aqlm() -> nn.Module:
    library = pytest.importorskip("aqlm")
    pytest.importorskip("numba").set_num_threads(1)  # with more its kernel gives other numbers at every call
    layer = library.QuantizedLinear(IN, OUT, 8, 1, 1, 8, bias=True, device="cpu", dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in layer.named_parameters():
        if name == "codes":
            parameter.data.random_(-128, 127, generator=generator)
        else:
            nn.init.normal_(parameter, std=0.3, generator=generator)
    return layer


def inc() -> nn.Module:
    library = pytest.importorskip("neural_compressor.torch.algorithms.weight_only.modules")
    layer = library.INCWeightOnlyLinear(IN, OUT, dtype="int", bits=4, group_size=32, zp=True, bias=True)
    generator = torch.Generator().manual_seed(0)
    codes, zeros = (torch.randint(0, 15, size, generator=generator) for size in ((OUT, IN), (OUT, 2)))
    layer.pack(codes.int(), torch.rand(OUT, 2, generator=generator) / 20 + 0.01, zeros, plain().bias.detach())
    return layer


def fp8(block: tuple[int, int] | None, power: bool = False) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        library = pytest.importorskip("transformers.integrations.finegrained_fp8")

        class Layer(library.FP8Linear):
            """With the kernel that CPUs lack: W = codes * weight_scale_inv, block by block."""

            def forward(self, x: Tensor) -> Tensor:
                scale = self.weight_scale_inv.float()
                if self.block_size is not None:
                    rows, columns = self.block_size
                    scale = torch.kron(scale, torch.ones(rows, columns))[:OUT, :IN]
                return nn.functional.linear(x, self.weight.float() * scale, self.bias)

        layer = Layer(IN, OUT, block_size=block, has_bias=True, scale_fmt="ue8m0" if power else "float")
        layer.weight.data = torch.zeros(OUT, IN).to(layer.weight.dtype)
        layer.weight_scale_inv.data = torch.ones(layer.weight_scale_inv.shape).to(layer.weight_scale_inv.dtype)
        packed = as_map(layer).pack(plain().weight)
        layer.weight, layer.weight_scale_inv = nn.Parameter(packed.data, False), packed.beside["weight_scale_inv"]
        layer.bias = nn.Parameter(plain().bias.detach())
        return layer

    return made


# --------------------------------------------------------------------------------- what other libraries' layers keep


class GPTQ(nn.Module):
    """4-bit codes down the inputs in int32 words, zero points one too low, and the group of each input in `g_idx`."""

    def __init__(self) -> None:
        super().__init__()
        self.infeatures, self.outfeatures = IN, OUT
        weight, groups = plain().weight.detach().T.contiguous(), IN // 32
        self.register_buffer("g_idx", torch.arange(IN, dtype=torch.int32) // 32)
        self.register_buffer("scales", weight.abs().view(groups, 32, OUT).amax(1) / 7)
        codes = (weight / self.scales[self.g_idx.long()] + 8).round().clamp(0, 15).int()
        self.register_buffer("qweight", sum(codes[k::8] << (4 * k) for k in range(8)))
        self.register_buffer("qzeros", torch.full((groups, OUT // 8), 0x77777777, dtype=torch.int32))
        self.register_buffer("bias", plain().bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        codes = torch.stack([(self.qweight >> (4 * k)) & 15 for k in range(8)], 1).flatten(0, 1)
        zeros = torch.stack([(self.qzeros >> (4 * k)) & 15 for k in range(8)], 2).flatten(1) + 1
        group = self.g_idx.long()
        return x @ ((codes - zeros[group]) * self.scales[group]) + self.bias


class EETQ(nn.Module):
    """8-bit codes (in, out) with a scale per output; its kernel has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = IN, OUT
        weight = plain().weight.detach().T
        self.register_buffer("weight_scales", weight.abs().amax(0) / 127)
        self.register_buffer("weight", (weight / self.weight_scales).round().to(torch.int8))
        self.register_buffer("bias", plain().bias.detach().clone())

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight * self.weight_scales) + self.bias


PACKED: dict[str, Callable[[], nn.Module]] = {
    "hqq": hqq,
    "awq": awq,
    "aqlm": aqlm,
    "inc": inc,
    "gptq": GPTQ,
    "eetq": EETQ,
    "fp8-blocks": fp8((24, 24)),
    "fp8-whole": fp8(None),
    "fp8-powers": fp8((16, 32), power=True),
}
REPACKED = ("hqq", "fp8-blocks", "fp8-whole", "fp8-powers")
METHODS = [name for name in ("lora", "ia3", "vera", "oft", "randlora", "boft") if name in LAYER_METHODS]


def adapted(layer: nn.Module, method: str) -> PeftModel:
    config = config_of(method)
    torch.manual_seed(1)
    model = get_peft_model(Holder(layer).eval(), config)
    move(model, 0.1)
    return model


def inputs(layer: nn.Module) -> Tensor:
    dtype = torch.float16 if "awq" in type(layer).__module__ else torch.float32  # all that its kernel takes
    return torch.randn(3, 5, IN, generator=torch.Generator().manual_seed(1)).to(dtype)


def near(layer: nn.Module) -> dict[str, float]:
    return {"rtol": 2e-2, "atol": 2e-2} if "awq" in type(layer).__module__ else {"rtol": 1e-4, "atol": 1e-4}


@pytest.mark.parametrize("packing", PACKED)
def test_the_layer_is_the_map_of_its_unpacked_weight(packing):
    layer = PACKED[packing]()
    seen, x = as_map(layer), inputs(layer)
    assert seen.kind == "linear" and seen.weight.shape == (OUT, IN)
    assert_close(seen.apply(x, seen.weight, seen.bias), layer(x), **near(layer))


@pytest.mark.parametrize("packing", PACKED)
@pytest.mark.parametrize("method", METHODS)
def test_methods_of_every_kind_adapt_it_and_train(packing, method):
    layer = PACKED[packing]()
    x, before = inputs(layer), PACKED[packing]()(inputs(layer))
    model = adapted(layer, method)
    wrapped = model.get_base_model().layer
    out, changed = model(x), wrapped.as_map(["default"])
    assert_close(out, wrapped.as_map().apply(x, changed.weight, changed.bias), **near(layer))
    assert not torch.allclose(out, before, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(model(x), before)
    if packing == "aqlm" and method in ("oft", "boft"):
        pytest.skip("AQLM's own gradient for the input fails on CPUs, where its codes lie the other way round")
    out.float().square().mean().backward()
    for parameter in adapters(model):
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0


@pytest.mark.parametrize("packing", [name for name in PACKED if name != "aqlm"])
def test_gradients_reach_what_is_below_the_layer(packing):
    layer = PACKED[packing]()
    x = inputs(layer).requires_grad_()
    target = torch.randn(3, 5, OUT).to(x.dtype)
    (as_map(layer)(x) * target).sum().backward()
    assert_close(x.grad, target @ as_map(layer).weight.to(x.dtype), **near(layer))


@pytest.mark.filterwarnings("ignore:merge_adapter")
@pytest.mark.parametrize("packing", REPACKED)
def test_a_merge_packs_again_and_says_its_loss_and_unmerging_is_exact(packing):
    layer = PACKED[packing]()
    stored = {key: copy.deepcopy(value) for key, value in layer.state_dict().items()}
    model, x = adapted(layer, "lora"), inputs(layer)
    before, wrapped = model(x), model.get_base_model().layer
    weight, base = wrapped.as_map(["default"]).weight.detach().float(), wrapped.as_map().weight.float()
    with model.disable_adapter():
        bare = model(x)
    model.base_model.merge_adapter()
    held = as_map(layer).weight.float()
    assert model.base_model.merge_loss["layer"] == pytest.approx(
        ((held - weight).norm() / (weight - base).norm()).item(), rel=1e-3
    )
    assert 0 < (held - weight).norm() / weight.norm() < 0.15
    assert_close(model(x), nn.functional.linear(x, held, as_map(layer).bias), rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        assert_close(model(x), bare, rtol=1e-4, atol=1e-4)
    twin = copy.deepcopy(model)
    for each in (twin, model):
        each.base_model.unmerge_adapter()
        assert torch.equal(each(x), before)
        with each.disable_adapter():
            assert torch.equal(each(x), bare)
    again = layer.state_dict()
    assert again.keys() == stored.keys()
    for key, value in stored.items():
        assert torch.equal(again[key], value) if isinstance(value, Tensor) else again[key] == value


@pytest.mark.filterwarnings("ignore:merge_adapter")
@pytest.mark.parametrize("packing", REPACKED)
def test_a_bias_is_merged_too(packing):
    layer = PACKED[packing]()
    torch.manual_seed(1)
    model, x = get_peft_model(Holder(layer).eval(), config_of("lora", lora_bias=True)), inputs(layer)
    with torch.no_grad():
        model.get_base_model().layer.adapters["default"].lora_B.bias.fill_(1.0)
    before = model(x)
    merged = model.merge_and_unload()
    assert_close(merged(x).mean(), before.mean(), rtol=0, atol=2e-2)


@pytest.mark.parametrize("packing", [name for name in PACKED if name not in REPACKED])
def test_what_cannot_be_packed_again_refuses_to_merge_and_is_left_alone(packing):
    layer = PACKED[packing]()
    model, x = adapted(layer, "lora"), inputs(layer)
    before = model(x)
    with pytest.raises(MergeError, match=r"layer: .* cannot be packed again"):
        model.base_model.merge_adapter()
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("packing", PACKED)
def test_adapters_are_saved_and_loaded_on_it(packing, tmp_path):
    model, x = adapted(PACKED[packing](), "lora"), inputs(PACKED[packing]())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Holder(PACKED[packing]()).eval(), tmp_path)
    assert torch.equal(loaded(x), model(x))


# ------------------------------------------------------------------------------------------------------ parallel layers


@pytest.fixture(scope="module")
def megatron() -> Iterator[Any]:
    library = pytest.importorskip("megatron.core.tensor_parallel")
    import torch.distributed as dist
    from megatron.core import parallel_state

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(probe.getsockname()[1]), RANK="0", WORLD_SIZE="1")
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(1)
    yield library
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def column(library: Any, apart: bool = False, bias: bool = True, kind: str = "ColumnParallelLinear") -> nn.Module:
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=2, use_cpu_initialization=True)
    more = {"input_is_parallel": True} if kind == "RowParallelLinear" else {}
    layer = getattr(library, kind)(
        IN, OUT, config=config, init_method=nn.init.xavier_normal_, bias=bias, skip_bias_add=apart, **more
    )
    layer.load_state_dict(plain(bias).state_dict(), strict=False)
    return layer


def engine(monkeypatch: pytest.MonkeyPatch, apart: bool = False, bias: bool = True) -> nn.Module:
    """A stand-in for `transformer_engine.pytorch.Linear`: a parameter, an empty bias where there is none."""

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.out_features, self.return_bias = IN, OUT, apart
            self.weight = nn.Parameter(plain().weight.detach().clone())
            if bias:
                self.bias = nn.Parameter(plain().bias.detach().clone())
            else:
                self.bias = torch.Tensor()

        def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Any:
            bias = self.bias if self.bias.numel() and not self.return_bias else None
            output = nn.functional.linear(x, self.weight, bias)
            return (output, self.bias) if self.return_bias else output

    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", types.SimpleNamespace(Linear=Linear))
    return Linear()


def check_parallel(layer: nn.Module, method: str) -> None:
    """Against the same adapter on a plain layer with the same weight; the layer's second output is what it was."""
    x = torch.randn(3, 5, IN, generator=torch.Generator().manual_seed(1))
    seen = as_map(layer)
    assert isinstance(seen, ParallelLinear)
    other = nn.Linear(IN, OUT, bias=seen.bias is not None)
    other.load_state_dict({k: v for k, v in {"weight": seen.weight, "bias": seen.bias}.items() if v is not None})
    raw = layer(x)
    model, reference = adapted(layer, method), adapted(other, method)
    set_peft_model_state_dict(reference, get_peft_model_state_dict(model))
    output = model.get_base_model().layer(x)
    assert type(output) is type(raw)
    if isinstance(raw, tuple):
        assert output[1] is raw[1]
    found = output[0] if isinstance(output, tuple) else output
    assert_close(found, reference(x), rtol=1e-5, atol=1e-5)
    found.square().sum().backward()
    reference(x).square().sum().backward()
    for mine, theirs in zip(adapters(model), adapters(reference)):
        assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(model(x), raw[0] if isinstance(raw, tuple) else raw)
    before = model(x)
    model.base_model.merge_adapter()
    merged = model.get_base_model().layer(x)
    assert type(merged) is type(raw) and (not isinstance(raw, tuple) or merged[1] is raw[1])
    assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        assert_close(model(x), raw[0] if isinstance(raw, tuple) else raw, rtol=1e-5, atol=1e-5)
    model.base_model.unmerge_adapter()
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["ColumnParallelLinear", "RowParallelLinear"])
@pytest.mark.parametrize("apart,bias", [(False, True), (True, True), (False, False)])
def test_megatrons_layers_are_adapted_and_return_what_they_did(megatron, method, kind, apart, bias):
    check_parallel(column(megatron, apart, bias, kind), method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("apart,bias", [(False, True), (True, True), (False, False)])
def test_transformer_engines_layers_are_adapted_and_return_what_they_did(monkeypatch, method, apart, bias):
    check_parallel(engine(monkeypatch, apart, bias), method)


def test_a_shard_of_a_layer_is_refused(megatron):
    layer = column(megatron)
    layer.output_size = 2 * OUT  # two processes, each with half of the outputs
    holder = Holder(layer)
    with pytest.raises(TargetError, match="shard of a linear"):
        get_peft_model(holder, config_of("lora"))
    assert holder.layer is layer


def test_a_shard_of_transformer_engine_is_refused(monkeypatch):
    layer = engine(monkeypatch)
    layer.weight = nn.Parameter(layer.weight[: OUT // 2].detach())
    with pytest.raises(TargetError, match="shard of a linear"):
        get_peft_model(Holder(layer), config_of("lora"))


def test_a_quantised_weight_of_transformer_engine_trains_and_is_not_merged_into(monkeypatch):
    class Quantised(nn.Parameter):
        def dequantize(self) -> Tensor:
            return self.data.clone()

    layer = engine(monkeypatch)
    layer.weight = Quantised(layer.weight.detach(), requires_grad=False)
    model, x = adapted(layer, "lora"), torch.randn(3, IN)
    before = model(x)
    before.sum().backward()
    with pytest.raises(MergeError, match="Quantised"):
        model.base_model.merge_adapter()
    assert torch.equal(model(x), before)


def test_megatrons_options_are_accepted_and_name_no_module_to_import(tmp_path):
    config = LoraConfig(target_modules=["layer"], megatron_config={"hidden_size": IN})
    get_peft_model(Holder(plain()), config).save_pretrained(tmp_path)
    loaded = LoraConfig.from_pretrained(tmp_path)
    assert (loaded.megatron_config, loaded.megatron_core) == ({"hidden_size": IN}, "megatron.core")
    with pytest.raises(ConfigError, match="megatron_core='antigravity'"):
        LoraConfig(megatron_config={}, megatron_core="antigravity")
    assert "antigravity" not in sys.modules
