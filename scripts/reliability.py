"""Put the same faults to deltatune and to PEFT, each in a child of its own, and judge what becomes of them.

    python scripts/reliability.py                   the table of docs/reliability.md
    python scripts/reliability.py --write           into that page

clear: an exception whose message holds the words fixed for the case; obscure: any other; handled: right without one;
warned: wrong, and a warning names it; silent: wrong without a word; lost: good data destroyed;
hang: over twenty seconds.
"""

from __future__ import annotations

import argparse
import importlib
import os
import select
import signal
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import scripts.faultcases_run  # noqa: F401  (which registers its cases)
from scripts.faultcases import FAULTS, HANDLED, Fault

ROOT = Path(__file__).parents[1]
LIBRARIES = ("deltatune", "peft")
VERDICTS = ("clear", "handled", "obscure", "warned", "silent", "lost", "hang")
PAGE, BEGIN, END = ROOT / "docs" / "reliability.md", "<!-- table -->\n", "<!-- end of table -->\n"
SECONDS = 20.0


def judged(fault: Fault, lib: Any) -> str:
    """The verdict on one case."""
    with warnings.catch_warnings(record=True) as told, tempfile.TemporaryDirectory() as room:
        warnings.simplefilter("always")
        try:
            result = fault.put(lib, Path(room))
        except Exception as error:
            named = (
                fault.words
                and all(word in str(error) for word in fault.words)
                and type(error) not in (KeyError, AttributeError)
            )
            return "clear" if named else "obscure"
        if result == HANDLED:
            return HANDLED
        if result.startswith("lost"):
            return "lost"
        return "warned" if any(all(word in str(one.message) for word in fault.words) for one in told) else "silent"


def in_child(fault: Fault, lib: Any) -> str:
    """The same, where it cannot hang or take the process with it."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            os.write(writing, judged(fault, lib).encode())
        finally:
            os._exit(0)
    os.close(writing)
    ready, _, _ = select.select([reading], [], [], SECONDS)
    verdict = os.read(reading, 100).decode() if ready else "hang"
    if not ready:
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reading)
    return verdict or "obscure"


def table(found: dict[str, dict[str, str]]) -> str:
    """Markdown: the sums, then every case."""
    lines = ["| | " + " | ".join(VERDICTS) + " |", "|---|" + "---|" * len(VERDICTS)]
    for name in LIBRARIES:
        counts = Counter(verdicts[name] for verdicts in found.values())
        lines.append(f"| {name} | " + " | ".join(str(counts[verdict]) for verdict in VERDICTS) + " |")
    lines += ["", "| row | fault | " + " | ".join(LIBRARIES) + " |", "|---|---|" + "---|" * len(LIBRARIES)]
    for fault in FAULTS:
        verdicts = found[f"{fault.row} {fault.name}"]
        said = fault.name.replace("|", "\\|")
        lines.append(f"| {fault.row} | {said} | " + " | ".join(verdicts[name] for name in LIBRARIES) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/reliability.md")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a forked child has none of its parent's threads, and would wait for them
    libraries = {name: importlib.import_module(name) for name in LIBRARIES}
    found = {
        f"{fault.row} {fault.name}": {name: in_child(fault, lib) for name, lib in libraries.items()} for fault in FAULTS
    }
    text = table(found)
    print(text)
    if options.write:
        page = PAGE.read_text(encoding="utf-8")
        head, tail = page.split(BEGIN)[0], page.split(END)[1]
        PAGE.write_text(head + BEGIN + text + END + tail, encoding="utf-8")
    bad = {"silent", "lost", "hang"} & {verdicts["deltatune"] for verdicts in found.values()}
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
