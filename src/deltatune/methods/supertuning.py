"""Super-Tuning: W' = W + S, S non-zero only where |W| is largest; Supra adds B A.   https://arxiv.org/abs/2607.09287"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune import checks
from deltatune.adapter import Adapter, LinearMap, Method
from deltatune.architectures import usual_targets
from deltatune.config import PeftType, config
from deltatune.errors import ConfigError, MismatchError
from deltatune.factors import Factor, dense_enough, input_dropout, sparse_linear
from deltatune.methods.common import LayerConfig, all_linear
from deltatune.one_product import through_entries, with_entries


@config
class SupertuningConfig(LayerConfig):
    """Super-Tuning's options, with PEFT's names.

    Attributes:
        sparsity: Share of a weight's entries that stay frozen; 0.99 trains one in a hundred.
        select_top: Train the largest entries by magnitude; False the smallest.
        r: Rank of an update B A beside them (Supra), scaled by lora_alpha / r; None for none.
        lora_alpha: 2 r where it is not given.
        lora_dropout: Dropout on the input of A, in training.
        init_weights: True starts as the identity; False random.
        save_precomputed_indices: Save which entries were chosen. They follow from the base's weight, so files leave
            them out (PEFT's default is True) and note what tells whether they come out the same.
    """

    beyond_peer: ClassVar[frozenset[str]] = frozenset({"exclude_modules", "layers_to_transform", "layers_pattern"})
    file_defaults: ClassVar[dict[str, Any]] = {"save_precomputed_indices": True}

    sparsity: float = 0.99
    select_top: bool = True
    r: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    init_weights: bool = True
    save_precomputed_indices: bool = False

    def __post_init__(self) -> None:
        self.peft_type = PeftType.SUPERTUNING
        if self.r is not None and self.lora_alpha is None:
            checks.positive_int("SupertuningConfig", "r", self.r)
            self.lora_alpha = 2 * self.r
        super().__post_init__()

    def validate(self) -> None:
        super().validate()
        checks.probability("SupertuningConfig", "sparsity", self.sparsity)
        checks.probability("SupertuningConfig", "lora_dropout", self.lora_dropout)
        if self.r is not None:
            checks.positive_int("SupertuningConfig", "r", self.r)
            checks.finite_positive("SupertuningConfig", "lora_alpha", self.lora_alpha)
        elif self.lora_alpha is not None:
            checks.refuse("SupertuningConfig", "lora_alpha", self.lora_alpha, "None as long as r is None, or an r")


class ChosenEntries(Adapter):
    """Trainable: one number for each chosen entry; with Supra also A (r, in) and B (out, r)."""

    views: ClassVar[tuple[str, ...]] = (
        *("supertuning_values", "supertuning_indices", "supertuning_lora_A", "supertuning_lora_B"),
        *("supertuning_rank", "supertuning_lora_alpha", "supertuning_lora_dropout"),
    )

    supertuning_indices: Tensor
    supertuning_lora_A: Factor | None
    supertuning_lora_B: Factor | None

    def __init__(self, layer: LinearMap, indices: Tensor, r: int, alpha: float, dropout: float, zero: bool) -> None:
        super().__init__()
        self.shape = (layer.out_features, layer.in_features)
        self.vectors_in = layer.kind == "linear"
        self.supertuning_rank, self.supertuning_lora_alpha = r, alpha
        self.scaling = alpha / r if r else 0.0
        self.register_buffer("supertuning_indices", indices, persistent=False)  # row by row through (out, in)
        self.supertuning_values = nn.Parameter(torch.zeros(len(indices)) if zero else torch.randn(len(indices)))
        self.supertuning_lora_dropout = input_dropout(layer, dropout)
        self.supertuning_lora_A = Factor(r, layer.in_features) if r else None
        self.supertuning_lora_B = Factor(layer.out_features, r) if r else None
        if not zero:
            self.identity_at_birth = "init_weights=False draws the values"
        if self.supertuning_lora_A is not None and self.supertuning_lora_B is not None:
            nn.init.kaiming_uniform_(self.supertuning_lora_A.weight, a=math.sqrt(5))
            B = self.supertuning_lora_B.weight
            nn.init.zeros_(B) if zero else nn.init.kaiming_uniform_(B, a=math.sqrt(5))

    @classmethod
    def build(cls, layer: LinearMap, config: SupertuningConfig, path: str) -> ChosenEntries:
        size = layer.out_features * layer.in_features
        count = int(size * (1 - config.sparsity))
        if count < 1:
            limit = math.floor((1 - 1 / size) * 1e6) / 1e6
            raise ConfigError(
                f"SupertuningConfig: sparsity={config.sparsity} leaves none of the {size} entries of {path} to train; "
                f"use at most {limit}",
                field="sparsity",
                path=path,
                found=config.sparsity,
                expected=limit,
            )
        indices = _chosen(layer.weight, count, config.select_top)
        r, alpha = config.r or 0, float(config.lora_alpha or 0)
        made = cls(layer, indices, r, alpha, config.lora_dropout, config.init_weights)
        made.keeps_derived = config.save_precomputed_indices
        return made

    def adapt(self, weight: Tensor) -> Tensor:
        v = self.supertuning_values
        adapted = with_entries(weight.to(torch.promote_types(weight.dtype, v.dtype)), self.supertuning_indices, v)
        if self.supertuning_lora_A is None or self.supertuning_lora_B is None:
            return adapted
        return adapted + self.scaling * (self.supertuning_lora_B.weight @ self.supertuning_lora_A.weight)

    def forward(self, x: Any, layer: LinearMap) -> Tensor:
        v, y = self.supertuning_values, None
        if self.vectors_in and dense_enough(len(v), x, layer):
            y = through_entries(x, layer, self.supertuning_indices, v)
        if y is None:
            y = layer(x)
            y = y + self._sparse(x, layer).to(y.dtype)
        if self.supertuning_lora_A is None or self.supertuning_lora_B is None:
            return y
        x = self.supertuning_lora_dropout(x)
        update = layer.mix(layer.apply(x, self.supertuning_lora_A.weight), self.supertuning_lora_B.weight)
        return y + (self.scaling * update).to(y.dtype)

    def _sparse(self, x: Any, layer: LinearMap) -> Tensor:
        """S x."""
        v, places = self.supertuning_values, self.supertuning_indices.long()
        if self.vectors_in:
            return sparse_linear(x, v, places // self.shape[1], places % self.shape[1], self.shape[0])
        return layer.apply(x, v.new_zeros(self.shape[0] * self.shape[1]).index_add(0, places, v).view(self.shape))

    def derived_tensors(self) -> dict[str, Tensor]:
        return {"supertuning_indices": self.supertuning_indices}

    def from_file(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        indices, size = tensors.get("supertuning_indices"), self.shape[0] * self.shape[1]
        if indices is not None and indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < size:
            raise MismatchError(
                f"supertuning_indices reach from {int(indices.min())} to {int(indices.max())}, the layer has {size} "
                "entries; the file was made for another base",
                key="supertuning_indices",
                found=int(indices.max()),
                expected=size,
            )
        return tensors


@torch.no_grad()
def _chosen(weight: Tensor, count: int, largest: bool) -> Tensor:
    """Places of the entries to train, in the order of their values in a file: by magnitude.

    Always on the CPU: entries of equal magnitude (many in half precision) come in another order on another device.
    """
    return torch.topk(weight.detach().float().cpu().abs().flatten(), count, largest=largest).indices.int()


METHOD = Method(
    PeftType.SUPERTUNING,
    SupertuningConfig,
    ChosenEntries,
    key_prefix="supertuning_",
    default_targets=usual_targets,
    learning_rate=1e-3,
    train_options=all_linear,
)
