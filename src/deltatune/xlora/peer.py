"""What PEFT 0.21.2 leaves in the folder of an X-LoRA adapter, and how its classifier is made whole again.

PEFT leaves out of a file what is called like another adapter, and experts are called "0", "1" and so on: the
classifier's file lacks `layers.0`. The file of expert "0" has it, as `layers`: its own name is cut out of the keys.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from deltatune.errors import FormatError
from deltatune.storage.tensors import WEIGHTS_NAME

CLASSIFIER = "base_model.internal_xlora_classifier."
_DUMP = (CLASSIFIER, "base_model.lora_model.")


@dataclass
class Found:
    """What stands beside a classifier: experts that are adapters, and files that hold pieces of the classifier."""

    experts: dict[str, str] = field(default_factory=dict)
    pieces: dict[str, Path] = field(default_factory=dict)


def look(folder: Path, names: Iterable[str]) -> Found:
    from safetensors import SafetensorError, safe_open

    found = Found()
    for name in names:
        file = folder / name / WEIGHTS_NAME
        if not file.is_file():
            continue
        try:
            with safe_open(file, "pt") as opened:
                keys = list(opened.keys())
        except (SafetensorError, OSError) as error:
            raise FormatError(f"{file}: cannot be read: {error}", path=str(file)) from error
        if any(key.startswith(_DUMP) for key in keys):
            found.pieces[name] = file
        else:
            found.experts[name] = str(file.parent)
    return found


def completed(tensors: dict[str, Tensor], missing: Iterable[str], pieces: dict[str, Path]) -> dict[str, Tensor]:
    """The tensors with those that are missing, as far as the pieces hold them."""
    from safetensors import safe_open

    found = dict(tensors)
    for key in missing:
        number, _, part = key.removeprefix(f"{CLASSIFIER}layers.").partition(".")
        if number in pieces:
            with safe_open(pieces[number], "pt") as opened:
                cut = f"{CLASSIFIER}layers.{part}"
                if cut in set(opened.keys()):
                    found[key] = opened.get_tensor(cut)
    return found
