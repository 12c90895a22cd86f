"""What adapters can be exported to: one file per form, and the table of their names."""

from __future__ import annotations

from deltatune.ship.targets import gguf, ollama, peft, servers
from deltatune.ship.targets.target import Target as Target

TARGETS = {
    "peft": peft.TARGET,
    "vllm": servers.VLLM,
    "sglang": servers.SGLANG,
    "gguf": gguf.TARGET,
    "ollama": ollama.TARGET,
}
