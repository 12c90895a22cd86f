"""`deltatune demo`: prefix tuning, LoRA and full fine-tuning of the embedded model, beside the untouched base."""

from __future__ import annotations

from pathlib import Path

from deltatune.cli.show import console


def demo(output: str, quick: bool) -> None:
    from deltatune.demo.run import run_demo

    run_demo(Path(output), quick=quick, console=console())
