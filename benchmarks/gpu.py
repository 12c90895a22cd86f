"""LoRA on a GPU beside PEFT and beside the frozen floor: tokens per second, peak memory, share of the products' peak.

    python benchmarks/gpu.py                   Llamas of the shapes of 1B and 8B, the table of docs/performance.md, JSON
    python benchmarks/gpu.py --only 1b         one of them: 12 GiB are enough; 8b takes 40
    python benchmarks/gpu.py --tiny            tiny ones, also on a CPU, to see that it works

Random weights in bfloat16, made on the device; LoRA r=8 on all seven linear layers. Before anything is timed, a model
of two layers of that shape is compared in float32: logits and gradients of every form with those of the plain formula.
"ours, plain", "fused" and "triton" are the choices of `deltatune.kernels.gpu`. All candidates share one base model, on
which they are put and taken off again in turns; what counts is the median over the rounds. The floor of a training step
is defined in harness/floor.py, the floor of a decoding step is the bare model. The peak of products is measured too, by
one of 8192 x 8192 matrices; the work of a step is that of the floor, counted by torch, for all candidates.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers
from harness.floor import floor, step
from harness.llama import SHAPES, WORDS, adapted, lora
from harness.part import Found, Part, main
from harness.tables import markdown
from harness.timing import in_turns, summary
from torch.utils.flop_counter import FlopCounterMode

from deltatune.kernels import gpu

LLAMAS: dict[str, dict[str, int]] = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}
FORMS = {"ours, plain": "plain", "ours, fused": "fused", "ours, triton": "triton"}
TRAIN = {"1b": (8, 1024), "8b": (2, 1024)}  # rows, tokens
DECODE, BEFORE = 16, 512  # rows, and tokens of each that are in the cache
ADAPTERS = (1, 4, 16, 64)
COLUMNS = (
    "model",
    "what",
    "candidate",
    "tokens / s",
    "time / floor's",
    "peak memory",
    "above the floor",
    "share of peak",
)


def measure(key: str, rounds: int, quick: bool) -> Found:
    if not (quick or torch.cuda.is_available()):
        raise SystemExit("gpu: there is no CUDA device here; --tiny tries the script on a CPU")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    found: Found = {"device": name, "errors": errors(key, device, quick), "peak": peak_of_products(device, quick)}
    model = llama(key, device, torch.bfloat16 if device.type == "cuda" else torch.float32, quick)
    found["training"] = training(model, key, rounds, quick)
    for adapters in ADAPTERS[:2] if quick else ADAPTERS:
        found[f"{DECODE} rows, {adapters} adapters"] = decoding(model, adapters, rounds, quick)
    print(json.dumps({key: found}))
    return found


def llama(key: str, device: torch.device, dtype: torch.dtype, quick: bool, **changed: Any) -> Any:
    """A frozen Llama with random weights, made on the device."""
    torch.manual_seed(0)
    own = {**SHAPES["tiny"], "vocab_size": WORDS} if quick else {**LLAMAS[key], "vocab_size": 128256}
    heads = 2 if quick else 8
    config = transformers.LlamaConfig(num_key_value_heads=heads, tie_word_embeddings=True, **{**own, **changed})
    with device:
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.requires_grad_(False).eval()


def forms() -> dict[str, str]:
    """Those that can run here: Triton needs a GPU, or its interpreter."""
    there = gpu.installed() and (torch.cuda.is_available() or gpu.interpreted())
    return {name: form for name, form in FORMS.items() if form != "triton" or there}


# --------------------------------------------------------------------------------------------------------- correctness


def errors(key: str, device: torch.device, quick: bool) -> dict[str, float]:
    """Of every form in float32: the largest difference from the plain one, relative to the largest number there.

    Raises:
        SystemExit: One is above 1e-4: what is wrong is not timed.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    base = llama(key, device, torch.float32, quick, num_hidden_layers=2)
    model = adapted("deltatune", lora("deltatune", init_lora_weights=False), base).train()
    ids = ids_of(2, 64, device)

    def numbers() -> list[torch.Tensor]:
        model.zero_grad()
        output = model(input_ids=ids, labels=ids)
        output.loss.backward()
        return [output.logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    expected, found = numbers(), {}
    for name, form in forms().items():
        with gpu.using(form):
            pairs = zip(numbers(), expected)
        found[name] = max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-12)) for a, b in pairs)
        if found[name] > 1e-4:
            raise SystemExit(
                f"gpu: {name} is off by {found[name]:.1e} of the plain formula in float32; nothing is timed"
            )
    return found


def ids_of(rows: int, tokens: int, device: torch.device) -> torch.Tensor:
    return torch.randint(3, WORDS, (rows, tokens), generator=torch.Generator().manual_seed(rows)).to(device)


# ---------------------------------------------------------------------------------------------------------------- time


def training(model: Any, key: str, rounds: int, quick: bool) -> Found:
    rows, tokens = (2, 32) if quick else TRAIN[key]
    ids = ids_of(rows, tokens, model.device)
    with FlopCounterMode(display=False) as counter:
        floor(model, ids)
    candidates = {"floor": partial(timed, partial(floor, model, ids), quick)}
    for name, package, form in _contestants():
        candidates[name] = partial(_trained, model, package, form, ids, quick)
    found = summed(in_turns(candidates, rounds), rows * tokens)
    return {**found, "work": counter.get_total_flops()}


