"""What many adapters cost beside PEFT's: to inject, to load the n-th, to switch, in memory, and in a mixed batch.

    python benchmarks/adapters.py                      everything, and the tables of docs/performance.md
    python benchmarks/adapters.py --parts rows --rounds 40 --no-write

Loading: LoRA r=8 on all 224 linear layers (256 to 512 wide) of a Llama of 32 layers, whose folder is read and checked
each time. Rows: LoRA r=8 on all linear layers of a Llama of 8 layers of width 512, one token after 32. Candidates take
turns in one process with one thread; what counts is the CPU time of the process, and of it the median of the ratios
within a round.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

import torch
import transformers
from harness.tables import markdown, put_between

DOCUMENT = Path(__file__).parents[1] / "docs" / "performance.md"
RESULTS = Path(__file__).with_name("adapters.json")  # the rows of both tables, under their names in the document
PACKAGES = ("deltatune", "peft")
PARTS = ("inject", "load", "rows")
PEFT_MOST = 64  # adapters; it gets slower with each
BEFORE = 32  # tokens of a row that are in the cache when the next one is decoded
SHAPES: dict[str, dict[str, Any]] = {
    "many": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 32, "vocab_size": 256},
    "wide": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "vocab_size": 4096},
}


def bare(shape: str) -> Any:
    """A Llama with random weights, the same at each call."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPES[shape], num_attention_heads=8, num_key_value_heads=8)
    return transformers.LlamaForCausalLM(config).eval()


def lora(package: str) -> Any:
    library: Any = importlib.import_module(package)
    return library.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)


def adapted(package: str, shape: str, names: tuple[str, ...] = ("a0",)) -> Any:
    library: Any = importlib.import_module(package)
    model = library.get_peft_model(bare(shape), lora(package), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, lora(package))
    return model.eval()


def cpu_seconds(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.1f} ms"


def injection(rounds: int) -> list[list[str]]:
    seconds: dict[str, list[float]] = {package: [] for package in PACKAGES}
    for _ in range(rounds):
        for package in PACKAGES:
            library, base, config = importlib.import_module(package), bare("many"), lora(package)
            gc.collect()
            seconds[package].append(cpu_seconds(partial(library.get_peft_model, base, config)))
    return [["inject into 224 layers", *(milliseconds(min(seconds[package])) for package in PACKAGES)]]


# -------------------------------------------------------------------------------------------------------------- loading


def folder_of(package: str, place: Path) -> str:
    adapted(package, "many", ("default",)).save_pretrained(place / package)
    return str(place / package)


def loads(package: str, folder: str, count: int) -> tuple[Any, list[float], list[int]]:
    """A model with so many adapters, the seconds of each load, and the resident bytes after it."""
    model = adapted(package, "many", ("default",))
    seconds, resident = [], []
    for number in range(count):
        seconds.append(cpu_seconds(partial(model.load_adapter, folder, f"a{number}")))
        resident.append(resident_bytes())
    return model, seconds, resident


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def around(seconds: list[float], number: int) -> str:
    """The n-th load, as the median of it and the four before it; the first alone."""
    return milliseconds(statistics.median(seconds[max(number - 5, 0) : number] if number > 5 else seconds[:1]))


