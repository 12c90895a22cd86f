"""Something worked out from parameters and kept until one of them changes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from deltatune.adapter import Applied, LinearMap


@dataclass(frozen=True)
class Stamp:
    """Tensors as they were: the objects, and how many changes torch had counted in each."""

    tensors: tuple[Tensor, ...]
    versions: tuple[int, ...]

    def same(self, other: Stamp) -> bool:
        return self.versions == other.versions and all(a is b for a, b in zip(self.tensors, other.tensors))


class Kept:
    """One value and the stamp of what it depends on; copies of a model start without."""

    def __init__(self) -> None:
        self.stamped: tuple[Stamp, Any] | None = None

    def __deepcopy__(self, memo: Any) -> Kept:
        return Kept()

    def __reduce__(self) -> Any:
        return Kept, ()

    def drop(self) -> None:
        self.stamped = None

    def get(self, stamp: Stamp | None) -> Any:
        """The value, if nothing has changed; whoever asks without a stamp may change something, so it is dropped."""
        if stamp is None or self.stamped is None or not stamp.same(self.stamped[0]):
            self.stamped = None
            return None
        return self.stamped[1]

    def put(self, stamp: Stamp | None, value: Any) -> None:
        self.stamped = None if stamp is None else (stamp, value)

    @staticmethod
    def stamp(layer: LinearMap, adapter: nn.Module) -> Stamp | None:
        """Of the layer's weight and the adapter's parameters; None where the weight is itself a computed one."""
        module = None if isinstance(layer, Applied) else getattr(layer, "module", None)
        stored = None if module is None else module._parameters.get(layer.keeps[0])
        return None if stored is None else Kept.of((stored, *_parameters(adapter)))

    @staticmethod
    def of(tensors: Iterable[Tensor]) -> Stamp | None:
        tensors = tuple(tensors)
        if any(tensor.is_inference() for tensor in tensors):  # torch counts no changes of these
            return None
        return Stamp(tensors, tuple(tensor._version for tensor in tensors))


def _parameters(module: nn.Module) -> Iterator[Tensor]:
    """As `module.parameters()`, at a fraction of its cost; once per layer and token it counts."""
    yield from (parameter for parameter in module._parameters.values() if parameter is not None)
    for child in module._modules.values():
        if child is not None:
            yield from _parameters(child)
