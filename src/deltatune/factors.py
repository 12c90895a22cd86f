"""Maths that methods share: factors, block-diagonal matrices, rotations, reflections, random projections."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deltatune.adapter import LinearMap


class Factor(nn.Module):
    """One tensor called `weight`, given or uninitialised, in the shape in which files keep it; perhaps a bias.

    It trains, unless it is `fixed`: then it is a buffer.
    """

    weight: Tensor
    bias: nn.Parameter | None
    rows: int = 0  # axes before those of one adapter (`deltatune.mixed`)

    def __init__(self, *shape: int, bias: int | None = None, fixed: bool = False, weight: Tensor | None = None) -> None:
        super().__init__()
        weight = torch.empty(shape) if weight is None else weight.reshape(shape)
        # past nn.Module's look-ups, which take longer than the tensors, of which an adapter has hundreds
        if fixed:
            self._buffers["weight"] = weight
        else:
            self._parameters["weight"] = nn.Parameter(weight)
        if bias is None:
            vars(self)["bias"] = None
        else:
            self.bias = nn.Parameter(torch.zeros(bias))

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """For programs that call `layer.lora_A["default"](x)` as the linear layer that it is in PEFT."""
        return F.linear(x, self.matrix, self.bias)

    @property
    def matrix(self) -> Tensor:
        """The tensor as a matrix: a convolution's kernel positions join its channels."""
        weight = self._parameters.get("weight", None)  # past nn.Module's look-up, for each layer and token
        weight, axes = self.weight if weight is None else weight, 2 + self.rows
        return weight if weight.ndim == axes else weight.flatten(axes - 1)

    def extra_repr(self) -> str:
        return str(tuple(self.weight.shape))


NO_DROPOUT = nn.Identity()  # one for all layers of all adapters, of which there may be very many


def input_dropout(layer: LinearMap, share: float) -> nn.Module:
    """Dropout on what a layer reads; none on indices, which an embedding reads."""
    return nn.Dropout(share) if share and layer.kind != "embedding" else NO_DROPOUT


def shift(y: Tensor, vector: Tensor, layer: LinearMap) -> Tensor:
    """y + vector (out,), over the features of a layer's output."""
    if vector.ndim == 1 and layer.kind != "conv":  # the last axis: a sum that needs no tensor of y's size
        return y + vector.to(y.dtype)
    ones = torch.ones((), dtype=y.dtype, device=y.device).expand_as(y)
    return y + layer.scale(ones, vector)


def block_diagonal(matrix: Tensor, blocks: int) -> Tensor:
    """(out, r / blocks) -> (out, r): the rows of block i read the i-th share of the columns."""
    return matrix if blocks == 1 else torch.block_diag(*matrix.chunk(blocks))


