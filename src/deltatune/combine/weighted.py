"""`add_weighted_adapter`: several adapters of any methods as one, a weighted sum of what they change.

A LoRA adapter's change of a weight is a product, and a sum of products is one of a higher rank: [B1 B2] [A1; A2]. So
sums are exact in factors, or are brought down to a rank by a decomposition of those. What looks at single entries of
the changes, to prune them or to elect a sign, needs the dense matrices (`..._svd`) or takes the entries of the factors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Generator, Tensor

from deltatune import inject
from deltatune.combine import lora, naming, rules
from deltatune.combine.arguments import BY_SVD, EXACT, PRUNED, Request, checked
from deltatune.combine.changes import Change, check, read
from deltatune.combine.product import Keep, Product, dense, total
from deltatune.errors import MergeError
from deltatune.layer import AdaptedLayer
from deltatune.notice import warn
from deltatune.registry import METHODS

Terms = list[tuple[float, Change]]
LOST_WORTH_SAYING = 0.1  # of what a layer should have held

_RULES: dict[str, Callable[[list[Tensor], list[float], Request], Tensor]] = {
    "magnitude_prune": lambda tensors, w, ask: rules.magnitude_prune(tensors, w, _density(ask)),
    "dare_linear": lambda tensors, w, ask: rules.dare_linear(tensors, w, _density(ask), ask.generator),
    "ties": lambda tensors, w, ask: rules.ties(tensors, w, _density(ask), ask.majority_sign_method),
    "dare_ties": lambda tensors, w, ask: rules.dare_ties(
        tensors, w, _density(ask), ask.majority_sign_method, ask.generator
    ),
}


@torch.no_grad()
def add_weighted_adapter(
    model: Any,
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
    """Add an adapter that does the weighted sum of what others do. It does not train until `set_adapter`.

    The result is a LoRA adapter with scaling one, whatever the methods of the others, as long as a weight can hold
    them; of IA3 adapters alone it is one of IA3 under "svd" without a rank (the sum of the vectors, as in PEFT) and
    "linear". What each does is taken by itself, on the bare layer.

    Args:
        adapters: Names of those that are combined.
        weights: One each, of any sign: `[1, -1]` is a difference, `[-1]` a negation.
        adapter_name: That of the new one.
        combination_type: "linear" and "cat" are the sum, exactly, with the sum of the ranks. "svd" is the nearest to it
            of rank `svd_rank`. "ties_svd", "dare_linear_svd", "dare_ties_svd" and "magnitude_prune_svd" do to the
            changes of the weight what they are called (`deltatune.combine`), and are brought down to that rank.
            "magnitude_prune" and "dare_linear" prune the factors of each adapter and add up the products exactly;
            "ties" and "dare_ties" merge the factors themselves, as PEFT does, and need equal ranks.
        svd_rank: By default the highest rank among the adapters.
        svd_clamp: Clamp the factors after the decomposition at this quantile of their entries.
        svd_full_matrices: Accepted; the columns that it adds are not used.
        svd_driver: cuSOLVER's method, on CUDA.
        density: Share of the entries that pruning keeps, in (0, 1].
        majority_sign_method: What TIES elects by: "total" or "frequency".
        generator: What DARE draws from; torch's own by default.

    Returns:
        By layer, the share of the sum that the rank could not hold: |held - wanted| / |wanted|.

    Raises:
        PeftError: `field` names the argument; nothing has changed.
    """
    ask = checked(
        model,
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
    )
    base = model.get_base_model()
    configs = {name: model.peft_config[name] for name in ask.adapters}
    copies = lora.Copies.of(base, configs)
    if (own := _sum_of_its_own(base, configs, ask)) is not None:
        config, tensors = own
        lora.add(model, adapter_name, config, lambda path, made: made.load_file_tensors(tensors[path]), copies)
        return {}
    for name in configs:
        check(base, name)
    layers = _combined(base, ask)
    config = lora.config_for(base, layers, configs[ask.adapters[0]])
    lora.add(model, adapter_name, config, lambda path, made: layers[path].fill(made), copies)
    return _reported({path: layer.error for path, layer in layers.items()}, ask)


def _terms(base: Any, ask: Request) -> dict[str, list[tuple[float, AdaptedLayer, str]]]:
    """By layer, which adapters are on it and what they weigh."""
    found = {}
    for path, layer in inject.adapted_layers(base):
        own = [(w, layer, name) for name, w in zip(ask.adapters, ask.weights) if name in layer.adapters]
        if own:
            found[path] = own
    return found


def _combined(base: Any, ask: Request) -> dict[str, lora.Factors]:
    """One layer after the other, so that no more than the dense matrices of one are there at a time."""
    layers, rank = _terms(base, ask), ask.svd_rank
    if ask.combination_type in BY_SVD and rank is None:
        rank = _highest_rank(layers)
    return {
        path: _of_layer(path, [(w, read(layer, name)) for w, layer, name in terms], ask, rank)
        for path, terms in layers.items()
    }


@torch.no_grad()
def _highest_rank(layers: Mapping[str, list[tuple[float, AdaptedLayer, str]]]) -> int:
    ranks = [0]
    for path, terms in layers.items():
        for _, layer, name in terms:
            factors = layer.adapters[name].low_rank(layer.as_map())  # type: ignore[operator]
            if factors is None:
                kind = type(layer.adapters[name]).__name__
                raise MergeError(
                    f"svd_rank: {name!r} is {kind}, whose change at {path} has no rank of its own; give the rank that "
                    "the combined adapter is to have",
                    field="svd_rank",
                    path=path,
                )
            ranks.append(len(factors[1]))
    return max(ranks)


def _of_layer(path: str, terms: Terms, ask: Request, rank: int | None) -> lora.Factors:
    weights, changes = [w for w, _ in terms], [change for _, change in terms]
    like, kind, bias = changes[0], ask.combination_type, _bias(terms, ask)
    if kind in EXACT:
        return lora.stacked(total((w, change.weight) for w, change in terms), like, bias)
    if kind not in BY_SVD:
        return _in_factors(path, terms, ask, bias)
    if kind == "svd":
        matrix = total((w, change.weight) for w, change in terms)
    else:
        matrix = _ruled([dense(change.weight) for change in changes], weights, ask)
    keep = Keep(_possible(matrix, like.groups, rank, given=ask.svd_rank is not None))
    made = lora.factors(matrix, like, keep, bias, driver=ask.svd_driver)
    return made if ask.svd_clamp is None else _clamped(made, ask.svd_clamp)


def _possible(matrix: Any, groups: int, rank: int | None, given: bool) -> int:
    """The rank, or the highest that the layer can have; one that is not asked for is no higher than that of the sum."""
    assert rank is not None
    out, width = (len(matrix.up), matrix.down.shape[1]) if isinstance(matrix, Product) else matrix.shape
    highest = groups * min(out // groups, width)
    if isinstance(matrix, Product) and not given:
        highest = max(groups, min(highest, matrix.rank))
    return min(rank, highest)


def _ruled(tensors: list[Tensor], weights: list[float], ask: Request) -> Tensor:
    rule = ask.pruning
    return rules.task_arithmetic(tensors, weights) if rule is None else _RULES[rule](tensors, weights, ask)


def _bias(terms: Terms, ask: Request) -> Tensor | None:
    changed = [(w, change.bias) for w, change in terms if change.bias is not None]
    return _ruled([bias for _, bias in changed], [w for w, _ in changed], ask) if changed else None


def _in_factors(path: str, terms: Terms, ask: Request, bias: Tensor | None) -> lora.Factors:
    """Pruning that looks at the entries of A and of B."""
    products = [change.weight for _, change in terms]
    if not all(isinstance(product, Product) for product in products):
        raise MergeError(
            f"combination_type={ask.combination_type!r} works on the factors of LoRA and its relatives, and an adapter "
            f"at {path} has none; use {ask.combination_type + '_svd'!r}",
            field="combination_type",
            path=path,
            found=ask.combination_type,
        )
    like, weights = terms[0][1], [w for w, _ in terms]
    groups = list(zip(*(lora.pieces(product, like.groups) for product in products)))
    combine = _pruned if ask.combination_type in PRUNED else _elected
    made = [combine(path, list(group), weights, ask).to(like.dtype) for group in groups]  # type: ignore[arg-type]
    rank = max(product.rank for product in made)
    return lora.Factors(tuple(product.padded(max(1, rank)) for product in made), bias)


def _pruned(path: str, products: list[Product], weights: list[float], ask: Request) -> Product:
    """Each adapter's factors pruned, and the products added up: no factor of one meets one of another."""

    def prune(factor: Tensor) -> Tensor:
        return _ruled([factor], [1.0], ask)

    downs = [prune(product.down) for product in products]  # the order in which PEFT draws
    summed = total((w, Product(prune(p.up), down)) for w, p, down in zip(weights, products, downs))
    assert isinstance(summed, Product)
    return summed


