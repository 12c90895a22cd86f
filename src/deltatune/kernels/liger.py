"""Liger's fused linear cross-entropy, for CUDA where `liger_kernel` is installed. Not run on a GPU by us yet."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor


@functools.cache
def installed() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


def fits(hidden: Tensor, weight: Tensor, scale: float) -> bool:
    """Whether it can compute this loss: on CUDA, in one precision, without a factor of the logits."""
    if not hidden.is_cuda or scale != 1.0 or hidden.dtype != weight.dtype or torch.compiler.is_compiling():
        return False
    return installed()


def summed(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
) -> Tensor:
    """The sum over all rows (N, d) that are not ignored."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy  # type: ignore[import-not-found]

    return liger_fused_linear_cross_entropy(
        hidden,
        weight,
        labels,
        bias,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="sum",
        softcap=softcap,
        accum_dtype=torch.float32,
    )
