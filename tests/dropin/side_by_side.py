"""Runs programs that say `import peft` under PEFT and under deltatune, and reads what they observe.

A program prints its observations as lines `= name value`, the value as JSON. Programs of one process share its imports,
which are most of the time that they take.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

PROGRAMS = Path(__file__).parent / "programs"
CASES = Path(__file__).parent / "cases"  # modules of functions, each a small program (`observe`)
TOLERANCE = 1e-4  # relative and absolute


def observed(names: tuple[str, ...], ours: bool) -> dict[str, dict[str, Any]]:
    """Program -> name -> value."""
    command = [sys.executable, *(["-m", "deltatune.as_peft"] if ours else []), __file__, *names]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, f"{names} under {'deltatune' if ours else 'PEFT'}:\n{done.stderr[-4000:]}"
    return _read(done.stdout)


def _read(text: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for line in text.splitlines():
        if line.startswith("program "):
            found[line.removeprefix("program ")] = current = {}
        elif line.startswith("= "):
            value, name = _split(line[2:])
            current[name] = value
    return found


def _split(text: str) -> tuple[Any, str]:
    """The name may have spaces; the value is the longest ending that is JSON."""
    words = text.split(" ")
    for count in range(1, len(words)):
        try:
            return json.loads(" ".join(words[count:])), " ".join(words[:count])
        except ValueError:
            continue
    raise ValueError(text)


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Where two observations differ by more than the tolerance, numbers by their size and all else exactly."""
    if isinstance(one, bool) or isinstance(other, bool):
        return [] if one is other else [f"{path}: {one!r} != {other!r}"]
    if not isinstance(one, (int, float, list, dict)):
        return [] if one == other else [f"{path}: {one!r} != {other!r}"]
    if isinstance(one, (int, float)) and isinstance(other, (int, float)):
        return [] if abs(one - other) <= TOLERANCE * (1 + abs(one)) else [f"{path}: {one} != {other}"]
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() == other.keys() == {"raises"} and set(one["raises"]) <= set(other["raises"]):
            return []  # what catches the one catches the other
        one, other = list(map(list, sorted(one.items()))), list(map(list, sorted(other.items())))
    if not isinstance(other, list) or len(one) != len(other):
        return [f"{path}: {one!r} != {other!r}"]
    return [found for i, (a, b) in enumerate(zip(one, other)) for found in differences(a, b, f"{path}[{i}]")]


def main(names: list[str]) -> None:
    import runpy

    sys.path[:0] = [str(Path(__file__).parent), str(CASES)]
    for name in names:
        print(f"program {name}", flush=True)
        if (CASES / f"{name}.py").exists():
            __import__("observe").run(name)
        else:
            runpy.run_path(str(PROGRAMS / f"{name}.py"), run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
