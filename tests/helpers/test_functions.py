"""Signatures, folders, verbs on bare models, base weights, condition numbers, devices: beside PEFT's."""

import contextlib
import copy
import inspect
import sys
import types

import peft
import peft.functional
import peft.helpers
import peft.utils.integrations
import pytest
import torch
from torch import nn
from transformers import DynamicCache

import deltatune
import deltatune.functional
from deltatune import LoraConfig, get_peft_model, helpers, inject_adapter_in_model
from deltatune.errors import AdapterNameError, ConfigError, MismatchError, StateError, TargetError
from deltatune.lora.variants.caching import dora_caching
from tests.core.tiny import batch, logits, tiny
from tests.laws.examples import LAYER_METHODS, move


def lora(model: nn.Module, **options):
    torch.manual_seed(1)
    found = get_peft_model(model, LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], **options}))
    move(found)
    return found


# ---------------------------------------------------------------------------------------------------------- signatures


@pytest.mark.parametrize("name,task", [("llama", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM"), ("bert", None)])
def test_signatures_become_the_base_models(name, task):
    model = get_peft_model(tiny(name), LoraConfig(r=2, task_type=task, target_modules="all-linear"))
    inputs, base = batch(name), model.get_base_model()
    before = logits(model, inputs)
    helpers.update_signature(model)
    assert inspect.signature(model.forward) == inspect.signature(base.forward)
    assert model.forward.__doc__ == base.forward.__doc__
    if hasattr(base, "generate"):
        assert inspect.signature(model.generate) == inspect.signature(base.generate)
    assert torch.equal(logits(model, inputs), before)
    twin = copy.deepcopy(model)
    move(twin)
    assert not torch.equal(logits(twin, inputs), before) and torch.equal(logits(model, inputs), before)


def test_one_signature_alone_and_an_unknown_one():
    model = lora(tiny("llama"))
    helpers.update_signature(model, "generate")
    assert "forward" not in vars(model) and "generate" in vars(model)
    with pytest.raises(ConfigError, match="method='train'"):
        helpers.update_signature(model, "train")


# ------------------------------------------------------------------------------------------------------------- folders


def test_a_folder_is_an_adapters_or_not(tmp_path):
    lora(tiny("llama")).save_pretrained(tmp_path / "adapter")
    (tmp_path / "other").mkdir()
    assert helpers.check_if_peft_model(str(tmp_path / "adapter"))
    assert not helpers.check_if_peft_model(str(tmp_path / "other"))
    assert not helpers.check_if_peft_model(str(tmp_path / "missing"))


# ---------------------------------------------------------------------------------------------------------------- DoRA


def test_caching_for_dora_is_asked_for_in_a_block_or_for_good():
    assert not dora_caching()
    caching = helpers.DoraCaching()
    with caching:
        assert dora_caching()
        with helpers.DoraCaching(enabled=False):
            assert not dora_caching()
        with caching:
            assert dora_caching()
        assert dora_caching()
    assert not dora_caching()
    caching(enabled=True)
    assert dora_caching()
    caching(enabled=False)
    assert not dora_caching()


# --------------------------------------------------------------------------------------------------------------- verbs


def injected() -> nn.Module:
    torch.manual_seed(1)
    model = tiny("llama")
    for name in ("one", "two"):
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), model, name)
    helpers.set_adapter(model, "one")
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def trained(model: nn.Module) -> set[str]:
    return {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}  # ...lora_A.one.weight


def test_verbs_act_on_a_model_without_a_wrapper():
    model, inputs = injected(), batch("llama")
    assert trained(model) == {"one"}
    first = logits(model, inputs)
    helpers.set_adapter(model, "two")
    assert trained(model) == {"two"} and not torch.equal(logits(model, inputs), first)
    helpers.set_adapter(model, ["one", "two"], inference_mode=True)
    assert trained(model) == set()
    helpers.set_requires_grad(model, "one")
    assert trained(model) == {"one"}
    helpers.set_requires_grad(model, ["one", "two"], requires_grad=False)
    assert trained(model) == set()
    assert helpers.delete_adapter(model, "two", prefix="lora_") == ["one"]
    assert torch.equal(logits(model, inputs), first)
    assert helpers.delete_adapter(model, "one") is None
    assert torch.equal(logits(model, inputs), logits(tiny("llama"), inputs))


def test_deleting_the_active_adapter_activates_the_next():
    model, inputs = injected(), batch("llama")
    helpers.set_adapter(model, "two")
    second = logits(model, inputs)
    helpers.set_adapter(model, "one")
    assert helpers.delete_adapter(model, "one") == ["two"]
    assert trained(model) == {"two"} and torch.equal(logits(model, inputs), second)


@pytest.mark.parametrize("verb", ["set_adapter", "delete_adapter", "set_requires_grad", "cast_adapter_dtype"])
def test_an_unknown_adapter_is_named_and_nothing_changes(verb):
    model = injected()
    before, inputs = trained(model), batch("llama")
    out = logits(model, inputs)
    with pytest.raises(AdapterNameError, match=r"'three'; there are \['one', 'two'\]"):
        getattr(helpers, verb)(model, "three")
    assert trained(model) == before and torch.equal(logits(model, inputs), out)


def test_matched_modules_are_the_peers():
    ours, theirs = (
        library.get_peft_model(tiny("llama"), library.LoraConfig(target_modules=["q_proj"]))
        for library in (deltatune, peft)
    )
    found = helpers.inspect_matched_modules(ours)
    before = [name for name, _ in tiny("llama").named_modules() if name]
    expected = [name for name in before if name.endswith("q_proj")]
    others = peft.tuners.tuners_utils.inspect_matched_modules(theirs.base_model)
    assert found["matched"] == expected == others["matched"]
    assert found == helpers.inspect_matched_modules(ours.base_model)
    assert set(before) <= {*found["matched"], *found["unmatched"]}
    with pytest.raises(AdapterNameError):
        helpers.inspect_matched_modules(ours, "other")


# --------------------------------------------------------------------------------------------------------- base weights


@pytest.mark.parametrize("name", ["lora", "vera", "trainable_tokens", "bottleneck"])
def test_the_base_under_its_adapters_has_the_keys_and_bits_it_had(name):
    if name not in LAYER_METHODS:
        pytest.skip("not among the chosen methods")
    base = tiny("llama")
    before = {key: value.clone() for key, value in base.state_dict().items()}
    kind = LAYER_METHODS[name].config
    targets = {"trainable_tokens": ["embed_tokens"], "bottleneck": ["mlp"]}.get(name, ["q_proj", "v_proj"])
    options = {"token_indices": [1, 2]} if name == "trainable_tokens" else {"modules_to_save": ["lm_head"]}
    model = get_peft_model(base, kind(target_modules=targets, **options))
    move(model)
    found = helpers.get_base_model_state_dict(model)
    assert list(found) == list(before)
    assert all(torch.equal(found[key], before[key]) for key in before)
    others = {key: torch.randn_like(value) for key, value in before.items()}
    assert helpers.set_base_model_state_dict(model, others) == ([], [])
    again = helpers.get_base_model_state_dict(model)
    fresh = tiny("llama")
    fresh.load_state_dict(others)
    assert all(torch.equal(again[key], value) for key, value in fresh.state_dict().items())
    with model.disable_adapter():
        assert torch.equal(logits(model, batch("llama")), logits(fresh, batch("llama")))


def test_merged_adapters_are_not_in_the_base_and_it_cannot_be_filled_under_them():
    base = tiny("llama")
    before = {key: value.clone() for key, value in base.state_dict().items()}
    model = lora(base)
    model.base_model.merge_adapter()
    found = helpers.get_base_model_state_dict(model)
    assert all(torch.equal(found[key], before[key]) for key in before)
    with pytest.raises(StateError, match="merged"):
        helpers.set_base_model_state_dict(model, before)


def test_what_does_not_fit_the_base_is_refused_before_anything_changes():
    model = lora(tiny("llama"))
    before = {key: value.clone() for key, value in helpers.get_base_model_state_dict(model).items()}
    first, *others = before
    with pytest.raises(RuntimeError, match="1 keys are missing"):
        helpers.set_base_model_state_dict(model, {key: before[key] * 2 for key in others})
    with pytest.raises(MismatchError, match="1 unexpected"):
        helpers.set_base_model_state_dict(model, {**before, "extra": torch.zeros(1)})
    with pytest.raises(MismatchError, match=r"is \(.*\) here and \(3,\)"):
        wrong = {**{key: before[key] * 2 for key in others}, first: torch.zeros(3)}
        helpers.set_base_model_state_dict(model, wrong)
    assert all(torch.equal(value, before[key]) for key, value in helpers.get_base_model_state_dict(model).items())
    partly = helpers.set_base_model_state_dict(model, {first: before[first] * 2, "extra": before[first]}, strict=False)
    assert partly.missing_keys == others and partly.unexpected_keys == ["extra"]
    assert torch.equal(helpers.get_base_model_state_dict(model)[first], before[first] * 2)


def test_prompts_leave_the_keys_of_the_base_alone():
    from deltatune import PrefixTuningConfig

    base = tiny("llama")
    keys = list(base.state_dict())
    model = get_peft_model(base, PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    assert list(helpers.get_base_model_state_dict(model)) == keys


# --------------------------------------------------------------------------------------------------- condition numbers


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 12, 8))
        self.down_proj = nn.Parameter(torch.randn(3, 8, 6) @ torch.diag(torch.logspace(0, 2, 6)))
        self.linear = nn.Linear(8, 8)


