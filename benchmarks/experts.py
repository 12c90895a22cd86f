"""LoRA on experts in one parameter beside PEFT's: a decode step, a prompt, a training step.

    python benchmarks/experts.py            prints the table of docs/experts.md

A Mixtral of 2 layers of width 256 with 16 experts and random weights, r = 8 on both parameters, one thread. The
packages take turns; what counts is the smallest of the times.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

import peft
import torch
import transformers
from harness.tables import markdown

import deltatune

COLUMNS = ("experts read by", "tokens", "bare, ms", "ours, ms", "PEFT, ms", "ours, training", "PEFT, training")
TARGETS: dict[str, Any] = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
ROUNDS = 7


def bare(reading: str) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 61, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    heads: dict[str, Any] = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 16,
        "num_experts_per_tok": 2,
    }
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads)).eval()
    model.set_experts_implementation(reading)
    return model


def adapted(library: Any, reading: str) -> Any:
    return library.get_peft_model(bare(reading), library.LoraConfig(r=8, init_lora_weights=False, **TARGETS))


def least(calls: list[Callable[[], Any]]) -> list[float]:
    """Milliseconds of each call, the least of some rounds, taken in turns after one that does not count."""
    found = [float("inf")] * len(calls)
    for turn in range(ROUNDS + 1):
        for index, call in enumerate(calls):
            start = time.perf_counter()
            call()
            found[index] = min(found[index], time.perf_counter() - start) if turn else found[index]
    return [1000 * seconds for seconds in found]


def row(reading: str, tokens: int) -> list[str]:
    ids = torch.randint(3, 61, (1, tokens))
    models = [bare(reading), adapted(deltatune, reading), adapted(peft, reading)]

    def forward(model: Any) -> Callable[[], Any]:
        return torch.no_grad()(lambda: model(input_ids=ids))

    def step(model: Any) -> Callable[[], Any]:
        return lambda: model(input_ids=ids, labels=ids).loss.backward()

    times = [*least([forward(model) for model in models]), *least([step(model) for model in models[1:]])]
    return [reading, str(tokens), *(f"{value:.1f}" for value in times)]


def main() -> None:
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = [row(reading, tokens) for reading in ("grouped_mm", "batched_mm", "eager") for tokens in (1, 64)]
    print(markdown(COLUMNS, rows))


if __name__ == "__main__":
    main()
