"""`CombineVerbs`: the part of a `PeftModel` that makes one adapter of several; what it takes is loaded on its use."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Generator, Tensor


class CombineVerbs:
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
        density: float | Sequence[float] | None = None,
        majority_sign_method: str = "total",
        generator: Generator | None = None,
        consensus: str = "mean",
    ) -> dict[str, float]:
        """Add an adapter that does the weighted sum of what others do. It does not train until `set_adapter`.

        The result is a LoRA adapter with scaling one, whatever the methods of the others, as long as a weight can hold
        them; of IA3 adapters alone it is one of IA3 under "svd" without a rank (the sum of the vectors, as in PEFT) and
        "linear". What each does is taken by itself, on the bare layer.

        Args:
            adapters: Names of those that are combined.
            weights: One each, of any sign: `[1, -1]` is a difference, `[-1]` a negation.
            adapter_name: That of the new one.
            combination_type: "linear" and "cat" are the sum, exactly, with the sum of the ranks. "svd" is the nearest
                to it of rank `svd_rank`. "ties_svd", "dare_linear_svd", "dare_ties_svd" and "magnitude_prune_svd" do
                to the changes of the weight what they are called (`deltatune.combine`), and are brought down to that
                rank. "magnitude_prune" and "dare_linear" prune the factors of each adapter and add up the products
                exactly; "ties" and "dare_ties" merge the factors themselves, as PEFT does, and need equal ranks.
            svd_rank: By default the highest rank among the adapters.
            svd_clamp: Clamp the factors after the decomposition at this quantile of their entries.
            svd_full_matrices: Accepted; the columns that it adds are not used.
            svd_driver: cuSOLVER's method, on CUDA.
            density: Share of the entries that pruning keeps, in (0, 1]; or one for each adapter.
            majority_sign_method: What TIES elects by: "total" or "frequency".
            generator: What DARE draws from; torch's own by default.
            consensus: How "ties_svd" and "dare_ties_svd" bring together what has the elected sign: "mean" as PEFT,
                "weighted_mean" or "sum" as mergekit (`deltatune.combine.ties`).

        Returns:
            By layer, the share of the sum that the rank could not hold: |held - wanted| / |wanted|.

        Raises:
            PeftError: `field` names the argument; nothing has changed.
        """
        from deltatune.combine.weighted import add_weighted_adapter

        return add_weighted_adapter(
            self,
            adapters,
            weights,
            adapter_name,
            combination_type=combination_type,
            svd_rank=svd_rank,
            svd_clamp=svd_clamp,
            svd_driver=svd_driver,
            density=density,
            majority_sign_method=majority_sign_method,
            generator=generator,
            consensus=consensus,
        )

    def supports_lora_conversion(self: Any, adapter_name: str = "default") -> bool:
        """Whether `convert_to_lora` can turn an adapter of the model into LoRA."""
        from deltatune.combine.convert import supports_lora_conversion

        return supports_lora_conversion(self, adapter_name)
