"""BEFT: y = W x + b + d, one trained vector added to the bias.   https://arxiv.org/abs/2509.15974"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune.adapter import Adapter, LinearMap, Method
from deltatune.config import PeftType, config
from deltatune.factors import shift
from deltatune.methods.common import LayerConfig


@config
class BeftConfig(LayerConfig):
    """BEFT's options, with PEFT's names and defaults.

    Attributes:
        init_weights: True: d = 0. False: random, so that a fresh adapter changes the output.
    """

    beyond_peer: ClassVar[frozenset[str]] = frozenset({"exclude_modules", "layers_to_transform", "layers_pattern"})

    init_weights: bool = True

    def __post_init__(self) -> None:
        self.peft_type = PeftType.BEFT
        super().__post_init__()


class BiasShift(Adapter):
    """Trainable: d, as long as the layer's output. A layer without bias gets one, which its weights cannot hold."""

    base_kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv"})
    stacks = ()
    views: ClassVar[tuple[str, ...]] = ("beft_bias",)

    def __init__(self, layer: LinearMap, zero: bool) -> None:
        super().__init__()
        if not zero:
            self.identity_at_birth = "init_weights=False draws the vector"
        shape = (1, layer.out_features)  # as files keep it
        self.beft_bias = nn.Parameter(torch.zeros(shape) if zero else torch.randn(shape))

    @classmethod
    def build(cls, layer: LinearMap, config: BeftConfig, path: str) -> BiasShift:
        return cls(layer, config.init_weights)

    def adapt(self, weight: Tensor) -> Tensor:
        return weight

    def adapt_bias(self, bias: Tensor | None) -> Tensor:
        d = self.beft_bias.flatten()
        return d if bias is None else bias + d

    def forward(self, x: Any, layer: LinearMap) -> Tensor:
        return shift(layer(x), self.beft_bias.flatten(self.rows), layer)


_V_PROJ = (
    *("opt", "gptj", "gpt_neo", "bart", "llama", "llama4", "mistral", "mixtral", "phi"),
    *("gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"),
)
_TARGETS: dict[str, list[str]] = {
    **{name: ["v_proj"] for name in _V_PROJ},
    **{name: ["v"] for name in ("t5", "mt5")},
    **{name: ["value"] for name in ("bert", "roberta")},
    "deberta-v2": ["value_proj"],
    **{name: ["c_attn"] for name in ("gpt2", "gpt_bigcode")},  # the values are a third of it
}


def usual_targets(model_type: str) -> Any:
    """The projection that makes an architecture's values, or None."""
    return _TARGETS.get(model_type)


METHOD = Method(
    PeftType.BEFT, BeftConfig, BiasShift, key_prefix="beft_", default_targets=usual_targets, learning_rate=1e-2
)
