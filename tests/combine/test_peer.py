"""Where PEFT is right, its results; where it is not, by how much. What we write, PEFT reads."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import deltatune
from deltatune import save_as_lora
from tests.combine.models import deltas, summed
from tests.core.tiny import batch, logits, tiny
from tests.peer.pairs import loaded_by_peft, peft, saved_by_peft, scatter

pytestmark = pytest.mark.filterwarnings("ignore")
TARGETS = {"llama": ["q_proj", "o_proj", "embed_tokens"], "gpt2": ["c_attn", "c_fc", "wte"]}


def pair(arch: str, folder: Path, targets: list[str], name: str = "LoraConfig", **options: Any) -> tuple[Any, Any]:
    """PEFT's model with adapters "a" and "b", and ours with the same."""
    torch.manual_seed(0)
    config = getattr(peft, name)(target_modules=targets, **options)
    theirs = peft.get_peft_model(tiny(arch), config, adapter_name="a")
    theirs.add_adapter("b", copy.deepcopy(config))
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_("lora_" in name or "ia3_" in name)
    saved_by_peft(scatter(theirs, 5), folder)
    ours = deltatune.PeftModel.from_pretrained(tiny(arch), folder / "a", adapter_name="a")
    ours.load_adapter(folder / "b", "b")
    return theirs, ours


def their_deltas(model: Any, name: str) -> dict[str, torch.Tensor]:
    """(out, in), by path."""
    found = {}
    for path, module in model.get_base_model().named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            delta = module.get_delta_weight(name).detach()
            found[path] = delta if isinstance(module.get_base_layer(), nn.Linear) else delta.T  # Conv1D, Embedding
    return found


AGREE: dict[str, dict[str, Any]] = {
    "svd": {},
    "cat": {},
    "ties": {"density": 0.5},
    "ties_svd": {"density": 0.5, "majority_sign_method": "frequency"},
    "dare_ties": {"density": 0.5},
    "dare_linear_svd": {"density": 0.5},
    "dare_ties_svd": {"density": 0.5},
    "magnitude_prune_svd": {"density": 0.5},
}


# what is drawn for a matrix that PEFT holds turned round falls on other entries
LINEAR = ["q_proj", "o_proj", "down_proj"]
CASES = [(kind, arch) for kind in AGREE for arch in TARGETS if "dare" not in kind or arch == "llama"]


