"""A cell: one run of one method on one task with one seed, kept as a JSON file so that it is never run twice."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from deltatune.errors import DataError
from deltatune.storage.files import write_files


@dataclass(frozen=True)
class Spec:
    """Everything that decides what a run computes. Any change makes another cell, and the old one is left alone."""

    benchmark: str
    task: str
    method: str
    seed: int
    budget: dict[str, Any]  # rows, steps, batch size, lengths: the same for all methods of a task
    hyper: dict[str, Any]  # the method's own: learning rate, rank, number of virtual tokens
    inputs: dict[str, Any]  # base model and data by their hashes

    @property
    def name(self) -> str:
        """A name for the eye, made unique by a hash over all fields."""
        content = json.dumps(asdict(self), sort_keys=True, ensure_ascii=False)
        return f"{self.task}-{self.method}-seed{self.seed}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"

    def with_hyper(self, **changed: Any) -> Spec:
        return replace(self, hyper={**self.hyper, **changed})


@dataclass(frozen=True)
class Cell:
    """A finished run: what was asked, what came out, and under which conditions."""

    spec: Spec
    result: dict[str, Any]
    conditions: dict[str, Any]  # command, machine, versions, threads, load, date


@dataclass(frozen=True)
class Store:
    """A folder of cells."""

    folder: Path

    def path(self, spec: Spec) -> Path:
        return self.folder / f"{spec.name}.json"

    def get(self, spec: Spec) -> Cell | None:
        """The finished cell, None if it was never run.

        Raises:
            DataError: The file is not what `put` wrote.
        """
        path = self.path(spec)
        if not path.exists():
            return None
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
            cell = Cell(Spec(**held["spec"]), held["result"], held["conditions"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"cell {path} cannot be read ({type(error).__name__}: {error}); delete it, and it will be run again",
                path=str(path),
            ) from error
        if cell.spec != spec:
            raise DataError(
                f"cell {path} was edited: its spec does not belong to its name; delete it, and it will be run again",
                path=str(path),
                field="spec",
                found=held["spec"],
                expected=asdict(spec),
            )
        return cell

    def put(self, cell: Cell) -> Path:
        """Write the file whole or not at all."""
        content = json.dumps(asdict(cell), indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        write_files(self.folder, {self.path(cell.spec).name: content.encode()})
        return self.path(cell.spec)
