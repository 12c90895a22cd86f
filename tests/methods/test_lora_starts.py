"""Where LoRA begins, each start against the equation of its paper, and the base as it was under all of them."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from deltatune import LoftQConfig, LoraConfig, LoraGAConfig, PeftModel, get_peft_model
from deltatune.errors import ConfigError, MismatchError, PeftWarning
from deltatune.lora.quantised import NF4, Quantised
from deltatune.lora.starts import STARTS

# EVA's start is tested without its data here, where it is the plain one and says so
pytestmark = pytest.mark.filterwarnings("ignore:adapter .* has seen no data")

FROM_WEIGHT = ("pissa", "pissa_niter_4", "olora")
OPTIONS = {"loftq": {"loftq_config": {"loftq_bits": 4}}}
WITHOUT_DATA = [init for init in [*STARTS, "pissa_niter_4"] if init not in ("corda", "lora_ga")]


def small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8))


def adapted(layer: nn.Module, init, dtype=torch.float64, **options):
    torch.manual_seed(1)
    config = LoraConfig(target_modules=["layer"], init_lora_weights=init, **OPTIONS.get(init, {}), **options)
    model = get_peft_model(nn.ModuleDict({"layer": layer}).to(dtype), config)
    wrapper = model.get_base_model()["layer"]
    return wrapper, wrapper.adapters["default"]


def shake(model: nn.Module, scale: float = 0.3) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(scale * torch.randn_like(parameter))


# ------------------------------------------------------------------------------------------------------- the equations


@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_takes_the_r_largest_parts_out_of_the_base_and_trains_them(rslora):
    wrapper, lora = adapted(nn.Linear(7, 5), "pissa", r=3, lora_alpha=5, use_rslora=rslora)
    W = wrapper.base_layer.weight.detach().numpy()
    U, S, Vh = np.linalg.svd(W, full_matrices=False)
    principal = (U[:, :3] * S[:3]) @ Vh[:3]
    s = 5 / math.sqrt(3) if rslora else 5 / 3
    np.testing.assert_allclose(s * (lora.B @ lora.A).detach(), principal, atol=1e-12)
    np.testing.assert_allclose((lora.A @ lora.A.T).diagonal().detach(), S[:3] / s, rtol=1e-10)  # half of S on a side
    np.testing.assert_allclose((lora.B.T @ lora.B).diagonal().detach(), S[:3] / s, rtol=1e-10)
    shake(lora)
    residual = W - principal
    np.testing.assert_allclose(wrapper.weight.detach(), residual + s * (lora.B @ lora.A).detach().numpy(), atol=1e-12)


def test_fast_pissa_comes_near_the_largest_parts():
    layer = nn.Linear(40, 30)
    torch.manual_seed(5)
    U, V = torch.linalg.qr(torch.randn(30, 30))[0], torch.linalg.qr(torch.randn(40, 40))[0]
    layer.weight.data = U @ torch.diag(0.7 ** torch.arange(30.0)) @ V[:30]
    _, exact = adapted(copy.deepcopy(layer), "pissa", r=4)
    _, fast = adapted(layer, "pissa_niter_12", r=4)
    # what iteration leaves of the fifth direction is about (s5 / s4)^(2 * 12 + 1) = 1.3e-4
    assert_close(fast.B @ fast.A, exact.B @ exact.A, rtol=1e-3, atol=1e-3)


def test_olora_begins_with_the_first_rows_and_columns_of_the_qr_decomposition():
    wrapper, lora = adapted(nn.Linear(7, 5), "olora", r=3, lora_alpha=6)
    W = wrapper.base_layer.weight.detach()
    Q, R = np.linalg.qr(W.numpy())
    np.testing.assert_allclose((lora.B @ lora.A).detach(), Q[:, :3] @ R[:3], atol=1e-12)
    np.testing.assert_allclose((lora.B.T @ lora.B).detach(), np.eye(3), atol=1e-12)
    shake(lora)
    expected = W.numpy() + 2 * ((lora.B @ lora.A).detach().numpy() - Q[:, :3] @ R[:3])
    np.testing.assert_allclose(wrapper.weight.detach(), expected, atol=1e-12)


@pytest.mark.parametrize("layer", [nn.Linear(7, 5), nn.Embedding(9, 6), nn.Conv2d(3, 8, 2)])
def test_the_orthogonal_start_has_two_factors_whose_product_is_zero(layer):
    _, lora = adapted(layer, "orthogonal", r=4)
    assert (lora.B @ lora.A).abs().max() < 1e-12
    assert torch.linalg.matrix_rank(lora.A) == torch.linalg.matrix_rank(lora.B) == 2
    assert lora.A.abs().max() > 0.01 and lora.B.abs().max() > 0.01


@pytest.mark.parametrize("layer", [nn.Linear(7, 5), nn.Embedding(9, 6), Conv1D(5, 7)])
def test_mica_trains_a_alone_along_the_minor_left_singular_vectors(layer):
    wrapper, lora = adapted(layer, "mica", r=2)
    W = wrapper.as_map().weight.detach()
    U, _, _ = np.linalg.svd(W.numpy(), full_matrices=False)
    minor = U[:, -2:]
    np.testing.assert_allclose((lora.B @ lora.B.T).detach(), minor @ minor.T, atol=1e-10)
    assert not lora.A.any()
    assert [name for name, _ in lora.named_parameters()] == ["lora_A.weight"]


@pytest.mark.parametrize("rounds", [1, 4])
def test_loftq_alternates_between_quantising_and_decomposing_what_that_lost(rounds):
    layer = nn.Linear(64, 24)
    options = {"loftq_config": LoftQConfig(loftq_bits=4, loftq_iter=rounds)}
    torch.manual_seed(1)
    config = LoraConfig(target_modules=["0"], r=3, lora_alpha=6, init_lora_weights="loftq", **options)
    wrapper = get_peft_model(nn.Sequential(layer), config).get_base_model()[0]
    W, product = layer.weight.detach().numpy(), 0
    for _ in range(rounds):
        Q = by_hand(W - product)
        U, S, Vh = np.linalg.svd(W - Q, full_matrices=False)
        product = (U[:, :3] * S[:3]) @ Vh[:3]
    np.testing.assert_allclose(wrapper.weight.detach(), Q + product, atol=1e-5)
    assert np.linalg.norm(Q + product - W) < 0.95 * np.linalg.norm(by_hand(W) - W)


def by_hand(W: np.ndarray) -> np.ndarray:
    """NF4 in blocks of 64: the nearest of 16 levels, in units of the block's largest magnitude."""
    blocks = W.astype(np.float32).reshape(-1, 64)
    largest = np.abs(blocks).max(1, keepdims=True)
    levels = np.array(NF4, dtype=np.float32)
    nearest = np.abs((blocks / largest)[..., None] - levels).argmin(-1)
    return (levels[nearest] * largest).reshape(W.shape)


