"""PEFT's modules and names, and where deltatune has each. Data, and one function that looks a name up.

    module of PEFT -> name -> "module:attribute" of deltatune, or "module|module:attribute"

A name that stands here and is not found in deltatune is one that this version lacks; using it says so.
"""

from __future__ import annotations

import importlib
from typing import Any

from deltatune.peer.methods import PROMPTS, TUNERS, Named

_KINDS, _MODELS, _UTILS, _TARGETS = (f"deltatune.peer.{name}" for name in ("kinds", "models", "utils", "targets"))
_LOADING, _AVAILABLE = "deltatune.peer.loading", "deltatune.peer.available"


def _at(home: str, names: str) -> dict[str, str]:
    """Each name in one place, or the first of several that has it; `name=other` where deltatune calls it otherwise."""
    pairs = [(name.partition("=")[0], name.partition("=")[2] or name) for name in names.split()]
    return {name: f"{home}:{own}" for name, own in pairs}


_AUTO = _at(
    "deltatune",
    "AutoPeftModel AutoPeftModelForCausalLM AutoPeftModelForFeatureExtraction AutoPeftModelForQuestionAnswering "
    "AutoPeftModelForSeq2SeqLM AutoPeftModelForSequenceClassification AutoPeftModelForTokenClassification",
)
_PEFT_MODELS = _at(
    "deltatune",
    "PeftModel PeftModelForCausalLM PeftModelForFeatureExtraction PeftModelForQuestionAnswering PeftModelForSeq2SeqLM "
    "PeftModelForSequenceClassification PeftModelForTokenClassification",
)
_STATUS = _at("deltatune", "TunerLayerStatus TunerModelStatus get_layer_status get_model_status")
_TABLES = _at(_MODELS, "PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_TUNER_MAPPING PEFT_TYPE_TO_MIXED_MODEL_MAPPING") | _at(
    "deltatune", "MODEL_TYPE_TO_PEFT_MODEL_MAPPING"
)
_ERRORS = _at("deltatune", "PeftError PeftWarning NoMatchingPeftModuleError")
_TYPES = _at("deltatune", "PeftType TaskType")
_STATES = _at(
    "deltatune|deltatune.helpers",
    "get_peft_model_state_dict set_peft_model_state_dict get_base_model_state_dict set_base_model_state_dict "
    "load_peft_weights",
)
_ENCODERS = _at(
    "deltatune",
    "CartridgeEncoder CPTEmbedding MultitaskPromptEmbedding PrefixEncoder PromptEmbedding PromptEncoder "
    "MultitaskPromptTuningInit PromptEncoderReparameterizationType PromptTuningInit",
)
_FROM_TEXT = _at(
    "deltatune",
    "compose_cartridge_adapters initialize_kv_prefix_from_past_key_values initialize_kv_prefix_from_text "
    "prompt_embeddings_from_past_key_values",
)
_LORA_STARTS = _at(
    "deltatune",
    "ArrowConfig BdLoraConfig EvaConfig KasaConfig LoftQConfig LoraGAConfig LoraRuntimeConfig MontecloraConfig "
    "VeloraConfig convert_to_lora save_as_lora create_arrow_model get_eva_state_dict initialize_lora_eva_weights "
    "preprocess_loraga",
)
_TARGET_TABLES = _at(
    _TARGETS,
    " ".join(f"TRANSFORMERS_MODELS_TO_{n.folder.upper()}_TARGET_MODULES_MAPPING" for n in TUNERS if n.layer)
    + " TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING "
    "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING",
)
_CONSTANTS = _TARGET_TABLES | _at(
    _UTILS,
    "CONFIG_NAME WEIGHTS_NAME SAFETENSORS_WEIGHTS_NAME TOKENIZER_CONFIG_NAME INCLUDE_LINEAR_LAYERS_SHORTHAND "
    "EMBEDDING_LAYER_NAMES SEQ_CLS_HEAD_NAMES DUMMY_TARGET_MODULES DUMMY_MODEL_CONFIG ALLOWED_COMPUTE_DTYPES "
    "UPCAST_DTYPES MIN_TARGET_MODULES_FOR_OPTIMIZATION bloom_model_postprocess_past_key_value",
)
_WRAPPERS = _at(_KINDS, "AuxiliaryTrainingWrapper ModulesToSaveWrapper TrainableTokensWrapper")
_SMALL = _at("deltatune.helpers", "shift_tokens_right get_quantization_config fsdp_auto_wrap_policy") | _at(
    _UTILS,
    "transpose infer_device id_tensor_storage str_to_bool match_target_against_key get_pattern_key _get_submodules "
    "_get_batch_size _get_input_embeddings_name _is_valid_match _freeze_adapter",
)
_KBIT = _at(
    "deltatune|deltatune.helpers",
    "prepare_model_for_kbit_training cast_mixed_precision_params replace_lora_weights_loftq",
)
_HELPERS = _at(
    "deltatune|deltatune.helpers",
    "update_forward_signature update_generate_signature update_signature check_if_peft_model rescale_adapter_scale "
    "DoraCaching MontecloraTrainerMixin KappaTuneSelector find_kappa_target_modules disable_input_dtype_casting",
)
_OPTIMIZERS = _at(
    "deltatune|deltatune.optimizers", "create_lorafa_optimizer create_loraplus_optimizer create_riemannian_optimizer"
)
_HOTSWAP = _at(
    "deltatune|deltatune.hotswap",
    "hotswap_adapter hotswap_adapter_from_state_dict prepare_model_for_compiled_hotswap "
    "check_hotswap_configs_compatible",
)
_FUNCTIONAL = _at(
    "deltatune.functional",
    "inject_adapter_in_model set_adapter delete_adapter set_requires_grad cast_adapter_dtype get_peft_model_state_dict "
    "set_peft_model_state_dict",
)


