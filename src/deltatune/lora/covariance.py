"""`preprocess_corda`: what CorDA takes from data, left on the layers for `get_peft_model`.

https://arxiv.org/abs/2406.05223
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.errors import ConfigError, DataError
from deltatune.lora import prepared
from deltatune.lora.cache import read_cache, write_cache
from deltatune.lora.options import CordaConfig
from deltatune.lora.targeted import Targeted, in_mode, targeted

_PARTS = {"S": "eigens.S_WC", "U": "eigens.U_WC", "V": "eigens.V_WC"}  # their names in cache files
_LARGEST_ERROR = 0.05  # of C C^-1, |C C^-1 - I|, below which the damping is enough


@torch.no_grad()
def preprocess_corda(
    model: nn.Module,
    lora_config: Any,
    run_model: Callable[[], Any] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Collect the covariance of the inputs of every targeted linear layer, and decompose W C.

    Args:
        model: The bare model; it is left as it was.
        lora_config: A LoraConfig with init_lora_weights="corda" and perhaps `corda_config`.
        run_model: Runs the model on some hundred samples. None where a file of `corda_config` has what it would give.
        hooked_model: What `run_model` runs, where that is another copy of the model.

    Raises:
        ConfigError: Neither `run_model` nor a file is there.
        DataError: A layer saw no finite inputs.
    """
    lora_config.validate()
    options: CordaConfig = lora_config.corda_config
    layers = targeted(model, lora_config, "corda", frozenset({"linear"}))
    cached = read_cache(options.cache_file, [f"{path}.{name}" for path in layers for name in _PARTS.values()])
    if cached is None:
        parts = _decomposed_all(model, layers, lora_config, run_model, hooked_model)
        write_cache(options.cache_file, {f"{p}.{_PARTS[k]}": t for p, own in parts.items() for k, t in own.items()})
    else:
        parts = {path: {key: cached[f"{path}.{name}"] for key, name in _PARTS.items()} for path in layers}
    for path, layer in layers.items():
        prepared.leave(layer.module, "corda", parts[path])


def _decomposed_all(
    model: nn.Module,
    layers: dict[str, Targeted],
    config: Any,
    run_model: Callable[[], Any] | None,
    hooked_model: nn.Module | None,
) -> dict[str, dict[str, Tensor]]:
    options = config.corda_config
    covariances = read_cache(options.covariance_file, layers)
    if covariances is None:
        if run_model is None:
            raise ConfigError(
                "preprocess_corda: run_model is needed where corda_config names neither a cache_file nor a "
                "covariance_file that is there; pass a function that runs the model on some samples",
                field="run_model",
            )
        hooked = layers if hooked_model is None else targeted(hooked_model, config, "corda", frozenset({"linear"}))
        with in_mode(hooked_model or model, False):
            covariances = covariances_of(
                {path: hooked[path].module for path in layers if path in hooked},
                run_model,
                wide=not options.use_float16_for_covariance,
            )
        write_cache(options.covariance_file, covariances)
    found = {}
    for count, (path, layer) in enumerate(layers.items(), start=1):
        if options.verbose:
            print(f"preprocess_corda: {count} of {len(layers)}, {path}")
        found[path] = decomposed(layer.map.weight, covariances[path], layer.r, options.corda_method == "ipm")
    return found


def covariances_of(modules: dict[str, nn.Module], run: Callable[[], Any], wide: bool) -> dict[str, Tensor]:
    """Path -> mean over the calls of X^T X, X the inputs (tokens, in) of a call divided by its largest number."""
    sums: dict[str, Any] = dict.fromkeys(modules, 0)
    counts = dict.fromkeys(modules, 0)

    def watch(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            X = args[0].detach().flatten(0, -2)
            X = X.float() if wide else X
            X = X / X.max().abs()
            sums[path], counts[path] = sums[path] + X.T @ X, counts[path] + 1

        return hook

    handles = [module.register_forward_pre_hook(watch(path)) for path, module in modules.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    wrong = [path for path in modules if not counts[path] or not sums[path].isfinite().all()]
    if wrong:
        raise DataError(
            f"preprocess_corda: {wrong[0]} saw {'inputs that are not finite' if counts[wrong[0]] else 'no input'}; "
            "run_model has to run the model on samples",
            path=wrong[0],
            found=wrong,
        )
    return {path: total / counts[path] for path, total in sums.items()}


def decomposed(W: Tensor, covariance: Tensor, r: int, largest: bool) -> dict[str, Tensor]:
    """U (out, r), S (r) and V (in, r) with U diag(S) V^T = W on r directions of W C = U S (V^T C)."""
    W, C = W.detach().float(), covariance.float().to(W.device)
    C, inverse = _damped(C)
    U, S, Vh = torch.linalg.svd(W @ C, full_matrices=False)
    kept = slice(0, r) if largest else slice(max(len(S) - r, 0), None)
    return {"U": U[:, kept].clone(), "S": S[kept].clone(), "V": (Vh[kept] @ inverse).T.contiguous()}


def _damped(C: Tensor) -> tuple[Tensor, Tensor]:
    """C plus as much of the identity as it takes to invert it, and the inverse."""
    eye, damp = torch.eye(len(C), device=C.device), 0.01
    while True:
        damped = C + damp * C.diagonal().mean() * eye
        inverse, failed = torch.linalg.inv_ex(damped)
        if not failed and torch.dist(damped @ inverse, eye) < _LARGEST_ERROR:
            return damped, inverse
        if damp > 1e6:
            raise DataError(
                "preprocess_corda: a covariance is zero or not finite; run_model has to run on samples",
                field="run_model",
                found="no finite covariance",
                expected="a function that runs samples",
            )
        damp *= 2
