"""All measurements of speed and memory, one part after the other, each in a process of its own.

    make bench                                everything: some hours on a quiet machine
    make bench-step  (-methods, -sweep, ...)  one part; or python benchmarks/step.py, which has options
    python benchmarks/bench.py --list         the parts, and what each measures
    python benchmarks/bench.py --quick        each part in its smallest form, nothing is written: does it work?

Every part writes its tables between markers of docs/performance.md, its pictures into docs/images, and what they are
made from into a JSON file beside the scripts. A part that fails does not keep the others from running.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Script:
    """A part: what it measures, about how many minutes of a quiet core it takes, its smallest form."""

    about: str
    minutes: int
    quick: tuple[str, ...] = ("--quick",)

    def there(self, name: str) -> bool:
        return (FOLDER / f"{name}.py").exists()


PARTS: dict[str, Script] = {
    "step": Script(
        "LoRA's step beside the floor: plain, dropout, DoRA, bfloat16",
        4,
        ("--only", "bfloat16", "--rounds", "1", "--no-write"),
    ),
    "methods": Script("every method: injection, step beside the floor in float32 and bfloat16, file", 12),
    "sweep": Script("LoRA's step as rows, tokens and rank grow", 15),
    "memory": Script(
        "bytes kept for backward, peak of a step", 10, ("--only", "bfloat16", "--rounds", "1", "--no-write")
    ),
    "inference": Script("every method: first token, each further token, merged", 20),
    "decode": Script("one adapter and mixed rows: decoding steps", 5),
    "adapters": Script(
        "1,000 adapters: loading, switching, mixed rows", 10, ("--parts", "inject", "--rounds", "1", "--no-write")
    ),
    "growth": Script("an adapter's life as layers and adapters grow", 12),
    "startup": Script("what importing costs", 3),
    "prefix_cost": Script(
        "prefix tuning: step, generation, memory",
        15,
        ("--only", "gpt2", "--parts", "generate", "--rounds", "1", "--no-write"),
    ),
    "experts": Script("LoRA on experts in one parameter: prints the table of docs/experts.md", 2),
    "gpu": Script("LoRA on a GPU, 1B and 8B; skipped where there is none", 15),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: how many parts failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="parts, separated by commas")
    parser.add_argument("--quick", action="store_true", help="the smallest form of each; nothing is written")
    parser.add_argument("--list", action="store_true", help="what there is; runs nothing")
    asked = parser.parse_args(arguments)
    chosen = asked.only.split(",") if asked.only else list(PARTS)
    unknown = [name for name in chosen if name not in PARTS]
    if unknown:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    there = [name for name in chosen if PARTS[name].there(name)]
    if asked.list:
        print(*(f"{name:12} {PARTS[name].minutes:3} min  {PARTS[name].about}" for name in there), sep="\n")
        return 0
    failed = [name for name in there if not run(name, PARTS[name].quick if asked.quick else ())]
    print(
        f"{len(there) - len(failed)} of {len(there)} parts done" + (f"; failed: {', '.join(failed)}" if failed else "")
    )
    return len(failed)


def run(name: str, options: Sequence[str]) -> bool:
    if name == "gpu" and not options and not _has_gpu():
        print("gpu: no CUDA device here, skipped", flush=True)
        return True
    print(f"{name}: {PARTS[name].about}", flush=True)
    begun = time.monotonic()
    done = subprocess.run([sys.executable, str(FOLDER / f"{name}.py"), *options], check=False).returncode == 0
    print(f"{name}: {'done' if done else 'FAILED'} in {(time.monotonic() - begun) / 60:.1f} min", flush=True)
    return done


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
