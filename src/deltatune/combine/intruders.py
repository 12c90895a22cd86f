"""Intruder dimensions: singular vectors of W' that are like none of W, and taking some of them out of an adapter.

They are where LoRA forgets what the base knew.   https://arxiv.org/abs/2410.21228
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from deltatune import checks
from deltatune.combine import lora
from deltatune.combine.arguments import check_new_name
from deltatune.combine.changes import Change, check, layers_of, read
from deltatune.combine.product import Keep, Product, total
from deltatune.errors import MergeError
from deltatune.layer import AdaptedLayer
from deltatune.methods.lora import LoRA
from deltatune.registry import METHODS


@torch.no_grad()
def reduce_intruder_dimension(
    peft_model: Any,
    old_adapter_name: str = "default",
    new_adapter_name: str = "intruder_reduced",
    top_k: int = 10,
    threshold_epsilon: float = 0.5,
    mitigation_lambda: float = 0.75,
    logging_sink: Callable[[str], Any] | None = print,
) -> dict[str, int]:
    """A copy of a LoRA adapter, active afterwards, whose intruder dimensions weigh less.

    On each layer, of the `top_k` largest singular vectors u_i of W + s B A those are intruders whose cosine with every
    left singular vector of W is below `threshold_epsilon`. The new B A is the nearest of the adapter's rank to
    s B A + (mitigation_lambda - 1) sum_i sigma_i u_i v_i^T.

    Args:
        mitigation_lambda: What is left of an intruder: 1 all of it, 0 none.
        logging_sink: Gets a line for each layer; None for none.

    Returns:
        The number of intruders by layer.

    Raises:
        MergeError: The adapter is no plain LoRA adapter, or the new name is taken; nothing has changed.
    """
    log = logging_sink or (lambda line: None)
    checks.positive_int("reduce_intruder_dimension", "top_k", top_k)
    config, base = _config(peft_model, old_adapter_name), peft_model.get_base_model()
    check_new_name(peft_model, new_adapter_name)
    check(base, old_adapter_name)
    copies = lora.Copies.of(base, {old_adapter_name: config})
    old, found, counts = dict(layers_of(base, old_adapter_name)), {}, {}
    for path, layer in old.items():
        adapter: Any = layer.adapters[old_adapter_name]
        if isinstance(adapter.core, LoRA):
            change = _plain(path, read(layer, old_adapter_name))
            intruders = _intruders(layer, change, top_k, threshold_epsilon)
            counts[path] = intruders.rank
            log(f"{path}: {intruders.rank or 'no'} intruder dimensions")
            if intruders.rank:
                matrix = total([(1.0, change.weight), (mitigation_lambda - 1.0, intruders)])
                found[path] = lora.factors(matrix, change, Keep(adapter.r), change.bias)

    def fill(path: str, made: Any) -> None:
        if path in found:
            _balanced(found[path], made.scaling).fill(made)
        else:
            made.load_file_tensors(old[path].adapters[old_adapter_name].file_tensors())  # type: ignore[operator]

    lora.add(peft_model, new_adapter_name, config, fill, copies)
    peft_model.set_adapter(new_adapter_name)
    log(f"{new_adapter_name!r} is active now")
    return counts


def _config(model: Any, name: str) -> Any:
    model._known([name])
    kind = METHODS[model.peft_config[name].peft_type].adapter
    if kind is None or not issubclass(kind, LoRA):
        raise MergeError(
            f"old_adapter_name: {name!r} is no LoRA adapter; convert_to_lora makes it one",
            field="old_adapter_name",
            found=name,
        )
    config = copy.deepcopy(model.peft_config[name])
    config.init_lora_weights = True  # the new one starts from the old one, whatever that has started from
    return config


def _plain(path: str, change: Change) -> Change:
    if isinstance(change.weight, Product):
        return change
    raise MergeError(f"{path}: what the adapter adds to the weight is no product of two factors", path=path)


def _intruders(layer: AdaptedLayer, change: Change, top_k: int, epsilon: float) -> Product:
    """Those of W' as a product."""
    assert isinstance(change.weight, Product)
    delta = change.weight.dense
    W = layer.as_map().weight.to(delta.dtype)
    base = torch.linalg.svd(W, full_matrices=False).U
    U, S, V = torch.linalg.svd(W + delta, full_matrices=False)
    alike = (U[:, :top_k].T @ base).abs().amax(1)
    places = (alike < epsilon).nonzero().flatten()
    return Product(U[:, places] * S[places], V[places])


def _balanced(made: lora.Factors, scaling: float) -> lora.Factors:
    """With the singular values in equal shares in A and in B, once B is divided by the scaling."""

    def balanced(product: Product) -> Product:
        roots = product.up.norm(dim=0).clamp_min(torch.finfo(product.up.dtype).tiny).sqrt()
        share = abs(scaling) ** 0.5
        return Product(product.up / roots * share, product.down * roots[:, None] / share)

    return lora.Factors(tuple(balanced(product) for product in made.groups), made.bias, made.error)
