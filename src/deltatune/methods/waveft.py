"""WaveFT: W' = W + s IDWT2(S), S sparse wavelet coefficients.   https://arxiv.org/abs/2505.12532"""

from __future__ import annotations

import copy
import re
from dataclasses import field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune import biases, checks
from deltatune.adapter import Adapter, LinearMap, Method
from deltatune.config import PeftType, config
from deltatune.errors import ConfigError
from deltatune.factors import at_least_single, drawn_positions, fewer_by_vector, recomputed
from deltatune.methods.c3a import usual_targets
from deltatune.methods.common import LayerConfig, all_linear
from deltatune.patterns import pattern_value
from deltatune.wavelets import NAMES, analyse, filters, reach, synthesise, value


@config
class WaveFTConfig(LayerConfig):
    """WaveFT's options, with PEFT's names and defaults.

    Attributes:
        n_frequency: Number n of coefficients that are trained, all others are zero.
        n_frequency_pattern: Layer name or regular expression -> another number.
        proportional_parameters: Share the coefficients out by the layers' sizes, n of them per layer on average.
        scaling: The s of the equation.
        wavelet_family: "db1" (Haar) to "db10", "sym2" to "sym10", "coif1" to "coif3".
        use_idwt: False: the coefficients are entries of W' - W themselves.
        random_loc_seed: Decides where the coefficients are; files hold the seed, not the places.
        init_weights: True starts them at zero, so that a fresh adapter changes nothing; False draws them.
        fan_in_fan_out: Accepted and ignored: how a layer stores its weight is read off the layer.
    """

    n_frequency: int = 2592
    scaling: float = 25.0
    wavelet_family: str = "db1"
    use_idwt: bool = True
    random_loc_seed: int = 777
    fan_in_fan_out: bool = False
    bias: str = "none"
    n_frequency_pattern: dict | None = field(default_factory=dict)
    proportional_parameters: bool = False
    init_weights: bool = True

    def __post_init__(self) -> None:
        self.peft_type = PeftType.WAVEFT
        super().__post_init__()

    def validate(self) -> None:
        super().validate()
        checks.positive_int("WaveFTConfig", "n_frequency", self.n_frequency)
        checks.finite_positive("WaveFTConfig", "scaling", self.scaling)
        checks.seed("WaveFTConfig", "random_loc_seed", self.random_loc_seed)
        biases.check("WaveFTConfig", self.bias, "waveft_only")
        if self.use_idwt and self.wavelet_family in ("coif4", "coif5"):
            raise ConfigError(
                f"WaveFTConfig: wavelet_family={self.wavelet_family!r} is no wavelet in PEFT, whose filter of that "
                "name is not orthonormal, so its files would mean something else here; use 'coif3' or 'sym10'",
                field="wavelet_family",
                found=self.wavelet_family,
                expected=NAMES,
            )
        if self.use_idwt:
            checks.one_of("WaveFTConfig", "wavelet_family", self.wavelet_family, NAMES)


