"""State dicts and files of adapters."""

import json
import os
from pathlib import Path

import torch
from kit import end, folder, llama, net, out, plain, raises, scatter, shapes, told, trains, warns
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from safetensors import safe_open
from safetensors.torch import load_file


def made(base=None, name="default", **options):
    return scatter(get_peft_model(base or net(), LoraConfig(**{"r": 2, "target_modules": ["lin0"], **options}), name))


def files(where):
    found = (os.path.relpath(os.path.join(root, name), where) for root, _, names in os.walk(where) for name in names)
    return sorted(name for name in found if name != "second/README.md")


def keys_of_an_adapter():
    return shapes(get_peft_model_state_dict(made()))


def keys_with_biases_and_copies():
    return [
        shapes(get_peft_model_state_dict(made(bias="lora_only"))),
        shapes(get_peft_model_state_dict(made(bias="all"))),
        shapes(get_peft_model_state_dict(made(modules_to_save=["head"]))),
        shapes(get_peft_model_state_dict(made(use_dora=True))),
        shapes(get_peft_model_state_dict(made(trainable_token_indices={"emb": [1, 2]}))),
        shapes(get_peft_model_state_dict(made(target_modules=["head"], lora_bias=True))),
    ]


def keys_by_name():
    model = made(name="one")
    model.add_adapter("two", LoraConfig(r=5, target_modules=["head"]))
    return [
        shapes(get_peft_model_state_dict(model, adapter_name="one")),
        shapes(get_peft_model_state_dict(model, adapter_name="two")),
        raises(lambda: get_peft_model_state_dict(model)),
    ]


def values_given_by_the_caller():
    model = made()
    given = {name: torch.full_like(value, 2.0) for name, value in model.state_dict().items()}
    found = get_peft_model_state_dict(model, state_dict=given)
    return [shapes(found), sorted({float(v.max()) for v in found.values()})]


def embeddings_on_request():
    model = made(llama(1), target_modules=["q_proj"])
    return [
        shapes(get_peft_model_state_dict(model, save_embedding_layers=True)),
        shapes(get_peft_model_state_dict(model, save_embedding_layers=False)),
    ]


def an_injected_model_has_short_keys():
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["lin0"], modules_to_save=["head"]), net())
    return shapes(get_peft_model_state_dict(model))


def setting_tells_the_keys():
    model, state = made(), get_peft_model_state_dict(scatter(made(), 60))
    result = set_peft_model_state_dict(model, state)
    return [out(model), list(result.unexpected_keys), any("lora_" in key for key in result.missing_keys)]


def setting_lists_what_is_missing():
    model, state = made(), get_peft_model_state_dict(made())
    full = set_peft_model_state_dict(model, dict(state))
    first = sorted(state)[0]
    part = set_peft_model_state_dict(model, {k: v for k, v in state.items() if k != first})
    return [sorted(full.missing_keys), sorted(part.missing_keys)]


def setting_lists_what_is_unexpected():
    model, state = made(), get_peft_model_state_dict(made())
    result = set_peft_model_state_dict(model, {**state, "base_model.model.nothing.lora_A.weight": torch.zeros(2)})
    return [list(result.unexpected_keys), [key for key in result.missing_keys if "lora" in key]]


def setting_under_another_name():
    state = get_peft_model_state_dict(scatter(made(), 60))
    model = made(name="other")
    set_peft_model_state_dict(model, state, adapter_name="other")
    return [out(model), out(scatter(made(), 60))]


def setting_in_a_config_without_numbers():
    state = get_peft_model_state_dict(made())
    model = get_peft_model(net(), LoraConfig(r=2, target_modules=["lin0"]), low_cpu_mem_usage=True)
    set_peft_model_state_dict(model, state, low_cpu_mem_usage=True)
    return [out(model), sorted({str(p.device) for p in model.parameters()})]


def wrong_sizes():
    state = get_peft_model_state_dict(made(r=4))
    model = made()
    return [
        raises(lambda: set_peft_model_state_dict(model, state)),
        warns(lambda: set_peft_model_state_dict(model, state, ignore_mismatched_sizes=True)),
    ]


def the_state_dict_stays_the_callers():
    model, state = made(), get_peft_model_state_dict(made())
    before = sorted(state)
    set_peft_model_state_dict(model, state)
    return sorted(state) == before


def a_checkpoint_by_torch():
    model, where = made(), folder()
    torch.save(get_peft_model_state_dict(model), os.path.join(where, "x.pt"))
    other = scatter(made(), 60)
    set_peft_model_state_dict(other, torch.load(os.path.join(where, "x.pt")))
    return out(other) == out(model)


