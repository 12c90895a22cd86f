"""LoRA's own start: A uniform (Kaiming) or N(0, 1/r^2), B = 0.   https://arxiv.org/abs/2106.09685"""

from __future__ import annotations

import torch

from deltatune.lora.starts.start import Site, Start, birth, kaiming


def plain(site: Site) -> Start:
    if site.map.kind == "embedding":  # as PEFT: one side of the update is zero, here it is A
        return Start(torch.zeros(site.down), torch.randn(site.up))
    return Start(kaiming(*site.down), torch.zeros(site.up))


def gaussian(site: Site) -> Start:
    if site.map.kind == "embedding":
        return plain(site)  # as PEFT
    return Start(torch.empty(site.down).normal_(std=1 / site.r), torch.zeros(site.up))


def random(site: Site) -> Start:
    """Both factors drawn, so that a fresh adapter changes the output."""
    reason = "init_lora_weights=False draws both factors"
    A, B, bias = site.born or birth(site)
    return Start(A, B, bias=bias, at_birth=reason)
