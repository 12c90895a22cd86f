"""Gradient checkpointing whose recomputation uses the adapters of the forward pass it repeats."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as rerun

from deltatune.copies import TrainedCopies
from deltatune.layer import AdaptedLayer
from deltatune.selection import Call, Recomputation, Selection
from deltatune.targets import walk

_CHECKPOINT = "_gradient_checkpointing_func"  # transformers' name for what recomputes a layer


def bind(model: nn.Module, selection: Selection, grafts: Mapping[str, Any]) -> None:
    """Let layers be recomputed with the adapters they ran with, wherever checkpointing has been switched on."""
    for module in _outside_adapters(model):
        function = vars(module).get(_CHECKPOINT)
        if not isinstance(function, functools.partial):
            continue
        if function.keywords.get("use_reentrant") is False:
            present = function.keywords.get("context_fn")
            if present is None or isinstance(present, Recomputation):
                options = {**function.keywords, "context_fn": Recomputation(selection, grafts)}
                vars(module)[_CHECKPOINT] = functools.partial(function.func, *function.args, **options)
        elif function.func is rerun:
            # the reentrant engine takes no context, so what it runs brings its own
            vars(module)[_CHECKPOINT] = functools.partial(
                _reentrant, selection, function.func, *function.args, **function.keywords
            )


def _outside_adapters(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that may be checkpointed, without those of adapters, of which there may be very many."""
    yield model
    for _, module in walk(model):
        if isinstance(module, TrainedCopies):
            yield from module.modules()
        else:
            yield module.base_layer if isinstance(module, AdaptedLayer) else module


def _reentrant(
    selection: Selection, checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any, **options: Any
) -> Any:
    if torch.compiler.is_compiling():
        return checkpoint(function, *args, **options)
    return checkpoint(functools.partial(_under, selection, selection.current(), function), *args, **options)


def _under(selection: Selection, call: Call, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    with selection.use(call):
        return function(*args, **options)
