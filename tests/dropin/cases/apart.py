"""Where deltatune differs on purpose: every case names words of docs/migrate.md that say so."""

import os
from pathlib import Path

import torch
from kit import ROWS, folder, gpt2, llama, net, out, raises, scatter, told, trains, warns
from peft import (
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from torch import nn


def on_purpose(words):
    def mark(case):
        case.words = words
        return case

    return mark


def made(base=None, **options):
    return scatter(get_peft_model(base or net(), LoraConfig(**{"r": 2, "target_modules": ["lin0"], **options}), "a"))


def three(base=None):
    model = made(base)
    for name in "bc":
        model.add_adapter(name, LoraConfig(r=2, lora_alpha=4, target_modules=["lin0"]))
    return scatter(model)


@on_purpose("options that PEFT refuses together")
def a_bias_with_another_start():
    return [
        raises(lambda: LoraConfig(lora_bias=True, init_lora_weights="gaussian")),
        raises(lambda: LoraConfig(lora_bias=True, use_dora=True)),
    ]


@on_purpose("trained_bias.default")
def names_of_trained_biases():
    return trains(made(bias="lora_only"))


@on_purpose("is refused by the config")
def a_wrong_bias():
    return raises(lambda: get_peft_model(net(), LoraConfig(target_modules=["lin0"], bias="some")))


@on_purpose("names in `modules_to_save`")
def a_module_to_save_that_is_not_there():
    return raises(lambda: made(modules_to_save=["nothing"]))


@on_purpose("`fan_in_fan_out`")
def the_layout_of_conv1d():
    return warns(lambda: made(gpt2(), target_modules=["c_attn"], fan_in_fan_out=False))


@on_purpose("but no `nn.Linear`")
def a_factor_is_a_linear_layer():
    return isinstance(made().base_model.model.layers[0]["lin0"].lora_A["a"], nn.Linear)


@on_purpose("is not called in a forward pass")
def hooks_on_factors():
    model, seen = made(), []
    model.base_model.model.layers[0]["lin0"].lora_A["a"].register_forward_hook(lambda *_: seen.append(1))
    out(model)
    return seen


@on_purpose("`layer.weight` is the adapted weight")
def the_weight_of_a_layer():
    layer = made().base_model.model.layers[0]["lin0"]
    return layer.weight is layer.base_layer.weight


@on_purpose("for any methods together")
def methods_of_two_kinds_on_one_model():
    return raises(lambda: made().add_adapter("b", IA3Config(target_modules=["lin1"], feedforward_modules=[])))


@on_purpose("Several adapters may train biases")
def biases_of_two_adapters():
    model = made(bias="all")
    return raises(lambda: model.add_adapter("b", LoraConfig(target_modules=["lin0"], bias="all")))


@on_purpose("switches no `requires_grad`")
def what_trains_while_disabled():
    model = made()
    with model.disable_adapter():
        return trains(model)


@on_purpose("in training as well")
def rows_in_training():
    model = three().train()
    return raises(lambda: model(ROWS, adapter_names=["a", "b", "__base__"]))


@on_purpose("`mixed=True` takes every method")
def a_prefix_in_a_mixed_model():
    config = PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    return raises(lambda: get_peft_model(llama(1), config, mixed=True))


@on_purpose("A second `get_peft_model`")
def a_second_model_around_one_base():
    base = net()
    made(base)
    return raises(lambda: made(base))


@on_purpose("never the frozen embedding itself")
def the_file_of_an_embedding():
    return sorted(get_peft_model_state_dict(made(llama(1), target_modules=["embed_tokens"]), adapter_name="a"))


@on_purpose("A model card that is there")
def the_card_of_the_user():
    where = folder()
    Path(os.path.join(where, "README.md")).write_text("---\nlicense: mit\n---\nmy words\n")
    get_peft_model(net(), LoraConfig(target_modules=["lin0"])).save_pretrained(where)
    return "library_name: peft" in Path(os.path.join(where, "README.md")).read_text()


@on_purpose("`unload()` gives the base back")
def copies_after_unloading():
    return out(scatter(made(modules_to_save=["head"]), 4, "modules_to_save").unload())


@on_purpose("go on acting on the merged weights")
def others_act_while_some_are_merged():
    model = three()
    model.merge_adapter(adapter_names=["b", "c"])
    return out(model)


@on_purpose("on the update, not on its factors")
def pruned_sums():
    found = {}
    for kind in ("linear", "ties", "magnitude_prune"):
        model = three()
        density = {} if kind == "linear" else {"density": 0.5}
        model.add_weighted_adapter(["a", "b"], [0.5, 1.0], "sum", combination_type=kind, **density)
        model.set_adapter("sum")
        found[kind] = out(model)
    return found


@on_purpose("refuses a density above 1")
def sums_that_cannot_be_meant():
    return [
        raises(lambda: three().add_weighted_adapter(["a", "b"], [1, 1], "x", combination_type="ties", density=3.0)),
        raises(lambda: three().add_weighted_adapter(["a", "b"], [1, 1], "a", combination_type="cat")),
        raises(lambda: three().add_weighted_adapter(["a", "b"], [1], "x", combination_type="cat")),
        raises(lambda: three().add_weighted_adapter([], [], "x", combination_type="cat")),
    ]


@on_purpose("need no `task_type`")
def a_prompt_without_a_task():
    return raises(lambda: get_peft_model(llama(), PromptTuningConfig(num_virtual_tokens=2)))


@on_purpose("under prompts too")
def names_under_a_prompt():
    model = get_peft_model(llama(1), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    return [name for name, _ in model.named_parameters()][:2]


@on_purpose("`type(layer).__name__` is")
def names_of_types():
    model = made()
    return [type(model.base_model).__name__, type(model.base_model.model.layers[0]["lin0"]).__name__]


@on_purpose("adds the update of the output projection twice")
def attention_of_torch():
    torch.manual_seed(0)
    model = scatter(
        get_peft_model(nn.ModuleDict({"mha": nn.MultiheadAttention(8, 2)}), LoraConfig(r=2, target_modules=["mha"]))
    )
    x = torch.linspace(-1, 1, 48).reshape(2, 3, 8)
    return told(model.base_model.model["mha"](x, x, x)[0])
