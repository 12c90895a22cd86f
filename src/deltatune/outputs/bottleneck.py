"""Bottleneck adapters: h' = h + s (U f(D h + b) + c), or U f(D x + b) beside the layer.   https://arxiv.org/abs/1902.00751

D narrows, f bends, U widens and starts at zero. Three places for it, with the choices of their papers:

houlsby    behind every attention and feed-forward layer                      https://arxiv.org/abs/1902.00751
pfeiffer   behind the feed-forward layers                                     https://arxiv.org/abs/2005.00247
parallel   beside the feed-forward blocks, reading their input                https://arxiv.org/abs/2110.04366
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from deltatune import checks
from deltatune.adapter import Adapter, LinearMap, Method
from deltatune.config import PeftType, config
from deltatune.errors import ConfigError
from deltatune.factors import Factor
from deltatune.methods.common import LayerConfig

BENT: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "swish": functional.silu,
    "tanh": torch.tanh,
}
PRESETS: dict[str, dict[str, Any]] = {
    "houlsby": {"parallel": False, "reduction_factor": 16.0, "non_linearity": "gelu", "scaling": 1.0},
    "pfeiffer": {"parallel": False, "reduction_factor": 16.0, "non_linearity": "relu", "scaling": 1.0},
    "parallel": {"parallel": True, "reduction_factor": 2.0, "non_linearity": "relu", "scaling": 4.0},
}


@config
class BottleneckConfig(LayerConfig):
    """Options of a bottleneck; those left at None are the preset's.

    Attributes:
        preset: "houlsby", "pfeiffer" or "parallel": the layers when none are named, and the values of what follows.
        parallel: Read the input of the layer instead of its output; targets may be whole blocks ("mlp").
        reduction_factor: How many times narrower than its input the bottleneck is.
        size: Width of the bottleneck, instead of the factor.
        non_linearity: "relu", "gelu", "swish" or "tanh".
        scaling: Factor s.
        dropout: Share of the bottleneck's numbers that are set to zero, in training.
        init_weights: True starts at zero change, False at random.
    """

    preset: str = "houlsby"
    parallel: bool | None = None
    reduction_factor: float | None = None
    size: int | None = None
    non_linearity: str | None = None
    scaling: float | None = None
    dropout: float = 0.0
    init_weights: bool = True

    def __post_init__(self) -> None:
        self.peft_type = PeftType.BOTTLENECK
        checks.one_of(type(self).__name__, "preset", self.preset, tuple(PRESETS))
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None and not (name == "reduction_factor" and self.size is not None):
                setattr(self, name, value)
        super().__post_init__()

    def validate(self) -> None:
        super().validate()
        owner = type(self).__name__
        checks.one_of(owner, "preset", self.preset, tuple(PRESETS))
        checks.one_of(owner, "non_linearity", self.non_linearity, tuple(BENT))
        checks.finite_positive(owner, "scaling", self.scaling)
        checks.probability(owner, "dropout", self.dropout)
        if (self.size is None) == (self.reduction_factor is None):
            raise ConfigError(
                f"{owner}: size={self.size} and reduction_factor={self.reduction_factor}: give one of them",
                field="size",
                found=(self.size, self.reduction_factor),
            )
        if self.size is not None:
            checks.positive_int(owner, "size", self.size)
        else:
            checks.finite_positive(owner, "reduction_factor", self.reduction_factor)

    def width(self, features: int) -> int:
        """Of the bottleneck of a layer with so many features."""
        return self.size or max(1, int(features / (self.reduction_factor or 1.0)))


class Bottleneck(Adapter):
    """Trainable: D (size, in), b (size), U (out, size), c (out); `in` is the layer's output unless it is parallel."""

    base_kinds: ClassVar[frozenset[str]] = frozenset({"linear", "embedding", "conv", "block"})
    mergeable: bool | str = "it bends what it adds"
    stacks = ("parallel", "bend")
    row_numbers: ClassVar[tuple[str, ...]] = ("scaling",)
    views: ClassVar[tuple[str, ...]] = ("adapter_down", "adapter_up", "scaling", "parallel")

    def __init__(
        self, layer: LinearMap, size: int, parallel: bool, bend: str, scaling: float, dropout: float, zero: bool
    ) -> None:
        super().__init__()
        self.parallel, self.bend, self.scaling = parallel, bend, scaling
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.adapter_down = Factor(*(layer.down_shape(size) if parallel else (size, layer.out_features)), bias=size)
        self.adapter_up = Factor(layer.out_features, size, bias=layer.out_features)
        nn.init.kaiming_uniform_(self.adapter_down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.adapter_up.weight)
        if not zero:
            nn.init.kaiming_uniform_(self.adapter_up.weight, a=math.sqrt(5))
            self.identity_at_birth = "init_weights=False draws both factors"

    @classmethod
    def build(cls, layer: LinearMap, config: BottleneckConfig, path: str) -> Bottleneck:
        features = (
            layer.in_features // layer.kernel if config.parallel and layer.kind != "embedding" else layer.out_features
        )
        return cls(
            layer,
            config.width(features),
            bool(config.parallel),
            str(config.non_linearity),
            float(config.scaling or 1.0),
            config.dropout,
            config.init_weights,
        )

    def forward(self, x: Any, layer: LinearMap, **values: Any) -> Tensor:
        y = layer(x)
        narrow = layer.apply(x, self.adapter_down.matrix) if self.parallel else layer.mix(y, self.adapter_down.weight)
        narrow = self.dropout(BENT[self.bend](shifted(layer, narrow, self.adapter_down.bias)))
        wide = shifted(layer, layer.mix(narrow, self.adapter_up.weight), self.adapter_up.bias)
        return y + (self.scaling * wide).to(y.dtype)

    def extra_repr(self) -> str:
        return f"parallel={self.parallel}, non_linearity={self.bend}, scaling={self.scaling:g}"


