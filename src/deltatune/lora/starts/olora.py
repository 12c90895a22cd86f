"""OLoRA: W = Q R, B0 = Q[:, :r], A0 = R[:r], W' = W + s (B A - B0 A0).   https://arxiv.org/abs/2406.01775"""

from __future__ import annotations

import torch

from deltatune.lora.starts.start import Site, Start


def olora(site: Site) -> Start:
    Q, R = torch.linalg.qr(site.W)
    return Start(R[: site.r].contiguous(), Q[:, : site.r].contiguous(), gives_way=True)