def test_the_sixteen_levels_are_quantiles_of_the_normal_distribution():
    """Appendix E of the QLoRA paper: seven below zero, zero, eight above, scaled so that the outermost are one."""
    normal, offset = torch.distributions.Normal(0.0, 1.0), 0.9677083
    above = normal.icdf(torch.linspace(offset, 0.5, 9)[:-1])
    below = -normal.icdf(torch.linspace(offset, 0.5, 8)[:-1])
    levels = torch.cat([below, torch.zeros(1), above]).sort().values
    assert_close(torch.tensor(NF4), levels / levels.max(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(24, 64), (7, 10), (3, 200)])
def test_eight_bits_are_127_steps_of_each_row(shape):
    W = torch.randn(shape).half().float()  # of half precision is what bitsandbytes packs
    quantised = Quantised(W, 8, torch.float32).weight
    step = W.abs().amax(1, keepdim=True) / 127
    assert ((quantised - W).abs() <= step * 0.51).all()
    assert_close(quantised / step, (quantised / step).round(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(24, 64), (32, 128), (100, 10)])
def test_codes_and_values_are_those_of_bitsandbytes(bits, shape):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(2)
    W = torch.randn(shape)
    if bits == 4:
        codes, state = bnb.functional.quantize_4bit(W, blocksize=64, quant_type="nf4")
        expected = bnb.functional.dequantize_4bit(codes, state)
    else:
        rows = bnb.nn.Int8Params(W, requires_grad=False).to("cpu")
        expected = bnb.functional.int8_vectorwise_dequant(rows.data, rows.SCB)
    assert_close(Quantised(W, bits, W.dtype).weight, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("init", FROM_WEIGHT)
def test_the_first_gradient_is_that_of_the_factors_in_the_weight(init):
    wrapper, lora = adapted(nn.Linear(7, 5), init, r=2, lora_alpha=3)
    x, goal = torch.randn(9, 7, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float64)
    (wrapper(x) - goal).square().sum().backward()
    W = wrapper.base_layer.weight.detach().clone().requires_grad_()
    (x @ W.T + wrapper.base_layer.bias - goal).square().sum().backward()
    assert_close(lora.lora_A.weight.grad, lora.scaling * lora.B.T @ W.grad)
    assert_close(lora.lora_B.weight.grad, lora.scaling * W.grad @ lora.A.T)


def test_dropout_is_on_what_trains_and_not_on_what_was_taken_out_of_the_base():
    wrapper, lora = adapted(nn.Linear(7, 5), "pissa", r=2, lora_dropout=0.5)
    shake(lora)
    x = torch.randn(9, 7, dtype=torch.float64)
    wrapper.train()
    torch.manual_seed(3)
    found = wrapper(x)
    torch.manual_seed(3)
    dropped = nn.functional.dropout(x, 0.5)
    residual = wrapper.base_layer.weight - lora.scaling * lora.start_B @ lora.start_A
    expected = x @ residual.T + wrapper.base_layer.bias + lora.scaling * dropped @ lora.A.T @ lora.B.T
    assert_close(found, expected)


def test_it_combines_with_a_bias_of_b_and_with_patterns():
    options = {"lora_bias": True, "rank_pattern": {"layer": 4}, "alpha_pattern": {"layer": 2}}
    wrapper, lora = adapted(nn.Linear(7, 5), "pissa", r=2, **options)
    assert (lora.r, lora.scaling) == (4, 0.5)
    x = torch.randn(3, 7, dtype=torch.float64)
    assert torch.equal(wrapper(x), wrapper.base_layer(x))
    nn.init.normal_(lora.lora_B.bias)
    assert_close(wrapper(x), wrapper.base_layer(x) + 0.5 * lora.lora_B.bias)


# --------------------------------------------------------------------------------------------------- the base as it was


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("init", WITHOUT_DATA)
def test_disabling_merging_back_and_unloading_give_back_the_base_bit_for_bit(init, dtype):
    base = small().to(dtype)
    before, x = copy.deepcopy(base.state_dict()), torch.randn(5, 12, dtype=dtype)
    expected = base(x)
    model = get_peft_model(
        base, LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=init, **OPTIONS.get(init, {}))
    )
    shake(model)
    model.merge_adapter()
    model.unmerge_adapter()
    assert not torch.equal(model(x), expected)
    with model.disable_adapter():
        assert torch.equal(model(x), expected)
    after = model.unload().state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("init", [*FROM_WEIGHT, "mica", "eva", True, "gaussian"])
