"""transformers' `FP8Linear`: 8-bit floats with a scale for each block of the weight, or one for all of it."""

from __future__ import annotations

import sys
from typing import Any, cast

import torch
from torch import Tensor, nn

from deltatune.bases.packed import PackedLinear

_MODULE = "transformers.integrations.finegrained_fp8"


class FP8(PackedLinear):
    """W = codes * weight_scale_inv. A weight that has been widened already is stored as it is."""

    scheme = "fp8"
    types = ("FP8Linear",)
    parts_of_codes = ("weight_scale_inv",)

    @staticmethod
    def fits(module: nn.Module) -> bool:
        library = sys.modules.get(_MODULE)
        return library is not None and isinstance(module, library.FP8Linear)

    @property
    def dtype(self) -> torch.dtype:
        module: Any = self.module
        if module.weight.element_size() > 1:
            return module.weight.dtype
        return torch.bfloat16 if module.bias is None else module.bias.dtype

    def unpack(self, stored: Tensor) -> Tensor:
        if stored.element_size() > 1:
            return stored
        scale = self._spread(self.beside(stored, "weight_scale_inv").float())
        return (stored.data.float() * scale).to(self.dtype)

    def pack(self, weight: Tensor) -> nn.Parameter:
        module = cast(Any, self.module)
        if module.weight.element_size() > 1:
            return nn.Parameter(weight.detach().to(module.weight.dtype).clone(), requires_grad=False)
        code, old = module.weight.dtype, module.weight_scale_inv
        scale = self._largest(weight.detach().float()) / torch.finfo(code).max
        scale = scale.clamp_min(torch.finfo(torch.float32).tiny)
        if old.dtype != torch.float32:  # a kind of scale that has powers of two only
            scale = scale.log2().ceil().exp2()
        data = (weight.detach().float() / self._spread(scale)).to(code)
        kept = nn.Parameter(scale.reshape(old.shape).to(old.dtype), requires_grad=False)
        return self.codes(data, weight_scale_inv=kept)

    def _spread(self, scale: Tensor) -> Tensor:
        """A scale per block -> (out, in); one for all stays."""
        if (block := self._block) is None:
            return scale
        rows = scale.repeat_interleave(block[0], 0)[: self.out_features]
        return rows.repeat_interleave(block[1], 1)[:, : self.in_features]

    def _largest(self, weight: Tensor) -> Tensor:
        """The largest size of a value per block, or of all."""
        if (block := self._block) is None:
            return weight.abs().max()
        missing = (-self.out_features % block[0], -self.in_features % block[1])
        padded = nn.functional.pad(weight.abs(), (0, missing[1], 0, missing[0]))
        return padded.unflatten(0, (-1, block[0])).unflatten(2, (-1, block[1])).amax((1, 3))

    @property
    def _block(self) -> tuple[int, int] | None:
        return cast(Any, self.module).block_size
