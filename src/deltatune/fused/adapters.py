"""`ParameterAdapters`: what one adapter name has on one module, an adapter for each of some of its parameters."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from deltatune.adapter import Adapter
from deltatune.fused import apart
from deltatune.fused.lora import ExpertLoRA

NESTED = "base_layer."


class ParameterAdapters(Adapter):
    """By parameter, in the order in which the module has them.

    Files tell them apart as PEFT does, which nests one wrapper per parameter: the keys of the last are those of the
    module, those of the one before have a `base_layer.` in front, and so on.
    """

    base_kinds: ClassVar[frozenset[str]] = frozenset({"experts"})
    views: ClassVar[tuple[str, ...]] = ExpertLoRA.views

    def __init__(self, each: dict[str, ExpertLoRA], interleaved: bool = False) -> None:
        super().__init__()
        self.each = nn.ModuleDict(each)
        vars(self)["views"] = (*type(self).views, *(f"each_{name}" for name in list(each)[:-1]))
        self.interleaved = interleaved  # how the module keeps gate and up in one parameter
        reasons = [adapter.identity_at_birth for adapter in each.values() if adapter.identity_at_birth is not True]
        self.identity_at_birth = reasons[0] if reasons else True

    def prefixes(self) -> dict[str, str]:
        """Parameter -> how its keys begin."""
        names = list(self.each)
        return {name: NESTED * depth for name, depth in zip(names, reversed(range(len(names))))}

    def __getattr__(self, name: str) -> Any:
        """What programs read per adapter is that of the last parameter, as in PEFT's outermost wrapper."""
        if name in type(self).views:
            return getattr(list(self.each.values())[-1], name)
        if name in vars(self).get("views", ()):  # the others
            return self.each[name.removeprefix("each_")]
        return super().__getattr__(name)

    def live_parts(self) -> dict[str, nn.Module]:
        *others, (_, last) = self.each.items()
        return {**last.live_parts(), **{f"each_{name}": part for name, part in others}}  # type: ignore[operator]

    def from_file(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Also tensors of single experts (`deltatune.fused.apart`)."""
        parts: dict[str, Any] = dict(self.each.items())
        experts = max(part.count for part in parts.values())
        fused = apart.fuse(tensors, experts, {name: part.r for name, part in parts.items()}, self.interleaved)
        if fused is None:
            return tensors
        starts = self.prefixes()
        return {starts[key.partition(".")[0]] + key.partition(".")[2]: tensor for key, tensor in fused.items()}

    def split_tensors(self, names: apart.Names, halved: bool) -> dict[str, Tensor]:
        """Those of single experts, each under names of its own."""
        parts = [apart.split(name, part, names, self.interleaved, halved) for name, part in self.each.items()]
        return {key: tensor for part in parts for key, tensor in part.items()}

    def file_tensors(self) -> dict[str, Tensor]:
        return {
            start + key: tensor
            for name, start in self.prefixes().items()
            for key, tensor in self.each[name].file_tensors().items()  # type: ignore[operator]
        }
