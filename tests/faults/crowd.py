"""Many threads that ask one model at once, each for a choice of its own, and what each of them must get."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from deltatune import PeftModel, get_peft_model
from tests.core.tiny import batch, tiny

INPUTS = {key: value for key, value in batch("llama").items() if key != "labels"}
ROWS = {"alone": ["a", "a"], "other": ["b", "b"], "mixed": ["a", "b"], "with the base": ["__base__", "b"]}


def two_adapters(config: Callable[[int], Any], seed: int = 0) -> PeftModel:
    """A model with "a" and "b", both trained somewhere; "a" is active."""
    model = get_peft_model(tiny("llama", num_hidden_layers=2), config(0), adapter_name="a")
    model.add_adapter("b", config(1))
    for number, name in enumerate("ab"):
        stir(model, name, seed + number)
    model.set_adapter("a")
    return model.eval()


def stir(model: PeftModel, name: str, seed: int) -> None:
    model.set_adapter(name)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))


@torch.no_grad()
def ask(model: Any, rows: list[str] | None = None) -> torch.Tensor:
    return model(**INPUTS).logits if rows is None else model(**INPUTS, adapter_names=rows).logits


@torch.no_grad()
def answers(model: Any) -> dict[str, list[torch.Tensor]]:
    """By kind of call, what it may give when nobody else is there."""
    found = {kind: [ask(model, rows)] for kind, rows in ROWS.items()}
    with model.disable_adapter():
        found["disabled"] = [ask(model)]
    found["switched"] = []
    for name in ("b", "a"):
        model.set_adapter(name)
        found["switched"].append(ask(model))
    return found


def call(model: Any, kind: str, choose: random.Random) -> torch.Tensor:
    if kind in ROWS:
        return ask(model, ROWS[kind])
    if kind == "disabled":
        with model.disable_adapter():
            return ask(model)
    model.set_adapter(choose.choice("ab"))
    return ask(model)  # another thread may have switched meanwhile: either, but never some of each


@contextmanager
def tiny_switch_interval() -> Iterator[None]:
    """Threads change places within nearly every line."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def together(*jobs: Callable[[], Any]) -> list[Any]:
    """Run the jobs at once, each in a thread; the errors that they ended with."""
    errors: list[Any] = []

    def run(job: Callable[[], Any]) -> None:
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(job,), daemon=True) for job in jobs]
    with tiny_switch_interval():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(300)
    return errors + [f"{thread.name} hangs" for thread in threads if thread.is_alive()]


def wrong(model: Any, calls: int, threads: int) -> list[Any]:
    """So many mixed calls from so many threads: those that got another answer than alone, or an error."""
    expected, found = answers(model), []

    def work(seed: int) -> None:
        choose = random.Random(seed)
        for _ in range(calls // threads):
            kind = choose.choice(list(expected))
            try:
                got = call(model, kind, choose)
            except Exception as error:
                found.append((kind, error))
                continue
            if not any(torch.allclose(got, one, rtol=1e-5, atol=1e-6) for one in expected[kind]):
                found.append((kind, "another answer"))

    return together(*[lambda seed=seed: work(seed) for seed in range(threads)]) + found
