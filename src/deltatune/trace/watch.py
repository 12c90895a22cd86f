"""Looking on while a batch runs: rows of prefix encoders, wrapped layers, attention calls."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from deltatune.layer import AdaptedLayer
from deltatune.patterns import bare_name
from deltatune.prompts import attention
from deltatune.prompts.follow import FUSED
from deltatune.prompts.own import Grafting
from deltatune.prompts.probe import Site
from deltatune.trace.own import Looking, Own
from deltatune.trace.report import AttentionCall, Shape


def where(thing: Any) -> str:
    """`module:qualname` of a function or class; of a plain object, that of its class."""
    named = thing if isinstance(getattr(thing, "__qualname__", None), str) else type(thing)
    return f"{named.__module__}:{named.__qualname__}"


@dataclass
class Passage:
    """What a wrapped layer saw."""

    calls: int = 0
    input_shape: Shape | None = None
    output_shape: Shape | None = None


class Watch:
    """Within the block, everything below happens to be noted.

    Attributes:
        rows: Adapter name -> what its prefix encoder returned, still part of the graph.
        passages: Id of a wrapped layer -> what it saw.
        calls: Every attention call of the model, in order; only where a prefix has put the seam on. Attention that a
            module computes in a way that a prefix cannot be added to is missing.
    """

    def __init__(self, model: nn.Module, encoders: dict[str, nn.Module], sites: list[Site]) -> None:
        self.model, self.encoders = model, encoders
        self.sites = {site.name: site for site in sites}
        self.names = {id(module): bare_name(name) for name, module in model.named_modules()}
        self.rows: dict[str, Tensor] = {}
        self.passages: dict[int, Passage] = {}
        self.calls: list[AttentionCall] = []
        self._stack = ExitStack()

    def __enter__(self) -> Watch:
        for name, encoder in self.encoders.items():
            self._hook(encoder, functools.partial(self._encoded, name))
        for module in self.model.modules():
            if isinstance(module, AdaptedLayer):
                self.passages[id(module)] = Passage()
                self._hook(module, self._passed)
        for module in self.model.modules():
            site = self.sites.get(self.names[id(module)])
            if site is not None and site.layout is not None:
                for handle in Looking(site.layout, site.shape[0], self._attended_own).put_on(module):
                    self._stack.callback(handle.remove)
        if self.encoders:
            attention.observers.append(self._attended)
            self._stack.callback(attention.observers.remove, self._attended)
        return self

    def __exit__(self, *_: Any) -> None:
        self._stack.close()

    def _hook(self, module: nn.Module, function: Callable[..., None]) -> None:
        self._stack.callback(module.register_forward_hook(function).remove)

    def _encoded(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.rows[name] = output

    def _passed(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        passage = self.passages[id(module)]
        if not passage.calls:
            passage.input_shape, passage.output_shape = _shape(args[0] if args else None), _shape(output)
        passage.calls += 1

    def _attended(
        self, inner: Callable[..., Any], backend: str, module: nn.Module, key: Tensor, mask: Any, kwargs: dict[str, Any]
    ) -> Callable[..., Any]:
        """Called with what the attention module passed; returns `inner` with a look at what reaches it."""
        name = self.names.get(id(module))
        if name is None:  # another model, in another thread
            return inner
        key_before, mask_before, bias_before = _shape(key), _shape(mask), _shape(kwargs.get("position_bias"))

        @functools.wraps(inner)
        def looked_at(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, **kwargs: Any
        ) -> Any:
            self.calls.append(
                AttentionCall(
                    where=where(attention.attend),
                    module=name,
                    module_class=type(module).__name__,
                    kind=self._kind(name),
                    backend=backend,
                    function=where(inner),
                    query=list(query.shape),
                    key_before=key_before or [],
                    key_after=list(key.shape),
                    value_after=list(value.shape),
                    mask_before=mask_before,
                    mask_after=_shape(mask),
                    mask_type=_mask_type(mask),
                    bias_before=bias_before,
                    bias_after=_shape(kwargs.get("position_bias")),
                    prefix=self._prefix_length(module, key.shape[0]),
                )
            )
            return inner(module, query, key, value, mask, *args, **kwargs)

        return looked_at

    def _attended_own(self, module: nn.Module, own: Own) -> None:
        """Called with what a module with attention of its own sees, which is the tokens only."""
        name = self.names[id(module)]
        count = self._prefix_length(module, own.key[0])
        mask, bias = _shape(own.mask), _shape(own.bias)
        self.calls.append(
            AttentionCall(
                where=where(Grafting if count else type(module).forward),
                module=name,
                module_class=type(module).__name__,
                kind=self._kind(name),
                backend="its own code",
                function=where(own.function),
                query=own.query,
                key_before=own.key,
                key_after=_longer(own.key, count),
                value_after=_longer(own.value, count),
                mask_before=mask,
                # a module sees no column of the prefix, so masks and biases keep their length; a fused call gets all
                mask_after=mask if mask is None or own.function is not FUSED else [*mask[:-1], mask[-1] + count],
                mask_type=_mask_type(own.mask),
                bias_before=bias,
                bias_after=bias,
                prefix=count,
            )
        )

    def _kind(self, name: str) -> str:
        return self.sites[name].kind if name in self.sites else ""

    @staticmethod
    def _prefix_length(module: nn.Module, batch: int) -> int:
        slot = vars(module).get(attention.SLOT)
        prefix = None if slot is None else slot.stage.prefix_of(slot.site, batch)
        return 0 if prefix is None else prefix.count


def _shape(value: Any) -> Shape | None:
    return list(value.shape) if isinstance(value, Tensor) else None


def _longer(shape: Shape, count: int) -> Shape:
    return [*shape[:2], shape[2] + count, *shape[3:]]


def _mask_type(mask: Any) -> str:
    if mask is None:
        return "none"
    return str(mask.dtype).removeprefix("torch.") if isinstance(mask, Tensor) else type(mask).__name__
