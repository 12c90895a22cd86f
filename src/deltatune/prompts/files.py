"""A prefix in files.

native: `prefix_embeddings`, a name that makes PEFT raise KeyError, for it would compute other numbers from it;
peft:   `prompt_embeddings`, PEFT's name and numbers.

Both hold the folded prefix (P, width). A projected encoder stands beside it, as `prefix_encoder.*`, so that training
can go on; PEFT ignores it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deltatune.errors import ConfigError, MismatchError

if TYPE_CHECKING:
    from deltatune.prompts.key_values import Prefix

NAMES = {"native": "prefix_embeddings", "peft": "prompt_embeddings"}
ENCODER = "prefix_encoder."
OURS = ("layout", "sites", "site_names", "site_shapes")  # config fields that PEFT does not know


def tensors(prefix: Prefix, format: str | None = None) -> dict[str, Tensor]:
    """The tensors of a file; raises TargetError where the prefix cannot be said in `format`."""
    target = _checked(prefix, format)
    with torch.no_grad():
        rows = prefix.encoder().detach()
    if target != prefix.config.layout:
        from deltatune.prompts.convert import convert

        return {NAMES[target]: convert(prefix, rows, target)}
    found = {NAMES[target]: rows.clone().contiguous()}
    if prefix.encoder.transform is not None:
        found |= {ENCODER + name: tensor.detach() for name, tensor in prefix.encoder.state_dict().items()}
    return found


def config_entries(prefix: Prefix, format: str | None = None) -> dict[str, Any]:
    """Entries of `adapter_config.json` that differ from the config's own; `...` stands for "leave it out"."""
    return dict.fromkeys(OURS, ...) if _checked(prefix, format) == "peft" else {"layout": "native"}


def load(prefix: Prefix, found: dict[str, Tensor]) -> None:
    """Check names, shapes and values of a file's tensors, then take them."""
    layout = prefix.config.layout
    rest = dict(found)
    rows = rest.pop(NAMES[layout], None)
    other = NAMES["peft" if layout == "native" else "native"]
    if rows is None:
        raise MismatchError(
            f"adapter {prefix.name!r} has layout={layout!r} and needs the tensor {NAMES[layout]!r}, but the file holds "
            f"{sorted(found)}" + (f"; {other!r} belongs to the other layout" if other in found else ""),
            key=NAMES[layout],
            found=sorted(found),
            expected=NAMES[layout],
        )
    encoder = prefix.encoder
    expected_rows = (prefix.config.length, sum(encoder.part_sizes))
    _check_shape(prefix, NAMES[layout], rows, expected_rows)
    own = {name: rest.pop(ENCODER + name) for name in list(encoder.state_dict()) if ENCODER + name in rest}
    if rest:
        raise MismatchError(
            f"adapter {prefix.name!r}: the file holds tensors that it does not have: {sorted(rest)}", found=sorted(rest)
        )
    if encoder.transform is None or not own:
        encoder.fill(rows)
        return
    state = encoder.state_dict()
    missing = sorted(ENCODER + name for name in state.keys() - own.keys())
    if missing:
        raise MismatchError(f"adapter {prefix.name!r}: the file lacks {missing}", key=missing[0], expected=missing)
    for name, tensor in own.items():
        _check_shape(prefix, ENCODER + name, tensor, tuple(state[name].shape))
    encoder.load_state_dict(own)


def _check_shape(prefix: Prefix, key: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise MismatchError(
            f"adapter {prefix.name!r}: {key} has shape {tuple(tensor.shape)} in the file, this model needs {expected}; "
            "the file was made for another base or another number of virtual tokens",
            key=key,
            found=tuple(tensor.shape),
            expected=expected,
        )


def _checked(prefix: Prefix, format: str | None) -> str:
    if format is not None and format not in NAMES:
        raise ConfigError(
            f"format={format!r} is not known, expected one of {', '.join(map(repr, NAMES))}",
            field="format",
            found=format,
            expected=list(NAMES),
        )
    return format or prefix.config.layout