@pytest.mark.parametrize(("kind", "arch"), CASES)
def test_the_combined_change_is_that_of_peft(kind: str, arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    models = pair(arch, tmp_path, LINEAR if "dare" in kind else TARGETS[arch], r=4, lora_alpha=6)
    draw = torch.bernoulli
    for model in models:  # PEFT draws the start of the new adapter in between
        own = torch.Generator().manual_seed(11)
        monkeypatch.setattr(torch, "bernoulli", lambda share, generator=None, own=own: draw(share, generator=own))
        model.add_weighted_adapter(["a", "b"], [0.7, -0.4], "sum", combination_type=kind, **AGREE[kind])
    expected, got = their_deltas(models[0], "sum"), deltas(models[1], "sum")
    assert got.keys() == expected.keys()
    for path in expected:
        assert_close(got[path], expected[path], rtol=1e-5, atol=1e-5)


def test_the_multiple_of_one_adapter_has_pefts_factors(tmp_path: Path):
    theirs, ours = pair("llama", tmp_path, ["q_proj"], r=4, lora_alpha=6)
    for model in (theirs, ours):
        model.add_weighted_adapter(["a"], [-0.7], "minus", combination_type="linear")
    layer = "model.layers.0.self_attn.q_proj"
    mine, other = (model.get_base_model().get_submodule(layer) for model in (ours, theirs))
    for factor in ("lora_A", "lora_B"):
        assert_close(getattr(mine, factor)["minus"].weight, getattr(other, factor)["minus"].weight.detach())


def test_linear_of_two_adapters_is_their_sum_where_peft_is_far_from_it(tmp_path: Path):
    theirs, ours = pair("llama", tmp_path, ["q_proj"], r=4, lora_alpha=6)
    for model in (theirs, ours):
        model.add_weighted_adapter(["a", "b"], [1.0, -1.0], "difference", combination_type="linear")
    wanted = summed(ours, ["a", "b"], [1.0, -1.0])
    for path, delta in wanted.items():
        assert (deltas(ours, "difference")[path] - delta).norm() < 1e-5 * delta.norm()
        assert (their_deltas(theirs, "difference")[path] - delta).norm() > 0.5 * delta.norm()


def test_the_sum_of_ia3_is_that_of_peft(tmp_path: Path):
    options = {"name": "IA3Config", "feedforward_modules": ["down_proj"]}
    theirs, ours = pair("llama", tmp_path, ["k_proj", "down_proj"], **options)
    for model in (theirs, ours):
        model.add_weighted_adapter(["a", "b"], [0.8, 0.4], "sum")
        model.set_adapter("sum")
    assert_close(logits(ours, batch("llama")), logits(theirs, batch("llama")), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arch", TARGETS)
def test_peft_reads_a_combined_adapter(arch: str, tmp_path: Path):
    _, ours = pair(arch, tmp_path / "theirs", TARGETS[arch], r=4, lora_alpha=6, rank_pattern={r"0\..*": 2})
    ours.add_weighted_adapter(["a", "b"], [0.8, -0.4], "sum", combination_type="linear")
    ours.set_adapter("sum")
    ours.save_pretrained(tmp_path / "ours", selected_adapters=["sum"])
    theirs = loaded_by_peft(tiny(arch), tmp_path / "ours" / "sum")
    assert_close(logits(theirs, batch(arch)), logits(ours, batch(arch)), rtol=1e-5, atol=1e-5)


CONVERTIBLE: dict[str, dict[str, Any]] = {
    "LoHaConfig": {"r": 2},
    "LoKrConfig": {"r": 2},
    "DeloraConfig": {"r": 4, "delora_lambda": 1},
    "MissConfig": {"r": 4},
    "VeraConfig": {"r": 4},
    "GraloraConfig": {"r": 4},
    "FourierFTConfig": {"n_frequency": 40, "init_weights": False},
}


@pytest.mark.parametrize("method", CONVERTIBLE)
def test_a_conversion_by_energy_has_pefts_ranks_and_change(method: str, tmp_path: Path):
    config = getattr(peft, method)(target_modules=["q_proj", "o_proj"], **CONVERTIBLE[method])
    theirs = scatter(peft.get_peft_model(tiny("llama"), config), 5)
    ours = deltatune.PeftModel.from_pretrained(tiny("llama"), saved_by_peft(theirs, tmp_path / "theirs"))
    tensors, expected = deltatune.convert_to_lora(ours, 0.9)[1], peft.convert_to_lora(theirs, 0.9)[1]
    native = method == "MissConfig"  # PEFT gives its own factors, whatever was asked for
    assert tensors.keys() == expected.keys()
    for key in (key for key in tensors if ".lora_B." in key):
        down = key.replace("lora_B", "lora_A")
        if not native:
            assert tensors[key].shape == expected[key].shape
            assert_close(tensors[key] @ tensors[down], expected[key] @ expected[down], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", TARGETS)
def test_peft_runs_a_converted_adapter_as_we_do(arch: str, tmp_path: Path):
    config = deltatune.LoHaConfig(r=2, target_modules=[*TARGETS[arch][:2]], modules_to_save=["lm_head"])
    ours = scatter(deltatune.get_peft_model(tiny(arch), config), 4)
    save_as_lora(tmp_path, ours, rank=None, max_error=1e-4)
    for loaded in (loaded_by_peft(tiny(arch), tmp_path), deltatune.PeftModel.from_pretrained(tiny(arch), tmp_path)):
        assert_close(logits(loaded, batch(arch)), logits(ours, batch(arch)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("prepared", [False, True])
def test_hot_swapping_pefts_adapters_gives_what_it_gives_in_peft(prepared: bool, tmp_path: Path):
    from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

    from deltatune import hotswap

    options = ({"r": 4, "lora_alpha": 6}, {"r": 2, "lora_alpha": 7}, {"r": 8, "lora_alpha": 3})
    folders = []
    for index, sizes in enumerate(options):
        config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], **sizes)
        model = scatter(peft.get_peft_model(tiny("llama"), config), index)
        folders.append(saved_by_peft(model, tmp_path / str(index)))
    theirs, ours = (library.PeftModel.from_pretrained(tiny("llama"), folders[0]) for library in (peft, deltatune))
    if prepared:
        prepare_model_for_compiled_hotswap(theirs, target_rank=8)
        hotswap.prepare_model_for_compiled_hotswap(ours, target_rank=8)
    for folder in (folders[1], folders[2], folders[0]):
        hotswap_adapter(theirs, folder, "default", torch_device="cpu")
        hotswap.hotswap_adapter(ours, folder, "default", torch_device="cpu")
        expected = logits(loaded_by_peft(tiny("llama"), folder), batch("llama"))
        assert_close(logits(theirs, batch("llama")), expected, rtol=1e-5, atol=1e-5)
        assert_close(logits(ours, batch("llama")), expected, rtol=1e-5, atol=1e-5)
