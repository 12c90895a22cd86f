"""One module's values into another of its kind: worked out first, then done in one go that cannot fail.

Tensors of equal shape are copied in place, so that a compiled model or an optimizer goes on referring to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

Step = Callable[[], Any]
_OWN = frozenset(vars(nn.Module())) | {"shared"}  # the machinery of every module; what adapters share goes by itself


def steps(present: nn.Module, new: nn.Module, replaced: dict[int, Tensor] | None = None) -> Iterator[Step]:
    """What makes the present module equal the new one, which is used up by it.

    Args:
        replaced: By the id of a tensor that has to change its shape, what stands for it wherever it is.
    """
    replaced = {} if replaced is None else replaced
    for name in present._modules.keys() | new._modules.keys():
        mine, other = present._modules.get(name), new._modules.get(name)
        if mine is None or other is None or type(mine) is not type(other):
            yield _setting(present._modules, name, other)
        else:
            yield from steps(mine, other, replaced)
    for name in _tensors(present).keys() | _tensors(new).keys():
        yield from _tensor(present, new, name, replaced)
    for name in _values(present).keys() - _values(new).keys() - _tensors(new).keys():
        yield _taking(vars(present), name)
    for name, value in _values(new).items():
        if name not in _tensors(present) and not _same(vars(present).get(name, ...), value):
            yield _setting(vars(present), name, value)


def _tensor(present: nn.Module, new: nn.Module, name: str, replaced: dict[int, Tensor]) -> Iterator[Step]:
    mine, other = _tensors(present).get(name), _tensors(new).get(name)
    number = vars(new).get(name) if name not in _tensors(new) else None
    if mine is not None and isinstance(number, (int, float)):  # one of the two was prepared for a compiled model
        other = torch.tensor(number, dtype=mine.dtype, device=mine.device)
    if name not in _tensors(present) and isinstance(vars(present).get(name), (int, float)) and other is not None:
        yield _setting(vars(present), name, other.item())
    elif mine is None or other is None:
        yield _setting(_place(present, new, name), name, other)
    elif mine.shape != other.shape:  # not in its `data`, whose shape a graph that is alive remembers
        if id(mine) not in replaced:
            moved = other.detach().to(mine)
            whole = isinstance(mine, nn.Parameter)
            replaced[id(mine)] = nn.Parameter(moved, requires_grad=mine.requires_grad) if whole else moved
        yield _setting(_place(present, new, name), name, replaced[id(mine)])
    elif not torch.equal(mine.detach(), moved := other.detach().to(mine)):
        yield _copying(mine, moved)


def _setting(place: dict[str, Any], name: str, value: Any) -> Step:
    return lambda: place.__setitem__(name, value)


def _taking(place: dict[str, Any], name: str) -> Step:
    return lambda: place.pop(name)


def _place(present: nn.Module, new: nn.Module, name: str) -> dict[str, Any]:
    parameter = name in present._parameters or name in new._parameters
    return present._parameters if parameter else present._buffers


def _copying(tensor: Tensor, value: Tensor) -> Step:
    return lambda: tensor.copy_(value)


def _tensors(module: nn.Module) -> dict[str, Tensor | None]:
    return {**module._parameters, **module._buffers}


def _values(module: nn.Module) -> dict[str, Any]:
    """Everything else that it holds."""
    return {name: value for name, value in vars(module).items() if name not in _OWN}


def _same(one: Any, other: Any) -> bool:
    """Equal, as far as that is a question with one answer."""
    simple = (int, float, str, bool, type(None), tuple, list, torch.Size, torch.dtype)
    if isinstance(one, simple) and isinstance(other, simple):
        return one == other
    return one is other
