"""Adapters as one: each kind of combination against the dense equation."""

from typing import Any

import pytest
import torch
from torch import nn

from deltatune import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    VeraConfig,
    get_peft_model,
)
from deltatune.combine import dare_linear, dare_ties, magnitude_prune, ties
from deltatune.combine.arguments import TYPES
from deltatune.errors import AdapterNameError, MergeError, PeftError, PeftWarning, StateError
from tests.combine.models import IDS, LAYERS, assert_same, base, deltas, lora, move, summed, with_adapters
from tests.core.tiny import tiny

lossy = pytest.mark.filterwarnings("ignore:add_weighted_adapter. the rank of:deltatune.PeftWarning")


def two(**options: Any) -> PeftModel:
    return with_adapters({"a": lora(2, 3, **options), "b": lora(2, 8, **options)})


def truncated(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    U, S, V = torch.linalg.svd(matrix, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ V[:rank]


@pytest.mark.parametrize("kind", ["linear", "cat"])
@pytest.mark.parametrize("weights", [[1.0, -1.0], [0.3, 2.5], [-1.0, 0.0]])
def test_linear_and_cat_are_the_sum_of_the_changes(kind: str, weights: list[float]):
    model = two()
    errors = model.add_weighted_adapter(["a", "b"], weights, "sum", combination_type=kind)
    assert_same(deltas(model, "sum"), summed(model, ["a", "b"], weights))
    assert max(errors.values()) < 1e-6


def test_a_difference_acts_as_the_difference_of_the_weights():
    model = two(targets=["head"])
    model.add_weighted_adapter(["a", "b"], [1, -1], "a-b", combination_type="linear")
    outputs = {}
    for name in ("a", "b", "a-b"):
        model.set_adapter(name)
        outputs[name] = model(IDS)
    with model.disable_adapter():
        bare = model(IDS)
    torch.testing.assert_close(outputs["a-b"] - bare, outputs["a"] - outputs["b"], rtol=1e-5, atol=1e-5)


def test_any_number_of_adapters_of_unequal_ranks_scalings_and_targets():
    model = with_adapters(
        {
            "a": lora(4, 3, use_rslora=True),
            "b": lora(2, 8, ["linear", "conv", "embed"], rank_pattern={"conv": 4}, alpha_pattern={"linear": 1}),
            "c": lora(2, 1, ["head"]),
            "d": lora(2, 5, ["turned", "grouped"]),
        }
    )
    names, weights = ["a", "b", "c", "d", "a"], [0.5, -1.0, 2.0, 0.25, 1.0]
    model.add_weighted_adapter(names, weights, "sum", combination_type="linear")
    expected = summed(model, names[:4], [1.5, -1.0, 2.0, 0.25])
    assert_same(deltas(model, "sum"), expected)


def test_negation_and_a_multiple_keep_the_rank():
    model = two()
    model.add_weighted_adapter(["a"], [-1], "minus", combination_type="linear")
    config = model.peft_config["minus"]
    assert config.r == config.lora_alpha == 2 and not config.rank_pattern
    assert_same(deltas(model, "minus"), summed(model, ["a"], [-1.0]))


def test_svd_is_the_nearest_of_its_rank():
    model = with_adapters({"a": lora(2, 3), "b": lora(2, 8)})
    model.add_weighted_adapter(["a", "b"], [1, 0.5], "sum", svd_rank=4)
    with pytest.warns(PeftWarning, match="cannot hold"):
        errors = model.add_weighted_adapter(["a", "b"], [1, 0.5], "low")
    full, low = summed(model, ["a", "b"], [1, 0.5]), deltas(model, "low")
    for path in set(LAYERS) - {"grouped"}:
        expected = truncated(full[path], 2)
        torch.testing.assert_close(low[path], expected, rtol=1e-4, atol=1e-5)
        missed = ((expected - full[path]).norm() / full[path].norm()).item()
        assert errors[path] == pytest.approx(missed, abs=1e-5)
    assert_same(deltas(model, "sum"), full)
    assert model.peft_config["low"].r == 2


@lossy
def test_of_a_grouped_convolution_each_group_has_its_nearest():
    model = two(targets=["grouped"])
    model.add_weighted_adapter(["a", "b"], [1, 0.5], "low", svd_rank=2)
    full = summed(model, ["a", "b"], [1, 0.5])["grouped"]
    expected = torch.cat([truncated(rows, 1) for rows in full.chunk(2)])
    torch.testing.assert_close(deltas(model, "low")["grouped"], expected, rtol=1e-4, atol=1e-5)


RULES = {
    "ties_svd": lambda tensors: ties(tensors, [1.0, 0.5], 0.4, "frequency"),
    "magnitude_prune_svd": lambda tensors: magnitude_prune(tensors, [1.0, 0.5], 0.4),
    "dare_linear_svd": lambda tensors: dare_linear(tensors, [1.0, 0.5], 0.4),
    "dare_ties_svd": lambda tensors: dare_ties(tensors, [1.0, 0.5], 0.4, "frequency"),
}


@lossy
@pytest.mark.parametrize("kind", RULES)
def test_rules_of_single_entries_act_on_the_changes(kind: str):
    model = two(targets=["linear"])
    options: dict[str, Any] = {"combination_type": kind, "density": 0.4, "majority_sign_method": "frequency"}
    torch.manual_seed(7)
    model.add_weighted_adapter(["a", "b"], [1.0, 0.5], "sum", svd_rank=6, **options)
    torch.manual_seed(7)
    expected = RULES[kind]([deltas(model, "a")["linear"], deltas(model, "b")["linear"]])
    assert_same(deltas(model, "sum"), {"linear": expected})
    torch.manual_seed(7)
    model.add_weighted_adapter(["a", "b"], [1.0, 0.5], "low", svd_rank=2, **options)
    assert_same(deltas(model, "low"), {"linear": truncated(expected, 2)})


def pruned(factor: torch.Tensor) -> torch.Tensor:
    limit = factor.abs().flatten().sort(descending=True).values[factor.numel() // 2 - 1]
    return torch.where(factor.abs() >= limit, factor, 0)


def test_magnitude_pruning_of_factors_adds_up_each_adapters_product():
    model = two(targets=["linear", "embed"])
    model.add_weighted_adapter(["a", "b"], [1, -2], "sum", combination_type="magnitude_prune", density=0.5)
    for path in ("linear", "embed"):
        adapters = model.get_base_model().get_submodule(path).adapters
        expected = 0
        for name, weight in (("a", 1), ("b", -2)):
            A, B = adapters[name].A, adapters[name].B
            expected = expected + weight * adapters[name].scaling * pruned(B) @ pruned(A)
        torch.testing.assert_close(deltas(model, "sum")[path], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["magnitude_prune", "dare_linear"])
def test_pruning_that_keeps_everything_is_the_sum(kind: str):
    model = two()
    model.add_weighted_adapter(["a", "b"], [1, -2], "sum", combination_type=kind, density=1.0)
    assert_same(deltas(model, "sum"), summed(model, ["a", "b"], [1.0, -2.0]))


def test_dare_draws_from_the_generator_that_is_given():
    model, found = two(), []
    for index, seed in enumerate((3, 3, 4)):
        generator = torch.Generator().manual_seed(seed)
        options: dict[str, Any] = {"combination_type": "dare_linear", "density": 0.5, "generator": generator}
        model.add_weighted_adapter(["a", "b"], [1, 1], f"sum{index}", **options)
        found.append(deltas(model, f"sum{index}"))
    assert_same(found[0], found[1], tolerance=0)
    assert any(not torch.equal(found[0][path], found[2][path]) for path in LAYERS)


@pytest.mark.parametrize("kind", ["linear", "svd"])
def test_adapters_of_any_methods_become_one_lora(kind: str):
    targets = ["linear", "turned", "head"]
    methods = {
        "lora": lora(2, 3, targets),
        "loha": LoHaConfig(r=2, target_modules=targets),
        "oft": OFTConfig(oft_block_size=2, target_modules=targets),
        "vera": VeraConfig(r=3, target_modules=targets),
    }
    model = with_adapters(methods)
    rank = {"svd_rank": 8} if kind == "svd" else {}
    model.add_weighted_adapter(list(methods), [1.0, -0.5, 0.25, 2.0], "sum", combination_type=kind, **rank)
    assert_same(deltas(model, "sum"), summed(model, list(methods), [1.0, -0.5, 0.25, 2.0]))


def test_biases_are_added_up_too():
    model = with_adapters({"a": lora(targets=["linear"], lora_bias=True), "b": lora(targets=["linear", "head"])})
    model.add_weighted_adapter(["a", "b"], [-2, 1], "sum", combination_type="linear")
    layer = model.get_base_model().linear
    expected = layer.base_layer.bias - 2 * (layer.as_map(["a"]).bias - layer.base_layer.bias)
    torch.testing.assert_close(layer.as_map(["sum"]).bias, expected)
    assert model.get_base_model().head.adapters["sum"].lora_B.bias.abs().max() == 0


def test_the_combined_adapter_is_saved_and_loads(tmp_path):
    model = with_adapters({"a": lora(2, 3), "b": lora(4, 8, ["linear", "grouped"])})
    model.add_weighted_adapter(["a", "b"], [1, -0.5], "sum", combination_type="linear")
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    again = PeftModel.from_pretrained(base(), tmp_path / "sum")
    torch.testing.assert_close(again(IDS), model(IDS), rtol=1e-6, atol=1e-6)


def test_layers_whose_path_is_the_end_of_another_have_their_own_rank(tmp_path):
    def nested() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))

    model = get_peft_model(nested(), lora(3, targets=["0", "1.0", "1.1"]), adapter_name="a")
    model.add_adapter("b", lora(1, targets="0"))
    move(model, "a", 1)
    move(model, "b", 2)
    model.add_weighted_adapter(["a", "b"], [1, 1], "sum", combination_type="linear")
    assert deltas(model, "sum").keys() == {"0", "1.0", "1.1"}
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    again = PeftModel.from_pretrained(nested(), tmp_path / "sum", adapter_name="sum")
    assert_same(deltas(again, "sum"), summed(model, ["a", "b"], [1.0, 1.0]))


def test_the_new_adapter_waits_and_nothing_else_changes():
    model = two()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = model(IDS)
    model.add_weighted_adapter(["a", "b"], [1, -1], "sum", combination_type="linear")
    assert model.active_adapters == ["a"] and torch.equal(model(IDS), expected)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    trains = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert trains and not any(".sum." in key for key in trains)


def test_the_sum_of_ia3_is_ia3_with_the_sum_of_the_vectors():
    targets = ["linear", "turned", "head"]
    configs = {name: IA3Config(target_modules=targets, feedforward_modules=["head"]) for name in "ab"}
    model = with_adapters(configs)
    model.add_weighted_adapter(["a", "b"], [0.7, 0.5], "sum")
    model.add_weighted_adapter(["a", "b"], [0.7, 0.5], "changes", combination_type="linear")
    assert model.peft_config["sum"].feedforward_modules == {"head"}
    for path in targets:
        layers = model.get_base_model().get_submodule(path).adapters
        expected = 0.7 * layers["a"].ia3_l + 0.5 * layers["b"].ia3_l
        torch.testing.assert_close(layers["sum"].ia3_l, expected)
    assert_same(deltas(model, "changes"), summed(model, ["a", "b"], [0.7, 0.5]))


def test_where_an_ia3_adapter_is_not_it_counts_as_ones():
    model = with_adapters(
        {
            "a": IA3Config(target_modules=["linear", "head"], feedforward_modules=[]),
            "b": IA3Config(target_modules=["head"], feedforward_modules=[]),
        }
    )
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "mean")
    layers = model.get_base_model().linear.adapters
    torch.testing.assert_close(layers["mean"].ia3_l, 0.5 * layers["a"].ia3_l + 0.5)


