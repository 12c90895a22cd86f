"""SHiRA: W' = W + S, S sparse with r (in + out) entries in fixed places.   https://arxiv.org/abs/2406.13175"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune import checks
from deltatune.adapter import Adapter, Applied, LinearMap, Method
from deltatune.architectures import usual_targets as loras
from deltatune.config import PeftType, config
from deltatune.errors import ConfigError, MismatchError, StateError
from deltatune.factors import dense_enough, drawn_positions, recomputed, sparse_linear
from deltatune.methods.common import LayerConfig, all_linear
from deltatune.one_product import through_entries

UNSEEDED = 67280421310721  # what a torch.Generator starts from that nobody seeds, as PEFT's without `random_seed`


@config
class ShiraConfig(LayerConfig):
    """SHiRA's options, with PEFT's names and defaults.

    Attributes:
        r: The number of entries is r (in + out), that of a LoRA of rank r; the rank of S is not bounded by r.
        mask_type: "random": places drawn with `random_seed`. Any other name: those of `mask_fn`.
        mask_fn: No field: set `config.mask_fn = f`. f(base_layer, r) gives a mask of the shape of its weight with
            r (in + out) ones; with mask_type="random" it gets `random_seed=` too. Files then hold the places.
        init_weights: True starts at zero, so that a fresh adapter changes nothing; False draws from N(0, 1).
        fan_in_fan_out: Accepted and ignored: how a layer stores its weight is read off the layer.
    """

    beyond_peer: ClassVar[frozenset[str]] = frozenset({"exclude_modules", "layers_to_transform", "layers_pattern"})

    r: int = 32
    mask_type: str = "random"
    random_seed: int | None = None
    fan_in_fan_out: bool = False
    init_weights: bool = True

    def __post_init__(self) -> None:
        self.peft_type = PeftType.SHIRA
        self.mask_fn: Callable[..., Tensor] | None = None
        super().__post_init__()

    def validate(self) -> None:
        super().validate()
        checks.positive_int("ShiraConfig", "r", self.r)
        if self.random_seed is not None:
            checks.seed("ShiraConfig", "random_seed", self.random_seed)


class Shira(Adapter):
    """Trainable: r (in + out) numbers. Their places `shira_indices` (2, n) are rows and columns of W."""

    bounded_r: ClassVar[bool] = False
    views: ClassVar[tuple[str, ...]] = ("shira_weight", "shira_indices", "r", "scaling")

    shira_indices: Tensor

    def __init__(self, layer: LinearMap, r: int, indices: Tensor | None, zeros: bool) -> None:
        super().__init__()
        self.r, self.scaling, self.kind = r, 1.0, layer.kind
        self.configured_scaling = 1.0
        self.shape, count = (layer.out_features, layer.in_features), r * (layer.in_features + layer.out_features)
        self.shira_weight = nn.Parameter(torch.zeros(count) if zeros else torch.randn(count))
        if not zeros:
            self.identity_at_birth = "init_weights=False draws the entries"
        self.placed = indices is not None
        indices = torch.zeros(2, count) if indices is None else indices  # until a file brings them
        self.register_buffer("shira_indices", indices.int(), persistent=False)
        self.in_order = _ascend(self.shira_indices[0])

    @classmethod
    def build(cls, layer: LinearMap, config: ShiraConfig, path: str) -> Shira:
        height, width = layer.out_features, layer.in_features
        most, count = height * width // (height + width), config.r * (height + width)
        if config.r > most:
            raise ConfigError(
                f"ShiraConfig: r={config.r} asks for {count} entries, {path} ({height}, {width}) has {height * width}; "
                + (f"use at most r={most}" if most else "do not target it"),
                field="r",
                path=path,
                found=config.r,
                expected=most,
            )
        if config.mask_fn is not None:
            indices = _masked(layer, config, count, path)
        elif config.mask_type == "random":
            seed = UNSEEDED if config.random_seed is None else config.random_seed
            indices = drawn_positions(height, width, count, seed, in_order=True)  # as a mask gives them, and files have
        else:
            indices = None
        made = cls(layer, config.r, indices, config.init_weights)
        made.keeps_derived = config.mask_fn is not None or indices is None
        return made

    @property
    def places(self) -> tuple[Tensor, Tensor]:
        if not self.placed:
            raise StateError(
                "SHiRA: mask_type names a mask, and no entries are chosen: set config.mask_fn before the config is "
                "used, or load an adapter, whose file says which",
                field="mask_fn",
            )
        rows, columns = self.shira_indices.long()
        return rows, columns

    def adapt(self, weight: Tensor) -> Tensor:
        v = self.shira_weight
        return weight.to(torch.promote_types(weight.dtype, v.dtype)) + self.matrix(v)

    def matrix(self, v: Tensor) -> Tensor:
        return v.new_zeros(self.shape).index_put(self.places, self.scaling * v, accumulate=True)

    def forward(self, x: Any, layer: LinearMap) -> Tensor:
        v = self.shira_weight
        if self.kind == "linear" and dense_enough(len(v), x, layer):
            rows, columns = self.places
            y = through_entries(x, layer, rows * self.shape[1] + columns, self.scaling * v)
            if y is not None:
                return y
        y = layer(x)
        if self.kind == "linear":
            change = sparse_linear(x, self.scaling * v, *self.places, self.shape[0], self.in_order)
        else:  # images and indices go through the matrix, which is built again for the gradient and not kept
            change = recomputed(lambda x, v: layer.apply(x, self.matrix(v)), x, v)
        return y + change.to(y.dtype)

    # ---------------------------------------------------------------------------------------------------------- files

    def derived_tensors(self) -> dict[str, Tensor]:
        return {"shira_indices": self.shira_indices}

    def load_file_tensors(self, tensors: dict[str, Tensor]) -> None:
        super().load_file_tensors(tensors)
        self.placed, self.in_order = True, _ascend(self.shira_indices[0])

    def from_file(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        indices = tensors.get("shira_indices")
        if indices is None:
            return tensors
        indices, sides = indices.int(), torch.tensor(self.shape)[:, None]  # PEFT writes floats on Windows
        if indices.shape == self.shira_indices.shape and not ((indices >= 0) & (indices < sides)).all():
            raise MismatchError(
                f"shira_indices lie outside of the layer's weight {self.shape}; the file was made for another base",
                key="shira_indices",
                expected=self.shape,
            )
        return {**tensors, "shira_indices": indices}


def _ascend(rows: Tensor) -> bool:
    return bool((rows.diff() >= 0).all())


def _masked(layer: LinearMap, config: ShiraConfig, count: int, path: str) -> Tensor:
    """The places of the ones of the user's mask."""
    base: Any = layer
    while isinstance(base, Applied):
        base = base.inner
    assert config.mask_fn is not None
    seed = {"random_seed": config.random_seed} if config.mask_type == "random" else {}
    mask = config.mask_fn(base.module, config.r, **seed)
    shape = tuple(base.module.weight.shape)
    found = int(mask.sum()) if tuple(mask.shape) == shape else None
    if found != count or not ((mask == 0) | (mask == 1)).all():
        raise ConfigError(
            f"ShiraConfig: mask_fn gave for {path} a mask of shape {tuple(mask.shape)} with {int((mask != 0).sum())} "
            f"entries; expected shape {shape} with {count} = r (in + out) ones and else zeros",
            field="mask_fn",
            path=path,
            found=found,
            expected=count,
        )
    return layer.matrix(mask).nonzero().T.cpu()


def usual_targets(model_type: str) -> Any:
    """LoRA's, but in Phi the attention alone."""
    return ["q_proj", "v_proj"] if model_type == "phi" else loras(model_type)


METHOD = Method(
    PeftType.SHIRA,
    ShiraConfig,
    Shira,
    key_prefix="shira_",
    default_targets=usual_targets,
    learning_rate=2e-3,
    train_options=all_linear,
)