def _method(named: Named) -> dict[str, dict[str, str]]:
    """The package of one method and its files."""
    config, package = _at("deltatune", named.config), f"peft.tuners.{named.folder}"
    model = _at(_MODELS if named in TUNERS else "deltatune", named.model)
    layers = {name: f"layer of {named.folder}" for name in (named.layer, *named.kinds) if name}
    return {
        package: config | model | layers,
        f"{package}.config": config | _at("deltatune", "PeftConfig PeftType"),
        f"{package}.model": model | _at(_KINDS, "BaseTuner"),
        **({f"{package}.layer": layers | _at(_KINDS, "BaseTunerLayer")} if layers else {}),
    }


_CONFIGS = _at("deltatune", " ".join(named.config for named in (*TUNERS, *PROMPTS)))
_METHODS = {module: names for named in (*TUNERS, *PROMPTS) for module, names in _method(named).items()}
_ALL_CONFIGS = _CONFIGS | _at("deltatune", "PeftConfig PromptLearningConfig")
_ALL_MODELS = _at(_MODELS, " ".join(named.model for named in TUNERS))

MODULES: dict[str, dict[str, str]] = {
    "peft": {
        **_AUTO, **_PEFT_MODELS, **_STATUS, **_TABLES, **_ERRORS, **_TYPES, **_STATES, **_ENCODERS, **_FROM_TEXT,
        **_LORA_STARTS, **_KBIT, **_ALL_CONFIGS, **_ALL_MODELS,
        **_at("deltatune", "get_peft_config get_peft_model inject_adapter_in_model PeftMixedModel"),
        **_at("deltatune", "find_kappa_target_modules shift_tokens_right bloom_model_postprocess_past_key_value"),
        **_at(_TARGETS, "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING"),
    },
    "peft.auto": {**_AUTO, **_PEFT_MODELS},
    "peft.config": _at("deltatune", "PeftConfig PromptLearningConfig PeftConfigMixin=PeftConfig"),
    "peft.functional": _FUNCTIONAL,
    "peft.helpers": _HELPERS,
    "peft.import_utils": _at(
        _AVAILABLE,
        "is_bnb_available is_bnb_4bit_available is_gptqmodel_available is_optimum_available is_torch_tpu_available "
        "is_aqlm_available is_eetq_available is_hqq_available is_inc_available is_torchao_available is_xpu_available "
        "is_diffusers_available is_te_available is_te_pytorch_available",
    ),
    "peft.mapping": {
        **_TABLES, **_at(_MODELS, "PEFT_TYPE_TO_PREFIX_MAPPING"),
        **_at("deltatune", "get_peft_config inject_adapter_in_model get_peft_model"),
    },
    "peft.mapping_func": {**_TABLES, **_at("deltatune", "get_peft_model")},
    "peft.mixed_model": {**_at("deltatune", "PeftMixedModel"), **_TABLES},
    "peft.peft_model": {
        **_PEFT_MODELS, **_STATUS, **_TABLES, **_STATES, **_ENCODERS,
        **_at("deltatune", "PeftConfig PeftMixedModel get_peft_config"),
    },
    "peft.optimizers": _OPTIMIZERS,
    "peft.optimizers.lorafa": _at("deltatune", "create_lorafa_optimizer LoraFAOptimizer"),
    "peft.optimizers.loraplus": _at("deltatune", "create_loraplus_optimizer"),
    "peft.optimizers.riemannian": _at("deltatune", "create_riemannian_optimizer"),
    "peft.tuners": {**_CONFIGS, **_ALL_MODELS, **_ENCODERS, **_LORA_STARTS, **_at(_KINDS, "MixedModel")},
    "peft.tuners.tuners_utils": {
        **_at(_KINDS, "BaseTuner BaseTunerLayer BasePromptEncoder ModulesToSaveWrapper AuxiliaryTrainingWrapper"),
        **_at(_UTILS, "check_target_module_exists clone_module find_parameter_name_by_module"),
        **_at(_UTILS, "get_device_map _get_submodules INCLUDE_LINEAR_LAYERS_SHORTHAND"),
        **_at("deltatune.functional", "set_adapter delete_adapter cast_adapter_dtype set_requires_grad"),
        **_at("deltatune.replication", "replicate_layers"),
        **_at("deltatune", "PeftConfig inspect_matched_modules"),
    },
    "peft.tuners.lycoris_utils": _at(_KINDS, "LycorisLayer"),
    "peft.tuners.mixed": _at(_KINDS, "MixedModel"),
    "peft.tuners.mixed.model": _at(_KINDS, "MixedModel"),
    "peft.utils": {
        **_CONSTANTS, **_WRAPPERS, **_SMALL, **_KBIT, **_ERRORS, **_TYPES, **_STATES,
        **_at("deltatune|deltatune.helpers", "map_cache_to_layer_device_map"),
    },
    "peft.utils.constants": _CONSTANTS,
    "peft.utils.error": _ERRORS,
    "peft.utils.warning": _ERRORS,
    "peft.utils.hotswap": _HOTSWAP,
    "peft.utils.incremental_pca": _at("deltatune.lora.pca", "IncrementalPCA"),
    "peft.utils.integrations": _at(
        "deltatune|deltatune.helpers",
        "gather_params_ctx check_deepspeed_zero3_enabled dequantize_module_weight "
        "get_layer_device_map map_cache_to_layer_device_map",
    ) | _at("accelerate", "init_empty_weights"),
    "peft.utils.loftq_utils": _at("deltatune", "replace_lora_weights_loftq"),
    "peft.utils.merge_utils": _at(
        "deltatune|deltatune.combine.rules",
        "task_arithmetic magnitude_prune ties dare_linear dare_ties",
    ),
    "peft.utils.other": {**_CONSTANTS, **_WRAPPERS, **_SMALL, **_KBIT},
    "peft.utils.peft_types": _TYPES,
    "peft.utils.save_and_load": _STATES,
    "peft.utils.transformers_weight_conversion": _at(_LOADING, "build_peft_weight_mapping"),
    **_METHODS,
    "peft.tuners.lora": {**_METHODS["peft.tuners.lora"], **_LORA_STARTS},
    "peft.tuners.lora.config": {
        **_METHODS["peft.tuners.lora.config"], **_LORA_STARTS, **_at("deltatune", "CordaConfig"),
    },
    "peft.tuners.lora.bnb": _at(_KINDS, "Linear8bitLt Linear4bit"),
    "peft.tuners.lora.conversion": _at("deltatune", "convert_to_lora save_as_lora"),
    "peft.tuners.lora.arrow": _at("deltatune", "create_arrow_model"),
    "peft.tuners.lora.corda": _at("deltatune", "preprocess_corda"),
    "peft.tuners.lora.eva": _at("deltatune", "get_eva_state_dict initialize_lora_eva_weights"),
    "peft.tuners.lora.intruders": _at("deltatune", "reduce_intruder_dimension"),
    "peft.tuners.lora.loraga": _at("deltatune", "preprocess_loraga"),
    "peft.tuners.lokr.layer": {
        **_METHODS["peft.tuners.lokr.layer"], **_at("deltatune.methods.lokr", "factorization=sides"),
    },
    "peft.tuners.cartridge.utils": _FROM_TEXT,
}  # fmt: skip
for _folder in ("multitask_prompt_tuning", "p_tuning", "prompt_tuning"):
    _inits = _at("deltatune", "MultitaskPromptTuningInit PromptEncoderReparameterizationType PromptTuningInit")
    MODULES[f"peft.tuners.{_folder}"] |= _inits
    MODULES[f"peft.tuners.{_folder}.config"] |= _inits


def home_of(module: str, name: str) -> Any:
    """What deltatune has under a name of one of PEFT's modules; None where it has nothing."""
    kind, _, of = MODULES[module].get(name, "").partition(" of ")
    if kind == "layer":
        from deltatune.peer.kinds import LAYERS

        return LAYERS[of].get(name)
    places, _, attribute = kind.partition(":")
    found = (_attribute(place, attribute) for place in places.split("|") if place)
    return next((value for value in found if value is not None), None)


def _attribute(place: str, attribute: str) -> Any:
    try:
        return getattr(importlib.import_module(place), attribute, None)
    except ModuleNotFoundError as missing:
        if missing.name is None or not f"{place}.".startswith(
            f"{missing.name}."
        ):  # something that the home itself needs
            raise
        return None
