"""How the next token is chosen: greedy, beams or sampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deltatune.errors import ConfigError


@dataclass(frozen=True)
class Decoding:
    """Settings of one generation; names are those of transformers' `generate`."""

    max_new_tokens: int | None = None  # None: as long as answers were in training
    num_beams: int = 1
    sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 42
    batch_size: int = 16

    def __post_init__(self) -> None:
        usual = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
        changed = [name for name, value in usual.items() if getattr(self, name) != value]
        if changed and not self.sample:
            name = changed[0]
            raise ConfigError(f"{name}={getattr(self, name)} acts with sampling only; add --sample", field=name)
        if self.sample and self.temperature <= 0:
            raise ConfigError("temperature=0 is greedy decoding; leave --sample out", field="temperature")
        if self.sample and self.top_p <= 0:
            raise ConfigError("top_p=0 leaves no token to choose; use a share above 0", field="top_p")

    def arguments(self, usual_length: int) -> dict[str, Any]:
        """Keyword arguments for `generate`."""
        common = {
            "max_new_tokens": self.max_new_tokens or usual_length,
            "num_beams": self.num_beams,
            "do_sample": self.sample,
        }
        if not self.sample:
            return common
        return {**common, "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
