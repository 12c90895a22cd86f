"""`deltatune env`: versions, devices, threads and memory, for a bug report."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from deltatune.cli.show import console, facts
from deltatune.report.words import size

PACKAGES = ("deltatune", "torch", "transformers", "accelerate", "safetensors", "tokenizers", "huggingface_hub", "peft")


def environment() -> dict[str, Any]:
    """What decides how and where things run."""
    import psutil
    import torch

    memory = psutil.virtual_memory()
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "processors": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": memory.total,
        "memory_available_bytes": memory.available,
        "gpus": [{"name": gpu.name, "memory_bytes": gpu.total_memory} for gpu in gpus],
        "cuda": torch.version.cuda,
        "mps": torch.backends.mps.is_available(),
        "bfloat16_on_gpu": bool(gpus) and torch.cuda.is_bf16_supported(),
        "offline": os.environ.get("HF_HUB_OFFLINE") in ("1", "true", "True", "ON"),
    }


def env(as_json: bool) -> None:
    found = environment()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    gpus = [f"{gpu['name']}, {size(gpu['memory_bytes'])}" for gpu in found["gpus"]]
    console().print(
        facts(
            [
                ("python", f"{found['python']}, {found['platform']}"),
                *((name, number or "not installed") for name, number in found["packages"].items()),
                ("processors", f"{found['processors']}, torch uses {found['torch_threads']} threads"),
                ("memory", f"{size(found['memory_bytes'])}, {size(found['memory_available_bytes'])} available"),
                ("accelerator", "; ".join(gpus) or ("mps" if found["mps"] else "none, models run on the processor")),
                ("hub", "offline (HF_HUB_OFFLINE)" if found["offline"] else "online"),
            ]
        )
    )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
