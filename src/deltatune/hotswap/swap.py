"""`hotswap_adapter`: the tensors, ranks and scalings of another adapter in the place of one that is there.

The new adapter is built and read beside the model, with every check of loading, and compared with the present one. Only
then are the values put in place, all in one go. A swap that is refused has changed nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.config import PeftConfig
from deltatune.errors import AdapterNameError, MismatchError, StateError
from deltatune.gate import Gate
from deltatune.hotswap.compatible import check_hotswap_configs_compatible
from deltatune.hotswap.incoming import WHERE, adapters_of, built, copies_of, read
from deltatune.hotswap.transplant import Step, steps
from deltatune.inject import adapted_layers
from deltatune.loading import load
from deltatune.shared import shared_modules
from deltatune.state_dict import (
    ROOT,
    TOP,
    collect,
    matched,
    parts,
)
from deltatune.storage import folder as storage
from deltatune.storage.embeddings import Replacements
from deltatune.storage.keys import adjusted
from deltatune.storage.options import Allowed, loading
from deltatune.storage.weights import checked_device


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | Path,
    adapter_name: str,
    torch_device: str | None = None,
    *,
    key_mapping: dict[str, str] | None = None,
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
        torch_device: Where the tensors are read to (None: the CPU) and checked; they go where those they replace are.
        kwargs: Those of `from_pretrained` that say what is read: `subfolder`, `revision`, ...

    Raises:
        PeftError: The folder is damaged, the adapter does not fit, or its method, base or targets are others; the
            present adapter is as it was.
    """
    device = checked_device(torch_device or "cpu")
    allowed, hub = loading(allow_base_mismatch, kwargs)
    saved = storage.read(model_name_or_path, key_mapping=key_mapping, **hub).on(device)
    peft_model, base = _parts(model)
    storage.check_base(saved, base, allow_base_mismatch)
    if peft_model is not None:
        peft_model._known([adapter_name])
        check_hotswap_configs_compatible(peft_model.peft_config[adapter_name], saved.config)
        if adapter_name in peft_model.prompts:
            _swap_prompt(peft_model, adapter_name, saved, allowed)
            return
    known = collect(base, adapter_name, given=None)
    tensors = adjusted(base, matched(saved.tensors, known), known)
    tensors = Replacements(base, saved.config, tensors, known, False, saved.source).rest
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
    gate = Gate() if model is None else model.base_model.selection.gate
    with gate.preparing():
        _refuse(model, base, name)
        bare = built(base, name, config, source)
        read(bare, name, tensors, source, checksums)
        planned = _planned(base, bare, name)
        with gate.changing([name]), torch.no_grad():
            for step in planned:
                step()
            if model is not None:
                _keep_config(model, name, config)


def _refuse(model: Any, base: nn.Module, name: str) -> None:
    if not adapters_of(base, name):
        raise AdapterNameError(f"hot-swap: no adapter named {name!r} on a layer of this model", found=name)
    if any(name in layer.merged_adapters for _, layer in adapted_layers(base)):
        raise StateError(
            f"adapter {name!r} is merged; call unmerge_adapter() before it is swapped",
            field="adapter_name",
            found=name,
            expected="unmerged",
            hint="call unmerge_adapter()",
        )
    schedule = None if model is None else model.base_model.schedules.get(name)
    if schedule is not None and schedule.trains:
        raise StateError(
            f"adapter {name!r} is being trained, with a schedule of its own; it cannot be swapped",
            field="adapter_name",
            found=name,
            expected="an adapter without a schedule",
        )


def _planned(base: nn.Module, bare: nn.Module, name: str) -> list[Step]:
    present, new = adapters_of(base, name), adapters_of(bare, name)
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
    copies = dict(copies_of(bare, name))
    pairs += [
        (there.modules_to_save[name], copies[path].modules_to_save[name]) for path, there in copies_of(base, name)
    ]
    replaced: dict[int, Tensor] = {}
    return [step for mine, other in pairs for step in steps(mine, other, replaced)]


def _keep_config(model: Any, name: str, config: PeftConfig) -> None:
    """The new options, for the layers that are there."""
    present, kept = model.peft_config[name], copy.copy(config)
    vars(kept).update({field: getattr(present, field) for field in WHERE if hasattr(present, field)})
    kept.inference_mode = present.inference_mode
    model.peft_config[name] = kept
    if name in model.base_model.schedules:  # a training that begins now begins with the new adapter
        schedules, adapters = model.base_model.schedules, adapters_of(model.get_base_model(), name)
        schedules[name] = type(schedules[name])(name, model.peft_config, adapters)


def _swap_prompt(model: Any, name: str, saved: storage.Saved, allowed: Allowed) -> None:
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
    gate = model.base_model.selection.gate
    with gate.preparing(), gate.changing([name]):
        load(model, name, saved, replace(allowed, base_mismatch=True))  # the base has been checked
