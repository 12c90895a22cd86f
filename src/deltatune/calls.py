"""What adapters know about a call beyond the input of their layer: the task of each row, which tokens are the prompt.

Such a `Value` is given beside the arguments of the base model, as in `model(**inputs, task_ids=[0, 1])`, and stands in
the `Call` of the selection, where layers find it, also those that gradient checkpointing recomputes. One that changes
from pass to pass (with a cache each pass has other tokens) is worked out from the arguments of every pass by a hook.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.selection import Selection

KEY = "_deltatune_values"  # in the __dict__ of a model's root


@dataclass(frozen=True)
class Value:
    """Something adapters know about a call: a tensor with one entry per row, or a single one for all rows.

    Attributes:
        name: The keyword by which `forward` of an adapter is handed it; None where it is not known.
        given: The argument of the model, or of generate, as which the caller gives it.
        at: The modules in whose passes it is worked out; None where what was given is the value.
        of_pass: (model, arguments of that pass, what was given) -> the value.
        of_ids: Whether it is worked out of token ids, which a pass has to have then.
        of_generation: (model, arguments of generate) -> what counts as given where the caller gives nothing.
    """

    name: str
    given: str
    at: Callable[[nn.Module], tuple[nn.Module, ...]] | None = None
    of_pass: Callable[[nn.Module, dict[str, Any], Any], Tensor | None] | None = None
    of_generation: Callable[[nn.Module, dict[str, Any]], Tensor | None] | None = None
    of_ids: bool = False


TASK_IDS = Value("task_ids", "task_ids")


class Readers:
    """The values that the adapters of one model read, by adapter, and the hooks that work them out."""

    def __init__(self, model: nn.Module, selection: Selection) -> None:
        self.model, self.selection = model, selection
        self.reads: dict[str, tuple[Value, ...]] = {}
        self.hooked: dict[int, tuple[nn.Module, list[Any]]] = {}
        self.running = _PerThread()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("running", "hooked")} | {
            "hooked": list(self.hooked.values())
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.hooked = {id(module): (module, handles) for module, handles in state["hooked"]}
        self.running = _PerThread()

    @property
    def values(self) -> list[Value]:
        return list(dict.fromkeys(value for values in self.reads.values() for value in values))

    def follow(self) -> None:
        """Hooks on just the modules in whose passes something is worked out."""
        modules = [value.at(self.model) for value in self.values if value.at is not None]
        wanted = {id(module): module for of_value in modules for module in of_value}
        for key in self.hooked.keys() - wanted.keys():
            for handle in self.hooked.pop(key)[1]:
                handle.remove()
        for key, module in wanted.items():
            if key not in self.hooked:
                before = module.register_forward_pre_hook(self.enter, with_kwargs=True)
                self.hooked[key] = (module, [before, module.register_forward_hook(self.leave, always_call=True)])

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.leave(module)
        call = self.selection.current()
        named = {**dict(zip(inspect.signature(module.forward).parameters, args)), **kwargs}
        found = {
            value.name: value.of_pass(self.model, named, call.values.get(value.given))
            for value in self.values
            if value.of_pass is not None and value.at is not None and module in value.at(self.model)
        }
        using = self.selection.use(replace(call, values={**call.values, **found}))
        using.__enter__()
        self.running.passes[id(module)] = using

    def leave(self, module: nn.Module, args: Any = (), output: Any = None) -> None:
        """Also called, without output, when a pass failed."""
        using = self.running.passes.pop(id(module), None)
        if using is not None:
            using.__exit__(None, None, None)

    def taken(
        self, kwargs: dict[str, Any], kept: Iterable[str] = (), generation: dict[str, Any] | None = None
    ) -> dict[str, Tensor]:
        """What the caller gives, out of the arguments of a call; those in `kept` are left for others to read."""
        found: dict[str, Tensor] = {}
        own = inspect.signature(self.model.forward).parameters
        for value in self.values:
            if value.given in found:  # by another adapter that reads it
                continue
            given = kwargs.get(value.given)
            if value.given not in kept and value.given not in own:
                kwargs.pop(value.given, None)
            if given is None and generation is not None and value.of_generation is not None:
                given = value.of_generation(self.model, generation)
            if given is not None:
                found[value.given] = per_row(given)
        return found


class _PerThread(threading.local):
    def __init__(self) -> None:
        self.passes: dict[int, Any] = {}


def per_row(value: Any) -> Tensor:
    value = torch.as_tensor(value)
    return value.reshape(1) if value.ndim == 0 else value


def readers(model: nn.Module) -> Readers | None:
    return vars(model).get(KEY)


def follow(model: nn.Module, selection: Selection, name: str, values: Iterable[Value]) -> None:
    """From now on an adapter of this name reads these values."""
    values = tuple(dict.fromkeys(values))
    if values:
        found = vars(model).setdefault(KEY, Readers(model, selection))
        found.reads[name] = values
        found.follow()


def forget(model: nn.Module, name: str | None = None) -> None:
    """That adapter, or all of them, read nothing any more."""
    found = readers(model)
    if found is not None:
        found.reads.pop(name, None) if name is not None else found.reads.clear()
        found.follow()
        if not found.reads:
            del vars(model)[KEY]


@contextmanager
def call_values(model: nn.Module, **values: Any) -> Iterator[None]:
    """Within the block, calls of an adapted model without a `PeftModel` around it have these values."""
    found = readers(model)
    if found is None:
        yield
        return
    call = found.selection.current()
    with found.selection.use(replace(call, values={**call.values, **found.taken(dict(values))})):
        yield
