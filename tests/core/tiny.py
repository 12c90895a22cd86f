"""Small random models of well-known architectures, built from configs, and batches for them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCAB = 61
ARCHITECTURES = ("gpt2", "llama", "t5", "bert", "bart")


def tiny(name: str, seed: int = 0, **changes: Any) -> Any:
    """A model in evaluation mode; equal seeds give equal weights."""
    torch.manual_seed(seed)
    model = _BUILDERS[name](**changes).eval()
    if name != "t5":  # the usual initialisation of the others is so small that everything would look alike
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(3)
    return model


def batch(name: str, rows: int = 2, seed: int = 1) -> dict[str, Tensor]:
    """Inputs with padding, and labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if name == "bert":
        return {**inputs, "labels": torch.arange(rows) % 3}
    labels = torch.randint(3, VOCAB, (rows, 5), generator=generator) if name in ("t5", "bart") else ids
    return {**inputs, "labels": labels}


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).logits


TASKS = {"gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM", "bart": "SEQ_2_SEQ_LM", "bert": "SEQ_CLS"}


def _gpt2(**changes: Any) -> nn.Module:
    sizes = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**sizes, **quiet, **changes}))


def _llama(**changes: Any) -> nn.Module:
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **heads, **changes}))


def _t5(**changes: Any) -> nn.Module:
    sizes = {"vocab_size": VOCAB, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(**{**sizes, "dropout_rate": 0.0, "decoder_start_token_id": 0, **changes})
    )


def _bert(**changes: Any) -> nn.Module:
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_attention_heads": 2, "num_labels": 3}
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(**{**sizes, **quiet, "max_position_embeddings": 32, **changes})
    )


def _bart(**changes: Any) -> nn.Module:
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes = {"vocab_size": VOCAB, "d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "dropout": 0.0}
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(**{**sizes, **layers, "max_position_embeddings": 32, **changes})
    )


_BUILDERS = {"gpt2": _gpt2, "llama": _llama, "t5": _t5, "bert": _bert, "bart": _bart}
