"""Settings of transformers' configs at toy size, made from each config's own defaults.

A default config says which fields a model has. A field whose name tells what it counts (a width, layers, heads,
experts, ...) gets a small value, in nested configs too; every other field keeps its default. Nothing here knows a model
by its name: what single models need beside is in `scripts.coverage.catalogue`.
"""

from __future__ import annotations

import re
from typing import Any

VOCABULARY, WIDTH, HEADS, GROUPS, LAYERS = 96, 32, 4, 2, 2
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

# Of the patterns that match the whole name of a field, the first decides.
SIZES: list[tuple[str, int | float]] = [
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads|mamba_d_head|mamba_head_dim|mamba_headdim", 8),
    (r"mamba_d_ssm|lru_width", 64),
    (r"(.*_)?vocab_size(_per_layer_input)?|vocab_size_.*|n_vocab", VOCABULARY),
    (r"(moe|shared_expert|expert)_(intermediate|ffn|ffn_hidden|hidden)_size", 16),
    (r"(.*_)?(intermediate_size|ffn_dim|d_ff|ffn_hidden_size|d_inner|hidden_dim|n_inner|inner_dim)(_mlp)?", 2 * WIDTH),
    (r"num_key_value_heads|n_kv_heads|num_kv_heads|decoder_num_key_value_heads|kv_n_heads", GROUPS),
    (r"linear_num_key_heads", 2),
    (r"linear_num_value_heads", 4),
    (r"linear_(key|value)_head_dim|qk_rope_head_dim|qk_nope_head_dim|v_head_dim|hidden_size_per_layer_input", 8),
    (r"(.*_)?(num_attention_heads|n_heads?|num_heads|attention_heads|nhead|num_query_heads|n_attention_heads)", HEADS),
    (r"q_lora_rank|kv_lora_rank|o_lora_rank|qk_head_dim", 16),
    (r"(.*_)?(head_dim|d_kv|attention_head_size|head_size|kv_channels|d_head|attention_key_size)", 8),
    (r"rotary_dim|rope_dim|mamba_dt_rank|time_step_rank", 4),
    (r"((num|n)_(routed_|local_)?|moe_num_)experts", 4),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts|n_groups?|topk_group|num_expert_group", 1),
    (r"num_experts_per_tok|moe_topk|num_experts_per_token|moe_k|top_k_experts|moe_top_k", 2),
    (r"first_k_dense_replace|num_dense_layers|num_nextn_predict_layers|num_kv_shared_layers|moe_layer_start_index", 0),
    (
        r"(.*_)?(num_hidden_layers|n_layers?|num_layers|encoder_layers|decoder_layers|depth|num_blocks"
        r"|num_encoder_layers|num_decoder_layers|hidden_layers)",
        LAYERS,
    ),
    (
        r"(original_)?max_position_embeddings|n_positions|n_ctx|max_seq_len|max_sequence_length|max_target_positions"
        r"|max_(encoder|decoder)_position_embeddings|max_seq_length|max_source_positions",
        128,
    ),
    (r"sliding_window(_size)?|attention_window_size|attention_chunk_size|window_size|local_attention", 8),
    (r"(mamba_)?(d_state|state_dim|ssm_state_size|state_size)|chunk_size|block_size|mamba_chunk_size", 16),
    (r"mamba_(n_groups|ngroups)", 1),
    (r"image_size|img_size|num_mel_bins|input_feat_per_channel|feature_size", 16),
    (r"patch_size", 4),
    (r"temporal_patch_size|spatial_merge_size", 2),
    (
        r"(.*_)?(hidden_size|d_model|n_embd|embed_dim|embedding_size|model_dim|word_embed_proj_dim|hidden_channels"
        r"|embedding_dim|d_embed|output_size|emb_dim|projection_dim|classifier_proj_size)",
        WIDTH,
    ),
    (r".*(dropout|drop_rate|drop_path_rate|_pdrop|layerdrop|dropout_prob|dropout_p|jitter_noise|drop)", 0.0),
    (r"conv_l_cache|conv_kernel_size|num_labels", 3),
]
_SIZES = [(re.compile(pattern, re.IGNORECASE), small) for pattern, small in SIZES]
_BY_LAYER = re.compile(r"(.*_)?layer_types|layers_block_type|block_types|moe_layers|.*_pattern")
_NO_SIZES = {"model_type", "transformers_version", "architectures", "dtype", "id2label", "label2id", "torch_dtype"}


def shrunk(config: Any) -> dict[str, Any]:
    """Settings with which the class of `config` makes a toy of the same kind."""
    settings: dict[str, Any] = {}
    defaults = config.to_dict()
    for name, value in defaults.items():
        nested = vars(config).get(name)
        if name in _NO_SIZES:
            continue
        if hasattr(nested, "to_dict"):
            settings[name] = {"model_type": nested.model_type, **shrunk(nested)}
        elif (small := _small(name, value)) is not None:
            settings[name] = small
    return _agreeing(settings, defaults)


def _small(name: str, value: Any) -> Any:
    if name.endswith(("_token_id", "_token_index")):
        return _token(name, value)
    if _BY_LAYER.fullmatch(name):
        kinds = list(dict.fromkeys(value))[:LAYERS] if isinstance(value, (list, tuple)) else []
        return (kinds * LAYERS)[:LAYERS] or None
    small = next((small for pattern, small in _SIZES if pattern.fullmatch(name)), None)
    if small is None or value is None or isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        return small
    is_by_layer = isinstance(value, (list, tuple)) and len(value) > 8 and isinstance(value[0], (int, float))
    return [small] * LAYERS if is_by_layer else None


def _token(name: str, value: Any) -> int | None:
    value = next(iter(value), None) if isinstance(value, list) else value
    if name in TOKENS:
        return TOKENS[name]
    inside = value is not None and 0 <= value < VOCABULARY
    return value if inside or value is None else VOCABULARY - 6 + sum(map(ord, name)) % 6


def _agreeing(settings: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """What has to agree in models of one kind."""
    latent = "kv_lora_rank" in settings
    if latent:  # a key and a value head for each query head
        settings["num_key_value_heads"] = settings.get("num_attention_heads", HEADS)
    elif "head_dim" in defaults:
        settings.setdefault("head_dim", 8)
    if defaults.get("expand") and "num_heads" in settings and "state_size" in settings:
        settings["num_heads"] = 8
    return settings
