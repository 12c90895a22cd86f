"""`convert_adapter`: an adapter of any method that a weight can hold, as LoRA in a folder, proven against itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deltatune.combine.convert import save_as_lora
from deltatune.errors import ConfigError
from deltatune.generate.load import Ready, load_ready
from deltatune.model import PeftModel
from deltatune.ship.place import carry, new_folder
from deltatune.ship.proof import Proof, Tolerance, compare
from deltatune.ship.record import Record, record
from deltatune.ship.samples import samples
from deltatune.train.base import quiet

ERROR = 1e-5  # of a layer's change, where neither rank nor error is asked for
LOSSY = 1e-2  # KL divergence, where a rank was
CUT = 5e-2  # share of a layer's output


@dataclass(frozen=True)
class Converted:
    """What was written.

    Attributes:
        errors: Layer -> |B A - (W' - W)| / |W' - W|.
        ranks: Layer -> rank.
    """

    folder: Path
    proof: Proof | None
    errors: dict[str, float]
    ranks: dict[str, int]


def convert_adapter(
    adapter: str,
    out: str | Path,
    *,
    model: str | None = None,
    rank: int | float | None = None,
    max_error: float | None = None,
    inputs: Sequence[str] = (),
    verify: bool = True,
    tolerance: float | None = None,
) -> Converted:
    """Write an adapter as plain LoRA with scaling one.

    Args:
        rank: As in `convert_to_lora`: an int, or the share of the squared singular values that is kept.
        max_error: The lowest ranks whose relative error is at most this; 1e-5 where no rank is given.
        tolerance: Largest KL divergence allowed; 0.01 by default where the rank was given, else 1e-5.

    Raises:
        ConversionError: No weight can hold the method.
        ProofError: What was written says something else than the adapter; the folder is removed.
    """
    ready = load_adapted(adapter, model)
    texts = samples(adapter, ready, inputs)
    before = record(ready, texts) if verify else None
    error = ERROR if rank is None and max_error is None else max_error
    # where ranks are cut every layer differs a little: only one that differs much is at fault
    usual = Tolerance() if rank is None and max_error is None else Tolerance(LOSSY, CUT)
    with new_folder(out) as folder:
        errors = save_as_lora(folder, ready.model, rank, max_error=error)
        carry(adapter, folder)
        ready.tokenizer.save_pretrained(folder)
        proof = prove(
            folder,
            texts,
            before,
            usual if tolerance is None else Tolerance(tolerance, usual.layer),
            model,
            ready,
            str(out),
        )
        ranks = _ranks(folder)
    return Converted(Path(out), proof, errors, ranks)


def load_adapted(adapter: str, model: str | None) -> Ready:
    """Base and adapter, ready to answer.

    Raises:
        ConfigError: It is no adapter.
    """
    with quiet():
        ready = load_ready(adapter, model)
    if not isinstance(ready.model, PeftModel):
        raise ConfigError(f"{adapter} is a model and no adapter", field="adapter", found=adapter)
    return ready


def prove(
    folder: Path,
    texts: Sequence[str],
    before: Record | None,
    tolerance: Tolerance,
    model: str | None,
    ready: Ready,
    name: str,
) -> Proof | None:
    """The adapter in `folder`, loaded anew on its base, against what was recorded before."""
    if before is None:
        return None
    with quiet():
        again = load_ready(str(folder), model or _base_of(ready))
    proof = compare(before, record(again, texts, [said.answer for said in before.said]), tolerance)
    proof.require(name)
    return proof


def _base_of(ready: Ready) -> str | None:
    """The base by name, where the new config does not name it."""
    assert isinstance(ready.model, PeftModel)
    return ready.model.active_peft_config.base_model_name_or_path or None


def _ranks(folder: Path) -> dict[str, int]:
    from deltatune.inspect import inspect_adapter

    return {layer.layer: layer.rank for layer in inspect_adapter(folder).spectra}
