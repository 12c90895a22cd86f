"""PSOFT: W' = W + B (R - I) A, R = diag(b) Q diag(a) on W's principal subspace, Q a rotation.

https://arxiv.org/abs/2505.11235
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune import checks
from deltatune.adapter import Adapter, LinearMap, Method
from deltatune.architectures import usual_targets
from deltatune.config import PeftType, config
from deltatune.errors import ConfigError
from deltatune.factors import cayley, cayley_neumann, input_dropout, skew_symmetric
from deltatune.methods.common import LayerConfig, all_linear


@config
class PsoftConfig(LayerConfig):
    """PSOFT's options, with PEFT's names and defaults.

    Attributes:
        r: Dimension of the subspace, that of the r largest singular values of W.
        psoft_alpha: Accepted and without effect: A and B are made so that it cancels.
        psoft_dropout: Dropout on the input of A, in training.
        ab_svd_init: W = U S V^T to rank r is B A. "psoft_init": A = V^T, whose rows are orthonormal, B = U S.
            "pissa_init": half of S on either side.
        psoft_svd: "full", or "lowrank": a randomised decomposition with `psoft_svd_lowrank_niter` power iterations,
            drawn with `random_seed`.
        psoft_orth: Q is a rotation; False: any matrix.
        psoft_mag_a: Train the scales a; `psoft_mag_b` likewise.
        use_cayley_neumann: Take the rotation from a series of `num_cayley_neumann_terms` instead of a matrix inverse,
            and with `cayley_neumann_eps` keep what it is made from within that norm.
        init_weights: True starts with Q, a and b as the identity; False with a random Q.
        fan_in_fan_out: Accepted and ignored: how a layer stores its weight is read off the layer.
    """

    r: int = 32
    psoft_alpha: int | float = 32
    psoft_dropout: float = 0.0
    fan_in_fan_out: bool = False
    ab_svd_init: str = "psoft_init"
    psoft_svd: str = "full"
    psoft_svd_lowrank_niter: int = 10
    random_seed: int = 0
    psoft_orth: bool = True
    psoft_mag_b: bool = True
    psoft_mag_a: bool = True
    use_cayley_neumann: bool = False
    num_cayley_neumann_terms: int = 5
    cayley_neumann_eps: float | None = None
    init_weights: bool = True

    def __post_init__(self) -> None:
        self.peft_type = PeftType.PSOFT
        super().__post_init__()

    def validate(self) -> None:
        super().validate()
        name = type(self).__name__
        for field in ("r", "psoft_svd_lowrank_niter"):
            checks.positive_int(name, field, getattr(self, field))
        checks.finite_positive(name, "psoft_alpha", self.psoft_alpha)
        checks.probability(name, "psoft_dropout", self.psoft_dropout)
        checks.one_of(name, "ab_svd_init", self.ab_svd_init, ("psoft_init", "pissa_init"))
        checks.one_of(name, "psoft_svd", self.psoft_svd, ("full", "lowrank"))
        if self.num_cayley_neumann_terms < 2:  # the first term is the identity
            checks.refuse(name, "num_cayley_neumann_terms", self.num_cayley_neumann_terms, "an integer of 2 or more")
        if self.cayley_neumann_eps is not None and not 0 < self.cayley_neumann_eps < 1:
            checks.refuse(name, "cayley_neumann_eps", self.cayley_neumann_eps, "a number between 0 and 1, or None")


class Transformation(nn.Module):
    """R = diag(b) Q diag(a). Trainable: the numbers above the diagonal from which Q is made, or Q itself; a; b."""

    def __init__(self, config: PsoftConfig) -> None:
        super().__init__()
        self.r, self.orthogonal, self.limit = config.r, config.psoft_orth, config.cayley_neumann_eps
        self.terms = config.num_cayley_neumann_terms if config.use_cayley_neumann else 0
        start = torch.zeros(config.r * (config.r - 1) // 2) if config.psoft_orth else torch.eye(config.r)
        self.weight = nn.Parameter(start if config.init_weights else start + 0.1 * torch.randn_like(start))
        self.vector_b = nn.Parameter(torch.ones(config.r)) if config.psoft_mag_b else None
        self.vector_a = nn.Parameter(torch.ones(config.r)) if config.psoft_mag_a else None

    @property
    def Q(self) -> Tensor:
        if not self.orthogonal:
            return self.weight
        skew = skew_symmetric(self.weight[None], self.r)
        if not self.terms:
            return cayley(-skew)[0]
        if self.limit is not None:
            skew = skew * (self.limit / skew.norm().clamp_min(self.limit))
        return cayley_neumann(skew, self.terms)[0]

    @property
    def R(self) -> Tensor:
        R = self.Q
        R = R if self.vector_b is None else self.vector_b[:, None] * R
        return R if self.vector_a is None else R * self.vector_a


class PSOFT(Adapter):
    """Trainable: the r x r matrix R. A (r, in) and B (out, r) come from the singular vectors of W and stay."""

    views: ClassVar[tuple[str, ...]] = ("psoft_R", "psoft_dropout", "r")
    A: Tensor
    B: Tensor

    def __init__(self, layer: LinearMap, config: PsoftConfig) -> None:
        super().__init__()
        self.r = config.r
        self.psoft_dropout = input_dropout(layer, config.psoft_dropout)
        self.psoft_R = Transformation(config)
        if not config.init_weights:
            self.identity_at_birth = "init_weights=False draws Q"
        A, B = principal(layer.weight, config)
        self.register_buffer("A", A, persistent=False)
        self.register_buffer("B", B, persistent=False)

    @classmethod
    def build(cls, layer: LinearMap, config: PsoftConfig, path: str) -> PSOFT:
        limit = min(layer.in_features, layer.out_features)
        if config.r > limit:
            raise ConfigError(
                f"PsoftConfig: r={config.r} is more than the rank that {path} "
                f"({layer.out_features}, {layer.in_features}) can have; use at most {limit}",
                field="r",
                path=path,
                found=config.r,
                expected=limit,
            )
        return cls(layer, config)

    def derived_tensors(self) -> dict[str, Tensor]:
        return {"psoft_A": self.A, "psoft_B": self.B}

    @property
    def change(self) -> Tensor:
        """R - I."""
        R = self.psoft_R.R
        return R - torch.eye(self.r, device=R.device, dtype=R.dtype)

    def adapt(self, weight: Tensor) -> Tensor:
        return weight + (self.B @ self.change @ self.A).to(torch.promote_types(weight.dtype, self.A.dtype))

    def low_rank(self, layer: LinearMap) -> tuple[Tensor, Tensor]:
        return self.B @ self.change, self.A

    def forward(self, x: Any, layer: LinearMap) -> Tensor:
        y, h = layer(x), layer.apply(self.psoft_dropout(x), self.A)
        return y + layer.mix(layer.mix(h, self.change), self.B).to(y.dtype)

    def extra_repr(self) -> str:
        return f"r={self.r}"


@torch.no_grad()
def principal(weight: Tensor, config: PsoftConfig) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) of the best approximation B A of rank r, with the signs that torch gives them."""
    weight, r = weight.to(torch.promote_types(weight.dtype, torch.float32)), config.r
    if config.psoft_svd == "full":
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        with _seeded(config.random_seed, weight.device.type):
            U, S, V = torch.svd_lowrank(weight, q=r, niter=config.psoft_svd_lowrank_niter)
        Vh = V.mT
    left, right = (S, torch.ones_like(S)) if config.ab_svd_init == "psoft_init" else (S.sqrt(), S.sqrt())
    return (right[:r, None] * Vh[:r]).contiguous(), (U[:, :r] * left[:r]).contiguous()


@contextmanager
def _seeded(seed: int, device: str) -> Iterator[None]:
    """The random stream that PEFT's files mean; that of the program goes on afterwards as if nothing had been drawn."""
    devices = [] if device == "cpu" else range(torch.get_device_module(device).device_count())
    with torch.random.fork_rng(devices, device_type=device):
        # torch.manual_seed would also seed accelerators that were not forked
        torch.default_generator.manual_seed(seed) if device == "cpu" else torch.manual_seed(seed)
        yield


METHOD = Method(
    PeftType.PSOFT, PsoftConfig, PSOFT, key_prefix="psoft_", default_targets=usual_targets, train_options=all_linear
)
