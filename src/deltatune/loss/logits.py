"""`LazyLogits`: what a head would have put out, and what was done with it since, computed when its numbers are used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deltatune.weight import FACTS

if TYPE_CHECKING:
    from deltatune.loss.head import Head


@dataclass(frozen=True)
class Step:
    """Something done with every row of logits alike: `function`, in whose arguments `LOGITS` stands for them."""

    function: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, logits: Tensor) -> Tensor:
        return self.function(*(logits if part is LOGITS else part for part in self.args), **self.kwargs)


LOGITS = object()


@dataclass(frozen=True)
class Recipe:
    """Logits (..., V) as the steps on head(hidden), with hidden (..., d)."""

    head: Head
    hidden: Tensor
    dtype: torch.dtype
    steps: tuple[Step, ...] = ()


class LazyLogits(Tensor):
    """Stands for the logits of a recipe; `used` are these, once something has used them."""

    _recipe: Recipe
    _used: Tensor | None

    @staticmethod
    def __new__(cls: type, recipe: Recipe) -> LazyLogits:
        shape = (*recipe.hidden.shape[:-1], recipe.head.vocabulary)
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, dtype=recipe.dtype, device=recipe.hidden.device
        )
        made._recipe, made._used = recipe, None
        return made

    def __init__(self, recipe: Recipe) -> None:
        pass

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == _REQUIRES_GRAD:
            return args[0]._recipe.hidden.requires_grad
        if func in FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        found = _followed(func, args, kwargs)
        if found is not None:
            return found
        name = getattr(func, "__name__", repr(func))
        return func(*_dense(args, name), **_dense(kwargs, name))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*_dense(args, str(func)), **_dense(kwargs or {}, str(func)))  # reached only by code below autograd

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"LazyLogits(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"


def _followed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a call gives without the numbers; None where it needs them."""
    name = getattr(func, "__name__", "")
    if func is F.cross_entropy:
        return _cross_entropy(*args, **kwargs)
    logits = [part for part in args if isinstance(part, LazyLogits)]
    if len(logits) != 1 or logits[0]._used is not None or any(isinstance(part, LazyLogits) for part in kwargs.values()):
        return None
    recipe, others = logits[0]._recipe, [part for part in args if part is not logits[0]]
    if name in _CASTS:
        return _cast(recipe, name, others, kwargs)
    if name in _SHAPES and args[0] is logits[0]:
        hidden = _reshaped(recipe.hidden, tuple(logits[0].shape), name, others, kwargs)
        return None if hidden is None else LazyLogits(replace(recipe, hidden=hidden))
    if name in _ELEMENTWISE and not kwargs and all(_of_every_row(part, logits[0]) for part in others):
        step = Step(func, tuple(LOGITS if part is logits[0] else part for part in args), {})
        return LazyLogits(replace(recipe, steps=(*recipe.steps, step)))
    return None


def _cast(recipe: Recipe, name: str, others: list[Any], kwargs: dict[str, Any]) -> LazyLogits | None:
    target = {"float": torch.float32, "double": torch.float64, "contiguous": recipe.dtype}.get(name)
    if name == "to":  # .to(dtype), .to(device) of the device they are on
        given = [*others, *(value for key, value in kwargs.items() if key != "non_blocking")]
        if len(given) != 1:
            return None
        if isinstance(given[0], torch.dtype) and given[0].is_floating_point:
            target = given[0]
        elif isinstance(given[0], (torch.device, str)) and torch.device(given[0]) == recipe.hidden.device:
            target = recipe.dtype
    elif others or kwargs:
        return None
    if target is None:
        return None
    if target == recipe.dtype:
        return LazyLogits(recipe)
    return LazyLogits(replace(recipe, dtype=target, steps=(*recipe.steps, Step(Tensor.to, (LOGITS, target), {}))))


def _reshaped(
    hidden: Tensor, shape: tuple[int, ...], name: str, args: list[Any], kwargs: dict[str, Any]
) -> Tensor | None:
    """Hidden states under a change of shape that leaves every row of logits whole."""
    width, last = shape[-1], len(shape) - 1
    if kwargs or not all(isinstance(part, (int, slice, tuple, torch.Size, type(...))) for part in args):
        return None
    if name == "narrow":
        axis, start, length = args
        return hidden.narrow(axis % len(shape), start, length) if axis % len(shape) != last else None
    if name == "flatten":
        first, end = (*args, *(0, -1)[len(args) :])
        return hidden.flatten(first, end) if end % len(shape) != last else None
    if name == "__getitem__":
        index = args[0] if isinstance(args[0], tuple) else (args[0],)
        if not all(isinstance(part, (int, slice, type(...))) and not isinstance(part, bool) for part in index):
            return None
        reaches = len(index) == len(shape) or ... in index
        if reaches and index[-1] is not ... and index[-1] != slice(None):
            return None
        return hidden[index]
    wanted = tuple(args[0]) if isinstance(args[0], (tuple, torch.Size)) else tuple(args)
    if not wanted or wanted[-1] != width:
        return None
    return hidden.reshape(*wanted[:-1], hidden.shape[-1])


def _of_every_row(value: Any, logits: Tensor) -> bool:
    """A number, or a tensor that is the same for all rows and needs no gradient: a bias (V,), (1, V)."""
    if isinstance(value, (int, float)):
        return True
    if not isinstance(value, Tensor) or value.requires_grad or value.dtype != logits.dtype:
        return False
    return value.ndim == 0 or (value.ndim <= 2 and value.numel() == value.shape[-1] == logits.shape[-1])


def _cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    """`torch.nn.functional.cross_entropy`, whose arguments these are, of rows (N, V) and classes (N,)."""
    whole = (weight, size_average, reduce) != (None, None, None) or reduction not in ("mean", "sum")
    if whole or not isinstance(input, LazyLogits) or input._used is not None or isinstance(target, LazyLogits):
        return None
    if input.ndim != 2 or target.ndim != 1 or target.is_floating_point():
        return None
    recipe = input._recipe
    total = recipe.head.loss(recipe, target, ignore_index, label_smoothing)
    if reduction == "mean":
        total = total / (target != ignore_index).sum()
    return total.to(recipe.dtype)


def _dense(value: Any, used_by: str) -> Any:
    if isinstance(value, LazyLogits):
        if value._used is None:
            value._used = value._recipe.head.dense(value._recipe, used_by)
        return value._used
    if isinstance(value, (tuple, list)):
        return type(value)(_dense(part, used_by) for part in value)
    if isinstance(value, dict):
        return {key: _dense(part, used_by) for key, part in value.items()}
    return value


_CASTS = {"float", "double", "contiguous", "to"}
_SHAPES = {"view", "reshape", "flatten", "narrow", "__getitem__"}
_ELEMENTWISE = {
    *("mul", "__mul__", "__rmul__", "div", "true_divide", "__truediv__"),
    *("add", "__add__", "__radd__", "tanh"),
}
_REQUIRES_GRAD = Tensor.requires_grad.__get__  # type: ignore[attr-defined]