def shifted(layer: LinearMap, y: Tensor, bias: Tensor | None) -> Tensor:
    """Plus a number per feature, on whichever axis the features of a layer are."""
    assert bias is not None
    return y + layer.scale(torch.ones((), dtype=y.dtype, device=y.device).expand_as(y), bias)


# Architecture -> output of attentions, output of feed-forward layers, feed-forward blocks.
_LLAMA = (["o_proj"], ["down_proj"], ["mlp"])
_BART = (["out_proj"], ["fc2"], None)
_BERT = (["output.dense"], r".*layer\.\d+\.output\.dense", None)
_PLACES: dict[str, tuple[Any, Any, Any]] = {
    **dict.fromkeys(("llama", "mistral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3", "phi3", "olmo2"), _LLAMA),
    **dict.fromkeys(("bart", "mbart", "pegasus", "m2m_100", "marian", "blenderbot", "opt", "whisper"), _BART),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "camembert", "layoutlm"), _BERT),
    **dict.fromkeys(("t5", "mt5", "umt5"), (["o"], ["wo"], ["DenseReluDense"])),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), (["attn.c_proj"], ["mlp.c_proj"], ["mlp"])),
    "gpt_neo": (["attention.out_proj"], ["mlp.c_proj"], ["mlp"]),
    "gpt_neox": (["attention.dense"], ["dense_4h_to_h"], ["mlp"]),
    "gptj": (["attn.out_proj"], ["fc_out"], ["mlp"]),
    "phi": (["self_attn.dense"], ["fc2"], ["mlp"]),
    "distilbert": (["out_lin"], ["lin2"], ["ffn"]),
    "bloom": (["self_attention.dense"], ["dense_4h_to_h"], ["mlp"]),
    "falcon": (["self_attention.dense"], ["dense_4h_to_h"], ["mlp"]),
}


def places(model_type: str) -> Any:
    """The layers that a preset means in an architecture, or None."""
    if model_type not in _PLACES:
        return None
    attention, feed_forward, block = _PLACES[model_type]
    both = attention if isinstance(feed_forward, str) else [*attention, *feed_forward]
    return lambda config: {"houlsby": both, "pfeiffer": feed_forward, "parallel": block}[config.preset]


def behind_each_layer(model_type: str) -> Any:
    """The output projections of all attentions and feed-forward layers, or None."""
    return places(model_type)(BottleneckConfig()) if model_type in _PLACES else None


METHOD = Method(
    PeftType.BOTTLENECK, BottleneckConfig, Bottleneck, key_prefix="adapter_", default_targets=places, learning_rate=1e-3
)