def tucker(core: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """A kernel (out, in, ...) from a core (r, r, ...) and factors (r, out) and (r, in): FedPara's proposition 3."""
    return torch.einsum("ij...,ip,jq->pq...", core, up, down)


class RowDropout(nn.Module):
    """Dropout, in training, of features of an update's output and of the update as a whole, for all rows of a batch.

    With `rescale` the kept features are divided by their share, so that their expected sum stays.
    """

    def __init__(self, features: float, whole: float, rescale: bool) -> None:
        super().__init__()
        self.features, self.whole, self.rescale = features, whole, rescale

    def forward(self, update: Tensor, layer: LinearMap) -> Tensor:
        if not self.training:
            return update
        if self.whole:
            update = update * (torch.rand((), device=update.device) > self.whole)
        if self.features:
            kept = (torch.rand(layer.out_features, device=update.device) > self.features).float()
            update = layer.scale(update, kept / kept.mean().clamp_min(1e-6) if self.rescale else kept)
        return update


def scale_of_rows(x: Tensor, layer: LinearMap, dtype: torch.dtype) -> Tensor:
    """What an embedding that scales its rows multiplies them by, (..., 1); ones with others."""
    return layer.apply(x, torch.ones((), dtype=dtype, device=x.device).expand(1, layer.in_features))


def skew_symmetric(entries: Tensor, size: int) -> Tensor:
    """(blocks, size (size - 1) / 2) -> (blocks, size, size): the entries above the diagonal, and Q^T = -Q."""
    rows, columns = torch.triu_indices(size, size, 1, device=entries.device)
    places = (rows * size + columns).expand_as(entries)
    upper = entries.new_zeros(len(entries), size * size).scatter(1, places, entries).unflatten(1, (size, size))
    return upper - upper.mT


def cayley(Q: Tensor) -> Tensor:
    """Rotations R = (I - Q)(I + Q)^-1 of skew-symmetric matrices Q (blocks, size, size)."""
    wide = Q.to(torch.promote_types(Q.dtype, torch.float32))  # no solver works in half precision
    eye = torch.eye(Q.shape[-1], device=Q.device, dtype=wide.dtype)
    return torch.linalg.solve(eye + wide, eye - wide, left=False).to(Q.dtype)


def cayley_neumann(Q: Tensor, terms: int) -> Tensor:
    """The Cayley rotation (I + Q)(I - Q)^-1 as the series I + 2Q + 2Q^2 + ..., its last power with weight one.

    That weight, the highest power (terms - 1, but never 2) and the sign, opposite to that of `cayley`, are those of
    OFTv2's code and so of every file.   https://arxiv.org/abs/2506.19847
    """
    eye = torch.eye(Q.shape[-1], device=Q.device, dtype=Q.dtype)
    last = terms - 1 if terms <= 2 else max(terms - 1, 3)
    powers = Q if last > 1 else 2 * Q
    for _ in range(last - 1):  # from inside out: (2 + (2 + Q) Q) Q
        powers = torch.baddbmm(Q, powers, Q, beta=2)
    return eye + powers


def reflect(x: Tensor, u: Tensor) -> Tensor:
    """x (I - 2 u u^T) over the last axis, for a unit vector u."""
    return x - 2 * (x @ u)[..., None] * u


def orthonormal_rows(matrix: Tensor) -> Tensor:
    """The rows (at most as many as columns) made orthonormal by Gram-Schmidt, in one step."""
    wide = matrix.T.to(torch.promote_types(matrix.dtype, torch.float32))  # no solver works in half precision
    Q, triangle = torch.linalg.qr(wide)
    return (Q * triangle.diagonal().sign()).T.to(matrix.dtype)


def orthonormal(columns: Tensor) -> Tensor:
    """The columns made orthonormal by Gram-Schmidt, in order."""
    done: list[Tensor] = []
    for column in columns.unbind(1):
        for earlier in done:
            column = column - (earlier @ column) * earlier
        done.append(column / column.norm())
    return torch.stack(done, dim=1)


def circulant(kernel: Tensor) -> Tensor:
    """(m, n, b) -> (m b, n b): m x n circulant blocks, of each of which the kernel holds the first row."""
    step = torch.arange(kernel.shape[-1], device=kernel.device)
    blocks = kernel[..., (step - step[:, None]) % len(step)]  # (m, n, b, b), row k is the first one turned k times
    return blocks.transpose(1, 2).flatten(2).flatten(0, 1)


def correlate(x: Tensor, kernel: Tensor) -> Tensor:
    """x C^T over the last axis for C = circulant(kernel), by FFT: y_k = sum_j c_{j-k} x_j is Y = X conj(C).

    Half precision has no FFT; the wider copies and spectra are made again for the gradient, instead of being kept.
    """
    narrow = x.dtype.itemsize < at_least_single(kernel).itemsize
    return recomputed(_correlated, x, kernel) if narrow else _correlated(x, kernel)


def _correlated(x: Tensor, kernel: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, at_least_single(kernel))
    parts, kernel = x.to(dtype).unflatten(-1, (-1, kernel.shape[-1])), kernel.to(dtype)
    if not parts.numel():  # nothing to transform, which not every library for FFT takes
        return torch.einsum("...nb,mnb->...mb", parts, kernel).flatten(-2)
    X, C = torch.view_as_real(torch.fft.rfft(parts)), torch.view_as_real(torch.fft.rfft(kernel))
    # X conj(C) in real numbers, for which there is a product of many matrices at once
    real, imaginary = C.unbind(-1)
    turned = torch.stack([torch.stack([real, -imaginary]), torch.stack([imaginary, real])])  # (2 of X, 2 of Y, m, n, f)
    Y = torch.einsum("...nfi,iomnf->...mfo", X, turned)
    return torch.fft.irfft(torch.view_as_complex(Y.contiguous()), n=kernel.shape[-1]).flatten(-2)


def drawn_positions(rows: int, columns: int, count: int, seed: int, in_order: bool = False) -> Tensor:
    """(2, count) distinct entries of a matrix, by a random stream that files rely on: they hold the seed alone.

    Args:
        in_order: Row by row, and not in the order in which they were drawn.
    """
    drawn = _drawn(rows * columns, count, seed, in_order)
    return torch.stack([drawn // columns, drawn % columns])


@functools.lru_cache(maxsize=32)  # a model has few sizes of layers, and each permutation is as large as a layer
def _drawn(size: int, count: int, seed: int, in_order: bool) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(size, generator=generator, device="cpu")[:count]
    return drawn.sort().values if in_order else drawn.clone()


def at_least_single(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def recomputed(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """function(*tensors); what it builds on the way is built again for the gradient instead of being kept for it."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return function(*tensors)
    return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)


def fewer_by_vector(x: Tensor, layer: LinearMap, count: int) -> bool:
    """Whether `count` numbers for each vector of x are fewer than the entries of a matrix for all of them.

    Never for images, whose patches are not laid out, nor for no vectors.
    """
    vectors = x.numel() if layer.kind == "embedding" else x.numel() // layer.in_features
    return layer.kind != "conv" and 0 < vectors * count <= layer.out_features * layer.in_features


def sparse_linear(x: Tensor, values: Tensor, rows: Tensor, columns: Tensor, out: int, in_order: bool = False) -> Tensor:
    """x S^T for the matrix S (out, in) with `values` at (rows, columns), without building S.

    Its gradient is built only where it has few more entries than S has values.

    Args:
        in_order: The rows ascend, so they need not be sorted at every call.
    """
    y = _SparseLinear.apply(x.reshape(-1, x.shape[-1]), values, rows, columns, out, in_order)
    return y.view(*x.shape[:-1], out)


def dense_enough(count: int, x: Tensor, layer: LinearMap) -> bool:
    """Whether the update of a layer by `count` entries is faster as a part of the dense product with x.

    The dense product costs the building of the sum, whatever the number of vectors in x, and a product for the
    gradient; single entries cost their number for each vector.
    """
    return denser(count, x, layer.out_features)


def denser(count: int, x: Tensor, out: int) -> bool:
    """`dense_enough` of any sparse matrix (out, in) that x (..., in) is multiplied with."""
    size = out * x.shape[-1]
    return count * _DENSE > size or 2 * count * (x.numel() // x.shape[-1]) > 3 * size


_AT_ONCE = 1 << 22  # products that `_SparseLinear` holds at a time
_DENSE = 64  # entries per value of S up to which a product of matrices is faster than one of chosen entries


class _SparseLinear(torch.autograd.Function):
    """Written out because autograd would keep the product of every entry with every row of x."""

    @staticmethod
    def forward(x: Tensor, values: Tensor, rows: Tensor, columns: Tensor, out: int, in_order: bool) -> Tensor:
        inputs = x.T.to(torch.promote_types(x.dtype, values.dtype))
        return _gather(inputs, values, columns, rows, out, in_order).T.to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:4])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, values, rows, columns = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, values.dtype)
        inputs, outputs = (part.T.to(wide).contiguous() for part in (x, grads[0]))
        of_values = _products(outputs, inputs, rows, columns).to(values.dtype)
        of_x = _gather(outputs, values, rows, columns, len(inputs)).T.to(x.dtype) if ctx.needs_input_grad[0] else None
        return of_x, of_values, None, None, None, None


def _products(outputs: Tensor, inputs: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Chosen entries of outputs @ inputs.T."""
    if len(rows) * _DENSE > len(outputs) * len(inputs):
        return (outputs @ inputs.T)[rows, columns]
    at_once = max(_AT_ONCE // max(outputs.shape[1], 1), 1)
    pairs = zip(rows.split(at_once), columns.split(at_once))
    dots = [torch.linalg.vecdot(outputs.index_select(0, row), inputs.index_select(0, col)) for row, col in pairs]
    return torch.cat(dots)


def _gather(source: Tensor, values: Tensor, read: Tensor, written: Tensor, size: int, in_order: bool = False) -> Tensor:
    """(size, T): at row `written` the sum of `values` times the rows `read` of `source` (., T)."""
    if not in_order:
        written, order = written.sort()
        read, values = read[order], values[order]
    starts = torch.searchsorted(written, torch.arange(size, device=written.device))
    weights = values.to(source.dtype)
    return F.embedding_bag(read, source.contiguous(), starts, mode="sum", per_sample_weights=weights)


def with_projected_gradient(columns: Tensor, basis: Tensor, onto: bool) -> Tensor:
    """`columns` as they are; their gradient is projected onto the span of the orthonormal `basis`, or off it."""
    return _ProjectedGradient.apply(columns, basis, onto)


class _ProjectedGradient(torch.autograd.Function):
    @staticmethod
    def forward(columns: Tensor, basis: Tensor, onto: bool) -> Tensor:
        return columns.view_as(columns)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.onto = inputs[2]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (basis,) = ctx.saved_tensors
        along = basis @ (basis.T @ grads[0])
        return along if ctx.onto else grads[0] - along, None, None