class WaveFT(Adapter):
    """Trainable: n coefficients. Their places (2, n), rows and columns of S, follow from the seed."""

    views: ClassVar[tuple[str, ...]] = (
        *("waveft_spectrum", "waveft_n_frequency", "waveft_scaling", "waveft_random_loc_seed"),
        *("waveft_wavelet_family", "waveft_indices", "waveft_use_idwt"),
    )

    waveft_indices: Tensor
    places: Tensor
    filters: Tensor | None

    def __init__(
        self, layer: LinearMap, count: int, scaling: float, family: str, idwt: bool, seed: int, zeros: bool
    ) -> None:
        super().__init__()
        self.kind, self.shape = layer.kind, (layer.out_features, layer.in_features)
        self.waveft_n_frequency, self.waveft_scaling, self.waveft_random_loc_seed = count, scaling, seed
        self.waveft_wavelet_family, self.waveft_use_idwt = family, idwt
        self.waveft_spectrum = nn.Parameter(torch.zeros(count) if zeros else 0.01 * torch.randn(count))
        if not zeros:
            self.identity_at_birth = "init_weights=False draws the coefficients"
        indices = drawn_positions(*self.shape, count, seed)
        # in float64 until the adapter gets its precision, so that nothing is rounded twice
        self.register_buffer("filters", filters(family) if idwt else None, persistent=False)
        self.register_buffer("waveft_indices", indices, persistent=False)
        self._place()

    @classmethod
    def plan(cls, layers: dict[str, LinearMap], config: WaveFTConfig) -> WaveFTConfig:
        if not config.proportional_parameters:
            return config
        sizes = {path: layer.out_features * layer.in_features for path, layer in layers.items()}
        budget = config.n_frequency * len(sizes)
        counts = {path: max(1, round(size / sum(sizes.values()) * budget)) for path, size in sizes.items()}
        planned = copy.copy(config)
        planned.n_frequency_pattern = {rf"\A{re.escape(path)}": count for path, count in counts.items()}
        return planned

    @classmethod
    def build(cls, layer: LinearMap, config: WaveFTConfig, path: str) -> WaveFT:
        count = pattern_value(config.n_frequency_pattern or {}, path, config.n_frequency)
        entries = layer.out_features * layer.in_features
        checks.at_most("WaveFTConfig", "n_frequency", count, entries, f"the entries of {path}")
        return cls(
            layer,
            count,
            config.scaling,
            config.wavelet_family,
            config.use_idwt,
            config.random_loc_seed,
            config.init_weights,
        )

    @property
    def halves(self) -> tuple[int, int]:
        """Coefficients of each band along rows and columns; filters longer than 2 reach over the edges."""
        assert self.filters is not None
        beyond = self.filters.shape[1] - 2
        return (self.shape[0] + beyond + 1) // 2, (self.shape[1] + beyond + 1) // 2

    def _place(self) -> None:
        """From places in a matrix of four bands, the drawn ones in its middle, to (low, high) along each side.

        The band beside the low one is high along the rows in PEFT and so in files: halves change places.
        """
        places = self.waveft_indices
        row, column = places
        if self.filters is not None:
            (m, n), (height, width) = self.halves, self.shape
            row, column = row + (2 * m - height) // 2, column + (2 * n - width) // 2
            places = torch.stack([row % m + column // n * m, column % n + row // m * n])
        self.register_buffer("places", places, persistent=False)

    def derived_tensors(self) -> dict[str, Tensor]:
        return {"waveft_indices": self.waveft_indices}

    def load_file_tensors(self, tensors: dict[str, Tensor]) -> None:
        super().load_file_tensors(tensors)
        self._place()

    @property
    def coefficients(self) -> Tensor:
        return self.waveft_spectrum.to(at_least_single(self.waveft_spectrum)) * self.waveft_scaling

    def delta(self, c: Tensor) -> Tensor:
        """Each coefficient is a wave over a few rows and columns; the sum of them as a matrix."""
        height, width = self.shape
        if self.filters is None:
            return c.new_zeros(self.shape).index_put((self.places[0], self.places[1]), c)
        rows, down = reach(self.places[0], self.halves[0], self.filters, height)
        columns, across = reach(self.places[1], self.halves[1], self.filters, width)
        at = rows[:, :, None] * width + columns[:, None, :]
        values = c[:, None, None] * (down[:, :, None] * across[:, None, :]).to(c.dtype)
        return c.new_zeros(height * width).index_add(0, at.flatten(), values.flatten()).view(height, width)

    def adapt(self, weight: Tensor) -> Tensor:
        return weight + self.delta(self.coefficients)

    def forward(self, x: Any, layer: LinearMap) -> Tensor:
        y, c = layer(x), self.coefficients
        if fewer_by_vector(x, layer, self.waveft_n_frequency):
            return y + self._change(x, c, layer).to(y.dtype)
        return y + recomputed(lambda x, c: layer.apply(x, self.delta(c)), x, c).to(y.dtype)

    def _change(self, x: Tensor, c: Tensor, layer: LinearMap) -> Tensor:
        """delta x: the wavelet transform of x, n products, and the inverse transform."""
        rows, columns = self.places
        if self.kind == "embedding":  # one-hot vectors, times the layer's own factor
            places = x[..., None]
            X = places == columns if self.filters is None else value(places, columns, self.halves[1], self.filters)
            c = c * layer.apply(x, c.new_ones(1, self.shape[1]))
        else:
            x = x.to(torch.promote_types(x.dtype, c.dtype))
            X = (x if self.filters is None else analyse(x, self.filters, self.halves[1]))[..., columns]
        h = X * c
        size = self.shape[0] if self.filters is None else 2 * self.halves[0]
        H = h.new_zeros(*h.shape[:-1], size).index_add(-1, rows, h)
        return H if self.filters is None else synthesise(H, self.filters, self.shape[0])


METHOD = Method(
    PeftType.WAVEFT,
    WaveFTConfig,
    WaveFT,
    key_prefix="waveft_",
    default_targets=usual_targets,
    learning_rate=1e-3,
    train_options=all_linear,
)
