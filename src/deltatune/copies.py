"""Modules trained whole: a copy per adapter beside the original, picked by the call (`modules_to_save`)."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from deltatune.compat import CopyViews
from deltatune.selection import Selection, by_adapter


class TrainedCopies(CopyViews, nn.Module):
    """Stands where a module stood, holds it as `original_module` and one trained copy per adapter.

    When several active adapters have a copy, the last of them is used.
    """

    def __init__(self, original_module: nn.Module, selection: Selection) -> None:
        super().__init__()
        self.original_module = original_module
        self.modules_to_save = nn.ModuleDict()
        self.selection = selection

    def add(self, name: str, shared: dict[int, Any] | None = None) -> None:
        """A copy for one more adapter; `shared` are tensors by the id of those they are copies of."""
        made = copy.deepcopy(self.original_module, shared)
        made.requires_grad_(True)
        self.modules_to_save[name] = made
        self.train(self.original_module.training)

    @property
    def current(self) -> nn.Module:
        for name in reversed(self.selection.names()):
            if name in self.modules_to_save:
                return self.modules_to_save[name]
        return self.original_module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = self.selection.current()
        if call.rows is None or not args:
            return self.current(*args, **kwargs)
        copies = self.modules_to_save
        rows = tuple(name if name and name in copies else None for name in call.rows_of(len(args[0])))

        def run(name: str | None, index: list[int]) -> Any:
            return (self.original_module if name is None else copies[name])(args[0][index], *args[1:], **kwargs)

        return by_adapter(rows, run, args[0].device)

    @property
    def weight(self) -> Tensor:
        return self.current.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.current.bias  # type: ignore[return-value]

    @property
    def active_adapter(self) -> str | list[str]:  # type: ignore[override]  # a name where there is one, as in PEFT
        names = [name for name in self.selection.names() if name in self.modules_to_save]
        return names[0] if len(names) == 1 else names

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.current, name)
