"""LN tuning: g' = T, b' = t, norms trained whole beside a frozen rest.   https://arxiv.org/abs/2312.11420"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune.adapter import Adapter, LinearMap, Method
from deltatune.config import PeftType, config
from deltatune.factors import Factor, block_diagonal
from deltatune.methods.common import LayerConfig
from deltatune.targets import map_of, walk


@config
class LNTuningConfig(LayerConfig):
    """The options of LN tuning, with PEFT's names and defaults.

    Attributes:
        target_modules: As for every method; by default the architecture's norms. Any other layer may be named too.
    """

    beyond_peer: ClassVar[frozenset[str]] = frozenset({"layers_to_transform", "layers_pattern"})

    def __post_init__(self) -> None:
        self.peft_type = PeftType.LN_TUNING
        super().__post_init__()


class LNTuning(Adapter):
    """Trainable: a copy of the layer's weight and bias, as the layer keeps them, which replaces both."""

    base_kinds: ClassVar[frozenset[str]] = frozenset({"module", "linear", "embedding", "conv"})
    replaces: ClassVar[bool] = True
    views: ClassVar[tuple[str, ...]] = ("ln_tuning_layers",)

    def __init__(self, weight: Tensor, bias: Tensor | None, turned: bool) -> None:
        super().__init__()
        self.turned = turned
        self.ln_tuning_layers = Factor(*weight.shape)
        self.ln_tuning_layers.weight = nn.Parameter(weight)
        self.ln_tuning_layers.bias = None if bias is None else nn.Parameter(bias)

    @classmethod
    @torch.no_grad()
    def build(cls, layer: LinearMap, config: LNTuningConfig, path: str) -> LNTuning:
        weight, bias = layer.store(layer.weight), layer.bias
        return cls(weight.clone(), None if bias is None else bias.clone(), layer.turned)

    def matrix(self, in_features: int) -> Tensor:
        """The copy as a matrix (out, in)."""
        T = self.ln_tuning_layers.weight
        matrix = T.T if self.turned else T if T.ndim == 2 else T.reshape(len(T), -1)
        return block_diagonal(matrix, in_features // matrix.shape[1])  # of a grouped convolution

    def adapt(self, weight: Tensor) -> Tensor:
        return self.matrix(weight.shape[1])

    def adapt_bias(self, bias: Tensor | None) -> Tensor | None:
        return self.ln_tuning_layers.bias

    def forward(self, x: Any, layer: LinearMap) -> Tensor:
        return layer.apply(x, self.matrix(layer.in_features), self.ln_tuning_layers.bias)


_LLAMA = ["input_layernorm", "post_attention_layernorm", "norm"]
_GEMMA = [*_LLAMA, "pre_feedforward_layernorm", "post_feedforward_layernorm"]
_TARGETS: dict[str, list[str]] = {
    **dict.fromkeys(("llama", "mistral", "gemma"), _LLAMA),
    **dict.fromkeys(("gemma2", "gemma3_text"), _GEMMA),
    **{name: ["input_layernorm", "post_attention_layernorm", "ln_f"] for name in ("bloom", "falcon")},
    **{name: ["layer_norm", "final_layer_norm"] for name in ("t5", "mt5")},
    **{name: ["post_attention_layernorm"] for name in ("qwen2", "qwen3")},
    "bart": ["self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"],
    "gpt2": ["ln_1", "ln_2", "ln_f"],
    "gptj": ["ln_1", "ln_f"],
    "blip-2": ["layernorm", "LayerNorm", "final_layer_norm", "self_attn_layer_norm"],
    "phi": ["input_layernorm", "final_layernorm"],
}


def usual_targets(model_type: str) -> Any:
    """The norms of an architecture that PEFT trains, or None."""
    return _TARGETS.get(model_type)


def _norms(model: nn.Module) -> set[str] | None:
    """The paths of what has one gain per feature."""
    layers = {path: map_of(module) for path, module in walk(model)}
    return {
        path for path, layer in layers.items() if layer is not None and (layer.kind, layer.in_features) == ("module", 1)
    } or None


METHOD = Method(
    PeftType.LN_TUNING,
    LNTuningConfig,
    LNTuning,
    key_prefix="ln_tuning_",
    default_targets=usual_targets,
    find_targets=_norms,
    learning_rate=2e-3,
)
