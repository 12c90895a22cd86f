"""Do the tests have teeth? Plants one fault after another into the methods and sees whether a test falls.

python scripts/mutants.py                 every mutant; exit code 1 if one survives
python scripts/mutants.py lora hra        those of some methods
python scripts/mutants.py --list          what there is

Each runs on a copy of the package: first the method's own tests, then the laws, up to the first test that falls.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from planted import MUTANTS, Mutant

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "deltatune"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", help="names of methods; none: all")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    parser.add_argument("--list", action="store_true", help="show the mutants, run nothing")
    asked = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if not asked.methods or mutant.method in asked.methods]
    if asked.list:
        print(*(f"{mutant.method:24} {mutant.fault}" for mutant in chosen), sep="\n")
        return 0
    with ThreadPoolExecutor(asked.jobs) as pool:
        survived = [mutant for mutant, killer in zip(chosen, pool.map(tried, chosen)) if killer is None]
    print(f"{len(chosen) - len(survived)} of {len(chosen)} mutants killed")
    for mutant in survived:
        print(f"survived: {mutant.method}: {mutant.fault}")
    return int(bool(survived))


def tried(mutant: Mutant) -> str | None:
    """The test that notices the mutant, or None."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "deltatune"
        shutil.copytree(PACKAGE, source, ignore=shutil.ignore_patterns("__pycache__"))
        planted = source / mutant.file
        planted.write_text(mutant.into(planted.read_text()))
        killer = fallen(mutant.method, folder)
    print(f"{time.monotonic() - begun:5.0f} s  {mutant.method:24} {mutant.fault:48} {killer or 'SURVIVED'}", flush=True)
    return killer


def fallen(method: str, source: str) -> str | None:
    environment = {
        **os.environ,
        "PYTHONPATH": source,
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "DELTATUNE_LAW_METHODS": f"{method} lora",
    }
    own = ROOT / "tests" / "methods" / f"test_{method}.py"
    laws = [
        str(ROOT / "tests" / "laws"),
        "--ignore",
        str(ROOT / "tests" / "laws" / "test_prompt_laws.py"),
        "-k",
        method,
    ]
    for what in ([str(own)] if own.exists() else [], laws):
        if not what:
            continue
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *what]
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if run.returncode not in (0, 1):  # neither passed nor failed: the run itself is broken
            if re.search(r"^ERROR ", run.stdout, re.MULTILINE):
                return "does not start"
            raise RuntimeError(run.stdout + run.stderr)
        if found := re.search(r"^FAILED (\S+)", run.stdout, re.MULTILINE):
            return found[1]
    return None


if __name__ == "__main__":
    sys.exit(main())
