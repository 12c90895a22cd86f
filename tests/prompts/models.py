"""Tiny random models of many kinds, with weights at a scale where attention matters."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from deltatune import PeftModel, PrefixTuningConfig, get_peft_model
from deltatune.errors import PeftWarning
from deltatune.inject import trained_copies

TOKENS: dict[str, Any] = {
    "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "tie_word_embeddings": False,
}  # fmt: skip
LLAMA = {
    **TOKENS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
BERT = {
    "vocab_size": 64, "pad_token_id": 0, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0, "num_labels": 3,
}  # fmt: skip
T5 = {
    **TOKENS, "decoder_start_token_id": 0, "d_model": 32, "d_kv": 8,
    "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "dropout_rate": 0.0,
}  # fmt: skip
BART = {
    **TOKENS, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
    "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}  # fmt: skip
GPT = {
    **TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}  # fmt: skip
MPT = {**TOKENS, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, "expansion_ratio": 2}
FALCON = {
    **TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_dropout": 0.0,
    "attention_dropout": 0.0, "multi_query": False, "new_decoder_architecture": False, "alibi": False,
}  # fmt: skip
GPT_NEO = {
    **TOKENS, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64, "window_size": 32,
    "attention_types": [[["global", "local"], 1]], "resid_dropout": 0.0, "embed_dropout": 0.0, "attention_dropout": 0.0,
}  # fmt: skip
XGLM = {
    **TOKENS, "d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4, "max_position_embeddings": 64,
    "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0,
}  # fmt: skip
REMBERT = {
    **BERT, "bos_token_id": 1, "eos_token_id": 2, "input_embedding_size": 32, "output_embedding_size": 32,
    "classifier_dropout_prob": 0.0,
}  # fmt: skip
DEBERTA = {
    **BERT, "relative_attention": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"], "position_biased_input": False, "pooler_dropout": 0.0,
}  # fmt: skip
XLNET = {
    "vocab_size": 64, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "dropout": 0.0, "pad_token_id": 0,
    "summary_last_dropout": 0.0, "num_labels": 3,
}  # fmt: skip
LONGFORMER = {**BERT, "attention_window": 8, "max_position_embeddings": 70}
PROPHET = {
    **TOKENS, "hidden_size": 32, "num_encoder_layers": 1, "num_decoder_layers": 1, "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
    "ngram": 2, "decoder_start_token_id": 1,
}  # fmt: skip
LATENT = {
    **LLAMA, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 12, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 16, "n_shared_experts": 1, "head_dim": 8,
}  # fmt: skip
GEMMA = {**LLAMA, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8}
HYBRID = {**LLAMA, "num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "block_multiple_of": 8}
_HALF = {**GEMMA, "layer_types": ["sliding_attention", "full_attention"]}
T5GEMMA2 = {
    **TOKENS, "decoder": _HALF, "image_token_index": 60,
    "encoder": {
        "text_config": _HALF, "eoi_token_index": 61, "mm_tokens_per_image": 4,
        "vision_config": {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
            "image_size": 16, "patch_size": 4,
        },
    },
}  # fmt: skip
RECURRENT = {
    **TOKENS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 1, "attention_window_size": 64, "lru_width": 32, "block_types": ["recurrent", "attention"],
}  # fmt: skip

# name -> (auto class, task, model type, settings)
KINDS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "gpt2": ("AutoModelForCausalLM", "CAUSAL_LM", "gpt2", GPT),
    "llama": ("AutoModelForCausalLM", "CAUSAL_LM", "llama", LLAMA),
    "qwen3": ("AutoModelForCausalLM", "CAUSAL_LM", "qwen3", {**LLAMA, "head_dim": 16}),
    "glm": ("AutoModelForCausalLM", "CAUSAL_LM", "glm", {**LLAMA, "head_dim": 16}),
    "mistral": ("AutoModelForCausalLM", "CAUSAL_LM", "mistral", {**LLAMA, "sliding_window": 6}),
    "gemma2": ("AutoModelForCausalLM", "CAUSAL_LM", "gemma2", GEMMA),
    "latent": ("AutoModelForCausalLM", "CAUSAL_LM", "deepseek_v2", LATENT),
    "hybrid": ("AutoModelForCausalLM", "CAUSAL_LM", "lfm2", HYBRID),
    "recurrent": ("AutoModelForCausalLM", "CAUSAL_LM", "recurrent_gemma", RECURRENT),
    "mamba": ("AutoModelForCausalLM", "CAUSAL_LM", "mamba", {**TOKENS, "hidden_size": 32, "num_hidden_layers": 2}),
    "gptj": ("AutoModelForCausalLM", "CAUSAL_LM", "gptj", {**GPT, "rotary_dim": 4}),
    "mpt": ("AutoModelForCausalLM", "CAUSAL_LM", "mpt", MPT),
    "falcon": ("AutoModelForCausalLM", "CAUSAL_LM", "falcon", {**FALCON, "multi_query": True}),
    "falcon-alibi": ("AutoModelForCausalLM", "CAUSAL_LM", "falcon", {**FALCON, "alibi": True}),
    "gpt-neo": ("AutoModelForCausalLM", "CAUSAL_LM", "gpt_neo", GPT_NEO),
    "xglm": ("AutoModelForCausalLM", "CAUSAL_LM", "xglm", XGLM),
    "bloom": ("AutoModelForCausalLM", "CAUSAL_LM", "bloom", {**TOKENS, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "rembert": ("AutoModelForSequenceClassification", "SEQ_CLS", "rembert", REMBERT),
    "deberta": ("AutoModelForSequenceClassification", "SEQ_CLS", "deberta-v2", DEBERTA),
    "xlnet": ("AutoModelForSequenceClassification", "SEQ_CLS", "xlnet", XLNET),
    "longformer": ("AutoModelForSequenceClassification", "SEQ_CLS", "longformer", LONGFORMER),
    "bert": ("AutoModelForSequenceClassification", "SEQ_CLS", "bert", BERT),
    "roberta": ("AutoModelForSequenceClassification", "SEQ_CLS", "roberta", BERT),
    "albert": ("AutoModelForSequenceClassification", "SEQ_CLS", "albert", {**BERT, "embedding_size": 16}),
    "t5": ("AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM", "t5", T5),
    "t5gemma2": ("AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM", "t5gemma2", T5GEMMA2),
    "t5-deep": ("AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM", "t5", {**T5, "num_decoder_layers": 4, "num_layers": 4}),
    "longt5": ("AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM", "longt5", {**T5, "local_radius": 8}),
    "mvp": ("AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM", "mvp", BART),
    "prophetnet": ("AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM", "prophetnet", PROPHET),
    "bart": ("AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM", "bart", BART),
}


def bare(name: str, attention: str | None = None) -> Any:
    """A fresh model; equal arguments give equal weights."""
    auto, _, model_type, settings = KINDS[name]
    config = transformers.AutoConfig.for_model(model_type, **settings)
    options = {} if attention is None else {"attn_implementation": attention}
    torch.manual_seed(0)
    model = getattr(transformers, auto).from_config(config, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if weight.ndim >= 2 and "conv" not in path:
                scale = 0.5 if "emb" in path or "shared" in path or "wte" in path or "wpe" in path else 0.9
                fan_in = 1 if scale == 0.5 else weight.shape[-1]
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale / fan_in**0.5)
    if model.can_generate():
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
    return model.eval()


def prefixed(name: str, base: nn.Module | None = None, seed: int = 3, **settings: Any) -> PeftModel:
    """A model with a prefix of 4 tokens, moved off its start."""
    config = PrefixTuningConfig(task_type=KINDS[name][1], **{"num_virtual_tokens": 4, **settings})
    model = get_peft_model(bare(name) if base is None else base, config)
    if config.init_token_ids is None:
        redraw(model, seed)
    return model.eval()


def redraw(model: PeftModel, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.6)


def activate_together(model: PeftModel, names: list[str]) -> None:
    """Several adapters active; where each has a head of its own, it must be said that one of them acts alone."""
    rivals = any(len(copies.modules_to_save) > 1 for _, copies in trained_copies(model.get_base_model()))
    with pytest.warns(PeftWarning, match="alone acts and trains") if rivals else nullcontext():
        model.set_adapter(names)


def batch(name: str, left: bool = False, seed: int = 1) -> dict[str, Tensor]:
    """Two rows of eight and five tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 64, (2, 8), generator=generator)
    mask = torch.ones_like(ids)
    padding = slice(0, 3) if left else slice(5, 8)
    ids[1, padding], mask[1, padding] = 0, 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if KINDS[name][1] == "SEQ_2_SEQ_LM":
        inputs["decoder_input_ids"] = torch.randint(3, 64, (2, 6), generator=generator)
    return inputs


def gradients(model: PeftModel, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Gradients of a fixed loss, in the precision of the model."""
    model.zero_grad()
    model(**inputs).logits.square().mean().backward()
    return [parameter.grad.clone() for parameter in model.prompt_encoder.parameters()]
