"""What a prefix costs beside PEFT's and the bare model: time of a training step and of generation, memory.

    python benchmarks/prefix_cost.py                   everything, and the tables of docs/performance.md
    python benchmarks/prefix_cost.py --rounds 3 --only gpt2 --no-write

Models of GPT-2 small's and T5-small's shape with random weights and 8,192 words, so that the head does not hide the
attention; 20 virtual tokens, 128 tokens, some rows padded, dropout 0. All candidates take turns in one process with one
thread; what counts is process CPU time, and of it the median of the ratios within a round.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

import torch
import transformers
from harness.alone import as_if_alone
from harness.llama import PACKAGES
from harness.memory import peak_bytes
from harness.tables import markdown, put_between
from harness.timing import Seconds, ratio, turns
from torch import Tensor, nn

from deltatune.prompts.stage import STAGE

DOCUMENT = Path(__file__).parents[1] / "docs" / "performance.md"
WORDS, TOKENS, VIRTUAL, PROMPT, NEW = 8192, 128, 20, 32, 64
MODELS = {"gpt2": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}
TITLES = {"gpt2": "GPT-2 small's shape", "t5": "T5-small's shape"}


def bare(name: str) -> Any:
    """A base model with random weights, the same at each call."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"vocab_size": WORDS, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    if name == "gpt2":
        settings |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        model: Any = transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings))
    else:
        settings |= {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8, "dropout_rate": 0.0}
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(**settings))
        model.generation_config.decoder_start_token_id = 0
    model.generation_config.eos_token_id = None
    return model


def prefixed(package: str, name: str, projection: bool = False) -> Any:
    library: Any = importlib.import_module(package)
    model = bare(name)
    config = library.PrefixTuningConfig(
        task_type=MODELS[name], num_virtual_tokens=VIRTUAL, prefix_projection=projection
    )
    return library.get_peft_model(model, config)


def rows(name: str, batch: int) -> dict[str, Tensor]:
    """A batch of training rows; every fourth is 24 tokens shorter, and so on."""
    generator = torch.Generator().manual_seed(batch)
    ids = torch.randint(3, WORDS, (batch, TOKENS), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(batch):
        mask[row, TOKENS - 8 * (row % 4) :] = 0
    labels = ids.masked_fill(mask == 0, -100) if name == "gpt2" else ids
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask, "labels": labels}


def train_step(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    model.zero_grad()
    model(**inputs).loss.backward()


def generate(model: Any, inputs: dict[str, Tensor]) -> None:
    model.generate(**inputs, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)


def relative(seconds: Seconds, to: str) -> str:
    return f"{ratio(seconds, 'deltatune', to):.3f}"


def step_times(name: str, batch: int, projection: bool, rounds: int) -> list[str]:
    inputs = rows(name, batch)
    models = {package: prefixed(package, name, projection).train() for package in PACKAGES}
    seconds = turns({p: lambda m=m: train_step(m, inputs) for p, m in models.items()}, rounds, within=as_if_alone)
    what = f"training step, {batch} rows" + (", projection" if projection else "")
    return [TITLES[name], what, f"{statistics.median(seconds['peft']):.2f} s", relative(seconds, "peft"), ""]


def generation_times(name: str, batch: int, rounds: int) -> list[str]:
    inputs = {k: v[:, :PROMPT] for k, v in rows(name, batch).items() if k != "labels"}
    models = {"bare": bare(name).eval(), **{package: prefixed(package, name).eval() for package in PACKAGES}}
    seconds = turns({p: lambda m=m: generate(m, inputs) for p, m in models.items()}, rounds, within=as_if_alone)
    what = f"generation, {batch} row" + "s" * (batch > 1)
    return [
        TITLES[name],
        what,
        f"{statistics.median(seconds['peft']):.2f} s",
        relative(seconds, "peft"),
        relative(seconds, "bare"),
    ]


# --------------------------------------------------------------------------------------------------------------- memory


def prefix_bytes(package: str, model: Any, batch: int) -> int:
    """Bytes of the keys and values of the prefix that a pass over `batch` rows works with."""
    with torch.no_grad():
        if package == "deltatune":
            handed = vars(model.get_base_model())[STAGE].bind().prefixes.values()
            tensors = [part for each in handed for part in (each.key, each.value)]
        else:
            cache = model.get_prompt(batch)
            layers = getattr(cache, "self_attention_cache", cache).layers
            tensors = [part for layer in layers for part in (layer.keys, layer.values)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def resident_bytes() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_of(package: str, name: str, batch: int, projection: bool) -> dict[str, int]:
    """Measured in a process of its own."""
    torch.set_num_threads(1)
    model, inputs = prefixed(package, name, projection).train(), rows(name, batch)
    with as_if_alone(package):
        train_step(model, {key: value[:1] for key, value in inputs.items()})
        model.zero_grad()
        before = resident_bytes()
        train_step(model, inputs)
        after = resident_bytes()
        model.zero_grad()
        peak = peak_bytes(lambda: train_step(model, inputs))
    return {"resident": after - before, "peak": peak, "prefix": prefix_bytes(package, model, batch)}


def memory(name: str, batch: int, projection: bool) -> list[list[str]]:
    found = {}
    for package in PACKAGES:
        asked = json.dumps([package, name, batch, projection])
        output = subprocess.run(
            [sys.executable, __file__, "--memory-of", asked], capture_output=True, text=True, check=True
        )
        found[package] = json.loads(output.stdout.splitlines()[-1])
    what = f"{batch} rows" + (", projection" if projection else "")
    titles = {
        "peak": "peak of a step",
        "resident": "resident memory of a step",
        "prefix": "keys and values of the prefix",
    }
    return [
        [TITLES[name], f"{title}, {what}", *(f"{found[package][key] / 2**20:,.1f} MiB" for package in PACKAGES)]
        for key, title in titles.items()
    ]


# -------------------------------------------------------------------------------------------------------------- command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--only", choices=[*MODELS], nargs="*", default=[*MODELS])
    parser.add_argument("--parts", choices=["step", "projection", "generate", "memory"], nargs="*")
    parser.add_argument("--no-write", action="store_true", help="leave docs/performance.md as it is")
    parser.add_argument("--memory-of", type=json.loads, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    if asked.memory_of:
        print(json.dumps(memory_of(*asked.memory_of)))
        return
    parts = asked.parts or ["step", "projection", "generate", "memory"]
    timed: list[list[str]] = []
    used: list[list[str]] = []
    for name in asked.only:
        if "step" in parts:
            timed.append(step_times(name, 8, False, asked.rounds))
            print(*timed[-1], sep=" | ", flush=True)
        if "projection" in parts:
            timed.append(step_times(name, 32, True, max(3, asked.rounds // 4)))
            print(*timed[-1], sep=" | ", flush=True)
        for batch in (1, 8) if "generate" in parts else ():
            timed.append(generation_times(name, batch, asked.rounds))
            print(*timed[-1], sep=" | ", flush=True)
        for batch, projection in ((8, False), (32, True)) if "memory" in parts else ():
            used += memory(name, batch, projection)
            print(*(" | ".join(row) for row in used[-3:]), sep="\n", flush=True)
    if not asked.no_write:
        times = markdown(["model", "what", "PEFT", "ours / PEFT", "ours / bare"], timed)
        space = markdown(["model", "what", "PEFT", "ours"], used)
        text = put_between(DOCUMENT.read_text(), "times", times, DOCUMENT.name)
        DOCUMENT.write_text(put_between(text, "memory", space, DOCUMENT.name))


if __name__ == "__main__":
    main()
