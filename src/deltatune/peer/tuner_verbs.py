"""Verbs that programs written for PEFT call on `model.base_model`, and deltatune has on the `PeftModel`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Generator, Tensor, nn


class TunerVerbs:
    """The part of a tuner that only such programs call."""

    def add_weighted_adapter(
        self: Any,
        adapters: Iterable[str],
        weights: Iterable[float] | Tensor,
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
        generator: Generator | None = None,
    ) -> dict[str, float]:
        """As `PeftModel.add_weighted_adapter`."""
        return _whole(self).add_weighted_adapter(
            adapters,
            weights,
            adapter_name,
            combination_type,
            svd_rank,
            svd_clamp,
            svd_full_matrices,
            svd_driver,
            density,
            majority_sign_method,
            generator,
        )

    def _get_name(self: Any) -> str:
        """What a printed model calls it: PEFT's class, where all adapters are of one method."""
        from deltatune.peer.methods import TUNERS

        types = {config.peft_type for config in self.peft_config.values()}
        return next((named.model for named in TUNERS if types == {named.peft_type}), type(self).__name__)

    def supports_lora_conversion(self: Any, adapter_name: str = "default") -> bool:
        return _whole(self).supports_lora_conversion(adapter_name)

    def set_requires_grad(self: Any, adapter_names: str | Iterable[str], requires_grad: bool = True) -> None:
        _whole(self).set_requires_grad(adapter_names, requires_grad)


def _whole(tuner: Any) -> Any:
    """A `PeftModel` around a tuner, which may stand alone; both speak of the same adapters."""
    from deltatune.model import PeftModel

    made: Any = PeftModel.__new__(PeftModel)
    nn.Module.__init__(made)
    made.base_model, made.peft_config, made.prompts = tuner, tuner.peft_config, tuner.grafts
    made.prompt_encoder, made.autocast_adapter_dtype = nn.ModuleDict(), True
    return made
