"""Verbs on any adapted model, with a `PeftModel` around it or without: PEFT's functions of these names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from deltatune import inject
from deltatune.errors import AdapterNameError, StateError
from deltatune.model import PeftModel
from deltatune.notice import warn
from deltatune.selection import Selection, each_once
from deltatune.shared import shared_modules


def set_adapter(model: nn.Module, adapter_name: str | list[str], inference_mode: bool = False, **ignored: Any) -> None:
    """Make one adapter, or several in order, the active ones; they train unless `inference_mode`, all others do not.

    Merged adapters are unmerged first, with a warning.

    Raises:
        AdapterNameError: No adapter of that name is on the model.
    """
    names = (adapter_name,) if isinstance(adapter_name, str) else each_once(adapter_name)
    _check(model, names, "set_adapter")
    layers = [layer for _, layer in inject.adapted_layers(model)]
    if any(layer.merged for layer in layers):
        warn("set_adapter: adapters are merged; they are unmerged first")
    if isinstance(model, PeftModel):
        return model.set_adapter(list(names), inference_mode)
    for layer in layers:
        layer.unmerge()
    for selection in _selections(model):
        selection.active = names
        inject.train(model, selection, selection.trained - set(names), False)
        inject.train(model, selection, names, not inference_mode)


def delete_adapter(model: nn.Module, adapter_name: str, prefix: str = "", **ignored: Any) -> list[str] | None:
    """Take an adapter off; layers left without one become what they were.

    Args:
        prefix: Accepted; PEFT finds the adapter's tensors by it.

    Returns:
        The adapters that are active now, or None where there are none.

    Raises:
        AdapterNameError: No adapter of that name is on the model.
        StateError: It is merged.
    """
    _check(model, (adapter_name,), "delete_adapter")
    if isinstance(model, PeftModel):
        model.delete_adapter(adapter_name)
        return model.active_adapters or None
    if any(adapter_name in layer.merged_adapters for _, layer in inject.adapted_layers(model)):
        raise StateError(
            f"delete_adapter: {adapter_name!r} is merged into the weights; unmerge it first",
            field="adapter_name",
            found=adapter_name,
            expected="unmerged",
            hint="unmerge it first",
        )
    selections = _selections(model)
    inject.remove(model, adapter_name)
    left = known_names(model)
    for selection in selections:
        selection.trained -= {adapter_name}
        if adapter_name in selection.active:
            active = tuple(name for name in selection.active if name != adapter_name)
            selection.active = active or tuple(left[:1])
            inject.train(model, selection, selection.active, True)
    return list(selections[0].active) or None


def set_requires_grad(model: nn.Module, adapter_names: str | Iterable[str], requires_grad: bool = True) -> None:
    """Let adapters train or not, whatever is active.

    Raises:
        AdapterNameError: No adapter of that name is on the model.
    """
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    _check(model, names, "set_requires_grad")
    if isinstance(model, PeftModel):
        return model.set_requires_grad(names, requires_grad)
    for selection in _selections(model):
        inject.train(model, selection, names, requires_grad)


def known_names(model: nn.Module) -> list[str]:
    """The adapters of a model, in the order in which its layers have them."""
    if isinstance(model, PeftModel):
        return list(model.peft_config)
    held = [layer.adapters for _, layer in inject.adapted_layers(model)]
    held += [copies.modules_to_save for _, copies in inject.trained_copies(model)]
    return list(dict.fromkeys([*(name for names in held for name in names), *shared_modules(model)]))


def _check(model: nn.Module, names: Iterable[str], called: str) -> None:
    known = known_names(model)
    for name in names:
        if name not in known:
            raise AdapterNameError(
                f"{called}: no adapter named {name!r}; there are {known}",
                field="adapter_name",
                found=name,
                expected=known,
            )


def _selections(model: nn.Module) -> list[Selection]:
    held = [layer.selection for _, layer in inject.adapted_layers(model)]
    held += [copies.selection for _, copies in inject.trained_copies(model)]
    return list({id(selection): selection for selection in held}.values())
