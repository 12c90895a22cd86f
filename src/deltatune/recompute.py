"""Gradient checkpointing that was switched on before any adapter: its recomputation learns of them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from torch import nn

from deltatune.selection import Recomputation, Selection

_CHECKPOINT = "_gradient_checkpointing_func"  # transformers' name for what recomputes a layer


def bind(model: nn.Module, selection: Selection, grafts: Mapping[str, Any]) -> None:
    """Let layers be recomputed with the adapters they ran with.

    The reentrant engine has no place for that: under it a backward pass has to run under its forward pass's choice.
    """
    for module in model.modules():
        function = vars(module).get(_CHECKPOINT)
        if not isinstance(function, functools.partial) or function.keywords.get("use_reentrant") is not False:
            continue
        present = function.keywords.get("context_fn")
        if present is None or isinstance(present, Recomputation):
            options = {**function.keywords, "context_fn": Recomputation(selection, grafts)}
            vars(module)[_CHECKPOINT] = functools.partial(function.func, *function.args, **options)
