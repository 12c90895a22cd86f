"""Configs of files that we wrote: strict, as nobody else has a reason to put anything else there.

A field that is unknown was mistyped by hand, or comes from a newer version and may change what the adapter does.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Collection
from typing import Any

from deltatune.config import PeftConfig, config_class
from deltatune.errors import ConfigError, FormatError
from deltatune.suggest import did_you_mean

VERSION, KEPT = "version", "unknown"  # facts: who wrote the file; fields of other programs that it keeps


def record(values: dict[str, Any]) -> dict[str, Any]:
    """What the header says of the version and of fields that were unknown already when it was written."""
    from deltatune import __version__

    unknown = sorted(values.keys() - _known(values)) if values.get("peft_type") else []
    return {VERSION: __version__, **({KEPT: unknown} if unknown else {})}


def refuse_edits(view: dict[str, Any], header: dict[str, Any], source: str, allowed: Collection[str]) -> None:
    """Refuse a config that was edited into what is none; what else differs from the header is of no effect.

    Raises:
        ConfigError: A field that was not saved and is unknown, a wrong type or a value out of range.
        FormatError: No method is named.
    """
    if all(view.get(key) == value for key, value in header.items()) and len(view) == len(header):
        return
    if not view.get("peft_type"):
        raise FormatError(
            f"{source}: 'peft_type' is missing, the adapter was saved with {header.get('peft_type')!r}", path=source
        )
    known = _known(view, source)
    for key in sorted(view.keys() - header.keys() - known - set(allowed)):
        raise ConfigError(
            f"{source}: {config_class(view['peft_type']).__name__} has no field {key!r}"
            f"{did_you_mean(key, known)}; correct or remove it, or pass allow_unknown=[{key!r}]",
            field=key,
            path=source,
            found=view[key],
            expected=sorted(known),
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is only checked: what is used instead will be told
        PeftConfig.from_file_dict(view, source)


def refuse_unknown(values: dict[str, Any], facts: dict[str, Any], source: str, allowed: Collection[str]) -> None:
    """Refuse fields that a newer version of deltatune has saved.

    Raises:
        ConfigError: It names the field and both versions.
    """
    from deltatune import __version__

    kept = facts.get(KEPT)
    if VERSION not in facts or not values.get("peft_type"):
        return
    known = _known(values, source) | set(kept if isinstance(kept, list) else ()) | set(allowed)
    for key in sorted(values.keys() - known):
        raise ConfigError(
            f"{source}: field {key!r} is unknown to deltatune {__version__}, the adapter was saved by deltatune "
            f"{facts[VERSION]}; upgrade, or pass allow_unknown=[{key!r}] to load it without what the field asks for",
            field=key,
            path=source,
            found=values[key],
            expected=__version__,
        )


def _known(values: dict[str, Any], source: str = "config") -> set[str]:
    target = config_class(values["peft_type"], source)
    return {field.name for field in dataclasses.fields(target)} | set(target.retired) | set(target.unsaved)
