"""Orthogonal start: A = Q1^T X^T / 10, B = Y^T Q2 / 10, Q1 and Q2 the odd and even rows of a random orthogonal matrix,
so that B A = Y^T Q2 Q1^T X^T / 100 = 0 with neither factor zero.

https://datta0.github.io/posts/rethink-lora-init/#orthogonal-initialisation
"""

from __future__ import annotations

import torch

from deltatune.lora.starts.start import Site, Start


def orthogonal(site: Site) -> Start:
    r, layer = site.r, site.map
    if r % 2:
        site.refuse(f"with r={r} cannot halve the rank of", f"needs an even r; use r={r + 1}")
    wide = torch.promote_types(layer.dtype, torch.float32)
    Q, _ = torch.linalg.qr(torch.randn(r, r, dtype=wide))
    X = torch.randn(layer.in_features, r // 2, dtype=wide)
    Y = torch.randn(r // 2, layer.out_features, dtype=wide)
    A, B = (X @ Q[0::2]).T / 10, Y.T @ Q[1::2] / 10
    return Start(A.to(layer.dtype).contiguous(), B.to(layer.dtype).contiguous())
