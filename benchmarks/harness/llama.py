"""Llamas with random weights, bare and adapted: what all measurements of time are made on."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import torch
from torch import Tensor

PACKAGES = ("peft", "deltatune")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WORDS = 1024
SHAPES: dict[str, dict[str, int]] = {
    "wide": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8},
    "narrow": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
}


def bare(shape: str, dtype: torch.dtype = torch.float32, **changed: Any) -> Any:
    """A Llama of that shape, with the same weights at each call; nothing trains, evaluation mode."""
    import transformers

    sizes = {**SHAPES[shape], "vocab_size": WORDS, "tie_word_embeddings": False, **changed}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(num_key_value_heads=sizes["num_attention_heads"], **sizes)
    model: Any = transformers.LlamaForCausalLM(config)
    return model.to(dtype).requires_grad_(False).eval()


def lora(package: str, **options: Any) -> Any:
    """LoRA of rank 8 on all seven linear layers."""
    library: Any = importlib.import_module(package)
    return library.LoraConfig(task_type="CAUSAL_LM", **{"r": 8, "target_modules": TARGETS, **options})


def adapted(package: str, config: Any, model: Any) -> Any:
    """The model, adapted in place, without what packages warn of on the way."""
    library: Any = importlib.import_module(package)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return library.get_peft_model(model, config)


def ids_of(rows: int, tokens: int) -> Tensor:
    return torch.randint(3, WORDS, (rows, tokens), generator=torch.Generator().manual_seed(rows))
