"""Hot-swap: the new adapter does what it does when it is loaded, or the old one is as it was."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from deltatune import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    UniLoraConfig,
    VeraConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from deltatune.errors import AdapterNameError, ConfigError, MismatchError, PeftError, PeftWarning, StateError
from deltatune.hotswap import (
    check_hotswap_configs_compatible,
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)
from tests.combine.models import IDS, LAYERS, base, lora, move, with_adapters
from tests.core.tiny import batch, logits, tiny


def saved(folder: Path, config: Any, seed: int) -> Path:
    """An adapter of the mixed model in a folder."""
    model = get_peft_model(base(), config)
    move(model, "default", seed)
    model.save_pretrained(folder)
    return folder


def outputs(folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return PeftModel.from_pretrained(base(), folder).to(dtype)(IDS)


def state(model: nn.Module) -> dict[str, Any]:
    """Everything that a swap could change."""
    adapters = {
        f"{name}.{key}": copy.deepcopy(value)
        for name, module in model.named_modules()
        if ".adapters." in name
        for key, value in vars(module).items()
        if key not in ("_parameters", "_buffers", "_modules")
    }
    return {**{key: value.clone() for key, value in model.state_dict().items()}, **adapters}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else str(value) == str(other[key])
        for key, value in one.items()
    )


NEW = {
    "the same": lora(2, 3),
    "another scaling": lora(2, 11),
    "rslora": lora(2, 3, use_rslora=True),
    "a lower rank": lora(2, 5, rank_pattern={"linear": 1, "head": 1}),
    "a higher rank": lora(6, 5),
    "a pattern": lora(4, 5, rank_pattern={"conv": 2}, alpha_pattern={"linear": 1, "embed": 9}),
    "fewer layers": lora(2, 7, ["linear", "grouped"]),
    "fewer layers, random start": lora(2, 7, ["linear", "embed"], init_lora_weights=False),
    "fewer layers, higher rank": lora(4, 7, ["embed", "conv"]),
}


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("new", NEW)
def test_after_the_swap_the_model_is_as_with_the_new_adapter_loaded(new: str, prepared: bool, tmp_path: Path):
    old, folder = saved(tmp_path / "old", lora(2, 3), 1), saved(tmp_path / "new", NEW[new], 2)
    model = PeftModel.from_pretrained(base(), old)
    before = model(IDS)
    if prepared:
        prepare_model_for_compiled_hotswap(model, target_rank=6)
        torch.testing.assert_close(model(IDS), before, rtol=1e-6, atol=1e-6)
    for chosen in (folder, old, folder):
        hotswap_adapter(model, chosen, "default")
        torch.testing.assert_close(model(IDS), outputs(chosen), rtol=1e-5, atol=1e-6)
    model.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(outputs(tmp_path / "again"), model(IDS), rtol=1e-5, atol=1e-6)


def test_a_compiled_model_is_not_compiled_again(tmp_path: Path):
    folders = [saved(tmp_path / new, NEW[new], index) for index, new in enumerate(NEW)]
    model = PeftModel.from_pretrained(base(), folders[0]).double()
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        compiled(IDS)
        for folder in folders:
            hotswap_adapter(compiled, folder, "default")
            torch.testing.assert_close(compiled(IDS), outputs(folder, torch.float64), rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1


def test_without_room_another_rank_is_right_and_compiled_again(tmp_path: Path):
    folders = [saved(tmp_path / "low", lora(2, 3), 1), saved(tmp_path / "high", lora(4, 3), 2)]
    model = PeftModel.from_pretrained(base(), folders[0])
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    with torch.no_grad():
        compiled(IDS)
        hotswap_adapter(compiled, folders[1], "default")
        torch.testing.assert_close(compiled(IDS), outputs(folders[1]), rtol=1e-5, atol=1e-6)
    assert counter.frame_count > 1


REFUSED: dict[str, Any] = {
    "more layers": lora(2, 3, [*LAYERS[:4], "head"]),
    "another method": LoHaConfig(r=2, target_modules=LAYERS[:3]),
    "dropout": lora(2, 3, LAYERS[:3], lora_dropout=0.1),
    "bias": lora(2, 3, ["linear"], lora_bias=True),
}


@pytest.mark.parametrize("new", REFUSED)
def test_a_refused_swap_leaves_the_old_adapter_as_it_was(new: str, tmp_path: Path):
    folder = saved(tmp_path / "new", REFUSED[new], 2)
    model = PeftModel.from_pretrained(base(), saved(tmp_path / "old", lora(2, 3, LAYERS[:4]), 1))
    config, before, expected = model.peft_config["default"], state(model), model(IDS)
    with pytest.raises(MismatchError, match="hot-swap"):
        hotswap_adapter(model, folder, "default")
    assert same(state(model), before) and torch.equal(model(IDS), expected)
    assert model.peft_config["default"] is config


@pytest.mark.parametrize("damage", ["nan", "shape", "missing", "surplus"])
def test_a_damaged_adapter_leaves_the_old_one_as_it_was(damage: str, tmp_path: Path):
    model = PeftModel.from_pretrained(base(), saved(tmp_path / "old", lora(2, 3), 1))
    other = PeftModel.from_pretrained(base(), saved(tmp_path / "new", lora(2, 9), 2))
    tensors = {key: tensor.clone() for key, tensor in other.adapter_tensors("default").items()}
    last = list(tensors)[-1]
    if damage == "nan":
        tensors[last][0] = float("nan")
    elif damage == "shape":
        tensors[last] = tensors[last][:, :1]
    elif damage == "missing":
        del tensors[last]
    else:
        tensors["base_model.model.nowhere.lora_A.weight"] = torch.zeros(2, 6)
    before = state(model)
    with pytest.raises(MismatchError):
        hotswap_adapter_from_state_dict(model, tensors, "default", other.peft_config["default"])
    assert same(state(model), before)


def test_another_base_is_refused(tmp_path: Path):
    other = get_peft_model(base(seed=4), lora(2, 3))
    other.save_pretrained(tmp_path / "other")
    model = PeftModel.from_pretrained(base(), saved(tmp_path / "old", lora(2, 3), 1))
    with pytest.raises(MismatchError, match="another base"):
        hotswap_adapter(model, tmp_path / "other", "default")
    hotswap_adapter(model, tmp_path / "other", "default", allow_base_mismatch=True)


def test_states_in_which_nothing_is_swapped(tmp_path: Path):
    folder = saved(tmp_path, lora(2, 3, ["linear"]), 1)
    model = PeftModel.from_pretrained(base(), folder)
    with pytest.raises(AdapterNameError, match="nobody"):
        hotswap_adapter(model, folder, "nobody")
    model.merge_adapter()
    with pytest.raises(StateError, match="unmerge_adapter"):
        hotswap_adapter(model, folder, "default")


def test_tensors_under_pefts_names_in_a_model_are_taken():
    model = with_adapters({"a": lora(2, 3, ["linear", "embed"])})
    other = with_adapters({"x": lora(2, 9, ["linear", "embed"])}, seed=0)
    move(other, "x", 77)
    tensors = other.adapter_tensors("x")
    inside = {
        key.replace("lora_A.", "lora_A.a.").replace("lora_B.", "lora_B.a.")
        + (".a" if "embedding" in key else ""): value
        for key, value in tensors.items()
    }
    assert "base_model.model.linear.lora_A.a.weight" in inside and "base_model.model.embed.lora_embedding_A.a" in inside
    hotswap_adapter_from_state_dict(model, inside, "a", other.peft_config["x"])
    torch.testing.assert_close(model(IDS), other(IDS))


def test_a_model_of_ones_own_wrapper_is_swapped_too():
    model = inject_adapter_in_model(lora(2, 3, ["linear"]), base())
    other = with_adapters({"default": lora(4, 9, ["linear"])})
    prepare_model_for_compiled_hotswap(model, target_rank=4)
    tensors = {key.removeprefix("base_model.model."): value for key, value in other.adapter_tensors("default").items()}
    hotswap_adapter_from_state_dict(model, tensors, "default", other.peft_config["default"])
    torch.testing.assert_close(model(IDS), other(IDS))


def test_what_layers_share_is_swapped():
    targets = ["linear", "turned", "head"]
    model = with_adapters({"default": VeraConfig(r=3, target_modules=targets, projection_prng_key=1)})
    other = with_adapters({"default": VeraConfig(r=3, target_modules=targets, projection_prng_key=2)})
    move(other, "default", 5)
    hotswap_adapter_from_state_dict(model, other.adapter_tensors("default"), "default", other.peft_config["default"])
    torch.testing.assert_close(model(IDS), other(IDS))


@pytest.mark.parametrize("config", [VeraConfig(r=3), UniLoraConfig(r=2, theta_d_length=9)], ids=["vera", "unilora"])
def test_an_adapter_whose_layers_share_tensors_is_not_taken_for_one_on_other_layers(config: Any):
    few, more = copy.deepcopy(config), copy.deepcopy(config)
    few.target_modules, more.target_modules = ["linear"], ["linear", "turned"]
    model, other = with_adapters({"default": more}), with_adapters({"default": few})
    before = state(model)
    tensors = other.adapter_tensors("default")
    with pytest.raises(MismatchError, match="share tensors"):
        hotswap_adapter_from_state_dict(model, tensors, "default", other.peft_config["default"])
    assert same(state(model), before)


def test_trained_copies_are_swapped():
    config = lora(2, 3, ["linear"], modules_to_save=["head"])
    model, other = with_adapters({"default": config}), with_adapters({"default": copy.deepcopy(config)})
    nn.init.normal_(other.get_base_model().head.modules_to_save["default"].weight)
    hotswap_adapter_from_state_dict(model, other.adapter_tensors("default"), "default", other.peft_config["default"])
    torch.testing.assert_close(model(IDS), other(IDS))


def test_other_adapters_and_the_base_stay_as_they_are():
    model = with_adapters({"a": lora(2, 3), "b": lora(2, 8)})
    other = with_adapters({"a": lora(4, 9)})
    move(other, "a", 5)
    model.set_adapter("b")
    expected, kept = model(IDS), {k: v.clone() for k, v in model.state_dict().items() if ".a." not in f"{k}."}
    hotswap_adapter_from_state_dict(model, other.adapter_tensors("a"), "a", other.peft_config["a"])
    assert torch.equal(model(IDS), expected)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in kept.items())
    model.set_adapter("a")
    torch.testing.assert_close(model(IDS), other(IDS))


def test_a_prefix_is_swapped_for_one_of_the_same_size(tmp_path: Path):
    folders = []
    for index, tokens in enumerate((3, 3, 4)):
        config = PrefixTuningConfig(num_virtual_tokens=tokens, task_type="CAUSAL_LM")
        model = get_peft_model(tiny("llama"), config)
        for parameter in model.prompt_encoder.parameters():
            nn.init.normal_(parameter)
        model.save_pretrained(tmp_path / str(index))
        folders.append(tmp_path / str(index))
    model = PeftModel.from_pretrained(tiny("llama"), folders[0])
    hotswap_adapter(model, folders[1], "default")
    expected = logits(PeftModel.from_pretrained(tiny("llama"), folders[1]), batch("llama"))
    torch.testing.assert_close(logits(model, batch("llama")), expected)
    with pytest.raises(MismatchError, match="num_virtual_tokens"):
        hotswap_adapter(model, folders[2], "default")
    torch.testing.assert_close(logits(model, batch("llama")), expected)


def test_every_answer_under_traffic_is_of_one_adapter(tmp_path: Path):
    folders = [saved(tmp_path / str(seed), lora(2, 3), seed) for seed in (1, 2)]
    with torch.no_grad():  # as those who ask: with gradients the sums are made in another order
        expected = [outputs(folder) for folder in folders]
    model, answers, done = PeftModel.from_pretrained(base(), folders[0]), [], threading.Event()

    def ask() -> None:
        while not done.is_set():
            with torch.no_grad():
                answers.append(model(IDS))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for turn in range(40):
            hotswap_adapter(model, folders[(turn + 1) % 2], "default")
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert len(answers) > 40
    assert all(any(torch.equal(answer, one) for one in expected) for answer in answers)


def test_swaps_of_several_threads_come_one_after_the_other(tmp_path: Path):
    folders = [saved(tmp_path / str(seed), lora(2, seed), seed) for seed in (1, 2, 3)]
    expected = [outputs(folder) for folder in folders]
    model = PeftModel.from_pretrained(base(), folders[0])

    def swap(folder: Path) -> None:
        for _ in range(5):
            hotswap_adapter(model, folder, "default")

    threads = [threading.Thread(target=swap, args=(folder,)) for folder in folders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert any(torch.equal(model(IDS), one) for one in expected)


def test_a_swap_from_within_a_pass_is_refused(tmp_path: Path):
    folder = saved(tmp_path, lora(2, 3), 1)
    model = PeftModel.from_pretrained(base(), folder)
    hook = model.get_base_model().register_forward_hook(lambda *_: hotswap_adapter(model, folder, "default"))
    with pytest.raises(StateError, match="forward pass"):
        model(IDS)
    hook.remove()
    hotswap_adapter(model, folder, "default")
    model(IDS)


def test_a_prepared_model_saves_its_own_rank_and_trains(tmp_path: Path):
    model = with_adapters({"default": lora(2, 3)})
    expected = model(IDS)
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    assert model.get_base_model().linear.lora_A["default"].weight.shape == (6, 6)
    assert model.adapter_tensors("default")["base_model.model.linear.lora_A.weight"].shape == (2, 6)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(outputs(tmp_path), expected)
    for clone in (copy.deepcopy(model), model):
        torch.testing.assert_close(clone(IDS), expected, rtol=1e-6, atol=1e-6)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(IDS).square().sum().backward()
    optimizer.step()
    adapter = model.get_base_model().linear.adapters["default"]
    assert adapter.lora_A.weight[2:].abs().max() == 0 and adapter.lora_B.weight[:, 2:].abs().max() == 0
    assert not torch.allclose(model.eval()(IDS), expected)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_config_that_is_given_says_the_new_rank_with_the_same_scaling(rslora: bool, tmp_path: Path):
    config = lora(2, 3, use_rslora=rslora, rank_pattern={"conv": 4}, alpha_pattern={"conv": 5, "head": 7})
    model = with_adapters({"default": config})
    expected = model(IDS)
    prepare_model_for_compiled_hotswap(model, target_rank=6, config=model.peft_config)
    assert model.peft_config["default"].r == 6 and model.peft_config["default"].rank_pattern == {"conv": 6}
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path)
    assert again.get_base_model().linear.adapters["default"].r == 6
    torch.testing.assert_close(again(IDS), expected, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_prepared_is_refused_before_anything_changes():
    model = with_adapters({"default": lora(2, 3, rank_pattern={"head": 4})})
    before = state(model)
    with pytest.raises(ConfigError, match="rank 2 is no room for a LoRA adapter of rank 4"):
        prepare_model_for_compiled_hotswap(model, target_rank=2)
    with pytest.raises(ConfigError, match="multiple of 2"):
        prepare_model_for_compiled_hotswap(model, target_rank=5)
    with pytest.raises(ConfigError, match="check_compiled"):
        prepare_model_for_compiled_hotswap(model, check_compiled="maybe")
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(StateError, match="before the model is compiled"):
        prepare_model_for_compiled_hotswap(compiled, target_rank=8)
    assert same(state(model), before)
    with pytest.warns(PeftWarning, match="before the model is compiled"):
        prepare_model_for_compiled_hotswap(compiled, target_rank=8, check_compiled="warn")
    with pytest.raises(StateError, match="no adapter"):
        prepare_model_for_compiled_hotswap(base())


def test_configs_are_compatible_or_the_field_is_named():
    check_hotswap_configs_compatible(LoraConfig(r=2, lora_alpha=4), LoraConfig(r=8, use_rslora=True))
    with pytest.raises(ValueError, match=r"LOHA.*LORA"):
        check_hotswap_configs_compatible(LoraConfig(), LoHaConfig())
    with pytest.raises(PeftError, match="lora_dropout") as caught:
        check_hotswap_configs_compatible(LoraConfig(), LoraConfig(lora_dropout=0.1))
    assert caught.value.field == "lora_dropout"
    check_hotswap_configs_compatible(IA3Config(), IA3Config())
