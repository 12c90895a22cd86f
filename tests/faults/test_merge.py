"""Merging: refused before the first weight changes, undone to the bit, and never stale. Numbers of the fault matrix."""

import copy

import pytest
import torch

from deltatune import IA3Config, LoraConfig, PeftModel, set_peft_model_state_dict
from deltatune.bases.parameter import is_finite
from deltatune.errors import AdapterNameError, MergeError, PeftWarning, StateError
from deltatune.inject import adapted_layers
from deltatune.layer import AdaptedLayer
from deltatune.tuner import Tuner
from tests.core.moe import moe
from tests.core.tiny import batch, logits, tiny
from tests.faults.crowd import stir, two_adapters
from tests.faults.folders import INPUTS, adapted, failing, refused, state, unchanged

CAUSAL = {"task_type": "CAUSAL_LM"}
QUERY = "model.layers.{}.self_attn.q_proj"


def lora_ia3():
    return two_adapters(lambda i: LoraConfig(r=2, **CAUSAL) if i == 0 else IA3Config(**CAUSAL))


def factor(model, layer=2):
    return model.get_base_model().get_submodule(QUERY.format(layer)).lora_B["default"].weight


def pristine(model, before, expected):
    merged = [path for path, layer in adapted_layers(model.get_base_model()) if layer.merged]
    return unchanged(model, before) and not merged and torch.equal(logits(model, INPUTS), expected)


def test_merging_leaves_every_module_in_the_mode_it_is_in():
    model = adapted(lora_dropout=0.1).train()
    layer = model.get_base_model().get_submodule(QUERY.format(0))
    layer.base_layer.eval()
    layer.lora_dropout["default"].eval()
    modes = [module.training for module in model.modules()]
    model.merge_adapter()
    assert [module.training for module in model.modules()] == modes and True in modes and False in modes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e4m3fn])
def test_values_are_finite_though_their_sum_overflows_and_not_though_it_does_not(dtype):
    largest = torch.full((64, 64), torch.finfo(dtype).max).to(dtype)
    assert is_finite(largest) and is_finite(torch.zeros(0).to(dtype))
    for wrong in ([float("nan")], [float("nan"), 1.0]) if dtype.itemsize < 2 else ([float("inf"), float("-inf")],):
        assert not is_finite(torch.tensor(wrong).to(dtype))


