"""Orthonormal wavelets: filters of Daubechies, symlets and coiflets from what defines them, and their transforms.

Filters have unit norm and sum sqrt(2); their order in time is that of PyWavelets' reconstruction filters.
"""

from __future__ import annotations

import cmath
import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

NAMES = (
    *(f"db{moments}" for moments in range(1, 11)),
    *(f"sym{moments}" for moments in range(2, 11)),
    *(f"coif{moments}" for moments in range(1, 4)),
)
# Symlets: which zeros of the Daubechies filter, the one farthest out first, are taken outside of the unit circle.
_OUTSIDE = {4: {0}, 5: {1}, 6: {0, 2}, 7: {2}, 8: {0, 2}, 9: {1, 2}, 10: {0, 2, 4}}


@functools.cache
def low_pass(name: str) -> tuple[float, ...]:
    family, order = name.rstrip("0123456789"), int(name.lstrip("abcdefghijklmnopqrstuvwxyz"))
    if family == "coif":
        return tuple(_coiflet(order).tolist())
    return tuple(_daubechies(order, _OUTSIDE.get(order, set()) if family == "sym" else set()).tolist())


def high_pass(low: tuple[float, ...]) -> tuple[float, ...]:
    """The quadrature mirror: turned round, every second sign changed."""
    return tuple((-1) ** place * value for place, value in enumerate(reversed(low)))


def _daubechies(moments: int, outside: set[int]) -> np.ndarray:
    """N zeros at -1, and of each pair z, 1/z that makes it orthonormal one.   Daubechies, Ten Lectures, section 6.1"""
    zeros = []
    for y in np.roots([math.comb(moments - 1 + k, k) for k in reversed(range(moments))]).astype(complex):
        middle = 1 - 2 * y
        z = middle + cmath.sqrt(middle * middle - 1)
        z = 1 / z if abs(z) > 1 else z
        if z.imag > -1e-9:  # the other one of a complex pair is in its factor
            zeros.append(z)
    h = np.poly([-1.0] * moments)
    for place, z in enumerate(sorted(zeros, key=abs, reverse=True)):
        z = 1 / z if place in outside else z
        h = np.convolve(h, [1, -z.real] if abs(z.imag) < 1e-9 else [1, -2 * z.real, abs(z) ** 2])
    return h * math.sqrt(2) / h.sum()


def _coiflet(order: int) -> np.ndarray:
    """Newton's method on the defining equations, from the coiflet of the order before."""
    if order == 0:
        return np.array([math.sqrt(2)])
    before = _coiflet(order - 1)
    h = np.concatenate([np.zeros(2), before, np.zeros(6 * order - 2 - len(before))])
    for _ in range(10):  # six are enough
        missed, slope = _coiflet_equations(h, order)
        h = h - np.linalg.lstsq(slope, missed, rcond=None)[0]
    return h


def _coiflet_equations(h: np.ndarray, order: int) -> tuple[np.ndarray, np.ndarray]:
    """Orthonormal to its own even shifts; 2K moments of the wavelet and 2K - 1 of the scaling function vanish."""
    place = (np.arange(len(h)) - 2 * order) / len(h)
    rows = [np.ones_like(h)]
    rows += [place**moment for moment in range(1, 2 * order)]
    rows += [(-1.0) ** np.arange(len(h)) * place**moment for moment in range(2 * order)]
    missed = [row @ h for row in rows]
    missed[0] -= math.sqrt(2)
    for shift in range(0, len(h), 2):
        later = np.concatenate([h[shift:], np.zeros(shift)])
        earlier = np.concatenate([np.zeros(shift), h[: len(h) - shift]])
        missed.append(h @ later - (shift == 0))
        rows.append(later + earlier)
    return np.array(missed), np.array(rows)


def filters(name: str) -> Tensor:
    """(2, length): the low-pass filter and its mirror, in float64."""
    low = low_pass(name)
    return torch.tensor([low, high_pass(low)], dtype=torch.float64)


def synthesise(bands: Tensor, filters: Tensor, length: int) -> Tensor:
    """The inverse transform over the last axis: (..., m low and m high coefficients) -> (..., length)."""
    beyond, halves = filters.shape[1] - 2, bands.reshape(-1, 2, bands.shape[-1] // 2)
    whole = F.conv_transpose1d(halves, filters[:, None].to(bands.dtype), stride=2)
    return whole[:, 0, beyond : beyond + length].reshape(*bands.shape[:-1], length)


def analyse(x: Tensor, filters: Tensor, m: int) -> Tensor:
    """The transpose of `synthesise`, to 2 m coefficients: with orthonormal filters, the transform itself."""
    padded = F.pad(x.reshape(-1, 1, x.shape[-1]), (filters.shape[1] - 2, 2 * m - x.shape[-1]))
    bands = F.conv1d(padded, filters[:, None].to(x.dtype), stride=2)
    return bands.reshape(*x.shape[:-1], 2 * m)


def reach(places: Tensor, m: int, filters: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Of coefficients among 2 m: the entries they reach (n, taps) among `length`, and their values there.

    Taps beyond the edges have the value zero, at an entry within.
    """
    taps = torch.arange(filters.shape[1], device=places.device)
    at = 2 * (places % m)[:, None] + taps - (len(taps) - 2)
    inside = (at >= 0) & (at < length)
    return at.clamp(0, length - 1), torch.where(inside, filters[places // m], 0)


def value(at: Tensor, places: Tensor, m: int, filters: Tensor) -> Tensor:
    """The values of coefficients among 2 m at single entries."""
    tap = at + filters.shape[1] - 2 - 2 * (places % m)
    inside = (tap >= 0) & (tap < filters.shape[1])
    return torch.where(inside, filters[places // m, tap.clamp(0, filters.shape[1] - 1)], 0)
