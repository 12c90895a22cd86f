"""`nn.Conv1d/2d/3d`: a linear map on patches, with W flattened to (out, channels * kernel positions).

A grouped convolution is the block-diagonal matrix of its groups. An adapter may leave the blocks (LoRA's A reads every
channel, as in PEFT's files); then the layer still runs, as an ungrouped convolution, but cannot be merged.
"""

from __future__ import annotations

from math import prod
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltatune.bases.parameter import like
from deltatune.errors import MergeError

_RUN = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Conv:
    kind = "conv"
    turned: bool = False
    dense: bool = True
    types = ("Conv1d", "Conv2d", "Conv3d")
    keeps: tuple[str, str] = ("weight", "bias")
    only_weight: bool = False
    parts: tuple[str, ...] = ()

    @staticmethod
    def fits(module: nn.Module) -> bool:
        plain = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
        return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and type(module).forward in plain

    def __init__(self, module: nn.Module, args: tuple = (), kwargs: dict[str, Any] | None = None) -> None:
        self.module, self.args, self.kwargs = cast(Any, module), args, kwargs or {}
        self.sizes: tuple[int, ...] = self.module.kernel_size
        self.kernel, self.groups = prod(self.sizes), cast(int, self.module.groups)
        self.in_features, self.out_features = self.module.in_channels * self.kernel, self.module.out_channels

    @property
    def dtype(self) -> torch.dtype:
        return self.module.weight.dtype

    @property
    def weight(self) -> Tensor:
        return self.matrix(self.module.weight)

    @property
    def bias(self) -> Tensor | None:
        return self.module.bias

    def __call__(self, x: Tensor) -> Tensor:
        return self.module(x, *self.args, **self.kwargs)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        module = self.module
        padding = module.padding
        if module.padding_mode != "zeros":  # as nn.Conv does
            x = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
            padding = 0
        kernel = weight.reshape(-1, module.in_channels, *self.sizes).to(x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
        return _RUN[len(self.sizes)](x, kernel, bias, module.stride, padding, module.dilation)

    def mix(self, h: Tensor, matrix: Tensor) -> Tensor:
        return _RUN[len(self.sizes)](h, self._pointwise(matrix.to(h.dtype)))

    def scale(self, y: Tensor, vector: Tensor) -> Tensor:
        return y * vector.to(y.dtype).reshape(-1, *[1] * len(self.sizes))

    def matrix(self, stored: Tensor) -> Tensor:
        flat = stored.flatten(1)  # (out, in / groups)
        return flat if self.module.groups == 1 else torch.block_diag(*flat.chunk(self.module.groups))

    def store(self, weight: Tensor) -> Tensor:
        groups, shape = self.module.groups, self.module.weight.shape
        if groups == 1:
            return weight.reshape(shape)
        blocks = weight.reshape(groups, shape[0] // groups, groups, -1)
        own = torch.stack([blocks[group, :, group] for group in range(groups)])
        if torch.block_diag(*own).ne(weight).any():
            raise MergeError(
                f"a convolution with groups={groups} cannot hold this adapter: it connects channels of different "
                "groups; keep the adapter unmerged, or do not target this layer",
                field="groups",
                found=groups,
                expected=1,
            )
        return own.reshape(shape)

    def hold(self, weight: Tensor) -> nn.Parameter:
        return like(self.store(weight), self.module.weight)

    def down_shape(self, rank: int) -> tuple[int, ...]:
        return (rank, self.module.in_channels, *self.sizes)

    def up_shape(self, rank: int) -> tuple[int, ...]:
        return (self.out_features, rank // self.module.groups, *[1] * len(self.sizes))

    def _pointwise(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(*matrix.shape, *[1] * len(self.sizes))
