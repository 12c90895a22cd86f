"""FRoD: W' = W + U (S + diag(l - l0)) V^T, where W = U diag(l0) V^T, V joint for layers of one role, S sparse.

https://doi.org/10.1609/aaai.v40i31.39813
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune import biases, checks
from deltatune.adapter import Adapter, LinearMap, Method, Stored
from deltatune.config import PeftType, config
from deltatune.errors import MismatchError
from deltatune.factors import input_dropout, shift, sparse_linear
from deltatune.methods.common import LayerConfig, all_linear
from deltatune.methods.vera import usual_targets as veras_targets


@config
class FrodConfig(LayerConfig):
    """FRoD's options, with PEFT's names and meaning; of the defaults `save_projection` differs.

    Attributes:
        sparse_rate: Entries of S that train, as a share of in^2; none of them on the diagonal.
        projection_prng_key: Seed of the places of these entries.
        regularization_alpha: Added to the diagonal of the matrices that are inverted for V.
        save_projection: Files hold V and the places. Without, they hold a checksum, and both are derived again on
            loading; V is in the file all the same where rounding would decide what comes out.
        frod_dropout: Dropout on the input of the change, in training.
        init_weights: True: S starts at zero and l at l0; False: both off by noise of deviation 0.1.
        fan_in_fan_out: Accepted and ignored: how a layer stores its weight is read off the layer.
        progressbar: Accepted and ignored.
        runtime_offload_base_weight: Accepted and ignored: the base layer runs, and the change is added.
    """

    beyond_peer: ClassVar[frozenset[str]] = frozenset({"exclude_modules"})
    file_defaults: ClassVar[dict[str, Any]] = {"save_projection": True}

    projection_prng_key: int = 0
    save_projection: bool = False
    frod_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True
    sparse_rate: float = 0.01
    regularization_alpha: float = 1e-3
    progressbar: bool = True
    runtime_offload_base_weight: bool = False

    def __post_init__(self) -> None:
        self.peft_type = PeftType.FROD
        super().__post_init__()

    def validate(self) -> None:
        super().validate()
        checks.seed("FrodConfig", "projection_prng_key", self.projection_prng_key)
        checks.probability("FrodConfig", "frod_dropout", self.frod_dropout)
        checks.finite_positive("FrodConfig", "regularization_alpha", self.regularization_alpha)
        biases.check("FrodConfig", self.bias, "frod_only")
        if not 0 <= self.sparse_rate <= 1:
            checks.refuse("FrodConfig", "sparse_rate", self.sparse_rate, "a share in [0, 1]")


class Basis(nn.Module):
    """Frozen, for the layers of one role: V (in, in), and the places (2, n) of the entries of S, rows and columns."""

    V: Tensor
    places: Tensor
    size: Tensor

    def __init__(self, layers: list[LinearMap], config: FrodConfig, generator: torch.Generator) -> None:
        super().__init__()
        weights, n = [layer.weight.detach().float().cpu() for layer in layers], layers[0].in_features
        # equal eigenvalues, and directions that no weight reads, leave V to rounding
        self.determined = len(weights) > 2 and sum(len(weight) for weight in weights) >= n
        self.register_buffer("V", joint_basis(weights, config.regularization_alpha), False)
        self.register_buffer("places", drawn_off_diagonal(n, config.sparse_rate, generator), False)
        self.register_buffer("size", torch.tensor([n, n]), False)


class Bases(Stored):
    """One basis for each role."""

    def __init__(self, layers: dict[str, LinearMap], config: FrodConfig) -> None:
        super().__init__()
        self.keeps_derived, self.fillings = config.save_projection, 0
        self.roles = {path: role(path) for path in layers}
        widths = {(self.roles[path], layer.in_features) for path, layer in layers.items()}
        several = {name for name, width in widths if (name, width) != min(pair for pair in widths if pair[0] == name)}
        groups: dict[str, dict[int, LinearMap]] = {}
        for place, (path, layer) in enumerate(layers.items()):
            if self.roles[path] in several:
                self.roles[path] += f"_{layer.in_features}"
            groups.setdefault(self.roles[path], {})[number(path, place)] = layer  # of equal numbers the last counts
        self.names = sorted(groups)
        generator = torch.Generator().manual_seed(config.projection_prng_key)
        self.bases = nn.ModuleList(
            Basis([layer for _, layer in sorted(groups[name].items())], config, generator) for name in self.names
        )

    def of(self, path: str) -> Basis:
        return self.bases[self.names.index(self.roles[path])]  # type: ignore[return-value]

    def _named(self) -> list[tuple[str, Basis]]:
        return list(zip(self.names, self.bases))  # type: ignore[arg-type]

    def derived_tensors(self) -> dict[str, Tensor]:
        found = {f"frod_V.{name}": basis.V for name, basis in self._named()}
        found |= {f"frod_s_indices.{name}": basis.places for name, basis in self._named()}
        return found | {f"frod_s_size.{name}": basis.size for name, basis in self._named()}

    def kept_tensors(self) -> dict[str, Tensor]:
        undetermined = {f"frod_V.{name}": basis.V for name, basis in self._named() if not basis.determined}
        return undetermined | super().kept_tensors()

    def from_file(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """PEFT's have all or nothing."""
        for name, basis in self._named():
            places, n = tensors.get(f"frod_s_indices.{name}"), len(basis.V)
            if places is not None and places.numel() and not 0 <= int(places.min()) <= int(places.max()) < n:
                raise MismatchError(
                    f"frod_s_indices.{name} reach from {int(places.min())} to {int(places.max())}, the layers read "
                    f"{n} features; the file was made for another base",
                    key=f"frod_s_indices.{name}",
                    found=int(places.max()),
                    expected=n,
                )
        return {**self.kept_tensors(), **tensors}

    def load_file_tensors(self, tensors: dict[str, Tensor]) -> None:
        super().load_file_tensors(tensors)
        self.fillings += 1


