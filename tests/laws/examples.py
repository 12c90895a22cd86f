"""What the laws range over: every method of the registry with each of its options, on every kind of layer.

Nothing here knows a method. Configs are found by trying: sizes are shrunk until the method accepts a small layer, then
every option is switched, one at a time, and kept where the config allows it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import random
import typing
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from deltatune import METHODS, PeftModel, get_peft_model
from deltatune.adapter import Adapter, LinearMap, Method, Stored
from deltatune.bases import as_map
from deltatune.bases import block as block_base
from deltatune.config import PeftConfig
from deltatune.errors import PeftError
from deltatune.layer import AdaptedLayer

LAYER = "layer"  # where the adapted layer is in `Holder`

# --------------------------------------------------------------------------------------------------------- base layers


@dataclass(frozen=True)
class Base:
    """A small layer and a batch for it."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of one row of the batch
    rows: int | None = None  # of an embedding, whose input are indices

    def batch(self, size: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
        shape = (size, *self.shape)
        if self.rows is None:
            return torch.randn(shape, dtype=dtype)
        return (torch.randperm(prod(shape)) % self.rows).reshape(shape)  # the first tokens are always there


def _with_bias(layer: nn.Module) -> nn.Module:
    """A bias that is not zero, as it starts in Conv1D."""
    nn.init.normal_(layer.bias)  # type: ignore[arg-type]
    return layer


class Block(nn.Module):
    """Layers together, as those of a transformer: no weight of its own, and more than one output."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.norm(x)).tanh()


BASES: dict[str, Base] = {
    "linear": Base(lambda: nn.Linear(12, 8), (5, 12)),
    "linear-wide-no-bias": Base(lambda: nn.Linear(8, 20, bias=False), (8,)),
    "linear-of-tokens": Base(lambda: nn.Linear(12, 8), (5,), rows=16),
    "transposed": Base(lambda: _with_bias(Conv1D(8, 12)), (5, 12)),
    "embedding": Base(lambda: nn.Embedding(16, 8), (5,), rows=16),
    "embedding-padded": Base(lambda: nn.Embedding(16, 4, padding_idx=2), (5,), rows=16),
    "conv1d": Base(lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (4, 9)),
    "conv1d-same-no-bias": Base(lambda: nn.Conv1d(4, 8, 3, padding="same", bias=False), (4, 7)),
    "conv2d-circular": Base(lambda: nn.Conv2d(4, 6, (3, 2), padding=(2, 1), padding_mode="circular"), (4, 6, 5)),
    "conv2d-dilated": Base(lambda: nn.Conv2d(6, 4, 1, dilation=2, stride=(1, 2)), (6, 5, 4)),
    "conv2d-grouped": Base(lambda: nn.Conv2d(4, 8, 2, groups=2, dilation=(1, 2)), (4, 5, 5)),
    "conv2d-depthwise-reflect": Base(
        lambda: nn.Conv2d(4, 4, 2, groups=4, padding=1, padding_mode="reflect"), (4, 4, 4)
    ),
    "conv3d": Base(lambda: nn.Conv3d(2, 6, 2), (2, 3, 3, 4)),
    "block": Base(lambda: Block(12), (5, 12)),
    "norm": Base(lambda: nn.LayerNorm(12), (5, 12)),
    "norm-no-bias": Base(lambda: nn.RMSNorm(8), (5, 8)),
}
PLAIN = ("linear", "transposed", "embedding", "conv2d-circular", "norm")  # one of each kind, for laws that cost more
SWEPT = (
    "linear",
    "linear-wide-no-bias",
    "linear-of-tokens",
    "embedding",
    "conv2d-circular",
    "block",
    "norm",
)  # where every option is tried


class Holder(nn.Module):
    """A model of one layer, with a neighbour that no adapter touches.

    Token ids that a layer of vectors is given go through a fixed table first, as in a language model.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.neighbour = nn.Linear(3, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        bare = getattr(self.layer, "base_layer", self.layer)
        if isinstance(bare, nn.Embedding) or input_ids.is_floating_point():
            return self.layer(input_ids)
        width = torch.arange(1, bare.in_features + 1, device=input_ids.device)
        return self.layer(torch.sin(input_ids[..., None] * width).to(bare.weight.dtype))


# ------------------------------------------------------------------------------------------------------------- methods

ONLY = os.environ.get("DELTATUNE_LAW_METHODS", "").split()  # names, while one works on a method; empty: all
LAYER_METHODS: dict[str, Method] = {
    method.name: method
    for method in METHODS.values()
    if method.adapter is not None and (not ONLY or method.name in ONLY)
}
# Values to try for options whose defaults are too large for small layers, by the option's name, best first.
_SMALL: dict[str, tuple[Any, ...]] = {
    "r": (4, 2, 1, 0),
    "sparsity": (0.9,),
    "num_subspaces": (2,),
    "oft_block_size": (4, 2, 1, 0),
    "randlora_alpha": (8,),
    "num_vectors": (6,),
    "theta_d_length": (20,),
    "vector_length": (4, 2, 1),
    "init_r": (4,),
    "target_r": (2,),
    "asa_target_subspaces": (1,),
    "total_step": (10,),
    "token_indices": ([2, 0, 1],),
    "prune_step": (10,),
    "init_alpha": (1.0,),  # an open gate has no gradient, nor has a closed one
    "alpha_speed": (0.1,),
    "group_size": (4, 2),
    "boft_block_size": (4, 2),
    "block_size": (4, 2, 1),
    "n_frequency": (6,),
    "delora_lambda": (1,),
    "size": (4,),
    "phm_dim": (2,),
    "qalora_group_size": (2,),
}
# Values for options that are no switches, by the option's name; all other options are found by their type.
_FURTHER: dict[str, tuple[Any, ...]] = {
    "feedforward_modules": ([LAYER],),
    "init_lora_weights": (
        *(False, "gaussian", "orthogonal", "pissa", "pissa_niter_3", "olora", "mica", "eva"),
        *("loftq", "corda", "lora_ga"),  # where options or data for them are there
    ),
    "init_weights": (False, "uniform", "gaussian", "lycoris", "bat", "mini"),
    "decompose_factor": (2, 4),
    "gralora_k": (1, 4),
    "hybrid_r": (2,),
    "rank_pattern": ({LAYER: 8}, {LAYER: 1}),
    "alpha_pattern": ({LAYER: 5.0},),
    "lambda_pattern": ({LAYER: 0.5},),
    "num_cayley_neumann_terms": (2, 3, 8),
    "r": (None,),
    "subspace_rank": (2,),
    "effective_rank": (0.25,),
    "n_splits": (2,),
    "num_B": (3,),
    "first_n": (None, 0),
    "preset": ("parallel",),
    "parallel": (True,),
    "non_linearity": ("swish",),
    "config_A_B": ("vector", "constant", "none"),
    "config_C": ("vector", "none"),
    "config_D_E": ("vector", "none"),
    "variant": ("road_2", "road_4"),
    "group_size": (4,),
    "boft_n_butterfly_factor": (2, 3),
    "ab_svd_init": ("pissa_init",),
    "psoft_svd": ("lowrank",),
    "decomposition_method": ("qr",),
    "block_size_pattern": ({LAYER: 1},),
    "n_frequency_pattern": ({LAYER: 9},),
    "depth": (1, 2),
    "random_seed": (7,),
    "act_fn": ("tanh", "gelu_new"),
    "sparse_rate": (0.2, 0.0),
    "wavelet_family": ("db2", "sym4", "coif1"),
    "ensure_weight_tying": (),  # needs two layers of one weight: tests/core/test_tying.py
    "bias": tuple(
        f"{method}_only"
        for method in (
            *("lora", "oft", "hra", "glora", "delora", "gralora", "boft", "pvera", "frod", "unilora", "randlora"),
            *("waveft", "MiSS", "vblora", "fourier", "vera", "tinylora", "c3a", "deft"),
        )
    ),
    "use_bdlora": ({"target_modules_bd_a": [LAYER], "nblocks": 2}, {"target_modules_bd_b": [LAYER], "nblocks": 2}),
    "kasa_config": ({"beta": 0.1},),
    "monteclora_config": ({"num_samples": 3},),
    "alora_invocation_tokens": ([3],),
    "velora_config": ({"num_groups": 3},),
}
# Not among them: arrow_config. A router trains nothing and is what the adapters beside it make of it, so that birth,
# training, isolation, rows, round trip and swap say the opposite of what it is for, and alone on a layer, where the
# other laws would find it, it does nothing. tests/methods/test_arrow.py has its laws.

# Options that are also tried together, where a config has them all.
_TOGETHER: tuple[dict[str, Any], ...] = (
    {"use_dora": True, "use_rslora": True, "lora_bias": True},
    {"use_dora": True, "init_lora_weights": False},
    {"use_dora": True, "use_qalora": True, "kasa_config": {}},
    {"use_qalora": True, "use_bdlora": {"target_modules_bd_a": [LAYER], "nblocks": 2}},
)

# Options that mean something only beside others, by the option's name and value.
_WITH: dict[tuple[str, Any], dict[str, Any]] = {
    ("init_lora_weights", "loftq"): {"loftq_config": {"loftq_bits": 4, "loftq_iter": 2}},
}


@functools.cache
def small(method_name: str) -> dict[str, Any]:
    """The sizes with which a method fits every base layer that its maths allows."""
    method = LAYER_METHODS[method_name]
    fields = [field.name for field in dataclasses.fields(method.config) if field.name in _SMALL]
    for values in itertools.product(*(_SMALL[name] for name in fields)):
        sizes = dict(zip(fields, values))
        try:
            config = method.config(target_modules=[LAYER], **sizes)
            for base in BASES.values():
                if _adapter(method).fits(layer := map_of(base)) is True:
                    method.build({LAYER: layer}, config)
        except PeftError:
            continue
        return sizes
    raise AssertionError(f"no small sizes found for {method_name}; name its size fields in `_SMALL`")


@functools.cache
def variants(method_name: str) -> dict[str, dict[str, Any]]:
    """Option changed -> keyword arguments of a config; the first, "default", changes none."""
    kind = LAYER_METHODS[method_name].config
    found = {"default": small(method_name)}
    for field in dataclasses.fields(kind):
        for value in _other_values(kind, field):
            arguments = {**small(method_name), field.name: value, **_with(field.name, value)}
            try:
                kind(target_modules=[LAYER], **arguments)
            except PeftError:  # an option that this version accepts only at its default
                continue
            found[f"{field.name}={value}"] = arguments
    for options in _TOGETHER:
        if options.keys() <= {field.name for field in dataclasses.fields(kind)}:
            found[" and ".join(options)] = {**small(method_name), **options}
    return found


def _with(name: str, value: Any) -> dict[str, Any]:
    return _WITH.get((name, value), {}) if isinstance(value, str) else {}


def _other_values(kind: type[PeftConfig], field: dataclasses.Field) -> list[Any]:
    if field.name in _FURTHER:
        return list(_FURTHER[field.name])
    if field.name in {inherited.name for inherited in dataclasses.fields(PeftConfig)}:
        return []
    return [not field.default] if typing.get_type_hints(kind)[field.name] is bool else []


def config_of(method_name: str, variant: str = "default", **changes: Any) -> PeftConfig:
    arguments = {"target_modules": [LAYER], **variants(method_name)[variant], **changes}
    return LAYER_METHODS[method_name].config(**arguments)


def _adapter(method: Method) -> type[Adapter]:
    assert method.adapter is not None
    return method.adapter


def map_of(base: Base) -> LinearMap:
    module = base.make()
    return as_map(module) or block_base.Block(module, width=base.shape[-1])


# --------------------------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """One method with one option set, on one base layer."""

    method: str
    variant: str
    base: str

    def config(self, **changes: Any) -> PeftConfig:
        return config_of(self.method, self.variant, **changes)

    def model(self, dtype: torch.dtype = torch.float32, seed: int = 0, moved: bool = True) -> PeftModel:
        """The adapted model in evaluation mode, its adapter moved off the start."""
        torch.manual_seed(seed)
        model = get_peft_model(Holder(BASES[self.base].make()).to(dtype).eval(), self.config())
        if moved:
            move(model)
        return model

    def batch(self, size: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
        return BASES[self.base].batch(size, dtype)

    @property
    def has_weight(self) -> bool:
        """Whether the adapted layer has a weight: not every method is a change of one."""
        return self._built[1].mergeable is True

    @property
    def mergeable(self) -> bool:
        """A grouped convolution is block-diagonal, and most adapters leave the blocks."""
        apart = "grouped" in self.base or "depthwise" in self.base
        return self.has_weight and not apart and not self.adds_bias

    @property
    def adds_bias(self) -> bool:
        """A layer without bias cannot hold one."""
        layer, adapter = self._built
        return layer.bias is None and adapter.adapted_bias(layer) is not None

    @property
    def changes_weight(self) -> bool:
        """Some methods change the bias alone."""
        layer, adapter = self._built
        weight = layer.weight
        return adapter.adapt(weight) is not weight

    @property
    def _built(self) -> tuple[LinearMap, Adapter]:
        found = _build(self.method, self.variant, self.base)
        assert found is not None
        return found


def cases(bases: typing.Iterable[str] = BASES, options: bool = True, weights: bool | None = None) -> list[Any]:
    """All cases as pytest parameters; without `options` each method's default only.

    `weights` limits them to the methods that change a weight, or to those that no weight can hold.

    `make test` runs some of them (conftest.py beside this file says which), `make test-all` every one.
    """
    return [
        pytest.param(Case(name, variant, base), id=f"{name}-{variant}-{base}")
        for name in LAYER_METHODS
        for variant in (variants(name) if options else ("default",))
        for base in bases
        if (variant == "default" or base in SWEPT) and _possible(name, variant, base)
        if weights is None or Case(name, variant, base).has_weight is weights
    ]


def drawn(share: float, *what: str) -> tuple[Any, ...]:
    """Marks of a case that `make test` draws with probability `share`."""
    chosen = random.Random(f"{os.environ['DELTATUNE_LAW_SEED']} {what}").random() < share
    return () if chosen else (pytest.mark.slow,)


def pairs(law: str) -> list[Any]:
    """All pairs of methods as pytest parameters; `make test` draws some, about three for each method."""
    share = min(3 / len(LAYER_METHODS), 1)
    return [
        pytest.param(first, second, id=f"{first}-{second}", marks=drawn(share, law, first, second))
        for first, second in itertools.product(LAYER_METHODS, repeat=2)
    ]


def allows(name: str, base: str) -> bool:
    """Whether a method adapts a base layer."""
    return _possible(name, "default", base)


def _possible(name: str, variant: str, base: str) -> bool:
    built = _build(name, variant, base)
    return built is not None and built[1].deterministic is True  # the laws compare calls with each other


@functools.cache
def _build(name: str, variant: str, base: str) -> tuple[LinearMap, Adapter] | None:
    """A base layer and a fresh adapter for it; None where the method does not allow that."""
    layer, method = map_of(BASES[base]), LAYER_METHODS[name]
    if _adapter(method).fits(layer) is not True:
        return None
    if variant.startswith("bias=") and layer.bias is None:
        return None  # there is none to be trained, of which a warning is given
    try:
        made, _ = method.build({LAYER: layer}, config_of(name, variant))
    except PeftError:
        if variant == "default":
            raise
        return None  # an option that the method refuses for this kind of layer
    # what is worked out of a pass, such as where a token stands, takes ids; for the others they are one base too many
    by_tokens = any(value.of_ids for value in made[LAYER].reads)
    if (base == "linear-of-tokens" and not by_tokens) or (BASES[base].rows is None and by_tokens):
        return None
    return layer, made[LAYER]


def move(model: nn.Module, scale: float = 0.5, name: str | None = None) -> None:
    """Move an adapter's parameters off their start, so that no law holds because of a zero."""
    from deltatune.inject import adapter_parameters, trained_copies

    copies = {id(p) for _, copy in trained_copies(_bare(model)) for p in copy.parameters()}
    with torch.no_grad():
        for parameter in adapter_parameters(_bare(model), name):
            if id(parameter) not in copies:
                parameter.add_(scale * torch.randn_like(parameter))


def adapters(model: nn.Module, name: str = "default") -> list[nn.Parameter]:
    from deltatune.inject import adapter_parameters

    return list(adapter_parameters(_bare(model), name))


def stored(model: nn.Module) -> list[Stored]:
    """All parts of which files hold something: those of adapters, which are none of `modules()`, and shared ones."""
    wholes = [
        adapter for part in model.modules() if isinstance(part, AdaptedLayer) for adapter in part.adapters.values()
    ]
    parts = [part for whole in (model, *wholes) for part in whole.modules() if isinstance(part, Stored)]
    return list(dict.fromkeys(parts))


def base_values(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters that belong to no adapter, by their name in the bare model."""
    from deltatune.storage.fingerprint import base_parameters

    return {name: tensor.detach().clone() for name, tensor in base_parameters(_bare(model))}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def _bare(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model
