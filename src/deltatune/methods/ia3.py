"""(IA)^3: W' = diag(l) W, b' = l b; in feed-forward layers W' = W diag(l).   https://arxiv.org/abs/2205.05638"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune import checks
from deltatune.adapter import Adapter, LinearMap, Method
from deltatune.config import PeftType, config
from deltatune.errors import ConfigError, MergeError
from deltatune.methods.common import LayerConfig
from deltatune.patterns import name_matches


@config
class IA3Config(LayerConfig):
    """(IA)^3's options, with PEFT's names and defaults.

    Attributes:
        feedforward_modules: Those of the targets whose input is scaled instead of their output.
        init_ia3_weights: True: all ones. False: random, so that a fresh adapter changes the output.
        fan_in_fan_out: Accepted and ignored: how a layer stores its weight is read off the layer.
    """

    beyond_peer: ClassVar[frozenset[str]] = frozenset({"layers_to_transform", "layers_pattern"})

    feedforward_modules: list[str] | set[str] | str | None = None
    fan_in_fan_out: bool = False
    init_ia3_weights: bool = True

    def __post_init__(self) -> None:
        self.peft_type = PeftType.IA3
        self.feedforward_modules = checks.as_set(self.feedforward_modules)
        super().__post_init__()

    def validate(self) -> None:
        super().validate()
        targets, inner = self.target_modules, self.feedforward_modules
        if not isinstance(targets, set) or not isinstance(inner, set):
            return
        if stray := sorted(inner - targets):
            raise ConfigError(
                f"IA3Config: feedforward_modules names {stray}, which target_modules does not; they are a part of the "
                "targets",
                field="feedforward_modules",
                found=stray,
                expected=sorted(targets),
            )


class IA3(Adapter):
    """Trainable: one vector l, as long as the layer's output, or its input channels in feed-forward layers."""

    base_kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv"})
    stacks = ("is_feedforward", "kernel")
    views: ClassVar[tuple[str, ...]] = ("ia3_l",)

    def __init__(self, layer: LinearMap, on_input: bool, ones: bool) -> None:
        super().__init__()
        self.is_feedforward, self.kernel = on_input, layer.kernel
        features = layer.in_features // layer.kernel if on_input else layer.out_features
        trailing = len(layer.down_shape(1)) - 2  # files keep a convolution's vector as (1, channels, 1, 1)
        matrix_of_outputs = trailing == 0 and not on_input
        shape = (features, 1) if matrix_of_outputs else (1, features, *[1] * trailing)
        if not ones:
            self.identity_at_birth = "init_ia3_weights=False draws the vector"
        drawn = torch.randn(shape)  # in any case, as PEFT does: what is drawn after it is the same there and here
        self.ia3_l = nn.Parameter(torch.ones(shape) if ones else drawn)

    @classmethod
    def build(cls, layer: LinearMap, config: IA3Config, path: str) -> IA3:
        return cls(layer, name_matches(config.feedforward_modules, path), config.init_ia3_weights)

    @property
    def l(self) -> Tensor:  # noqa: E743 - the paper's letter
        return self.ia3_l.flatten(self.rows)

    def adapt(self, weight: Tensor) -> Tensor:
        if self.is_feedforward:
            return weight * self.l.repeat_interleave(self.kernel)
        return self.l[:, None] * weight

    def adapt_bias(self, bias: Tensor | None) -> Tensor | None:
        return bias if bias is None or self.is_feedforward else bias * self.l

    def forward(self, x: Tensor, layer: LinearMap) -> Tensor:
        return layer(layer.scale(x, self.l)) if self.is_feedforward else layer.scale(layer(x), self.l)


_TARGETS: dict[str, tuple[list[str], list[str]]] = {  # model type: (targets, those of them scaled at the input)
    "t5": (["k", "v", "wo"], ["wo"]),
    "mt5": (["k", "v", "wi_1"], []),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), (["c_attn", "mlp.c_proj"], ["mlp.c_proj"])),
    "bloom": (["query_key_value", "mlp.dense_4h_to_h"], ["mlp.dense_4h_to_h"]),
    **dict.fromkeys(
        ("gpt_neox", "RefinedWebModel", "RefinedWeb", "falcon"),
        (["query_key_value", "dense_4h_to_h"], ["dense_4h_to_h"]),
    ),
    **dict.fromkeys(("bert", "roberta"), (["key", "value", "output.dense"], ["output.dense"])),
    "deberta-v2": (["key_proj", "value_proj", "output.dense"], ["output.dense"]),
    "deberta": (["in_proj", "output.dense"], ["output.dense"]),
    "opt": (["q_proj", "k_proj", "fc2"], ["fc2"]),
    **dict.fromkeys(("bart", "phi"), (["q_proj", "v_proj", "fc2"], ["fc2"])),
    "gptj": (["q_proj", "v_proj", "fc_out"], ["fc_out"]),
    "gpt_neo": (["q_proj", "v_proj", "c_proj"], ["c_proj"]),
    **dict.fromkeys(("llama", "mistral"), (["k_proj", "v_proj", "down_proj"], ["down_proj"])),
    "mixtral": (["k_proj", "v_proj", "w2"], ["w2"]),
    **dict.fromkeys(
        ("llama4", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"),
        (["q_proj", "v_proj", "down_proj"], ["down_proj"]),
    ),
}


def usual_targets(model_type: str) -> Any:
    """Targets of an architecture and its feed-forward layers among them, or None."""
    found = _TARGETS.get(model_type)
    return found and {"target_modules": set(found[0]), "feedforward_modules": set(found[1])}


def _weighted_sum(layers: dict[str, list[tuple[float, Any]]]) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """The weighted sum of the vectors, as in PEFT; an adapter that is not on a layer has ones there."""
    on_input, tensors = [], {}
    for path, terms in layers.items():
        there = [adapter for _, adapter in terms if adapter is not None]
        if len({adapter.is_feedforward for adapter in there}) > 1:
            raise MergeError(
                f"adapters: one scales the input of {path}, another its output, and one vector cannot do both; give "
                "svd_rank, for a LoRA adapter",
                field="adapters",
                path=path,
            )
        on_input += [path] if there[0].is_feedforward else []
        ones = torch.ones_like(there[0].ia3_l)
        tensors[path] = {"ia3_l": sum(w * (ones if adapter is None else adapter.ia3_l) for w, adapter in terms)}
    return {"part": ("feedforward_modules", on_input)}, tensors


METHOD = Method(
    PeftType.IA3,
    IA3Config,
    IA3,
    key_prefix="ia3_",
    default_targets=usual_targets,
    learning_rate=8e-3,
    weighted_sum=_weighted_sum,
)