# 63 ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("layer", range(3))
def test_a_value_that_is_not_finite_in_any_layer_stops_the_merge_before_the_first(layer, value, safe):
    model = adapted()
    with torch.no_grad():
        factor(model, layer)[1, 1] = value
    before = state(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with refused(MergeError, QUERY.format(layer), "'default'", "not finite"):
            merge(safe_merge=safe)
        assert all(
            torch.equal(tensor, now) or bool(tensor.isnan().any() and now.isnan().any())
            for (tensor, _), (now, _) in zip(before.values(), state(model).values())
        )
        assert isinstance(model.get_base_model().get_submodule(QUERY.format(0)), AdaptedLayer)
    with torch.no_grad():
        factor(model, layer)[1, 1] = 0.5
    expected = logits(model, INPUTS)
    model.merge_adapter()
    assert torch.allclose(logits(model, INPUTS), expected, atol=1e-4)


def test_an_update_that_half_precision_cannot_hold():
    model = PeftModel(tiny("llama").half(), LoraConfig(r=4, **CAUSAL))
    with torch.no_grad():
        factor(model).fill_(1e6)
    with refused(MergeError, QUERY.format(2), "float16", "too large"):
        model.base_model.merge_adapter()
    assert not any(layer.merged for _, layer in adapted_layers(model.get_base_model()))


def test_a_base_that_is_not_finite_itself_is_merged_unless_asked_not_to():
    model = adapted()
    with torch.no_grad():
        model.get_base_model().get_submodule(QUERY.format(1)).base_layer.weight[0, 0] = float("inf")
    with refused(MergeError, QUERY.format(1)):
        model.merge_adapter(safe_merge=True)
    model.merge_adapter()


def test_experts_in_one_parameter_too():
    model = PeftModel(moe("mixtral"), LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"]))
    name, parameter = next((n, p) for n, p in model.named_parameters() if p.requires_grad)
    with torch.no_grad():
        parameter.fill_(float("nan"))
    with refused(MergeError, "experts", "not finite"):
        model.base_model.merge_adapter()
    assert "lora" in name and not any(layer.merged for _, layer in adapted_layers(model.get_base_model()))


# a failure at the k-th layer -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", ["merged_parameters", "swap_in", "_put"])
@pytest.mark.parametrize("at", range(6))
def test_a_failure_at_any_layer_leaves_all_as_they_were(monkeypatch, operation, at):
    model = adapted()
    before, expected = state(model), logits(model, INPUTS)
    with failing(monkeypatch, AdaptedLayer, operation, at, MemoryError("no room")), pytest.raises(MemoryError):
        model.merge_adapter()
    assert pristine(model, before, expected)
    model.merge_adapter()
    model.unmerge_adapter()
    assert pristine(model, before, expected)


@pytest.mark.parametrize("at", range(4))
def test_a_failure_beside_merged_adapters_leaves_those_merged(monkeypatch, at):
    model = lora_ia3()
    model.merge_adapter(["a"])
    merged, expected = state(model), logits(model, INPUTS)
    with failing(monkeypatch, AdaptedLayer, "swap_in", at, MemoryError("no room")), pytest.raises(MemoryError):
        model.merge_adapter(["b"])
    assert unchanged(model, merged) and torch.equal(logits(model, INPUTS), expected)


def test_a_failure_before_unloading_leaves_an_adapted_model(monkeypatch):
    model = adapted()
    before, expected = state(model), logits(model, INPUTS)
    with failing(monkeypatch, Tuner, "_mergeable", 0, MemoryError("no room")), pytest.raises(MemoryError):
        model.merge_and_unload()
    assert pristine(model, before, expected)


# 64 ------------------------------------------------------------------------------------------------------------------


def test_merging_twice_nothing_or_what_is_not_there():
    model = lora_ia3()
    before, expected = state(model), logits(model, INPUTS)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with refused(AdapterNameError, "'nope'", "'a', 'b'"):
            merge(adapter_names=["nope"])
        with refused(StateError, "adapter_names=[]", "unload()"):
            merge(adapter_names=[])
        assert pristine(model, before, expected)
    model.merge_adapter()
    merged = logits(model, INPUTS)
    with pytest.warns(PeftWarning, match=r"nothing of \['a'\] is left"):
        model.merge_adapter()
    assert torch.equal(logits(model, INPUTS), merged)


def test_merging_some_of_the_active_adapters_leaves_the_others_acting():
    model = lora_ia3()
    model.set_adapter(["a", "b"])
    both = logits(model, INPUTS)
    model.merge_adapter(["a"])
    torch.testing.assert_close(logits(model, INPUTS), both, rtol=1e-4, atol=1e-5)
    layer, parts = model.get_base_model().get_submodule("model.layers.0.self_attn.v_proj"), ["a", "b"]
    read = layer.weight + 0
    twin = copy.deepcopy(model)
    plain = twin.merge_and_unload()  # which takes the rest along
    torch.testing.assert_close(logits(plain, INPUTS), both, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(read, layer.stored_weight(parts), rtol=1e-5, atol=1e-6)
    assert torch.equal(logits(model, INPUTS), both)


# 65 ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.filterwarnings("ignore:merge_adapter. rounding")
def test_fifty_merges_leave_no_trace(dtype):
    model = PeftModel(tiny("llama").to(dtype), LoraConfig(r=4, **CAUSAL)).eval()
    stir(model, "default", 3)
    before, expected = state(model), logits(model, INPUTS)
    for _ in range(50):
        model.base_model.merge_adapter()
        model.base_model.unmerge_adapter()
    assert unchanged(model, before) and torch.equal(logits(model, INPUTS), expected)


def test_a_model_that_is_cast_or_moved_while_merged_comes_back_as_that():
    model, twin = adapted(), adapted()
    model.merge_adapter()
    model.double()
    model.unmerge_adapter()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert torch.equal(logits(model, INPUTS), logits(twin.double(), INPUTS))
    model.merge_adapter()
    with model.disable_adapter():
        assert logits(model.to("cpu", torch.float32), INPUTS).dtype == torch.float32


def test_reading_a_weight_while_merged_and_disabled_gives_that_of_the_base():
    model = adapted()
    layer = model.get_base_model().get_submodule(QUERY.format(0))
    base = layer.base_layer.weight.detach().clone()
    model.merge_adapter()
    assert not torch.equal(layer.weight, base)
    with model.disable_adapter():
        assert torch.equal(layer.weight, base)


# 66 ------------------------------------------------------------------------------------------------------------------


def slight():
    """An adapter whose change is close to the rounding of its base."""
    model = PeftModel(tiny("llama").bfloat16(), LoraConfig(r=4, **CAUSAL)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) / 100)
    return model


def test_what_rounding_loses_is_told_or_refused():
    model = slight()
    before, expected = state(model), logits(model, INPUTS)
    with refused(MergeError, "model.layers", "%", "max_loss=0.01"):
        model.base_model.merge_adapter(max_loss=0.01)
    assert pristine(model, before, expected)
    with pytest.warns(PeftWarning, match=r"lost up to \d+% of the update \(at model\.layers"):
        model.base_model.merge_adapter()
    losses = model.base_model.merge_loss
    layer = model.get_base_model().get_submodule(QUERY.format(0))
    change = layer.get_delta_weight("default").float()
    kept = layer.base_layer.weight.float() - layer.stash.weight.float()
    assert losses[QUERY.format(0)] == pytest.approx(((kept - change).norm() / change.norm()).item(), rel=0.02)


@pytest.mark.filterwarnings("error")
def test_where_warnings_are_errors_they_come_before_the_change():
    model = slight()
    before, expected = state(model), logits(model, INPUTS)
    with pytest.raises(PeftWarning, match="rounding"):
        model.base_model.merge_adapter()
    assert pristine(model, before, expected)


# 67 ------------------------------------------------------------------------------------------------------------------


def test_what_would_make_merged_weights_stale_is_refused(tmp_path):
    model = adapted(7)
    adapted(1).save_pretrained(tmp_path)
    before, expected = state(model), logits(model, INPUTS)
    model.merge_adapter()
    merged = logits(model, INPUTS)
    calls = {
        "load": lambda: model.load_adapter(tmp_path, "default"),
        "load another": lambda: model.load_adapter(tmp_path, "other"),
        "fill": lambda: set_peft_model_state_dict(model, adapted(1).adapter_tensors("default")),
        "delete": lambda: model.delete_adapter("default"),
        "add": lambda: model.add_adapter("other", LoraConfig(r=2, **CAUSAL)),
        "train": lambda: model.train()(**batch("llama")),
    }
    for call in calls.values():
        with refused(StateError, "merged", "unmerge_adapter()"):
            call()
        assert torch.equal(logits(model.eval(), INPUTS), merged) and list(model.peft_config) == ["default"]
    model.unmerge_adapter()
    assert pristine(model, before, expected)
    for name in ("load", "load another", "fill", "train"):  # and all of them work then
        calls[name]()
    model.delete_adapter("other")
    calls["add"]()


def test_an_optimizer_step_on_what_is_merged_is_told_and_leaves_the_base():
    model = adapted(7).train()
    base = {key: tensor for key, (tensor, _) in state(model).items() if "lora" not in key}
    model(**batch("llama")).loss.backward()
    model.merge_adapter()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    with refused(StateError, "'default'", "changed since they were merged"):
        logits(model.eval(), INPUTS)
    model.unmerge_adapter()
    now = state(model)
    assert all(torch.equal(now[key][0], tensor) for key, tensor in base.items())
    expected = logits(model, INPUTS)
    model.merge_adapter()
    assert torch.allclose(logits(model, INPUTS), expected, atol=1e-4)


def test_an_adapter_is_saved_the_same_while_it_is_merged(tmp_path):
    model = adapted(7)
    model.save_pretrained(tmp_path / "apart")
    model.merge_adapter()
    model.save_pretrained(tmp_path / "merged")
    one, other = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("apart", "merged"))
    assert one == other


def test_training_another_adapter_on_top_of_a_merged_one():
    model = lora_ia3()
    model.set_adapter("a")
    model.merge_adapter()
    model.base_model.selection.active = ("a", "b")  # what set_adapter makes of it is unmerged
    model.set_requires_grad("a", False)
    model.set_requires_grad("b")
    model.train()(**batch("llama")).loss.backward()
    grown = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert grown and all(".b" in name for name in grown)


# 68 ------------------------------------------------------------------------------------------------------------------


def test_a_bias_that_a_layer_has_no_room_for():
    model = PeftModel(tiny("llama"), LoraConfig(r=4, lora_bias=True, **CAUSAL)).eval()
    stir(model, "default", 2)
    before, expected = state(model), logits(model, INPUTS)
    for merge in (model.base_model.merge_adapter, model.merge_and_unload):
        with refused(MergeError, QUERY.format(0), "bias"):
            merge()
        assert pristine(model, before, expected)


def test_a_tied_embedding_parts_from_its_head_and_both_are_right():
    base = tiny("llama", tie_word_embeddings=True)
    model = PeftModel(base, LoraConfig(r=4, target_modules=["embed_tokens"], **CAUSAL)).eval()
    stir(model, "default", 2)
    expected = logits(model, INPUTS)
    with pytest.warns(PeftWarning, match="no longer share"):
        plain = model.merge_and_unload()
    torch.testing.assert_close(logits(plain, INPUTS), expected, rtol=1e-4, atol=1e-5)
    assert plain.config.tie_word_embeddings is False


# 69 ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"weights": [float("nan"), 1.0]}, ["weights", "finite"]),
        ({"weights": [float("inf"), 1.0]}, ["weights", "finite"]),
        ({"weights": ["x", 1.0]}, ["weights"]),
        ({"weights": [1.0]}, ["weights", "1 of them for 2 adapters"]),
        ({"adapters": []}, ["weights"]),
        ({"adapters": ["a", "nope"]}, ["adapters", "'nope'"]),
        ({"adapter_name": "b"}, ["adapter_name", "there already"]),
        ({"adapter_name": "../b"}, ["'../b'"]),
        ({"combination_type": "mean"}, ["combination_type", "'mean'"]),
        ({"combination_type": "ties"}, ["rank"]),
        ({"combination_type": "svd", "svd_rank": 0}, ["svd_rank"]),
        ({"combination_type": "svd", "svd_rank": True}, ["svd_rank"]),
        ({"combination_type": "dare_linear", "density": 0.0}, ["density"]),
    ],
)
def test_combinations_that_cannot_be(arguments, words):
    model = two_adapters(lambda i: LoraConfig(r=2 + i, **CAUSAL))
    before, expected = state(model), logits(model, INPUTS)
    given = {"adapters": ["a", "b"], "weights": [1.0, 1.0], "adapter_name": "new", "combination_type": "linear"}
    if arguments.get("combination_type") == "ties":
        given["density"] = 0.5
    with refused((MergeError, AdapterNameError), *words):  # type: ignore[arg-type]
        model.add_weighted_adapter(**{**given, **arguments})
    assert pristine(model, before, expected) and list(model.peft_config) == ["a", "b"]
    model.add_weighted_adapter(**given)
    model.merge_adapter(["a"])
    with refused(StateError, "merged"):
        model.add_weighted_adapter(**{**given, "adapter_name": "newer"})