def test_the_best_conditioned_layers_are_the_peers():
    model = tiny("llama")
    assert helpers.find_kappa_target_modules(model, 0.3, show_progress=False) == (
        peft.helpers.find_kappa_target_modules(model, 0.3, show_progress=False)
    )
    experts = nn.ModuleDict({"a": Experts(), "b": Experts()})
    ours = helpers.KappaTuneSelector(experts, show_progress=False)
    theirs = peft.helpers.KappaTuneSelector(experts, show_progress=False)
    for choice in ({}, {"top_p": 0.5}, {"num_modules": 3}, {"threshold": 30.0}):
        assert ours.get_best_targets(**choice) == theirs.get_best_targets(**choice)
        assert ours.get_best_target_parameters(**choice) == theirs.get_best_target_parameters(**choice)
    assert ours.get_best_target_parameters(num_modules=1)[0].endswith("gate_up_proj")


def test_condition_numbers_leave_out_what_is_too_large_and_see_layers_stored_the_other_way():
    linear = nn.Sequential(nn.Linear(4, 6), nn.Linear(4, 20))
    assert helpers.KappaTuneSelector(linear, 10, show_progress=False).get_best_targets() == ["0"]
    assert peft.helpers.KappaTuneSelector(linear, 10, show_progress=False).get_best_targets() == ["0"]
    gpt2 = helpers.find_kappa_target_modules(tiny("gpt2"), 1.0, show_progress=False)
    assert any(path.endswith("c_attn") for path in gpt2["target_modules"])


