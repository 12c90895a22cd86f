"""Configs: what they hold, refuse, write and read."""

import copy
import json
import os
import pickle
from pathlib import Path

import peft
from kit import folder, plain, raises, warns
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    LoraRuntimeConfig,
    PeftConfig,
    PeftType,
    PrefixTuningConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_config,
)


def lora_to_dict():
    found = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM").to_dict()
    return plain({key: value for key, value in found.items() if key not in ("peft_version", "runtime_config")})


def kinds_of_enumerations():
    config = LoraConfig(task_type="CAUSAL_LM")
    return [
        config.peft_type == PeftType.LORA,
        config.peft_type == "LORA",
        config.task_type == TaskType.CAUSAL_LM,
        sorted(t.value for t in TaskType),
        config.is_prompt_learning,
        config.is_adaption_prompt,
        PrefixTuningConfig(num_virtual_tokens=2).is_prompt_learning,
    ]


def target_modules_become_a_set():
    listed = LoraConfig(target_modules=["a", "b"], exclude_modules=["c"])
    return [
        isinstance(listed.target_modules, set),
        isinstance(listed.exclude_modules, set),
        LoraConfig(target_modules="all-linear").target_modules,
        LoraConfig(target_modules=r".*\.q").target_modules,
        LoraConfig().target_modules,
    ]


def unknown_option_is_a_type_error():
    return raises(lambda: LoraConfig(rank=3))


def wrong_task_type_is_a_value_error():
    return raises(lambda: LoraConfig(task_type="NO_SUCH_TASK"))


def refused_combinations():
    return {
        "layers with a pattern": raises(lambda: LoraConfig(target_modules="all", layers_to_transform=[1])),
        "a pattern without layers": raises(lambda: LoraConfig(target_modules=["q"], layers_pattern="h")),
        "pattern with a pattern": raises(lambda: LoraConfig(target_modules=".*q", layers_pattern="h")),
        "dora megatron": raises(lambda: LoraConfig(use_dora=True, megatron_config={})),
        "loftq without config": raises(lambda: LoraConfig(init_lora_weights="loftq")),
        "adalora without steps": raises(lambda: AdaLoraConfig()),
        "ia3 feedforward": raises(lambda: IA3Config(target_modules=["q"], feedforward_modules=["x"])),
        "prompt text": raises(lambda: PromptTuningConfig(prompt_tuning_init="TEXT")),
        "dora and eva": raises(lambda: LoraConfig(use_dora=True, init_lora_weights="eva")),
    }


def fields_may_be_set_afterwards():
    config = LoraConfig()
    config.r = 3
    config.target_modules = {"v_proj"}
    return [config.r, sorted(config.target_modules), config.to_dict()["r"]]


def equality_and_copies():
    one, other = LoraConfig(r=3, target_modules=["a"]), LoraConfig(r=3, target_modules=["a"])
    return [
        one == other,
        one == LoraConfig(r=4, target_modules=["a"]),
        copy.deepcopy(one) == one,
        pickle.loads(pickle.dumps(one)) == one,
        copy.copy(one).r,
    ]


def runtime_config_is_not_saved():
    config = LoraConfig(runtime_config=LoraRuntimeConfig(ephemeral_gpu_offload=True))
    where = folder()
    config.save_pretrained(where)
    saved = json.loads(Path(os.path.join(where, "adapter_config.json")).read_text())
    read = LoraConfig.from_pretrained(where)
    return [
        "runtime_config" in config.to_dict(),
        "runtime_config" in saved,
        config.runtime_config.ephemeral_gpu_offload,
        read.runtime_config.ephemeral_gpu_offload,
    ]


def saved_file():
    where = folder()
    LoraConfig(r=4, target_modules=["q_proj"], rank_pattern={"x": 3}).save_pretrained(where)
    found = json.loads(Path(os.path.join(where, "adapter_config.json")).read_text())
    del found["peft_version"]
    return [found, sorted(os.listdir(where))]


def read_by_the_base_class():
    where = folder()
    LoHaConfig(r=4, target_modules=["q_proj"], alpha=2).save_pretrained(where)
    found = PeftConfig.from_pretrained(where)
    return [type(found).__name__, found.r, found.alpha, sorted(found.target_modules), found.inference_mode]


def options_given_when_reading():
    where = folder()
    LoraConfig(r=4, target_modules=["q_proj"]).save_pretrained(where)
    return [LoraConfig.from_pretrained(where, lora_alpha=32).lora_alpha, PeftConfig.from_pretrained(where).lora_alpha]


def unknown_fields_of_a_file_are_passed_over_with_a_warning():
    where = folder()
    LoraConfig(r=4).save_pretrained(where)
    path = os.path.join(where, "adapter_config.json")
    content = {**json.loads(Path(path).read_text()), "from_the_future": 3}
    Path(path).write_text(json.dumps(content))
    found = []
    return [warns(lambda: found.append(LoraConfig.from_pretrained(where))), found[0].r, hasattr(found[0], "future")]


def a_missing_folder_is_a_value_error():
    return raises(lambda: PeftConfig.from_pretrained(folder()))


def json_file_is_a_dict():
    where = folder()
    LoraConfig(r=4).save_pretrained(where)
    found = PeftConfig.from_json_file(os.path.join(where, "adapter_config.json"))
    return [type(found).__name__, found["r"], found["peft_type"]]


def config_of_a_dict():
    found = get_peft_config({"peft_type": "LORA", "task_type": "SEQ_2_SEQ_LM", "r": 7, "target_modules": ["q"]})
    return [type(found).__name__, found.r, found.task_type]


def config_from_peft_type():
    found = PeftConfig.from_peft_type(peft_type="IA3", target_modules=["k"])
    return [type(found).__name__, plain(found.target_modules)]


def checked_arguments():
    found = []
    return [
        warns(lambda: found.append(LoraConfig.check_kwargs(r=3, no_such=4))),
        found[0].get("r") if isinstance(found[0], dict) else found[0].r,
    ]


def prefix_fields():
    names = "auto_mapping base_model_name_or_path encoder_hidden_size inference_mode num_attention_heads num_layers "
    names += "num_transformer_submodules num_virtual_tokens peft_type prefix_projection revision task_type token_dim"
    found = PrefixTuningConfig(num_virtual_tokens=4).to_dict()
    return [plain(found[name]) for name in names.split()]


def every_config_has_its_type():
    names = sorted(
        name
        for name in peft.__all__
        if name.endswith("Config") and name not in ("PeftConfig", "PromptLearningConfig", "XLoraConfig")
    )
    plain_ones = {}
    for name in names:
        try:
            plain_ones[name] = str(getattr(getattr(peft, name)(), "peft_type", None))
        except (TypeError, ValueError):
            plain_ones[name] = "needs arguments"
    return plain_ones


def repr_names_the_class_and_fields():
    found = repr(LoraConfig(r=5))
    return [found.startswith("LoraConfig("), "r=5" in found, "task_type=None" in found]


def rank_pattern_in_the_config():
    config = LoraConfig(rank_pattern={"a": 1}, alpha_pattern={"b": 2})
    return [config.rank_pattern, config.alpha_pattern]
