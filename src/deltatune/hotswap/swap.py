"""`hotswap_adapter`: the tensors, ranks and scalings of another adapter in the place of one that is there.

The new adapter is built and read beside the model, with every check of loading, and compared with the present one. Only
then are the values put in place, all in one go. A swap that is refused has changed nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltatune import inject, targets
from deltatune.adapter import Adapter
from deltatune.combine import naming
from deltatune.config import PeftConfig
from deltatune.errors import AdapterNameError, MismatchError, StateError
from deltatune.gate import Gate
from deltatune.hotswap.compatible import check_hotswap_configs_compatible
from deltatune.hotswap.outline import outline
from deltatune.hotswap.transplant import Step, steps
from deltatune.inject import adapted_layers, trained_copies
from deltatune.registry import METHODS
from deltatune.selection import Selection
from deltatune.shared import shared_modules
from deltatune.state_dict import (
    ROOT,
    TOP,
    check,
    collect,
    derived,
    fill,
    matched,
    parts,
    translated,
    without_base_copies,
)
from deltatune.storage import folder as storage
from deltatune.storage.derived import check_derived

_WHERE = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | Path,
    adapter_name: str,
    torch_device: str | None = None,
    *,
    allow_base_mismatch: bool = False,
    **kwargs: Any,
) -> None:
    """Put the adapter of a folder in the place of one that is loaded, under that one's name.

    Works for every method, compiled or not. Where tensors have equal shapes, or room for them
    (`prepare_model_for_compiled_hotswap`), a compiled model is not compiled again. Layers that the new adapter leaves
    out do nothing afterwards. Passes of a `PeftModel` that are running end with the old adapter and later ones have the
    new one; a model that is compiled as a whole, or has no `PeftModel` around it, must not be called meanwhile.

    Args:
        model: A `PeftModel`, or a model with adapters in it; compiled or not.
        model_name_or_path: Folder or hub repository.
        adapter_name: The adapter to replace.
        torch_device: Accepted; tensors go where those they replace are.
        kwargs: Those of `from_pretrained` that say what is read: `subfolder`, `revision`, `key_mapping`, ...

    Raises:
        PeftError: The folder is damaged, the adapter does not fit, or its method, base or targets are others; the
            present adapter is as it was.
    """
    saved = storage.read(model_name_or_path, **kwargs)
    peft_model, base = _parts(model)
    storage.check_base(saved, base, allow_base_mismatch)
    if peft_model is not None:
        peft_model._known([adapter_name])
        check_hotswap_configs_compatible(peft_model.peft_config[adapter_name], saved.config)
        if adapter_name in peft_model.prompts:
            _swap_prompt(peft_model, adapter_name, saved)
            return
    tensors = matched(without_base_copies(base, saved.tensors, saved.source), collect(base, adapter_name, given=None))
    checksums = None if allow_base_mismatch else saved.derived
    _swap(peft_model, base, adapter_name, saved.config, tensors, saved.source, checksums)


def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    adapter_name: str,
    config: PeftConfig,
    parameter_prefix: str = "lora_",
) -> None:
    """As `hotswap_adapter`, from tensors in memory.

    Args:
        state_dict: Under the keys of a file, or of PEFT's models, which have the adapter's name in them.
        config: That of the new adapter; where it says which layers, the tensors decide.
        parameter_prefix: Accepted; keys are told by the present adapter.
    """
    peft_model, base = _parts(model)
    if peft_model is not None:
        peft_model._known([adapter_name])
        check_hotswap_configs_compatible(peft_model.peft_config[adapter_name], config)
    known = _names_in_models(base, adapter_name)
    tensors = {known.get(_bare(key), key): tensor for key, tensor in state_dict.items()}
    tensors = matched(tensors, collect(base, adapter_name, given=None))
    _swap(peft_model, base, adapter_name, config, tensors, "state dict")


def _parts(model: nn.Module) -> tuple[Any, nn.Module]:
    from deltatune.model import PeftModel

    model = getattr(model, "_orig_mod", model)
    return (model, model.get_base_model()) if isinstance(model, PeftModel) else (None, model)


def _bare(key: str) -> str:
    key = key.removeprefix("_orig_mod.")
    return key.removeprefix(ROOT if key.startswith(ROOT) else TOP)


def _names_in_models(base: nn.Module, name: str) -> dict[str, str]:
    """PEFT's key in a model, without root -> key in a file: the adapter's name stands behind that of its tensor."""
    found = {}
    for part in parts(base, name):
        for tensor in (*part.tensors, *part.derived):
            first, dot, rest = tensor.partition(".")
            found[f"{part.prefix or ''}{first}.{name}{dot}{rest}"] = next(
                iter(part.under(ROOT, {tensor: torch.empty(0)}))
            )
    return found


@torch.inference_mode(False)  # tensors that take the place of others have to train later
def _swap(
    model: Any,
    base: nn.Module,
    name: str,
    config: Any,
    tensors: dict[str, Tensor],
    source: str,
    checksums: dict[str, list[float]] | None = None,
) -> None:
    present = _adapters(base, name)
    _refuse(model, base, name, present)
    bare = outline(base)
    selection = Selection((name,))
    built = copy.copy(config)
    kind: Any = METHODS[config.peft_type].adapter
    paths = [path for path, adapter in present.items() if isinstance(adapter, kind)]
    if METHODS[config.peft_type].shared is not None and config.target_modules is not None:
        _refuse_other_layers(bare, config, kind, paths, source)
    # one adapter on every layer of the present one, each with the options that the config has for it
    places = {field: None for field in _WHERE if hasattr(built, field)}
    vars(built).update(places, target_modules=naming.targets(bare, paths))
    built.modules_to_save = naming.whole(bare, [path for path, _ in _copies(base, name)], config.modules_to_save or ())
    inject.graft(bare, built, name, selection, autocast_adapter_dtype=True)
    _read(bare, name, tensors, source, checksums)
    planned = list(_planned(base, bare, name))
    gate = Gate() if model is None else model.base_model.selection.gate
    with gate.changing(), torch.no_grad():
        for step in planned:
            step()
        if model is not None:
            _keep_config(model, name, config)


def _adapters(base: nn.Module, name: str) -> dict[str, Any]:
    return {path: layer.adapters[name] for path, layer in adapted_layers(base) if name in layer.adapters}


def _copies(base: nn.Module, name: str) -> list[tuple[str, Any]]:
    return [(path, copies) for path, copies in trained_copies(base) if name in copies.modules_to_save]


def _refuse(model: Any, base: nn.Module, name: str, present: dict[str, Adapter]) -> None:
    if not present:
        raise AdapterNameError(f"hot-swap: no adapter named {name!r} on a layer of this model", found=name)
    if any(name in layer.merged_adapters for _, layer in adapted_layers(base)):
        raise StateError(f"adapter {name!r} is merged; call unmerge_adapter() before it is swapped")
    schedule = None if model is None else model.base_model.schedules.get(name)
    if schedule is not None and schedule.trains:
        raise StateError(f"adapter {name!r} is being trained, with a schedule of its own; it cannot be swapped")


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


def _read(bare: nn.Module, name: str, tensors: dict[str, Tensor], source: str, checksums: Any) -> None:
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
    for path, adapter in _adapters(bare, name).items():
        if f"{path}." in unused and not adapter.neutral():
            raise MismatchError(
                f"hot-swap: {source} has nothing for {path}, and a fresh {type(adapter).__name__} is not without "
                f"effect: {adapter.identity_at_birth}",
                path=source,
                key=path,
            )


def _planned(base: nn.Module, bare: nn.Module, name: str) -> list[Step]:
    present, new = _adapters(base, name), _adapters(bare, name)
    if present.keys() != new.keys():
        raise MismatchError(
            f"hot-swap: the new adapter is on other layers: {sorted(present.keys() ^ new.keys())[:5]}",
            found=sorted(new),
            expected=sorted(present),
        )
    pairs: list[tuple[Any, Any]] = [(present[path], new[path]) for path in present]
    for mine, other in pairs:
        if type(mine) is not type(other):
            raise MismatchError(
                f"hot-swap: a {type(other).__name__} cannot take the place of a {type(mine).__name__}",
                found=type(other).__name__,
                expected=type(mine).__name__,
            )
        other.fit(mine)
    mine, other = shared_modules(base).get(name), shared_modules(bare).get(name)
    pairs += [] if mine is None else [(mine, other)]
    copies = dict(_copies(bare, name))
    pairs += [(there.modules_to_save[name], copies[path].modules_to_save[name]) for path, there in _copies(base, name)]
    replaced: dict[int, Tensor] = {}
    return [step for mine, other in pairs for step in steps(mine, other, replaced)]


def _keep_config(model: Any, name: str, config: PeftConfig) -> None:
    """The new options, for the layers that are there."""
    present, kept = model.peft_config[name], copy.copy(config)
    vars(kept).update({field: getattr(present, field) for field in _WHERE if hasattr(present, field)})
    kept.inference_mode = present.inference_mode
    model.peft_config[name] = kept
    if name in model.base_model.schedules:  # a training that begins now begins with the new adapter
        schedules, adapters = model.base_model.schedules, _adapters(model.get_base_model(), name)
        schedules[name] = type(schedules[name])(name, model.peft_config, adapters)


def _swap_prompt(model: Any, name: str, saved: storage.Saved) -> None:
    """Of methods outside of single layers: the tensors, where all options are the same."""
    present, new = model.peft_config[name].to_file_dict(), saved.config.to_file_dict()
    differing = sorted(key for key in present.keys() | new.keys() if present.get(key) != new.get(key))
    differing = [key for key in differing if key not in (*storage.EDITABLE, "init_from")]
    if differing:
        raise MismatchError(
            f"hot-swap: {saved.source} differs from the present adapter in {differing}; load it under another name",
            path=saved.source,
            field=differing[0],
        )
    with model.base_model.selection.gate.changing():
        model._load(name, saved, allow_base_mismatch=True)  # the base has been checked