# ------------------------------------------------------------------------------------------------------------- devices


class Spread(nn.Module):
    def __init__(self, placed, layers: int = 3) -> None:
        super().__init__()
        self.config = tiny("llama").config
        self.config.num_hidden_layers = layers
        self.hf_device_map = placed


@pytest.mark.parametrize(
    "placed",
    [
        {"": 0},
        {"embed": "cpu", "layers.0": 0, "layers.1": 1, "layers.2": "disk", "head": 1},
        {"model.layers.0": "meta", "model.layers.1": "meta", "model.layers.2": "cpu"},
    ],
)
def test_layers_are_found_on_the_devices_the_peer_finds(placed):
    model = Spread(placed)
    assert helpers.get_layer_device_map(model) == peft.utils.integrations.get_layer_device_map(model)


def test_a_cache_follows_its_layers():
    model = Spread({"layers.0": "cpu", "layers.1": "meta", "layers.2": "meta"})
    cache = DynamicCache()
    for layer in range(3):
        cache.update(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4), layer)
    helpers.map_cache_to_layer_device_map(model, cache)
    assert [layer.keys.device.type for layer in cache.layers] == ["meta"] * 3  # the CPU is where they rest only
    assert helpers.get_layer_device_map(nn.Linear(2, 2)) is None
    helpers.map_cache_to_layer_device_map(nn.Linear(2, 2), cache)
    with pytest.raises(StateError, match="layer 2 is in no entry"):
        helpers.get_layer_device_map(Spread({"layers.0": 0, "layers.1": 0}))


# ----------------------------------------------------------------------------------------------------------- precision


def test_a_half_precision_adapter_is_widened_and_its_activations_are_not():
    base = tiny("llama").to(torch.bfloat16)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]), autocast_adapter_dtype=False)
    own = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in own} == {torch.bfloat16}
    helpers.cast_adapter_dtype(model, "default", autocast_adapter_dtype=False)
    assert {p.dtype for p in own} == {torch.bfloat16}
    helpers.cast_adapter_dtype(model, "default")
    assert {p.dtype for p in own} == {torch.float32}  # the same objects, which an optimizer may hold
    assert logits(model, batch("llama")).dtype == torch.bfloat16


def test_frozen_parameters_are_narrowed_and_trained_ones_kept_wide():
    model = lora(tiny("llama"))
    model.register_buffer("steps", torch.arange(3))
    model.codes = nn.Parameter(torch.arange(4, dtype=torch.uint8), requires_grad=False)
    helpers.cast_mixed_precision_params(model, torch.bfloat16)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    frozen = {p.dtype for name, p in model.named_parameters() if not p.requires_grad and name != "codes"}
    assert frozen == {torch.bfloat16}
    assert model.codes.dtype == torch.uint8 and model.steps.dtype == torch.int64
    with pytest.raises(ConfigError, match="dtype"):
        helpers.cast_mixed_precision_params(model, torch.int8)


