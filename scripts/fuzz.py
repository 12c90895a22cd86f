"""Mutated adapter folders and configs, each in a process of its own: success or a deltatune error, nothing else.

    python scripts/fuzz.py folders --cases 10000
    python scripts/fuzz.py configs --cases 10000 --first 123 --show     from case 123 on; what each ends in
    python scripts/fuzz.py folders --first 2000 --cases 2000 --record   a portion; its figures for docs/reliability.md

A case is a number, from which everything about it follows. The parent has torch and the models loaded and forks; the
child has a limit of memory, and a limit of time after which it is killed. Whatever is neither a success nor a deltatune
error is kept: under --keep, with its number, what it was and how it ended.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from scripts.fuzzing import configs, folders, page
from scripts.fuzzing.isolated import Limits, Outcome, run

TARGETS: dict[str, Any] = {"folders": folders, "configs": configs}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seconds", type=float, default=2.0, help="limit of one case, of the processor's time")
    parser.add_argument("--megabytes", type=int, default=500, help="limit of one case, beyond what the parent holds")
    parser.add_argument("--keep", type=Path, default=Path("build/fuzz"), help="where bad cases are kept")
    parser.add_argument("--record", action="store_true", help="keep the figures under --keep (scripts/fuzzing/page.py)")
    parser.add_argument("--show", action="store_true", help="print every case")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # a forked child has none of its parent's threads, and would wait for them
    limits = Limits(options.seconds, options.megabytes)
    with tempfile.TemporaryDirectory() as room:
        prepared = TARGETS[options.target].Target(Path(room))
        return _loop(options, prepared, limits)


def _loop(options: argparse.Namespace, target: Any, limits: Limits) -> int:
    started, kinds, bad = time.monotonic(), Counter[str](), 0
    slowest, largest = Outcome("none", "", 0.0, 0), Outcome("none", "", 0.0, 0)
    for number in range(options.first, options.first + options.cases):
        case = target.make(number)
        outcome = run(lambda case=case: target.use(case), limits)
        kinds[outcome.kind] += 1
        slowest = max(slowest, outcome, key=lambda one: one.seconds)
        largest = max(largest, outcome, key=lambda one: one.kilobytes)
        if options.show:
            print(number, case.story, "->", outcome.kind, outcome.text[:200])
        if not outcome.good:
            bad += 1
            _keep(options.keep / options.target, number, case, outcome)
        target.clear(case)
    print(f"{options.cases} {options.target} in {time.monotonic() - started:.0f} s: {bad} bad")
    for kind, count in kinds.most_common():
        print(f"  {count:6}  {kind}")
    if options.record:
        page.record(options.keep, options.target, options.first, options.cases, bad, kinds, slowest, largest)
    print(f"slowest {slowest.seconds:.2f} s ({slowest.kind}); largest {largest.kilobytes // 1024} MB ({largest.kind})")
    return 1 if bad else 0


def _keep(folder: Path, number: int, case: Any, outcome: Outcome) -> None:
    print(f"case {number}: {case.story}: {outcome.kind}: {outcome.text.strip().splitlines()[-1:]}", flush=True)
    place = folder / str(number)
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    facts = {"story": case.story, "kind": outcome.kind, "text": outcome.text, "seconds": outcome.seconds}
    (place / "case.json").write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    sys.exit(main())
