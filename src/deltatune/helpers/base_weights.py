"""The weights of the base model under its own keys, while adapters are grafted onto it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deltatune.copies import TrainedCopies
from deltatune.errors import MismatchError, StateError
from deltatune.helpers.bare import bare
from deltatune.inject import adapted_layers
from deltatune.layer import AdaptedLayer
from deltatune.shared import SharedModules


class IncompatibleKeys(NamedTuple):
    missing_keys: list[str]
    unexpected_keys: list[str]


def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The base model's state dict as if no adapter were there; of merged layers the weights that were there before."""
    inner = bare(model)
    stored = inner.state_dict()
    for _, layer in adapted_layers(inner):
        if layer.stash is not None:
            weight, bias = layer.as_map().keeps
            stored.update(_before(inner, layer, {weight: layer.stash.weight, bias: layer.stash.bias}))
    return {own: stored[key] for own, key in _keys(inner).items()}


def set_base_model_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True) -> Any:
    """Fill the base model, under its adapters, from a state dict with its own keys.

    Returns:
        `missing_keys` and `unexpected_keys`.

    Raises:
        MismatchError: A shape does not fit, or with `strict` a key is missing or unexpected. Nothing has changed then.
        StateError: Adapters are merged, so that there is no base to be filled.
    """
    inner = bare(model)
    if any(layer.merged for _, layer in adapted_layers(inner)):
        raise StateError(
            "set_base_model_state_dict: adapters are merged; call unmerge_adapter() first",
            field="adapters",
            found="merged",
            expected="unmerged",
            hint="call unmerge_adapter()",
        )
    keys, present = _keys(inner), inner.state_dict()
    missing = [own for own in keys if own not in state_dict]
    unexpected = [own for own in state_dict if own not in keys]
    if strict and (missing or unexpected):
        raise MismatchError(
            f"set_base_model_state_dict: {len(missing)} keys are missing ({', '.join(missing[:3])}), {len(unexpected)} "
            f"unexpected ({', '.join(unexpected[:3])}); strict=False fills what there is",
            key=(missing + unexpected)[0],
        )
    given = {keys[own]: value for own, value in state_dict.items() if own in keys}
    for key, value in given.items():
        if isinstance(present[key], Tensor) and present[key].shape != value.shape:
            raise MismatchError(
                f"set_base_model_state_dict: {key} is {tuple(present[key].shape)} here and {tuple(value.shape)} in "
                "the state dict",
                key=key,
                found=tuple(value.shape),
                expected=tuple(present[key].shape),
            )
    inner.load_state_dict(given, strict=False)
    return IncompatibleKeys(missing, unexpected)


def _keys(inner: nn.Module) -> dict[str, str]:
    """Key without adapters -> key of the adapted model."""
    found = {key: _own_key(inner, key) for key in inner.state_dict()}
    return {own: key for key, own in found.items() if own is not None}


def _own_key(inner: nn.Module, key: str) -> str | None:
    """The key without what wrappers add to it; None for what is not the base's."""
    kept: list[str] = []
    module: nn.Module | None = inner
    for part in key.split("."):
        child = None if module is None else module._modules.get(part)
        if isinstance(child, SharedModules):
            return None
        wrapped = isinstance(module, (AdaptedLayer, TrainedCopies))
        if wrapped and part not in ("base_layer", "original_module"):
            return None
        if not wrapped:
            kept.append(part)
        module = child
    return ".".join(kept)


def _before(inner: nn.Module, layer: AdaptedLayer, tensors: dict[str, Any]) -> dict[str, Tensor]:
    places = [path for path, module in inner.named_modules(remove_duplicate=False) if module is layer.base_layer]
    return {
        f"{place}.{name}": tensor.detach()
        for place in places
        for name, tensor in tensors.items()
        if isinstance(tensor, torch.Tensor)
    }
