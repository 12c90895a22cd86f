"""Which adapters a call uses: one small object shared by everything that is grafted onto a model.

Switching adapters changes this one object, not every layer. A choice for a single call (`disable_adapter()`, rows of a
batch with different adapters) is bound to the thread or task that makes it, so that concurrent callers do not meet.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from deltatune.errors import AdapterNameError, StateError
from deltatune.gate import STANDING, Gate, Uses
from deltatune.names import listed

# selection by id -> what the blocks around have chosen, innermost last; a block that has ended is empty
Blocks = Mapping[int, tuple[list[Any], ...]]
_chosen: ContextVar[Blocks] = ContextVar("deltatune_chosen", default=MappingProxyType({}))
_scales: ContextVar[Blocks] = ContextVar("deltatune_scales", default=MappingProxyType({}))
_counting = threading.Lock()


@dataclass(frozen=True)
class Call:
    """What one forward pass uses: the active adapters in order, or one adapter name (None: the base) per row.

    Attributes:
        copies: How often generate() repeats each row for its beams; the encoder has run by then, on the rows as given.
        stacks: Where `deltatune.mixed` keeps stacked adapters, as long as their plan is in use; None: it does not.
        values: What adapters know about the call beyond their inputs, by name (`deltatune.calls`).
        scale: What the scales of adapters are multiplied by; None: what the block around says (`Selection.scaled`).
    """

    names: tuple[str, ...] = ()
    rows: tuple[str | None, ...] | None = None
    copies: int = 1
    stacks: MutableMapping[Any, Any] | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    scale: float | None = None

    def rows_of(self, batch: int) -> tuple[str | None, ...]:
        """One name per row of a batch of this size."""
        assert self.rows is not None
        if batch == len(self.rows):
            return self.rows
        if batch == len(self.rows) * self.copies:
            return tuple(name for name in self.rows for _ in range(self.copies))
        raise StateError(
            f"adapter_names: {len(self.rows)} names for a batch of {batch} rows",
            field="adapter_names",
            found=len(self.rows),
        )

    def acting(self, adapter: Any) -> Any:
        """The adapter, or where another scale is asked for a twin with that one; both have the same tensors."""
        if self.scale is None or self.scale == 1.0 or not has_scale(adapter):
            return adapter
        return _rescaled(adapter, self.scale)  # type: ignore[call-arg]

    def value(self, name: str, batch: int, index: list[int] | None = None) -> Tensor | None:
        """One entry per row of a batch of this size (of its rows in `index`), or one for all; None: unknown."""
        value: Tensor | None = self.values.get(name)
        if value is None or len(value) == 1:
            return value
        if len(value) * self.copies == batch:
            value = value.repeat_interleave(self.copies, dim=0)
        if len(value) != batch:
            raise StateError(f"{name}: {len(value)} entries for a batch of {batch} rows", field=name, found=len(value))
        return value if index is None else value[index]


def each_once(names: Iterable[str]) -> tuple[str, ...]:
    """Names of adapters in the order in which they are to act.

    Raises:
        AdapterNameError: One stands twice: it would act, and be merged, twice. Or it is no name.
    """
    found = listed(names)
    if len(set(found)) < len(found):
        twice = next(name for name in found if found.count(name) > 1)
        raise AdapterNameError(
            f"adapter {twice!r} is named {found.count(twice)} times in {list(found)}; name it once, and change how "
            "strongly it acts with rescale_adapter_scale or add_weighted_adapter",
            field="adapter_name",
            found=list(found),
            expected=list(dict.fromkeys(found)),
        )
    return found


@dataclass(eq=False)
class Selection:
    """The adapters that are active on one model.

    Attributes:
        active: Names in order of application; the model's standing choice.
        enabled: False makes every call use the base alone.
        trained: Names whose parameters were last set to train, so that switching need not look at all the others.
        choosing: How many calls, in any thread, are running under a choice of their own. A plain number, so that a
            compiled model has something to guard on and needs the slow look-up only while such a call is running.
        gate: What passes and changes of the adapters' values wait at.
        standing: What a call uses that chooses nothing by itself: the same object until adapters are switched.
    """

    active: tuple[str, ...] = ()
    enabled: bool = True
    trained: frozenset[str] = frozenset()
    choosing: int = field(default=0, repr=False)
    gate: Gate = field(default_factory=Gate, repr=False)
    standing: Call = field(init=False, repr=False)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in ("active", "enabled"):
            super().__setattr__("standing", Call(self.active if self.enabled else (), scale=1.0))

    def current(self) -> Call:
        if not self.choosing:
            return self.standing
        call = _look_up(self) or Call(self.standing.names)
        return replace(call, scale=_scale(self)) if call.scale is None else call

    def names(self) -> tuple[str, ...]:
        return self.current().names

    def uses(self) -> Uses:
        """What a pass that begins now in this thread or task uses, in the words of the gate."""
        chosen: Call | None = _look_up(self) if self.choosing else None  # type: ignore[arg-type]
        if chosen is None:
            return frozenset((STANDING, *self.active)) if self.enabled else frozenset((STANDING,))
        return frozenset(name for name in chosen.rows or chosen.names if name is not None)

    @contextmanager
    def use(self, call: Call) -> Iterator[None]:
        """Within the block, calls of this thread or task use `call` and nothing else.

        Raises:
            StateError: At the end of the block: a generator that yields within it was continued by another thread or
                task, where the choice did not hold.
        """
        with self._holding(_chosen, call):
            yield

    @contextmanager
    def scaled(self, factor: float) -> Iterator[None]:
        """Within the block, calls of this thread or task see the scales of adapters multiplied."""
        product = factor * (self.current().scale or 0.0)
        chosen = _look_up(self)
        with (
            self._holding(_scales, product),
            nullcontext() if chosen is None else self.use(replace(chosen, scale=product)),
        ):
            yield

    @contextmanager
    def _holding(self, chosen: ContextVar[Blocks], value: Any) -> Iterator[None]:
        """By identity instead of the variable's token: blocks in generators may end in any order, and anywhere."""
        block, held = [value], chosen.get()
        chosen.set({**held, id(self): (*held.get(id(self), ()), block)})
        self._count(1)
        try:
            yield
        except BaseException:
            self._end(chosen, block)
            raise
        if not self._end(chosen, block):
            raise StateError(
                "a block that chooses adapters (disable_adapter, adapter_names, rescale_adapter_scale) has ended in "
                "another thread or task than it began in, so calls in between may not have followed its choice; do not "
                "yield within it to whoever continues elsewhere: choose anew around each call",
                field="adapter_names",
                found=value,
            )

    def _end(self, chosen: ContextVar[Blocks], block: list[Any]) -> bool:
        """Whether the block began here."""
        self._count(-1)
        block.clear()  # for the thread or task where it began
        held = chosen.get()
        around = held.get(id(self), ())
        left = tuple(other for other in around if other is not block and other)
        chosen.set({key: blocks for key, blocks in {**held, id(self): left}.items() if blocks})
        return any(other is block for other in around)

    def acting(self, adapter: Any) -> Any:
        """The adapter as the running call asks for it."""
        return self.current().acting(adapter) if self.choosing else adapter

    def _count(self, step: int) -> None:
        with _counting:
            self.choosing += step

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "choosing": 0, "gate": Gate()}  # copies start outside of any call


