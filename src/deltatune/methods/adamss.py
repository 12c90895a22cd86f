"""AdaMSS: W_k' = W_k + B_k A_k V^T, k a cluster of rows, V of W's SVD.   https://openreview.net/forum?id=8ZdWmpYxT0"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune import checks
from deltatune.adapter import Adapter, LinearMap, Method
from deltatune.architectures import usual_targets
from deltatune.clusters import k_means
from deltatune.config import PeftType, config
from deltatune.errors import MismatchError
from deltatune.factors import shift
from deltatune.methods.common import LayerConfig, all_linear
from deltatune.schedules.adamss import allocation, run_options


@config
class AdamssConfig(LayerConfig):
    """AdaMSS's options, with PEFT's names and defaults.

    Attributes:
        r: Singular directions of W that the clusters are found in and the updates are made of, at most all there are.
        num_subspaces: Number K of clusters, at most one for each output.
        subspace_rank: Rank of B_k A_k, at most the number of rows of a cluster.
        init_weights: "orthogonal" starts as the identity; None random.
        use_dynamic_rank: A cluster's rank counts only its singular values above `svd_threshold` times the largest.
        random_seed: Of the SVD's random projection.
        use_asa: Adaptive allocation: clusters that matter least stop training, over all layers, until
            `asa_target_subspaces` are left.
        init_warmup: Step in which it begins; `final_warmup` that in which it ends, `mask_interval` the steps between.
        asa_importance_beta: How slowly the sensitivity of a number follows its present value; `asa_uncertainty_beta`
            likewise for its uncertainty.
        asa_schedule_exponent: How much faster it goes in the beginning; 1 is linear.
    """

    beyond_peer: ClassVar[frozenset[str]] = frozenset({"exclude_modules"})

    r: int = 100
    num_subspaces: int = 5
    subspace_rank: int = 1
    init_weights: str | bool | None = "orthogonal"
    use_asa: bool = False
    asa_target_subspaces: int = 50
    init_warmup: int = 50
    final_warmup: int = 1000
    mask_interval: int = 100
    asa_importance_beta: float = 0.85
    asa_uncertainty_beta: float = 0.85
    asa_schedule_exponent: float = 3.0
    use_dynamic_rank: bool = False
    svd_threshold: float = 0.1
    random_seed: int = 0

    def __post_init__(self) -> None:
        self.peft_type = PeftType.ADAMSS
        self.init_weights = self.init_weights or None  # older files say False
        super().__post_init__()

    def validate(self) -> None:
        super().validate()
        for name in ("r", "num_subspaces", "subspace_rank"):
            checks.positive_int("AdamssConfig", name, getattr(self, name))
        checks.one_of("AdamssConfig", "init_weights", self.init_weights, ("orthogonal", None))
        checks.probability("AdamssConfig", "svd_threshold", self.svd_threshold)
        if self.use_asa:
            self._check_allocation()

    def _check_allocation(self) -> None:
        for name in ("asa_target_subspaces", "mask_interval"):
            checks.positive_int("AdamssConfig", name, getattr(self, name))
        checks.finite_positive("AdamssConfig", "asa_schedule_exponent", self.asa_schedule_exponent)
        for name in ("asa_importance_beta", "asa_uncertainty_beta"):
            checks.probability("AdamssConfig", name, getattr(self, name))
        if not 0 <= self.init_warmup < self.final_warmup:
            expected = f"a step below final_warmup={self.final_warmup}, so that subspaces can be dropped in between"
            checks.refuse("AdamssConfig", "init_warmup", self.init_warmup, expected)


class Subspaces(Adapter):
    """Trainable: A_k (rank, r) and B_k (rows of the cluster, rank) for each cluster k. Frozen: V^T (r, in [+ 1]).

    A bias counts as one more column of W and is updated like the others.

    Attributes:
        dropped: Clusters that have stopped training. What they have learnt stays.
    """

    bounded_r: ClassVar[bool] = False
    views: ClassVar[tuple[str, ...]] = ("adamss_A", "adamss_B", "adamss_newB", "num_subspaces")

    adamss_newB: Tensor
    adamss_rows: Tensor

    def __init__(self, layer: LinearMap, config: AdamssConfig) -> None:
        super().__init__()
        self.layer, self.shape = layer, (layer.out_features, layer.in_features)
        self.count, self.rank, self.zero = config.num_subspaces, config.subspace_rank, config.init_weights is not None
        self.threshold = config.svd_threshold if config.use_dynamic_rank else 0.0
        if not self.zero:
            self.identity_at_birth = "init_weights=None draws every B_k"
        U, V = _singular(_matrix(layer), config.r, config.random_seed)
        self.register_buffer("adamss_newB", V.T.contiguous(), persistent=False)  # PEFT's name for V^T
        self.register_buffer("adamss_rows", torch.empty(len(U), dtype=torch.int64), persistent=False)
        self._cluster(U)
        self.dropped: set[int] = set()

    def requires_grad_(self, requires_grad: bool = True) -> Subspaces:
        super().requires_grad_(requires_grad)
        for k in self.dropped:
            self.adamss_A[k].requires_grad_(False).grad = None
            self.adamss_B[k].requires_grad_(False).grad = None
        return self

    @classmethod
    def build(cls, layer: LinearMap, config: AdamssConfig, path: str) -> Subspaces:
        return cls(layer, config)

    def _cluster(self, U: Tensor) -> None:
        """Fresh A_k and B_k for the clusters of the rows of U (out, r)."""
        labels = _clusters(U, min(self.count, len(U)))
        members = [rows for label in range(self.count) if len(rows := torch.where(labels == label)[0])]
        self.num_subspaces = len(members)
        self.adamss_rows = torch.cat(members).to(self.adamss_rows.device)  # the cluster's rows, one after the other
        like: dict[str, Any] = {"dtype": self.adamss_newB.dtype, "device": self.adamss_newB.device}
        A, B = [], []
        for rows in members:
            start_A = _directions(U[rows], self.rank, self.threshold)
            rank = len(start_A)
            A.append(nn.Parameter(start_A.to(**like)))
            start = torch.zeros(len(rows), rank) if self.zero else torch.randn(len(rows), rank) * 0.01
            B.append(nn.Parameter(start.to(**like)))
        self.adamss_A, self.adamss_B = nn.ParameterList(A), nn.ParameterList(B)

    @property
    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The update as up @ down, (out, R) and (R, in), and what down reads of the bias, (R,)."""
        down = torch.cat(list(self.adamss_A)) @ self.adamss_newB
        blocks = torch.block_diag(*self.adamss_B)
        up = blocks.new_zeros(self.shape[0], blocks.shape[1]).index_copy(0, self.adamss_rows, blocks)
        return up, down[:, : self.shape[1]], down[:, self.shape[1] :].sum(1)

    def adapt(self, weight: Tensor) -> Tensor:
        up, down, _ = self.factors
        return weight + (up @ down)

    def low_rank(self, layer: LinearMap) -> tuple[Tensor, Tensor] | None:
        up, down, _ = self.factors
        return (up, down) if len(down) < min(self.shape) else None

    def adapt_bias(self, bias: Tensor | None) -> Tensor | None:
        up, _, constant = self.factors
        return bias if bias is None else bias + up @ constant

    def forward(self, x: Any, layer: LinearMap) -> Tensor:
        up, down, constant = self.factors
        y = layer(x)
        y = y + layer.mix(layer.apply(x, down), up).to(y.dtype)
        return y if layer.bias is None else shift(y, up @ constant, layer)

    def derived_tensors(self) -> dict[str, Tensor]:
        return {"adamss_newB": self.adamss_newB, "adamss_rows": self.adamss_rows}

    def from_file(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """PEFT's files hold V^T and not the clusters. Made on another device it is another, and so are they."""
        given = tensors.get("adamss_newB")
        if given is None or given.shape != self.adamss_newB.shape or not given.isfinite().all():
            return tensors
        square = self.shape[0] == len(given)
        if square and "adamss_rows" not in tensors:
            raise MismatchError(
                f"adamss_newB: with r={len(given)}, as many as the layer has outputs, the clusters that PEFT found "
                "rest on rounding and are not in its file; train with a smaller r, or merge the adapter in PEFT",
                key="adamss_newB",
            )
        here = self.adamss_newB.float().cpu()
        if not torch.allclose(given.float().cpu(), here, atol=1e-2 if given.dtype == torch.bfloat16 else 1e-3):
            self._cluster(_left(_matrix(self.layer), given.float().cpu().T))
        return tensors


@torch.no_grad()
def _matrix(layer: LinearMap) -> Tensor:
    """[W | b] in single precision on the CPU, where every device derives the same from it."""
    columns = [layer.weight] if layer.bias is None else [layer.weight, layer.bias[:, None]]
    return torch.cat([column.detach().float().cpu() for column in columns], dim=1)


@torch.no_grad()
def _singular(W: Tensor, r: int, seed: int) -> tuple[Tensor, Tensor]:
    """The r first left and right singular vectors, nearly, by the random projection that PEFT's files rely on."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        U, _, V = torch.svd_lowrank(W, q=min(r, *W.shape), niter=2)
    return U, V


@torch.no_grad()
def _left(W: Tensor, V: Tensor) -> Tensor:
    """The left vectors that `svd_lowrank` had beside these right ones, which are singular only nearly.

    Of a wide W they are W V. Of another it projects W onto a basis Q, of which V spans the rows W^T Q.
    """
    W, V = W.double(), V.double()
    U = W @ V
    if W.shape[0] >= W.shape[1]:
        Q = torch.linalg.qr(torch.linalg.lstsq(W.T, V, driver="gelsd").solution)[0]
        U = Q @ (Q.T @ U)
    return (U / U.norm(dim=0).clamp_min(1e-30)).float()


def _directions(U: Tensor, most: int, threshold: float) -> Tensor:
    """The first right singular vectors of some rows of U, one a row: at most `most`, and of those with a threshold only
    the ones whose squared singular value is above this share of the largest.

    Out of the smaller of U^T U and U U^T in double precision, which takes less than a decomposition of U.
    """
    U = U.double()
    tall = U.shape[0] > U.shape[1]
    squares, vectors = torch.linalg.eigh(U.mT @ U if tall else U @ U.mT)  # ascending
    above = int((squares > threshold * squares[-1]).sum()) if threshold else len(squares)
    vectors = vectors[:, -max(min(above, most), 1) :].flip(1)
    return (vectors if tall else torch.linalg.qr(U.mT @ vectors)[0]).mT.contiguous()


def _clusters(U: Tensor, count: int) -> Tensor:
    if U.shape[0] == U.shape[1]:  # the rows of an orthogonal matrix are equally far apart: all clusters are as good
        return torch.arange(len(U)) * count // len(U)
    return k_means(U, count)


METHOD = Method(
    PeftType.ADAMSS,
    AdamssConfig,
    Subspaces,
    key_prefix="adamss_",
    default_targets=usual_targets,
    learning_rate=2e-3,
    train_options=all_linear,
    run_options=run_options,
    schedule=allocation,
)
