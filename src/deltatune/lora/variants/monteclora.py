"""MonteCLoRA: in training A is a mixture of Gaussian samples around its mean, whose spread and weights are trained.

A' = sum_i w_i (A + e_i), rows of e_i ~ N(0, s^2 v), v ~ exp(2 t) chi^2_r, w ~ Dirichlet.
https://arxiv.org/abs/2411.04358
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune import checks
from deltatune.adapter import LinearMap
from deltatune.lora.variants.options import Options
from deltatune.lora.variants.variant import Variant

if TYPE_CHECKING:
    from deltatune.methods.lora import LoRA

SMALLEST_VARIANCE, SMALLEST_WEIGHT = 1e-3, 1e-6


@dataclass
class MontecloraConfig(Options):
    """MonteCLoRA's options, with PEFT's names and defaults. Its loss is in that of a training pass by itself.

    Attributes:
        num_samples: Gaussian samples in a mixture.
        use_entropy: The squares of the samples' weights are part of the loss.
        dirichlet_prior: Concentration of the prior of those weights.
        sample_scaler: Scale of the samples' spread.
        kl_loss_weight: Weight of the divergence from the priors in the loss.
        buffer_size: Accepted and ignored: samples are drawn when they are used.
    """

    num_samples: int = 8
    use_entropy: bool = False
    dirichlet_prior: float = 0.1
    sample_scaler: float = 1e-4
    kl_loss_weight: float = 1e-5
    buffer_size: int = 150

    def validate(self) -> None:
        owner = "MontecloraConfig"
        checks.positive_int(owner, "num_samples", self.num_samples)
        checks.positive_int(owner, "buffer_size", self.buffer_size)
        for name in ("dirichlet_prior", "sample_scaler"):
            checks.finite_positive(owner, name, getattr(self, name))
        weight = self.kl_loss_weight
        if not checks.fits(weight, float) or not math.isfinite(weight) or weight < 0:
            checks.refuse(owner, "kl_loss_weight", weight, "a finite number of 0 or more")


class Sampler(nn.Module):
    """Trainable: `std_prior` t (r), logarithms of spreads, and `expert_weights_prior` (samples), of concentrations.

    The buffers, which files hold, are the variances and the weights that were drawn last. Of the samples only their
    weighted sum is needed, which is itself Gaussian, so one matrix is drawn instead of one per sample.
    """

    gaussian_var_prior: Tensor
    expert_weights: Tensor

    def __init__(self, r: int, options: MontecloraConfig) -> None:
        super().__init__()
        samples = options.num_samples
        self.scale, self.prior = options.sample_scaler, options.dirichlet_prior
        self.std_prior = nn.Parameter(torch.rand(r))
        self.expert_weights_prior = nn.Parameter(torch.rand(samples))
        self.register_buffer("gaussian_var_prior", torch.eye(r))
        self.register_buffer("expert_weights", torch.full((samples,), 1 / samples))
        self.drawn: tuple[Tensor, Tensor] | None = None  # what variances and weights were made of in the last pass

    @property
    def spread(self) -> Tensor:
        return self.std_prior.exp().square()

    @property
    def concentrations(self) -> Tensor:
        return self.expert_weights_prior.exp().clamp_min(SMALLEST_WEIGHT)

    def variances(self, chi: Tensor) -> Tensor:
        """(r,): the diagonal of a draw from a Wishart distribution of r degrees of freedom."""
        return (self.spread * chi).clamp_min(SMALLEST_VARIANCE)

    def weights(self, normal: Tensor) -> Tensor:
        """(samples,): Laplace's approximation of a draw from a Dirichlet distribution, in the softmax basis."""
        a, k = self.concentrations, len(normal)
        variance = (1 - 2 / k) / a + (1 / a).sum() / k**2
        logits = a.log() - a.log().mean() + (variance.clamp_min(0) + SMALLEST_WEIGHT).sqrt() * normal
        return logits.softmax(dim=0)

    def sample(self, A: Tensor) -> Tensor:
        r = len(self.std_prior)
        chi = torch.randn(r, r, dtype=A.dtype, device=A.device).square().sum(dim=1)
        normal = torch.randn_like(self.expert_weights_prior)
        v, w = self.variances(chi), self.weights(normal)
        self.drawn = chi, normal
        with torch.no_grad():
            self.gaussian_var_prior.copy_(torch.diag(v))
            self.expert_weights.copy_(w)
        return A + self.scale * w.norm() * v.sqrt()[:, None] * torch.randn_like(A)

    def divergence(self) -> Tensor:
        """From the priors: Dirichlet(prior), Wishart(r, I) and N(0, I) for every sample."""
        a, b = self.concentrations, torch.full_like(self.expert_weights_prior, self.prior)
        of_weights = (
            *(torch.lgamma(a.sum()) - torch.lgamma(b.sum()), (torch.lgamma(b) - torch.lgamma(a)).sum()),
            ((a - b) * (torch.digamma(a) - torch.digamma(a.sum()))).sum(),
        )
        r, samples = len(self.std_prior), len(a)
        of_spread = r * (self.spread - self.spread.log() - 1).sum() / 2
        if self.drawn is None:
            return sum(of_weights, of_spread)
        v = self.variances(self.drawn[0])
        return sum(of_weights, of_spread) + samples * (v - v.log() - 1).sum() / 2

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "drawn": None}


class Monteclora(Variant):
    """Trainable besides A, which is the mean, and B: the sampler."""

    field: ClassVar[str] = "monteclora_config"
    penalises: ClassVar[bool] = True
    learns_in_eval: bool | str = "nothing is sampled in evaluation mode"
    views: ClassVar[tuple[str, ...]] = ("lora_monteclora_sampler",)

    def __init__(self, r: int, options: MontecloraConfig, layers: int) -> None:
        super().__init__()
        self.lora_monteclora_sampler = Sampler(r, options)
        self.weight, self.entropy, self.layers = options.kl_loss_weight, options.use_entropy, layers

    @classmethod
    def build(cls, layer: LinearMap, config: Any, path: str, r: int) -> Monteclora:
        return cls(r, config.monteclora_config, config.layers)

    def drawn(self, A: Tensor) -> Tensor:
        return self.lora_monteclora_sampler.sample(A) if self.training else A

    def penalty(self, lora: LoRA) -> Tensor:
        """The mean over the layers of the model."""
        sampler = self.lora_monteclora_sampler
        loss = self.weight * sampler.divergence()
        if self.entropy and sampler.drawn is not None:
            loss = loss + sampler.weights(sampler.drawn[1]).square().sum()
        return loss / self.layers

    def kept_tensors(self) -> dict[str, Tensor]:
        return dict(self.named_buffers())
