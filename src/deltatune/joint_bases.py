"""One basis V for the weights of all layers that do the same, and the places of sparse entries: FRoD's frozen part."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from deltatune.adapter import LinearMap, Stored
from deltatune.errors import MismatchError

if TYPE_CHECKING:
    from deltatune.methods.frod import FrodConfig


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


def drawn_off_diagonal(n: int, rate: float, generator: torch.Generator) -> Tensor:
    """(2, count) places in an (n, n) matrix, by a random stream that files rely on."""
    total = n * (n - 1)
    count = max(min(int(n * n * rate), total), int(rate > 0 and total > 0))
    if not count:
        return torch.empty(2, 0, dtype=torch.long)
    drawn = torch.randperm(total, generator=generator)[:count]  # row by row, the diagonal left out
    rows, columns = drawn // (n - 1), drawn % (n - 1)
    return torch.stack([rows, columns + (columns >= rows)])
