"""CorDA: W C = U S V^T, C the covariance of the inputs; s B0 A0 = U S V^T C^-1 on the r largest parts ("ipm") or the
smallest ("kpm"), W' = W + s (B A - B0 A0).   https://arxiv.org/abs/2406.05223
"""

from __future__ import annotations

from deltatune.lora.starts.start import Site, Start, awaited, balanced, prepared_for


def corda(site: Site) -> Start:
    parts = prepared_for(site, "corda", "preprocess_corda(model, config, run_model)", rank=site.r)
    if parts is None:
        return awaited(site)
    A, B = balanced(parts["U"], parts["S"], parts["V"].T, site.scaling)
    return Start(A, B, gives_way=True, again=False)
