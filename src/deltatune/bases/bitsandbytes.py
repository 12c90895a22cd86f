"""bitsandbytes' layers: 4-bit codes in blocks, 8-bit codes in rows."""

from __future__ import annotations

import sys
from typing import Any, cast

import torch
from torch import Tensor, nn

from deltatune.bases.packed import PackedLinear


class Bitsandbytes4bit(PackedLinear):
    """`bitsandbytes.nn.Linear4bit`: blocks of 4-bit codes with a scale each.   https://arxiv.org/abs/2305.14314"""

    scheme = "bnb 4bit"
    types = ("Linear4bit",)

    @staticmethod
    def fits(module: nn.Module) -> bool:
        library = sys.modules.get("bitsandbytes")  # no instance can exist before its library is loaded
        return library is not None and isinstance(module, library.nn.Linear4bit)

    @property
    def dtype(self) -> torch.dtype:
        stored: Any = self.module.weight
        compute, state = cast(Any, self.module).compute_dtype, stored.quant_state
        if compute is not None or state is None:
            return compute or stored.dtype
        return state.original_dtype if _laid_out_for_cpu(stored) else state.dtype

    def __call__(self, x: Tensor) -> Tensor:
        if x.requires_grad and _laid_out_for_cpu(self.module.weight):  # its kernel for that layout has no gradient
            return self.apply(x, self.weight, self.bias)
        return super().__call__(x)

    def unpack(self, stored: Any) -> Tensor:
        if stored.quant_state is None:  # codes are made when the layer moves to its device
            return stored.data
        if _laid_out_for_cpu(stored):
            return _from_cpu_layout(stored)
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(stored.data, stored.quant_state)

    def pack(self, weight: Tensor) -> nn.Parameter:
        old: Any = self.module.weight
        options = {name: getattr(old, name) for name in ("blocksize", "compress_statistics", "quant_type")}
        made = type(old)(weight.detach().cpu(), requires_grad=False, quant_storage=old.quant_storage, **options)
        return made.to(old.device)


def keep_layout(model: nn.Module) -> None:
    """Have the 4-bit layers of a model stay as they are where they are called in evaluation mode on a CPU.

    Rearranged they compute in bfloat16 for good, so that an evaluation would change the training after it; and layers
    whose outputs are no multiple of 32 cannot be rearranged at all: they raise AssertionError.
    """
    for module in model.modules():
        if Bitsandbytes4bit.fits(module):
            cast(Any, module).support_avx512bf16_for_cpu = False


def _laid_out_for_cpu(stored: Any) -> bool:
    """Whether a call in evaluation mode has rearranged the codes for a CPU with bfloat16 instructions."""
    return getattr(stored.quant_state, "packing_format_for_cpu", False)


def _from_cpu_layout(stored: Any) -> Tensor:
    """That layout: of 32 rows at a time pairs of columns, 32 bytes of low and high halves; scales (blocks, out)."""
    state, (out, width) = stored.quant_state, stored.quant_state.shape
    packed = stored.data.reshape(-1, 32)
    codes = torch.cat([packed & 15, packed >> 4], dim=1).reshape(out // 32, width // 2, 32, 2)
    codes = codes.transpose(1, 2).reshape(out, width)
    return state.code[codes.long()] * state.absmax.T.float().repeat_interleave(state.blocksize, dim=1)


class Bitsandbytes8bit(PackedLinear):
    """`bitsandbytes.nn.Linear8bitLt`: 8-bit rows with a scale each.   https://arxiv.org/abs/2208.07339"""

    scheme = "bnb 8bit"
    types = ("Linear8bitLt",)

    @staticmethod
    def fits(module: nn.Module) -> bool:
        library = sys.modules.get("bitsandbytes")
        return library is not None and isinstance(module, library.nn.Linear8bitLt)

    @property
    def dtype(self) -> torch.dtype:
        bias = self.module.bias
        return torch.float32 if bias is None else bias.dtype

    def unpack(self, stored: Any) -> Tensor:
        if stored.dtype != torch.int8:
            return stored.data
        from bitsandbytes.functional import int8_vectorwise_dequant

        state: Any = self.module.state
        scales = stored.SCB if stored.SCB is not None else state.SCB
        return int8_vectorwise_dequant(stored.data, scales)

    def pack(self, weight: Tensor) -> nn.Parameter:
        old, state = cast(Any, self.module.weight), cast(Any, self.module.state)
        if old.SCB is None:  # the layer took codes and scales over at its first call; it will again after `unmerge`
            old.CB, old.SCB = old.data, state.SCB
        made = type(old)(weight.detach().cpu(), requires_grad=False, has_fp16_weights=False)
        return made.to(old.device)