def test_ia3_that_cannot_be_one_vector_is_refused_and_becomes_lora_when_asked():
    model = with_adapters(
        {
            "a": IA3Config(target_modules=["linear"], feedforward_modules=["linear"]),
            "b": IA3Config(target_modules=["linear"], feedforward_modules=[]),
        }
    )
    with pytest.raises(MergeError, match="linear"):
        model.add_weighted_adapter(["a", "b"], [1, 1], "sum")
    assert list(model.peft_config) == ["a", "b"]
    with pytest.raises(MergeError, match="svd_rank"):
        model.add_weighted_adapter(["a", "b"], [1, 1], "sum", combination_type="ties_svd", density=0.5)
    model.add_weighted_adapter(["a", "b"], [1, 1], "sum", svd_rank=6)
    assert_same(deltas(model, "sum"), summed(model, ["a", "b"], [1.0, 1.0]))


def trained_heads() -> PeftModel:
    configs = {name: lora(targets=["linear"], modules_to_save=["head"] if name != "c" else None) for name in "abc"}
    model = with_adapters(configs)
    for name in "ab":
        nn.init.normal_(model.get_base_model().head.modules_to_save[name].weight)
    return model


def test_a_trained_copy_goes_along():
    model = trained_heads()
    model.add_weighted_adapter(["c", "a"], [1, 0.5], "sum", combination_type="linear")
    copies = model.get_base_model().head.modules_to_save
    assert torch.equal(copies["sum"].weight, copies["a"].weight) and copies["sum"].weight is not copies["a"].weight
    assert model.peft_config["sum"].modules_to_save == ["head"]


