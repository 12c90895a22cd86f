"""Small random models with a mixture of experts, whose weights are in parameters of three dimensions."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCAB = 61
ARCHITECTURES = ("mixtral", "qwen3_moe", "gpt_oss", "llama4", "deepseek_v3")
READINGS = ("eager", "batched_mm", "grouped_mm")  # ways in which transformers reads the parameters
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}


def moe(name: str, seed: int = 0, reading: str | None = None, **changes: Any) -> Any:
    """A model in evaluation mode; equal seeds give equal weights."""
    torch.manual_seed(seed)
    model = _BUILDERS[name](**changes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    if reading is not None and name != "llama4":
        model.set_experts_implementation(reading)
    return model


def ids(rows: int = 2, seed: int = 1) -> Tensor:
    return torch.randint(3, VOCAB, (rows, 7), generator=torch.Generator().manual_seed(seed))


def _mixtral(**changes: Any) -> nn.Module:
    sizes = {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**{**_SIZES, **sizes, **changes}))


def _qwen3_moe(**changes: Any) -> nn.Module:
    sizes = {"intermediate_size": 24, "moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2}
    return transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(**{**_SIZES, **sizes, "head_dim": 4, **changes})
    )


def _gpt_oss(**changes: Any) -> nn.Module:
    """With hidden and inner sides alike, so that shapes do not tell which is which."""
    sizes = {"intermediate_size": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 4}
    kinds = {"layer_types": ["full_attention"] * 2, "eos_token_id": 1}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**{**_SIZES, **sizes, **kinds, **rope, **changes}))


def _llama4(**changes: Any) -> nn.Module:
    sizes = {"intermediate_size": 24, "intermediate_size_mlp": 24, "num_local_experts": 4, "num_experts_per_tok": 1}
    return transformers.Llama4ForCausalLM(
        transformers.Llama4TextConfig(**{**_SIZES, **sizes, "head_dim": 4, "interleave_moe_layer_step": 1, **changes})
    )


def _deepseek_v3(**changes: Any) -> nn.Module:
    sizes = {"intermediate_size": 24, "moe_intermediate_size": 8, "n_routed_experts": 4, "num_experts_per_tok": 2}
    heads = {"num_key_value_heads": 4, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
    groups = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": None}
    return transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(**{**_SIZES, **sizes, **heads, **groups, **changes})
    )


_BUILDERS = {
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "gpt_oss": _gpt_oss,
    "llama4": _llama4,
    "deepseek_v3": _deepseek_v3,
}
