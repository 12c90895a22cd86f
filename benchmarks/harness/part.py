"""A part of the benchmarks: what it measures, kept as JSON, and the tables and pictures of docs/performance.md.

python benchmarks/PART.py                              everything, best on a quiet machine
python benchmarks/PART.py --only KEYS --rounds 3       some of it, with few rounds
python benchmarks/PART.py --quick                      tiny models and one round, to see that it works
python benchmarks/PART.py --render                     tables and pictures of what is kept already
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deltatune.storage.files import write_files
from harness.data import REPOSITORY
from harness.tables import put_between

Found = dict[str, Any]  # by key, what `Part.measure` returned


@dataclass(frozen=True)
class Part:
    """One script of benchmarks/.

    Attributes:
        name: Of its JSON file.
        about: For the command line.
        rounds: How many are measured unless the command line says otherwise.
        keys: What can be measured alone, in the order of the table.
        measure: A key, the number of rounds and whether it is but a trial (`--quick`) into what is kept under the key;
            None where there is nothing to measure.
        tables: The name of a block of docs/performance.md -> Markdown, of all that is kept.
        pictures: The name of a block -> a matplotlib figure that stands in it, of all that is kept.
        trial: Keys of a trial.
    """

    name: str
    about: str
    rounds: int
    keys: Sequence[str]
    measure: Callable[[str, int, bool], Found | None]
    tables: Callable[[Found], Mapping[str, str]]
    pictures: Callable[[Found], Mapping[str, Any]] = lambda found: {}
    trial: Sequence[str] = ()


@dataclass(frozen=True)
class Places:
    """Where a part keeps what it found."""

    results: Path
    document: Path
    images: Path

    @classmethod
    def below(cls, folder: Path) -> Places:
        """Somewhere else than in the repository, with a copy of its document."""
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / "docs" / "performance.md", folder)
        return cls(folder, folder / "performance.md", folder / "images")


IN_REPOSITORY = Places(
    REPOSITORY / "benchmarks", REPOSITORY / "docs" / "performance.md", REPOSITORY / "docs" / "images"
)


def main(part: Part, arguments: Sequence[str] | None = None) -> None:
    asked = _parser(part).parse_args(arguments)
    settle()
    aside = asked.into or (REPOSITORY / "build" / "benchmarks-quick" if asked.quick else None)
    places = IN_REPOSITORY if aside is None else Places.below(aside)
    file = places.results / f"{part.name}.json"
    kept: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    keys = _keys(part, asked)
    for key in keys:
        load = os.getloadavg()[0]
        found = part.measure(key, asked.rounds or (1 if asked.quick else part.rounds), asked.quick)
        if found is None:
            continue
        kept[key] = {**found, "under": conditions(load)}
        print(f"{part.name}: {key} done", flush=True)
        write_files(file.parent, {file.name: (json.dumps(kept, indent=1, sort_keys=True) + "\n").encode()})
    if kept:
        render(part, {key: kept[key] for key in [*part.keys, *sorted(kept)] if key in kept}, places)


def render(part: Part, kept: Found, places: Places) -> None:
    text, pictures = places.document.read_text(encoding="utf-8"), part.pictures(kept)
    for block, table in part.tables(kept).items():
        content = f"{table}\n\n{measured(kept)}"
        if block in pictures:
            from harness.pictures import save

            save(pictures[block], places.images / f"{block}.png")
            content += f"\n\n![{part.about.splitlines()[0]}](images/{block}.png)"
        text = put_between(text, block, content, places.document.name)
        print(table)
    places.document.write_text(text, encoding="utf-8")


def settle() -> None:
    """One thread, and no word of libraries between the lines of a benchmark."""
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    os.environ["TQDM_DISABLE"] = "1"


def conditions(load: float) -> dict[str, Any]:
    """On what, with what, when, and how busy it was before and after."""
    import peft

    from deltatune.train.conditions import machine

    there = machine()
    return {
        "machine": there["machine"],
        "versions": f"torch {there['torch']}, transformers {there['transformers']}, PEFT {peft.__version__}",
        "cores": os.cpu_count(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "load": [round(load, 1), round(os.getloadavg()[0], 1)],
    }


def measured(kept: Found) -> str:
    """The line under a table: under which conditions its figures were found."""
    under = [found["under"] for found in kept.values() if "under" in found]
    if not under:
        return "Measured before conditions were kept with the figures."
    loads = [load for each in under for load in each["load"]]

    def all_of(name: str) -> str:
        return " and ".join(sorted({str(each[name]) for each in under}))

    dates = sorted({each["date"] for each in under})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    older = f" {len(kept) - len(under)} of {len(kept)} lines are older." if len(under) < len(kept) else ""
    return (
        f"{all_of('machine')}, {all_of('cores')} cores, {all_of('versions')}, {when}, under a load of "
        f"{min(loads)} to {max(loads)}.{older}"
    )


def _keys(part: Part, asked: argparse.Namespace) -> Sequence[str]:
    if asked.render:
        return ()
    keys = asked.only.split(",") if asked.only else part.trial if asked.quick and part.trial else part.keys
    unknown = [key for key in keys if key not in part.keys]
    if unknown:
        raise SystemExit(f"{part.name}: no {', '.join(unknown)} here; there are {', '.join(part.keys)}")
    return keys


def _parser(part: Part) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=part.about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"some of {', '.join(part.keys[:4])}, ..., separated by commas")
    parser.add_argument("--rounds", type=int, help=f"of measurements (default: {part.rounds})")
    parser.add_argument("--quick", "--tiny", action="store_true", help="tiny models, one round, kept apart in build/")
    parser.add_argument("--render", action="store_true", help="measure nothing; tables and pictures of what is kept")
    parser.add_argument("--into", type=Path, help="keep everything in this folder instead of benchmarks/ and docs/")
    return parser
