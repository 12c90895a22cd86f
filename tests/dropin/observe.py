"""Runs the cases of a module of `cases/` under the `peft` of this process, and prints what each tells."""

from __future__ import annotations

import importlib
import inspect
import json
import warnings
from types import ModuleType
from typing import Any


def cases_of(module: ModuleType) -> dict[str, Any]:
    """The functions without arguments that a module defines."""
    own = {name: value for name, value in vars(module).items() if inspect.isfunction(value)}
    return {
        name: function
        for name, function in own.items()
        if function.__module__ == module.__name__ and not inspect.signature(function).parameters
    }


def run(name: str) -> None:
    """A line for every case, and one for the words of docs/migrate.md that go with it."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    for case, function in cases_of(importlib.import_module(name)).items():
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                told = function()
            except Exception as error:  # told, so that the other cases run
                told = {"died": f"{type(error).__name__}: {error}"}
        print("=", case, json.dumps(told), flush=True)
        if hasattr(function, "words"):
            print("=", case, "says", json.dumps(function.words), flush=True)