def test_a_fresh_adapter_is_the_base_to_the_bit(init, dtype):
    base, x = small().to(dtype), torch.randn(5, 12, dtype=dtype)
    expected = base(x)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=init))
    assert torch.equal(model(x), expected)


def test_no_start_keeps_a_second_copy_of_the_weights():
    for init in WITHOUT_DATA:
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(256, 512))
        options = OPTIONS.get(init, {})
        model = get_peft_model(base, LoraConfig(r=4, target_modules=["0"], init_lora_weights=init, **options))
        beyond = sum(b.numel() * b.element_size() for b in model.buffers())
        weight = 256 * 512 * 4
        assert beyond <= (0.15 if init == "loftq" else 0.05) * weight, init  # 4.5 of 32 bits, or factors


@pytest.mark.parametrize("init", FROM_WEIGHT)
def test_half_precision_bases_are_decomposed_in_float32(init):
    base = nn.Sequential(nn.Linear(24, 16)).to(torch.bfloat16)
    W = base[0].weight.detach().float()
    torch.manual_seed(3)
    lora = (
        get_peft_model(base, LoraConfig(r=4, target_modules=["0"], init_lora_weights=init))
        .get_base_model()[0]
        .adapters["default"]
    )
    torch.manual_seed(3)
    wide = nn.Sequential(nn.Linear(24, 16, dtype=torch.float32))
    wide[0].weight.data = W
    torch.manual_seed(3)
    other = (
        get_peft_model(wide, LoraConfig(r=4, target_modules=["0"], init_lora_weights=init))
        .get_base_model()[0]
        .adapters["default"]
    )
    assert lora.A.dtype == torch.float32 and torch.equal(lora.A, other.A) and torch.equal(lora.B, other.B)


