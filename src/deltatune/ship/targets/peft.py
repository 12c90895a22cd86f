"""HuggingFace PEFT: its folder, with numbers that mean the same there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deltatune.generate.load import Ready
from deltatune.ship.targets.target import Target


def write(ready: Ready, adapter: str, folder: Path) -> None:
    model: Any = ready.model
    model.save_pretrained(str(folder), format="peft")


def use(out: str, ready: Ready) -> str:
    return f"peft.PeftModel.from_pretrained(base, {out!r})"


TARGET = Target(write, use, program="peft")