def files_of_one_adapter():
    where = folder()
    made().save_pretrained(where)
    with safe_open(os.path.join(where, "adapter_model.safetensors"), "pt") as file:
        return [files(where), file.metadata().get("format"), sorted(file.keys())]


def files_of_several():
    where = folder()
    model = made()
    model.add_adapter("second", LoraConfig(r=3, target_modules=["lin1"]))
    model.save_pretrained(where)
    only = folder()
    model.save_pretrained(only, selected_adapters=["second"])
    return [files(where), files(only), raises(lambda: model.save_pretrained(folder(), selected_adapters=["third"]))]


def nothing_but_on_the_main_process():
    where = folder()
    made().save_pretrained(os.path.join(where, "x"), is_main_process=False)
    return [name for name in files(where) if "safetensors" in name or "json" in name]


def pickled_files():
    where = folder()
    model = made()
    model.save_pretrained(where, safe_serialization=False)
    return [files(where), out(PeftModel.from_pretrained(net(), where)) == out(model)]


def saving_to_a_file_is_refused():
    where = os.path.join(folder(), "file")
    Path(where).touch()
    return raises(lambda: made().save_pretrained(where))


def the_saved_config():
    where = folder()
    model = made(llama(1), target_modules=["q_proj"], task_type="CAUSAL_LM")
    model.save_pretrained(where)
    found = json.loads(Path(os.path.join(where, "adapter_config.json")).read_text())
    del found["peft_version"]
    return [found, model.peft_config["default"].inference_mode]


def the_saved_config_without_task():
    where = folder()
    made(llama(1), target_modules=["q_proj"]).save_pretrained(where)
    return json.loads(Path(os.path.join(where, "adapter_config.json")).read_text())["auto_mapping"]


def the_model_card():
    where, base = folder(), llama(1)
    base.name_or_path = base.config._name_or_path = "owner/base"
    made(base, target_modules=["q_proj"], task_type="CAUSAL_LM").save_pretrained(where)
    head = Path(os.path.join(where, "README.md")).read_text().split("---")[1]
    wanted = ("library_name: peft", "base_model: owner/base", "base_model:adapter:owner/base", "- lora")
    return [part in head for part in wanted]


def an_own_model_card_is_kept():
    where = folder()
    Path(os.path.join(where, "README.md")).write_text("---\nlicense: mit\n---\nmy words\n")
    made().save_pretrained(where)
    text = Path(os.path.join(where, "README.md")).read_text()
    return ["my words" in text, "license: mit" in text]


def loading():
    where = folder()
    model = made(modules_to_save=["head"])
    scatter(model, 9, "modules_to_save")
    model.save_pretrained(where)
    found = PeftModel.from_pretrained(net(), where)
    trained = PeftModel.from_pretrained(net(), where, is_trainable=True)
    return [
        out(model),
        out(found),
        trains(found),
        trains(trained),
        found.training,
        trained.training,
        found.peft_config["default"].inference_mode,
    ]


def loading_further_ones():
    where = folder()
    made().save_pretrained(where)
    scatter(made(target_modules=["lin1"], r=3), 30).save_pretrained(os.path.join(where, "x"))
    model = PeftModel.from_pretrained(net(), where, adapter_name="one")
    result = model.load_adapter(os.path.join(where, "x"), "two")
    found = [sorted(model.peft_config), plain(model.active_adapters), out(model), list(result.unexpected_keys)]
    model.set_adapter("two")
    again = model.load_adapter(where, adapter_name="three", is_trainable=True)
    return [*found, out(model), trains(model), list(again.unexpected_keys), plain(model.active_adapters)]


def loading_a_subfolder():
    where = folder()
    made(name="sub").save_pretrained(where)
    return [
        out(PeftModel.from_pretrained(net(), where, subfolder="sub")),
        PeftConfig.from_pretrained(where, subfolder="sub").r,
        sorted(load_peft_weights(where, subfolder="sub"))[0],
    ]


def loading_with_a_given_config():
    where = folder()
    made().save_pretrained(where)
    config = PeftConfig.from_pretrained(where)
    config.lora_alpha = 32
    return out(PeftModel.from_pretrained(net(), where, config=config))


def loading_from_nowhere():
    return [
        raises(lambda: PeftModel.from_pretrained(net(), folder())),
        raises(lambda: made().load_adapter(os.path.join(folder(), "no"), "x")),
    ]


