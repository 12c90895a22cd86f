"""Every method beside PEFT's and beside the frozen floor: time to inject it, time of a training step, size of its file.

    python benchmarks/methods.py                        all methods, the table and the picture of docs/performance.md
    python benchmarks/methods.py --only lora,vera --rounds 3

A Llama of 4 layers of width 256 with random weights, all linear layers adapted, 4 rows of 64 tokens, in float32 and in
bfloat16. Both packages get the same config: the defaults of the method, with block sizes that fit the width. They take
turns in one process with one thread; what counts is process CPU time, and of it the median of the ratios within a
round. The floor is defined in harness/floor.py. Every method is measured beside our LoRA too: that column is what it
costs.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1")

import torch
from harness import configs
from harness.alone import as_if_alone
from harness.floor import floor, step
from harness.llama import PACKAGES, ids_of
from harness.part import Found, Part, main
from harness.tables import markdown
from harness.timing import beside, cpu_seconds, in_turns, milliseconds, ratio, turns, with_spread

ROWS, TOKENS = 4, 64
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COLUMNS = (
    *("method", "inject, ours", "PEFT", "step, ours / floor", "PEFT / floor", "ours / PEFT"),
    *("bfloat16, ours / floor", "PEFT / floor", "ours / PEFT", "step / LoRA's", "file / trained"),
)


def measure(name: str, rounds: int, quick: bool) -> Found:
    shape = "tiny" if quick else "narrow"
    with tempfile.TemporaryDirectory() as place:
        found = {dtype: steps(name, shape, dtype, rounds, Path(place)) for dtype in DTYPES}
        build = partial(injection, name, shape, place=Path(place))
        injected = in_turns({package: partial(build, package) for package in _packages(name)}, rounds)
        model = configs.build("deltatune", name, configs.base(name, shape), Path(place))
    return {**found, "inject": beside(injected, "deltatune"), "file": file_share(model)}


def steps(name: str, shape: str, dtype: str, rounds: int, place: Path) -> Found:
    """A training step of each package, of LoRA and of the frozen model, in turns; the reason where one cannot train."""
    ids, given = ids_of(ROWS, TOKENS), configs.options(name, ROWS)
    base = partial(configs.base, name, shape, DTYPES[dtype])
    candidates: dict[str, Any] = {"floor": partial(floor, base().train(), ids)}
    candidates["lora"] = partial(step, configs.build("deltatune", "lora", base(), place).train(), ids)
    unable = {}
    for package in _packages(name):
        try:
            with as_if_alone(package):
                run = partial(step, configs.build(package, name, base(), place).train(), ids, **given)
                run()
        except Exception as error:  # whatever a package runs into in that precision
            unable[package] = f"{type(error).__name__}: {error}"[:200]
        else:
            candidates[package] = run
    spent = turns(candidates, rounds, within=lambda which: as_if_alone("deltatune" if which == "lora" else which))
    found = {**beside(spent, "floor"), "unable": unable}
    if "deltatune" in spent:
        found["ours / lora"] = ratio(spent, "deltatune", "lora")
    if "peft" in spent and "deltatune" in spent:
        found["ours / PEFT"] = ratio(spent, "deltatune", "peft")
    return found


def injection(name: str, shape: str, package: str, place: Path) -> float:
    model = configs.base(name, shape)  # making it is no part of the injection
    return cpu_seconds(lambda: configs.build(package, name, model, place))


def file_share(model: Any) -> float:
    """Bytes of the adapter's file as a share of the bytes of what is trained."""
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
        return (Path(folder) / "adapter_model.safetensors").stat().st_size / trained


def _packages(name: str) -> tuple[str, ...]:
    return tuple(package for package in PACKAGES if package == "deltatune" or configs.known_to_peer(name))


def row(name: str, found: Found) -> list[str]:
    def seconds(package: str) -> str:
        there = found["inject"].get(package)
        return milliseconds(there["seconds"]["median"]) if there else ""

    def figure(dtype: str, key: str) -> str:
        return f"{found[dtype][key]:.2f}" if key in found[dtype] else ""

    def ratios(dtype: str) -> list[str]:
        cells = [
            "cannot"
            if package in found[dtype].get("unable", {})
            else with_spread(found[dtype].get(package, {}).get("ratio"))
            for package in ("deltatune", "peft")
        ]
        return [*cells, figure(dtype, "ours / PEFT")]

    inject, cost = [seconds("deltatune"), seconds("peft")], figure("float32", "ours / lora")
    return [name, *inject, *ratios("float32"), *ratios("bfloat16"), cost, f"{found['file']:.2f}"]


def tables(kept: Found) -> dict[str, str]:
    lines = [row(name, found) for name, found in kept.items()]
    unable = sorted(
        {(name, p, why) for name, f in kept.items() for d in DTYPES for p, why in f[d].get("unable", {}).items()}
    )
    reasons = "\n".join(f"- {name}, {package}: `{why}`" for name, package, why in unable)
    return {"methods": markdown(COLUMNS, lines) + (f"\n\nWhat cannot train so:\n\n{reasons}" if unable else "")}


def pictures(kept: Found) -> dict[str, Any]:
    from harness.pictures import dots, figure, legend, plain_ticks

    order = sorted(
        (n for n in kept if "deltatune" in kept[n]["float32"]),
        key=lambda n: kept[n]["float32"]["deltatune"]["ratio"]["median"],
    )
    if not order:
        return {}
    made, axes = figure(columns=2, width=9.5, height=1.4 + 0.2 * len(order), sharey=True)
    for ax, dtype in zip(axes[0], DTYPES):
        found = {p: [kept[name][dtype].get(p, {}).get("ratio") for name in order] for p in ("deltatune", "peft")}
        dots(ax, order, found)
        ax.axvline(1, color="#777777", lw=1)
        ax.set_xscale("log")
        widest = max(value["high"] for values in found.values() for value in values if value)
        plain_ticks(ax.xaxis, [tick for tick in (1, 1.25, 1.5, 2, 2.5, 3, 4, 6, 8) if tick < widest * 1.2])
        ax.set_title(dtype, fontsize=10)
        ax.set_xlabel("CPU time of a training step, in that of the frozen model", fontsize=9)
    legend(made, axes[0][0])
    return {"methods": made}


PART = Part("methods", str(__doc__), 12, configs.names(), measure, tables, pictures, trial=("lora",))

if __name__ == "__main__":
    main(PART)
