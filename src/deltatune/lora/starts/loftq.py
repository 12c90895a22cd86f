"""LoftQ: W' = Q + s B A, Q = quantise(W - s B0 A0) and s B0 A0 the best rank-r answer to W - Q, found in turn.

https://arxiv.org/abs/2310.08659
"""

from __future__ import annotations

import torch

from deltatune.bases.packed import PackedLinear
from deltatune.lora.quantised import Quantised
from deltatune.lora.starts.start import Site, Start, balanced


def loftq(site: Site) -> Start:
    if isinstance(site.map, PackedLinear):
        site.refuse(
            "needs the weight before it was quantised of",
            "is quantised; start with init_lora_weights=True and call replace_lora_weights_loftq(model)",
        )
    if site.map.turned and site.map.kind == "linear" and site.map.in_features == site.map.out_features:
        site.refuse("cannot begin on", "is square and stored as (in, out): PEFT would misread the file")
    bits, rounds = site.options.loftq_config["loftq_bits"], site.options.loftq_config["loftq_iter"]
    Q, A, B = _round(site, site.W, bits)
    for _ in range(rounds - 1):
        Q, A, B = _round(site, site.W - site.scaling * B @ A, bits)
    return Start(A, B, stand_in=Q, at_birth="the base is quantised, and the factors make good what they can")


def _round(site: Site, rest: torch.Tensor, bits: int) -> tuple[Quantised, torch.Tensor, torch.Tensor]:
    """Quantise what the factors leave, and take new factors from what that loses."""
    Q = Quantised(rest, bits, site.map.dtype)
    U, S, Vh = torch.linalg.svd(site.W - Q.weight.to(rest.dtype), full_matrices=False)
    return Q, *balanced(U[:, : site.r], S[: site.r], Vh[: site.r], site.scaling)
