"""MiCA: B = the left singular vectors of W of its r smallest values, frozen; A = 0 trains.

https://arxiv.org/abs/2604.01694
"""

from __future__ import annotations

import torch

from deltatune.lora.starts.start import Site, Start


def mica(site: Site) -> Start:
    W = site.W
    U, _, _ = torch.linalg.svd(W, full_matrices=False)
    B = U[:, -site.r :].to(site.map.dtype)
    return Start(W.new_zeros(site.r, W.shape[1]), B.contiguous(), fixed_B=True)
