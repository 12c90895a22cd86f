"""The weight of an adapted layer, as seen by code that reads it: dense only when its values are really used.

Many models ask a layer's weight for its dtype or device on every call. `LazyWeight` answers such questions from the
stored weight, and computes the adapted matrix, with its gradient path, at the first operation that needs numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deltatune.errors import StateError


class LazyWeight(Tensor):
    """Stands for `compute()`, which has the shape, dtype and device of `stored`."""

    _compute: Callable[[], Tensor]
    _is_param = True  # isinstance(weight, nn.Parameter) holds, as programs that look a weight up expect

    @staticmethod
    def __new__(cls: type, stored: Tensor, compute: Callable[[], Tensor]) -> LazyWeight:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, stored.shape, strides=stored.stride(), dtype=stored.dtype, device=stored.device
        )
        made._compute = compute
        return made

    def __init__(self, stored: Tensor, compute: Callable[[], Tensor]) -> None:
        pass

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if func == _DATA:  # lazy too: written to, it would be a copy that nobody reads
            return LazyWeight(args[0], lambda: _dense(args[0]).detach())
        name = getattr(func, "__name__", "")
        in_place = (name.endswith("_") and not name.endswith("__")) or name in ("__setitem__", "__set__")
        first, out = (args or tuple((kwargs or {}).values()))[0], (kwargs or {}).get("out")
        if isinstance(out, LazyWeight) or (in_place and isinstance(first, LazyWeight)):
            raise StateError(
                f"{name} would change the weight of a layer under active adapters, which is computed; "
                "change layer.base_layer.weight, or disable the adapters first",
                field="weight",
                found=name,
                hint="change layer.base_layer.weight",
            )
        return func(*_dense(args), **_dense(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*_dense(args), **_dense(kwargs or {}))  # reached only by code below autograd

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"LazyWeight(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"


def _dense(value: Any) -> Any:
    if isinstance(value, LazyWeight):
        with torch._C.DisableTorchFunctionSubclass():
            compute = value._compute
        return compute()
    if isinstance(value, (tuple, list)):
        return type(value)(_dense(part) for part in value)
    if isinstance(value, dict):
        return {key: _dense(part) for key, part in value.items()}
    return value


_DATA = Tensor.data.__get__  # type: ignore[attr-defined]
FACTS = {
    *(getattr(Tensor, name).__get__ for name in ("dtype", "device", "shape", "ndim", "layout", "is_meta", "is_cuda")),
    *(getattr(Tensor, name).__get__ for name in ("is_cpu", "is_sparse", "is_quantized", "is_nested", "requires_grad")),
    *(
        Tensor.size,
        Tensor.dim,
        Tensor.numel,
        Tensor.stride,
        Tensor.is_floating_point,
        Tensor.is_complex,
        Tensor.__len__,
    ),
    *(Tensor.element_size, Tensor.nelement, Tensor.get_device, Tensor.__repr__),
}
