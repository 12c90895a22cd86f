"""The table of docs/methods/index.md: what each method can do, found by trying it, and what a step of it costs.

python benchmarks/methods_table.py            rewrites the table; costs come from benchmarks/methods.json
python benchmarks/methods_table.py --check    says whether it is what the code does now; exit code 1 if not
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from harness.tables import markdown, put_between
from torch import nn

from deltatune import METHODS, get_peft_model
from deltatune.adapter import Method
from deltatune.bases import as_map
from deltatune.errors import PeftError
from deltatune.inject import adapted_layers

os.environ.setdefault("DELTATUNE_LAW_SEED", "0")
ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # the small layers and configs that the laws range over are the tests'
examples: Any = importlib.import_module("tests.laws.examples")
packed: Any = importlib.import_module("tests.bases.test_packed")

PAGE = ROOT / "docs" / "methods" / "index.md"
COSTS = ROOT / "benchmarks" / "methods.json"
KINDS = {"linear": "Linear", "transposed": "Conv1D", "embedding": "Embedding", "conv2d-circular": "Conv"}
COLUMNS = ("method", "layers", "quantised", "merge", "rows", "stacking", "start", "step beside LoRA's")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    text = PAGE.read_text()
    new = put_between(text, "methods", table(), PAGE.name)
    if asked.check:
        print(f"{PAGE.name} is {'up to date' if new == text else 'stale: python benchmarks/methods_table.py'}")
        return int(new != text)
    PAGE.write_text(new)
    return 0


def table() -> str:
    kept = json.loads(COSTS.read_text()) if COSTS.exists() else {}
    costs = {name: found["float32"].get("ours / lora") for name, found in kept.items()}
    rows = [layer_row(name, costs.get(name)) for name in sorted(examples.LAYER_METHODS)]
    prompts = [method for method in METHODS.values() if method.graft is not None]
    rows += [prompt_row(method, costs.get(method.name)) for method in sorted(prompts, key=lambda method: method.name)]
    return markdown(COLUMNS, rows)


def layer_row(name: str, cost: Any) -> list[str]:
    kinds = [title for base, title in KINDS.items() if _adapted(name, examples.BASES[base].make()) is not None]
    model = _adapted(name, examples.BASES["linear"].make())
    adapter: Any = next(layer for _, layer in adapted_layers(model)).adapters["default"] if model else None
    return [
        f"[{name}]({name}.md)",
        ", ".join(kinds),
        _yes(_adapted(name, _words()) is not None),
        "yes" if model and adapter.mergeable is True else "no",
        _yes(model is not None and _tried(lambda: _rows(name))),
        _yes(model is not None and _tried(lambda: _stack(name))),
        "the base" if model and adapter.identity_at_birth is True else "changes it",
        f"{cost:.2f}" if cost else "",
    ]


def prompt_row(method: Method, cost: Any) -> list[str]:
    assert method.graft is not None
    start = "the base" if method.graft.identity_at_birth else "changes it"
    return [
        f"[{method.name}]({method.name}.md)",
        *(method.graft.place, "yes", "no", "yes", "yes", start),
        f"{cost:.2f}" if cost else "",
    ]


def _adapted(name: str, layer: nn.Module) -> Any:
    torch.manual_seed(0)
    try:
        return get_peft_model(examples.Holder(layer).eval(), examples.config_of(name))
    except PeftError:
        return None


def _words() -> nn.Module:
    layer = packed.Words(nn.Linear(16, 8))
    assert as_map(layer) is not None
    return layer


def _rows(name: str) -> None:
    model = _adapted(name, examples.BASES["linear"].make())
    examples.move(model)
    x = examples.BASES["linear"].batch(2)
    mixed = model(x, adapter_names=["default", "__base__"])
    assert not torch.allclose(mixed[0], model(x, adapter_names=["__base__"] * 2)[0])


def _stack(name: str) -> None:
    model = _adapted(name, examples.BASES["linear"].make())
    model.add_adapter("second", examples.config_of("lora"))
    model.set_adapter(["default", "second"])
    model(examples.BASES["linear"].batch(2))


def _tried(run: Any) -> bool:
    try:
        run()
    except (PeftError, AssertionError):
        return False
    return True


def _yes(value: bool) -> str:
    return "yes" if value else "no"


if __name__ == "__main__":
    sys.exit(main())
