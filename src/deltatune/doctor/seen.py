"""An adapter folder as every program sees it: its config, and the names and shapes of its tensors."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from math import sqrt
from typing import Any

from deltatune.inspect.adapter import AdapterFacts, pattern
from deltatune.patterns import pattern_value

ROOT = "base_model.model."
_FACTOR = re.compile(r"\.(lora_(?:A|B)\.weight|lora_embedding_(?:A|B))$")
ON_TOKENS = ("alora_invocation_tokens", "arrow_config")  # LoRA that differs from token to token: no weight can hold it
_EXPERTS = re.compile(r"\.experts(\.base_layer)?$")


@dataclass(frozen=True)
class Seen:
    """A folder, looked at once for all programs.

    Attributes:
        values: `adapter_config.json` as it stands there.
        facts: What `deltatune inspect` says of it.
        mergeable: Whether a weight can hold what it does.
        beside: Names of the other files in the folder.
    """

    folder: str
    values: dict[str, Any]
    facts: AdapterFacts
    mergeable: bool
    beside: frozenset[str] = frozenset()
    shapes: dict[str, tuple[int, ...]] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shapes", {tensor.name: tensor.shape for tensor in self.facts.tensors})

    @property
    def method(self) -> str:
        return self.facts.method

    def has(self, name: str) -> bool:
        """Whether the config asks for something there, rather than leaving it empty, false or out."""
        return bool(self.values.get(name))

    # ----------------------------------------------------------------------------------------- LoRA's factors, by layer

    @cached_property
    def ranks(self) -> dict[str, int]:
        """Layer -> the rank of its A as it is in the file; experts in one parameter are not among them."""
        found = {}
        for name, shape in self.shapes.items():
            if name.endswith((".lora_A.weight", ".lora_embedding_A")):
                layer = _FACTOR.sub("", name).removeprefix(ROOT)
                if not _EXPERTS.search(layer):
                    found[layer] = shape[0]
        return found

    @cached_property
    def experts(self) -> list[str]:
        """Layers with the factors of several experts in one tensor (`target_parameters`)."""
        layers = {_FACTOR.sub("", name) for name in self.shapes if _FACTOR.search(name)}
        return sorted(layer.removeprefix(ROOT) for layer in layers if _EXPERTS.search(layer))

    @cached_property
    def strange(self) -> list[str]:
        """Tensors that are no factor of LoRA."""
        return [name for name in self.shapes if not _FACTOR.search(name)]

    @property
    def highest_rank(self) -> int:
        return max([*self.ranks.values(), *([int(self.values.get("r") or 0)])], default=0)

    def scaling(self, layer: str) -> float:
        """The scaling that was trained with: alpha / r or alpha / sqrt(r), with the layer's own values of both."""
        r = pattern_value(self.values.get("rank_pattern") or {}, layer, self.values.get("r", 8))
        alpha = pattern_value(self.values.get("alpha_pattern") or {}, layer, self.values.get("lora_alpha", 8))
        return alpha / (sqrt(r) if self.has("use_rslora") else r)

    def otherwise(self, scaling: Any) -> list[str]:
        """The layers that another rule for the scaling gets wrong; it is given the layer and its rank."""
        return [
            layer for layer, rank in self.ranks.items() if abs(scaling(layer, rank) / self.scaling(layer) - 1) > 1e-6
        ]

    # ------------------------------------------------------------------------------------------------------------ fixes

    def fix(self, verb: str, options: str = "") -> str:
        return f"deltatune {verb} {self.folder} OUT {options}".strip()

    @property
    def as_lora(self) -> str:
        return self.fix("convert", "--to lora")

    @property
    def way_out(self) -> str:
        return self.as_lora if self.mergeable else ""

    @property
    def merged(self) -> str:
        return self.fix("merge")


def some(names: list[str], limit: int = 3) -> str:
    """The first few names and how many more there are; layers whose paths differ in numbers only count as one."""
    groups: dict[str, int] = {}
    for name in names:
        groups[pattern(name)] = groups.get(pattern(name), 0) + 1
    told = [f"{name} ({count} times)" if count > 1 else name for name, count in groups.items()]
    more = len(told) - limit
    return ", ".join(told[:limit]) + (f" and {more} more" if more > 0 else "")
