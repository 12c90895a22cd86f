"""Every public name of PEFT is one of ours, and takes what PEFT's takes."""

from __future__ import annotations

import inspect
from typing import Any

import peft
import peft.functional
import peft.helpers
import peft.optimizers
import peft.tuners.tuners_utils
import peft.utils.hotswap
import pytest

import deltatune
from deltatune.layer import AdaptedLayer
from deltatune.peer.kinds import LAYERS
from deltatune.peer.methods import PROMPTS, TUNERS
from deltatune.peer.table import MODULES, home_of
from deltatune.tuner import Tuner
from tests.core.tiny import tiny

# An adapter added later is kept in the precision that the model was made with, not always in float32.
OTHER_ARGUMENTS = {"PeftModel.add_adapter(autocast_adapter_dtype=True)"}
# Derived tensors stay out of files unless asked for.
OTHER_DEFAULTS = ("save_projection=True", "save_precomputed_indices=True", "runtime_config=<factory>")


def test_all_names_of_peft_are_public_names():
    assert len(peft.__all__) == 154
    assert set(peft.__all__) <= set(deltatune.__all__)
    assert set(peft.__all__) <= set(MODULES["peft"])


def test_every_name_under_peft_leads_somewhere():
    missing = {f"{m}.{name}" for m, names in MODULES.items() for name in names if home_of(m, name) is None}
    assert missing == set()


# What transformers, accelerate, TRL, sentence-transformers and diffusers import.
IMPORTED = {
    "peft": "PeftConfig PeftMixedModel PeftModel PeftType LoraConfig LoKrConfig PrefixTuningConfig "
    "PromptLearningConfig AutoPeftModelForCausalLM get_peft_model get_peft_model_state_dict set_peft_model_state_dict "
    "inject_adapter_in_model",
    "peft.functional": "delete_adapter",
    "peft.helpers": "disable_input_dtype_casting",
    "peft.tuners.loha.layer": "LoHaLayer",
    "peft.tuners.lokr.layer": "LoKrLayer factorization",
    "peft.tuners.lora": "LoraLayer",
    "peft.tuners.lora.layer": "LoraLayer",
    "peft.tuners.tuners_utils": "BaseTunerLayer",
    "peft.utils": "ModulesToSaveWrapper _get_submodules get_peft_model_state_dict",
    "peft.utils.hotswap": "check_hotswap_configs_compatible hotswap_adapter_from_state_dict "
    "prepare_model_for_compiled_hotswap",
    "peft.utils.other": "AuxiliaryTrainingWrapper fsdp_auto_wrap_policy",
    "peft.utils.transformers_weight_conversion": "build_peft_weight_mapping",
}


@pytest.mark.parametrize("module", IMPORTED)
def test_what_other_libraries_import_is_there(module):
    assert [name for name in IMPORTED[module].split() if home_of(module, name) is None] == []


def test_prefixes_are_pefts():
    ours = __import__("deltatune.peer.models", fromlist=["x"]).PEFT_TYPE_TO_PREFIX_MAPPING
    assert {k.value: v for k, v in peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING.items()} == {k.value: ours[k] for k in ours}


def test_methods_are_called_as_in_peft():
    for named in (*TUNERS, *PROMPTS):
        package = __import__(f"peft.tuners.{named.folder}", fromlist=["x"])
        for name in (named.config, named.model):
            assert hasattr(package, name), name
        tuner = peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[named.peft_type]
        assert tuner.__name__ == named.model
        layer = getattr(tuner, "tuner_layer_cls", None)
        if named.layer and named.peft_type != "ADALORA":  # whose own PEFT forgets
            assert (layer.__name__, layer.adapter_layer_names) == (named.layer, named.tensors)
            assert LAYERS[named.folder][named.layer].adapter_layer_names == named.tensors


_SIZES = {
    "ADALORA": {"total_step": 10}, "C3A": {"block_size": 8}, "FOURIERFT": {"n_frequency": 10}, "MISS": {"r": 4},
    "WAVEFT": {"n_frequency": 10}, "PSOFT": {"r": 4}, "RANDLORA": {"r": 4}, "OFT": {"oft_block_size": 4, "r": 0},
    "BOFT": {"boft_block_size": 4}, "ADAMSS": {"r": 4, "num_subspaces": 1, "subspace_rank": 1}, "GRALORA": {"r": 4},
    "HIRA": {"r": 4}, "SHIRA": {"r": 2}, "ROAD": {"group_size": 4}, "TRAINABLE_TOKENS": {"token_indices": [1]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
}  # fmt: skip
# Those that keep elsewhere what PEFT has in the layers, and the two that PEFT does not put on layers.
_ELSEWHERE = ("LILY", "SHADOW", "TINYLORA", "UNILORA", "VBLORA", "XLORA", "ADAPTION_PROMPT")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("named", [n for n in TUNERS if n.peft_type not in _ELSEWHERE], ids=lambda named: named.folder)
def test_what_trains_is_called_as_in_peft(named):
    options: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], **_SIZES.get(named.peft_type, {})}
    if named.peft_type == "TRAINABLE_TOKENS":
        del options["target_modules"]
    made = [lib.get_peft_model(tiny("llama"), getattr(lib, named.config)(**options)) for lib in (peft, deltatune)]
    theirs, ours = ({name for name, p in model.named_parameters() if p.requires_grad} for model in made)
    assert theirs == ours and theirs


