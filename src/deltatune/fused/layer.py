"""`FusedLayer`: stands where a module stood whose parameters are adapted, and calls it with the adapted ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.adapter import LinearMap
from deltatune.bases.experts import Experts
from deltatune.bases.module import call_with
from deltatune.errors import MergeError, StateError
from deltatune.fused.adapters import ParameterAdapters
from deltatune.fused.rows import by_token, tokens_of
from deltatune.fused.weight import LowRankWeight
from deltatune.layer import AdaptedLayer
from deltatune.merging import Merged, lost, refuse_infinite
from deltatune.selection import Call, Selection


@dataclass
class MergedParameters(Merged):
    """Of any names; for `unmerge` those that were there before."""

    parameters: dict[str, nn.Parameter] = field(default_factory=dict)

    def by_name(self, keeps: tuple[str, str]) -> dict[str, nn.Parameter | None]:
        return dict(self.parameters)


class FusedLayer(AdaptedLayer):
    """A module under adapters of its parameters, and perhaps of its output, as any block.

    However the module reads a parameter, it finds the adapted one. What is inside of it keeps its path.
    """

    def __init__(self, base_layer: nn.Module, selection: Selection) -> None:
        super().__init__(base_layer, selection)
        self.is_block = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = self.selection.current()
        return self._after(self._run(call, args, kwargs), call, args, kwargs)

    def _run(self, call: Call, args: tuple, kwargs: dict[str, Any]) -> Any:
        if isinstance(self.stash, MergedParameters):
            if call.rows is not None:
                raise StateError(
                    "adapter_names: rows cannot differ while adapters are merged; call unmerge_adapter() first",
                    field="adapter_names",
                    found=call.rows,
                    hint="call unmerge_adapter()",
                )
            if not call.names:
                return self._call(dict(self.stash.parameters), args, kwargs)
            self.stash.refuse_stale(self.training)
            return self._call(self.adapted(self.unmerged(call.names)), args, kwargs)
        if call.rows is None or len({*self._rows(call)}) == 1:
            return self._call(self.adapted(self._one_for_all(call)), args, kwargs)
        tokens = tokens_of(args, kwargs, len(call.rows))
        if tokens is None:
            self._one_for_all(call)  # raises
        return by_token(
            [name for name in self._rows(call) for _ in range(tokens or 0)],
            lambda name, args, kwargs: self._call(self.adapted([name] if name else []), args, kwargs),
            args,
            kwargs,
        )

    def _after(self, output: Any, call: Call, args: tuple, kwargs: dict[str, Any]) -> Any:
        names = [name for name in call.rows or call.names if name and name in self.adapters]
        return output if len(self._changing(names)) == len(names) else super()._after(output, call, args, kwargs)

    def _call(self, values: dict[str, Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        return call_with(self.base_layer, values, args, kwargs) if values else self.base_layer(*args, **kwargs)

    def _rows(self, call: Call) -> list[str | None]:
        """Of each row, the adapter that changes parameters here."""
        return [name if name and self._changing([name]) else None for name in call.rows or ()]

    def _one_for_all(self, call: Call) -> tuple[str, ...]:
        if call.rows is None:
            return call.names
        rows = self._rows(call)
        if len(set(rows)) == 1:
            return tuple(name for name in rows[:1] if name)
        return super()._one_for_all(call)

    def _under(self, layer: LinearMap, names: Iterable[str], read: Any) -> LinearMap:
        return super()._under(layer, [name for name in names if not self._changing([name])], read)

    # ------------------------------------------------------------------------------------------- adapted parameters

    def _changing(self, names: Iterable[str]) -> list[ParameterAdapters]:
        here = [self.adapters[name] for name in names if name in self.adapters]
        return [adapter for adapter in here if isinstance(adapter, ParameterAdapters)]

    def adapted(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The parameters that the named adapters change, changed."""
        by_parameter: dict[str, list[Any]] = {}
        for adapter in self._changing(names):
            for name, part in adapter.each.items():
                by_parameter.setdefault(name, []).append(part)
        return {name: self._sum(name, adapters) for name, adapters in by_parameter.items()}

    def _sum(self, name: str, adapters: list[Any]) -> Tensor:
        layer = Experts(self.base_layer, name)
        if torch.compiler.is_compiling():  # the compiler knows no such tensor, and leaves out what nobody reads
            return self._dense(layer, adapters)
        parts = [adapter.factors(layer) for adapter in adapters]
        return LowRankWeight.of(
            layer.stored, torch.cat([L for L, _ in parts], -1), torch.cat([R for _, R in parts], -2)
        )

    def _dense(self, layer: Experts, adapters: list[Any]) -> Tensor:
        weight = layer.weight
        for adapter in adapters:
            weight = adapter.adapt(weight)
        return layer.store(weight).to(layer.dtype)

    def _seen(self, name: str) -> Tensor:
        """The parameter as code outside of the module reads it."""
        stored: Tensor = getattr(self.base_layer, name)
        call = self.selection.current()
        if isinstance(self.stash, MergedParameters) and not (call.rows or call.names):
            return self.stash.parameters.get(name, stored)  # type: ignore[return-value]
        return self.adapted(self.unmerged(self._one_for_all(call))).get(name, stored)

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias  # type: ignore[return-value]

    def stored_weight(self, names: Iterable[str]) -> Tensor:
        """Of the last parameter that is adapted here, as PEFT's outermost wrapper gives it."""
        (name, weight), *_ = reversed(self.dense(names or self.adapters).items())
        return weight if names else getattr(self.base_layer, name).detach()

    def dense(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The changed parameters as plain tensors."""
        return {name: torch.Tensor.add(weight, 0) for name, weight in self.adapted(names).items()}

    # ------------------------------------------------------------------------------------------------------ merging

    def merged_parameters(self, names: Iterable[str], check: bool) -> Merged:
        names = tuple(name for name in names if name in self.adapters)
        for name in names:
            self._refuse_output(name)
        held: dict[str, nn.Parameter] = {}
        most = 0.0
        with torch.no_grad():
            for name in self.adapted(names):
                layer = Experts(self.base_layer, name)
                weight = layer.weight
                for adapter in self._changing(names):
                    weight = adapter.each[name].adapt(weight) if name in adapter.each else weight  # type: ignore
                held[name] = layer.hold(weight)
                refuse_infinite(names, layer, (weight, held[name]), check)
                most = max(most, lost(layer, weight, held[name]))
        return MergedParameters(names, None, None, most, self._versions(names), held)

    def _refuse_output(self, name: str) -> None:
        reason = self.adapters[name].mergeable
        if reason is not True:
            raise MergeError(f"adapter {name!r} acts on the output here: {reason}; it cannot be merged", found=[name])

    def _present(self, like: Merged) -> Merged:
        assert isinstance(like, MergedParameters)
        old = {name: self.base_layer._parameters[name] for name in like.parameters}
        return MergedParameters(like.names, None, None, 0.0, like.merged_at, old)  # type: ignore[arg-type]

    def _put(self, new: Merged) -> None:
        assert isinstance(new, MergedParameters)
        for name, parameter in new.parameters.items():
            setattr(self.base_layer, name, parameter)

    # ------------------------------------------------------------------------------------------- like the base layer

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("_modules", {})
        owner = modules.get("base_layer")
        if owner is not None and name in owner._parameters and owner._parameters[name] is not None:
            return self._seen(name)
        return super().__getattr__(name)
