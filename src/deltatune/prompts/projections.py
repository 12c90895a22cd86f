"""Which parts of an attention module make its keys and values, found by watching one forward pass.

A child module makes them if every column of the keys (values) that the attention function receives is a column of what
the child returned; of keys, after their rotary positions are undone. So `k_proj`, a fused `c_attn`, projections
interleaved by head and shared heads are all the same case. Where something stands between the projection and the
attention (a norm of keys, a latent up-projection), there is no such child.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deltatune.errors import TargetError
from deltatune.patterns import modules_by_name
from deltatune.prompts.attention import Recorder
from deltatune.prompts.example import call_with_tokens, example_inputs, ordinary_tokens
from deltatune.prompts.rotation import Rotation, rotations
from deltatune.prompts.sites import Site, undisturbed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = 8
_CHUNK = 256  # columns compared at once


@dataclass(eq=False)
class Columns:
    """Columns of what the child module at a path below the attention module returns."""

    child: str
    index: Tensor

    def __call__(self, module: nn.Module, x: Tensor, heads: int) -> Tensor:
        """(B, T, width) -> (B, heads, T, dim)."""
        made = module.get_submodule(self.child)(x)
        if self.index.numel() < made.shape[-1]:
            made = made[..., self.index.to(made.device)]
        return made.unflatten(-1, (heads, -1)).transpose(1, 2)


@dataclass(eq=False)
class Projections:
    """How an attention module makes keys and values.

    Attributes:
        width: Features that both read.
        heads: Key heads and value heads.
        output: The child that reads what attention returns; None where there is none.
        inputs: What the projections read in the watched pass (tokens, width).
    """

    key: Columns
    value: Columns
    width: int
    heads: tuple[int, int]
    output: str | None
    inputs: Tensor


class _Watch(Recorder):
    """Notes what the children of the sites read and returned before their first attention call, and who came after."""

    def __init__(self, model: nn.Module, sites: list[Site]) -> None:
        modules = modules_by_name(model)
        self.names = {id(modules[site.name]): site.name for site in sites}
        self.calls: dict[str, tuple[Tensor, Tensor]] = {}
        self.before: dict[str, list[tuple[str, Tensor, Tensor]]] = {site.name: [] for site in sites}
        self.after: dict[str, str] = {}
        self.handles: list[Any] = []
        for site in sites:
            for path, child in modules[site.name].named_modules():
                if path:
                    self.handles.append(child.register_forward_hook(self._hook(site.name, path)))

    def _hook(self, site: str, path: str) -> Any:
        def returned(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not args or not isinstance(args[0], Tensor) or not isinstance(output, Tensor):
                return
            if site in self.calls:
                self.after.setdefault(site, path)
            else:
                self.before[site].append((path, args[0].detach(), output.detach()))

        return returned

    def record(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> None:
        name = self.names.get(id(module))
        if name is not None:
            self.calls.setdefault(name, (key.detach(), value.detach()))

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self.handles:
            handle.remove()


def find_projections(model: PreTrainedModel, sites: list[Site], ids: Tensor | None = None) -> list[Projections]:
    """Of every site; TargetError, naming the first site where they cannot be found.

    Args:
        ids: Tokens (1, T) to watch the model on; some of our own by default.
    """
    watch, of_tokens = _watched(model, sites, ids)
    turns = _rotations(model, sites) if of_tokens else [Rotation(torch.zeros(0), False)] * len(sites)
    return [_of_site(model, site, turn, watch) for site, turn in zip(sites, turns)]


def _watched(model: PreTrainedModel, sites: list[Site], ids: Tensor | None) -> tuple[_Watch, bool]:
    """A pass that every site took part in, the simplest that the model accepts, and whether tokens were all it took."""
    runs: list[tuple[Callable[[], Any], bool]] = []
    if model.main_input_name == "input_ids":
        tokens = ordinary_tokens(model, TOKENS) if ids is None else ids
        runs.append((lambda: call_with_tokens(model, tokens), True))
    runs += [(functools.partial(_call, model, inputs), False) for inputs in example_inputs(model)]
    failure: Exception | None = None
    for run, of_tokens in runs:
        watch = _Watch(model, sites)
        try:
            with undisturbed(model), torch.no_grad(), watch:
                run()
        except Exception as error:  # a probe of unknown models: whatever they raise, another input may suit
            failure = failure or error
            continue
        if all(site.name in watch.calls for site in sites):
            return watch, of_tokens
    reason = "no trial pass reached all of them" if failure is None else f"{type(failure).__name__}: {failure}"
    raise TargetError(
        f"{type(model).__name__}: what makes the keys and values of its attentions could not be watched ({reason}); "
        "use PrefixTuningConfig or LoRA",
        field="model",
        found=reason,
        expected="a trial pass that reaches all attentions",
    ) from failure


def _call(model: PreTrainedModel, inputs: dict[str, Any]) -> Any:
    return model(**{k: torch.randn_like(v) if _is_float(v) else v for k, v in inputs.items()})


def _rotations(model: PreTrainedModel, sites: list[Site]) -> list[Rotation]:
    try:
        return rotations(model, sites, TOKENS)
    except TargetError:  # positions of another kind: the keys will fit no projection, which is then told
        return [Rotation(torch.zeros(0), False)] * len(sites)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _of_site(model: PreTrainedModel, site: Site, turn: Rotation, watch: _Watch) -> Projections:
    key, value = (part[0].float() for part in watch.calls[site.name])  # (heads, T, dim)
    key = torch.stack([turn(key[:, t], -t) for t in range(key.shape[1])], dim=1)
    found = [_made_by(part, watch.before[site.name], model.dtype) for part in (key, value)]
    for made, what in zip(found, ("keys", "values")):
        if made is None:
            raise TargetError(
                f"{type(model).__name__}: the {what} of {site.name!r} are not what a projection of its inputs returns "
                "(they are normalised, or made in several steps), so a prompt cannot be projected as the tokens are; "
                "use prefix tuning, whose keys and values are trained themselves",
                field="target_modules",
                path=site.name,
            )
    (key_columns, inputs), (value_columns, value_inputs) = found  # type: ignore[misc]
    if not torch.equal(inputs, value_inputs):
        raise TargetError(
            f"{type(model).__name__}: keys and values of {site.name!r} are made of different inputs; use prefix tuning",
            field="target_modules",
            path=site.name,
        )
    heads = (key.shape[0], value.shape[0])
    rows = inputs.reshape(-1, inputs.shape[-1]).float()
    return Projections(key_columns, value_columns, inputs.shape[-1], heads, watch.after.get(site.name), rows)


def _made_by(
    wanted: Tensor, children: list[tuple[str, Tensor, Tensor]], dtype: torch.dtype
) -> tuple[Columns, Tensor] | None:
    """The outermost child that returned what is `wanted` (heads, T, dim), and its input."""
    flat = wanted.transpose(0, 1).flatten(1)  # (T, width)
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)  # angles are float32 in any model
    tolerance = min(1e3 * eps, 0.05) * flat.abs().max()
    for path, given, output in sorted(children, key=lambda child: child[0].count(".")):
        made = output.reshape(-1, output.shape[-1]).float()
        if len(made) != len(flat) or not tolerance:
            continue
        index = _nearest(flat, made)
        if (made[:, index] - flat).abs().max() <= tolerance:
            return Columns(path, index), given
    return None


def _nearest(wanted: Tensor, made: Tensor) -> Tensor:
    """For each column of `wanted` the column of `made` that is nearest to it: itself where both are the same table."""
    if wanted.shape == made.shape and torch.allclose(wanted, made, rtol=1e-3, atol=1e-5):
        return torch.arange(wanted.shape[1], device=wanted.device)
    chunks = wanted.T.split(_CHUNK)
    return torch.cat([torch.cdist(chunk, made.T, p=float("inf")).argmin(dim=1) for chunk in chunks])
