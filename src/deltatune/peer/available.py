"""PEFT's questions of what is installed: `is_bnb_available()` and its like."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch


def _installed(*packages: str) -> Callable[[], bool]:
    def answer() -> bool:
        return any(importlib.util.find_spec(package) is not None for package in packages)

    return answer


is_bnb_available = is_bnb_4bit_available = _installed("bitsandbytes")
is_gptqmodel_available = _installed("gptqmodel")
is_optimum_available = _installed("optimum")
is_aqlm_available = _installed("aqlm")
is_eetq_available = _installed("eetq")
is_hqq_available = _installed("hqq")
is_inc_available = _installed("neural_compressor")
is_torchao_available = _installed("torchao")
is_diffusers_available = _installed("diffusers")
is_te_available = is_te_pytorch_available = _installed("transformer_engine")
is_torch_tpu_available = _installed("torch_xla")


def is_xpu_available(check_device: bool = False) -> bool:
    return torch.xpu.is_available()
