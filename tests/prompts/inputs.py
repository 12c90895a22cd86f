"""Models with a prompt, and what they should compute: the base on rows that are put together by hand."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from deltatune import (
    CPTConfig,
    MultitaskPromptTuningConfig,
    PeftModel,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from tests.prompts.models import BART, BERT, GPT, KINDS, LLAMA, T5, TOKENS, bare

COUNT = 4
METHODS = {
    "prompt": (PromptTuningConfig, {"num_virtual_tokens": COUNT}),
    "mlp": (PromptEncoderConfig, {"num_virtual_tokens": COUNT}),
    "lstm": (PromptEncoderConfig, {"num_virtual_tokens": COUNT, "encoder_reparameterization_type": "LSTM"}),
    "multitask": (MultitaskPromptTuningConfig, {"num_virtual_tokens": COUNT, "num_tasks": 1, "num_ranks": 2}),
    "cpt": (CPTConfig, {"cpt_token_ids": [5, 6, 7, 8], "cpt_tokens_type_mask": [1, 2, 3, 4]}),
}
HEADS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert-tokens": ("BertForTokenClassification", "TOKEN_CLS", BERT),
    "bert-answers": ("BertForQuestionAnswering", "QUESTION_ANS", {**BERT, "num_labels": 2}),
    "bert-features": ("BertModel", "FEATURE_EXTRACTION", BERT),
    "gpt2-class": ("GPT2ForSequenceClassification", "SEQ_CLS", {**GPT, "num_labels": 3}),
    "llama-class": ("LlamaForSequenceClassification", "SEQ_CLS", {**LLAMA, "num_labels": 3}),
    "bart-class": ("BartForSequenceClassification", "SEQ_CLS", {**BART, "num_labels": 3}),
    "t5-answers": ("T5ForQuestionAnswering", "QUESTION_ANS", {**T5, "num_labels": 2}),
    "t5-tokens": ("T5ForTokenClassification", "TOKEN_CLS", {**T5, "num_labels": 3}),
}
assert TOKENS["pad_token_id"] == 0


def model_of(name: str) -> Any:
    """A bare model of `KINDS`, or with another head."""
    if name in KINDS:
        return bare(name)
    class_name, _, settings = HEADS[name]
    kind = getattr(transformers, class_name)
    torch.manual_seed(0)
    model = kind(kind.config_class(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8 if "T5" not in class_name else 1)
    return model


def task(name: str) -> str:
    return KINDS[name][1] if name in KINDS else HEADS[name][1]


def prompted(name: str, method: str = "prompt", base: Any = None, seed: int = 3, **settings: Any) -> PeftModel:
    kind, usual = METHODS[method]
    torch.manual_seed(seed)
    config = kind(task_type=task(name), **{**usual, **settings})
    model = get_peft_model(model_of(name) if base is None else base, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.prompt_encoder["default"].parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.6)
    return model.eval()


def batch(name: str, left: bool = False) -> dict[str, Tensor]:
    """Two rows of eight and five tokens, the last of each an end of sentence."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 64, (2, 8), generator=generator)
    mask = torch.ones_like(ids)
    ids[0, 7] = ids[1, 7 if left else 4] = 2
    padding = slice(0, 3) if left else slice(5, 8)
    ids[1, padding], mask[1, padding] = 0, 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if task(name) == "SEQ_2_SEQ_LM":
        inputs["decoder_input_ids"] = torch.randint(3, 64, (2, 6), generator=generator)
    return inputs


def by_hand(name: str, model: PeftModel, ids: Tensor, **given: Tensor) -> Any:
    """The base's output for one row without padding: [P; E(ids)] as `inputs_embeds`."""
    base = model_of(name)
    encoder = base.get_encoder() if getattr(base.config, "is_encoder_decoder", False) else base
    rows = (
        model.prompt_encoder["default"]()[:COUNT] if "decoder_input_ids" in given else model.prompt_encoder["default"]()
    )
    embeds = torch.cat([rows.expand(len(ids), -1, -1), encoder.get_input_embeddings()(ids)], dim=1)
    return base(inputs_embeds=embeds, **given)
