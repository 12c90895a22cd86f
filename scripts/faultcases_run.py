"""Further faults of `docs/reliability.md`: of merging and of threads. See `scripts.faultcases`."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from scripts.faultcases import HANDLED, adapted, fault, of
from tests.core.tiny import batch, tiny
from tests.faults.crowd import tiny_switch_interval

CAUSAL = "CAUSAL_LM"
PLAIN = {key: value for key, value in batch("llama").items() if key != "labels"}


def several(lib: Any) -> Any:
    """A model with "default" and "b", both doing something."""
    model = adapted(lib)
    model.add_adapter("b", lib.LoraConfig(task_type=CAUSAL, r=2))
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".b." in name:
                parameter.copy_(torch.randn_like(parameter) / 3)
    return model


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-4, atol=1e-5)


# merging -------------------------------------------------------------------------------------------------------------


@fault(63, "NaN in an adapter, merged", "layers.2")
def merge_nan_plainly(lib: Any, room: Path) -> str:
    model = adapted(lib)
    with torch.no_grad():
        [p for n, p in model.named_parameters() if "lora_B" in n][-1].fill_(math.nan)
    model.merge_adapter()
    return "lost: the weights of the base"


@fault(64, "`merge_and_unload(adapter_names=['nope'])`", "nope")
def merge_unknown(lib: Any, room: Path) -> str:
    adapted(lib).merge_and_unload(adapter_names=["nope"])
    return "lost: the adapter, merged into nothing"


@fault(64, "one of two active adapters merged", "not merged")
def merge_one_of_two(lib: Any, room: Path) -> str:
    model = several(lib)
    model.base_model.set_adapter(["default", "b"])
    both = of(model)
    model.merge_adapter(["default"])
    return HANDLED if close(of(model), both) else "wrong: the other one acts no more"


def stale(row: int, name: str, *words: str) -> Callable[[Callable[[Any, Any, Path], None]], None]:
    """Something that is done to a merged adapter, and then it is unmerged."""

    def register(do: Callable[[Any, Any, Path], None]) -> None:
        @fault(row, name, *words)
        def put(lib: Any, room: Path) -> str:
            adapted(lib, seed=2).save_pretrained(room)
            model = adapted(lib)
            with model.disable_adapter():
                base = of(model)
            do(lib, model, room)
            model.unmerge_adapter()
            with model.disable_adapter():
                return HANDLED if close(of(model), base) else "lost: the weights of the base"

    return register


@stale(67, "another file loaded onto a merged adapter", "merged")
def _load(lib: Any, model: Any, room: Path) -> None:
    model.merge_adapter()
    model.load_adapter(room, "default")


@stale(67, "an optimizer step on a merged adapter", "merged")
def _step(lib: Any, model: Any, room: Path) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    model.merge_adapter()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()


@fault(67, "trained while merged", "merged")
def train_merged(lib: Any, room: Path) -> str:
    model = several(lib)
    model.base_model.set_adapter(["default", "b"])
    model.merge_adapter(["default"])
    model.train()(**batch("llama")).loss.backward()
    return "wrong: no gradient, and no word"


@fault(68, "a bias for a layer that has none, merged", "bias")
def merge_bias(lib: Any, room: Path) -> str:
    model = lib.get_peft_model(tiny("llama"), lib.LoraConfig(r=2, lora_bias=True, target_modules=["q_proj"]))
    layer = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer
    before = layer.weight.detach().clone()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(1.0)
    try:
        model.merge_adapter()
    except Exception:
        if not torch.equal(layer.weight, before):
            return "lost: the weights of the base"
        raise
    return "wrong: merged"


def combination(name: str, words: tuple[str, ...], lost: str, **arguments: Any) -> None:
    @fault(69, name, *words)
    def put(lib: Any, room: Path) -> str:
        given = {"adapters": ["default", "b"], "weights": [1.0, 1.0], "adapter_name": "new", "combination_type": "cat"}
        several(lib).add_weighted_adapter(**{**given, **arguments})
        return lost


combination("combined with a weight of NaN", ("weights",), "wrong: accepted", weights=[math.nan, 1.0])
combination("combined with fewer weights than adapters", ("weights",), "wrong: one is dropped", weights=[1.0])
combination("combined under a name that is there", ("adapter_name",), "wrong: nothing happens", adapter_name="b")


# threads -------------------------------------------------------------------------------------------------------------


def crowd(name: str, calls: Callable[[Any], dict[str, Callable[[], torch.Tensor]]], either: bool = False) -> None:
    """Eight threads make 400 calls; with `either`, any of the answers is right, but no mixture."""

    @fault(90, name, "thread")
    def put(lib: Any, room: Path) -> str:
        model = several(lib)
        asked = calls(model)
        alone = {key: call() for key, call in asked.items()}
        wrong = []

        def work(seed: int) -> None:
            choose = random.Random(seed)
            for _ in range(50):
                key = choose.choice(sorted(asked))
                try:
                    got = asked[key]()
                except Exception:
                    wrong.append(key)
                    continue
                if not any(close(got, one) for one in (alone.values() if either else [alone[key]])):
                    wrong.append(key)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        with tiny_switch_interval():
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        return HANDLED if not wrong else f"wrong: {len(wrong)} of 400 answers"


def by_rows(model: Any) -> dict[str, Callable[[], torch.Tensor]]:
    def rows(*names: str) -> torch.Tensor:
        with torch.no_grad():
            return model(**PLAIN, adapter_names=list(names)).logits

    return {
        "default": lambda: rows("default", "default"),
        "b": lambda: rows("b", "b"),
        "mixed": lambda: rows("default", "b"),
        "base": lambda: rows("__base__", "__base__"),
    }


def disabled(model: Any) -> dict[str, Callable[[], torch.Tensor]]:
    def base() -> torch.Tensor:
        with model.disable_adapter():
            return of(model)

    return {"adapted": lambda: of(model), "base": base}


def switched(model: Any) -> dict[str, Callable[[], torch.Tensor]]:
    def to(name: str) -> torch.Tensor:
        model.set_adapter(name)
        return of(model)

    return {"default": lambda: to("default"), "b": lambda: to("b")}


crowd("400 calls of 8 threads, each with its adapter per row", by_rows)
crowd("400 calls of 8 threads, some with adapters disabled", disabled)
crowd("400 calls of 8 threads that switch adapters: one or the other", switched, either=True)


@fault(91, "an adapter replaced while 4 threads ask for it: the old or the new", "thread")
def replaced(lib: Any, room: Path) -> str:
    for seed in (1, 2):
        adapted(lib, seed=seed).save_pretrained(room / str(seed))
    model = adapted(lib)
    expected = [of(adapted(lib, seed=seed)) for seed in (1, 2)]
    done, wrong = threading.Event(), []

    def ask() -> None:
        while not done.is_set():
            got = of(model)
            if not any(close(got, one) for one in expected):
                wrong.append(1)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    with tiny_switch_interval():
        for thread in threads:
            thread.start()
        for turn in range(20):
            model.load_adapter(room / str(1 + turn % 2), "default")
        done.set()
        for thread in threads:
            thread.join()
    return HANDLED if not wrong else f"wrong: {len(wrong)} answers of a half replaced adapter"


# checkpointed layers ------------------------------------------------------------------------------------------------


@fault(90, "backward of a checkpointed layer under another choice than its forward pass", "disabled")
def recomputed(lib: Any, room: Path) -> str:
    found = []
    for checkpointing in (False, True):
        model = several(lib).train()
        model.base_model.set_adapter(["default", "b"])
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": True})
            model.enable_input_require_grads()
        loss = model(**batch("llama"), use_cache=False).loss
        with model.disable_adapter() if checkpointing else nullcontext():
            loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, again = found
    same = len(plain) > 0 and plain.keys() == again.keys() and all(close(plain[name], again[name]) for name in plain)
    return HANDLED if same else "wrong: other gradients, or none"
