"""`LiveBytes`: bytes of all tensors that are there at once, and what the operations that make them cost."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from deltatune.kernels.linear_cross_entropy import rows_at_once

_CHUNKED = "deltatune.linear_cross_entropy"
LOGITS_READ = 6  # times that the loss in chunks reads or writes a logit: product, maximum, sum, gradient, two products


class LiveBytes(TorchDispatchMode):
    """Counts storages from their first tensor to their last, below autograd, so that saved tensors are in it.

    It works on real and on fake tensors. What an operation allocates and frees inside of itself is not seen, except for
    the loss in chunks.

    Attributes:
        now: Bytes that are there.
        peak: The most there were.
        spent: Called with (FLOP, bytes read and written, random numbers drawn, dtype) of every operation.
    """

    def __init__(self, spent: Callable[[float, int, int, torch.dtype], None] = lambda *_: None) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.spent = spent
        self._seen: set[int] = set()

    def hold(self, tensors: Iterable[Tensor]) -> int:
        """Count tensors that were there before; returns what they add."""
        before = self.now
        for tensor in tensors:
            self._see(tensor)
        return self.now - before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        for tensor in made:
            self._see(tensor)
        self.peak = max(self.peak, self.now + _inside(func, args))
        if func.namespace != "prim" and not _is_view(func):  # a question about a device is no operation
            read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            dtype = next((t.dtype for t in (*read, *made) if t.is_floating_point()), torch.float32)
            if "_for_cpu" in str(func):  # attention, which half precision does not make faster there
                dtype = torch.float32
            flop = _flop(func, args, kwargs, out)
            draws = made and not flop and torch.Tag.nondeterministic_seeded in func.tags
            moved = sum(_bytes(t) for t in (*read, *made)) + LOGITS_READ * _chunked(func, args) * 4
            self.spent(flop, moved, made[0].numel() if draws else 0, dtype)
        return out

    def _see(self, tensor: Tensor) -> None:
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):
            return  # a tensor without one of its own
        key = storage._cdata
        if key in self._seen:
            return
        self._seen.add(key)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _is_view(func: Any) -> bool:
    return any(
        returned.alias_info is not None and not returned.alias_info.is_write for returned in func._schema.returns
    )


def _inside(func: Any, args: Any) -> int:
    """What the loss in chunks holds while it runs: one chunk of logits, and in half precision its gradient."""
    if not _chunked(func, args):
        return 0
    hidden, weight = args[0], args[1]
    entries = min(rows_at_once(len(weight)), len(hidden)) * len(weight)
    return entries * (4 if hidden.dtype is torch.float32 else 4 + 2 * hidden.element_size())


def _chunked(func: Any, args: Any) -> int:
    """Logits that the loss in chunks makes, one chunk after the other."""
    return len(args[0]) * len(args[1]) if str(func).startswith(_CHUNKED) else 0


def _flop(func: Any, args: Any, kwargs: Any, out: Any) -> float:
    if _chunked(func, args):
        hidden, weight = args[0], args[1]
        products = 1 + sum(args[9][:2])
        return 2.0 * products * hidden.numel() * len(weight)
    formula = flop_registry.get(getattr(func, "overloadpacket", func))
    if formula is not None:
        return float(formula(*args, **kwargs, out_val=out))
    name = str(func)
    if "_scaled_dot_product" in name:
        query, key = (args[0], args[1]) if "backward" not in name else (args[1], args[2])
        one = 4.0 * query.numel() * key.shape[-2]
        return one if "backward" not in name else 2.5 * one
    return 0.0
