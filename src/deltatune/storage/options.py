"""What callers may ask of loading and saving: each option checked, sorted to whom it concerns, none lost in silence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from deltatune.errors import ConfigError
from deltatune.notice import warn
from deltatune.storage.embeddings import Option
from deltatune.storage.hub import OPTIONS
from deltatune.storage.tensors import WEIGHTS_NAME
from deltatune.storage.weights import ZIPPED_NAME

# Concern the base, which is loaded already, or ask for what happens anyway.
_INERT = {"device_map", "max_memory", "offload_folder", "offload_dir", "offload_index", "use_safetensors", "dtype"}
_INERT |= {"torch_dtype", "trust_remote_code", "max_shard_size", "save_function", "save_peft_format", "variant"}


@dataclass(frozen=True)
class Allowed:
    """What a file may differ in from the model.

    Attributes:
        base_mismatch: It was made for another base.
        embeddings: It may replace the base's embeddings; "auto": where the base's vocabulary was changed here too.
        mismatched_sizes: Tensors of other sizes are left out.
        nonfinite: It may hold NaN and infinities.
        unknown: Fields of its config that this version does not know.
    """

    base_mismatch: bool = False
    embeddings: Option = "auto"
    mismatched_sizes: bool = False
    nonfinite: bool = False
    unknown: tuple[str, ...] = ()


STRICT = Allowed()


def loading(base_mismatch: bool, given: dict[str, Any]) -> tuple[Allowed, dict[str, Any]]:
    """What is allowed, and what concerns the hub, of the arguments that have no parameter of their own."""
    rest = dict(given)
    allowed = Allowed(
        base_mismatch,
        rest.pop("load_embedding_layers", "auto"),
        rest.pop("ignore_mismatched_sizes", False),
        rest.pop("allow_nonfinite", False),
        tuple(rest.pop("allow_unknown", None) or ()),
    )
    hub = {key: rest.pop(key) for key in list(rest) if key in OPTIONS or key == "subfolder"}
    _warn_unknown("loading an adapter", rest)
    return allowed, hub


@dataclass(frozen=True)
class Saving:
    """How adapters are written.

    Attributes:
        weights: Name of the file of tensors, and with it its format.
        embeddings: Whether the base's embeddings go with them.
        initial: Folder of the adapter as it was before training, for the conversion to LoRA on the unchanged base.
        format: "peft" or None: the adapter's own.
        state_dict: Values to use instead of the model's own.
        nonfinite: NaN and infinities may be saved.
        tags: Of the model card.
    """

    weights: str = WEIGHTS_NAME
    embeddings: Option = "auto"
    initial: str | None = None
    format: str | None = None
    state_dict: Mapping[str, Tensor] | None = None
    nonfinite: bool = False
    tags: tuple[str, ...] = ()


def saving(safe: bool, embeddings: Option, initial: str | None, format: str | None, given: dict[str, Any]) -> Saving:
    rest = dict(given)
    state_dict, tags = rest.pop("state_dict", None), tuple(rest.pop("card_tags", ()))
    nonfinite = rest.pop("allow_nonfinite", False)
    if state_dict is not None and not isinstance(state_dict, Mapping):
        raise ConfigError("save_pretrained: state_dict is no mapping of names to tensors", field="state_dict")
    _warn_unknown("save_pretrained", rest)
    weights = WEIGHTS_NAME if safe else ZIPPED_NAME
    return Saving(weights, embeddings, initial, format, state_dict, nonfinite, tags)


def other_formats(safe: bool) -> list[str]:
    """The files of tensors that a save in one format makes stale."""
    return [ZIPPED_NAME if safe else WEIGHTS_NAME]


def _warn_unknown(what: str, given: dict[str, Any]) -> None:
    unknown = sorted(key for key in given if key not in _INERT)
    if unknown:
        warn(f"{what}: {unknown} are no options of it, and have no effect")
