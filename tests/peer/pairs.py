"""The same small model under PEFT's adapter and under ours."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import deltatune
from tests.core.tiny import ARCHITECTURES, TASKS, tiny

peft = pytest.importorskip("peft", reason="peft, the peer that these tests compare with, is not installed")

METHODS = {"lora": "LoraConfig", "ia3": "IA3Config", "oft": "OFTConfig", "hra": "HRAConfig"}
# PEFT's OFT and HRA do not know transformers' Conv1D, of which GPT-2 is made.
PAIRS = [(m, a) for m in METHODS for a in ARCHITECTURES if a != "gpt2" or m in ("lora", "ia3")]
SIZES = {"lora": {"r": 4}, "ia3": {}, "oft": {"oft_block_size": 8}, "hra": {"r": 4}}
ATTENTION = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
    "t5": ["q", "k", "v", "o", "wi", "wo"],
    "bert": ["query", "key", "value", "dense"],
    "bart": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
}
FEED_FORWARD = {"gpt2": "mlp.c_proj", "llama": "down_proj", "t5": "wo", "bert": "output.dense", "bart": "fc2"}
WHOLE = {
    "gpt2": ["ln_f"],
    "llama": ["norm"],
    "t5": ["final_layer_norm"],
    "bert": ["pooler"],
    "bart": ["layernorm_embedding"],
}
EMBEDDING = {"gpt2": "wte", "llama": "embed_tokens", "t5": "shared", "bert": "word_embeddings", "bart": "shared"}


def configs(method: str, arch: str, **options: Any) -> tuple[Any, Any]:
    """PEFT's config and ours from the same arguments."""
    arguments = {"task_type": TASKS[arch], **SIZES[method], **options}
    return getattr(peft, METHODS[method])(**arguments), getattr(deltatune, METHODS[method])(**arguments)


def theirs(arch: str, config: Any, seed: int = 3) -> Any:
    """PEFT's model with its adapter moved off the start."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model = peft.get_peft_model(tiny(arch), config)
    return scatter(model, seed)


def scatter(model: nn.Module, seed: int) -> Any:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def saved_by_peft(model: Any, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


def loaded_by_peft(base: nn.Module, folder: Path) -> Any:
    """PEFT's model from a folder; a missing or surplus key, of which it only warns, is an error here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="Found missing adapter keys")
        return peft.PeftModel.from_pretrained(base, folder).eval()


def drawn(arch: str, seed: int) -> dict[str, Any]:
    """Random LoRA options that fit an architecture."""
    draw = random.Random(f"{arch}{seed}")
    names = sorted(draw.sample(ATTENTION[arch], draw.randint(1, 3)))
    options: dict[str, Any] = {
        "target_modules": names,
        "r": draw.choice([1, 2, 5, 8]),
        "lora_alpha": draw.choice([1, 7, 16]),
    }
    options["use_rslora"] = draw.random() < 0.5
    if draw.random() < 0.4:
        options["rank_pattern"] = {names[0]: 3}
    if draw.random() < 0.4:
        options["alpha_pattern"] = {rf".*\.{names[-1]}": 5}
    if draw.random() < 0.3:
        options["layers_to_transform"] = draw.choice([[1], 0, [0, 1]])
    if draw.random() < 0.3:
        options["init_lora_weights"] = draw.choice(["gaussian", False])
    # T5's and Llama's linear layers have no bias; a bias and a Gaussian start exclude each other in PEFT
    if draw.random() < 0.3 and arch not in ("t5", "llama") and options.get("init_lora_weights") != "gaussian":
        options["lora_bias"] = True
    if draw.random() < 0.3:
        options["exclude_modules"] = r".*\.0\..*"
        options.pop("layers_to_transform", None)
    if draw.random() < 0.3:
        options["modules_to_save"] = WHOLE[arch]
    return options
