"""EVA: A = the principal components of the layer's inputs, B = 0, ranks by explained variance.

https://arxiv.org/abs/2410.07170

Until data have spoken (`initialize_lora_eva_weights`, or `deltatune.lora.prepare` before grafting) A is LoRA's own.
"""

from __future__ import annotations

from dataclasses import replace

from deltatune.filling import Source, source
from deltatune.lora import prepared
from deltatune.lora.starts.plain import plain
from deltatune.lora.starts.start import Site, Start


def eva(site: Site) -> Start:
    start = plain(site)
    parts = prepared.found(site.map, "eva") if site.map.kind == "linear" else None
    if parts is None or len(parts["A"]) != site.r:
        return replace(start, awaits_data=parts is None and site.map.kind == "linear" and source() is Source.NONE)
    return replace(start, A=parts["A"].to(start.A.dtype))
