"""PiSSA: W = U S V^T, s B0 A0 its r largest parts, W' = W + s (B A - B0 A0).   https://arxiv.org/abs/2404.02948"""

from __future__ import annotations

import torch

from deltatune.lora.starts.start import Site, Start, balanced


def pissa(site: Site) -> Start:
    U, S, Vh = torch.linalg.svd(site.W, full_matrices=False)
    return Start(*balanced(U[:, : site.r], S[: site.r], Vh[: site.r], site.scaling), gives_way=True)


def pissa_niter(site: Site, iterations: int) -> Start:
    """The fast form: a randomised decomposition with a few power iterations, which nothing gives again."""
    U, S, V = torch.svd_lowrank(site.W, q=site.r, niter=iterations)
    return Start(*balanced(U, S, V.T, site.scaling), gives_way=True, again=False)
