"""The probe: one small forward pass of a model, in which every attention shows itself.

Configs do not tell: multi-query and latent attention, layers of different width, hybrids with few attention layers,
shared blocks and cross-attention all fall out of looking at the keys and values that an attention receives, through
transformers' interface, or where a module computes attention by itself, by following its code.

What was followed is checked: the logits, computed again from the queries, the keys and the steps between them, must be
those of the model; and in a second pass with two rows, keys and values of the first row must be those of before.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deltatune.errors import StateError
from deltatune.patterns import modules_by_name
from deltatune.prompts.example import SOURCE, example_inputs, two_rows
from deltatune.prompts.follow import Trail
from deltatune.prompts.listen import Listener
from deltatune.prompts.own import Layout
from deltatune.prompts.product import Roles, canonical

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CROSS = re.compile("cross|enc_?dec|encoder_att", re.IGNORECASE)


@dataclass(frozen=True)
class Site:
    """An attention module.

    Attributes:
        name: Its path in the model.
        kind: "self", "encoder" (of an encoder-decoder) or "cross".
        shape: Key heads, key dim, value heads, value dim.
        calls: Attention calls in one forward pass; all of them share the prefix.
        layout: How it writes its attention, where it does so by itself; None for transformers' interface.
    """

    name: str
    kind: str
    shape: tuple[int, int, int, int]
    calls: int = 1
    layout: Layout | None = None


@dataclass(frozen=True)
class Unreached:
    """A module that computes attention, or a part of it, in a way that no prefix can be added to.

    Attributes:
        partly: Whether another part of its attention is reached.
    """

    name: str
    kind: str
    class_name: str
    partly: bool = False


@dataclass
class Survey:
    """What the probe saw: sites in the order of their first call, and attention that is out of reach."""

    sites: list[Site]
    unreached: list[Unreached]


@dataclass
class _Seen:
    """The first attention of one form that a module computed by itself."""

    how: dict[str, Roles]
    keys: Tensor
    values: Tensor


class _Watch(Listener):
    """Notes every attention of one forward pass of a batch with one row."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.modules = modules_by_name(model)
        self.calls: dict[str, tuple[int, int, tuple[int, int, int, int]]] = {}
        self.counts: Counter[str] = Counter()
        self.layouts: dict[str, Layout] = {}
        self.seen: dict[tuple[str, str, str], _Seen] = {}

    def heads_of(self, name: str) -> int | None:
        return self.calls[name][2][0] if name in self.calls else None

    def record(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> None:
        name = self.names.get(id(module))
        if name is not None:  # otherwise another model, in another thread
            self._count(name, query.shape[2], key, value)

    def record_own(
        self, module: nn.Module, queries: int, keys: Tensor, values: Tensor, trail: Trail | None, how: dict[str, Roles]
    ) -> None:
        name = self.names[id(module)]
        one, other = canonical(keys, how["keys"]), canonical(values, how["values"])
        shape = (one.shape[1], one.shape[3], other.shape[1], other.shape[3])
        if name in self.calls and self.calls[name][2] != shape:
            self.lost.setdefault(name, module)  # one prefix cannot serve calls of different shapes
            return
        if queries % one.shape[2] == 0 or one.shape[2] % queries == 0:  # folded heads, a coarser image, a few queries
            queries = one.shape[2]
        self._count(name, queries, one, other)
        layout = self.layouts.setdefault(name, Layout({}, {}))
        layout.keys.setdefault(how["key product"], how["keys"])
        layout.values.setdefault(how["value product"], how["values"])
        if trail is not None and trail.anchored:
            self.layouts[name] = Layout(layout.keys, layout.values, anchored=True)
        self.seen.setdefault((name, how["key product"], how["value product"]), _Seen(how, one, other))

    def _count(self, name: str, queries: int, key: Tensor, value: Tensor) -> None:
        shape = (key.shape[1], key.shape[3], value.shape[1], value.shape[3])
        self.counts[name] += 1
        self.calls.setdefault(name, (queries, key.shape[2], shape))

    def survey(self, model: PreTrainedModel, doubted: set[str]) -> Survey:
        """What was seen, sorted by kind; without the modules whose layout is `doubted`."""
        encoder = encoder_modules(model)
        outer = {
            name for name in self.layouts if any(other != name and _within(other, name) for other in self.calls)
        }  # a prefix for the whole would meet those of its parts
        # Attentions of different forms in one module are different streams, which want a prefix each.
        doubted = doubted | {name for name, layout in self.layouts.items() if len(layout.keys) > 1}
        out_of_reach = [*doubted, *outer]
        out_of_reach += [
            name for name in self.lost if not any(_within(other, name) for other in self.calls if other != name)
        ]
        reached = [name for name in self.calls if name not in doubted and name not in outer]
        if all(id(self.modules[name]) in encoder for name in [*reached, *out_of_reach]):
            encoder = set()  # a classifier on the encoder of an encoder-decoder: all there is

        def kind(name: str) -> str:
            queries, keys, _ = self.calls.get(name, (0, 0, None))
            if id(self.modules[name]) in encoder:
                return "encoder"
            # One attention to the decoder's own tokens and, behind them, to the encoder's.
            own_too = bool(encoder) and keys == queries + SOURCE
            # The name decides only where a model wants inputs of equal length on both sides.
            crosses = (queries != keys and not own_too) or (
                encoder and _CROSS.search(name.rpartition(".")[2]) is not None
            )
            return "cross" if crosses else "self"

        sites = [
            Site(name, kind(name), self.calls[name][2], self.counts[name], self.layouts.get(name)) for name in reached
        ]
        unreached = [
            Unreached(name, kind(name), type(self.modules[name]).__name__, name in reached)
            for name in dict.fromkeys(out_of_reach)
        ]
        return Survey(sites, unreached)


class _SecondLook(Listener):
    """Listens to a batch of two rows, the first that of before, and compares with what was seen then."""

    def __init__(self, model: PreTrainedModel, first: _Watch) -> None:
        super().__init__(model)
        self.first = first
        self.open = dict(first.seen)
        self.doubted: set[str] = set()

    def heads_of(self, name: str) -> int | None:
        return self.first.heads_of(name)

    def record(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> None:
        pass

    def record_own(
        self, module: nn.Module, queries: int, keys: Tensor, values: Tensor, trail: Trail | None, how: dict[str, Roles]
    ) -> None:
        name = self.names[id(module)]
        before = self.open.pop((name, how["key product"], how["value product"]), None)
        if trail is not None and not trail.recorded:
            self.doubted.add(name)  # keys of a prefix would get no gradient
        if before is not None and not (
            _has_first_row(keys, before.how["keys"], before.keys)
            and _has_first_row(values, before.how["values"], before.values)
        ):
            self.doubted.add(name)


def _has_first_row(operand: Tensor, roles: Roles, expected: Tensor) -> bool:
    try:
        found = canonical(operand, roles, expected.shape[1])[: len(expected)]  # one row may be several windows
    except (RuntimeError, ValueError):
        return False
    tolerance = 1e-3 if expected.dtype in (torch.float32, torch.float64) else 1e-1
    return found.shape == expected.shape and torch.allclose(found, expected, tolerance, tolerance)


def _within(name: str, outer: str) -> bool:
    return name.startswith(f"{outer}.") if outer else True


def survey(model: PreTrainedModel) -> Survey:
    """Run a small forward pass or two and report every attention; the model is left as it was."""
    failure = None
    parts: dict[Any, None] = dict.fromkeys((model, model.base_model))
    for part in parts:  # a head that wants inputs of its own has no attention
        for inputs in example_inputs(part):
            watch = _Watch(model)
            try:
                with undisturbed(model), torch.no_grad(), watch:
                    part(**inputs)
            except Exception as error:  # a probe of unknown models: whatever they raise, another input may suit
                failure = failure or error
            else:
                watch.unmet()
                return watch.survey(model, _doubted(model, part, inputs, watch))
    raise StateError(
        f"{type(model).__name__}: its attentions could not be found, because a trial forward pass failed: "
        f"{type(failure).__name__}: {' '.join(str(failure).split())[:200]}",
        hint="call the model once yourself to see what it needs",
    ) from failure


def _doubted(model: PreTrainedModel, part: Any, inputs: dict[str, Any], watch: _Watch) -> set[str]:
    """Modules with code of their own in which a second pass finds rows and heads elsewhere than was thought."""
    if not watch.seen or any(seen.keys.device.type == "meta" for seen in watch.seen.values()):
        return set()
    again = _SecondLook(model, watch)
    try:
        with undisturbed(model), torch.enable_grad(), again:  # an autograd.Function shows itself by recording nothing
            part(**two_rows(inputs))
    except Exception:  # no second look at this model, so nothing in it is sure
        return {name for name, *_ in watch.seen}
    return again.doubted | {name for name, *_ in again.open}


def encoder_modules(model: PreTrainedModel) -> set[int]:
    """Identities of the modules of the encoder, in encoder-decoder models; empty in all others."""
    if not getattr(model.config, "is_encoder_decoder", False):
        return set()
    encoder = model.get_encoder()
    return set() if encoder is model else {id(module) for module in encoder.modules()}


@contextmanager
def undisturbed(model: PreTrainedModel) -> Iterator[None]:
    """Run something in eval mode and put everything back: modes, buffers, what layers remember, the random state."""
    modules = list(model.modules())
    kept = [(dict(vars(module)), dict(module._buffers), dict(module._modules)) for module in modules]
    copies = [(buffer, buffer.clone()) for buffer in model.buffers() if buffer.device.type != "meta"]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        try:
            for module in modules:
                module.training = False
            yield
        finally:
            for module, (attributes, buffers, children) in zip(modules, kept):
                vars(module).clear()
                vars(module).update(attributes)
                module._buffers.clear()
                module._buffers.update(buffers)
                module._modules.clear()
                module._modules.update(children)
            for buffer, copy in copies:
                if not torch.equal(buffer, copy):
                    buffer.copy_(copy)
