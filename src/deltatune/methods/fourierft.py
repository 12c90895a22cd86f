"""FourierFT: W' = W + s Re(IDFT2(S)), S a sparse real spectrum.   https://arxiv.org/abs/2405.03003"""

from __future__ import annotations

import math
from dataclasses import field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune import biases, checks
from deltatune.adapter import Adapter, LinearMap, Method
from deltatune.config import PeftType, config
from deltatune.factors import at_least_single, drawn_positions, fewer_by_vector, recomputed
from deltatune.methods.c3a import usual_targets
from deltatune.methods.common import LayerConfig, all_linear
from deltatune.one_product import through_sum
from deltatune.patterns import pattern_value


@config
class FourierFTConfig(LayerConfig):
    """FourierFT's options, with PEFT's names and defaults.

    Attributes:
        n_frequency: Number n of coefficients of the spectrum that are trained, all others are zero.
        n_frequency_pattern: Layer name or regular expression -> another number.
        scaling: The s of the equation.
        random_loc_seed: Decides where the coefficients are; files hold the seed, not the places.
        init_weights: True starts them at zero, so that a fresh adapter changes nothing; False draws them from N(0, 1).
        fan_in_fan_out: Accepted and ignored: how a layer stores its weight is read off the layer.
    """

    n_frequency: int = 1000
    scaling: float = 150.0
    random_loc_seed: int = 777
    fan_in_fan_out: bool = False
    bias: str = "none"
    n_frequency_pattern: dict | None = field(default_factory=dict)
    init_weights: bool = False

    def __post_init__(self) -> None:
        self.peft_type = PeftType.FOURIERFT
        super().__post_init__()

    def validate(self) -> None:
        super().validate()
        checks.positive_int("FourierFTConfig", "n_frequency", self.n_frequency)
        checks.finite_positive("FourierFTConfig", "scaling", self.scaling)
        checks.seed("FourierFTConfig", "random_loc_seed", self.random_loc_seed)
        biases.check("FourierFTConfig", self.bias, "fourier_only")


class FourierFT(Adapter):
    """Trainable: n coefficients. Their places `indices` (2, n), rows and columns of S, follow from the seed."""

    views: ClassVar[tuple[str, ...]] = (
        *("fourierft_spectrum", "fourierft_n_frequency", "fourierft_scaling", "fourierft_random_loc_seed", "indices"),
    )
    indices: Tensor
    halves: Tensor
    mirrored: Tensor
    share: Tensor
    placed: Tensor
    entries: Tensor

    def __init__(self, layer: LinearMap, count: int, scaling: float, seed: int, zeros: bool) -> None:
        super().__init__()
        self.kind, self.shape = layer.kind, (layer.out_features, layer.in_features)
        self.fourierft_n_frequency, self.fourierft_scaling, self.fourierft_random_loc_seed = count, scaling, seed
        self.fourierft_spectrum = nn.Parameter(torch.zeros(count) if zeros else torch.randn(count))
        if not zeros:
            self.identity_at_birth = "init_weights=False draws the spectrum"
        self._place(drawn_positions(*self.shape, count, seed))

    @classmethod
    def build(cls, layer: LinearMap, config: FourierFTConfig, path: str) -> FourierFT:
        count = pattern_value(config.n_frequency_pattern or {}, path, config.n_frequency)
        entries = layer.out_features * layer.in_features
        checks.at_most("FourierFTConfig", "n_frequency", count, entries, f"the entries of {path}")
        return cls(layer, count, config.scaling, config.random_loc_seed, config.init_weights)

    def _place(self, indices: Tensor) -> None:
        """The places, and the same in half spectra: of real vectors, the other half mirrors the first."""
        (rows, columns), (height, width) = indices, self.shape
        halves = torch.stack([torch.minimum(rows, height - rows), torch.minimum(columns, width - columns)])
        mirrored = (2 * columns <= width) != (2 * rows > height)
        alone = (halves[0] == 0) | (2 * halves[0] == height)  # rows without a mirror image
        # with half of the columns each entry stands for its mirror image too, but in columns that are their own mirror
        left, own = 2 * columns <= width, (columns == 0) | (2 * columns == width)
        flat = torch.where(left, rows, -rows % height) * (width // 2 + 1) + halves[1]
        placed = torch.cat([flat, (-rows[own] % height) * (width // 2 + 1) + halves[1, own]])
        entries = torch.cat([torch.arange(len(rows), device=rows.device), own.nonzero()[:, 0]])
        found = {"indices": indices, "halves": halves, "mirrored": mirrored, "placed": placed, "entries": entries}
        for name, tensor in {**found, "share": torch.where(alone, 1.0, 0.5)}.items():
            self.register_buffer(name, tensor, persistent=False)

    def derived_tensors(self) -> dict[str, Tensor]:
        return {"fourierft_indices": self.indices}

    def load_file_tensors(self, tensors: dict[str, Tensor]) -> None:
        super().load_file_tensors(tensors)
        self._place(self.indices)

    @property
    def coefficients(self) -> Tensor:
        spectrum = self.fourierft_spectrum
        return spectrum.to(at_least_single(spectrum)) * self.fourierft_scaling  # half precision has no FFT

    def delta(self, c: Tensor) -> Tensor:
        """Re(IDFT(F)) of F with c at its places: the inverse transform of the half of (F + conj(mirrored F)) / 2."""
        half = c.new_zeros(self.shape[0] * (self.shape[1] // 2 + 1)).index_add(0, self.placed, c[self.entries] / 2)
        return torch.fft.irfft2(torch.complex(half, torch.zeros_like(half)).view(self.shape[0], -1), s=self.shape)

    def adapt(self, weight: Tensor) -> Tensor:
        return weight + self.delta(self.coefficients)

    def forward(self, x: Any, layer: LinearMap) -> Tensor:
        c = self.coefficients
        few = fewer_by_vector(x, layer, self.fourierft_n_frequency)
        if not few and (y := through_sum(x, layer, self.delta, c)) is not None:
            return y
        y = layer(x)
        if few:
            return y + self._change(x, c, layer).to(y.dtype)
        return y + recomputed(lambda x, c: layer.apply(x, self.delta(c)), x, c).to(y.dtype)

    def _change(self, x: Tensor, c: Tensor, layer: LinearMap) -> Tensor:
        """delta x = Re(IDFT(places(c * IDFT(x)))): a transform of x, n products, and a transform back."""
        height, width = self.shape
        rows, columns = self.halves
        if self.kind == "embedding":  # one-hot vectors, whose transforms are known; times the layer's own factor
            angle = (x[..., None] * columns % width).to(c.dtype) * (-2 * math.pi / width)
            X = torch.polar(torch.ones_like(angle), angle)
            c = c * layer.apply(x, c.new_ones(1, width))
        else:
            X = torch.fft.rfft(x.to(torch.promote_types(x.dtype, c.dtype)))[..., columns]
        h = torch.where(self.mirrored, X.conj(), X) * (c * self.share)
        H = h.new_zeros(*h.shape[:-1], height // 2 + 1).index_add(-1, rows, h)
        return torch.fft.irfft(H, n=height) / width


METHOD = Method(
    *(PeftType.FOURIERFT, FourierFTConfig, FourierFT),
    key_prefix="fourierft_",
    default_targets=usual_targets,
    learning_rate=0.1,
    train_options=all_linear,
)
