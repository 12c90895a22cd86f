"""What LoRA has beyond its equation: where it starts, and what that takes from data (`deltatune.methods.lora` is LoRA).

`from deltatune.lora import prepare`
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "prepare":  # it knows LoRA, which reads the starts
        from deltatune.lora.preparing import prepare

        return prepare
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
