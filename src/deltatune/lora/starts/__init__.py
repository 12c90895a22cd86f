"""Where LoRA begins: one file per start, and the table of their names.

A start is a function from a `Site` (layer, r, scaling, options, path) to a `Start` (the factors, and whether the base
gives way). `find` parses `init_lora_weights`; `begin` is what LoRA calls.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from deltatune import checks, filling
from deltatune.bases.packed import PackedLinear
from deltatune.filling import Source, source
from deltatune.lora import prepared
from deltatune.lora.starts.corda import corda
from deltatune.lora.starts.eva import eva
from deltatune.lora.starts.loftq import loftq
from deltatune.lora.starts.lora_ga import lora_ga
from deltatune.lora.starts.mica import mica
from deltatune.lora.starts.olora import olora
from deltatune.lora.starts.orthogonal import orthogonal
from deltatune.lora.starts.pissa import pissa, pissa_niter
from deltatune.lora.starts.plain import gaussian, plain, random
from deltatune.lora.starts.start import Site as Site
from deltatune.lora.starts.start import Start as Start
from deltatune.lora.starts.start import birth

ANY = frozenset({"linear", "embedding", "conv"})
LINEAR = frozenset({"linear"})


@dataclass(frozen=True)
class Kind:
    """One start.

    Attributes:
        begin: What computes it.
        layers: Kinds of layers that its maths allows.
        grouped: It makes a B that is block diagonal, as a convolution with groups has it.
        peer: Whether PEFT begins alike on a layer, so that files need not say more; None: nowhere.
    """

    begin: Callable[[Site], Start]
    layers: frozenset[str] = ANY
    grouped: bool = False
    peer: Callable[[Site], bool] | None = lambda site: True


def _plain_matrix(site: Site) -> bool:
    """With invocation tokens PEFT's base has given way before them too, and ours has not."""
    layer, always = site.map, site.options.alora_invocation_tokens is None
    return always and layer.kind == "linear" and not isinstance(layer, PackedLinear) and not layer.only_weight


def _upright_matrix(site: Site) -> bool:
    """PEFT decomposes the weight of transformers' Conv1D the wrong way round."""
    return _plain_matrix(site) and not site.map.turned


STARTS: dict[Any, Kind] = {
    True: Kind(plain, grouped=True),
    False: Kind(random, grouped=True),
    "gaussian": Kind(gaussian, grouped=True),
    "pissa": Kind(pissa, peer=_plain_matrix),
    "olora": Kind(olora, peer=_upright_matrix),
    "orthogonal": Kind(orthogonal),
    "mica": Kind(mica),
    "loftq": Kind(loftq, peer=_upright_matrix),
    "eva": Kind(eva, grouped=True),
    "corda": Kind(corda, LINEAR, peer=None),
    "lora_ga": Kind(lora_ga, peer=None),
}
_FAST = re.compile(r"pissa_niter_(\d+)")


def parse(init: Any) -> Kind | None:
    """The start that a value of `init_lora_weights` names, None where it names none."""
    if isinstance(init, str) and (fast := _FAST.fullmatch(init)):
        return Kind(functools.partial(pissa_niter, iterations=int(fast[1])), peer=None)
    return STARTS[True] if init is None else STARTS.get(init) if isinstance(init, (str, bool)) else None


def check(init: Any) -> None:
    """Refuse a value of `init_lora_weights` that names no start."""
    if parse(init) is None:
        names = ", ".join(repr(name) for name in STARTS)
        checks.refuse("LoraConfig", "init_lora_weights", init, f'one of {names}, or "pissa_niter_" and a number')


def begin(site: Site) -> Start:
    """The start of LoRA on one layer.

    Raises:
        ConfigError: Its maths does not allow the layer, data for it are missing, or the file to come cannot be read.
    """
    kind, layer = parse(site.options.init_lora_weights), site.map
    assert kind is not None  # the config has been validated
    if layer.kind not in kind.layers:
        site.refuse("is not for layers like", f"is a {layer.kind} layer; it is for {', '.join(sorted(kind.layers))}")
    if layer.groups > 1 and not kind.grouped:
        site.refuse("cannot begin on", f"is a convolution with groups={layer.groups}; leave it out of target_modules")
    agrees = kind.peer is not None and kind.peer(site)
    if source() is Source.PEER and not agrees and not prepared.found(layer, site.options.init_lora_weights):
        if kind.peer is not None and layer.kind == "embedding":
            return plain(site)  # as PEFT, which passes over the start there
        site.refuse(
            "in a file of PEFT leaves open where the adapter began on",
            "PEFT cannot restore either; save it there with path_initial_model_for_weight_conversion",
        )
    start = kind.begin(site if filling.brings_all() else replace(site, born=birth(site)))
    return start if agrees or not start.again else replace(start, again=False)
