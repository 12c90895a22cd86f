"""What importing costs beyond torch, beside PEFT's, each time in a fresh process.

    python benchmarks/startup.py                    and write startup.json
    python benchmarks/startup.py --rounds 3 --no-write

Processes take turns, and what counts is the CPU time of each, less that of one that imports torch alone. "Names" is
what a program writes at its top. PEFT loads transformers, which most programs load anyway: "beside transformers" leaves
it out on both sides. Bytecode is kept for all of them, as an installer leaves it, in a folder of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

RESULTS = Path(__file__).with_name("startup.json")
NAMES = "LoraConfig, PeftModel, get_peft_model"
MODEL = "from transformers import AutoModelForCausalLM"
CASES = {
    "torch": "import torch",
    "torch and transformers": f"import torch; {MODEL}",
    "import deltatune": "import torch, deltatune",
    "import peft": "import torch, peft",
    "names of deltatune": f"import torch; from deltatune import {NAMES}",
    "names of peft": f"import torch; from peft import {NAMES}",
    "names of deltatune beside transformers": f"import torch; {MODEL}; from deltatune import {NAMES}",
    "names of peft beside transformers": f"import torch; {MODEL}; from peft import {NAMES}",
}


def cpu_seconds(code: str, bytecode: str) -> float:
    """Of a process that does nothing else."""
    told = f"{code}; import time; print(time.process_time())"
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    kept["PYTHONPYCACHEPREFIX"] = bytecode
    run = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True, env=kept)
    return float(run.stdout.split()[-1])


def measure(rounds: int) -> dict[str, dict[str, float]]:
    spent: dict[str, list[float]] = {name: [] for name in CASES}
    with TemporaryDirectory() as bytecode:
        for turn in range(-1, rounds):  # the first round, which compiles and fills caches of files, goes unmeasured
            for name, code in CASES.items():
                took = cpu_seconds(code, bytecode)
                if turn >= 0:
                    spent[name].append(took)
    found = {}
    for name in list(CASES)[2:]:
        below = "torch and transformers" if name.endswith("transformers") else "torch"
        beyond = [a - b for a, b in zip(spent[name], spent[below])]
        found[name] = {"best": min(spent[name]) - min(spent[below]), "median": statistics.median(beyond)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--no-write", action="store_true", help="leave startup.json as it is")
    asked = parser.parse_args()
    found = measure(asked.rounds)
    for name, seconds in found.items():
        print(f"{name} | best {seconds['best']:.3f} s | median {seconds['median']:.3f} s beyond")
    if not asked.no_write:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
