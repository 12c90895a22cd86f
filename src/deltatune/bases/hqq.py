"""`HQQLinear`: groups of codes with scales and zero points that half-quadratic splitting has fitted.

https://mobiusml.github.io/hqq_blog
"""

from __future__ import annotations

import sys
from typing import Any, cast

import torch
from torch import Tensor, nn

from deltatune.bases.packed import PackedLinear


class HQQ(PackedLinear):
    scheme = "hqq"
    types = ("HQQLinear",)
    keeps = ("W_q", "bias")
    parts_of_codes = ("meta",)

    @staticmethod
    def fits(module: nn.Module) -> bool:
        library = sys.modules.get("hqq.core.quantize")
        return library is not None and isinstance(module, library.HQQLinear) and isinstance(module.in_features, int)

    @property
    def dtype(self) -> torch.dtype:
        return cast(Any, self.module).compute_dtype

    @property
    def weight(self) -> Tensor:
        return self.unpack(cast(Any, self.module).W_q)

    @property
    def bias(self) -> Tensor | None:
        return self.module.bias

    def unpack(self, stored: Tensor) -> Tensor:
        from hqq.core.quantize import Quantizer  # type: ignore[import-not-found]

        return Quantizer.dequantize(stored.data, self.beside(stored, "meta"))

    def pack(self, weight: Tensor) -> nn.Parameter:
        from hqq.core.quantize import HQQLinear  # type: ignore[import-not-found]

        module: Any = self.module
        if module.quant_config is None:  # made from codes alone, so how they were fitted is not known
            return super().pack(weight)
        options = {**module.quant_config, "offload_meta": module.offload_meta}
        made = HQQLinear(None, options, compute_dtype=module.compute_dtype, device=str(module.W_q.device))
        made.quantize(weight.detach().to(module.compute_dtype), **module.quant_config)
        return self.codes(made.W_q.data, meta=made.meta)
