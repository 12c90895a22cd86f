"""The adapter that is to come, built and read on an outline of the model, with every check of loading."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from deltatune import inject, targets
from deltatune.adapter import Adapter
from deltatune.combine import naming
from deltatune.errors import MismatchError
from deltatune.hotswap.outline import outline
from deltatune.inject import adapted_layers, trained_copies
from deltatune.registry import METHODS
from deltatune.selection import Selection
from deltatune.shared import shared_modules
from deltatune.state_dict import ROOT, check, collect, derived, fill, parts, translated
from deltatune.storage.derived import check_derived

WHERE = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")


def adapters_of(base: nn.Module, name: str) -> dict[str, Any]:
    return {path: layer.adapters[name] for path, layer in adapted_layers(base) if name in layer.adapters}


def copies_of(base: nn.Module, name: str) -> list[tuple[str, Any]]:
    return [(path, copies) for path, copies in trained_copies(base) if name in copies.modules_to_save]


def built(base: nn.Module, name: str, config: Any, source: str) -> nn.Module:
    """An outline of the model with a fresh adapter on every layer of the present one.

    Each has the options that the config has for its layer.
    """
    bare, options = outline(base), copy.copy(config)
    kind: Any = METHODS[config.peft_type].adapter
    paths = [path for path, adapter in adapters_of(base, name).items() if isinstance(adapter.core, kind)]
    if METHODS[config.peft_type].shared is not None and config.target_modules is not None:
        _refuse_other_layers(bare, config, kind, paths, source)
    vars(options).update({field: None for field in WHERE if hasattr(options, field)})
    options.target_modules = naming.targets(bare, paths)
    options.modules_to_save = naming.whole(bare, list(dict(copies_of(base, name))), config.modules_to_save or ())
    inject.graft(bare, options, name, Selection((name,)), autocast_adapter_dtype=True)
    return bare


def _refuse_other_layers(bare: nn.Module, config: Any, kind: type[Adapter], paths: list[str], source: str) -> None:
    """Where layers share tensors their files may have nothing for a layer, and so cannot tell which it is for."""
    modules, found = dict(targets.walk(bare)), targets.find(bare, config, kind)
    if {id(module) for module in found.values()} != {id(modules[path]) for path in paths}:
        raise MismatchError(
            f"hot-swap: {source} is for {sorted(found)[:5]}, the present adapter is on {paths[:5]}, and their layers "
            "share tensors; load it under a name of its own",
            path=source,
            field="target_modules",
            found=sorted(found),
            expected=paths,
        )


def read(bare: nn.Module, name: str, tensors: dict[str, Tensor], source: str, checksums: Any) -> None:
    """Fill the new adapter, and make the layers that the tensors leave out do nothing."""
    tensors = translated(bare, name, tensors)
    missing, surplus = check(tensors, collect(bare, name, given=tensors), source, strict=False)
    left_out = [
        part for part in parts(bare, name) if part.tensors and not part.found(ROOT, None).keys() & tensors.keys()
    ]
    partly = set(missing) - {key for part in left_out for key in part.found(ROOT, None)}
    if surplus or partly:
        raise MismatchError(
            f"hot-swap: {source} does not fit the adapter: unexpected {surplus[:5]}, missing {sorted(partly)[:5]}; an "
            "adapter can take the place of one on the same layers or on more; load it under a name of its own",
            path=source,
            found=surplus,
            expected=sorted(partly),
        )
    unread = list(derived(bare, name, tensors))
    if left_out and (unread or name in shared_modules(bare)):
        raise MismatchError(
            f"hot-swap: {source} has nothing for {left_out[0].prefix}, and what its layers share or derive may depend "
            "on which they are; load it under a name of its own",
            path=source,
            key=left_out[0].prefix,
        )
    if checksums is not None:
        check_derived(checksums, iter(unread), source)
    fill(bare, name, tensors)
    _neutralise(bare, name, {part.prefix for part in left_out}, source)


def _neutralise(bare: nn.Module, name: str, unused: set[str | None], source: str) -> None:
    for path, adapter in adapters_of(bare, name).items():
        if f"{path}." in unused and not adapter.neutral():
            raise MismatchError(
                f"hot-swap: {source} has nothing for {path}, and a fresh {type(adapter).__name__} is not without "
                f"effect: {adapter.identity_at_birth}",
                path=source,
                key=path,
            )
