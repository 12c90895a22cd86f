"""Several prefixes as one: their virtual tokens side by side, which is what both do when they are active together.

Attention sees a set of keys, so the order of prefixes has no meaning, and a composition of two equals `set_adapter` of
both. (Section 5 of https://arxiv.org/abs/2506.06266 composes cartridges of several documents like this.)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltatune.config import CONFIG_NAME, PEER_VERSION, PeftType
from deltatune.errors import ConfigError, MismatchError
from deltatune.prompts.config import KeyValueConfig
from deltatune.prompts.files import NAMES, OURS
from deltatune.prompts.starts import named_prefix
from deltatune.storage import folder as storage
from deltatune.storage.card import model_card
from deltatune.storage.files import write_files
from deltatune.storage.fingerprint import difference
from deltatune.storage.tensors import WEIGHTS_NAME, to_bytes

_ALIKE = (
    *("peft_type", "task_type", "layout", "token_dim", "num_layers", "num_attention_heads"),
    *("num_transformer_submodules", "site_names", "site_shapes"),
)


def compose_prefixes(model: Any, adapter_names: Sequence[str], new_name: str) -> None:
    """Add to a PeftModel one prefix that holds the virtual tokens of several, in order. Those stay as they are.

    Args:
        adapter_names: Prefixes or cartridges of one method, layout and choice of sites.

    Raises:
        MismatchError: They differ in what a composition has only once.
    """
    parts = [named_prefix(model, name, "compose_prefixes") for name in adapter_names]
    config = _joined([part.config for part in parts], list(adapter_names))
    rows = torch.cat([part.encoder().detach() for part in parts])
    model.add_adapter(new_name, config)
    model.prefixes[new_name].encoder.fill(rows)


def compose_prefix_folders(adapter_paths: Sequence[str | Path], *, output_path: str | Path) -> None:
    """The same for saved adapters: reads their folders, writes one.

    Raises:
        MismatchError: They differ in what a composition has only once, were made for different bases, or hold modules
            trained beside the prefix, of which a composition would need one.
    """
    saved = [storage.read(path) for path in adapter_paths]
    names = [str(path) for path in adapter_paths]
    config = _joined([one.config for one in saved], names)
    values = {**config.to_file_dict(), "peft_version": PEER_VERSION}
    if config.layout == "peft":
        values = {key: value for key, value in values.items() if key not in OURS}
    rows = torch.cat([_rows(one, name) for one, name in zip(saved, names)])
    bases = [one.base for one in saved if one.base is not None]
    for base in bases[1:]:
        other = difference(bases[0], base)
        if other is not None:
            raise MismatchError(f"{names} were made for different base models: {other}", found=names)
    facts = {"config": values, "base": bases[0] if bases else None}
    files = {
        "README.md": model_card(config).encode(),
        CONFIG_NAME: json.dumps(values, indent=2, sort_keys=True).encode(),
        WEIGHTS_NAME: to_bytes({NAMES[config.layout]: rows}, facts),
    }
    write_files(Path(output_path), files)


def compose_cartridge_adapters(
    adapter_paths: Sequence[str | Path], *, output_path: str | Path, safe_serialization: bool = True
) -> None:
    """PEFT's name for `compose_prefix_folders`, for cartridges only. The first one's frozen tokens stay frozen."""
    if not safe_serialization:
        raise ConfigError(
            "compose_cartridge_adapters: safe_serialization=False would write a pickle; adapters are safetensors",
            field="safe_serialization",
        )
    for path in adapter_paths:
        found = storage.read(path).config
        if found.peft_type is not PeftType.CARTRIDGE:
            raise ConfigError(
                f"compose_cartridge_adapters: {path} is no cartridge but {found.peft_type}; use compose_prefix_folders",
                field="peft_type",
                found=found.peft_type,
                expected=PeftType.CARTRIDGE,
            )
    compose_prefix_folders(adapter_paths, output_path=output_path)


def _joined(configs: list[Any], names: list[str]) -> Any:
    """The first config with the virtual tokens of all."""
    if len(configs) < 2:
        raise ConfigError(f"a composition needs two adapters or more, got {names}", found=names)
    for config, name in zip(configs, names):
        if not isinstance(config, KeyValueConfig):
            raise ConfigError(f"{name} holds no keys and values, but {type(config).__name__}", found=name)
        for field in _ALIKE:
            if getattr(config, field) != getattr(configs[0], field):
                raise MismatchError(
                    f"{name} cannot be composed with {names[0]}: {field} is {getattr(config, field)!r}, there "
                    f"{getattr(configs[0], field)!r}",
                    field=field,
                    found=getattr(config, field),
                    expected=getattr(configs[0], field),
                )
        if config.modules_to_save:
            raise MismatchError(
                f"{name} trains {config.modules_to_save} beside its prefix, of which a composition would need one",
                field="modules_to_save",
                found=config.modules_to_save,
            )
    values = dict(vars(configs[0]), num_virtual_tokens=sum(config.length for config in configs))
    values.pop("unknown_fields", None)
    values |= dict.fromkeys(configs[0].unsaved)  # how the first one started
    if "prefix_projection" in values:
        values["prefix_projection"] = False  # rows are joined, not what made them
    return type(configs[0])(**values)


def _rows(saved: storage.Saved, name: str) -> Tensor:
    config: Any = saved.config
    rows = saved.tensors.get(NAMES[config.layout])
    if rows is None or rows.shape[0] != config.length:
        raise MismatchError(
            f"{name}: the file holds {sorted(saved.tensors)}, expected {NAMES[config.layout]!r} with "
            f"{config.length} rows",
            key=NAMES[config.layout],
            found=sorted(saved.tensors),
        )
    return rows
