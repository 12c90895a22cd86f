"""The table of all methods says what the code does now."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_table_of_methods_is_current():
    run = subprocess.run(
        [sys.executable, "benchmarks/methods_table.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