def _elected(path: str, products: list[Product], weights: list[float], ask: Request) -> Product:
    ranks = [product.rank for product in products]
    if len(set(ranks)) > 1:
        raise MergeError(
            f"combination_type={ask.combination_type!r} merges factors entry by entry, for which ranks have to be "
            f"equal; at {path} they are {ranks}; use {ask.combination_type + '_svd'!r}",
            field="combination_type",
            path=path,
            found=ranks,
        )
    roots = [abs(w) ** 0.5 for w in weights]
    signed = [root if w >= 0 else -root for root, w in zip(roots, weights)]
    down = _ruled([product.down for product in products], signed, ask)
    return Product(_ruled([product.up for product in products], roots, ask), down)


def _clamped(made: lora.Factors, quantile: float) -> lora.Factors:
    """As kohya's scripts do it after a decomposition: at a quantile of the entries of both factors."""

    def clamp(product: Product) -> Product:
        entries = torch.cat([product.up.flatten(), product.down.flatten()]).float()
        limit = _quantile(entries, quantile)
        return Product(product.up.clamp(-limit, limit), product.down.clamp(-limit, limit))

    return dataclasses.replace(made, groups=tuple(clamp(product) for product in made.groups))


def _quantile(entries: Tensor, share: float) -> float:
    """Interpolated; `torch.quantile` takes no more than 2^24 entries."""
    place = share * (len(entries) - 1)
    below = int(place)
    low = entries.kthvalue(below + 1).values.item()
    high = entries.kthvalue(min(below + 2, len(entries))).values.item()
    return max(0.0, low + (place - below) * (high - low))


