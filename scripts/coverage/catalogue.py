"""The model types of transformers' auto classes beside those of the conformance list, as entries of such a list."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from scripts.coverage.shrink import shrunk

# Auto class, name of its table, family of the conformance list. A type is taken in the first that knows it.
TASKS = [
    ("AutoModelForCausalLM", "CAUSAL_LM", "decoder"),
    ("AutoModelForSeq2SeqLM", "SEQ_TO_SEQ_CAUSAL_LM", "encoder-decoder"),
    ("AutoModelForSequenceClassification", "SEQUENCE_CLASSIFICATION", "encoder"),
    ("AutoModelForMaskedLM", "MASKED_LM", "masked"),
    ("AutoModelForImageClassification", "IMAGE_CLASSIFICATION", "vision"),
    ("AutoModelForAudioClassification", "AUDIO_CLASSIFICATION", "audio"),
    ("AutoModelForSpeechSeq2Seq", "SPEECH_SEQ_2_SEQ", "speech-to-text"),
    ("AutoModelForImageTextToText", "IMAGE_TEXT_TO_TEXT", "decoder"),  # asked with text alone
]

_WAVES = {
    "conv_dim": [16, 16], "conv_stride": [4, 4], "conv_kernel": [8, 4], "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False,
    "feat_extract_norm": "layer", "squeeze_factor": 1,
}  # fmt: skip
_HEARING = (
    "hubert", "data2vec-audio", "unispeech", "unispeech-sat", "wav2vec2-conformer", "wavlm", "sew", "sew-d",
)  # fmt: skip
_UNGROUPED = {"num_key_value_heads": 4}
_SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}

# What shrinking by the names of fields does not give.
CHANGES: dict[str, dict[str, Any]] = {
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "esm": {"vocab_size": 96, "mask_token_id": 3, "position_embedding_type": "rotary"},
    "esmc": _UNGROUPED,
    "zaya": {"num_experts_per_tok": 1},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "moe", "attention"], "num_hidden_layers": 4},
    "zamba2": {
        "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "mamba_expand": 2,
        "attention_hidden_size": 64, "attention_head_dim": 16,
    },
    "gemma4_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "ministral": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "mobilebert": {"true_hidden_size": 32, "intra_bottleneck_size": 32, "num_feedforward_networks": 1},
    "falcon_h1": {"mamba_expand": 2},
    "granitemoehybrid": {"mamba_expand": 2, "layer_types": ["mamba", "attention"]},
    **dict.fromkeys(_HEARING, _WAVES),
    **{
        name: {"text_config": _SECTIONS}
        for name in ("glm46v", "glm4v", "glm_ocr", "glmga", "paddleocr_vl", "qwen2_vl", "qwen2_5_vl")
    },
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A model type, and how it is asked."""

    model_type: str
    auto_class: str
    family: str


def entries(known: set[str]) -> Iterator[Entry]:
    """Every model type of `TASKS` that is not among the `known`."""
    from transformers.models.auto import modeling_auto

    seen = set(known)
    for auto_class, table, family in TASKS:
        for model_type in getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES"):
            if model_type not in seen:
                seen.add(model_type)
                yield Entry(model_type, auto_class, family)


def settings(entry: Entry) -> dict[str, Any]:
    """Settings of a toy of this type; raises whatever its config raises."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(entry.model_type)
    made = shrunk(config)
    if entry.auto_class == "AutoModelForCausalLM" and config.to_dict().get("is_decoder") is False:
        made["is_decoder"] = True  # an encoder's config, asked as a decoder
    for name, value in CHANGES.get(entry.model_type, {}).items():
        made[name] = {**made[name], **value} if isinstance(value, dict) and isinstance(made.get(name), dict) else value
    return made
