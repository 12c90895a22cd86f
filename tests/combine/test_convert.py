"""Conversion to LoRA: every method that a weight can hold, on every kind of layer, to the error that is reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from deltatune import (
    BeftConfig,
    BitFitConfig,
    BottleneckConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    TrainableTokensConfig,
    VeraConfig,
    convert_to_lora,
    get_peft_model,
    inject_adapter_in_model,
    save_as_lora,
)
from deltatune.combine.changes import read
from deltatune.combine.product import dense
from deltatune.errors import AdapterNameError, ConversionError, MergeError, PeftWarning, StateError
from tests.combine.models import IDS, LAYERS, base, deltas, lora, move, with_adapters
from tests.core.tiny import batch, logits, tiny

lossy = pytest.mark.filterwarnings("ignore:convert_to_lora. .* loses up to:deltatune.PeftWarning")


def loaded(folder: Path, model: nn.Module) -> PeftModel:
    return PeftModel.from_pretrained(model, folder)


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


def test_a_rank_is_the_rank_of_every_layer_and_the_nearest_there_is():
    model = with_adapters({"default": LoHaConfig(r=2, target_modules=["linear", "turned", "embed"])})
    with pytest.warns(PeftWarning, match="loses up to"):
        converted = convert_to_lora(model, 2)
    config, tensors = converted
    assert config.r == config.lora_alpha == 2 and not config.rank_pattern
    assert config.target_modules == {"linear", "turned", "embed"}
    for path, delta in deltas(model, "default").items():
        values = torch.linalg.svdvals(delta)
        best = (values[2:].norm() / values.norm()).item()
        assert converted.errors[path] == pytest.approx(best, abs=1e-5)
        names = ("lora_embedding_B", "lora_embedding_A") if path == "embed" else ("lora_B.weight", "lora_A.weight")
        B, A = (tensors[f"base_model.model.{path}.{name}"] for name in names)
        assert relative(B @ A, delta) == pytest.approx(best, abs=1e-5)


def test_a_share_keeps_the_fewest_singular_values_that_have_it():
    model = with_adapters({"default": LoHaConfig(r=2, target_modules=["linear", "head"])})
    with pytest.warns(PeftWarning, match="loses"):
        _, tensors = convert_to_lora(model, 0.8)
    for path, delta in deltas(model, "default").items():
        energy = torch.linalg.svdvals(delta).square().cumsum(0)
        fewest = int((energy < 0.8 * energy[-1]).sum()) + 1
        assert len(tensors[f"base_model.model.{path}.lora_A.weight"]) == fewest


@pytest.mark.parametrize("limit", [0.05, 1e-3])
def test_an_error_is_kept_with_the_fewest_singular_values(limit: float):
    model = with_adapters({"default": OFTConfig(oft_block_size=2, target_modules=["linear", "turned"])})
    converted = convert_to_lora(model, None, max_error=limit)
    assert max(converted.errors.values()) <= limit
    for path, delta in deltas(model, "default").items():
        rank = len(converted[1][f"base_model.model.{path}.lora_A.weight"])
        values = torch.linalg.svdvals(delta)
        assert rank == 1 or values[rank - 1 :].norm() > limit * values.norm()


def decomposed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of all matrices that are decomposed from now on."""
    decompose, shapes = torch.linalg.svd, []

    def noted(matrix: torch.Tensor, **options: Any) -> Any:
        shapes.append(tuple(matrix.shape))
        return decompose(matrix, **options)

    monkeypatch.setattr(torch.linalg, "svd", noted)
    return shapes


def test_products_of_factors_are_never_laid_out(monkeypatch: pytest.MonkeyPatch):
    model = with_adapters({"default": VeraConfig(r=2, target_modules=["linear", "turned", "head"])})
    shapes = decomposed(monkeypatch)
    converted = convert_to_lora(model, 2)
    assert set(shapes) == {(2, 2)} and max(converted.errors.values()) < 1e-6


def test_the_rank_of_a_lora_adapter_comes_down_and_goes_up():
    model = with_adapters({"default": lora(4, 3, ["linear", "turned"])})
    with pytest.warns(PeftWarning):
        lower = convert_to_lora(model, 2)
    for path, delta in deltas(model, "default").items():
        values = torch.linalg.svdvals(delta)
        assert lower.errors[path] == pytest.approx((values[2:].norm() / values.norm()).item(), abs=1e-5)
    higher = convert_to_lora(model, 6)
    assert higher[0].r == 6 and max(higher.errors.values()) < 1e-6


