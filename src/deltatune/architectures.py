"""Which layers LoRA and most of its relatives adapt in an architecture, by model type."""

from __future__ import annotations

from typing import Any

_Q_AND_V = ["q_proj", "v_proj"]
_TARGETS: dict[str, list[str] | str] = {
    **{name: ["q", "v"] for name in ("t5", "mt5", "umt5")},
    **{name: ["query", "value"] for name in ("bert", "roberta", "xlm-roberta", "electra", "layoutlm", "camembert")},
    **dict.fromkeys(("bart", "mbart", "pegasus", "m2m_100", "marian", "blenderbot", "plbart"), _Q_AND_V),
    **dict.fromkeys(("opt", "gptj", "gpt_neo", "llama", "llama4", "mistral", "mixtral", "stablelm"), _Q_AND_V),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "qwen2", "qwen3", "whisper"), _Q_AND_V),
    **{
        name: ["query_key_value"]
        for name in ("bloom", "gpt_neox", "chatglm", "RefinedWebModel", "RefinedWeb", "falcon")
    },
    **{name: ["c_attn"] for name in ("gpt2", "gpt_bigcode")},
    "blip-2": ["q", "v", "q_proj", "v_proj"],
    "deberta-v2": ["query_proj", "value_proj"],
    "deberta": ["in_proj"],
    "distilbert": ["q_lin", "v_lin"],
    "mpt": ["Wqkv"],
    "btlm": ["c_proj", "c_attn"],
    "codegen": ["qkv_proj"],
    "phi": ["q_proj", "v_proj", "fc1", "fc2"],
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "nemotron_h": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "rwkv": ["key", "value", "receptance", "output"],
    "rwkv7": ["r_proj", "k_proj", "v_proj", "o_proj", "key", "value"],
}


def usual_targets(model_type: str) -> Any:
    """The layers that LoRA and most of its relatives adapt in an architecture, or None."""
    return _TARGETS.get(model_type)


def model_types() -> list[str]:
    """The architectures that are known."""
    return list(_TARGETS)


_LLAMAS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"]
_PROJECTIONS: dict[str, list[str]] = {
    **dict.fromkeys(("llama", "llama4", "mistral", "mixtral", "phi", "qwen2", "qwen3"), _LLAMAS),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), _LLAMAS),
    **{name: ["c_attn", "c_proj"] for name in ("gpt2", "gpt_bigcode")},
    **{name: ["query_key_value", "dense_4h_to_h"] for name in ("bloom", "gpt_neox", "falcon")},
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "gptj": ["q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"],
}


def every_projection(model_type: str) -> Any:
    """Every projection of an architecture's blocks; of one that is not known every linear layer."""
    return _PROJECTIONS.get(model_type, "all-linear")
