"""GraLoRA: W' = W + (alpha / r) D, each of k x k blocks D_ji = B_ji A_ji of rank r / k.   https://arxiv.org/abs/2505.20355"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune import biases, checks
from deltatune.adapter import Adapter, LinearMap, Method
from deltatune.architectures import usual_targets
from deltatune.config import PeftType, config
from deltatune.factors import Factor, input_dropout
from deltatune.methods.common import LayerConfig, all_linear


@config
class GraloraConfig(LayerConfig):
    """GraLoRA's options, with PEFT's names and defaults.

    Attributes:
        r: What LoRA of the same size calls its rank; each block has rank r / gralora_k.
        gralora_k: Blocks per side. It divides r and both sides of a layer.
        hybrid_r: Rank of a LoRA update of the whole layer beside the blocks, 0 for none.
        alpha: The update is scaled by alpha / (r + hybrid_r).
        gralora_dropout: Dropout on the input of the update, in training.
        init_weights: True: A uniform (Kaiming), B zero. False: both random, so that a fresh adapter changes the output.
        fan_in_fan_out: Accepted and ignored: how a layer stores its weight is read off the layer.
    """

    beyond_peer: ClassVar[frozenset[str]] = frozenset({"exclude_modules"})

    r: int = 32
    hybrid_r: int = 0
    alpha: int | float = 64
    gralora_dropout: float = 0.0
    gralora_k: int = 2
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True

    def __post_init__(self) -> None:
        self.peft_type = PeftType.GRALORA
        super().__post_init__()

    def validate(self) -> None:
        super().validate()
        checks.positive_int("GraloraConfig", "r", self.r)
        checks.positive_int("GraloraConfig", "gralora_k", self.gralora_k)
        checks.finite_positive("GraloraConfig", "alpha", self.alpha)
        checks.probability("GraloraConfig", "gralora_dropout", self.gralora_dropout)
        biases.check("GraloraConfig", self.bias, "gralora_only")
        if self.hybrid_r < 0:
            checks.refuse("GraloraConfig", "hybrid_r", self.hybrid_r, "an integer of 0 or more")
        if rest := self.r % self.gralora_k:
            near = max(self.gralora_k, self.r - rest)
            checks.refuse(
                "GraloraConfig", "r", self.r, f"a multiple of gralora_k={self.gralora_k}, for instance {near}"
            )


class GraLoRA(Adapter):
    """Trainable: A (k, in / k, r) and B (k, r, out / k), r (in + out) numbers; with hybrid_r two factors of LoRA too.

    The columns of A_i are cut into k shares, one for each block j of the output, and the rows of B_j into k shares, one
    for each block i of the input: D_ji = (share i of B_j)^T (share j of A_i)^T.
    """

    views: ClassVar[tuple[str, ...]] = (
        *("gralora_A", "gralora_B", "gralora_A_general", "gralora_B_general"),
        *("scaling", "r", "alpha", "hybrid_r", "gralora_k", "gralora_dropout"),
    )

    def __init__(
        self, layer: LinearMap, r: int, k: int, hybrid_r: int, alpha: float, dropout: float, start_at_zero: bool
    ) -> None:
        super().__init__()
        self.r, self.gralora_k, self.hybrid_r, self.alpha, self.kind = r, k, hybrid_r, alpha, layer.kind
        self.scaling = alpha / (r + hybrid_r)
        self.gralora_dropout = input_dropout(layer, dropout)
        A, B = torch.empty(k, r, layer.in_features // k), torch.empty(k, layer.out_features // k, r)
        general = [Factor(hybrid_r, layer.in_features), Factor(layer.out_features, hybrid_r)] if hybrid_r else []
        for factor in (*A, *B, *(factor.weight for factor in general)):
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5))  # each block as nn.Linear does
        if start_at_zero:
            nn.init.zeros_(B)
            nn.init.zeros_(general[1].weight) if general else None
        else:
            self.identity_at_birth = "init_weights=False draws all factors"
        self.gralora_A, self.gralora_B = nn.Parameter(A.mT.contiguous()), nn.Parameter(B.mT.contiguous())
        self.gralora_A_general, self.gralora_B_general = general or (None, None)

    @classmethod
    def build(cls, layer: LinearMap, config: GraloraConfig, path: str) -> GraLoRA:
        k, out, width = config.gralora_k, layer.out_features, layer.in_features
        sides = f"r={config.r} and both sides of {path}, ({out}, {width})"
        checks.divisor("GraloraConfig", "gralora_k", k, math.gcd(out, width, config.r), sides, path)
        return cls(layer, config.r, k, config.hybrid_r, config.alpha, config.gralora_dropout, config.init_weights)

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """The update as two matrices (k r + hybrid_r, in) and (out, k r + hybrid_r)."""
        k, down, up = self.gralora_k, torch.block_diag(*self.gralora_A.mT), torch.block_diag(*self.gralora_B.mT)
        down = down.unflatten(0, (k, k, -1)).transpose(0, 1).flatten(0, 2)  # k shares of each input for each output
        if self.gralora_A_general is None or self.gralora_B_general is None:
            return down, up
        return torch.cat([down, self.gralora_A_general.weight]), torch.cat([up, self.gralora_B_general.weight], 1)

    def adapt(self, weight: Tensor) -> Tensor:
        down, up = self.factors
        return weight + self.scaling * (up @ down)

    def low_rank(self, layer: LinearMap) -> tuple[Tensor, Tensor]:
        down, up = self.factors
        return self.scaling * up, down

    def forward(self, x: Any, layer: LinearMap) -> Tensor:
        y, dropped = layer(x), self.gralora_dropout(x)
        if self.kind != "linear":
            down, up = self.factors
        else:
            y = self._through_blocks(dropped, y)
            if self.gralora_A_general is None or self.gralora_B_general is None:
                return y
            dropped = self.gralora_dropout(x)
            down, up = self.gralora_A_general.weight, self.gralora_B_general.weight
        return y + (self.scaling * layer.mix(layer.apply(dropped, down), up)).to(y.dtype)

    def _through_blocks(self, x: Tensor, y: Tensor) -> Tensor:
        """y and the update of vectors x; as two matrices it would cost k times as much.

        The block stands before the vectors wherever there are products, and every pass in between is one of a product:
        the scale is multiplied into B, and what is exchanged is laid out anew once.
        """
        k, A, B = self.gralora_k, self.gralora_A.to(x.dtype), (self.scaling * self.gralora_B).to(x.dtype)
        h = torch.bmm(x.reshape(-1, *A.shape[:2]).transpose(0, 1), A)  # (k of the input, T, r)
        h = h.unflatten(-1, (k, -1)).transpose(0, 2).flatten(2)  # (k of the output, T, r)
        update = torch.bmm(h, B).transpose(0, 1)
        return (y.reshape(update.shape) + update.to(y.dtype)).reshape(y.shape)


METHOD = Method(
    *(PeftType.GRALORA, GraloraConfig, GraLoRA),
    key_prefix="gralora_",
    default_targets=usual_targets,
    learning_rate=2e-4,
    train_options=all_linear,
)
