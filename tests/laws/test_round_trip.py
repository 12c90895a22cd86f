"""Saved, loaded onto a fresh base: the same outputs to the bit, from a file that holds each tensor once."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close

from deltatune import Adapter, PeftModel, get_peft_model
from tests.laws.examples import BASES, Case, Holder, adapters, base_values, cases, move, same, stored


def fresh_base(case: Case, dtype=torch.float32) -> Holder:
    torch.manual_seed(0)
    return Holder(BASES[case.base].make()).to(dtype).eval()


def kept_though_derivable(model: PeftModel) -> dict[tuple[int, str], Tensor]:
    """Tensors that a file could leave out, but that an option asks for or rounding decides."""
    return {(id(part), name): tensor for part in stored(model) for name, tensor in part.kept_tensors().items()}


def lossless(model: PeftModel) -> bool:
    return all(part.lossless is True for part in stored(model) if isinstance(part, Adapter))


@pytest.mark.parametrize("case", cases())
def test_a_loaded_adapter_computes_the_same_bits(case: Case, tmp_path):
    model = case.model()
    x = case.batch()
    expected = model(x)
    model.save_pretrained(tmp_path)
    base = fresh_base(case)
    before = base_values(base)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert_close(loaded(x), expected, **({"rtol": 0, "atol": 0} if lossless(model) else {}))
    assert same(base_values(loaded), before)
    assert not any(p.requires_grad for p in loaded.parameters()) and not loaded.training
    ours, theirs = model.peft_config["default"].to_file_dict(), loaded.peft_config["default"].to_file_dict()
    assert ours == theirs


@pytest.mark.parametrize("case", cases())
def test_loading_without_initialising_gives_the_same_bits(case: Case, tmp_path):
    model = case.model()
    x = case.batch()
    model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(fresh_base(case), tmp_path)
    quick = PeftModel.from_pretrained(fresh_base(case), tmp_path, low_cpu_mem_usage=True)
    assert not any(tensor.is_meta for tensor in (*quick.parameters(), *quick.buffers()))
    assert_close(quick(x), plain(x), rtol=0, atol=0)
    found, expected = dict(quick.named_parameters()), dict(plain.named_parameters())
    assert found.keys() == expected.keys()
    assert all(
        found[name].requires_grad == p.requires_grad and found[name].dtype == p.dtype for name, p in expected.items()
    )


@pytest.mark.parametrize("case", cases())
def test_the_file_holds_each_trainable_number_once_and_little_else(case: Case, tmp_path):
    model = case.model()
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    count = sum(p.numel() for p in adapters(model))
    asked = sum(tensor.numel() for tensor in kept_though_derivable(model).values())
    held = sum(tensor.numel() for tensor in tensors.values())
    assert held == count + asked if lossless(model) else held < count + asked
    assert asked or file.stat().st_size <= 1.1 * 4 * count + 8192
    assert all(key.startswith("base_model.") and ".default" not in key for key in tensors)
    assert all(".layer." in key or key.count(".") <= 2 for key in tensors), "of the layer, or what all layers share"
    (length,) = struct.unpack("<Q", file.read_bytes()[:8])
    header = json.loads(file.read_bytes()[8 : 8 + length])
    assert json.loads(header["__metadata__"]["deltatune"])["config"] == json.loads(
        (tmp_path / "adapter_config.json").read_text()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", cases(("linear", "conv1d"), options=False))
def test_on_a_base_of_another_precision(case: Case, dtype, tmp_path):
    model = case.model(dtype)
    x = case.batch(dtype=dtype)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(fresh_base(case, dtype), tmp_path)(x), model(x))


@pytest.mark.parametrize("case", cases(("linear", "embedding"), options=False))
def test_several_adapters_go_to_folders_of_their_names(case: Case, tmp_path):
    model = case.model()
    model.add_adapter("other", case.config())
    move(model, name="other")
    x = case.batch()
    outputs = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        outputs[name] = model(x)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh_base(case), tmp_path)
    loaded.load_adapter(tmp_path / "other", "other")
    assert torch.equal(loaded(x), outputs["default"]), "loading a further adapter must not make it active"
    loaded.set_adapter("other")
    assert torch.equal(loaded(x), outputs["other"])


@pytest.mark.parametrize("case", cases(("linear",), options=False))
def test_saving_a_loaded_adapter_again_gives_the_same_file(case: Case, tmp_path):
    case.model().save_pretrained(tmp_path / "once")
    PeftModel.from_pretrained(fresh_base(case), tmp_path / "once").save_pretrained(tmp_path / "twice")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()


@pytest.mark.parametrize("case", cases(("linear",), options=False, weights=True))
def test_saving_while_merged_saves_the_same_adapter(case: Case, tmp_path):
    model = case.model()
    x = case.batch()
    expected = model(x)
    model.base_model.merge_adapter()
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(fresh_base(case), tmp_path)(x), expected)


@pytest.mark.parametrize("case", cases(("linear",), options=False))
def test_an_adapter_named_like_a_part_of_a_path_is_saved_whole(case: Case, tmp_path):
    for name in ("layer", "0", "lora_A", "base_layer"):
        torch.manual_seed(0)
        model = get_peft_model(nn.Sequential(Holder(nn.Linear(12, 8))).eval(), case.config(), adapter_name=name)
        move(model, name=name)
        model.save_pretrained(tmp_path)
        torch.manual_seed(0)
        loaded = PeftModel.from_pretrained(nn.Sequential(Holder(nn.Linear(12, 8))), tmp_path / name, name)
        x = case.batch()
        assert torch.equal(loaded(x), model(x))
