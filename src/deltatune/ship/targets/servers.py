"""vLLM and SGLang: an adapter folder with LoRA as they read it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from deltatune.doctor import diagnose
from deltatune.fused.export import PER_EXPERT
from deltatune.generate.load import Ready
from deltatune.inspect import inspect_adapter
from deltatune.ship.targets.target import Target
from deltatune.ship.uniform import uniform
from deltatune.storage.folder import write as write_folder

TOGETHER = ("q_proj", "k_proj", "v_proj")  # what SGLang stacks


def write(program: str, together: tuple[str, ...], ready: Ready, adapter: str, folder: Path) -> None:
    """The adapter as it is where the program reads it so, and else as plain LoRA of one rank."""
    verdict = diagnose(adapter, [program]).verdicts[program]
    model: Any = ready.model
    if any(finding.effect == "unsure" for finding in verdict.findings):
        model.save_pretrained(str(folder), format=PER_EXPERT)
    elif verdict.loads:
        model.save_pretrained(str(folder))
    else:
        config, tensors = uniform(model, together)
        write_folder(folder, config, tensors, model.get_base_model())


def _rank(out: str) -> int:
    return max((layer.rank for layer in inspect_adapter(out).spectra), default=8)


def _base(ready: Ready) -> str:
    model: Any = ready.model
    return model.active_peft_config.base_model_name_or_path or "BASE"


def vllm(out: str, ready: Ready) -> str:
    rank = next((known for known in (8, 16, 32, 64, 128, 256, 320, 512) if known >= _rank(out)), 512)
    return f"vllm serve {_base(ready)} --enable-lora --max-lora-rank {rank} --lora-modules adapter={out}"


def sglang(out: str, ready: Ready) -> str:
    base = f"python -m sglang.launch_server --model-path {_base(ready)}"
    return f"{base} --enable-lora --max-lora-rank {_rank(out)} --lora-paths adapter={out}"


VLLM = Target(partial(write, "vllm", ()), vllm, program="vllm")
SGLANG = Target(partial(write, "sglang", TOGETHER), sglang, program="sglang")