def _innermost(chosen: ContextVar[Blocks], selection: Selection) -> Any:
    for block in reversed(chosen.get().get(id(selection), ())):
        if block:
            return block[0]
    return None


def _chosen_for(selection: Selection) -> Call | None:
    return _innermost(_chosen, selection)


def _scale_for(selection: Selection) -> float:
    product = _innermost(_scales, selection)
    return 1.0 if product is None else product


# The compiler cannot follow these. Its own decorator, `torch.compiler.disable`, would load the whole compiler with this
# module, a second that programs without it have no use for; torch has another for such cases.
_chosen_outside, _scale_outside = _disable_dynamo(_chosen_for), _disable_dynamo(_scale_for)


def _look_up(selection: Selection) -> Call | None:
    return (_chosen_outside if torch.compiler.is_compiling() else _chosen_for)(selection)


def _scale(selection: Selection) -> float:
    return (_scale_outside if torch.compiler.is_compiling() else _scale_for)(selection)


def has_scale(adapter: Any) -> bool:
    """Whether one number of an adapter, a view of it, says how strongly all of it acts."""
    return "scaling" in adapter.views and isinstance(vars(adapter).get("scaling"), (int, float))


def _rescaled(adapter: Any, factor: float) -> Any:
    return (_twin_outside if torch.compiler.is_compiling() else _twin)(adapter, factor)


def _twin(adapter: Any, factor: float) -> Any:
    twin = object.__new__(type(adapter))
    vars(twin).update(vars(adapter), scaling=adapter.scaling * factor)
    return twin


_twin_outside = _disable_dynamo(_twin)


def by_adapter(
    rows: tuple[str | None, ...], run: Callable[[str | None, list[int]], Tensor], device: torch.device
) -> Tensor:
    """What `run` makes of the rows of each name: one run per name, and the rows back in their order."""
    groups: dict[str | None, list[int]] = {}
    for index, name in enumerate(rows):
        groups.setdefault(name, []).append(index)
    outputs = [run(name, index) for name, index in groups.items()]
    order = torch.tensor([row for index in groups.values() for row in index], device=device)
    return torch.cat(outputs)[order.argsort()]


class Recomputation:
    """`context_fn` of gradient checkpointing: a layer is recomputed with the adapters it ran with.

    Called as the checkpointed layer runs forward; backward may run later, outside of the block that chose the
    adapters, and on another thread.
    """

    def __init__(self, selection: Selection, grafts: Mapping[str, Any]) -> None:
        self.selection, self.grafts = selection, grafts  # `deltatune.prompts.graft:Graft`s by name

    def __call__(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _all_of(
            [self.selection.use(self.selection.current()), *(graft.carried() for graft in self.grafts.values())]
        )


@contextmanager
def _all_of(contexts: list[AbstractContextManager[None]]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield
