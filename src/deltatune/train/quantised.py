"""A base that is loaded in 4 or 8 bits (QLoRA): NF4 with doubly quantised scales, or LLM.int8, both bitsandbytes'.

https://arxiv.org/abs/2305.14314, https://arxiv.org/abs/2208.07339
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from deltatune.data.example import TEXT_TASKS
from deltatune.errors import ConfigError
from deltatune.targets import HEAD_NAMES
from deltatune.train.defaults import FULL
from deltatune.train.settings import TrainSettings


def field_of(settings: TrainSettings) -> str | None:
    """The setting that asks for fewer bits; None where the base is loaded as it is stored."""
    return next((name for name in ("load_in_4bit", "load_in_8bit") if getattr(settings, name)), None)


def check_quantised(settings: TrainSettings, given: bool = False) -> None:
    """Refuse, before anything is loaded, a run that cannot start on a quantised base.

    Args:
        given: Whether the model is handed over in memory.

    Raises:
        ConfigError: Full fine-tuning, a model that is loaded already, or bitsandbytes is not installed.
    """
    field = field_of(settings)
    if field is None:
        return
    if settings.method == FULL:
        raise _refused(field, "rounded weights cannot be trained in full; choose a method such as lora")
    if given:
        raise _refused(field, "the model given in memory is taken as it is; load it with a quantization_config instead")
    check_installed(field)


def check_installed(field: str) -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise _refused(field, "the package bitsandbytes is not installed; pip install bitsandbytes, or leave it out")


def loading_options(settings: TrainSettings, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` is told; nothing for a base in full precision."""
    field = field_of(settings)
    if field is None:
        return {}
    check_installed(field)
    from transformers import BitsAndBytesConfig

    four: dict[str, Any] = {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": dtype,
    }
    options = four if field == "load_in_4bit" else {}
    if settings.task not in TEXT_TASKS:  # the head is trained as a whole
        options |= {"llm_int8_skip_modules": list(HEAD_NAMES)}
    config = BitsAndBytesConfig(**{field: True}, **options)
    return {"quantization_config": config, "device_map": {"": device}}


def refuse_embedded(settings: TrainSettings) -> None:
    """The embedded model is no folder that transformers could round while loading."""
    if (field := field_of(settings)) is not None:
        raise _refused(field, "the embedded demo model is not loaded from files; name a model folder")


def _refused(field: str, reason: str) -> ConfigError:
    return ConfigError(f"{field}=true is not possible: {reason}", field=field, found=True)
