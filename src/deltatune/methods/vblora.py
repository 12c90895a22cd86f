"""VB-LoRA: W' = W + B A, whose pieces are mixtures of few vectors of one bank.   https://arxiv.org/abs/2405.15179"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune import biases, checks
from deltatune.adapter import Adapter, LinearMap, Method, Stored
from deltatune.architectures import usual_targets as loras_targets
from deltatune.config import PeftType, config
from deltatune.errors import ConfigError
from deltatune.factors import input_dropout
from deltatune.methods.common import LayerConfig, all_linear

NEVER = -1e4  # a logit that is not among the largest, within every floating type
_PLACES = {2**8: torch.uint8, 2**15: torch.int16, 2**31: torch.int32}  # as files number the vectors of a bank


@config
class VBLoRAConfig(LayerConfig):
    """VB-LoRA's options, with PEFT's names and defaults.

    Attributes:
        r: Rank of the update.
        num_vectors: Vectors in the bank, which all layers share.
        vector_length: Their length; it has to divide both sides of every layer.
        topk: How many of them make up one piece of A or B.
        save_only_topk_weights: Files hold which vectors were chosen and their weights instead of all logits. Training
            on from such a file keeps the choice.
        vblora_dropout: Dropout on the input of A, in training.
        init_vector_bank_bound: The bank starts uniform within +- this.
        init_logits_std: Standard deviation with which the logits start.
        fan_in_fan_out: Accepted and ignored: how a layer stores its weight is read off the layer.
    """

    r: int = 4
    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    save_only_topk_weights: bool = False
    vblora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_vector_bank_bound: float = 0.02
    init_logits_std: float = 0.1

    def __post_init__(self) -> None:
        self.peft_type = PeftType.VBLORA
        super().__post_init__()

    def validate(self) -> None:
        super().validate()
        for name in ("r", "num_vectors", "vector_length", "topk"):
            checks.positive_int("VBLoRAConfig", name, getattr(self, name))
        if self.topk > self.num_vectors:
            checks.refuse("VBLoRAConfig", "topk", self.topk, f"at most num_vectors={self.num_vectors}")
        checks.probability("VBLoRAConfig", "vblora_dropout", self.vblora_dropout)
        biases.check("VBLoRAConfig", self.bias, "vblora_only")


class Bank(Stored):
    """Trainable, and shared by all layers: vectors (number, length)."""

    def __init__(self, layers: dict[str, LinearMap], config: VBLoRAConfig) -> None:
        super().__init__()
        bound = config.init_vector_bank_bound
        self.vblora_vector_bank = nn.Parameter(
            torch.empty(config.num_vectors, config.vector_length).uniform_(-bound, bound)
        )


class VBLoRA(Adapter):
    """Trainable: logits, one per vector of the bank, for each piece of A (r, in / length) and B (out / length, r)."""

    identity_at_birth: bool | str = "B A is random: bank and logits are drawn, and no piece is zero"
    views: ClassVar[tuple[str, ...]] = ("vblora_logits_A", "vblora_logits_B", "vblora_dropout", "r", "topk")

    def __init__(self, layer: LinearMap, config: VBLoRAConfig) -> None:
        super().__init__()
        self.r, self.topk, self.only_topk = config.r, config.topk, config.save_only_topk_weights
        self.vblora_dropout = input_dropout(layer, config.vblora_dropout)
        width, out = layer.in_features // config.vector_length, layer.out_features // config.vector_length
        std = config.init_logits_std
        self.vblora_logits_A = nn.Parameter(std * torch.randn(config.r, width, config.num_vectors))
        self.vblora_logits_B = nn.Parameter(std * torch.randn(out, config.r, config.num_vectors))
        if self.only_topk:
            self.lossless = "save_only_topk_weights=True leaves out the logits of vectors that were not chosen"

    @classmethod
    def build(cls, layer: LinearMap, config: VBLoRAConfig, path: str, shared: Bank) -> VBLoRA:
        common = math.gcd(layer.in_features, layer.out_features)
        if common % config.vector_length:
            nearest = max(length for length in range(1, config.vector_length) if common % length == 0)
            raise ConfigError(
                f"VBLoRAConfig: vector_length={config.vector_length} does not divide both sides of {path} "
                f"({layer.out_features}, {layer.in_features}); {nearest} does",
                field="vector_length",
                path=path,
                found=config.vector_length,
                expected=nearest,
            )
        return cls(layer, config)

    def _mixed(self, logits: Tensor) -> Tensor:
        """(pieces, pieces, number) -> (pieces, pieces, length)."""
        largest, places = logits.topk(self.topk)
        bank = self.shared.vblora_vector_bank.to(logits.device)
        return (largest.softmax(-1)[..., None] * bank[places]).sum(-2)

    @property
    def A(self) -> Tensor:
        return self._mixed(self.vblora_logits_A).flatten(1)

    @property
    def B(self) -> Tensor:
        return self._mixed(self.vblora_logits_B).transpose(1, 2).flatten(0, 1)

    def adapt(self, weight: Tensor) -> Tensor:
        return weight + self.B @ self.A

    def low_rank(self, layer: LinearMap) -> tuple[Tensor, Tensor]:
        return self.B, self.A

    def forward(self, x: Any, layer: LinearMap) -> Tensor:
        y = layer(x)
        x = self.vblora_dropout(x)
        return y + layer.mix(layer.apply(x, self.A), self.B).to(y.dtype)

    # Instead of logits a file may hold the places of the chosen vectors and all weights but the last: they sum to one.

    def file_tensors(self) -> dict[str, Tensor]:
        if not self.only_topk:
            return super().file_tensors()
        found = {}
        for name, logits in self.named_parameters():
            largest, places = logits.detach().topk(self.topk)
            kind = next((kind for limit, kind in _PLACES.items() if logits.shape[-1] < limit), torch.int64)
            found[f"{name}_topk_indices"] = places.to(kind)
            found[f"{name}_topk_weights"] = largest.softmax(-1)[..., :-1].contiguous()
        return found

    def load_file_tensors(self, tensors: dict[str, Tensor]) -> None:
        if not self.only_topk:
            return super().load_file_tensors(tensors)
        for name, logits in self.named_parameters():
            weights = tensors[f"{name}_topk_weights"].to(logits)
            weights = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], dim=-1)
            tiny = torch.finfo(logits.dtype).tiny  # rounding may leave nothing, or less, for the last one
            places = tensors[f"{name}_topk_indices"].to(logits.device, torch.int64)
            logits.data.fill_(NEVER).scatter_(-1, places, weights.clamp_min(tiny).log())

    def extra_repr(self) -> str:
        return f"r={self.r}, topk={self.topk}"


_TARGETS: dict[str, list[str]] = {
    "t5": ["q", "k", "v", "o", "wi", "wo"],
    "mt5": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
    **{name: ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"] for name in ("bart", "opt")},
    "deberta-v2": ["query_proj", "key_proj", "value_proj", "dense"],
}


def usual_targets(model_type: str) -> Any:
    return _TARGETS.get(model_type) or loras_targets(model_type)


METHOD = Method(
    PeftType.VBLORA,
    VBLoRAConfig,
    VBLoRA,
    key_prefix="vblora_",
    default_targets=usual_targets,
    shared=Bank,
    learning_rate=5e-3,
    train_options=all_linear,
)
