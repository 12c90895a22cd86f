"""The variants of LoRA: which options there are, in which order they act, and which go together."""

from __future__ import annotations

from typing import Any

from deltatune.adapter import LinearMap
from deltatune.errors import ConfigError
from deltatune.lora.variants.alora import Activated
from deltatune.lora.variants.arrow import ArrowConfig
from deltatune.lora.variants.bdlora import BdLoraConfig, BlockDiagonal
from deltatune.lora.variants.dora import Dora
from deltatune.lora.variants.kasa import Kasa, KasaConfig
from deltatune.lora.variants.monteclora import Monteclora, MontecloraConfig
from deltatune.lora.variants.options import Options
from deltatune.lora.variants.qalora import GroupPooled
from deltatune.lora.variants.variant import Variant
from deltatune.lora.variants.velora import Velora, VeloraConfig

# In the order in which they act: on the factors from the trained ones outwards, then on the weight, then on the call.
VARIANTS: tuple[type[Variant], ...] = (Monteclora, BlockDiagonal, GroupPooled, Kasa, Velora, Dora, Activated)
ARROW = "arrow_config"  # the router has no factors of its own, so that nothing else can be asked of it
OPTIONS: dict[str, type[Options]] = {
    "use_bdlora": BdLoraConfig,
    "kasa_config": KasaConfig,
    "monteclora_config": MontecloraConfig,
    "velora_config": VeloraConfig,
    ARROW: ArrowConfig,
}


def variants_of(config: Any) -> list[type[Variant]]:
    return [kind for kind in VARIANTS if kind.asked(config)]


def check_variants(config: Any) -> None:
    """The options of variants, each by itself and beside the others; those given as dicts become objects.

    Raises:
        ConfigError: A value is wrong, or two fields cannot be set at the same time; it names both.
    """
    for name, kind in OPTIONS.items():
        options = kind.of(getattr(config, name), "LoraConfig", name)
        if options is not None:
            options.validate()
        setattr(config, name, options)
    for kind in variants_of(config):
        kind.check(config)
        if kind.starts is not None and config.init_lora_weights not in kind.starts:
            reason = "whose factors are worked out for another shape or weight"
            raise _apart(kind.field, "init_lora_weights", reason, config.init_lora_weights)
        if config.arrow_config is not None:
            raise _apart(kind.field, ARROW, "a router has no factors of its own", config.arrow_config)
    if config.arrow_config is not None and config.lora_bias:
        raise _apart("lora_bias", ARROW, "a router has no factors of its own", True)


def _apart(one: str, other: str, reason: str, found: Any) -> ConfigError:
    return ConfigError(
        f"LoraConfig: {one} and {other}={found!r} cannot be set together, {reason}; leave one of them out",
        field=other,
        found=found,
        expected=None,
    )


def build_variants(layer: LinearMap, config: Any, path: str, r: int) -> list[Variant]:
    """What a config asks for at one layer.

    Raises:
        ConfigError: A variant's maths does not allow the layer.
    """
    found = []
    for kind in variants_of(config):
        if layer.kind not in kind.kinds:
            raise ConfigError(
                f"LoraConfig: {kind.field} is for {', '.join(sorted(kind.kinds))} layers, and {path} is one of kind "
                f"{layer.kind!r}; take it out of target_modules",
                field=kind.field,
                path=path,
                found=layer.kind,
                expected=sorted(kind.kinds),
            )
        made = kind.build(layer, config, path, r)
        found += [] if made is None else [made]
    return found


def no_sum(config: Any) -> str | None:
    """Why adapters of a config do more than add an update to the output, if they do."""
    reasons = (f"has {kind.field}: {kind.summand}" for kind in variants_of(config) if kind.summand is not True)
    if config.init_lora_weights == "loftq":
        return 'has init_lora_weights="loftq": it stands on a quantised base'
    return next(reasons, "has arrow_config: it routes tokens" if config.arrow_config is not None else None)


def view(name: str) -> property:
    """An attribute of LoRA that one of its variants has; None without it."""
    return property(lambda lora: next((getattr(v, name) for v in lora.variants if name in v.views), None))


VIEWS = tuple(name for kind in VARIANTS for name in kind.views)
