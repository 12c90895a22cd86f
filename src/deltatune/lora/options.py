"""The options of single starts of LoRA, with PEFT's names and defaults; `LoraConfig` takes them as objects or dicts."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from deltatune import checks
from deltatune.errors import ConfigError
from deltatune.lora.variants.options import Options
from deltatune.notice import warn


@dataclass
class LoraRuntimeConfig(Options):
    """What concerns one run alone, and is never saved.

    Attributes:
        ephemeral_gpu_offload: Work out DoRA's lengths of a base on the CPU on the first accelerator. Other starts are
            worked out where the layer is.
    """

    ephemeral_gpu_offload: bool = False


OF_DORA = "is for the lengths that DoRA starts from (LoraConfig with use_dora=True)"


def accelerator() -> torch.device | None:
    return torch.accelerator.current_accelerator(check_available=True)


def warn_offload(config: Any) -> None:
    """Before adapters are built: say so where `ephemeral_gpu_offload` was asked for and changes nothing."""
    if not config.runtime_config.ephemeral_gpu_offload:
        return
    if not config.use_dora:
        warn(f"LoraConfig: ephemeral_gpu_offload=True {OF_DORA}; it changes nothing")
    elif accelerator() is None:
        warn("LoraConfig: ephemeral_gpu_offload=True needs an accelerator, and torch finds none; it changes nothing")


@dataclass
class LoftQConfig(Options):
    """Options of `init_lora_weights="loftq"`.

    Attributes:
        loftq_bits: 4 (NormalFloat4 in blocks of 64) or 8 (integers with a scale per row).
        loftq_iter: How often quantising and decomposing what that lost alternate.
    """

    loftq_bits: int = 4
    loftq_iter: int = 1

    def validate(self) -> None:
        checks.one_of("LoftQConfig", "loftq_bits", self.loftq_bits, (4, 8))
        checks.positive_int("LoftQConfig", "loftq_iter", self.loftq_iter)


@dataclass
class EvaConfig(Options):
    """Options of `init_lora_weights="eva"`.

    Attributes:
        rho: A layer gets at most rho * r of the ranks, which are distributed by explained variance; 1 for r everywhere.
        tau: Components count as settled when their cosine with those of the batch before is this or more.
        use_label_mask: Leave out tokens whose label is `label_mask_value`.
        label_mask_value: The label that means "no label".
        whiten: Divide each component by the root of its singular value.
        adjust_scaling_factors: Multiply lora_alpha of a layer by new rank / r, so that alpha / r stays.
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def validate(self) -> None:
        if not checks.fits(self.rho, float) or not math.isfinite(self.rho) or self.rho < 1:
            checks.refuse("EvaConfig", "rho", self.rho, "a finite number of 1 or more")
        if not checks.fits(self.tau, float) or not 0 <= self.tau <= 1:
            checks.refuse("EvaConfig", "tau", self.tau, "a number in [0, 1]")


@dataclass
class CordaConfig(Options):
    """Options of `init_lora_weights="corda"`.

    Attributes:
        cache_file: Where the decomposition is kept; read instead of running the model when it is there.
        covariance_file: Likewise for the covariances, which serve every rank.
        corda_method: "ipm": the r largest directions, for a new task. "kpm": the r smallest, to keep what is known.
        verbose: Say which layer is being decomposed.
        use_float16_for_covariance: Sum covariances in the precision of the activations instead of float32.
        prune_temporary_fields: Accepted and without effect: nothing temporary is left on the model.
    """

    cache_file: str | None = None
    covariance_file: str | None = None
    corda_method: Literal["ipm", "kpm"] = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True

    def validate(self) -> None:
        checks.one_of("CordaConfig", "corda_method", self.corda_method, ("ipm", "kpm"))


@dataclass
class LoraGAConfig(Options):
    """Options of `init_lora_weights="lora_ga"`.

    Attributes:
        direction: Which of the 2r leading singular directions of the gradient go to A and which to B: "ArB2r" (first
            half to A), "A2rBr" (first half to B), "ArBr" (in turn), "random" (the same r for both).
        scale: "stable" (by out_features^(1/4) / sqrt(stable_gamma)), "weight_svd" (to the size of W), "gd_scale" (by
            the scaling), "unit" (not at all).
        stable_gamma: The gamma of "stable".
    """

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = "ArB2r"
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable"
    stable_gamma: int = 16

    def validate(self) -> None:
        checks.one_of("LoraGAConfig", "direction", self.direction, ("ArBr", "A2rBr", "ArB2r", "random"))
        checks.one_of("LoraGAConfig", "scale", self.scale, ("stable", "weight_svd", "gd_scale", "unit"))
        checks.finite_positive("LoraGAConfig", "stable_gamma", self.stable_gamma)


_OF_STARTS = {"eva": EvaConfig, "corda": CordaConfig, "lora_ga": LoraGAConfig}


def settle(config: Any) -> None:
    """Bring the options of starts in a LoraConfig into shape; warn of those that another start will not read."""
    for start, kind in _OF_STARTS.items():
        given = kind.of(getattr(config, f"{start}_config"), "LoraConfig", f"{start}_config")
        setattr(config, f"{start}_config", given)
        if given is not None and config.init_lora_weights not in (start, True):  # True: as converted files have it
            warn(f'LoraConfig: {start}_config has no effect without init_lora_weights="{start}"')
    config.runtime_config = LoraRuntimeConfig.of(config.runtime_config, "LoraConfig", "runtime_config")
    if config.loftq_config and config.init_lora_weights != "loftq":
        config.loftq_config = {}
        warn(f'LoraConfig: loftq_config is for init_lora_weights="loftq", not {config.init_lora_weights!r}; left out')
    elif config.loftq_config:
        options = LoftQConfig.of(config.loftq_config, "LoraConfig", "loftq_config")
        config.loftq_config = dataclasses.asdict(options)  # type: ignore[arg-type]


def fill_in(config: Any) -> None:
    """The options that a start needs, at their defaults where there are none.

    Raises:
        ConfigError: LoftQ's, which say how the base will be quantised.
    """
    kind = _OF_STARTS.get(config.init_lora_weights)
    if kind is not None and getattr(config, f"{config.init_lora_weights}_config") is None:
        setattr(config, f"{config.init_lora_weights}_config", kind())
    if config.runtime_config is None:
        config.runtime_config = LoraRuntimeConfig()
    if config.init_lora_weights == "loftq" and not config.loftq_config:
        raise ConfigError(
            'LoraConfig: init_lora_weights="loftq" needs loftq_config, for example LoftQConfig(loftq_bits=4)',
            field="loftq_config",
            found=config.loftq_config,
        )
