"""Every weight method beside PEFT's: time to inject it, time of a training step, size of its file.

    python benchmarks/methods.py                        all methods, and the table of docs/performance.md
    python benchmarks/methods.py --only lora,vera --rounds 3 --no-write

A Llama of 4 layers of width 256 with random weights, all linear layers adapted, 4 rows of 64 tokens. Both packages get
the same config: the defaults of the method, with block sizes that fit the width. They take turns in one process with
one thread; what counts is process CPU time, and of it the median of the ratios within a round. Every method is measured
beside our LoRA too: that column is what it costs.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

import peft
import torch
import transformers
from harness.tables import markdown, put_between

import deltatune
from deltatune import METHODS
from deltatune.errors import PeftError

DOCUMENT = Path(__file__).parents[1] / "docs" / "performance.md"
RESULTS = Path(__file__).with_name("methods.json")
ROWS, TOKENS = 4, 64
COLUMNS = ("method", "inject, PEFT", "ours / PEFT", "step, PEFT", "ours / PEFT", "step / LoRA's", "file / trained")
# Fields that a method cannot do without, or whose default does not fit a width of 256, by their name.
FITTED: dict[str, Any] = {
    "total_step": 1000,
    "block_size": 64,
    "num_virtual_tokens": 20,
    "token_indices": [1, 2, 3],
    "vector_length": 64,
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def bare() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config).train()


def arguments(kind: type) -> dict[str, Any]:
    """Keyword arguments that both packages take."""
    names = {field.name for field in dataclasses.fields(kind)}
    given = {name: value for name, value in FITTED.items() if name in names}
    return given if "token_indices" in names else {"target_modules": TARGETS, **given}


def build(package: Any, kind: str, given: dict[str, Any], model: Any = None) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(package, kind)(task_type="CAUSAL_LM", **given)
        return package.get_peft_model(bare() if model is None else model, config)


def seconds(run: Callable[[], Any]) -> float:
    gc.collect()
    start = time.process_time()
    run()
    return time.process_time() - start


def injection(package: Any, kind: str, given: dict[str, Any]) -> float:
    model = bare()  # making it is no part of the injection
    return seconds(lambda: build(package, kind, given, model))


def turns(candidates: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each candidate in each round, taking turns; the first round goes unmeasured."""
    names, spent = list(candidates), {name: [] for name in candidates}
    for turn in range(-1, rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            took = candidates[name]()
            if turn >= 0:
                spent[name].append(took)
    return spent


def ratio(spent: dict[str, list[float]], one: str, other: str) -> float:
    return statistics.median(a / b for a, b in zip(spent[one], spent[other]))


def step(model: Any, inputs: dict[str, Any]) -> None:
    model.zero_grad()
    model(**inputs).loss.backward()


def measure(name: str, rounds: int) -> dict[str, Any]:
    kind = METHODS[name.upper()].config
    given, known = arguments(kind), hasattr(peft, kind.__name__)
    packages = {"ours": deltatune, "peft": peft} if known else {"ours": deltatune}
    models = {which: build(package, kind.__name__, given) for which, package in packages.items()}
    models["lora"] = build(deltatune, "LoraConfig", {"target_modules": TARGETS})
    ids = torch.randint(0, 1024, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "labels": ids}
    tasks = {"task_ids": torch.zeros(ROWS, dtype=torch.long)} if hasattr(kind, "n_tasks") else {}
    asked = {which: inputs if which == "lora" else inputs | tasks for which in models}
    steps = turns({w: lambda w=w: seconds(lambda: step(models[w], asked[w])) for w in models}, rounds)
    injected = turns({w: lambda p=p: injection(p, kind.__name__, given) for w, p in packages.items()}, rounds)
    found = {"lora": ratio(steps, "ours", "lora"), "file": file_share(models["ours"])}
    if known:
        found |= {"inject_seconds": statistics.median(injected["peft"]), "inject": ratio(injected, "ours", "peft")}
        found |= {"step_seconds": statistics.median(steps["peft"]), "step": ratio(steps, "ours", "peft")}
    return found


def file_share(model: Any) -> float:
    """Bytes of the adapter's file as a share of the bytes of what is trained."""
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
        return (Path(folder) / "adapter_model.safetensors").stat().st_size / trained


def row(name: str, found: dict[str, Any]) -> list[str]:
    def show(key: str, form: str) -> str:
        return format(found[key], form) if key in found else ""

    cells = [show("inject_seconds", ".3f"), show("inject", ".2f"), show("step_seconds", ".3f"), show("step", ".2f")]
    cells = [f"{cell} s" if cell and place % 2 == 0 else cell for place, cell in enumerate(cells)]
    return [name, *cells, show("lora", ".2f"), show("file", ".2f")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--only", help="methods, separated by commas")
    parser.add_argument("--no-write", action="store_true", help="leave docs and methods.json as they are")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    known = sorted(method.name for method in METHODS.values() if method.graft is None)
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"methods": {}, "step": {}}
    for name in asked.only.split(",") if asked.only else known:
        try:
            found = measure(name, asked.rounds)
        except PeftError as error:
            print(f"{name}: {error}", flush=True)
            continue
        stored["methods"][name], stored["step"][name] = found, found["lora"]
        print(*row(name, found), sep=" | ", flush=True)
    if not asked.no_write:
        RESULTS.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n")
        lines = [row(name, found) for name, found in sorted(stored["methods"].items())]
        DOCUMENT.write_text(put_between(DOCUMENT.read_text(), "methods", markdown(COLUMNS, lines), DOCUMENT.name))


if __name__ == "__main__":
    main()
