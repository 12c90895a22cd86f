"""`Quantised`: a matrix as codes of 4 or 8 bits with scales, in the layouts of bitsandbytes, and its values again.

NormalFloat4: blocks of 64 numbers, each the nearest of 16 levels times the block's largest magnitude
(https://arxiv.org/abs/2305.14314). Integers: rows of 127 steps times the row's largest magnitude
(https://arxiv.org/abs/2208.07339).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deltatune.adapter import Adapter

BLOCK = 64
# Quantiles of the normal distribution, of which zero is one and the outermost are +-1; appendix E of the paper.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


class Quantised(Adapter):
    """W' = Q: stands for a weight (out, in) at 4.5 or 8 bits a number, whatever that is.

    Scales are kept as the bits of float32 numbers, so that they stay exact when an adapter is cast.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, weight: Tensor, bits: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.bits, self.shape, self.dtype = bits, tuple(weight.shape), dtype
        codes, scales = (_to_nf4 if bits == 4 else _to_int8)(weight.float())
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("scales", scales.float().view(torch.int32), persistent=False)

    def adapt(self, weight: Tensor) -> Tensor:
        return self.weight

    @property
    def weight(self) -> Tensor:
        scales = self.scales.view(torch.float32)
        if self.bits == 8:
            return (self.codes * (scales[:, None] / 127)).to(self.dtype)
        pairs = torch.stack((self.codes >> 4, self.codes & 15), dim=-1).flatten()
        levels = torch.tensor(NF4, device=pairs.device)
        values = levels[pairs.int()].reshape(-1, BLOCK) * scales[:, None]
        return values.flatten()[: self.shape[0] * self.shape[1]].reshape(self.shape).to(self.dtype)


def _to_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    flat = nn.functional.pad(weight.flatten(), (0, -weight.numel() % BLOCK)).reshape(-1, BLOCK)
    scales = flat.abs().amax(1)
    levels = torch.tensor(NF4, device=weight.device)
    between = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(flat / scales[:, None].clamp_min(1e-30), between).to(torch.uint8).flatten()
    return (codes[0::2] << 4) | codes[1::2], scales


def _to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    weight = weight.half().float()  # as bitsandbytes does first
    scales = weight.abs().amax(1)
    return (weight * (127 / scales[:, None].clamp_min(1e-30))).round().to(torch.int8), scales
