"""deltatune: parameter-efficient fine-tuning. A frozen base model, small trainable adapters grafted onto it.

Public names are those of PEFT with the same meaning. They are loaded when first used, so that importing the package
costs torch and nothing else.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

__version__ = "0.1.0"

_NAMES = {
    "deltatune.auto": (
        *("AutoPeftModel", "AutoPeftModelForCausalLM", "AutoPeftModelForFeatureExtraction"),
        *("AutoPeftModelForQuestionAnswering", "AutoPeftModelForSeq2SeqLM"),
        *("AutoPeftModelForSequenceClassification", "AutoPeftModelForTokenClassification"),
    ),
    "deltatune.adapter": ("Adapter", "Applied", "LinearMap", "Method", "Stored"),
    "deltatune.callback": ("AdapterCallback",),
    "deltatune.calls": ("Value", "call_values"),
    "deltatune.combine.convert": ("convert_to_lora", "save_as_lora"),
    "deltatune.combine.intruders": ("reduce_intruder_dimension",),
    "deltatune.config": ("PeftConfig", "PeftType", "TaskType", "get_peft_config"),
    "deltatune.errors": ("NoMatchingPeftModuleError", "PeftError", "PeftWarning"),
    "deltatune.functional": ("get_peft_model_state_dict", "inject_adapter_in_model", "set_peft_model_state_dict"),
    "deltatune.helpers": (
        *("KappaTuneSelector", "cast_mixed_precision_params", "check_if_peft_model"),
        *("find_kappa_target_modules", "get_base_model_state_dict", "inspect_matched_modules"),
        *("prepare_model_for_kbit_training", "rescale_adapter_scale", "set_base_model_state_dict"),
        "shift_tokens_right",
        *("update_forward_signature", "update_generate_signature", "update_signature"),
    ),
    "deltatune.kernels.linear_cross_entropy": ("linear_cross_entropy",),
    "deltatune.layer": ("AdaptedLayer",),
    "deltatune.lora.covariance": ("preprocess_corda",),
    "deltatune.lora.eva": ("initialize_lora_eva_weights",),
    "deltatune.lora.explained": ("get_eva_state_dict",),
    "deltatune.lora.gradients": ("preprocess_loraga",),
    "deltatune.lora.options": ("CordaConfig", "EvaConfig", "LoftQConfig", "LoraGAConfig", "LoraRuntimeConfig"),
    "deltatune.lora.replace": ("replace_lora_weights_loftq",),
    "deltatune.lora.arrow_model": ("create_arrow_model",),
    "deltatune.lora.trainer": ("MontecloraTrainerMixin",),
    "deltatune.lora.config": ("LoraConfig",),
    "deltatune.lora.variants.arrow": ("ArrowConfig",),
    "deltatune.lora.variants.bdlora": ("BdLoraConfig",),
    "deltatune.lora.variants.caching": ("DoraCaching",),
    "deltatune.lora.variants.kasa": ("KasaConfig",),
    "deltatune.lora.variants.monteclora": ("MontecloraConfig",),
    "deltatune.lora.variants.velora": ("VeloraConfig",),
    "deltatune.loss.stage": ("chunk_loss",),
    "deltatune.methods.adalora": ("AdaLoraConfig",),
    "deltatune.methods.adamss": ("AdamssConfig",),
    "deltatune.methods.gralora": ("GraloraConfig",),
    "deltatune.methods.hira": ("HiraConfig",),
    "deltatune.methods.bitfit": ("BitFitConfig",),
    "deltatune.methods.boft": ("BOFTConfig",),
    "deltatune.methods.beft": ("BeftConfig",),
    "deltatune.methods.frod": ("FrodConfig",),
    "deltatune.methods.glora": ("GloraConfig",),
    "deltatune.methods.c3a": ("C3AConfig",),
    "deltatune.methods.deft": ("DeftConfig",),
    "deltatune.methods.delora": ("DeloraConfig",),
    "deltatune.methods.diff_pruning": ("DiffPruningConfig",),
    "deltatune.methods.fourierft": ("FourierFTConfig",),
    "deltatune.methods.hra": ("HRAConfig",),
    "deltatune.methods.ia3": ("IA3Config",),
    "deltatune.methods.ln_tuning": ("LNTuningConfig",),
    "deltatune.methods.loha": ("LoHaConfig",),
    "deltatune.methods.lokr": ("LoKrConfig",),
    "deltatune.methods.miss": ("MissConfig",),
    "deltatune.methods.oft": ("OFTConfig",),
    "deltatune.methods.osf": ("OSFConfig",),
    "deltatune.methods.pvera": ("PveraConfig",),
    "deltatune.methods.randlora": ("RandLoraConfig",),
    "deltatune.methods.peanut": ("PeanutConfig",),
    "deltatune.methods.psoft": ("PsoftConfig",),
    "deltatune.methods.trainable_tokens": ("TrainableTokensConfig",),
    "deltatune.methods.road": ("RoadConfig",),
    "deltatune.methods.waveft": ("WaveFTConfig",),
    "deltatune.methods.shira": ("ShiraConfig",),
    "deltatune.methods.supertuning": ("SupertuningConfig",),
    "deltatune.methods.tinylora": ("TinyLoraConfig",),
    "deltatune.methods.unilora": ("UniLoraConfig",),
    "deltatune.methods.vblora": ("VBLoRAConfig",),
    "deltatune.methods.vera": ("VeraConfig",),
    "deltatune.model": ("PeftModel",),
    "deltatune.optimizers": (
        *("LoraFAOptimizer", "create_lorafa_optimizer", "create_loraplus_optimizer", "create_riemannian_optimizer"),
        "loraplus_groups",
    ),
    "deltatune.outputs.bottleneck": ("BottleneckConfig",),
    "deltatune.outputs.compacter": ("CompacterConfig",),
    "deltatune.outputs.lily": ("LilyConfig",),
    "deltatune.outputs.poly": ("PolyConfig",),
    "deltatune.outputs.reft": ("ReftConfig",),
    "deltatune.peer.mixed": ("PeftMixedModel",),
    "deltatune.peer.models": (
        *("PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_MIXED_MODEL_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING"),
        *("LoraModel", "AdaLoraModel", "AdamssModel", "AdaptionPromptModel", "BeftModel"),
        *("BOFTModel", "C3AModel", "DeftModel", "DeloraModel", "FourierFTModel"),
        *("FrodModel", "GloraModel", "GraloraModel", "HiraModel", "HRAModel"),
        *("IA3Model", "LilyModel", "LNTuningModel", "LoHaModel", "LoKrModel"),
        *("MissModel", "OFTModel", "OSFModel", "PeanutModel", "PolyModel"),
        *("PsoftModel", "PveraModel", "RandLoraModel", "RoadModel", "ShadowModel"),
        *("ShiraModel", "SupertuningModel", "TinyLoraModel", "TrainableTokensModel", "UniLoraModel"),
        *("VBLoRAModel", "VeraModel", "WaveFTModel", "XLoraModel"),
    ),
    "deltatune.peer.targets": ("TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING",),
    "deltatune.peer.utils": ("bloom_model_postprocess_past_key_value",),
    "deltatune.prompts.adaption_prompt": ("AdaptionPromptConfig",),
    "deltatune.prompts.cartridge": ("CartridgeConfig", "CartridgeEncoder"),
    "deltatune.prompts.compose": ("compose_cartridge_adapters", "compose_prefix_folders", "compose_prefixes"),
    "deltatune.prompts.config": ("PromptLearningConfig",),
    "deltatune.prompts.cpt": ("CPTConfig", "CPTEmbedding"),
    "deltatune.prompts.multitask": (
        *("MultitaskPromptEmbedding", "MultitaskPromptTuningConfig", "MultitaskPromptTuningInit"),
    ),
    "deltatune.prompts.p_tuning": ("PromptEncoder", "PromptEncoderConfig", "PromptEncoderReparameterizationType"),
    "deltatune.prompts.prefix": ("PrefixEncoder", "PrefixTuningConfig"),
    "deltatune.prompts.prompt_tuning": ("PromptEmbedding", "PromptTuningConfig", "PromptTuningInit"),
    "deltatune.prompts.serve": (
        *("initialize_kv_prefix_from_past_key_values", "prompt_embeddings_from_past_key_values", "to_cache"),
    ),
    "deltatune.prompts.text": ("initialize_kv_prefix_from_text",),
    "deltatune.registry": ("METHODS", "register_method"),
    "deltatune.storage.weights": ("load_peft_weights",),
    "deltatune.tasks": (
        *("MODEL_TYPE_TO_PEFT_MODEL_MAPPING", "PeftModelForCausalLM", "PeftModelForFeatureExtraction"),
        *("PeftModelForQuestionAnswering", "PeftModelForSeq2SeqLM", "PeftModelForSequenceClassification"),
        *("PeftModelForTokenClassification", "get_peft_model"),
    ),
    "deltatune.schedule": ("Schedule",),
    "deltatune.shadow.config": ("ShadowConfig",),
    "deltatune.shadow.detached": ("detached_shadow",),
    "deltatune.status": ("TunerLayerStatus", "TunerModelStatus", "get_layer_status", "get_model_status"),
    "deltatune.store.serving": ("AdapterStore",),
    "deltatune.xlora.config": ("XLoraConfig",),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'deltatune' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
