"""One layer under a batch whose rows use different adapters: the layer runs once, and adapters of a kind act together.

Plan     which rows go together, worked out when rows or adapters change
stacked  adapters of one method and shape as one, whose tensors have one more axis, of rows, before theirs
Rowwise  the layer for such an adapter, whose `forward` is then the method's own: each row meets its own matrix

Adapters that cannot be stacked follow one after the other, each on its rows. A stack is made in every pass and gone
after it, so that it takes no memory and is never out of date. Where nothing changes between passes (`generate`,
`PeftModel.fixed_adapters`) it is kept as long as the plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from deltatune.adapter import Adapter, Applied, LinearMap
from deltatune.selection import Call

Names = tuple[str | None, ...]


class OutdatedPlan(RuntimeError):
    """Adapters that were alike when the plan was made are so no more: one has got another rank, say."""


@dataclass(frozen=True, eq=False)
class Group:
    """Rows that are computed together.

    Attributes:
        adapters: Theirs; none for rows of the base, several if these are stacked.
        index: Numbers of the rows. Those of one adapter follow one another, as many of each adapter; where it has
            fewer its first one is repeated.
        rows: The same as a tensor; None where the group is the whole batch, in order.
    """

    adapters: tuple[Adapter, ...]
    index: list[int]
    rows: Tensor | None

    def of(self, x: Tensor) -> Tensor:
        return x if self.rows is None else x.index_select(0, self.rows)


@dataclass(frozen=True)
class Plan:
    """How the rows of a batch are computed on one layer.

    Attributes:
        names: One per row.
        held: The adapters behind them, by name; None for a name that has none here.
        order: Where each row of the batch is among those of the groups, one group after the other; None: in its place.
        sizes: Rows of each group, where there are several and the batch is these one after the other.
    """

    names: Names
    held: dict[str, Adapter | None]
    device: torch.device
    groups: list[Group]
    order: Tensor | None
    sizes: list[int] | None

    @classmethod
    def of(cls, names: Names, adapters: Mapping[str, Any], layer: LinearMap, device: torch.device) -> Plan:
        held = {name: adapters.get(name) for name in dict.fromkeys(names) if name is not None}
        members: dict[Adapter | None, list[int]] = {}
        for row, name in enumerate(names):
            members.setdefault(None if name is None else held[name], []).append(row)
        kinds: dict[Any, dict[Adapter | None, list[int]]] = {}
        for adapter, rows in members.items():
            # as many rows up to a factor of two, so that at most every second one is there twice
            kind = None if adapter is None else (_kind(adapter, layer), len(rows).bit_length())
            kinds.setdefault(kind, {})[adapter] = rows
        groups = [_group(mine, len(names), device) for mine in kinds.values()]
        places = {row: place for place, row in enumerate(row for group in groups for row in group.index)}
        order = [places[row] for row in range(len(names))]
        sizes = [len(group.index) for group in groups]
        in_place = order == list(range(len(names))) and sum(sizes) == len(names)
        several = in_place and len(groups) > 1
        return cls(names, held, device, groups, None if in_place else _long(order, device), sizes if several else None)

    def holds(self, names: Names, adapters: Mapping[str, Any], device: torch.device) -> bool:
        """Whether it is still right: the same rows, and for each the same adapter."""
        if (self.names is not names and self.names != names) or self.device != device:
            return False
        for name, adapter in self.held.items():  # noqa: SIM110, once per layer and token: `all` takes twice as long
            if adapters.get(name) is not adapter:
                return False
        return True


def forward(plan: Plan, layer: LinearMap, x: Tensor, call: Call, seen: Tensor | None = None) -> Tensor:
    """The layer's output, row i under its own adapter.

    Args:
        x: The input, one entry per row.
        seen: The output of the layer without adapters where that is known already.
    """
    base, rows = _Once(layer, x, seen, plan), _Cut(plan, x)
    outputs = [_run(group, base, rows, call) for group in plan.groups]
    together = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return together if plan.order is None else together.index_select(0, plan.order)


def _run(group: Group, base: _Once, cut: _Cut, call: Call) -> Tensor:
    if not group.adapters:
        return base.of(group)
    x = cut.of(group)
    if len(group.adapters) == 1:
        read = lambda name: call.value(name, len(base.shown), group.index)  # noqa: E731
        return Applied(call.acting(group.adapters[0]), cast(LinearMap, Known(base, group, x)), read)(x)
    rows = x.reshape(len(group.adapters), -1, x.shape[-1])
    y = _stacked(group, call).forward(rows, cast(LinearMap, Rowwise(base, group, rows)))
    return y.reshape(len(group.index), *base.shown.shape[1:-1], y.shape[-1])


def _stacked(group: Group, call: Call) -> Adapter:
    if call.scale not in (None, 1.0):
        return stacked([call.acting(adapter) for adapter in group.adapters])
    if call.stacks is None or torch.is_grad_enabled():
        return stacked(group.adapters)
    if group not in call.stacks:
        call.stacks[group] = stacked(group.adapters)
    return call.stacks[group]


class _Cut:
    """A tensor by groups. Where the batch is these one after the other it is cut once: nothing is copied, and the
    gradient is put together once, not a tensor of the whole batch for each group."""

    def __init__(self, plan: Plan, whole: Tensor) -> None:
        self.whole, self.groups = whole, plan.groups
        self.parts = None if plan.sizes is None else whole.split(plan.sizes)

    def of(self, group: Group) -> Tensor:
        for own, part in zip(self.groups, self.parts or ()):  # a table by group is what the compiler cannot follow
            if own is group:
                return part
        return group.of(self.whole)


class _Once:
    """What a layer puts out for all rows, computed when it is first asked for."""

    def __init__(self, layer: LinearMap, x: Tensor, y: Tensor | None, plan: Plan) -> None:
        self.layer, self.x, self.y, self.plan = layer, x, y, plan
        self.shown = x if y is None else y  # which has the rows and tokens of the output
        self.cut: _Cut | None = None

    def of(self, group: Group) -> Tensor:
        if self.cut is None:
            self.cut = _Cut(self.plan, self.layer(self.x) if self.y is None else self.y)
        return self.cut.of(group)


class Known:
    """A layer whose output for the rows of a group, as they came in, is that of the whole batch."""

    dense = False  # what is known already should not be computed once more in a sum with the update

    def __init__(self, base: _Once, group: Group, x: Tensor) -> None:
        self.base, self.group, self.x = base, group, x

    def __call__(self, x: Any) -> Tensor:
        return self.base.of(self.group) if x is self.x else self.base.layer(x)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.base.layer, name)


class Rowwise(Known):
    """The same for matrices and vectors that differ between adapters; inputs are (adapters, tokens, features)."""

    def __call__(self, x: Tensor) -> Tensor:
        y = super().__call__(x)
        return y.reshape(x.shape[0], -1, y.shape[-1])

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """`weight` (rows, out, in), `bias` (rows, out)."""
        if x.shape[-1] != weight.shape[-1]:
            return self.base.layer.apply(x, weight[0])  # which says what is wrong
        y = torch.bmm(x, weight.to(x.dtype).mT)
        return y if bias is None else y + bias.to(x.dtype)[:, None]

    def mix(self, h: Tensor, matrix: Tensor) -> Tensor:
        return torch.bmm(h, matrix.to(h.dtype).mT)

    def scale(self, y: Tensor, vector: Tensor) -> Tensor:
        return y * vector.to(y.dtype)[:, None]


def stacked(adapters: Sequence[Adapter]) -> Adapter:
    """These adapters as one; `Adapter.stacks` says which methods allow it."""
    made = _stack(adapters)
    for name in adapters[0].row_numbers:
        numbers = [getattr(adapter, name) for adapter in adapters]
        if numbers.count(numbers[0]) < len(numbers):
            vars(made)[name] = next(adapters[0].parameters()).new_tensor(numbers)[:, None, None]
    return made


def _stack(modules: Sequence[nn.Module]) -> Any:
    first = modules[0]
    made = object.__new__(type(first))
    children = {
        name: _stack([module._modules[name] for module in modules]) if _has_tensors(child) else child  # type: ignore
        for name, child in first._modules.items()
    }
    vars(made).update(vars(first), rows=1, _modules=children)
    if first._parameters:
        parameters = {n: _joined([module._parameters[n] for module in modules]) for n in first._parameters}
        made._parameters = cast(dict[str, "nn.Parameter | None"], parameters)
    if first._buffers:
        made._buffers = {n: _joined([module._buffers[n] for module in modules]) for n in first._buffers}
    return made


def _joined(tensors: list[Tensor | None]) -> Tensor | None:
    if tensors[0] is None and not any(tensor is not None for tensor in tensors):
        return None
    try:
        return torch.stack(tensors)  # type: ignore[arg-type]
    except (RuntimeError, TypeError) as error:
        raise OutdatedPlan(str(error)) from error


def _has_tensors(module: nn.Module | None) -> bool:
    return module is not None and bool(module._parameters or module._buffers or module._modules)


def _kind(adapter: Adapter, layer: LinearMap) -> Any:
    """Equal for adapters that can be stacked; of its own for one that cannot be."""
    # declared by the class itself: the `forward` of a subclass need not count axes from the end
    stacks = vars(adapter).get("stacks", vars(type(adapter)).get("stacks"))
    hooked = adapter._forward_hooks or adapter._forward_pre_hooks  # by somebody who wants to see it run
    if stacks is None or layer.kind not in ("linear", "block") or adapter.reads or adapter.shared is not None or hooked:
        return id(adapter)
    options = tuple(getattr(adapter, name) for name in stacks)
    return type(adapter), adapter.training, options, tuple(_shapes(adapter))


def _shapes(module: nn.Module) -> list[Any]:
    tensors = {**module._parameters, **module._buffers}
    found: list[Any] = [(name, t if t is None else (t.shape, t.dtype, t.device)) for name, t in tensors.items()]
    for name, child in module._modules.items():
        assert child is not None
        found += [name, *(_shapes(child) or [repr(child)])]  # a dropout and its probability
    return found


def _group(members: dict[Adapter | None, list[int]], batch: int, device: torch.device) -> Group:
    most = max(len(rows) for rows in members.values())
    index = [row for rows in members.values() for row in (*rows, *[rows[0]] * (most - len(rows)))]
    whole = index == list(range(batch))
    return Group(
        tuple(adapter for adapter in members if adapter is not None), index, None if whole else _long(index, device)
    )


def _long(numbers: list[int], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.long, device=device)
