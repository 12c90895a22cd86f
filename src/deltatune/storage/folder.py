"""An adapter's folder: `adapter_config.json`, `adapter_model.safetensors`, a model card. PEFT reads it and writes it.

The safetensors file is the commit point: its header carries the config and what base the adapter was made for, and
`adapter_config.json` is a view for other tools, written first. If a crash fell between the two, the header is right.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from deltatune.config import CONFIG_NAME, PEER_VERSION, PeftConfig
from deltatune.errors import FormatError, MismatchError
from deltatune.fused.export import PER_EXPERT, config_values
from deltatune.notice import warn
from deltatune.state_dict import derived
from deltatune.storage.card import model_card
from deltatune.storage.derived import checksums
from deltatune.storage.files import write_files
from deltatune.storage.fingerprint import difference, fingerprint
from deltatune.storage.locate import locate
from deltatune.storage.tensors import WEIGHTS_NAME, read_file, refuse_pickle, to_bytes

if TYPE_CHECKING:
    from deltatune.model import PeftModel

EDITABLE = {"base_model_name_or_path", "revision", "inference_mode", "task_type", "auto_mapping", "peft_version"}


@dataclass
class Saved:
    """What a folder holds. The last two are None in files of other tools.

    Attributes:
        base: The fingerprint of the base model.
        derived: Checksums of tensors that config and base give again (`deltatune.storage.derived`).
    """

    config: PeftConfig
    tensors: dict[str, Tensor]
    base: dict[str, Any] | None
    source: str
    derived: dict[str, list[float]] | None = None


def save(model: PeftModel, folder: Path, names: list[str], format: str | None) -> None:
    """Write the named adapters; everything is collected before the first file is written."""
    contents = {name: _files(model, name, format) for name in names}
    places = {name: folder if name == "default" else folder / name for name in names}
    beside = {
        places[name] / part: _file_pair(
            config.to_file_dict(), tensors, {"base": fingerprint(model.get_base_model(), ())}
        )
        for name in names
        if name in model.prompts
        for part, (config, tensors) in model.prompts[name].folders().items()
    }
    for target, files in beside.items():
        write_files(target, files)
    for name, files in contents.items():
        target = places[name]
        card = {} if (target / "README.md").exists() else {"README.md": model_card(model.peft_config[name]).encode()}
        write_files(target, {**card, **files})


def _files(model: PeftModel, name: str, format: str | None) -> dict[str, bytes]:
    config = model.peft_config[name]
    values = {**_file_dict(model, config), "peft_version": PEER_VERSION}
    if name in model.prompts:
        values |= model.prompts[name].file_config(format)
    elif format == PER_EXPERT:
        values = config_values(model.get_base_model(), name, values)
    values = {key: value for key, value in values.items() if value is not ...}
    trained = getattr(config, "modules_to_save", None) or ()
    facts: dict[str, Any] = {"base": fingerprint(model.get_base_model(), trained)}
    if left_out := checksums(derived(model.get_base_model(), name)):
        facts["derived"] = left_out
    return _file_pair(values, model.adapter_tensors(name, format), facts)


def _file_pair(values: dict[str, Any], tensors: dict[str, Tensor], facts: dict[str, Any]) -> dict[str, bytes]:
    text = json.dumps(values, indent=2, sort_keys=True)
    return {CONFIG_NAME: text.encode(), WEIGHTS_NAME: to_bytes(tensors, {**facts, "config": values})}


def _file_dict(model: PeftModel, config: Any) -> dict[str, Any]:
    """The config as PEFT can read it: options its class lacks are resolved into the list of targets."""
    values = config.to_file_dict()
    beyond = {key for key in getattr(config, "beyond_peer", ()) if key in values}
    if any(values[key] is not None for key in beyond):
        from deltatune.targets import find

        values["target_modules"] = sorted(find(model.get_base_model(), config))
    return {key: value for key, value in values.items() if key not in beyond}


def read(
    model_id: str | Path,
    config: PeftConfig | None = None,
    subfolder: str | None = None,
    key_mapping: Mapping[str, str] | None = None,
    **hub: Any,
) -> Saved:
    """Read and check a folder; nothing outside of the result is touched."""
    file = locate(model_id, CONFIG_NAME, subfolder, **hub)
    refuse_pickle(file.parent)
    values = PeftConfig.from_json_file(file)
    weights = locate(model_id, WEIGHTS_NAME, subfolder, **hub)
    tensors, facts = read_file(weights)
    if facts is not None and isinstance(facts.get("config"), dict):
        values = _reconciled(values, facts["config"], str(file))
    if not values.get("peft_type"):
        raise FormatError(f'{file}: \'peft_type\' is missing, for example "peft_type": "LORA"', path=str(file))
    for pattern, replacement in (key_mapping or {}).items():
        tensors = {re.sub(pattern, replacement, key): value for key, value in tensors.items()}
    found = config
    if found is None:
        found = PeftConfig.from_file_dict(values, str(file))
        found.located(file.parent)
    facts = facts or {}
    return Saved(found, tensors, facts.get("base"), str(weights), facts.get("derived"))


def _reconciled(view: dict[str, Any], header: dict[str, Any], source: str) -> dict[str, Any]:
    """The header's config, with the user's edits to facts that do not touch the tensors."""
    differing = sorted(key for key in header if key not in EDITABLE and view.get(key) != header[key])
    if differing:
        warn(f"{source}: {differing} differ from what the adapter was saved with; the saved values are used")
    return {**header, **{key: view[key] for key in EDITABLE & view.keys()}}


def check_base(saved: Saved, model: nn.Module, allow: bool) -> None:
    """Raise when a file that names its base is loaded onto another."""
    if saved.base is None:
        return
    trained = getattr(saved.config, "modules_to_save", None) or ()
    other = difference(saved.base, fingerprint(model, trained))
    if other and not allow:
        raise MismatchError(
            f"{saved.source} was made for another base model: {other}; load that base "
            f"({saved.config.base_model_name_or_path or 'not named in the file'}), or pass allow_base_mismatch=True",
            path=saved.source,
            field="base_model_name_or_path",
            found=fingerprint(model, trained),
            expected=saved.base,
        )
