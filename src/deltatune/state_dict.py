"""An adapter's tensors under the keys of its file, out of a model and into it."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.copies import TrainedCopies
from deltatune.errors import AdapterNameError, MismatchError
from deltatune.inject import adapted_layers, trained_copies

ROOT = "base_model.model."
Loaded = namedtuple("Loaded", ["missing_keys", "unexpected_keys"])


@dataclass
class Part:
    """The tensors of one module of an adapter: their key prefix in the file, their present values, how to fill them.

    `derived` are those that a file may hold and need not.
    """

    prefix: str
    tensors: dict[str, Tensor]
    fill: Callable[[dict[str, Tensor]], None]
    derived: dict[str, Tensor] = field(default_factory=dict)


def parts(model: nn.Module, name: str) -> list[Part]:
    """All that belongs to one adapter of a bare (perhaps adapted) model."""
    adapters: list[tuple[str, Any]] = [
        (path, layer.adapters[name]) for path, layer in adapted_layers(model) if name in layer.adapters
    ]
    found = [
        Part(f"{path}.", adapter.file_tensors(), adapter.load_file_tensors, adapter.derived_tensors())
        for path, adapter in adapters
    ]
    found = [part for part in found if part.tensors]  # a tied layer's are those of the layer it follows
    found += [
        Part(f"{path}.", copies.modules_to_save[name].state_dict(), _filler(copies, name))
        for path, copies in trained_copies(model)
        if name in copies.modules_to_save
    ]
    return found


def _filler(copies: TrainedCopies, name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: _discard(copies.modules_to_save[name].load_state_dict(tensors))


def _discard(_: Any) -> None:
    return None


def collect(model: nn.Module, name: str, root: str = ROOT) -> dict[str, Tensor]:
    """File key -> tensor of one adapter."""
    found = parts(model, name)
    if not found:
        raise AdapterNameError(f"no adapter named {name!r} on this model", field="adapter_name", found=name)
    return {root + part.prefix + key: tensor for part in found for key, tensor in part.tensors.items()}


def derived(model: nn.Module, name: str, root: str = ROOT) -> dict[str, Tensor]:
    """File key -> tensor of what one adapter has from its base or a seed."""
    return {root + part.prefix + key: tensor for part in parts(model, name) for key, tensor in part.derived.items()}


def translated(model: nn.Module, name: str, tensors: Mapping[str, Tensor], root: str = ROOT) -> dict[str, Tensor]:
    """A file's tensors as the adapters that are to hold them read them (`Adapter.from_file`)."""
    found = dict(tensors)
    for path, layer in adapted_layers(model):
        prefix = f"{root}{path}."
        own = {key.removeprefix(prefix): tensor for key, tensor in found.items() if key.startswith(prefix)}
        if own and name in layer.adapters:
            own = layer.adapters[name].from_file(own)  # type: ignore[operator]
            found = {key: tensor for key, tensor in found.items() if not key.startswith(prefix)}
            found |= {prefix + key: tensor for key, tensor in own.items()}
    return found


def check(
    given: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    source: str,
    strict: bool = True,
    optional: Mapping[str, Tensor] | None = None,
) -> tuple[list[str], list[str]]:
    """Compare a file's tensors with what a model expects; returns missing and surplus keys.

    Args:
        optional: What a file may hold besides.

    Raises:
        MismatchError: Wrong shapes or dtypes, values that are not finite, and (strict) missing or surplus keys.
    """
    known = {**(optional or {}), **expected}
    missing = sorted(expected.keys() - given.keys())
    surplus = sorted(given.keys() - known.keys())
    if strict and (missing or surplus):
        raise MismatchError(
            f"{source} does not fit the adapter: "
            + "; ".join(
                f"{len(keys)} {kind} ({', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''})"
                for kind, keys in (("missing", missing), ("surplus", surplus))
                if keys
            )
            + "; check base model, target_modules and adapter type",
            path=source,
            found=surplus,
            expected=missing,
        )
    for key in given.keys() & known.keys():
        _check_tensor(key, given[key], known[key], source)
    return missing, surplus


def _check_tensor(key: str, given: Tensor, expected: Tensor, source: str) -> None:
    if given.shape != expected.shape:
        raise MismatchError(
            f"{source}: {key} has shape {tuple(given.shape)}, the model expects {tuple(expected.shape)}; "
            "was it made for another base, rank or set of layers?",
            path=source,
            key=key,
            found=tuple(given.shape),
            expected=tuple(expected.shape),
        )
    if given.is_floating_point() != expected.is_floating_point():
        raise MismatchError(f"{source}: {key} is {given.dtype}, expected {expected.dtype}", path=source, key=key)
    check_finite(source, key, given)
    if given.is_floating_point() and expected.dtype == torch.float16:
        largest = given.abs().max().item() if given.numel() else 0.0
        if largest > torch.finfo(torch.float16).max:
            raise MismatchError(f"{source}: {key} reaches {largest:g}, too large for float16", path=source, key=key)


def check_finite(source: str, key: str, given: Tensor) -> None:
    if given.is_floating_point() and not given.isfinite().all():
        count = int((~given.isfinite()).sum())
        raise MismatchError(f"{source}: {key} holds {count} values that are not finite", path=source, key=key)


@torch.no_grad()
def fill(model: nn.Module, name: str, tensors: Mapping[str, Tensor], root: str = ROOT) -> None:
    """Put tensors that `check` has passed into an adapter."""
    for part in parts(model, name):
        keys = {**part.tensors, **part.derived}
        own = {key: tensors[root + part.prefix + key] for key in keys if root + part.prefix + key in tensors}
        if own.keys() >= part.tensors.keys():
            part.fill(own)
        elif own:
            part.fill({**part.tensors, **own})


def without_base_copies(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Drop the copies of base embeddings that PEFT puts into a file when an embedding is targeted.

    Raises:
        MismatchError: Such a copy is not what the base has, so the adapter was made for another embedding.
    """
    from deltatune.storage.fingerprint import base_parameters

    base = {f"{ROOT}{name}": tensor for name, tensor in base_parameters(model)}
    kept = {}
    for key, tensor in tensors.items():
        present = base.get(key.replace(".base_layer.", "."))
        if ".base_layer." not in key or present is None:
            kept[key] = tensor
        elif present.shape != tensor.shape or not torch.equal(present.cpu(), tensor.to(present.dtype).cpu()):
            raise MismatchError(
                f"{source}: {key} is an embedding that differs from this base's; load the base it was saved with",
                path=source,
                key=key,
            )
    return kept