def _sum_of_its_own(
    base: Any, configs: dict[str, Any], ask: Request
) -> tuple[Any, dict[str, dict[str, Tensor]]] | None:
    """Config and tensors by layer where all adapters are of one method that has sums of its own kind."""
    kinds = {config.peft_type for config in configs.values()}
    method = METHODS[kinds.pop()]
    if (
        kinds
        or method.weighted_sum is None
        or ask.svd_rank is not None
        or ask.combination_type not in ("svd", "linear")
    ):
        return None
    terms = list(zip(ask.weights, ask.adapters))
    there = {path: dict(layer.adapters.items()) for path, layer in inject.adapted_layers(base)}
    there = {path: adapters for path, adapters in there.items() if not configs.keys().isdisjoint(adapters)}
    # a sum of changes counts from what changes nothing: 1 + sum w (l - 1)
    rest = [(1.0 - sum(ask.weights), None)] if ask.combination_type == "linear" else []
    options, tensors = method.weighted_sum(
        {path: [(w, adapters.get(name)) for w, name in terms] + rest for path, adapters in there.items()}
    )
    part = options.pop("part", None)
    names, own = naming.with_part(base, list(tensors), part[1] if part else ())
    cleared = {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None, "modules_to_save": None}
    fields = {"target_modules": names, **({part[0]: own} if part else {})}
    return dataclasses.replace(next(iter(configs.values())), **cleared, **fields), tensors


def _reported(errors: dict[str, float], ask: Request) -> dict[str, float]:
    path, error = max(errors.items(), key=lambda item: item[1])
    if error > LOST_WORTH_SAYING:
        warn(
            f"add_weighted_adapter: the rank of {ask.adapter_name!r} cannot hold {error:.0%} of the sum at {path}; "
            "a higher svd_rank holds more of it, combination_type='linear' all of it"
        )
    return errors


def _density(ask: Request) -> float:
    assert ask.density is not None  # checked
    return ask.density