@lossy
def test_conversion_leaves_the_model_as_it_is():
    model = with_adapters({"default": LoHaConfig(r=2, target_modules=LAYERS[:4])}).train()
    before, names = {k: v.clone() for k, v in model.state_dict().items()}, list(model.state_dict())
    convert_to_lora(model, 2)
    assert list(model.state_dict()) == names and all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    assert model.training and all(module.training for module in model.modules())


@pytest.mark.parametrize("config", [BitFitConfig(target_modules=["linear"]), BeftConfig(target_modules=["head"])])
def test_a_changed_bias_becomes_that_of_B(config: Any, tmp_path: Path):
    model = with_adapters({"default": config})
    save_as_lora(tmp_path, model, 1)
    again = loaded(tmp_path, base())
    assert again.peft_config["default"].lora_bias
    torch.testing.assert_close(again(IDS), model(IDS), rtol=1e-5, atol=1e-6)


def test_a_bias_beside_an_embedding_is_refused_by_name():
    model = with_adapters({"a": lora(targets=["embed"]), "b": BitFitConfig(target_modules=["linear"])})
    with pytest.raises(MergeError, match=r"bias of linear changes.*embedding embed") as caught:
        model.add_weighted_adapter(["a", "b"], [1, 1], "sum", combination_type="linear")
    assert caught.value.field == "lora_bias"


def test_a_tied_head_is_converted_once_with_its_embedding(tmp_path: Path):
    model = get_peft_model(tiny("gpt2"), TrainableTokensConfig(token_indices=[2, 7]))
    move(model, "default", 3)
    save_as_lora(tmp_path, model, None, max_error=1e-5)
    again = loaded(tmp_path, tiny("gpt2"))
    assert again.peft_config["default"].r == 2
    torch.testing.assert_close(logits(again, batch("gpt2")), logits(model, batch("gpt2")), rtol=1e-4, atol=1e-4)


def test_trained_copies_go_along(tmp_path: Path):
    config = LoHaConfig(r=2, target_modules=["linear"], modules_to_save=["head"])
    model = with_adapters({"default": config})
    nn.init.normal_(model.get_base_model().head.modules_to_save["default"].weight)
    save_as_lora(tmp_path, model, None, max_error=1e-5)
    again = loaded(tmp_path, base())
    torch.testing.assert_close(again(IDS), model(IDS), rtol=1e-4, atol=1e-5)


def test_of_several_adapters_the_named_one_is_converted(tmp_path: Path):
    model = with_adapters({"a": LoHaConfig(r=2, target_modules=["linear"]), "b": lora(2, 3, ["head"])})
    model.set_adapter(["a", "b"])
    config, _ = convert_to_lora(model, 2, adapter_name="b")
    assert config.target_modules == {"head"}


def test_without_a_peft_model_keys_are_those_of_the_model(tmp_path: Path):
    model = inject_adapter_in_model(OFTConfig(oft_block_size=2, target_modules=["linear"]), base())
    model.linear.adapters["default"].entries.data.normal_()
    _, tensors = convert_to_lora(model, 6)
    assert set(tensors) == {"linear.lora_A.weight", "linear.lora_B.weight"}
    save_as_lora(tmp_path, model, 6)
    torch.testing.assert_close(loaded(tmp_path, base())(IDS), model(IDS), rtol=1e-4, atol=1e-5)


def test_the_decomposition_can_be_compiled():
    model = with_adapters({"default": LoHaConfig(r=2, target_modules=["linear"])})
    plain, compiled = convert_to_lora(model, 6), convert_to_lora(model, 6, compile_kwargs={"backend": "eager"})
    assert compiled.errors["linear"] < 1e-5 and plain[1].keys() == compiled[1].keys()


def test_what_supports_the_conversion():
    model = with_adapters(
        {
            "loha": LoHaConfig(r=2, target_modules=["linear"]),
            "bottleneck": BottleneckConfig(target_modules=["linear"]),
        }
    )
    assert model.supports_lora_conversion("loha") and not model.supports_lora_conversion("bottleneck")
    with pytest.raises(AdapterNameError, match="'nobody'"):
        model.supports_lora_conversion("nobody")
    layer = model.get_base_model().linear
    assert layer.supports_lora_conversion("loha") and not layer.supports_lora_conversion("bottleneck")