class Frod(Adapter):
    """Trainable: l (in) and the entries of S (in, in). U (out, in) and l0 follow from V and the base weight."""

    base_kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv"})  # an embedding's V would be (rows, rows)
    views: ClassVar[tuple[str, ...]] = (
        *("frod_lambda_l", "frod_lambda_s_values", "frod_U", "frod_V", "frod_s_indices", "frod_s_size"),
        "frod_dropout",
    )

    frod_U: Tensor
    start: Tensor

    def __init__(self, layer: LinearMap, config: FrodConfig, path: str, basis: Basis) -> None:
        super().__init__()
        self.path, self.fillings, self.vectors_in = path, 0, layer.kind == "linear"
        self.dropping = config.frod_dropout > 0
        self.frod_dropout = input_dropout(layer, config.frod_dropout)
        U, start = coordinates(layer.weight, basis.V)
        self.replaces_base = _gives_back(layer, U, start, basis.V)
        self.register_buffer("frod_U", U, persistent=False)
        self.register_buffer("start", start, persistent=False)
        self.frod_lambda_l = nn.Parameter(start.clone())
        self.frod_lambda_s_values = nn.Parameter(torch.zeros(basis.places.shape[1]))
        if not config.init_weights:
            self.identity_at_birth = "init_weights=False draws S and moves l"
            nn.init.normal_(self.frod_lambda_s_values, std=0.1)
            with torch.no_grad():
                self.frod_lambda_l.add_(0.1 * torch.randn_like(start))

    @classmethod
    def build(cls, layer: LinearMap, config: FrodConfig, path: str, shared: Bases) -> Frod:
        return cls(layer, config, path, shared.of(path))

    def settle(self, layer: LinearMap) -> None:
        if self.fillings != self.shared.fillings:
            U, start = coordinates(layer.weight, self.frod_V)
            self.frod_U.copy_(U)
            self.start.copy_(start)
            self.replaces_base = _gives_back(layer, U, start, self.frod_V)
            self.fillings = self.shared.fillings

    @property
    def frod_V(self) -> Tensor:
        return self.shared.of(self.path).V.to(self.frod_U.device)

    @property
    def frod_s_indices(self) -> Tensor:
        return self.shared.of(self.path).places.to(self.frod_U.device)

    @property
    def frod_s_size(self) -> Tensor:
        return self.shared.of(self.path).size

    @property
    def S(self) -> Tensor:
        values, (rows, columns) = self.frod_lambda_s_values, self.frod_s_indices
        return values.new_zeros(2 * self.start.shape).index_put((rows, columns), values)

    def adapt(self, weight: Tensor) -> Tensor:
        middle = self.S + torch.diag(self.frod_lambda_l - self.start)
        return weight + (self.frod_U @ middle @ self.frod_V.T).to(torch.promote_types(weight.dtype, middle.dtype))

    def forward(self, x: Any, layer: LinearMap) -> Tensor:
        if self.replaces_base and layer.dense and x.dtype == torch.float32 and not (self.training and self.dropping):
            h = self._middle(layer.apply(x, self.frod_V.T), layer, self.frod_lambda_l)
            return (
                layer.mix(h, self.frod_U) if layer.bias is None else shift(layer.mix(h, self.frod_U), layer.bias, layer)
            )
        y, z = layer(x), layer.apply(self.frod_dropout(x), self.frod_V.T)
        h = self._middle(z, layer, self.frod_lambda_l - self.start)
        return y + layer.mix(h, self.frod_U).to(y.dtype)

    def _middle(self, z: Tensor, layer: LinearMap, diagonal: Tensor) -> Tensor:
        """(diag + S) z."""
        h = layer.scale(z, diagonal)
        if not self.vectors_in:
            return h + layer.mix(z, self.S)
        if not self.frod_lambda_s_values.numel():
            return h
        rows, columns = self.frod_s_indices
        return h + sparse_linear(z, self.frod_lambda_s_values, rows, columns, len(self.start))

    def extra_repr(self) -> str:
        return f"entries={len(self.frod_lambda_s_values)}"