# ---------------------------------------------------------------------------------------------------------- signatures


def lacks(owner: str, theirs: Any, ours: Any, in_order: bool = True) -> set[str]:
    """Arguments of PEFT's callable that ours does not take, or takes with another default or at another place."""
    given, own = inspect.signature(theirs).parameters, inspect.signature(ours).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in own.values())
    found = set()
    for name, parameter in given.items():
        if name == "self" or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        if name not in own:
            found |= set() if takes_any else {f"{owner}({name})"}
        elif not _same(parameter.default, own[name].default):
            found.add(f"{owner}({name}={parameter.default!r})")
    order = [name for name, p in given.items() if p.kind is p.POSITIONAL_OR_KEYWORD and name in own]
    if in_order and order != [name for name in own if name in order]:
        found.add(f"{owner}: the order of {order}")
    return found


def _same(theirs: Any, ours: Any) -> bool:
    return theirs == ours or callable(theirs) or repr(theirs) == repr(ours)


VERBS = {
    peft.PeftModel: (
        deltatune.PeftModel,
        "from_pretrained load_adapter add_adapter delete_adapter set_adapter set_requires_grad save_pretrained "
        "disable_adapter get_base_model get_nb_trainable_parameters print_trainable_parameters push_to_hub "
        "create_or_update_model_card prepare_model_for_gradient_checkpointing get_prompt get_prompt_embedding_to_save "
        "get_layer_status get_model_status supports_lora_conversion forward generate",
    ),
    peft.tuners.tuners_utils.BaseTuner: (
        Tuner,
        "merge_and_unload unload merge_adapter unmerge_adapter enable_adapter_layers disable_adapter_layers "
        "delete_adapter set_adapter inject_adapter set_requires_grad supports_lora_conversion",
    ),
    peft.tuners.tuners_utils.BaseTunerLayer: (
        AdaptedLayer,
        "merge unmerge get_base_layer get_base_weight set_base_weight enable_adapters set_adapter delete_adapter "
        "set_requires_grad supports_lora_conversion",
    ),
    peft.tuners.lora.LoraLayer: (AdaptedLayer, "set_scale scale_layer unscale_layer get_delta_weight"),
    peft.tuners.lora.LoraModel: (Tuner, "subtract_mutated_init add_weighted_adapter"),
    peft.tuners.ia3.IA3Model: (deltatune.PeftModel, "add_weighted_adapter"),
    peft.PeftConfig: (
        deltatune.PeftConfig,
        "from_pretrained save_pretrained to_dict from_json_file from_peft_type check_kwargs",
    ),
    peft.AutoPeftModel: (deltatune.AutoPeftModel, "from_pretrained"),
}


def test_every_verb_is_there_and_takes_what_pefts_takes():
    verbs, arguments = set(), set()
    for theirs, (ours, names) in VERBS.items():
        for name in names.split():
            place = f"{theirs.__name__}.{name}"
            if not hasattr(ours, name):
                verbs.add(place)
            elif hasattr(theirs, name):
                arguments |= lacks(place, getattr(theirs, name), getattr(ours, name))
    assert verbs == set()
    assert arguments == OTHER_ARGUMENTS


def public_functions() -> list[str]:
    modules = (peft, peft.functional, peft.helpers, peft.optimizers, peft.utils.hotswap)
    return sorted(
        {f"{m.__name__}.{n}" for m in modules for n in MODULES[m.__name__] if inspect.isfunction(getattr(m, n, None))}
    )


@pytest.mark.parametrize("place", public_functions())
def test_every_function_takes_what_pefts_takes(place):
    module, _, name = place.rpartition(".")
    ours = home_of(module, name)
    assert lacks(place, getattr(__import__(module, fromlist=["x"]), name), ours) == set()


@pytest.mark.parametrize("named", (*TUNERS, *PROMPTS), ids=lambda named: named.folder)
def test_every_config_takes_what_pefts_takes(named):
    ours = deltatune.METHODS[named.peft_type].config
    found = lacks(named.config, getattr(peft, named.config), ours, in_order=False)  # they are given by name
    assert found <= {f"{named.config}({option})" for option in OTHER_DEFAULTS}
