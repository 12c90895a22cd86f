"""LoRA's own start: A uniform (Kaiming) or N(0, 1/r^2), B = 0.   https://arxiv.org/abs/2106.09685"""

from __future__ import annotations

import torch

from deltatune.lora.starts.start import Site, Start, kaiming


def plain(site: Site) -> Start:
    rows, columns = site.map.out_features, site.map.in_features
    if site.map.kind == "embedding":  # as PEFT: one side of the update is zero, here it is A
        return Start(torch.zeros(site.r, columns), torch.randn(rows, site.r))
    return Start(kaiming(site.r, columns), torch.zeros(rows, site.r))


def gaussian(site: Site) -> Start:
    A = torch.empty(site.r, site.map.in_features).normal_(std=1 / site.r)
    return Start(A, torch.zeros(site.map.out_features, site.r))


def random(site: Site) -> Start:
    """Both factors drawn, so that a fresh adapter changes the output."""
    A, B = kaiming(site.r, site.map.in_features), kaiming(site.map.out_features, site.r // site.map.groups)
    B = B if site.map.groups == 1 else torch.block_diag(*B.chunk(site.map.groups))
    return Start(A, B, at_birth="init_lora_weights=False draws both factors")