def loading(most: int) -> list[list[str]]:
    counts = {"deltatune": most, "peft": min(most, PEFT_MOST)}
    found = {}
    with tempfile.TemporaryDirectory() as place:
        for package in reversed(PACKAGES):
            folder = folder_of(package, Path(place))
            loads(package, folder, 2)  # what is imported on the way
            gc.collect()
            model, seconds, resident = loads(package, folder, counts[package])
            row = {number: around(seconds, number) for number in (1, 64, 1000) if number <= len(seconds)}
            turns = [cpu_seconds(partial(model.set_adapter, f"a{turn % 2}")) for turn in range(9)]
            grown = (resident[-1] - resident[len(resident) // 10]) / (len(resident) - 1 - len(resident) // 10)
            found[package] = (row, milliseconds(min(turns)), f"{grown / 2**20:.1f} MiB")
            own = sum(Path(folder, name).stat().st_size for name in os.listdir(folder) if name.endswith("safetensors"))
    numbered = [
        [f"load adapter number {number:,}", *(found[package][0].get(number, "") for package in PACKAGES)]
        for number in (1, 64, 1000)
    ]
    of_counts = " / ".join(f"{counts[package]:,}" for package in PACKAGES)
    return [
        *numbered,
        [f"set_adapter among {of_counts}", *(found[package][1] for package in PACKAGES)],
        [f"resident memory per adapter, whose file is {own / 2**20:.1f} MiB", *(found[p][2] for p in PACKAGES)],
    ]


# ----------------------------------------------------------------------------------------------------------------- rows


def step(model: Any, rows: int, **options: Any) -> Callable[[], None]:
    """One token for each row, after those that are in the cache already."""
    ids, cache = torch.ones(rows, 1, dtype=torch.long), transformers.DynamicCache()
    with torch.no_grad():
        model(input_ids=torch.ones(rows, BEFORE, dtype=torch.long), past_key_values=cache, **options)

    def run() -> None:
        with torch.no_grad():
            model(input_ids=ids, past_key_values=cache, **options)
        cache.crop(-1)

    return run


def fixed(model: Any, run: Callable[[], None]) -> Callable[[], None]:
    """The same as within `generate` or `fixed_adapters()`, where nothing is stacked a second time."""
    selection = model.base_model.selection
    call = replace(selection.current(), stacks=WeakKeyDictionary())

    def within() -> None:
        with selection.use(call):
            run()

    return within


def mixed_rows(rounds: int) -> list[list[str]]:
    base, found = bare("wide"), []
    for adapters, rows in ((1, 16), (4, 16), (16, 16), (64, 64)):
        each = [f"a{row % adapters}" for row in range(rows)]
        models = {package: adapted(package, "wide", tuple(f"a{k}" for k in range(adapters))) for package in PACKAGES}
        steps = {"bare": step(base, rows)}
        steps |= {package: step(model, rows, adapter_names=each) for package, model in models.items()}
        steps["fixed"] = fixed(models["deltatune"], steps["deltatune"])
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(-2, rounds):
            for name, run in steps.items():
                spent = cpu_seconds(run)
                if turn >= 0:
                    seconds[name].append(spent)
        ratios = {name: statistics.median(a / b for a, b in zip(seconds[name], seconds["bare"])) for name in steps}
        shown = [f"{ratios[name]:.2f}" for name in ("peft", "deltatune", "fixed")]
        found.append([f"{rows} rows, {adapters} adapters", milliseconds(min(seconds["bare"])), *shown])
        print(*found[-1], sep=" | ", flush=True)
    return found


# -------------------------------------------------------------------------------------------------------------- command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="of decoding steps; of injections a quarter")
    parser.add_argument("--adapters", type=int, default=1000, help="that are loaded at most")
    parser.add_argument("--parts", choices=PARTS, nargs="*", default=PARTS)
    parser.add_argument("--no-write", action="store_true", help="leave docs/performance.md as it is")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    load = os.getloadavg()[0]
    counted = injection(max(asked.rounds // 4, 3)) if "inject" in asked.parts else []
    counted += loading(asked.adapters) if "load" in asked.parts else []
    print(*(" | ".join(row) for row in counted), sep="\n", flush=True)
    rows = mixed_rows(asked.rounds) if "rows" in asked.parts else []
    if asked.no_write:
        return
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    stored |= {name: table for name, table in (("adapters", counted), ("rows", rows)) if table}
    RESULTS.write_text(json.dumps(stored, indent=1) + "\n")
    text, state = (
        DOCUMENT.read_text(),
        f"Under a load of {load:.1f} to {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores.",
    )
    if counted:
        table = markdown(["CPU time", "ours", "PEFT"], counted)
        text = put_between(text, "adapters", f"{table}\n\n{state}", DOCUMENT.name)
    if rows:
        table = markdown(["decoding step", "bare", "PEFT / bare", "ours / bare", "ours, adapters fixed / bare"], rows)
        text = put_between(text, "rows", f"{table}\n\n{state}", DOCUMENT.name)
    DOCUMENT.write_text(text)


if __name__ == "__main__":
    main()