# ---------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("init", WITHOUT_DATA)
def test_a_file_comes_back_to_the_bit_with_its_start(init, tmp_path):
    x = torch.randn(5, 12)
    config = LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=init, **OPTIONS.get(init, {}))
    model = get_peft_model(small(), config)
    shake(model)
    model.save_pretrained(tmp_path)
    torch.manual_seed(99)
    loaded = PeftModel.from_pretrained(small(), tmp_path, low_cpu_mem_usage=True, is_trainable=True)
    assert torch.equal(loaded(x), model(x))
    found = loaded.peft_config["default"]
    assert (found.init_lora_weights, found.r, found.lora_alpha) == (init, 4, 8)
    shake(loaded)  # and training goes on from the same map
    for ours, theirs in zip(loaded.get_base_model()[::2], model.get_base_model()[::2]):
        ours, theirs = ours.adapters["default"], theirs.adapters["default"]
        if theirs.start_A is not None:
            assert torch.equal(ours.start_A, theirs.start_A) and torch.equal(ours.start_B, theirs.start_B)


def test_what_can_be_derived_is_not_in_the_file_and_what_cannot_is_in_it_once(tmp_path):
    for init, rank in {"pissa": 4, "olora": 4, "pissa_niter_2": 8}.items():
        get_peft_model(small(), LoraConfig(r=4, target_modules=["0"], init_lora_weights=init)).save_pretrained(tmp_path)
        tensors, config = (
            load_file(tmp_path / "adapter_model.safetensors"),
            json.loads((tmp_path / "adapter_config.json").read_text()),
        )
        assert {key.split(".0.")[1]: tuple(t.shape) for key, t in tensors.items()} == {
            "lora_A.weight": (rank, 12), "lora_B.weight": (20, rank)}  # fmt: skip
        assert (config["r"], config["init_lora_weights"]) == ((4, init) if rank == 4 else (8, True))


def test_a_start_that_comes_out_otherwise_here_is_noticed(tmp_path):
    base = small()
    get_peft_model(base, LoraConfig(r=4, target_modules=["0"], init_lora_weights="pissa")).save_pretrained(tmp_path)
    other = small()
    other[0].weight.data += 0.3 * torch.randn(20, 12)
    with pytest.raises(MismatchError):
        PeftModel.from_pretrained(other, tmp_path)


def test_signs_of_the_factors_do_not_count_in_the_checksum():
    _, lora = adapted(nn.Linear(12, 8), "pissa", r=4)
    before = lora.checked_tensors()["lora_start"]
    lora.start_A[1].neg_()
    lora.start_B[:, 1].neg_()
    assert_close(lora.checked_tensors()["lora_start"], before)
    lora.start_B[:, 1].neg_()
    assert not torch.allclose(lora.checked_tensors()["lora_start"], before, atol=0.1)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", FROM_WEIGHT)
def test_saved_as_plain_lora_it_needs_no_start_and_has_twice_the_rank(init, rslora, tmp_path):
    """[B, -B0] [A; A0] at the same scaling, with patterns too, which PEFT refuses under rslora."""
    options = {"rank_pattern": {"0": 2}, "alpha_pattern": {"2": 5}, "use_rslora": rslora, "lora_bias": True}
    model = get_peft_model(
        small(), LoraConfig(r=4, lora_alpha=6, target_modules=["0", "2"], init_lora_weights=init, **options)
    )
    shake(model)
    model.save_pretrained(tmp_path, format="lora")
    loaded = PeftModel.from_pretrained(small(), tmp_path)
    x = torch.randn(5, 12)
    assert_close(loaded(x), model(x))
    config = loaded.peft_config["default"]
    assert (config.r, config.rank_pattern, config.init_lora_weights) == (8, {"0": 4}, True)
    here = [layer.adapters["default"] for layer in loaded.get_base_model()[::2]]
    assert [lora.scaling for lora in here] == pytest.approx(
        [layer.adapters["default"].scaling for layer in model.get_base_model()[::2]]
    )
    assert all(lora.start_A is None for lora in here)


