"""Adapters as functions on models of any kind, for programs that bring their own wrapper: PEFT's low-level names."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deltatune import checks, empty, inject, manners
from deltatune.config import A_CONFIG, PeftConfig
from deltatune.errors import ConfigError
from deltatune.helpers.precision import cast_adapter_dtype as cast_adapter_dtype
from deltatune.helpers.verbs import delete_adapter as delete_adapter
from deltatune.helpers.verbs import set_adapter as set_adapter
from deltatune.helpers.verbs import set_requires_grad as set_requires_grad
from deltatune.model import PeftModel
from deltatune.names import check_name
from deltatune.notice import warn
from deltatune.registry import METHODS
from deltatune.selection import Selection
from deltatune.state_dict import ROOT, Loaded, check, collect, fill, fitting, matched, replaced, translated
from deltatune.storage.embeddings import Replacements, saved_embeddings
from deltatune.storage.keys import adjusted


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: dict[str, Tensor] | None = None,
) -> nn.Module:
    """Graft an adapter onto a model of any kind, in place, without a `PeftModel` around it; returns the model.

    The new one is the active one, as in PEFT. The model's `peft_config` holds the configs by name, as programs expect.

    Args:
        state_dict: Tensors under the keys of an adapter's file. The layers they name are adapted, whatever the config
            targets, and start from them.
        low_cpu_mem_usage: The adapter's tensors have no numbers until `set_peft_model_state_dict` gives them some.
    """
    check_name(adapter_name)
    checks.instance("model", model, nn.Module, "the base model, a torch module")
    checks.instance("peft_config", peft_config, PeftConfig, A_CONFIG)
    method = METHODS[peft_config.peft_type]  # type: ignore[index]
    if method.adapter is None:
        raise ConfigError(
            f"inject_adapter_in_model: {method.name.upper()} acts outside of single layers; use get_peft_model",
            field="peft_type",
        )
    present = [layer.selection for _, layer in inject.adapted_layers(model)]
    selection = present[0] if present else Selection()
    with torch.inference_mode(False), inject.unchanged_on_error(model):
        with empty.without_numbers(low_cpu_mem_usage):
            _graft(model, peft_config, adapter_name, selection, state_dict)
        try:
            if state_dict is not None:
                set_peft_model_state_dict(model, state_dict, adapter_name)
        except BaseException:
            inject.remove(model, adapter_name)
            raise
        if not present:
            inject.freeze(model)
        selection.active = (adapter_name,)
        if not manners.as_peft:
            inject.train(model, selection, selection.trained - {adapter_name}, False)
        inject.train(model, selection, [adapter_name], not peft_config.inference_mode)
    _configs(model)[adapter_name] = peft_config
    return model


def _graft(
    model: nn.Module, config: Any, name: str, selection: Selection, state_dict: Mapping[str, Tensor] | None
) -> None:
    if state_dict is None:
        inject.graft(model, config, name, selection)
        return
    prefix = METHODS[config.peft_type].key_prefix
    named = {key.removeprefix(ROOT).partition(f".{prefix}")[0] for key in state_dict if f".{prefix}" in key}
    narrowed = copy.copy(config)
    narrowed.target_modules = sorted(path for path, _ in inject.targets.walk(model) if path in named) or ["nothing"]
    inject.graft(model, narrowed, name, selection)


def _configs(model: Any) -> dict[str, PeftConfig]:
    """The configs by adapter name that a model without a `PeftModel` around it carries."""
    if not isinstance(vars(model).get("peft_config"), dict):
        model.peft_config = {}
    return model.peft_config


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, Tensor]:
    """The tensors of one adapter under the keys of its file, without adapter names.

    Args:
        state_dict: Values to use instead of the model's own, under the model's keys (gathered from shards, say).
        save_embedding_layers: Also the base's embeddings; "auto": if its vocabulary was changed, as far as the files of
            the base on this machine tell.
    """
    model = getattr(model, "_orig_mod", model)
    own = _tensors(model, adapter_name)
    wrapped = _peft_model(model)
    if wrapped is not None:
        own |= wrapped.base_embeddings(adapter_name, save_embedding_layers, own)
    elif save_embedding_layers is True:
        own |= saved_embeddings(model, None, True, own, "")
    return replaced(model, own, state_dict)


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> Any:
    """Fill an adapter from tensors under the keys of its file; keys with and without `base_model.model.` are taken.

    Returns the missing and the unexpected keys, and warns of them; shapes must fit unless told otherwise.
    """
    checks.instance("peft_model_state_dict", peft_model_state_dict, Mapping, "the tensors of an adapter by key")
    model = getattr(model, "_orig_mod", model)
    wrapped = _peft_model(model)
    bare, root = (wrapped.base_model.model, wrapped.root_of(adapter_name)) if wrapped else (model, "")
    known = _tensors(model, adapter_name, None)
    given = adjusted(bare, matched(peft_model_state_dict, known), known)
    given = translated(bare, adapter_name, given, root)
    expected = _tensors(model, adapter_name, given)
    config = wrapped.peft_config[adapter_name] if wrapped else None
    base = Replacements(bare, config, given, expected, "auto", "state dict", root, refuse=False)
    given = base.rest
    if ignore_mismatched_sizes:
        given = fitting(given, expected, "state dict")
    missing, surplus = check(given, expected, "state dict", strict=False)
    if missing or surplus:
        warn(f"adapter {adapter_name!r}: missing {missing[:5]}, unexpected {surplus[:5]}")
    empty.give_room(bare, adapter_name, missing)
    if wrapped:
        wrapped.fill_adapter(adapter_name, given)
    else:
        fill(model, adapter_name, given, root="")
    base.put()
    if manners.as_peft:
        missing = _unfilled(model, adapter_name, given, peft_model_state_dict)
    return Loaded(missing, surplus)


def _unfilled(model: nn.Module, name: str, given: Mapping[str, Tensor], keys: Collection[str]) -> list[str]:
    """The names in a live model of all tensors that were not given."""
    now = _tensors(model, name, given)
    filled = {id(now[key]) for key in given if key in now}
    live = model.state_dict(keep_vars=True)
    return [key for key, tensor in live.items() if id(tensor) not in filled and key not in keys]


def _tensors(model: nn.Module, name: str, given: Collection[str] | None = ()) -> dict[str, Tensor]:
    wrapped = _peft_model(model)
    if wrapped is None:
        return collect(model, name, root="", given=given)
    return wrapped.adapter_tensors(name, given=given)


def _peft_model(model: nn.Module) -> PeftModel | None:
    return model if isinstance(model, PeftModel) else None