def loading_without_numbers_first():
    where = folder()
    made().save_pretrained(where)
    model = PeftModel.from_pretrained(net(), where, low_cpu_mem_usage=True)
    model.load_adapter(where, "other", low_cpu_mem_usage=True)
    return [out(model), sorted({str(p.device) for p in model.parameters()})]


def loading_with_renamed_keys():
    where = folder()
    made().save_pretrained(where)
    other = net()
    other.blocks = other.layers
    del other.layers
    model = PeftModel.from_pretrained(other, where, key_mapping={"^layers": "blocks"})
    return [told(p) for n, p in sorted(model.named_parameters()) if "lora_" in n]


def loading_weights_alone():
    where = folder()
    made().save_pretrained(where)
    found = load_peft_weights(where)
    same = load_file(os.path.join(where, "adapter_model.safetensors"))
    return [
        shapes(found),
        sorted(found) == sorted(same),
        str(next(iter(found.values())).device),
        shapes(load_peft_weights(where, device="cpu")),
    ]


def types_of_loading():
    where = folder()
    made(llama(1), target_modules=["q_proj"], task_type="CAUSAL_LM").save_pretrained(where)
    return type(PeftModel.from_pretrained(llama(1), where)).__name__


def the_base_by_the_config():
    base, where = folder(), folder()
    llama(1).save_pretrained(base)
    from transformers import AutoModelForCausalLM

    model = made(AutoModelForCausalLM.from_pretrained(base), target_modules=["q_proj"], task_type="CAUSAL_LM")
    model.save_pretrained(where)
    found = AutoPeftModelForCausalLM.from_pretrained(where)
    named = AutoPeftModelForCausalLM.from_pretrained(where, adapter_name="mine", is_trainable=True)
    return [
        end(model),
        end(found),
        type(found).__name__,
        sorted(named.peft_config),
        bool(trains(named)),
        found.peft_config["default"].base_model_name_or_path == base,
    ]


def the_base_of_any_class():
    from peft import AutoPeftModel
    from transformers import AutoModelForCausalLM

    base, where = folder(), folder()
    llama(1).save_pretrained(base)
    model = made(AutoModelForCausalLM.from_pretrained(base), target_modules=["q_proj"])
    model.save_pretrained(where)
    return [end(AutoPeftModel.from_pretrained(where)), end(model)]


def the_wrong_automatic_class():
    from peft import AutoPeftModelForSeq2SeqLM

    base, where = folder(), folder()
    llama(1).save_pretrained(base)
    from transformers import AutoModelForCausalLM

    made(AutoModelForCausalLM.from_pretrained(base), target_modules=["q_proj"], task_type="CAUSAL_LM").save_pretrained(
        where
    )
    return raises(lambda: AutoPeftModelForSeq2SeqLM.from_pretrained(where))


def pieces_of_prompt_methods():
    found = {}
    for config in (
        PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    ):
        model = get_peft_model(llama(1), config)
        where = folder()
        model.save_pretrained(where)
        found[config.peft_type.value] = [
            shapes(get_peft_model_state_dict(model)),
            files(where),
            end(model) == end(PeftModel.from_pretrained(llama(1), where)),
        ]
    return found


def injecting_by_a_state_dict():
    state = get_peft_model_state_dict(
        scatter(inject_adapter_in_model(LoraConfig(r=2, target_modules=["layers.1.lin0", "head"]), net()))
    )
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["head"]), net(), state_dict=state)
    set_peft_model_state_dict(model, state)
    return [trains(model), out(model)]


def injecting_without_numbers():
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["lin0"]), net(), low_cpu_mem_usage=True)
    return sorted({str(p.device) for n, p in model.named_parameters() if "lora" in n})


def injected_models_stay_what_they_are():
    base = net()
    model = inject_adapter_in_model(LoraConfig(target_modules=["lin0"]), base, "mine")
    return [
        model is base,
        sorted(model.peft_config),
        trains(model),
        raises(lambda: inject_adapter_in_model(PromptTuningConfig(num_virtual_tokens=2), net())),
    ]


def states_of_the_base():
    from peft import get_base_model_state_dict, set_base_model_state_dict

    model = made(modules_to_save=["head"])
    state = get_base_model_state_dict(model)
    before = sorted(state) == sorted(net().state_dict())
    result = set_base_model_state_dict(model, {name: value + 1 for name, value in state.items()})
    return [before, sorted(state), out(model), list(result.missing_keys), list(result.unexpected_keys)]
