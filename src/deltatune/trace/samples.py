"""A model and a batch to look at without any download: tiny, random, built from a config."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from deltatune.config import TaskType
from deltatune.errors import ConfigError
from deltatune.model import PeftModel
from deltatune.registry import METHODS
from deltatune.tasks import get_peft_model

ARCHITECTURES = ("t5", "gpt2", "bert")
_VOCABULARY = 64


def example(
    method: str = "prefix_tuning", architecture: str = "t5", seed: int = 0, **options: Any
) -> tuple[PeftModel, dict[str, Any]]:
    """A tiny adapted model in eval mode and a batch with labels, for `trace(*example())`.

    Args:
        method: Name of any method of the registry.
        architecture: "t5", "gpt2" or "bert" (as a classifier).
        options: Fields of the method's config, such as `layout="peft"` or `r=4`.

    Raises:
        ConfigError: There is no such method, architecture or option.
    """
    entry = METHODS.get(str(method).upper().replace("-", "_"))
    for field, value, known in (
        ("method", None if entry is None else method, sorted(entry.name for entry in METHODS.values())),
        ("architecture", architecture if architecture in ARCHITECTURES else None, ARCHITECTURES),
    ):
        if value is None:
            given = method if field == "method" else architecture
            raise ConfigError(
                f"example: {field}={given!r} is not known, expected one of {', '.join(known)}",
                field=field,
                found=given,
                expected=list(known),
            )
    assert entry is not None
    for field, size in (("num_virtual_tokens", 20), ("adapter_len", 10)):
        if field in {known.name for known in dataclasses.fields(entry.config)}:
            options.setdefault(field, size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        build = {"t5": _t5, "gpt2": _gpt2, "bert": _bert}[architecture]
        model, task, batch = build()
        adapted = get_peft_model(model, entry.config(task_type=task, **options))
    return adapted.eval(), batch


def _t5() -> tuple[Any, TaskType, dict[str, Any]]:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=_VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=4, num_heads=4)
    config.decoder_start_token_id = config.pad_token_id
    inputs, mask = _tokens(2, 7)
    labels, _ = _tokens(2, 5)
    batch = {"input_ids": inputs, "attention_mask": mask, "labels": labels}
    return T5ForConditionalGeneration(config), TaskType.SEQ_2_SEQ_LM, batch


def _gpt2() -> tuple[Any, TaskType, dict[str, Any]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=_VOCABULARY,
        n_embd=32,
        n_layer=4,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=1,
        initializer_range=0.2,
    )
    inputs, mask = _tokens(2, 7)
    batch = {"input_ids": inputs, "attention_mask": mask, "labels": inputs.masked_fill(mask == 0, -100)}
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # transformers finds no loss by this class's name, uses this one, and warns
    return model, TaskType.CAUSAL_LM, batch


def _bert() -> tuple[Any, TaskType, dict[str, Any]]:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=_VOCABULARY,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    inputs, mask = _tokens(2, 7)
    batch = {"input_ids": inputs, "attention_mask": mask, "labels": torch.tensor([0, 1])}
    return BertForSequenceClassification(config), TaskType.SEQ_CLS, batch


def _tokens(rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens, the last row two tokens shorter than the others."""
    tokens = torch.randint(2, _VOCABULARY, (rows, length))
    mask = torch.ones_like(tokens)
    mask[-1, -2:] = 0
    return tokens.masked_fill(mask == 0, 0), mask
