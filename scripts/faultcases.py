"""The faults of `docs/reliability.md`: one function each, which does the same to any library with PEFT's names.

A case gets the library, an empty folder and a fresh tiny model. It raises what the library raises; where that returns,
it says whether the result is right ("handled") or what is wrong with it. `FAULTS` is the registry: a further group of
cases is one more `@fault`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.core.tiny import batch, logits, tiny

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
HANDLED = "handled"
KEY = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


@dataclass(frozen=True)
class Fault:
    """A case: its row in the matrix, what a clear message names, and the call."""

    row: int
    name: str
    words: tuple[str, ...]
    put: Callable[[Any, Path], str]


FAULTS: list[Fault] = []


def fault(row: int, name: str, *words: str) -> Callable[[Callable[[Any, Path], str]], Callable[[Any, Path], str]]:
    """Register a case; its function returns HANDLED, "wrong: ..." or "lost: ..." where nothing was raised."""

    def register(put: Callable[[Any, Path], str]) -> Callable[[Any, Path], str]:
        FAULTS.append(Fault(row, name, words, put))
        return put

    return register


def adapted(lib: Any, seed: int = 1, **options: Any) -> Any:
    """A model with an adapter that does something."""
    model = lib.get_peft_model(tiny("llama"), lib.LoraConfig(task_type="CAUSAL_LM", **{"r": 4, **options})).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) / 3)
    return model


def of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return logits(model, batch("llama"))


def option(row: int, field: str, value: Any, **more: Any) -> None:
    """A value of LoraConfig that cannot be meant."""

    @fault(row, f"`{field}={value!r}`"[:60], field.split("_")[-1])
    def put(lib: Any, room: Path) -> str:
        lib.get_peft_model(tiny("llama"), lib.LoraConfig(**{"target_modules": ["q_proj"], **more, field: value}))
        return "wrong: accepted"


for wrong in (0, -4, 2.5, True, "8"):
    option(1, "r", wrong)
for wrong in (math.nan, math.inf, 0, -16):
    option(2, "lora_alpha", wrong)
for wrong in (math.nan, -0.1, 1.5):
    option(3, "lora_dropout", wrong)
option(4, "lora_alhpa", 3)
option(12, "target_modules", "q_proj|(")
option(12, "target_modules", [1, 2])
option(17, "layers_to_transform", [0, 99])
option(18, "target_modules", ["q_porj"])
option(19, "target_modules", ["q_proj", "nowhere"])
option(20, "rank_pattern", {"nowhere": 3})
option(20, "modules_to_save", ["nowhere"])


@fault(13, "pattern that backtracks", "aa")
def backtracking(lib: Any, room: Path) -> str:
    model = torch.nn.ModuleDict({"a" * 60: torch.nn.Linear(4, 4), "b": torch.nn.Linear(4, 4)})
    lib.get_peft_model(model, lib.LoraConfig(target_modules="(a|aa)+b|b", r=2))
    return HANDLED


@fault(24, "adapter named `layers` beside `default`, saved")
def name_of_a_path(lib: Any, room: Path) -> str:
    model = adapted(lib)
    model.add_adapter("layers", lib.LoraConfig(r=2))
    expected = of(model)
    model.save_pretrained(room)
    right = torch.equal(of(lib.PeftModel.from_pretrained(tiny("llama"), room)), expected)
    return HANDLED if right else "lost: the tensors of `default`"


@fault(23, "adapter named as an absolute path, saved", "name")
def name_outside(lib: Any, room: Path) -> str:
    model = adapted(lib)
    model.add_adapter(str(room / "outside"), lib.LoraConfig(r=2))
    model.save_pretrained(room / "inside")
    return "wrong: written outside of the folder" if (room / "outside").exists() else HANDLED


def loaded(row: int, name: str, *words: str) -> Callable[[Callable[[Path], None]], None]:
    """A folder that is spoilt by the function, and loaded by `load_adapter`."""

    def register(spoil: Callable[[Path], None]) -> None:
        @fault(row, name, *words)
        def put(lib: Any, room: Path) -> str:
            adapted(lib).save_pretrained(room)
            spoil(room)
            model = adapted(lib, seed=5)
            before = of(model)
            with model.disable_adapter():
                base = of(model)
            model.load_adapter(room, "second")
            model.set_adapter("default")
            with model.disable_adapter():
                if not torch.equal(of(model), base):
                    return "lost: the weights of the base"
            return "wrong: loaded" if torch.equal(of(model), before) else "wrong: the other adapter has changed"

    return register


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    return lambda room: save_file(change(load_file(room / WEIGHTS)), room / WEIGHTS)


def values(**changed: Any) -> Callable[[Path], None]:
    return lambda room: (
        (room / CONFIG).write_text(json.dumps({**json.loads((room / CONFIG).read_text()), **changed})) and None
    )  # type: ignore[return-value]


def text(content: str) -> Callable[[Path], None]:
    return lambda room: (room / CONFIG).write_text(content) and None  # type: ignore[return-value]


def cut(room: Path) -> None:
    (room / WEIGHTS).write_bytes((room / WEIGHTS).read_bytes()[:-7])


def flip(room: Path) -> None:
    content = bytearray((room / WEIGHTS).read_bytes())
    content[-3] ^= 64
    (room / WEIGHTS).write_bytes(content)


loaded(4, "unknown field in the config", "lora_alhpa")(values(lora_alhpa=3))
loaded(6, "rank as a string in the config", "r=")(values(r="4"))
loaded(7, "key twice in the config", "'r'")(text('{"peft_type": "LORA", "r": 4, "r": 8, "target_modules": ["q_proj"]}'))
loaded(8, "NaN in the config", "NaN")(text('{"peft_type": "LORA", "lora_alpha": NaN, "target_modules": ["q_proj"]}'))
loaded(9, "truncated config", CONFIG)(text('{"peft_type": "LO'))
loaded(9, "config that is a list", CONFIG)(text("[1]"))
loaded(11, "unknown method in the config", "NOPE")(values(peft_type="NOPE"))
loaded(32, "truncated weights", WEIGHTS)(cut)
loaded(33, "one flipped bit", WEIGHTS)(flip)
loaded(35, "a key is missing", KEY)(tensors(lambda t: {k: v for k, v in t.items() if k != KEY}))
loaded(35, "no key at all", "missing")(tensors(lambda t: {}))
loaded(36, "keys of other layers", "h.1")(tensors(lambda t: {k.replace("layers", "h"): v for k, v in t.items()}))
loaded(37, "a weight of the base", "_proj.weight")(
    tensors(lambda t: {**t, "base_model.model.model.layers.0.self_attn.k_proj.weight": torch.zeros(8, 16),
                       "base_model.model.model.layers.0.self_attn.q_proj.weight": torch.zeros(16, 16)})
)  # fmt: skip
loaded(38, "a transposed tensor", KEY.removesuffix("lora_A.weight"))(
    tensors(lambda t: {**t, KEY: t[KEY].T.contiguous()})
)
loaded(39, "NaN in a tensor", KEY)(tensors(lambda t: {**t, KEY: t[KEY] * math.nan}))
loaded(40, "integers in a tensor", KEY)(tensors(lambda t: {**t, KEY: t[KEY].int()}))
loaded(46, "another rank in the config", "r")(values(r=8))


@fault(41, "loaded onto another base of equal shapes", "base")
def another_base(lib: Any, room: Path) -> str:
    adapted(lib).save_pretrained(room)
    lib.PeftModel.from_pretrained(tiny("llama", seed=9), room)
    return "wrong: loaded"


@fault(47, "load that failed, then the good folder under the same name")
def retry(lib: Any, room: Path) -> str:
    good = adapted(lib)
    good.save_pretrained(room / "good")
    adapted(lib, r=2).save_pretrained(room / "bad")
    tensors(lambda t: {k: v.T.contiguous() for k, v in t.items()})(room / "bad")
    model = adapted(lib, seed=5)
    try:
        model.load_adapter(room / "bad", "second")
    except Exception:
        model.load_adapter(room / "good", "second")
    model.set_adapter("second")
    return HANDLED if torch.equal(of(model), of(good)) else "wrong: another adapter than the file's"


@fault(57, "NaN weights saved over good ones", "lora_")
def save_nan(lib: Any, room: Path) -> str:
    model = adapted(lib)
    model.save_pretrained(room)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).fill_(math.nan)
    model.save_pretrained(room)
    return "lost: the good adapter"


@fault(54, "config that JSON has not, saved over a good one", "base_model_name_or_path")
def save_unwritable(lib: Any, room: Path) -> str:
    adapted(lib).save_pretrained(room)
    model = adapted(lib, seed=2)
    model.peft_config["default"].revision = object()
    before = {path.name: path.read_bytes() for path in room.iterdir()}
    try:
        model.save_pretrained(room)
    except Exception:
        if {path.name: path.read_bytes() for path in room.iterdir()} != before:
            return "lost: the good adapter"
        return HANDLED
    return "wrong: saved"


@fault(58, "a user's README with broken YAML in the folder")
def readme(lib: Any, room: Path) -> str:
    (room / "README.md").write_text("---\nbroken: [\n---\n")
    adapted(lib).save_pretrained(room)
    return HANDLED if (room / WEIGHTS).is_file() else "wrong: not saved"


@fault(65, "merged and unmerged ten times in bfloat16")
def unmerge(lib: Any, room: Path) -> str:
    model = lib.get_peft_model(tiny("llama").bfloat16(), lib.LoraConfig(r=4, init_lora_weights=False))
    with model.disable_adapter():
        before = of(model)
    for _ in range(10):
        model.merge_adapter()
        model.unmerge_adapter()
    with model.disable_adapter():
        return HANDLED if torch.equal(of(model), before) else "lost: the weights of the base"


@fault(63, "NaN in the last layer, merged with `safe_merge=True`", "layers.2")
def merge_nan(lib: Any, room: Path) -> str:
    model = adapted(lib)
    with torch.no_grad():
        [p for n, p in model.named_parameters() if "lora_B" in n][-1].fill_(math.nan)
    model.merge_and_unload(safe_merge=True)
    return "wrong: merged"