def test_conversion_compares_the_folder_of_the_start_with_what_it_knows(tmp_path):
    model = get_peft_model(small(), LoraConfig(r=4, target_modules=["0"], init_lora_weights="pissa"))
    model.peft_config["default"].init_lora_weights = True  # as PEFT's users save where PiSSA began
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    shake(model)
    model.save_pretrained(tmp_path / "trained")
    x = torch.randn(5, 12)
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    assert_close(PeftModel.from_pretrained(small(), tmp_path / "plain")(x), model(x))
    with pytest.raises(MismatchError, match="did not begin there"):
        model.save_pretrained(tmp_path / "wrong", path_initial_model_for_weight_conversion=tmp_path / "trained")
    assert not (tmp_path / "wrong").exists()
    with pytest.warns(PeftWarning, match="written as it is"):
        get_peft_model(small(), LoraConfig(target_modules=["0"])).save_pretrained(tmp_path / "same", format="lora")


def test_subtracting_another_adapters_tensors_gives_the_stacked_ones():
    model = get_peft_model(small(), LoraConfig(r=2, target_modules=["0"]))
    model.add_adapter("start", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    found = model.base_model.subtract_mutated_init(model.adapter_tensors("default"), "start")
    A, B = (found[f"base_model.model.0.lora_{x}.weight"] for x in "AB")
    lora, start = (model.get_base_model()[0].adapters[name] for name in ("default", "start"))
    assert_close(B @ A, lora.B @ lora.A - start.B @ start.A)


# -------------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize("init", ["PiSSA", "OLoRA", "Gaussian", "pissa_niter_16", "Orthogonal"])
def test_names_are_read_in_any_case(init):
    assert LoraConfig(init_lora_weights=init).init_lora_weights == init.lower()


@pytest.mark.parametrize(
    "layer,init,options,match",
    [
        (nn.Linear(12, 3), "pissa", {"r": 4}, "has 3; use r=3"),
        (nn.Linear(12, 3), "mica", {"r": 4}, "use r=3"),
        (nn.Linear(12, 8), "orthogonal", {"r": 3}, "use r=4"),
        (nn.Conv2d(4, 8, 2, groups=2), "pissa", {"r": 2}, "groups=2"),
        (nn.Linear(12, 8, device="meta"), "olora", {"r": 2}, "meta device"),
        (Conv1D(8, 8), "loftq", {"r": 2}, "square"),
        (nn.Linear(12, 8), "corda", {"r": 2}, r"preprocess_corda\("),
        (nn.Linear(12, 8), "lora_ga", {"r": 2}, r"preprocess_loraga\("),
        (nn.Embedding(12, 8), "corda", {"r": 2}, "is a embedding layer; it is for linear"),
    ],
)
def test_what_a_start_cannot_do_on_a_layer_is_refused_by_name_and_nothing_changed(layer, init, options, match):
    base = nn.ModuleDict({"layer": layer})
    config = LoraConfig(target_modules=["layer"], init_lora_weights=init, **OPTIONS.get(init, {}), **options)
    with pytest.raises(ConfigError, match=match) as caught:
        get_peft_model(base, config)
    assert "layer" in str(caught.value) and base["layer"] is layer


@pytest.mark.parametrize(
    "options",
    [
        {"init_lora_weights": "loftq"},
        {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 3}},
        {"init_lora_weights": "eva", "eva_config": {"rho": 0.5}},
        {"init_lora_weights": "eva", "eva_config": {"tau": 2}},
        {"init_lora_weights": "corda", "corda_config": {"corda_method": "xpm"}},
        {"init_lora_weights": "lora_ga", "lora_ga_config": {"direction": "up"}},
        {"init_lora_weights": "lora_ga", "lora_ga_config": [1]},
    ],
)
def test_impossible_options_of_a_start_are_refused(options):
    with pytest.raises(ConfigError):
        LoraConfig(**options)


def test_options_without_their_start_are_warned_of():
    with pytest.warns(PeftWarning, match="eva_config has no effect"):
        LoraConfig(init_lora_weights="pissa", eva_config={"rho": 2.0})
    with pytest.warns(PeftWarning, match="left out"):
        assert LoraConfig(loftq_config={"loftq_bits": 4}).loftq_config == {}


def test_options_may_be_dicts_and_are_saved_as_dicts():
    config = LoraConfig(init_lora_weights="lora_ga", lora_ga_config={"scale": "unit"})
    assert config.lora_ga_config == LoraGAConfig(scale="unit")
    saved = config.to_file_dict()
    assert saved["lora_ga_config"] == {"direction": "ArB2r", "scale": "unit", "stable_gamma": 16}
    assert "runtime_config" not in saved and config.runtime_config.ephemeral_gpu_offload is False
    assert LoraConfig.from_file_dict(saved).lora_ga_config == config.lora_ga_config
