"""Adapters without numbers, which a file brings: built on torch's meta device, given memory when they are filled.

Meta is a taint: what depends on a number that was never made is meta too, or raises. So an adapter whose meta tensors
all stand in its file is whole once the file has filled it; every other one is built with numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.adapter import Adapter, LinearMap, Method, Stored
from deltatune.errors import MismatchError

_asked: ContextVar[bool] = ContextVar("deltatune_without_numbers", default=False)


@contextmanager
def without_numbers(asked: bool = True) -> Iterator[None]:
    """Within the block, adapters that a file is to fill are built without initialising them (`low_cpu_mem_usage`)."""
    token = _asked.set(asked)
    try:
        yield
    finally:
        _asked.reset(token)


def build(method: Method, layers: dict[str, LinearMap], config: Any) -> tuple[dict[str, Adapter], Stored | None]:
    """As `Method.build`; inside of `without_numbers` without initialising what a file overwrites."""
    if not _asked.get() or method.schedule is not None:  # a schedule keeps numbers of its own from the start on
        return method.build(layers, config)
    try:
        with torch.device("meta"):
            made, shared = method.build(layers, config)
    except (RuntimeError, NotImplementedError):  # it reads numbers while it is built
        return method.build(layers, config)
    stored = [*made.values(), *([] if shared is None else [shared])]
    return (made, shared) if all(_filled_by_file(one) for one in stored) else method.build(layers, config)


def _filled_by_file(stored: Stored) -> bool:
    in_file = {id(tensor) for tensor in stored.file_tensors().values()}
    loose = [value for module in stored.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    return all(id(tensor) in in_file for tensor in (*_own(stored), *loose) if tensor.is_meta)


def _own(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def is_empty(module: nn.Module) -> bool:
    return any(tensor.is_meta for tensor in _own(module))


def give_room(model: nn.Module, name: str, missing: Collection[str]) -> None:
    """Memory for the tensors of an adapter that have no numbers, which is about to be filled.

    Args:
        missing: Keys of the adapter that nothing will fill.

    Raises:
        MismatchError: Some would stay whatever the memory held before.
    """
    from deltatune.inject import adapted_layers
    from deltatune.shared import shared_modules

    layers = [layer for _, layer in adapted_layers(model) if name in layer.adapters]
    rooms = [(layer.adapters[name], layer.base_layer) for layer in layers if is_empty(layer.adapters[name])]
    shared = shared_modules(model).get(name)
    if shared is not None and is_empty(shared):
        rooms.append((shared, layers[0].base_layer))
    if rooms and missing:
        raise MismatchError(
            f"adapter {name!r} was made without numbers (low_cpu_mem_usage=True), and {len(missing)} of its tensors "
            f"are not given ({', '.join(sorted(missing)[:5])}); give all, or make it with low_cpu_mem_usage=False",
            key=sorted(missing)[0],
            expected=sorted(missing),
        )
    made: dict[int, Tensor] = {}  # a tensor under two names, as of tied layers, stays one
    for module, layer in rooms:
        _give_room(module, next(_own(layer)).device, made)


def _give_room(module: nn.Module, device: torch.device, made: dict[int, Tensor]) -> None:
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.is_meta:
                room = torch.empty_like(parameter, device=device)
                made.setdefault(id(parameter), nn.Parameter(room, parameter.requires_grad))
                part._parameters[name] = made[id(parameter)]  # type: ignore[assignment]
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.is_meta:
                part._buffers[name] = made.setdefault(id(buffer), torch.empty_like(buffer, device=device))
