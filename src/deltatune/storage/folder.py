"""An adapter's folder: `adapter_config.json`, `adapter_model.safetensors`, a model card. PEFT reads it and writes it.

The safetensors file is the commit point: its header carries the config and what base the adapter was made for, and
`adapter_config.json` is a view for other tools, written first. If a crash fell between the two, the header is right.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deltatune import manners
from deltatune.config import CONFIG_NAME, PEER_VERSION, PeftConfig
from deltatune.errors import FormatError, MismatchError, SaveError
from deltatune.filling import Source
from deltatune.fused.export import PER_EXPERT, config_values
from deltatune.lora.convert import check_start
from deltatune.notice import warn
from deltatune.registry import METHODS
from deltatune.state_dict import derived, replaced
from deltatune.storage.agreement import record, refuse_edits, refuse_unknown
from deltatune.storage.card import CARD_NAME, model_card
from deltatune.storage.derived import checksums
from deltatune.storage.files import write_files, write_folders
from deltatune.storage.fingerprint import difference, fingerprint
from deltatune.storage.keys import mapped
from deltatune.storage.locate import place
from deltatune.storage.options import Saving
from deltatune.storage.tensors import WEIGHTS_NAME, to_bytes
from deltatune.storage.weights import FORMATS, REPLACES, facts_of, file_digest, read_weights
from deltatune.storage.zipped import to_zipped

if TYPE_CHECKING:
    from deltatune.model import PeftModel

EDITABLE = {"base_model_name_or_path", "revision", "inference_mode", "task_type", "auto_mapping", "peft_version"}


@dataclass
class Saved:
    """What a folder holds. The last three are unknown in files of other tools.

    Attributes:
        base: The fingerprint of the base model.
        derived: Checksums of tensors that config and base give again (`deltatune.storage.derived`).
        verified: The tensors agreed with the digest that was saved with them; None: there is none.
        embeddings: Names of the base's modules that are in the file too, because its vocabulary was changed.
    """

    config: PeftConfig
    tensors: dict[str, Tensor]
    base: dict[str, Any] | None
    source: str
    derived: dict[str, list[float]] | None = None
    embeddings: tuple[str, ...] = ()
    verified: bool | None = None

    @property
    def source_kind(self) -> Source:
        return Source.PEER if self.base is None else Source.OWN

    def on(self, device: torch.device) -> Saved:
        """The same with its tensors there."""
        return replace(self, tensors={key: tensor.to(device) for key, tensor in self.tensors.items()})


def save(model: PeftModel, folder: Path, names: list[str], how: Saving) -> None:
    """Write the named adapters; everything is collected before the first file is written."""
    if not names:
        raise SaveError(f"{folder}: no adapter is selected; there are {list(model.peft_config)}", path=str(folder))
    places = {name: folder if name == "default" else folder / name for name in names}
    contents = {name: _files(model, name, how, places[name]) for name in names}
    beside = {
        places[name] / part: _file_pair(
            config.to_file_dict(), tensors, {"base": fingerprint(model.get_base_model(), ())}, WEIGHTS_NAME
        )
        for name in names
        if name in model.prompts
        for part, (config, tensors) in model.prompts[name].folders().items()
    }
    cards = {
        places[name]: {CARD_NAME: model_card(model.peft_config[name], how.tags).encode()}
        for name in names
        if not os.path.exists(places[name] / CARD_NAME)
    }
    if manners.as_peft and folder not in cards and not (folder / CARD_NAME).exists():
        cards[folder] = {CARD_NAME: model_card(model.peft_config[names[0]], how.tags).encode()}
    written = {places[name]: {**cards.pop(places[name], {}), **files} for name, files in contents.items()}
    beside = {**cards, **beside}
    stale = [target / file for target in written for file in FORMATS if file != how.weights]
    write_folders({**beside, **written}, stale)


def write(folder: Path, config: PeftConfig, tensors: dict[str, Tensor], base: nn.Module) -> None:
    """Write an adapter for a bare (perhaps adapted) model on which it need not be."""
    for key, tensor in tensors.items():
        _check_savable(key, tensor, nonfinite=False)
    facts: dict[str, Any] = {"base": fingerprint(base, getattr(config, "modules_to_save", None) or ())}
    values = {**config.to_file_dict(), "peft_version": PEER_VERSION}
    files = _file_pair(values, tensors, {**facts, **_before(folder, values, facts, WEIGHTS_NAME)}, WEIGHTS_NAME)
    card = {} if (folder / CARD_NAME).exists() else {CARD_NAME: model_card(config).encode()}
    write_files(folder, {**card, **files}, stale=[file for file in FORMATS if file != WEIGHTS_NAME])


def _files(model: PeftModel, name: str, how: Saving, target: Path) -> dict[str, bytes]:
    config: Any = model.peft_config[name]
    values = {**_file_dict(model, config), "peft_version": PEER_VERSION}
    if name in model.prompts:
        values |= model.prompts[name].file_config(how.format)
    elif how.format == PER_EXPERT:
        values = config_values(model.get_base_model(), name, values)
    values = {key: value for key, value in values.items() if value is not ...}
    rewrite = METHODS[config.peft_type].for_peers
    own = model.adapter_tensors(name, how.format, () if rewrite is None else None)
    embeddings = model.base_embeddings(name, how.embeddings, own)
    tensors = replaced(model, {**own, **embeddings}, how.state_dict)
    for key, tensor in tensors.items():
        _check_savable(key, tensor, how.nonfinite)
    if how.initial is not None:
        check_start(model, name, how.initial)
    said: dict[str, Any] = {}
    if rewrite is not None:
        plain = how.initial is not None or how.format == "lora"
        values, tensors, said = rewrite(config, values, tensors, model.adapter_tensors(name), plain)
    changed = sorted({_module_of(key) for key in embeddings})
    trained = [*(getattr(config, "modules_to_save", None) or ()), *changed]
    facts: dict[str, Any] = {"base": fingerprint(model.get_base_model(), trained)}
    if changed:
        facts["embeddings"] = changed
    if left_out := checksums(derived(model.get_base_model(), name)):
        facts["derived"] = left_out
    if said:
        facts["own"] = said
    return _file_pair(values, tensors, {**facts, **_before(target, values, facts, how.weights)}, how.weights)


def _module_of(key: str) -> str:
    return key.replace(".base_layer.", ".").split(".")[-2]


def _check_savable(key: str, tensor: Tensor, nonfinite: bool) -> None:
    if tensor.is_meta:
        raise SaveError(
            f"{key} has no numbers yet (low_cpu_mem_usage=True); load or fill the adapter before it is saved", key=key
        )
    if not nonfinite and tensor.is_floating_point() and not tensor.isfinite().all():
        raise SaveError(
            f"{key} holds values that are not finite, so the adapter is broken; what was saved before is untouched. "
            "allow_nonfinite=True saves it all the same",
            key=key,
        )


def _before(target: Path, values: dict[str, Any], facts: dict[str, Any], weights: str) -> dict[str, Any]:
    """What is there already: files of the other format are recorded as replaced, an unlike adapter is warned about."""
    there = [file for file in FORMATS if os.path.isfile(target / file)]  # False, too, for a name that is too long
    others = {file: file_digest(target / file) for file in there if file != weights}
    present = facts_of(target / weights) if weights in there else None
    if present is not None and isinstance(present.get("base"), dict):
        other = difference(present["base"], facts["base"])
        kinds = [(present.get("config") or {}).get("peft_type"), values.get("peft_type")]
        if other is not None:
            warn(f"{target}: a {kinds[0]} adapter for another base ({other}) is replaced by this {kinds[1]} one")
        elif kinds[0] != kinds[1]:
            warn(f"{target}: a {kinds[0]} adapter is replaced by this {kinds[1]} one")
    return {REPLACES: others} if others else {}


def _file_pair(
    values: dict[str, Any], tensors: dict[str, Tensor], facts: dict[str, Any], weights: str
) -> dict[str, bytes]:
    try:
        text = json.dumps(values, indent=2, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        wrong = [key for key, value in values.items() if not _writable(value)]
        raise SaveError(
            f"the config's {', '.join(wrong)} cannot be written as JSON ({error}); nothing was saved",
            field=wrong[0] if wrong else None,
        ) from error
    write = to_bytes if weights == WEIGHTS_NAME else to_zipped
    return {CONFIG_NAME: text.encode(), weights: write(tensors, {**facts, **record(values), "config": values})}


def _writable(value: Any) -> bool:
    try:
        return bool(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError):
        return False


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
    unknown: Collection[str] = (),
    **hub: Any,
) -> Saved:
    """Read and check a folder; nothing outside of the result is touched.

    Args:
        unknown: Fields of a config that we wrote and do not know, which are kept (`allow_unknown`).
    """
    where = place(model_id, subfolder, **hub)
    file = where.find(CONFIG_NAME)
    if file is None:
        raise where.missing(CONFIG_NAME)
    values = PeftConfig.from_json_file(file)
    weights, tensors, facts = read_weights(where)
    if facts is not None and isinstance(facts.get("config"), dict):
        refuse_edits(values, facts["config"], str(file), unknown)
        values = {**_reconciled(values, facts["config"], str(file)), **facts.get("own", {})}
        refuse_unknown(values, facts, str(file), unknown)
    if not values.get("peft_type"):
        raise FormatError(f'{file}: \'peft_type\' is missing, for example "peft_type": "LORA"', path=str(file))
    tensors = mapped(tensors, key_mapping)
    found = config
    if found is None:
        found = PeftConfig.from_file_dict(values, str(file))
        found.located(file.parent)
    facts = facts or {}
    verified = True if facts.get("sha256") else None
    return Saved(found, tensors, facts.get("base"), str(weights), facts.get("derived"), _names(facts), verified)


def _names(facts: dict[str, Any]) -> tuple[str, ...]:
    names = facts.get("embeddings")
    return tuple(str(name) for name in names) if isinstance(names, list) else ()


def _reconciled(view: dict[str, Any], header: dict[str, Any], source: str) -> dict[str, Any]:
    """The header's config, with the user's edits to facts that do not touch the tensors."""
    differing = sorted(key for key in header if key not in EDITABLE and view.get(key) != header[key])
    if differing:
        warn(f"{source}: {differing} differ from what the adapter was saved with; the saved values are used")
    return {**header, **{key: view[key] for key in EDITABLE & view.keys()}}


def warn_other_options(name: str, present: PeftConfig, saved: Saved) -> None:
    """Say that an adapter which gets the tensors of a file keeps its own options."""
    here, there = present.to_file_dict(), saved.config.to_file_dict()
    other = sorted(key for key in here.keys() & there.keys() if key not in EDITABLE and here[key] != there[key])
    if other:
        told = ", ".join(f"{key}={here[key]!r} (the file: {there[key]!r})" for key in other)
        warn(f"{saved.source}: adapter {name!r} keeps the options it has, which differ: {told}; delete it first")


def check_base(saved: Saved, model: nn.Module, allow: bool) -> None:
    """Raise when a file that names its base is loaded onto another."""
    if saved.base is None:
        return
    trained = [*(getattr(saved.config, "modules_to_save", None) or ()), *saved.embeddings]
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
