"""Verbs in an order, or with arguments, that the fault matrix does not list: right, or refused in words."""

import copy
import warnings

import pytest
import torch

from deltatune import (
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    get_peft_model,
    inject_adapter_in_model,
    rescale_adapter_scale,
    set_peft_model_state_dict,
)
from deltatune.errors import (
    AdapterNameError,
    ConfigError,
    MismatchError,
    PeftError,
    PeftWarning,
    SaveError,
    StateError,
)
from deltatune.inject import adapted_layers
from tests.core.tiny import logits, tiny
from tests.faults.crowd import ask, stir, two_adapters
from tests.faults.folders import INPUTS, adapted, refused, state, unchanged

CAUSAL = {"task_type": "CAUSAL_LM"}


def base():
    return tiny("llama", num_hidden_layers=2)


def two():
    return two_adapters(lambda i: LoraConfig(r=2 + i, **CAUSAL))


def each(model):
    """By name, what each adapter alone answers."""
    return {name: ask(model, [name, name]) for name in model.peft_config}


def close(one, other):
    return torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def is_refused(model, kind, words, call):
    before, active, out = state(model), model.active_adapters, ask(model)
    with refused(kind, *words):
        call()
    assert unchanged(model, before) and model.active_adapters == active and torch.equal(ask(model), out)


# what has gone ----------------------------------------------------------------------------------------------------


def test_the_active_adapter_is_deleted_and_the_model_goes_on_with_the_next():
    model = two()
    expected = each(model)["b"]
    with pytest.warns(PeftWarning, match="'b' is active now"):
        model.delete_adapter("a")
    assert close(ask(model), expected)


@pytest.mark.filterwarnings("ignore:the active adapter was deleted")
def test_the_last_adapter_is_deleted_and_the_model_is_the_base(tmp_path):
    model = two()
    for name in "ab":
        model.delete_adapter(name)
    assert torch.equal(ask(model), ask(base())) and model.active_adapters == []
    with refused(SaveError, "no adapter is selected"):
        model.save_pretrained(tmp_path / "none")
    with refused(StateError, "no adapter is active"):
        model.peft_type
    model.add_adapter("c", LoraConfig(r=2, **CAUSAL))
    stir(model, "c", 3)
    assert not close(ask(model), ask(base())) and not (tmp_path / "none").exists()


@pytest.mark.parametrize("verb", ["unload", "merge_and_unload"])
def test_adapters_that_were_taken_off_are_not_silently_absent(verb, tmp_path):
    """Switching to one, or asking for one per row, answered with the model that was left."""
    model = two()
    expected = ask(model) if verb == "merge_and_unload" else ask(base())
    getattr(model, verb)()
    for call in (
        lambda: model.set_adapter("b"),
        lambda: model.set_requires_grad("b"),
        lambda: ask(model, ["a", "b"]),
        lambda: model.save_pretrained(tmp_path / "new"),
    ):
        is_refused(model, StateError, ["no longer on the layers", "unload"], call)
    assert close(ask(model), expected) and not (tmp_path / "new").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftWarning)
        model.delete_adapter("b")
    model.add_adapter("b", LoraConfig(r=2, **CAUSAL))
    stir(model, "b", 1)
    assert not close(ask(model), expected)


def test_a_prompt_that_was_taken_off_is_told_too():
    model = get_peft_model(base(), PrefixTuningConfig(num_virtual_tokens=2, **CAUSAL)).eval()
    model.unload()
    is_refused(model, StateError, ["no longer"], lambda: model.set_adapter("default"))


def test_the_base_below_a_model_that_was_merged_for_good_is_gone_and_that_is_told():
    model = two()
    merged = model.merge_and_unload()
    with pytest.warns(PeftWarning, match=r"\['a'\] into the weights for good"), model.disable_adapter():
        ask(model)
    plain = two()
    plain.unload()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with plain.disable_adapter():
            assert torch.equal(ask(plain), ask(base()))
    with pytest.warns(PeftWarning, match="nothing of"):
        assert model.merge_and_unload() is merged


def test_a_config_under_another_name_is_no_renamed_adapter():
    model = two()
    model.peft_config["x"] = model.peft_config.pop("a")
    is_refused(model, AdapterNameError, ["'x'", "does not rename"], lambda: model.set_adapter("x"))


# merged -----------------------------------------------------------------------------------------------------------


def test_adapters_saved_while_one_is_merged_are_themselves(tmp_path):
    model = two()
    expected = each(model)
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    for name in "ab":
        assert close(ask(PeftModel.from_pretrained(base(), tmp_path / name)), expected[name])


