"""How an adapter's life grows with the model's layers and with the adapters beside it, beside PEFT.

    python benchmarks/growth.py                                   all, tables and pictures of docs/performance.md
    python benchmarks/growth.py --only "8 layers,16 layers" --rounds 2

Layers: LoRA r=8 on all linear layers of Llamas of 8 to 64 layers (256 to 512 wide, 7 linear layers in each): inject it,
save it, load it into a model that has one already, switch to it, merge it, unmerge it.
Adapters: the same adapter loaded under one name after the other into a Llama of 32 layers; after 1, 4, 16, ... 1,000
of them the last loads, set_adapter, a decoding step of one row, and how much memory each took. PEFT stops at 64, as it
gets slower with each. Candidates take turns in one process with one thread, or follow each other where they fill a
model; what counts is process CPU time.
"""

from __future__ import annotations

import gc
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

import torch
from harness.llama import PACKAGES, adapted, bare, ids_of, lora
from harness.part import Found, Part, main
from harness.tables import markdown
from harness.timing import cpu_seconds, in_turns, milliseconds, summary

LAYERS = (8, 16, 32, 64)
COUNTS = (1, 4, 16, 64, 256, 1000)
MOST = {"deltatune": 1000, "peft": 64}
DEEDS = ("inject", "save", "load", "set_adapter", "merge", "unmerge")
KEYS = [*(f"{layers} layers" for layers in LAYERS), "adapters"]


def measure(key: str, rounds: int, quick: bool) -> Found:
    shape = "tiny" if quick else "narrow"
    if key == "adapters":
        return {package: filled(package, shape, 4 if quick else MOST[package]) for package in reversed(PACKAGES)}
    layers = int(key.split()[0])
    lives = in_turns({package: partial(life, package, shape, layers) for package in PACKAGES}, rounds)
    return {
        package: {deed: summary([life[deed] for life in found]) for deed in DEEDS} for package, found in lives.items()
    }


def life(package: str, shape: str, layers: int) -> dict[str, float]:
    """Seconds of what is done to one adapter from its birth on."""
    model, config, found = bare(shape, num_hidden_layers=layers), lora(package, init_lora_weights=False), {}
    made: list[Any] = []
    found["inject"] = cpu_seconds(lambda: made.append(adapted(package, config, model)))
    with tempfile.TemporaryDirectory() as folder:
        found["save"] = cpu_seconds(partial(made[0].save_pretrained, folder))
        found["load"] = cpu_seconds(partial(made[0].load_adapter, folder, "second"))
    found["set_adapter"] = cpu_seconds(partial(made[0].set_adapter, "second"))
    found["merge"] = cpu_seconds(made[0].merge_adapter)
    found["unmerge"] = cpu_seconds(made[0].unmerge_adapter)
    return found


def filled(package: str, shape: str, most: int) -> dict[str, Any]:
    """Per number of adapters: seconds of the last loads and of set_adapter and a decoding step, bytes of each."""
    layers: dict[str, Any] = {} if shape == "tiny" else {"num_hidden_layers": 32}
    model = adapted(package, lora(package, init_lora_weights=False), bare(shape, **layers)).eval()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        model.load_adapter(folder, "first")  # what is imported on the way
        model.delete_adapter("first")
        gc.collect()
        before, loads = resident_bytes(), []
        for count in range(1, most + 1):
            loads.append(cpu_seconds(partial(model.load_adapter, folder, f"a{count}")))
            if count in COUNTS:
                found[str(count)] = {
                    "load": summary(loads[-5:]),
                    "set_adapter": summary([cpu_seconds(partial(switch, model, count), 9)]),
                    "decode": summary([cpu_seconds(partial(decode, model), 9)]),
                    "bytes": (resident_bytes() - before) / count,
                }
    return found


def switch(model: Any, count: int) -> None:
    model.set_adapter(f"a{count}" if model.active_adapter != f"a{count}" else "a1")