def _trained(model: Any, package: str, form: str, ids: torch.Tensor, quick: bool) -> dict[str, float]:
    with on(model, package, form, ("default",)) as grafted:
        return timed(partial(step, grafted.train(), ids), quick)


def decoding(model: Any, adapters: int, rounds: int, quick: bool) -> Found:
    """One token for each row, whose adapters take turns."""
    names = tuple(f"a{number}" for number in range(adapters))
    each = [names[row % adapters] for row in range(DECODE)] if adapters <= DECODE else list(names)
    ids = ids_of(len(each), 8 if quick else BEFORE, model.device)

    def run(package: str | None, form: str) -> dict[str, float]:
        with on(model, package, form, names) if package else nullcontext(model) as grafted:
            given = {"adapter_names": each} if package else {}
            fixed = grafted.fixed_adapters() if package == "deltatune" else nullcontext()
            with torch.no_grad(), fixed:
                return timed(one_token(grafted, ids, given), quick)

    candidates: dict[str, Callable[[], dict[str, float]]] = {"floor": partial(run, None, "plain")}
    candidates |= {name: partial(run, package, form) for name, package, form in _contestants()}
    return summed(in_turns(candidates, rounds), len(each))


def one_token(model: Any, ids: torch.Tensor, given: dict[str, Any]) -> Callable[[], None]:
    cache = transformers.DynamicCache()
    model(input_ids=ids, past_key_values=cache, **given)

    def run() -> None:
        model(input_ids=ids[:, :1], past_key_values=cache, **given)
        cache.crop(-1)

    return run


def _contestants() -> Iterator[tuple[str, str, str]]:
    """Name, package and form of all but the floor."""
    yield "PEFT", "peft", "plain"
    for name, form in forms().items():
        if form != "triton" or torch.cuda.is_available():  # its interpreter is there to be right
            yield name, "deltatune", form


@contextmanager
def on(model: Any, package: str, form: str, names: tuple[str, ...]) -> Iterator[Any]:
    """The model under adapters, which are gone afterwards."""
    config = partial(lora, package, init_lora_weights=False)
    grafted = adapted(package, config(), model) if names == ("default",) else None
    if grafted is None:
        import importlib

        library: Any = importlib.import_module(package)
        grafted = library.get_peft_model(model, config(), adapter_name=names[0]).eval()
        for name in names[1:]:
            grafted.add_adapter(name, config())
    try:
        with gpu.using(form):
            yield grafted
    finally:
        grafted.unload()
        model.requires_grad_(False).eval()


def timed(run: Callable[[], Any], quick: bool) -> dict[str, float]:
    """Seconds of one call, the mean of some, and the most bytes that were allocated meanwhile."""
    warm, calls = (1, 1) if quick else (3, 10)
    for _ in range(warm):
        run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / calls
    return {"seconds": seconds, "bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0}


def summed(rounds: dict[str, list[dict[str, float]]], tokens: int) -> Found:
    floors = [each["seconds"] for each in rounds["floor"]]
    return {
        name: {
            "seconds": summary([each["seconds"] for each in of]),
            "ratio": summary([each["seconds"] / base for each, base in zip(of, floors)]),
            "bytes": max(each["bytes"] for each in of),
            "tokens": tokens,
        }
        for name, of in rounds.items()
    }


def peak_of_products(device: torch.device, quick: bool) -> float:
    """Operations per second of a product of large matrices in the precision of the model."""
    side, dtype = (256, torch.float32) if quick else (8192, torch.bfloat16)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / min(timed(lambda: a @ b, quick)["seconds"] for _ in range(5))


# -------------------------------------------------------------------------------------------------------------- tables


def rows(key: str, found: Found) -> Iterator[list[str]]:
    whats = [what for what in found if what == "training" or what.endswith("adapters")]
    for what in whats:
        base, work = found[what]["floor"], found[what].get("work")
        for name, its in found[what].items():
            if name == "work":
                continue
            seconds, beyond = its["seconds"]["median"], its["bytes"] - base["bytes"]
            share = f"{work / seconds / found['peak']:.0%}" if work else ""
            speed = f"{its['tokens'] / seconds:,.0f}"
            memory = [f"{its['bytes'] / 2**30:.2f} GiB", f"{beyond / 2**20:,.0f} MiB"] if its["bytes"] else ["", ""]
            yield [key, what, name, speed, f"{its['ratio']['median']:.3f}", *memory, share]


def tables(kept: Found) -> dict[str, str]:
    table = markdown(COLUMNS, [row for key, found in kept.items() for row in rows(key, found)])
    told = "\n".join(
        f"{key} on {found['device']}: products reach {found['peak'] / 1e12:,.1f} Tflop/s; largest error in float32 "
        f"{max(found['errors'].values()):.1e}."
        for key, found in kept.items()
    )
    return {"gpu": f"{table}\n\n{told}"}


PART = Part("gpu", str(__doc__), 5, tuple(LLAMAS), measure, tables, trial=("1b",))

if __name__ == "__main__":
    main(PART)
