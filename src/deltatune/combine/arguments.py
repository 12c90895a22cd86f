"""The arguments of `add_weighted_adapter`: every one is checked before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from deltatune.checks import fits
from deltatune.combine.rules import check_consensus, check_density, check_sign_method
from deltatune.errors import AdapterNameError, MergeError
from deltatune.names import check_name, listed
from deltatune.notice import warn

EXACT = ("linear", "cat")
PRUNED = ("magnitude_prune", "dare_linear")
ELECTED = ("ties", "dare_ties")
BY_SVD = ("svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")
TYPES = (*EXACT, *PRUNED, *ELECTED, *BY_SVD)
_DRIVERS = (None, "gesvd", "gesvdj", "gesvda")


@dataclass(frozen=True)
class Request:
    """What is asked for; the fields are those of `PeftModel.add_weighted_adapter`."""

    adapters: list[str]
    weights: list[float]
    adapter_name: str
    combination_type: str = "svd"
    svd_rank: int | None = None
    svd_clamp: float | None = None
    svd_driver: str | None = None
    density: float | Sequence[float] | None = None
    majority_sign_method: str = "total"
    generator: Any = None
    consensus: str = "mean"

    def density_of(self, adapter: str) -> float | None:
        """What pruning keeps of an adapter; None where nothing is pruned."""
        if self.density is None or isinstance(self.density, (int, float)):
            return self.density
        return self.density[self.adapters.index(adapter)]

    @property
    def pruning(self) -> str | None:
        """The name of the rule that prunes; None where everything is kept."""
        rule = self.combination_type.removesuffix("_svd")
        return None if rule in ("svd", *EXACT) else rule


def checked(model: Any, adapters: Iterable[str], weights: Any, adapter_name: str, **options: Any) -> Request:
    """
    Raises:
        MergeError: An argument is wrong; `field` names it.
        AdapterNameError: An adapter is not there, or the new name cannot be one.
    """
    names = list(listed(adapters, "adapters"))
    request = Request(names, _numbers(weights, len(names)), adapter_name, **options)
    _check_names(model, names, adapter_name)
    kind, rank, clamp = request.combination_type, request.svd_rank, request.svd_clamp
    _require(kind in TYPES, "combination_type", kind, f"one of {', '.join(TYPES)}")
    _require(rank is None or (fits(rank, int) and rank > 0), "svd_rank", rank, "an integer of 1 or more")
    if rank is not None and kind not in BY_SVD:
        warn(f"add_weighted_adapter: svd_rank={rank} has no effect, as the factors fix the rank of {kind!r}")
    _require(clamp is None or (fits(clamp, float) and 0 < clamp <= 1), "svd_clamp", clamp, "a quantile in (0, 1]")
    _require(request.svd_driver in _DRIVERS, "svd_driver", request.svd_driver, f"one of {_DRIVERS}")
    check_sign_method(request.majority_sign_method)
    check_consensus(request.consensus)
    if request.consensus != "mean" and kind not in ("ties_svd", "dare_ties_svd"):
        _require(
            False, "consensus", request.consensus, f"'mean' with {kind!r}; the others are for ties_svd, dare_ties_svd"
        )
    if request.pruning is not None:
        if isinstance(request.density, (list, tuple)) and len(request.density) != len(names):
            _require(False, "density", request.density, f"one share for all, or one for each of {len(names)} adapters")
        for name in names:
            check_density(request.density_of(name), positive=True)  # what keeps nothing is no adapter
    return request


def check_new_name(model: Any, new: str) -> None:
    check_name(new)
    if new in model.peft_config:
        raise MergeError(
            f"adapter_name={new!r}: an adapter of this name is there already; delete_adapter({new!r}) first, or "
            "choose another name",
            field="adapter_name",
            found=new,
        )


def _check_names(model: Any, names: list[str], new: str) -> None:
    check_new_name(model, new)
    _require(bool(names), "adapters", names, "at least one adapter")
    for name in names:
        if name not in model.peft_config:
            raise AdapterNameError(
                f"adapters: no adapter named {name!r}; there are {list(model.peft_config)}",
                field="adapters",
                found=name,
                expected=list(model.peft_config),
            )
        if name in model.prompts:
            raise MergeError(
                f"adapters: {name!r} is {model.prompts[name].unmergeable}; it cannot be combined",
                field="adapters",
                found=name,
            )


def _numbers(weights: Any, count: int) -> list[float]:
    values = list(weights)
    try:
        values = [float(weight) for weight in values]
    except (TypeError, ValueError):
        _require(False, "weights", values, "finite numbers")
    if len(values) != count:
        raise MergeError(
            f"weights: {len(values)} of them for {count} adapters; give one for each",
            field="weights",
            found=len(values),
            expected=count,
        )
    _require(all(map(math.isfinite, values)), "weights", values, "finite numbers")
    return values


def _require(fine: bool, field: str, found: Any, expected: str) -> None:
    if not fine:
        raise MergeError(
            f"add_weighted_adapter: {field}={found!r}, expected {expected}", field=field, found=found, expected=expected
        )
