"""KappaTune: adapt the layers with the smallest condition numbers.   https://arxiv.org/abs/2506.16289

Well-conditioned matrices hold the least specific knowledge, so changing them forgets the least.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from deltatune import targets
from deltatune.checks import finite_positive

_SUFFIXES = (".gate_up_proj", ".down_proj", ".gate_proj", ".up_proj")  # of fused experts
_SMALLEST = 1e-8  # added to the smallest singular value


class KappaTuneSelector:
    """Condition numbers of a model's linear layers and fused expert weights, computed once when first asked for.

    Quantised layers are unpacked, one at a time. GPT-2's layers, stored the other way round, count as linear too.

    Args:
        max_dim_size_to_analyze: Matrices with a longer side are left out; their decomposition takes too long.
        moe_param_suffixes: How the paths of three-dimensional expert weights (experts, ., .) end.
        show_progress: A bar, since large models take minutes.
    """

    def __init__(
        self,
        model: nn.Module,
        max_dim_size_to_analyze: int = 16384,
        moe_param_suffixes: tuple[str, ...] | None = None,
        show_progress: bool = True,
    ) -> None:
        finite_positive("KappaTuneSelector", "max_dim_size_to_analyze", max_dim_size_to_analyze)
        self.model, self.show_progress = model, show_progress
        self.max_dim_size_to_analyze = max_dim_size_to_analyze
        self.moe_param_suffixes = moe_param_suffixes or _SUFFIXES
        self._layers: dict[str, float] | None = None
        self._experts: dict[str, float] | None = None

    @property
    def condition_numbers(self) -> dict[str, float]:
        """Path of a layer -> its condition number."""
        if self._layers is None:
            found = {path: layer for path, module in targets.walk(self.model) if (layer := _linear(module)) is not None}
            self._layers = self._measured(found.items(), "linear layers", lambda layer: [layer.weight])
        return self._layers

    @property
    def parameter_condition_numbers(self) -> dict[str, float]:
        """Path of an expert weight -> the mean of its experts' condition numbers."""
        if self._experts is None:
            found = [
                (path, parameter)
                for path, parameter in self.model.named_parameters()
                if parameter.ndim == 3 and path.endswith(self.moe_param_suffixes)
            ]
            self._experts = self._measured(found, "experts", lambda parameter: parameter.detach().unbind(0))
        return self._experts

    def _measured(
        self, items: Iterable[tuple[str, Any]], what: str, matrices: Callable[[Any], Iterable[Tensor]]
    ) -> dict[str, float]:
        found: dict[str, float] = {}
        for path, item in self._shown(list(items), what):
            if max(_sides(item)) <= self.max_dim_size_to_analyze:
                values = [condition_number(matrix) for matrix in matrices(item)]
                found[path] = sum(values) / len(values)
        return found

    def _shown(self, items: list[Any], what: str) -> Iterable[Any]:
        if not self.show_progress or not items:
            return items
        from tqdm.auto import tqdm

        return tqdm(items, desc=f"condition numbers of {what}")

    def get_best_targets(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """Paths for `target_modules`, the best conditioned first.

        Args:
            num_modules: So many of them;
            top_p: or this share, at least one;
            threshold: or those with at most this condition number. All of them where none is given.
        """
        return _chosen(self.condition_numbers, top_p, num_modules, threshold)

    def get_best_target_parameters(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """Likewise for `target_parameters`."""
        return _chosen(self.parameter_condition_numbers, top_p, num_modules, threshold)


def find_kappa_target_modules(
    model: nn.Module,
    top_p: float = 0.2,
    max_dim_size_to_analyze: int = 16384,
    moe_param_suffixes: tuple[str, ...] | None = None,
    show_progress: bool = True,
) -> dict[str, list[str] | None]:
    """The share `top_p` of layers, and of fused expert weights, with the smallest condition numbers.

    Returns:
        Arguments of a LoraConfig: "target_modules", and "target_parameters", None for a model without fused experts.
    """
    selector = KappaTuneSelector(model, max_dim_size_to_analyze, moe_param_suffixes, show_progress)
    return {
        "target_modules": selector.get_best_targets(top_p=top_p),
        "target_parameters": selector.get_best_target_parameters(top_p=top_p) or None,
    }


@torch.no_grad()
def condition_number(matrix: Tensor) -> float:
    """Largest by smallest singular value, in float32."""
    values = torch.linalg.svdvals(matrix.detach().float())
    return (values[0] / (values[-1] + _SMALLEST)).item()


def _linear(module: nn.Module) -> Any:
    layer = targets.map_of(module)
    return layer if layer is not None and layer.kind == "linear" and not layer.only_weight else None


def _sides(item: Any) -> tuple[int, ...]:
    """Of a layer's matrix, or of one expert's."""
    return tuple(item.shape[1:]) if isinstance(item, Tensor) else (item.out_features, item.in_features)


def _chosen(
    numbers: dict[str, float], top_p: float | None, num_modules: int | None, threshold: float | None
) -> list[str]:
    ordered = sorted(numbers, key=numbers.__getitem__)
    if num_modules is not None:
        return ordered[:num_modules]
    if top_p is not None:
        return ordered[: max(1, int(len(ordered) * top_p))]
    return ordered if threshold is None else [path for path in ordered if numbers[path] <= threshold]