@torch.no_grad()
def decode(model: Any) -> None:
    model(input_ids=ids_of(1, 1))


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def tables(kept: Found) -> dict[str, str]:
    blocks = {}
    depths = {int(key.split()[0]): found for key, found in kept.items() if key != "adapters"}
    if depths:
        columns = ["deed", *(f"{layers} layers, {who}" for layers in depths for who in ("ours", "PEFT"))]
        rows = [
            [deed, *(milliseconds(f[p][deed]["median"]) for f in depths.values() for p in ("deltatune", "peft"))]
            for deed in DEEDS
        ]
        blocks["growth-layers"] = markdown(columns, rows)
    if "adapters" in kept:
        blocks["growth-adapters"] = markdown(
            [
                "adapters",
                *(
                    f"{what}, {who}"
                    for what in ("load", "set_adapter", "token", "memory of each")
                    for who in ("ours", "PEFT")
                ),
            ],
            [_line(kept["adapters"], count) for count in map(str, COUNTS) if count in kept["adapters"]["deltatune"]],
        )
    return blocks


def _line(found: Found, count: str) -> list[str]:
    def cell(what: str, package: str) -> str:
        there = found[package].get(count)
        if there is None:
            return ""
        return f"{there[what] / 2**20:.1f} MiB" if what == "bytes" else milliseconds(there[what]["median"])

    cells = [cell(what, p) for what in ("load", "set_adapter", "decode", "bytes") for p in ("deltatune", "peft")]
    return [f"{int(count):,}", *cells]


def pictures(kept: Found) -> dict[str, Any]:
    made = {}
    depths = {int(key.split()[0]): found for key, found in kept.items() if key != "adapters"}
    if depths:
        made["growth-layers"] = _picture(
            {d: {p: {n: f[p][d] for n, f in depths.items()} for p in MOST} for d in DEEDS},
            "layers of the model",
            LAYERS,
        )
    if "adapters" in kept:
        whats = {"load": "load one more", "set_adapter": "set_adapter", "decode": "one token, one row"}
        curves = {
            title: {p: {int(n): f[what] for n, f in kept["adapters"][p].items()} for p in MOST}
            for what, title in whats.items()
        }
        made["growth-adapters"] = _picture(curves, "adapters in the model", COUNTS)
    return made


def _picture(panels: dict[str, Any], below: str, ticks: tuple[int, ...]) -> Any:
    """A panel for each deed, both axes logarithmic: a straight line of slope one is growth in proportion."""
    from harness.pictures import figure, legend, lines, plain_ticks

    made, axes = figure(columns=3, rows=len(panels) // 3, width=9.5, height=0.6 + 2.5 * (len(panels) // 3), sharex=True)
    for ax, (title, curves) in zip(axes.flat, panels.items()):
        scaled = {p: {n: {k: 1000 * v for k, v in f.items()} for n, f in curve.items()} for p, curve in curves.items()}
        lines(ax, scaled)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        plain_ticks(ax.xaxis, ticks, lambda value: f"{value:,.0f}")
        low, high = ax.get_ylim()
        fine = [m * 10.0**e for e in range(-3, 6) for m in (1, 1.5, 2, 3, 4, 5, 7) if low <= m * 10.0**e <= high]
        coarse = [tick for tick in fine if f"{tick:e}"[:3] in ("1.0", "2.0", "5.0")]
        steps = coarse if len(coarse) > 3 else fine
        plain_ticks(ax.yaxis, steps, lambda value: f"{value:,g}")
        ax.set_title(title, fontsize=10)
    for ax in axes[:, 0]:
        ax.set_ylabel("CPU time, ms", fontsize=9)
    for ax in axes[-1]:
        ax.set_xlabel(below, fontsize=9)
    legend(made, axes[0][0])
    return made


PART = Part("growth", str(__doc__), 9, KEYS, measure, tables, pictures, trial=("8 layers", "adapters"))

if __name__ == "__main__":
    main(PART)
