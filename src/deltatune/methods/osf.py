"""OSF: W' = W_high + U_low diag(S_low) V_low, trained at right angles to W_high.   https://arxiv.org/abs/2504.07097"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune import bounded, checks
from deltatune.adapter import Adapter, LinearMap, Method
from deltatune.architectures import every_projection
from deltatune.config import PeftType, config
from deltatune.errors import ConfigError
from deltatune.factors import with_projected_gradient
from deltatune.methods.common import LayerConfig


@config
class OSFConfig(LayerConfig):
    """OSF's options, with PEFT's names and defaults.

    Attributes:
        effective_rank: Number of singular directions that stay frozen, the largest ones; or a share of them, in (0, 1];
            None for half of them. The others train.
        rank_pattern: Regular expression, found anywhere in the path of a layer -> another effective rank.
        init_weights: True starts as the identity; False random.
        target_svd_config: Accepted and without effect, as in PEFT.
    """

    beyond_peer: ClassVar[frozenset[str]] = frozenset({"exclude_modules", "layers_to_transform", "layers_pattern"})
    not_by_layer: ClassVar[tuple[str, ...]] = ("rank_pattern",)  # found anywhere, and a share may be one

    effective_rank: int | float | None = None
    rank_pattern: dict | None = None
    init_weights: bool | None = True
    target_svd_config: dict | None = None

    def __post_init__(self) -> None:
        self.peft_type = PeftType.OSF
        super().__post_init__()

    def validate(self) -> None:
        super().validate()
        _check_rank("effective_rank", self.effective_rank)
        for pattern, rank in (self.rank_pattern or {}).items():
            bounded.check("OSFConfig", "rank_pattern", pattern)
            _check_rank(f"rank_pattern[{pattern!r}]", rank)

    def rank_at(self, path: str) -> int | float | None:
        found = [rank for pattern, rank in (self.rank_pattern or {}).items() if bounded.search(pattern, path)]
        return found[0] if found else self.effective_rank


def _check_rank(field: str, rank: Any) -> None:
    whole = checks.fits(rank, int) and rank >= 1
    share = isinstance(rank, float) and (0 < rank <= 1 or (rank > 1 and rank.is_integer()))
    if rank is not None and not whole and not share:
        checks.refuse("OSFConfig", field, rank, "an integer of 1 or more, a share in (0, 1], or None for half")


class LowSubspace(Adapter):
    """Trainable: U_low (out, k), S_low (k) and V_low (k, in), the k smallest parts of W's singular decomposition.

    Frozen: the same three as they were at the start, and a basis for each side, by which gradients are kept out of
    the space of the large singular directions.
    """

    views: ClassVar[tuple[str, ...]] = ("osf_svd_params", "effective_rank")

    U_start: Tensor
    S_start: Tensor
    V_start: Tensor
    U_high: Tensor | None
    V_high: Tensor | None

    def __init__(self, weight: Tensor, effective_rank: int, start: bool) -> None:
        super().__init__()
        self.effective_rank = k = effective_rank
        with torch.no_grad():
            U, S, V = (part.cpu() for part in torch.linalg.svd(weight.detach().float(), full_matrices=False))
        out, columns = weight.shape
        frozen = {
            "U_start": U[:, k:],
            "S_start": S[k:],
            "V_start": V[k:],
            # the parts above k; of a square factor their complement is what the start spans
            "U_high": U[:, :k] if out > columns else None,
            "V_high": V[:k] if columns > out else None,
        }
        for name, tensor in frozen.items():
            self.register_buffer(name, None if tensor is None else tensor.contiguous(), persistent=False)
        low = {"U_low": self.U_start, "S_low": self.S_start, "V_low": self.V_start}
        low = {name: tensor.clone() if start else torch.randn_like(tensor) for name, tensor in low.items()}
        self.osf_svd_params = nn.ParameterDict({name: nn.Parameter(tensor) for name, tensor in low.items()})
        if not start:
            self.identity_at_birth = "init_weights=False draws the low subspace"

    @classmethod
    def build(cls, layer: LinearMap, config: OSFConfig, path: str) -> LowSubspace:
        rank, short = config.rank_at(path), min(layer.out_features, layer.in_features)
        if rank is None:
            rank = short // 2
        elif isinstance(rank, float) and rank <= 1:
            rank = int(short * rank)
        rank = min(int(rank), short)
        if not 0 < rank < short:
            raise ConfigError(
                f"OSFConfig: effective_rank={config.rank_at(path)!r} keeps {rank} of the {short} singular directions "
                f"of {path}, of which some have to stay and some to train; use 1 to {short - 1}, or do not target it",
                field="effective_rank",
                path=path,
                found=config.rank_at(path),
                expected=max(short - 1, 1),
            )
        return cls(layer.weight, rank, config.init_weights is not False)

    @property
    def low(self) -> tuple[Tensor, Tensor, Tensor]:
        U, S, V = (self.osf_svd_params[name] for name in ("U_low", "S_low", "V_low"))
        U = with_projected_gradient(U, self.U_start if self.U_high is None else self.U_high, self.U_high is None)
        basis = self.V_start if self.V_high is None else self.V_high
        return U, S, with_projected_gradient(V.T, basis.T, self.V_high is None).T

    def adapt(self, weight: Tensor) -> Tensor:
        U, S, V = self.low
        return weight + ((U * S) @ V - (self.U_start * self.S_start) @ self.V_start)

    def low_rank(self, layer: LinearMap) -> tuple[Tensor, Tensor]:
        U, S, V = self.low
        return torch.cat([U * S, -self.U_start * self.S_start], 1), torch.cat([V, self.V_start])

    def forward(self, x: Any, layer: LinearMap) -> Tensor:
        U, S, V = self.low
        y, now = layer(x), layer.mix(layer.apply(x, V), U * S)
        start = layer.mix(layer.apply(x, self.V_start), self.U_start * self.S_start)
        return y + (now - start).to(y.dtype)  # equal at the start, to the bit


METHOD = Method(
    PeftType.OSF, OSFConfig, LowSubspace, key_prefix="osf_", default_targets=every_projection, learning_rate=1e-4
)
