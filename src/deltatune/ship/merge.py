"""`merge_to_folder`: base and adapter as one plain model in a folder, proven against the two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deltatune import inject
from deltatune.errors import ConfigError, MergeError
from deltatune.generate.load import Ready, load_ready
from deltatune.model import PeftModel
from deltatune.ship.place import carry, new_folder
from deltatune.ship.proof import Proof, Tolerance, compare
from deltatune.ship.record import Record, record
from deltatune.ship.samples import samples
from deltatune.train.base import quiet
from deltatune.train.quantised import field_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ALLOWED = {torch.float32: Tolerance(), torch.bfloat16: Tolerance(2e-2, 5e-2), torch.float16: Tolerance(1e-3, 1e-2)}


@dataclass(frozen=True)
class Made:
    """What was written.

    Attributes:
        dtype: The weights' in the folder.
        proof: None where none was asked for.
        lost: Layer -> share of the update that rounding to the base's precision has cost.
    """

    folder: Path
    dtype: str
    proof: Proof | None
    lost: dict[str, float]


def merge_to_folder(
    adapter: str,
    out: str | Path,
    *,
    model: str | None = None,
    dtype: str | None = None,
    inputs: Sequence[str] = (),
    verify: bool = True,
    tolerance: float | None = None,
) -> Made:
    """Merge an adapter into its base and write the model, with tokenizer and settings, to a new folder.

    The folder is written under another name, loaded again from there and asked the same as base and adapter were; it
    gets its name only if the answers agree.

    Args:
        adapter: Adapter folder or hub repository.
        model: The base, instead of the one that the adapter names.
        dtype: Of the weights in the folder; the base's by default.
        inputs: What both are asked; else samples of the training, or a few sentences.
        tolerance: Largest KL divergence allowed (`Tolerance.kl`); 1e-5 for float32, 0.02 for bfloat16, 0.001 for
            float16 by default, because rounding costs that much.

    Raises:
        ProofError: What was written says something else; the folder is removed.
        MergeError: No weight can hold the method, or the adapter was trained on a base in 4 or 8 bits and no `model`
            is given.
        SaveError: `out` is there already.
    """
    with quiet():
        ready = load_ready(adapter, model)
    if not isinstance(ready.model, PeftModel):
        raise ConfigError(
            f"{adapter} is a model and no adapter; there is nothing to merge", field="adapter", found=adapter
        )
    _refuse_quantised(adapter, ready)
    wanted = _dtype(dtype, ready.model)
    texts = samples(adapter, ready, inputs)
    before = record(ready, texts) if verify else None
    updates = _updates(ready.model) if wanted is not torch.float32 else {}
    merged: Any = ready.model.merge_and_unload(safe_merge=True)
    with new_folder(out) as folder, quiet():
        lost = _rounded(merged, updates, wanted)
        merged.to(wanted).save_pretrained(folder)
        ready.tokenizer.save_pretrained(folder)
        carry(adapter, folder)
        proof = None
        if before is not None:
            proof = compare(before, _again(folder, texts, before), _tolerance(wanted, tolerance))
            proof.require(f"{out}")
    return Made(Path(out), str(wanted).removeprefix("torch."), proof, lost)


def _refuse_quantised(adapter: str, ready: Ready) -> None:
    field = None if ready.settings is None else field_of(ready.settings)
    if field is not None and ready.settings is not None:
        base = ready.settings.model_name_or_path
        raise MergeError(
            f"{adapter} was trained with {field}; merged into rounded weights its update would be rounded away. "
            f"Merge it into the base as it is stored: --model {base} (its answers can differ a little)",
            field=field,
            found=True,
        )


@torch.no_grad()
def _updates(model: PeftModel) -> dict[str, float]:
    """Layer -> the norm of what the adapter changes of its weight."""
    found = {}
    for path, layer in inject.adapted_layers(model.get_base_model()):
        if (held := layer.stored_weight([])).is_floating_point():
            found[path] = (layer.stored_weight(layer.selection.active) - held).float().norm().item()
    return found


@torch.no_grad()
def _rounded(merged: Any, updates: dict[str, float], dtype: torch.dtype) -> dict[str, float]:
    """Layer -> the norm of what rounding takes away, as a share of the update."""
    lost = {}
    for path, update in updates.items():
        weight = merged.get_submodule(path).weight.float()
        if update > 0:
            lost[path] = (weight - weight.to(dtype).float()).norm().item() / update
    return lost


def _again(folder: Path, texts: Sequence[str], before: Record) -> Record:
    return record(load_ready(str(folder)), texts, [said.answer for said in before.said])


def _dtype(name: str | None, model: PeftModel) -> torch.dtype:
    """What was asked for, or what the base's files hold."""
    if name is not None:
        if name not in DTYPES:
            raise ConfigError(f"dtype={name!r}: expected one of {', '.join(DTYPES)}", field="dtype", found=name)
        return DTYPES[name]
    base: Any = model.get_base_model()
    held = base.dtype
    try:  # on a CPU the base was loaded in float32, whatever its files hold
        from transformers import AutoConfig

        held = AutoConfig.from_pretrained(base.config._name_or_path).dtype or held
    except (OSError, ValueError, AttributeError):
        pass  # a base that came from nowhere is kept as it is
    return held if held in ALLOWED else torch.float32


def _tolerance(dtype: torch.dtype, kl: float | None) -> Tolerance:
    usual = ALLOWED[dtype]
    return usual if kl is None else Tolerance(kl, usual.layer)
