"""FRoD: W' = W + U (S + diag(l - l0)) V^T, where W = U diag(l0) V^T, V joint for layers of one role, S sparse.

https://doi.org/10.1609/aaai.v40i31.39813
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune import biases, checks
from deltatune.adapter import Adapter, LinearMap, Method
from deltatune.config import PeftType, config
from deltatune.factors import denser, input_dropout, shift, sparse_linear
from deltatune.joint_bases import Bases, Basis, coordinates
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
        values, (rows, columns), size = self.frod_lambda_s_values, self.frod_s_indices, len(self.start)
        if not self.vectors_in or denser(len(values), z, size):
            places = torch.cat([rows * size + columns, torch.arange(size, device=rows.device) * (size + 1)])
            entries = torch.cat([values, diagonal]).to(z.dtype)
            return layer.mix(z, z.new_zeros(size * size).scatter(0, places, entries).view(size, size))
        h = layer.scale(z, diagonal)
        return h + sparse_linear(z, values, rows, columns, size) if len(values) else h

    def extra_repr(self) -> str:
        return f"entries={len(self.frod_lambda_s_values)}"


@torch.no_grad()
def _gives_back(layer: LinearMap, U: Tensor, start: Tensor, V: Tensor) -> bool:
    """Whether W is U diag(l0) V^T up to rounding, so that its own product is not needed."""
    if layer.kind != "linear" or not layer.dense or layer.dtype != torch.float32:
        return False
    W = layer.weight.detach().cpu()
    return bool(((U * start) @ V.cpu().T - W).norm() <= 1e-5 * W.norm())


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
