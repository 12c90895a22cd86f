"""`nn.Linear` with a weight of torchao's tensor classes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from deltatune.bases.packed import PackedLinear


class Torchao(PackedLinear):
    """Any of its tensors runs and trains. Integers of 1 to 8 bits and float8 are packed again, with their options."""

    scheme = "torchao"
    types = ("Linear of torchao",)

    @staticmethod
    def fits(module: nn.Module) -> bool:
        library = sys.modules.get("torchao")
        if library is None or not isinstance(module, nn.Linear):
            return False
        return isinstance(module.weight, library.utils.TorchAOBaseTensor)

    @property
    def differentiable(self) -> bool:
        """Kernels that quantise their input as well have no gradient for it."""
        weight: Any = self.module.weight
        return all(getattr(weight, name, None) is None for name in ("act_quant_kwargs", "activation_quantization"))

    def unpack(self, stored: Any) -> Tensor:
        return stored.dequantize()

    def pack(self, weight: Tensor) -> nn.Parameter:
        stored: Any = self.module.weight
        again = _PACKED_AGAIN.get(type(stored).__name__)
        if again is None:
            return super().pack(weight)
        return nn.Parameter(again(weight.detach().to(stored.dtype), stored), requires_grad=False)


def _int8(weight: Tensor, old: Any) -> Tensor:
    return type(old).from_hp(
        weight,
        _granularity(old),
        mapping_type=_mapping(old),
        act_quant_kwargs=old.act_quant_kwargs,
        act_quant_scale=old.act_quant_scale,
        act_quant_zero_point=old.act_quant_zero_point,
        act_pre_scale=old.act_pre_scale,
        reduce_range=old.reduce_range,
    )


def _intx(weight: Tensor, old: Any) -> Tensor:
    return type(old).from_hp(
        weight,
        old.block_size,
        old.target_dtype,
        mapping_type=_mapping(old),
        activation_quantization=old.activation_quantization,
    )


def _float8(weight: Tensor, old: Any) -> Tensor:
    return type(old).from_hp(
        weight,
        old.qdata.dtype,
        _granularity(old),
        mm_config=old.mm_config,
        kernel_preference=old.kernel_preference,
        act_quant_kwargs=old.act_quant_kwargs,
    )


_PACKED_AGAIN: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "Int8Tensor": _int8,
    "IntxUnpackedToInt8Tensor": _intx,
    "Float8Tensor": _float8,
}


def _granularity(old: Any) -> Any:
    """How many values share a scale, read off the blocks."""
    from torchao.quantization import PerGroup, PerRow, PerTensor

    rows, columns = old.block_size
    if columns != old.shape[1]:
        return PerGroup(columns)
    return PerTensor() if rows == old.shape[0] > 1 else PerRow()


def _mapping(old: Any) -> Any:
    """Whether zero is a code of its own; symmetric codes have zero points too, all of them zero."""
    from torchao.quantization.quant_primitives import MappingType

    shifted = old.zero_point is not None and bool(old.zero_point.any())
    return MappingType.ASYMMETRIC if shifted else MappingType.SYMMETRIC
