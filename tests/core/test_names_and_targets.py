"""Adapter names and targets: what is allowed, and how a miss is explained."""

import pytest
from torch import nn

from deltatune import LoraConfig, get_peft_model
from deltatune.errors import AdapterNameError, PeftWarning, StateError, TargetError
from deltatune.names import check_name
from deltatune.targets import name_matches
from tests.core.tiny import tiny


@pytest.mark.parametrize("name", ["default", "a", "0", "my-adapter_2", "x" * 64, "lora_A", "layers", "weight"])
def test_plain_names_are_allowed(name):
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "a.b", "a/b", "a\\b", "/abs", "a b", "a\n", "\x1b[0m", "x" * 65, "CON", "lpt1", "keys", "items",
     "__base__", "pop", "forward", "training", None, 3, "é"],
)  # fmt: skip
def test_others_are_refused_before_anything_happens(name):
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(AdapterNameError, match="adapter name"):
        get_peft_model(model, LoraConfig(target_modules=["0"], r=2), adapter_name=name)
    assert type(model[0]) is nn.Linear and model[0].weight.requires_grad


def test_every_allowed_word_of_torch_modules_can_be_added_and_deleted():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"], r=2))
    for name in ("weight", "bias", "adapters", "base_layer", "default2", "0"):
        model.add_adapter(name, LoraConfig(target_modules=["0"], r=2))
        model.set_adapter(name)
        model.set_adapter("default")
        model.delete_adapter(name)


@pytest.mark.parametrize(
    "names,path,expected",
    [
        (["q"], "encoder.q", True),
        (["q"], "q", True),
        (["q"], "encoder.wq", False),
        (["q"], "q.inner", False),
        (["attn.q"], "layer.0.attn.q", True),
        (["attn.q"], "layer.0.self_attn.q", False),
        ({"q", "v"}, "x.v", True),
        (r".*\.q", "x.q", True),
        (r".*\.q", "x.qq", False),
        ("q", "x.q", False),
        ([], "q", False),
        (None, "q", False),
    ],
)
def test_a_list_names_whole_endings_and_a_string_is_a_pattern_for_all_of_the_path(names, path, expected):
    assert name_matches(names, path) is expected


@pytest.mark.parametrize(
    "arch,wanted,nearest",
    [("llama", ["q_porj"], "q_proj"), ("t5", ["SelfAttention.Q"], r"\.q'"), ("bert", ["querry"], "query"),
     ("gpt2", ["attn_c"], "c_attn"), ("bart", r".*qproj", "_proj")],
)  # fmt: skip
def test_a_miss_names_the_nearest_layers(arch, wanted, nearest):
    with pytest.raises(TargetError, match=nearest) as caught:
        get_peft_model(tiny(arch), LoraConfig(target_modules=wanted))
    assert "matches no module" in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.field == "target_modules" and caught.value.expected


def test_a_layer_that_cannot_be_adapted_is_named_with_those_that_can():
    with pytest.raises(TargetError, match=r"'model.layers.0.mlp' is a LlamaMLP.*supported are Linear, Conv1D"):
        get_peft_model(tiny("llama"), LoraConfig(target_modules=["mlp"]))
    with pytest.raises(TargetError, match=r"'model.norm' is a LlamaRMSNorm, which LoRA cannot.*embedding, linear"):
        get_peft_model(tiny("llama"), LoraConfig(target_modules=["model.norm"]))


def test_a_dead_name_beside_a_live_one_is_told():
    with pytest.warns(PeftWarning, match=r"target_modules: \['nowhere'\]"):
        get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj", "nowhere"]))
    with pytest.warns(PeftWarning, match=r"exclude_modules: \['nowhere'\]"):
        get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"], exclude_modules=["nowhere"]))


def test_an_unknown_architecture_needs_targets():
    with pytest.raises(TargetError, match=r'name them, or use target_modules="all-linear".*\[.0.\]'):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig())


def test_a_module_to_save_that_is_not_there_is_refused_with_the_nearest():
    with pytest.raises(TargetError, match=r"modules_to_save: 'lm_haed'.*lm_head"):
        get_peft_model(tiny("llama"), LoraConfig(modules_to_save=["lm_haed"]))


def test_all_linear_leaves_the_head_alone():
    for arch, head in (("llama", "lm_head"), ("bert", "classifier")):
        model = get_peft_model(
            tiny(arch), LoraConfig(target_modules="all-linear", task_type="SEQ_CLS" if arch == "bert" else None)
        )
        assert head not in model.base_model.targeted_module_names
        linear = [name for name, m in tiny(arch).named_modules() if isinstance(m, nn.Linear) and name != head]
        assert model.base_model.targeted_module_names == linear


def test_a_model_is_wrapped_once():
    model = get_peft_model(tiny("llama"), LoraConfig())
    for again in (model, model.get_base_model()):
        with pytest.raises(StateError, match="already"):
            get_peft_model(again, LoraConfig())
    with pytest.raises(StateError, match="there already"):
        model.add_adapter("default", LoraConfig())