def test_values_taken_while_merged_do_not_go_where_nothing_is(tmp_path):
    """The adapter would act on weights that hold it already."""
    model, other = two(), two_adapters(lambda i: LoraConfig(r=2 + i, **CAUSAL), seed=9)
    expected, plain = ask(model), copy.deepcopy(model.state_dict())
    model.merge_adapter()
    torch.save(model.state_dict(), tmp_path / "merged")
    is_refused(other, StateError, ["['a'] were merged"], lambda: other.load_state_dict(torch.load(tmp_path / "merged")))
    is_refused(model, StateError, ["unmerge_adapter"], lambda: model.load_state_dict(plain))
    is_refused(model, StateError, ["here ['a'] are"], lambda: model.load_state_dict(dict(plain)))
    model.unmerge_adapter()
    model.load_state_dict(plain)
    assert close(ask(model), expected)
    other.load_state_dict(plain)
    assert close(ask(other), expected)


def test_a_model_is_unloaded_while_merged_and_is_the_base_again():
    model = two()
    model.merge_adapter()
    assert torch.equal(ask(model.unload()), ask(base()))


# within blocks ----------------------------------------------------------------------------------------------------

CHANGES = {
    "add": lambda model: model.add_adapter("c", LoraConfig(r=2, **CAUSAL)),
    "delete": lambda model: model.delete_adapter("a"),
    "set": lambda model: model.set_adapter("b"),
    "merge": lambda model: model.merge_adapter(),
    "copy": copy.deepcopy,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:the active adapter was deleted")
def test_adapters_change_within_a_block_without_them(change):
    model = two()
    expected = each(model)["b" if change in ("delete", "set") else "a"]
    with model.disable_adapter():
        CHANGES[change](model)
        assert torch.equal(ask(model), ask(base()))
    assert close(ask(model), expected)


def test_a_copy_made_within_a_block_is_outside_of_it():
    model = two()
    with model.disable_adapter():
        copied = copy.deepcopy(model)
    assert close(ask(copied), ask(model)) and not close(ask(copied), ask(base()))


def test_a_call_that_fails_midway_holds_up_nothing():
    model = two()
    expected = each(model)["b"]
    hook = model.get_base_model().lm_head.register_forward_hook(lambda *_: 1 / 0)
    for rows in (None, ["a", "b"]):
        with pytest.raises(ZeroDivisionError):
            ask(model, rows)
    hook.remove()
    with pytest.raises(KeyboardInterrupt), model.disable_adapter():
        raise KeyboardInterrupt
    model.set_adapter("b")
    assert close(ask(model), expected)


def test_a_pass_within_a_pass_has_its_own_choice():
    model, inner = two(), []
    expected = each(model)

    def hook(*_):
        handle.remove()
        inner.append(ask(model, ["b", "b"]))

    handle = model.get_base_model().model.layers[0].register_forward_hook(hook)
    assert close(ask(model), expected["a"]) and close(inner[0], expected["b"])


# names ------------------------------------------------------------------------------------------------------------


def test_one_name_is_not_read_letter_by_letter(tmp_path):
    """Of adapters "a", "b" and "ab" the first two were merged and saved where the third was asked for."""
    model = two()
    model.add_adapter("ab", LoraConfig(r=2, **CAUSAL))
    stir(model, "ab", 5)
    expected = each(model)["ab"]
    model.set_adapter("ab")
    model.merge_adapter("ab")
    assert {name for _, layer in adapted_layers(model.get_base_model()) for name in layer.merged_adapters} == {"ab"}
    model.unmerge_adapter()
    model.save_pretrained(tmp_path, selected_adapters="ab")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ab"]
    is_refused(model, AdapterNameError, ["adapter_names='ab'", "for each row"], lambda: ask(model, "ab"))
    assert close(ask(model.merge_and_unload(adapter_names="ab")), expected)


@pytest.mark.parametrize("names", [None, 1, [["a"]], ["a", None], {"a": 1, 2: 3}], ids=repr)
def test_what_is_no_name(names):
    model = two()
    for call in (lambda: model.set_adapter(names), lambda: model.set_requires_grad(names)):
        is_refused(model, AdapterNameError, ["expected the name of an adapter or a list of names"], call)
    is_refused(model, AdapterNameError, ["no adapter named"], lambda: model.delete_adapter(names))


@pytest.mark.parametrize("rows", [[0, 1], [["a"], ["b"]], ["a"], [], ["a", "b", "a"]], ids=repr)
def test_rows_that_are_no_names_or_too_few(rows):
    model = two()
    is_refused(model, (AdapterNameError, StateError), ["adapter_names"], lambda: ask(model, rows))


def test_no_adapter_at_all_is_the_base_and_says_so():
    model = two()
    model.set_adapter([])
    assert torch.equal(ask(model), ask(base())) and model.active_adapter == []
    with refused(StateError, "no adapter is active", "['a', 'b']"):
        model.active_peft_config
    with pytest.warns(PeftWarning, match="nothing of"):
        model.merge_adapter()
    assert torch.equal(ask(model), ask(base()))


# arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [None, {"peft_type": "LORA"}, "lora", LoraConfig], ids=repr)
def test_what_is_no_config(config):
    model = two()
    for call in (
        lambda: get_peft_model(base(), config),
        lambda: PeftModel(base(), config),
        lambda: inject_adapter_in_model(config, base()),
        lambda: model.add_adapter("c", config),
    ):
        is_refused(model, ConfigError, ["peft_config is", "such as LoraConfig()"], call)


@pytest.mark.parametrize("model", [None, "llama", LoraConfig], ids=repr)
def test_what_is_no_model(model, tmp_path):
    adapted().save_pretrained(tmp_path)
    for call in (
        lambda: get_peft_model(model, LoraConfig()),
        lambda: inject_adapter_in_model(LoraConfig(), model),
        lambda: PeftModel.from_pretrained(model, tmp_path),
    ):
        with refused(ConfigError, "model is", "a torch module"):
            call()


def test_a_compiled_base_is_told_that_its_files_would_name_other_layers():
    compiled = torch.compile(base(), backend="eager")
    with pytest.warns(PeftWarning, match="_orig_mod"):
        get_peft_model(compiled, LoraConfig(**CAUSAL))


@pytest.mark.parametrize("change", [{"lora_alpha": 80}, {"r": 8}, {"use_rslora": True}, {"target_modules": ["o_proj"]}])
def test_a_config_that_serves_for_the_next_model_leaves_this_one_alone(change, tmp_path):
    """A loop over settings: what was saved afterwards acted otherwise, or could not be loaded."""
    config = LoraConfig(r=4, **CAUSAL)
    model = get_peft_model(tiny("llama"), config).eval()
    stir(model, "default", 0)
    for name, value in change.items():
        setattr(config, name, value)
    get_peft_model(tiny("llama"), config)
    model.save_pretrained(tmp_path)
    assert torch.equal(ask(PeftModel.from_pretrained(tiny("llama"), tmp_path)), ask(model))


def test_two_adapters_of_one_config_have_one_each():
    config = LoraConfig(r=2, rank_pattern={"q_proj": 4}, **CAUSAL)
    model = get_peft_model(base(), config)
    model.add_adapter("b", config)
    model.peft_config["b"].rank_pattern["v_proj"] = 7
    assert model.peft_config["default"].rank_pattern == {"q_proj": 4} == config.rank_pattern


# values -----------------------------------------------------------------------------------------------------------


def test_values_to_save_that_are_of_another_model(tmp_path):
    model = adapted(1)
    known = model.state_dict()
    for values, words in (
        ({f"module.{key}": value for key, value in known.items()}, ["none of the 12 tensors", "lora_A.default"]),
        ({}, ["none of the 12 tensors"]),
        ({key: value[:1] for key, value in known.items()}, ["shape (1, 16)", "(4, 16)"]),
        ({key: value * float("nan") for key, value in known.items()}, ["not finite"]),
    ):
        with refused(SaveError, *words):
            model.save_pretrained(tmp_path / "new", state_dict=values)
        assert not (tmp_path / "new").exists()
    other = adapted(2)
    model.save_pretrained(tmp_path / "new", state_dict=other.state_dict())
    assert torch.equal(ask(PeftModel.from_pretrained(tiny("llama"), tmp_path / "new")), ask(other))


def test_values_that_are_no_tensors_or_have_no_numbers():
    model = adapted(1)
    known = model.adapter_tensors("default")
    key = next(iter(known))
    for values, kind in (
        (None, ConfigError),
        ([1], ConfigError),
        ({**known, key: known[key].tolist()}, MismatchError),
        ({**known, key: known[key].to("meta")}, MismatchError),
    ):
        is_refused(model, kind, [], lambda values=values: set_peft_model_state_dict(model, values))


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "2", True])
def test_a_scale_that_is_no_number(scale):
    model = two()

    def scaled():
        with rescale_adapter_scale(model, scale):
            ask(model)

    is_refused(model, ConfigError, ["multiplier"], scaled)


def test_an_embedding_that_grew_after_the_adapter_belongs_to_that_base(tmp_path):
    model = adapted(1)
    model.get_base_model().resize_token_embeddings(70)
    model.save_pretrained(tmp_path)
    with pytest.raises(PeftError, match="another base model"):
        PeftModel.from_pretrained(tiny("llama"), tmp_path)
    assert logits(model, INPUTS).shape[-1] == 70
