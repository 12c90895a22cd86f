"""Where a prefix can go: the attentions of a model, found by watching one forward pass.

Configs do not tell: multi-query and latent attention, layers of different width, hybrids with few attention layers,
shared blocks and cross-attention all fall out of looking at the keys and values that an attention call receives.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from deltatune.errors import StateError, TargetError
from deltatune.prompts.attention import Recorder
from deltatune.prompts.config import SITE_KINDS
from deltatune.prompts.example import example_inputs
from deltatune.suggest import did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ATTENDING = {functional.softmax, torch.softmax, Tensor.softmax, functional.scaled_dot_product_attention}
_CROSS = re.compile("cross|enc_?dec|encoder_att", re.IGNORECASE)


@dataclass(frozen=True)
class Site:
    """An attention module.

    Attributes:
        name: Its path in the model.
        kind: "self", "encoder" (of an encoder-decoder) or "cross".
        shape: Key heads, key dim, value heads, value dim.
        calls: Attention calls in one forward pass; all of them share the prefix.
    """

    name: str
    kind: str
    shape: tuple[int, int, int, int]
    calls: int = 1


@dataclass(frozen=True)
class Own:
    """A module that computes attention by itself, where no prefix can be handed over."""

    name: str
    kind: str
    class_name: str


@dataclass
class Survey:
    """What the probe saw: sites in the order of their first call, and attention outside of the interface."""

    sites: list[Site]
    own: list[Own]


class _Watch(Recorder, TorchFunctionMode):
    """Records attention calls; a softmax outside of them, in a module named attention, is attention of its own."""

    def __init__(self, model: PreTrainedModel) -> None:
        TorchFunctionMode.__init__(self)
        self.names = {id(module): name for name, module in model.named_modules()}
        self.calls: dict[str, tuple[int, int, tuple[int, int, int, int]]] = {}
        self.counts: Counter[str] = Counter()
        self.own: dict[str, str] = {}

    def __enter__(self) -> _Watch:
        Recorder.__enter__(self)
        TorchFunctionMode.__enter__(self)
        return self

    def __exit__(self, *error: Any) -> None:
        TorchFunctionMode.__exit__(self, *error)
        Recorder.__exit__(self)

    def record(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> None:
        name = self.names.get(id(module))
        if name is not None:  # otherwise another model, in another thread
            shape = (key.shape[1], key.shape[3], value.shape[1], value.shape[3])
            self.counts[name] += 1
            self.calls.setdefault(name, (query.shape[2], key.shape[2], shape))

    def survey(self, model: PreTrainedModel) -> Survey:
        """What was seen, sorted by kind."""
        modules = dict(model.named_modules())
        encoder = encoder_modules(model)
        if all(id(modules[name]) in encoder for name in [*self.calls, *self.own]):
            encoder = set()  # a classifier on the encoder of an encoder-decoder: all there is

        def kind(name: str, queries: int = 0, keys: int = 0) -> str:
            if id(modules[name]) in encoder:
                return "encoder"
            # The name decides only where a model wants inputs of equal length on both sides.
            crosses = queries != keys or (encoder and _CROSS.search(name.rpartition(".")[2]) is not None)
            return "cross" if crosses else "self"

        sites = [Site(name, kind(name, q, k), shape, self.counts[name]) for name, (q, k, shape) in self.calls.items()]
        # A layer that is named after the attention it holds may well have a router with a softmax.
        own = {name: of for name, of in self.own.items() if not any(s.name.startswith(f"{name}.") for s in sites)}
        return Survey(sites, [Own(name, kind(name), class_name) for name, class_name in own.items()])

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _ATTENDING and not self.inside:
            for module in _calling_modules(sys._getframe(1)):
                if id(module) in self.names and re.search("atten|attn", type(module).__name__, re.IGNORECASE):
                    self.own.setdefault(self.names[id(module)], type(module).__name__)
                    break
        return func(*args, **(kwargs or {}))


def _calling_modules(frame: Any) -> Iterator[nn.Module]:
    """The modules whose methods are running, innermost first."""
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            yield owner
        frame = frame.f_back


def survey(model: PreTrainedModel) -> Survey:
    """Run one small forward pass and report every attention in it; the model is left as it was."""
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
                return watch.survey(model)
    raise StateError(
        f"{type(model).__name__}: its attentions could not be found, because a trial forward pass failed: "
        f"{type(failure).__name__}: {' '.join(str(failure).split())[:200]}",
        hint="call the model once yourself to see what it needs",
    ) from failure


def choose_sites(model: PreTrainedModel, wanted: str | list[str]) -> list[Site]:
    """The sites that a config asks for; TargetError, naming the model, where they cannot all get a prefix."""
    found = survey(model)
    title = f"{type(model).__name__} ({getattr(model.config, 'model_type', '?')!r})"
    if not found.sites and not found.own:
        raise TargetError(f"{title} has no attention, so there is nothing that a prefix could be put before; use LoRA")
    chosen = [site for site in found.sites if _is_wanted(site.name, site.kind, wanted, model)]
    missed = [own for own in found.own if _is_wanted(own.name, own.kind, wanted, model)]
    if missed:
        raise TargetError(
            f"{title}: {missed[0].class_name} at {missed[0].name!r} (and {len(missed) - 1} more) computes attention in "
            "code of its own, outside of transformers' attention interface, where prefixes are not available yet; "
            "use LoRA" + (f", or choose among sites like {found.sites[0].name!r}" if found.sites else ""),
            field="sites",
            found=wanted,
        )
    names = [site.name for site in found.sites]
    if not chosen:
        near = did_you_mean(wanted, [*SITE_KINDS, *names]) if isinstance(wanted, str) else ""
        raise TargetError(
            f"{title}: sites={wanted!r} matches none of its attentions, which are named like {names[:3]}"
            f"{'' if wanted in SITE_KINDS else near}",
            field="sites",
            found=wanted,
            expected=names,
        )
    for name in wanted if isinstance(wanted, list) else ():
        if not any(_is_wanted(site.name, site.kind, [name], model) for site in chosen):
            raise TargetError(
                f"{title}: sites names {name!r}, which is none of its attentions{did_you_mean(name, names)}",
                field="sites",
                found=name,
                expected=names,
            )
    return chosen


def _is_wanted(name: str, kind: str, wanted: str | list[str], model: PreTrainedModel) -> bool:
    if isinstance(wanted, list):
        return any(
            _is_wanted(name, kind, part, model) if part in SITE_KINDS else name == part or name.endswith(f".{part}")
            for part in wanted
        )
    if wanted == "all":
        return True
    if wanted in ("default", "self"):
        return kind == "self"
    if wanted == "encoder":
        return kind == "encoder" or (kind == "self" and not getattr(model.config, "is_encoder_decoder", False))
    return kind == wanted if wanted == "cross" else re.fullmatch(wanted, name) is not None


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
    kept = [(dict(vars(module)), dict(module._buffers)) for module in modules]
    copies = [(buffer, buffer.clone()) for buffer in model.buffers() if buffer.device.type != "meta"]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        try:
            for module in modules:
                module.training = False
            yield
        finally:
            for module, (attributes, buffers) in zip(modules, kept):
                vars(module).clear()
                vars(module).update(attributes)
                module._buffers.clear()
                module._buffers.update(buffers)
            for buffer, copy in copies:
                if not torch.equal(buffer, copy):
                    buffer.copy_(copy)
