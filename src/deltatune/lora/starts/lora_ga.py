"""LoRA-GA: dL/dW = U S V^T; A0 and B0 are directions of V and U, W' = W + s (B A - B0 A0), so that the first step of
the factors is the nearest one of rank 2r to a step of W.   https://arxiv.org/abs/2407.05000
"""

from __future__ import annotations

import torch
from torch import Tensor

from deltatune.lora.options import LoraGAConfig
from deltatune.lora.starts.start import Site, Start, awaited, prepared_for


def lora_ga(site: Site) -> Start:
    parts = prepared_for(site, "lora_ga", "preprocess_loraga(model, config, train_step)", rank=2 * site.r)
    if parts is None:
        return awaited(site)
    options: LoraGAConfig = site.options.lora_ga_config
    of_A, of_B = _DIRECTIONS[options.direction](site.r)
    S = parts["S"][of_B]
    A, B = _SCALES[options.scale](site, parts["V"].T[of_A], parts["U"][:, of_B] * S, S)
    return Start(A.to(site.map.dtype).contiguous(), B.to(site.map.dtype).contiguous(), gives_way=True, again=False)


def _both_drawn(r: int) -> tuple[Tensor, Tensor]:
    drawn = torch.randperm(2 * r)[:r]
    return drawn, drawn


# r -> which of the 2r directions go to A and which to B
_DIRECTIONS = {
    "ArB2r": lambda r: (slice(0, r), slice(r, 2 * r)),
    "A2rBr": lambda r: (slice(r, 2 * r), slice(0, r)),
    "ArBr": lambda r: (slice(1, 2 * r, 2), slice(0, 2 * r, 2)),
    "random": _both_drawn,
}


def _stable(site: Site, A: Tensor, B: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    return A, B * site.map.out_features**0.25 / site.options.lora_ga_config.stable_gamma**0.5


def _like_weight(site: Site, A: Tensor, B: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    largest = torch.svd_lowrank(site.W, q=site.r, niter=4)[1][0]
    return A, B * (largest / S[0] if S[0] > 0 else 1)


def _by_scaling(site: Site, A: Tensor, B: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    return A / site.scaling, B / site.scaling


_SCALES = {
    "stable": _stable,
    "weight_svd": _like_weight,
    "gd_scale": _by_scaling,
    "unit": lambda site, A, B, S: (A, B),
}
