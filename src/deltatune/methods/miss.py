"""MiSS: W' = W + D^T repeated along the input; "bat": W' = W + W D + D, block by block.   https://arxiv.org/abs/2409.15371"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltatune import biases, checks
from deltatune.adapter import Adapter, LinearMap, Method
from deltatune.architectures import usual_targets
from deltatune.config import PeftType, config
from deltatune.errors import ConfigError
from deltatune.factors import input_dropout, scale_of_rows
from deltatune.methods.common import LayerConfig, all_linear


@config
class MissConfig(LayerConfig):
    """MiSS's options, with PEFT's names and defaults.

    Attributes:
        r: Inputs r apart share their change; with "bat" the side of a block.
        init_weights: True: D (r, out), zero. "mini": D (r, mini_r), zero, repeated along the output as well. "bat": a D
            (r, r) for every r outputs, zero. False: as True but random, so that a fresh adapter changes the output.
        mini_r: Outputs mini_r apart share their change, with "mini".
        miss_dropout: Dropout on the input of the change, in training; "bat" has none.
    """

    r: int = 64
    miss_dropout: float = 0.0
    mini_r: int = 1
    init_weights: bool | str = True
    bias: str = "none"

    def __post_init__(self) -> None:
        self.peft_type = PeftType.MISS
        super().__post_init__()

    def validate(self) -> None:
        super().validate()
        checks.positive_int("MissConfig", "r", self.r)
        checks.positive_int("MissConfig", "mini_r", self.mini_r)
        checks.probability("MissConfig", "miss_dropout", self.miss_dropout)
        checks.one_of("MissConfig", "init_weights", self.init_weights, (True, False, "bat", "mini"))
        biases.check("MissConfig", self.bias, "MiSS_only")


class MiSS(Adapter):
    """Trainable: D, (r, out), (r, mini_r) or (out / r, r, r)."""

    views: ClassVar[tuple[str, ...]] = ("miss_block", "miss_r", "miss_mini_r", "miss_dropout")

    def __init__(self, layer: LinearMap, r: int, width: int, bat: bool, dropout: float) -> None:
        super().__init__()
        self.miss_r, self.miss_mini_r, self.bat, self.kind = r, width, bat, layer.kind
        self.in_features, self.copies = layer.in_features, layer.out_features // width
        self.stacks = None if bat else ("kind", "miss_r", "copies")
        self.miss_dropout = input_dropout(layer, dropout)
        self.miss_block = nn.Parameter(torch.zeros(layer.out_features // r, r, r) if bat else torch.zeros(r, width))

    @classmethod
    def build(cls, layer: LinearMap, config: MissConfig, path: str) -> MiSS:
        out, width, bat = layer.out_features, layer.in_features, config.init_weights == "bat"
        if config.r > width:
            raise _refusal("r", config.r, f"is more than the {width} inputs of {path}; use at most", width)
        if bat and (out % config.r or width % config.r):
            why = f'does not divide both sides of {path}, ({out}, {width}), as init_weights="bat" needs'
            raise _refusal("r", config.r, why, _nearest(config.r, math.gcd(out, width)))
        mini = config.mini_r if config.init_weights == "mini" else out
        if out % mini:
            raise _refusal("mini_r", mini, f"does not divide the {out} outputs of {path}", _nearest(mini, out))
        made = cls(layer, config.r, mini, bat, config.miss_dropout)
        if config.init_weights is False:
            made.identity_at_birth = "init_weights=False draws D"
            nn.init.kaiming_uniform_(made.miss_block, a=math.sqrt(5))
        return made

    def update(self, weight: Tensor) -> Tensor:
        """W' - W, (out, in)."""
        r, D = self.miss_r, self.miss_block
        if self.bat:
            D = D.to(torch.promote_types(weight.dtype, D.dtype))
            blocks = weight.to(D.dtype).unflatten(1, (-1, r)).unflatten(0, (-1, r))  # (out / r, r, in / r, r)
            return (torch.einsum("joik,jkl->joil", blocks, D) + D[:, :, None]).flatten(2).flatten(0, 1)
        return self._along_inputs(D.mT).repeat(self.copies, 1)

    def _along_inputs(self, columns: Tensor) -> Tensor:
        """(any, r) -> (any, in), again and again."""
        return columns.repeat(1, math.ceil(self.in_features / self.miss_r))[:, : self.in_features]

    def adapt(self, weight: Tensor) -> Tensor:
        return weight + self.update(weight)

    def low_rank(self, layer: LinearMap) -> tuple[Tensor, Tensor] | None:
        if self.bat:
            return None
        D = self.miss_block.T.repeat(self.copies, 1)  # every output adds up r sums of inputs
        return D, self._along_inputs(torch.eye(self.miss_r, dtype=D.dtype, device=D.device))

    def forward(self, x: Any, layer: LinearMap) -> Tensor:
        if self.bat and layer.dtype.itemsize >= 4:  # every block has a D of its own: the matrix is the cheapest way
            return super().forward(x, layer)
        y = layer(x)  # W + W D + D in half precision would round most of the change away
        update = layer.apply(x, self.update(layer.weight)) if self.bat else self._of_sums(x, layer)
        return y + update.to(y.dtype)

    def _of_sums(self, x: Any, layer: LinearMap) -> Tensor:
        """D^T (sum of the blocks of r inputs), written as often as the output is long."""
        r, D = self.miss_r, self.miss_block
        rows = D.mT.repeat(self.copies, 1) if self.copies > 1 and self.kind != "linear" else D.mT
        if self.kind == "embedding":
            return scale_of_rows(x, layer, D.dtype) * F.embedding(x % r, rows.mT)
        x = self.miss_dropout(x)
        if self.kind == "conv":
            ones = torch.eye(r, dtype=D.dtype, device=D.device)
            return layer.mix(layer.apply(x, self._along_inputs(ones)), rows)
        if self.in_features % r:  # to pad by nothing is a copy
            x = F.pad(x, (0, -self.in_features % r))
        sums = x.unflatten(-1, (-1, r)).sum(-2)
        y = layer.mix(sums, D.mT)
        return y.repeat(*[1] * (x.ndim - 1), self.copies) if self.copies > 1 else y


def _nearest(value: int, multiple: int) -> int:
    """The divisor of `multiple` closest to a value."""
    return min((n for n in range(1, multiple + 1) if multiple % n == 0), key=lambda n: abs(n - value))


def _refusal(field: str, value: int, why: str, near: int) -> ConfigError:
    end = "" if why.endswith("use at most") else "; the nearest value that does is"
    return ConfigError(f"MissConfig: {field}={value} {why}{end} {near}", field=field, found=value, expected=near)


METHOD = Method(
    PeftType.MISS,
    MissConfig,
    MiSS,
    key_prefix="miss_",
    default_targets=usual_targets,
    learning_rate=5e-4,
    train_options=all_linear,
)
