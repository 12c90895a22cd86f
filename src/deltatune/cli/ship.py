"""`deltatune merge`, `convert`, `export`: what is deployed, and the proof that it does what the adapter does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from deltatune.cli.generate import rows_of
from deltatune.cli.show import console, facts, quiet_libraries
from deltatune.errors import ConfigError
from deltatune.ship.proof import Proof

WORST = 5  # layers that are shown


@dataclass(frozen=True)
class Asked:
    """What the three verbs share.

    Attributes:
        inputs: What both sides are asked; or `file` and `column` of a data file.
    """

    model: str | None = None
    inputs: Sequence[str] = ()
    file: str | None = None
    column: str | None = None
    verify: bool = True
    tolerance: float | None = None
    as_json: bool = False

    def arguments(self) -> dict[str, Any]:
        if self.inputs and self.file is not None:
            raise ConfigError("inputs are given with --input and with --file; keep one", field="file", found=self.file)
        texts = list(self.inputs) or (list(rows_of(self.file, self.column)) if self.file else [])
        return {"model": self.model, "inputs": texts, "verify": self.verify, "tolerance": self.tolerance}


def merge(adapter: str, out: str, dtype: str | None, asked: Asked) -> None:
    from deltatune.ship import merge_to_folder

    quiet_libraries()
    made = merge_to_folder(adapter, out, dtype=dtype, **asked.arguments())
    lost = sorted(made.lost.items(), key=lambda item: -item[1])
    rounding = [
        ("lost to rounding", f"{share:.1%} of the update at {path}") for path, share in lost[:1] if share > 1e-3
    ]
    _show(made, [("model", made.folder), ("weights", made.dtype), *rounding], made.proof, asked)


def convert(adapter: str, out: str, to: str, rank: str | None, max_error: float | None, asked: Asked) -> None:
    from deltatune.ship import convert_adapter

    if to != "lora":
        raise ConfigError(f"to={to!r}: adapters are converted to lora; `deltatune export` has other forms", field="to")
    arguments = asked.arguments()
    quiet_libraries()
    made = convert_adapter(adapter, out, rank=_rank(rank), max_error=max_error, **arguments)
    ranks = sorted(set(made.ranks.values()))
    worst = sorted(made.errors.items(), key=lambda item: -item[1])[:WORST]
    lines: list[tuple[str, Any]] = [("adapter", made.folder), ("rank", ", ".join(map(str, ranks)))]
    lines += [("error", f"{error:.2g} of the change at {path}") for path, error in worst if error > 1e-6]
    _show(made, lines, made.proof, asked)


def export(adapter: str, out: str, to: str, asked: Asked) -> None:
    from deltatune.ship import export_adapter

    quiet_libraries()
    made = export_adapter(adapter, out, to, **asked.arguments())
    _show(made, [("folder", made.folder), ("files", ", ".join(made.files)), ("use", made.use)], made.proof, asked)


def _rank(text: str | None) -> int | float | None:
    """An integer, a share in (0, 1], or auto: what the error needs."""
    if text is None or text == "auto":
        return None
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise ConfigError(
            f"rank={text!r}: expected a number of directions, a share of energy such as 0.99, or auto",
            field="rank",
            found=text,
        ) from None


def _show(made: Any, lines: list[tuple[str, Any]], proof: Proof | None, asked: Asked) -> None:
    if asked.as_json:
        print(json.dumps(asdict(made), indent=2, default=str))
        return
    console().print(facts([*lines, *_told(proof)]))


def _told(proof: Proof | None) -> list[tuple[str, Any]]:
    if proof is None:
        return [("proof", "none was asked for")]
    same, answers = proof.answers
    told = [
        ("proof", f"{proof.samples} inputs, {proof.positions} positions: prompts and special tokens are the same"),
        ("KL divergence", f"at most {proof.kl:.2g} (allowed {proof.tolerance.kl:g})"),
        ("logits", f"differ by at most {proof.difference:.2g}"),
    ]
    return [*told, ("greedy answers", f"{same} of {answers} are the same")] if answers else told
