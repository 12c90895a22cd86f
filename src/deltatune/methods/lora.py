"""LoRA: W' = W + (alpha / r) B A.   https://arxiv.org/abs/2106.09685

Its options are in `deltatune.lora.config`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from deltatune import tying
from deltatune.adapter import Adapter, Applied, LinearMap, Method
from deltatune.architectures import usual_targets
from deltatune.config import PeftType
from deltatune.errors import ConfigError
from deltatune.factors import NO_DROPOUT, Factor, block_diagonal, shift
from deltatune.kernels import fused_linear, gpu
from deltatune.kernels import low_rank as fused
from deltatune.lora import starts
from deltatune.lora.config import LoraConfig
from deltatune.lora.known import Known
from deltatune.lora.options import warn_offload
from deltatune.lora.stacked import for_peers
from deltatune.lora.starts import Site, Start
from deltatune.lora.variants import VIEWS, build_variants, variants_of
from deltatune.lora.variants.arrow import Router
from deltatune.lora.variants.variant import Pass, Variant
from deltatune.methods.common import all_linear
from deltatune.patterns import pattern_value
from deltatune.room import plain, widen

# On the output projection of an attention that is adapted itself (`nn.MultiheadAttention`): PEFT adds the update there
# twice (a bias once), in every pass and when it merges, so that is what files mean. Rank and alpha are the attention's.
TWICE = 2


class LoRA(Known):
    """Trainable: A (r, in) and B (out, r), r (in + out) numbers; with a variant (`deltatune.lora.variants`) others too.

    Attributes:
        summand: True, or the reason why the output is not that of the layer plus an update.
    """

    views: ClassVar[tuple[str, ...]] = (
        *("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"),
        *("scaling", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "lora_bias"),
        *VIEWS,
    )

    stacks = ("blocks",)
    row_numbers: ClassVar[tuple[str, ...]] = ("scaling",)

    lora_alpha: float
    use_rslora: bool
    lora_bias: bool
    blocks: int  # more than one under a grouped convolution
    lora_dropout: nn.Module
    counts: int = 1  # how many times alpha / r its update is
    followed: bool = False  # by layers that share an embedding's weight
    scaling: Any  # a number, or a tensor that can change under a compiled model (`deltatune.room`)
    summand: bool | str = True

    def __init__(
        self,
        layer: LinearMap,
        r: int,
        alpha: float,
        dropout: float,
        rslora: bool,
        start: Start,
        bias: bool,
        varied: Sequence[Variant] = (),
    ) -> None:
        super().__init__()
        # past nn.Module's look-ups, here and below: they take a microsecond for each attribute of hundreds of layers
        vars(self).update(r=r, lora_alpha=alpha, use_rslora=rslora, lora_bias=bias, scaling=scaling(r, alpha, rslora))
        vars(self).update(blocks=r // layer.up_shape(r)[1], embedding=layer.kind == "embedding")
        if varied:
            self.variants = nn.ModuleList(varied)  # type: ignore[assignment]
        else:
            vars(self).update(variants=())
        self._modules["lora_dropout"] = nn.Dropout(dropout) if dropout else NO_DROPOUT
        if varied or start.gives_way or start.stand_in is not None:
            self.stacks = None  # there is more to it than B A x
        down, up = shapes(layer, r, varied)
        wide = torch.promote_types(start.A.dtype, torch.float32)
        A, B = start.A.detach().to(wide).contiguous(), start.B.detach().to(wide).contiguous()
        self._modules["lora_A"] = Factor(*down, weight=A)
        ends = layer.out_features if bias else None
        self._modules["lora_B"] = Factor(*up, bias=ends, fixed=start.fixed_B, weight=B)
        self._begin(start, A, B)
        for variant in self.variants:
            variant.begin(self, self._base(layer))
            self._declare(variant)

    @classmethod
    def plan(cls, layers: dict[str, LinearMap], config: LoraConfig) -> LoraConfig:
        warn_offload(config)
        inside = {f"{bare(path)}.{part}": path for path, layer in layers.items() for part in layer.parts}
        if config.monteclora_config is None and not inside:
            return config
        config = copy.copy(config)
        vars(config)["layers"] = len(layers)  # the loss of MonteCLoRA is a mean over them
        vars(config)["inside"] = inside
        return config

    @classmethod
    def build(cls, layer: LinearMap, config: LoraConfig, path: str) -> Adapter:
        if config.arrow_config is not None:
            return Router.build(layer, config, path)
        around = getattr(config, "inside", {}).get(bare(path))
        counts = 1 if around is None else TWICE
        r = pattern_value(config.rank_pattern, around or path, config.r)
        alpha = pattern_value(config.alpha_pattern, around or path, config.lora_alpha)
        if config.lora_bias and layer.kind == "embedding":
            raise ConfigError(
                f"LoraConfig: lora_bias=True is not possible for the embedding {path}: files have no name for it",
                field="lora_bias",
                path=path,
                found=True,
            )
        _check_groups(layer, r, path)
        varied = build_variants(layer, config, path, r)
        down, up = shapes(layer, r, varied)
        start = starts.begin(Site(layer, r, counts * scaling(r, alpha, config.use_rslora), config, path, down, up))
        made = cls(layer, r, alpha, config.lora_dropout, config.use_rslora, start, config.lora_bias, varied)
        vars(made).update(followed=config.ensure_weight_tying, counts=counts)
        vars(made).update(scaling=made.configured_scaling)
        return made

    @property
    def ties(self) -> bool:
        return self.followed

    def tied(self, layer: LinearMap, config: Any = None) -> Adapter | None:
        own = config is None or config.peft_type is PeftType.LORA
        return tying.follow(self, layer) if self.followed and own else None

    @property
    def configured_scaling(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.counts * scaling(self.r, self.lora_alpha, self.use_rslora)

    @property
    def bias_scaling(self) -> Any:
        return self.scaling / self.counts

    def _begin(self, start: Start, A: Tensor, B: Tensor) -> None:
        if self.lora_B.bias is not None and start.bias is not None:
            self.lora_B.bias.data = start.bias
        vars(self).update(identity_at_birth=start.at_birth, awaits_data=start.awaits_data)
        vars(self).update(keeps_derived=start.gives_way and not start.again)
        if start.stand_in is None:
            vars(self).update(stand_in=None)
        else:
            self.stand_in = start.stand_in
            self.replaces, self.summand = True, "it stands on a quantised base"  # type: ignore[misc]
        self._buffers.update(start_A=None, start_B=None)
        for name, factor in (("start_A", A), ("start_B", B)) if start.gives_way else ():
            self.register_buffer(name, factor.clone(), persistent=self.keeps_derived)

    def _base(self, layer: LinearMap) -> LinearMap:
        return layer if self.stand_in is None else Applied(self.stand_in, layer)

    def _declare(self, variant: Variant) -> None:
        """What one variant says of itself holds for the whole."""
        for name in ("identity_at_birth", "mergeable", "pointwise", "summand", "learns_in_eval"):
            if getattr(variant, name) is not True:
                setattr(self, name, getattr(variant, name))
        self.reads = (*self.reads, *variant.reads)

    @property
    def A(self) -> Tensor:
        A = self.lora_A.matrix
        for variant in self.variants:
            A = variant.drawn(A)
        for variant in self.variants:
            A = variant.down(A)
        return A

    @property
    def B(self) -> Tensor:
        B = block_diagonal(self.lora_B.matrix, self.blocks)
        for variant in self.variants:
            B = variant.up(B)
        return B

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) of the update that trains, B A, its scale in B."""
        return self.A, self.scaling * self.B

    def _frozen(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs (A, B) of what is added to the weight by variants and does not train."""
        yield from (pair for variant in self.variants if (pair := variant.frozen()) is not None)

    def whole(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """A (R, in) and B (out, R) of all that is added to the weight: also what does not train."""
        frozen = list(self._frozen())
        if self.start_A is not None and self.start_B is not None:
            frozen.append((self.start_A, -self.scaling * self.start_B))
        if not frozen:
            return A, B
        return torch.cat([A, *(down.to(A) for down, _ in frozen)]), torch.cat([B, *(up.to(B) for _, up in frozen)], 1)

    def change(self, A: Tensor, B: Tensor) -> Tensor:
        """B A (out, in), less that of the start where the base gives way: zero at birth to the bit, precise near it."""
        if self.start_A is None or self.start_B is None:
            return B @ A
        B0 = self.scaling * self.start_B
        return (B - B0) @ A + B0 @ (A - self.start_A)

    def adapt(self, weight: Tensor) -> Tensor:
        if self.mergeable is not True:
            return super().adapt(weight)
        A, B = self.factors()
        weight = weight if self.stand_in is None else self.stand_in.adapt(weight)
        weight = weight + self.change(A, B).to(_wider(weight, A))
        for down, up in self._frozen():
            weight = weight + (up @ down).to(weight)
        for variant in self.variants:
            weight = variant.adapt(weight)
        return weight

    def low_rank(self, layer: LinearMap) -> tuple[Tensor, Tensor] | None:
        if self.stand_in is not None or any(type(v).adapt is not Variant.adapt for v in self.variants):
            return None
        A, B = self.whole(*self.factors())
        root = math.sqrt(abs(self.scaling))  # on both sides, as a sum of adapters shares its weights between them
        return B / root, root * A

    def adapt_bias(self, bias: Tensor | None) -> Tensor | None:
        own = self.lora_B.bias
        if own is None:
            return bias
        return self.bias_scaling * own if bias is None else bias + self.bias_scaling * own

    def forward(self, x: Any, layer: LinearMap, **values: Any) -> Tensor:
        if self.stacks is not None:
            return self._plain(x, layer)
        layer = self._base(layer)
        y, dropped, A, B = layer(x), self._dropped(x), *self.factors()
        out = y + self.product(x, dropped, A, B, layer).to(y.dtype)
        for variant in self.variants:
            out = variant.output(out, Pass(layer, x, dropped, y, A, B, values), self)
        return out

    def _plain(self, x: Any, layer: LinearMap) -> Tensor:
        """The layer and B A x, whose scale is put on the smallest tensor on the way."""
        down, up = cast(Factor, self._modules["lora_A"]), cast(Factor, self._modules["lora_B"])
        A, B, bias = down.matrix, up.matrix, up.bias
        if self.blocks > 1:
            B = block_diagonal(B, self.blocks)
        if gpu.backend != "plain" and bias is None:
            dropping = self.training and isinstance(self.lora_dropout, nn.Dropout)
            found = fused_linear.low_rank(x, layer, A, self.scaling * B, dropping)
            if found is not None:
                return found
        share = self.lora_dropout.p if self.training and isinstance(self.lora_dropout, nn.Dropout) else 0.0
        if bias is None and fused.fits(x, layer, share):
            return fused.low_rank_linear(x, layer.weight, layer.bias, A, B, share, self.scaling)
        y, h = layer(x), layer.apply(self._dropped(x), A)
        if bias is None:
            return y + layer.mix(self.scaling * h, B).to(y.dtype)
        return y + (self.scaling * shift(layer.mix(h, B), bias, layer)).to(y.dtype)

    def prepared(self, layer: LinearMap) -> Callable[[Tensor], Tensor | None] | None:
        return None if self.stacks is None else fused.prepared(self, layer)

    def update(self, x: Any, layer: LinearMap) -> Tensor:
        """What is added to the layer's output."""
        return self.product(x, self._dropped(x), *self.factors(), layer)

    def _dropped(self, x: Any) -> Any:
        return x if self.embedding or not self.training else self.lora_dropout(x)  # an embedding reads indices

    def product(self, x: Any, dropped: Any, A: Tensor, B: Tensor, layer: LinearMap) -> Tensor:
        """B A x; what does not train beside it is a part of the weight, and sees the input without dropout."""
        projected = next((h for v in self.variants if (h := v.project(dropped, A, layer)) is not None), None)
        h = layer.apply(dropped, A) if projected is None else projected
        if self.start_A is None or self.start_B is None:
            update = layer.mix(h, B)
        else:  # as in `change`
            B0, plain = self.scaling * self.start_B, dropped is x and projected is None
            moved = layer.apply(x, A - self.start_A) if plain else h - layer.apply(x, self.start_A)
            update = layer.mix(h, B - B0) + layer.mix(moved, B0)
        for down, up in self._frozen():
            update = update + layer.mix(layer.apply(x, down), up)
        return update if self.lora_B.bias is None else shift(update, self.scaling * self.lora_B.bias, layer)

    @classmethod
    def penalises(cls, config: LoraConfig) -> bool:
        return any(kind.penalises for kind in variants_of(config))

    def penalty(self) -> Tensor | None:
        terms = [term for variant in self.variants if (term := variant.penalty(self)) is not None]
        return torch.stack(terms).sum() if terms else None

    def make_room(self, rank: int | None = None) -> None:
        widen(self, rank)

    def fit(self, other: Adapter) -> None:
        held = (other.room or other.r) if isinstance(other, LoRA) else 0
        if held > self.r and plain(self) and not held % self.blocks:
            widen(self, held)

    def neutral(self) -> bool:
        if not plain(self):
            return super().neutral()
        nn.init.zeros_(self.lora_A.weight)
        nn.init.zeros_(self.lora_B.weight)
        return True

    def extra_repr(self) -> str:
        return f"r={self.r}, scaling={self.scaling:g}"


def bare(path: str) -> str:
    """A path as it is before anything around it is wrapped."""
    return path.replace(".base_layer.", ".")


def scaling(r: int, alpha: float, rslora: bool) -> float:
    return alpha / math.sqrt(r) if rslora else alpha / r


def shapes(layer: LinearMap, r: int, varied: Sequence[Variant]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the trained A and B, as files keep them."""
    down, up = layer.down_shape(r), layer.up_shape(r)
    for variant in varied:
        down, up = variant.down_shape(down), variant.up_shape(up)
    return down, up


def _wider(weight: Tensor, factor: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, factor.dtype)


def _check_groups(layer: LinearMap, r: int, path: str) -> None:
    groups = layer.module.groups if layer.kind == "conv" else 1  # type: ignore[attr-defined]
    if r % groups:
        nearest = max(groups, r - r % groups)
        raise ConfigError(
            f"LoraConfig: r={r} does not divide by groups={groups} of the convolution {path}; use r={nearest}",
            field="r",
            found=r,
            expected=nearest,
        )


def _train_options(given: dict[str, Any]) -> dict[str, Any]:
    rank = given.get("r", 8)
    return {**all_linear(given), "r": rank, "lora_alpha": 2 * rank if isinstance(rank, int) else rank}


METHOD = Method(
    PeftType.LORA,
    LoraConfig,
    LoRA,
    key_prefix="lora_",
    default_targets=usual_targets,
    learning_rate=2e-4,
    train_options=_train_options,
    pairs="lora",
    for_peers=for_peers,
)