def test_inputs_are_never_cast():
    model = lora(tiny("llama").to(torch.bfloat16))
    seen = []
    layer = next(m for m in model.modules() if hasattr(m, "adapters"))
    layer.adapters["default"].register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    with helpers.disable_input_dtype_casting(model):
        inside = logits(model, batch("llama"))
    assert torch.equal(inside, logits(model, batch("llama"))) and set(seen) == {torch.bfloat16}


# -------------------------------------------------------------------------------------------------------------- sharded


def test_units_of_fsdp_are_blocks_adapters_and_trained_layers(monkeypatch):
    model = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    policy = helpers.fsdp_auto_wrap_policy(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    modules = {**dict(model.named_modules()), "adapter": layer.adapters["default"]}
    chosen = [name for name, m in modules.items() if policy(module=m, recurse=False, nonwrapped_numel=0)]
    kinds = {type(modules[name]).__name__ for name in chosen}
    assert kinds == {"LlamaDecoderLayer", "LoRA", "Linear"}
    trained_layers = [name for name in chosen if name.endswith("lm_head.modules_to_save.default")]
    assert len(trained_layers) == 1
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "NoSuchBlock")
    with pytest.raises(TargetError, match="NoSuchBlock"):
        helpers.fsdp_auto_wrap_policy(model)


def test_without_deepspeed_nothing_is_gathered():
    assert helpers.check_deepspeed_zero3_enabled() is False
    parameter = nn.Parameter(torch.ones(2))
    with helpers.gather_params_ctx([parameter], modifier_rank=None):
        assert torch.equal(parameter, torch.ones(2))


def test_every_helper_takes_the_arguments_of_the_peers():
    homes = {
        peft.helpers: ("update_signature", "check_if_peft_model", "rescale_adapter_scale", "DoraCaching",
                       "disable_input_dtype_casting", "KappaTuneSelector", "find_kappa_target_modules",
                       "MontecloraTrainerMixin"),
        peft.functional: ("set_adapter", "delete_adapter", "set_requires_grad", "cast_adapter_dtype"),
        peft: ("prepare_model_for_kbit_training", "cast_mixed_precision_params", "get_base_model_state_dict",
               "set_base_model_state_dict"),
        peft.utils.integrations: ("gather_params_ctx", "check_deepspeed_zero3_enabled", "get_layer_device_map"),
        peft.utils.other: ("fsdp_auto_wrap_policy", "get_quantization_config"),
    }  # fmt: skip
    for home, names in homes.items():
        for name in names:
            theirs = inspect.signature(getattr(home, name)).parameters
            ours = inspect.signature(getattr(helpers, name)).parameters
            taken = {key for key, parameter in ours.items() if parameter.kind is not parameter.VAR_KEYWORD}
            missing = set(theirs) - taken
            assert missing <= {"layer_cls"}, (name, missing)  # which deltatune's verbs take and ignore
            for key in set(theirs) & taken:
                given, own = theirs[key].default, ours[key].default
                assert own == given or given is inspect.Parameter.empty, (name, key)


def test_labels_are_shifted_as_by_the_peer():
    labels = torch.tensor([[5, 6, -100, 7], [-100, -100, 8, 9]])
    kept = labels.clone()
    assert torch.equal(helpers.shift_tokens_right(labels, 1, 2), peft.shift_tokens_right(labels, 1, 2))
    assert torch.equal(labels, kept)
    with pytest.raises(ConfigError, match="pad_token_id"):
        helpers.shift_tokens_right(labels, None, 2)


def test_the_low_level_functions_are_where_the_peers_are():
    assert set(peft.functional.__all__) <= set(vars(deltatune.functional))


def test_under_zero_3_parameters_are_gathered_by_deepspeed(monkeypatch):
    """With a stand-in for deepspeed that notes how it is called."""
    import transformers.integrations.deepspeed as integration

    seen = []

    @contextlib.contextmanager
    def gathered(params, modifier_rank=0, fwd_module=None):
        seen.append((params, modifier_rank, fwd_module))
        yield

    zero = types.SimpleNamespace(GatheredParameters=gathered)
    monkeypatch.setitem(sys.modules, "deepspeed", types.SimpleNamespace(zero=zero))
    monkeypatch.setattr(integration, "is_deepspeed_zero3_enabled", lambda: True)
    assert helpers.check_deepspeed_zero3_enabled()
    layer = nn.Linear(2, 2)
    with helpers.gather_params_ctx(layer.weight, modifier_rank=None, fwd_module=layer):
        assert seen == [(layer.weight, None, layer)]
