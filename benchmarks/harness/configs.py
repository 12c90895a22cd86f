"""A config of every method for a Llama, with the same fields in both packages: defaults, where they fit."""

from __future__ import annotations

import dataclasses
import importlib
import warnings
from pathlib import Path
from typing import Any

import torch

from deltatune import METHODS
from harness.llama import TARGETS, adapted, bare, lora

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {"dora": ("lora", {"use_dora": True})}
# Fields that a method cannot do without, or whose default does not fit the widths measured, by their name.
FITTED: dict[str, Any] = {
    "total_step": 1000,
    "block_size": 64,
    "num_virtual_tokens": 20,
    "token_indices": [1, 2, 3],
    "vector_length": 64,
    "num_tasks": 2,
    "adapter_len": 10,
    "prune_step": 1000,
    "cpt_token_ids": [*range(3, 23)],
    "cpt_mask": [1] * 20,
    "cpt_tokens_type_mask": [1, 2, 2, 3, 3] * 4,
}
TASK_IDS = ("poly", "multitask_prompt_tuning")  # which ask for the task of each row
OWN_TARGETS = (
    "trainable_tokens",
    "adaption_prompt",
    "shadow",
    "xlora",
)  # which adapt no linear layers, or no more of them
# What the model of a method has that the others do without.
BASES: dict[str, dict[str, Any]] = {"bitfit": {"attention_bias": True, "mlp_bias": True}}


def names() -> list[str]:
    """Every method, and variants that cost otherwise."""
    return sorted([*(method.name for method in METHODS.values()), *VARIANTS])


def fields(name: str, width: int) -> dict[str, Any]:
    """Keyword arguments of the config, which both packages take. `width`: hidden size of the model."""
    method, further = VARIANTS.get(name, (name, {}))
    known = {field.name for field in dataclasses.fields(METHODS[method.upper()].config)}
    given = {field: value for field, value in FITTED.items() if field in known}
    if width < 256:  # a model that is only there to try the benchmark
        given |= {field: 16 for field in ("block_size", "vector_length") if field in known}
    if "target_modules" in known and method not in OWN_TARGETS:
        given["target_modules"] = TARGETS
    if "adapter_layers" in known:
        given["adapter_layers"] = 2
    return {**given, **further}


def base(name: str, shape: str, dtype: torch.dtype = torch.float32) -> Any:
    """The frozen model that the method is put on."""
    return bare(shape, dtype, **BASES.get(name, {}))


def known_to_peer(name: str) -> bool:
    return hasattr(importlib.import_module("peft"), _kind(name))


def build(package: str, name: str, model: Any, place: Path) -> Any:
    """The model under a fresh adapter of that method.

    Args:
        place: A folder for what a method reads from folders (X-LoRA its experts).
    """
    library: Any = importlib.import_module(package)
    given = fields(name, model.config.hidden_size)
    if name == "xlora":
        given |= {"hidden_size": model.config.hidden_size, "adapters": _experts(package, model, place)}
        model.config.use_cache = package != "peft"  # PEFT's X-LoRA refuses to be built on a model that uses it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(library, _kind(name))(task_type="CAUSAL_LM", **given)
    return adapted(package, config, model)


def options(name: str, rows: int) -> dict[str, Any]:
    """What the model has to be called with besides."""
    return {"task_ids": torch.zeros(rows, dtype=torch.long)} if name in TASK_IDS else {}


def _kind(name: str) -> str:
    return METHODS[VARIANTS.get(name, (name,))[0].upper()].config.__name__


def _experts(package: str, model: Any, place: Path, count: int = 4) -> dict[str, str]:
    """Folders of LoRA adapters that a mixture can be made of."""
    made = {}
    for number in range(count):
        folder = place / package / str(number)
        if not folder.exists():
            shape = {key: getattr(model.config, key) for key in ("hidden_size", "intermediate_size")}
            shape |= {key: getattr(model.config, key) for key in ("num_hidden_layers", "num_attention_heads")}
            adapted(package, lora(package, init_lora_weights=False), bare("tiny", **shape)).save_pretrained(folder)
        made[str(number)] = str(folder)
    return made
