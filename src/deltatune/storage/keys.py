"""Keys of a file whose base names its layers in another way: the user's mapping, and those that transformers knows."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from deltatune.errors import ConfigError, MismatchError

_ROOTS = ("base_model.model.", "base_model.")


def once_each(renames: Iterable[tuple[str, str, Tensor]]) -> dict[str, Tensor]:
    """Tensors under new keys, out of old key, new key and tensor.

    Raises:
        MismatchError: Two have become one; nothing says which of them is meant.
    """
    found: dict[str, Tensor] = {}
    came: dict[str, str] = {}
    for old, new, tensor in renames:
        if new in found:
            raise MismatchError(
                f"the tensors {came[new]} and {old} are both {new} of the model; remove the one that is not meant",
                key=new,
                found=[came[new], old],
                expected=new,
            )
        found[new], came[new] = tensor, old
    return found


def mapped(tensors: Mapping[str, Tensor], mapping: Mapping[str, str] | None) -> dict[str, Tensor]:
    """Keys without their root, renamed by the first regular expression that is found in them, with their root again."""
    if not mapping:
        return dict(tensors)
    return once_each((key, _renamed(key, mapping), tensor) for key, tensor in tensors.items())


def _renamed(key: str, mapping: Mapping[str, str]) -> str:
    root, bare = _parts(key)
    for pattern, replacement in mapping.items():
        try:
            new, count = re.subn(pattern, replacement, bare)
        except re.error as error:
            raise ConfigError(
                f"key_mapping: {pattern!r} -> {replacement!r} cannot be used as a regular expression: {error}",
                field="key_mapping",
                found=pattern,
            ) from error
        if count:
            return root + new
    return key


def _parts(key: str) -> tuple[str, str]:
    root = next((root for root in _ROOTS if key.startswith(root)), "")
    return root, key.removeprefix(root)


def adjusted(model: nn.Module, tensors: dict[str, Tensor], known: Collection[str]) -> dict[str, Tensor]:
    """Tensors of which those under unknown keys are renamed as transformers renames those of the base's old files.

    A vision-language model's layers, for example, have moved from `language_model.model.` to `model.language_model.`.
    Only renames that lead to a known key are made.
    """
    unknown = {key: tensor for key, tensor in tensors.items() if key not in known}
    if not unknown:
        return tensors
    conversions = _renamings(model)
    renames = {key: _by_transformers(model, conversions, key, known) for key in unknown}
    return once_each((key, renames.get(key, key), tensor) for key, tensor in tensors.items())


def _by_transformers(model: nn.Module, conversions: list[Any], key: str, known: Collection[str]) -> str:
    root, bare = _parts(key)
    old: Mapping[str, str] = getattr(model, "_checkpoint_conversion_mapping", None) or {}
    for candidate in (_renamed(key, old), root + _converted(conversions, bare)):
        if candidate in known:
            return candidate
    return key


def _converted(conversions: list[Any], key: str) -> str:
    for conversion in conversions:
        key = conversion.rename_source_key(key)[0]
    return key


def _renamings(model: nn.Module) -> list[Any]:
    """The table of transformers 5 for this model; only its renames, as its fusions are no renames."""
    if "transformers" not in sys.modules:
        return []
    import transformers

    if not isinstance(model, transformers.PreTrainedModel):
        return []
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    conversions: list[Any] = get_model_conversion_mapping(model, add_legacy=False)
    return [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