def test_two_different_copies_of_a_module_are_refused():
    model = trained_heads()
    with pytest.raises(MergeError, match="'a', 'b' have a trained copy of 'head'") as caught:
        model.add_weighted_adapter(["a", "b"], [1, 1], "sum", combination_type="linear")
    assert caught.value.field == "adapters" and "sum" not in model.peft_config


def test_rows_trained_beside_lora_are_counted_once():
    model = get_peft_model(tiny("gpt2"), lora(targets=["c_attn"], trainable_token_indices=[1, 5]), "a")
    model.add_adapter("b", lora(targets=["c_attn"]))
    move(model, "a", 1)
    move(model, "b", 2)
    model.add_weighted_adapter(["a", "b"], [1, -1], "sum", combination_type="linear")
    assert_same(deltas(model, "sum"), summed(model, ["a", "b"], [1.0, -1.0]))
    assert {"transformer.wte", "lm_head"} <= deltas(model, "sum").keys()  # the head follows the embedding it is tied to


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "nan": ({"weights": [float("nan"), 1]}, "weights"),
    "infinite": ({"weights": [1, float("inf")]}, "weights"),
    "count": ({"weights": [1]}, "weights"),
    "words": ({"weights": ["one", 2]}, "weights"),
    "none": ({"adapters": [], "weights": []}, "adapters"),
    "name exists": ({"adapter_name": "b"}, "adapter_name"),
    "kind": ({"combination_type": "sum"}, "combination_type"),
    "rank": ({"svd_rank": 0}, "svd_rank"),
    "clamp": ({"svd_clamp": 1.5}, "svd_clamp"),
    "driver": ({"svd_driver": "fast"}, "svd_driver"),
    "no density": ({"combination_type": "ties_svd"}, "density"),
    "density": ({"combination_type": "dare_ties", "density": 1.5}, "density"),
    "sign": ({"combination_type": "ties", "density": 0.5, "majority_sign_method": "most"}, "majority_sign_method"),
    "ranks differ": ({"combination_type": "ties", "density": 0.5, "adapters": ["a", "c"]}, "combination_type"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_argument_is_named_and_nothing_changes(wrong: str):
    changes, field = WRONG[wrong]
    model = with_adapters({"a": lora(2), "b": lora(2), "c": lora(4)})
    before, modules = list(model.peft_config), [name for name, _ in model.named_modules()]
    arguments = {"adapters": ["a", "b"], "weights": [1, 1], "adapter_name": "sum", **changes}
    with pytest.raises(MergeError, match=field) as caught:
        model.add_weighted_adapter(**arguments)
    assert caught.value.field == field
    assert list(model.peft_config) == before and [name for name, _ in model.named_modules()] == modules


def test_adapters_that_cannot_be_combined_say_why():
    model = two(targets=["linear"])
    with pytest.raises(AdapterNameError, match="'c'"):
        model.add_weighted_adapter(["a", "c"], [1, 1], "sum")
    model.merge_adapter()
    with pytest.raises(StateError, match="unmerge_adapter"):
        model.add_weighted_adapter(["a", "b"], [1, 1], "sum")
    model.unmerge_adapter()
    llama = get_peft_model(tiny("llama"), PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "prefix")
    with pytest.raises(MergeError, match="cannot be combined"):
        llama.add_weighted_adapter(["prefix"], [1], "sum")


def test_an_svd_of_adapters_without_a_rank_asks_for_one():
    model = with_adapters({"a": OFTConfig(oft_block_size=2, target_modules=["linear"])})
    with pytest.raises(MergeError, match="svd_rank"):
        model.add_weighted_adapter(["a"], [1], "sum")


def test_a_failure_in_the_last_step_takes_the_adapter_off_again(monkeypatch: pytest.MonkeyPatch):
    from deltatune.combine.lora import Copies

    model = two()
    expected, names = model(IDS), [name for name, _ in model.named_modules()]
    monkeypatch.setattr(Copies, "fill", lambda *_: (_ for _ in ()).throw(MergeError("no room")))
    with pytest.raises(PeftError, match="no room"):
        model.add_weighted_adapter(["a", "b"], [1, 1], "sum", combination_type="cat")
    assert [name for name, _ in model.named_modules()] == names and torch.equal(model(IDS), expected)


@lossy
@pytest.mark.parametrize("kind", TYPES)
def test_every_kind_runs_on_every_kind_of_layer_in_half_precision(kind: str):
    model = with_adapters({"a": lora(2, 3), "b": lora(2, 8)}, model=base().to(torch.bfloat16))
    model.add_weighted_adapter(["a", "b"], [1, 0.5], "sum", combination_type=kind, density=0.6)
    model.set_adapter("sum")
    assert model(IDS).isfinite().all()
    assert model.get_base_model().linear.adapters["sum"].lora_A.weight.dtype == torch.float32


@lossy
def test_a_clamp_limits_the_entries_of_the_factors():
    model = two(targets=["linear"])
    model.add_weighted_adapter(["a", "b"], [1, 0.5], "free", svd_rank=3)
    model.add_weighted_adapter(["a", "b"], [1, 0.5], "clamped", svd_rank=3, svd_clamp=0.9)
    adapters = model.get_base_model().linear.adapters
    free, clamped = ([a.lora_A.weight, a.lora_B.weight] for a in (adapters["free"], adapters["clamped"]))
    limit = torch.quantile(torch.cat([free[1].flatten(), free[0].flatten()]), 0.9)
    for before, after in zip(free, clamped):
        torch.testing.assert_close(after, before.clamp(-limit, limit))


def test_the_base_model_of_a_peft_model_has_the_verb_as_in_peft():
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(6, 4)), config, "a")
    model.add_adapter("b", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    tuner = model.base_model
    tuner.add_weighted_adapter(["a", "b"], [0.5, 2.0], "both", combination_type="linear")
    assert sorted(model.peft_config) == ["a", "b", "both"]
    layer = model.get_base_model()[0]
    expected = 0.5 * layer.get_delta_weight("a") + 2 * layer.get_delta_weight("b")
    torch.testing.assert_close(layer.get_delta_weight("both"), expected)
    assert tuner.supports_lora_conversion("both")
    tuner.set_requires_grad("b")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[-2] for name in trained} == {"a", "b"}