def role(path: str) -> str:
    """What PEFT's files call the layers that do the same in every block."""
    *before, parent, name = ["", "", *path.split(".")]
    if not parent or parent.isdigit():
        return name
    return "attention_output" if [before[-1], parent, name] == ["attention", "output", "dense"] else f"{parent}_{name}"


def number(path: str, otherwise: int) -> int:
    """Of the block that a layer is in."""
    parts = path.split(".")
    after = parts[parts.index("layers") + 1 :][:1] if "layers" in parts else []
    return next((int(part) for part in (*after, *parts) if part.isdigit()), otherwise)


@torch.no_grad()
def joint_basis(weights: list[Tensor], alpha: float) -> Tensor:
    """V (in, in) of matrices (out, in): W_i = Q_i R with their QR together, V = R^T E with the eigenvectors E of the
    mean of (Q_i^T Q_i + alpha)^-1. With fewer rows than columns: the right singular vectors of all rows, completed."""
    stacked = torch.cat(weights)
    if stacked.shape[0] < stacked.shape[1]:
        return torch.linalg.svd(stacked, full_matrices=True).Vh.T.contiguous()
    Q, R = torch.linalg.qr(stacked)
    ridge, mean = alpha * torch.eye(len(R)), torch.zeros_like(R)
    for part in Q.split([len(weight) for weight in weights]):
        mean += torch.linalg.inv(part.T @ part + ridge)
    return R.T @ torch.linalg.eigh(mean / len(weights)).eigenvectors


@torch.no_grad()
def coordinates(weight: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """U (out, in) with columns of norm 1 (or 0) and l0 (in), so that W = U diag(l0) V^T; on the CPU in float64."""
    W, V = weight.detach().cpu().double(), V.cpu().double()
    try:
        scaled = torch.linalg.solve(V, W.T).T
    except RuntimeError:  # singular
        scaled = W @ torch.linalg.pinv(V, rtol=1e-6).T
    norms = scaled.norm(dim=0)
    return torch.where(norms > 1e-12, scaled / norms, 0.0).float().contiguous(), norms.float()


@torch.no_grad()
def _gives_back(layer: LinearMap, U: Tensor, start: Tensor, V: Tensor) -> bool:
    """Whether W is U diag(l0) V^T up to rounding, so that its own product is not needed."""
    if layer.kind != "linear" or not layer.dense or layer.dtype != torch.float32:
        return False
    W = layer.weight.detach().cpu()
    return bool(((U * start) @ V.cpu().T - W).norm() <= 1e-5 * W.norm())


def drawn_off_diagonal(n: int, rate: float, generator: torch.Generator) -> Tensor:
    """(2, count) places in an (n, n) matrix, by a random stream that files rely on."""
    total = n * (n - 1)
    count = max(min(int(n * n * rate), total), int(rate > 0 and total > 0))
    if not count:
        return torch.empty(2, 0, dtype=torch.long)
    drawn = torch.randperm(total, generator=generator)[:count]  # row by row, the diagonal left out
    rows, columns = drawn // (n - 1), drawn % (n - 1)
    return torch.stack([rows, columns + (columns >= rows)])


def usual_targets(model_type: str) -> Any:
    return ["query", "value"] if model_type == "vit" else veras_targets(model_type)


METHOD = Method(
    PeftType.FROD,
    FrodConfig,
    Frod,
    key_prefix="frod_",
    default_targets=usual_targets,
    shared=Bases,
    learning_rate=1e-3,
    train_options=all_linear,
)