def test_what_lora_cannot_hold_is_refused_with_the_reason():
    model = with_adapters({"default": BottleneckConfig(target_modules=["linear"])})
    for kind in (ConversionError, TypeError, MergeError):
        with pytest.raises(kind, match=r"linear.*bends"):
            convert_to_lora(model, 2)
    norms = get_peft_model(tiny("llama"), LNTuningConfig(task_type="CAUSAL_LM"))
    with pytest.raises(ConversionError, match="LlamaRMSNorm, which LoRA cannot adapt"):
        convert_to_lora(norms, 2)
    prefix = get_peft_model(tiny("llama"), PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(ConversionError, match="cannot become LoRA"):
        convert_to_lora(prefix, 2)
    with pytest.raises(ConversionError, match="on no layer"):
        convert_to_lora(base(), 2)


@pytest.mark.parametrize("rank", [0, -1, True, 0.0, 1.5, float("nan"), "4", None])
def test_a_rank_that_is_none_is_refused(rank: Any, tmp_path: Path):
    model = with_adapters({"default": LoHaConfig(r=2, target_modules=["linear"])})
    with pytest.raises(MergeError, match="rank=") as caught:
        save_as_lora(tmp_path / "folder", model, rank)
    assert caught.value.field == "rank" and not (tmp_path / "folder").exists()


def test_a_rank_above_the_sides_and_a_name_that_is_not_there_are_refused():
    model = with_adapters({"default": IA3Config(target_modules=["linear", "head"], feedforward_modules=[])})
    with pytest.raises(MergeError, match=r"rank=6 is more than head can have.*at most 5"):
        convert_to_lora(model, 6)
    with pytest.raises(AdapterNameError, match="'other'"):
        convert_to_lora(model, 2, adapter_name="other")
    model.merge_adapter()
    with pytest.raises(StateError, match="unmerge_adapter"):
        convert_to_lora(model, 2)


def test_a_half_precision_base_is_not_rounded_into_the_change():
    model = with_adapters({"default": OFTConfig(oft_block_size=2, target_modules=["linear"])}, model=base().bfloat16())
    layer = model.get_base_model().linear
    wide = layer.base_layer.weight.float()
    expected = layer.adapters["default"].adapt(wide) - wide
    _, tensors = convert_to_lora(model, 6)
    B, A = (tensors[f"base_model.model.linear.lora_{side}.weight"] for side in "BA")
    assert relative(B @ A, expected) < 1e-5


def test_an_adapter_in_half_precision_is_not_either():
    config = IA3Config(target_modules=["linear"], feedforward_modules=[])
    model = get_peft_model(base().bfloat16(), config, autocast_adapter_dtype=False)
    move(model, "default", 1)
    layer = model.get_base_model().linear
    wide, vector = layer.base_layer.weight.double(), layer.adapters["default"].l.double()
    change = dense(read(layer, "default").weight)
    assert relative(change.double(), (vector[:, None] - 1) * wide) < 1e-6


def test_a_method_that_leaves_the_weight_decomposes_nothing(monkeypatch: pytest.MonkeyPatch):
    model = with_adapters({"default": BitFitConfig(target_modules=["linear"])})
    shapes = decomposed(monkeypatch)
    convert_to_lora(model, 1)
    assert set(shapes) == {(0, 0)}


def test_the_config_is_a_plain_one():
    config, _ = convert_to_lora(
        with_adapters({"default": lora(2, 7, use_rslora=True, init_lora_weights="gaussian")}), 2
    )
    assert isinstance(config, LoraConfig) and config.lora_alpha == config.r == 2
    assert config.init_lora_weights is True and not config.use_rslora


def test_the_joint_projection_of_attention_is_converted(tmp_path: Path):
    def attention() -> nn.Module:
        torch.manual_seed(0)
        return nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True).eval()

    model = get_peft_model(attention(), OFTConfig(oft_block_size=2, target_modules=["self_attn", "linear1"]))
    move(model, "default", 1)
    x = torch.randn(2, 3, 8)
    save_as_lora(tmp_path, model, None, max_error=1e-5)
    torch.testing.assert_close(loaded(tmp_path, attention())(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_packed_base_is_unpacked_for_the_change_alone(tmp_path: Path):
    bnb = pytest.importorskip("bitsandbytes")

    def packed() -> nn.Module:
        torch.manual_seed(0)
        layer = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        layer.load_state_dict(nn.Linear(64, 64, bias=False).state_dict())
        return nn.Sequential(layer).to("cpu")

    model = get_peft_model(packed(), OFTConfig(oft_block_size=4, target_modules=["0"]))
    move(model, "default", 1)
    x = torch.randn(3, 64)
    save_as_lora(tmp_path, model, None, max_error=1e-5)
    model.add_weighted_adapter(["default"], [1.0], "lora", combination_type="linear")
    expected = model(x)
    with model.disable_adapter():
        assert relative(model(x), expected) > 0.3
    assert relative(loaded(tmp_path, packed())(x), expected) < 0.02  # the kernel rounds the rotated input otherwise
    model.set_adapter("lora")
    assert relative(model(x), expected) < 0.02
