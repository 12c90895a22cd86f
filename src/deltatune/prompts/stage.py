"""The stage: what the prefixes of one model hand to its attentions during one forward pass.

A forward pass of the outermost transformers model *binds*: the adapters that are active, and their keys and values,
computed once. Every attention of that pass reads them from the binding, also when its layer is recomputed during the
backward pass by gradient checkpointing, whatever is active by then and whichever thread recomputes.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deltatune.errors import StateError
from deltatune.prompts import attention
from deltatune.prompts.handed import KeysValues, joined, stacked
from deltatune.prompts.padding import FromFirstToken
from deltatune.prompts.positions import Past, PositionShift
from deltatune.selection import Call, Selection

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from deltatune.prompts.key_values import Prefix

STAGE = "_deltatune_stage"  # key in the __dict__ of the model's root
_CHECKPOINT_FUNCTIONS = ("_gradient_checkpointing_func", "checkpoint_fn")  # of transformers, of torch's wrapper


@dataclass(eq=False)
class Binding:
    """What one forward pass uses.

    Attributes:
        call: The adapters that were active when it began.
        prefixes: Keys and values by site; with rows, of each adapter in `order`.
        order: With rows, the adapters that are named, each once.
        shift: Positions that the prefix takes up (PEFT's layout only).
        seen: Tokens in the model's cache before the pass (PEFT's layout only).
        projected: Whether the keys and values came out of an MLP.
        padded: The padding mask, where rows may start with padding (native layout only).
    """

    call: Call
    prefixes: dict[str, KeysValues]
    order: tuple[str | None, ...] | None = None
    shift: int = 0
    seen: Any = 0
    projected: bool = False
    padded: Tensor | None = None
    chosen: dict[tuple[str, int], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def prefix_of(self, site: str, batch: int | None = None) -> KeysValues | None:
        prefix = self.prefixes.get(site)
        if prefix is None or self.order is None:
            return prefix
        assert prefix.visible is not None and self.call.rows is not None
        batch = len(self.call.rows) * self.call.copies if batch is None else batch
        if (site, batch) not in self.chosen:  # no gradient flows here, so recomputed layers may find it there
            rows = [self.order.index(name) for name in self.call.rows_of(batch)]
            index = torch.tensor(rows, device=prefix.key.device)
            self.chosen[site, batch] = index, prefix.visible[index]
        index, visible = self.chosen[site, batch]
        return KeysValues(prefix.key[index], prefix.value[index], visible)


class _PerThread(threading.local):
    """The passes that run in this thread: their models, outermost first, and what the outermost bound."""

    def __init__(self) -> None:
        self.running: list[Any] = []
        self.binding: Binding | None = None


class Stage:
    """Everything the prefixes of one model share. Found through the slots of its sites, so it is copied with them."""

    def __init__(self, model: PreTrainedModel, selection: Selection) -> None:
        import transformers

        self.model = model
        self.selection = selection
        self.prefixes: dict[str, Prefix] = {}
        self.shifting: PositionShift | None = None
        self.counting: FromFirstToken | None = None
        self.handles: list[Any] = []
        self._start()
        # generate() also calls parts of the model on their own, such as the encoder.
        for module in model.modules():
            if isinstance(module, transformers.PreTrainedModel):
                self.handles.append(module.register_forward_pre_hook(self.enter, with_kwargs=True))
                self.handles.append(module.register_forward_hook(self.leave, always_call=True))

    def _start(self) -> None:
        attention.install()  # also in a process that unpickles a model
        self.local = _PerThread()
        self.latest: Binding | None = None

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()
        for module in self.model.modules():
            for name in _CHECKPOINT_FUNCTIONS:
                function = module.__dict__.get(name)
                if isinstance(function, functools.partial) and function.func is _checkpointed:
                    module.__dict__[name] = function.args[1]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("local", "latest")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start()

    # ------------------------------------------------------------------------------------------- during a forward pass

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the forward pass of a transformers model: the outermost one binds."""
        local = self.local
        bound = local.binding
        if module in local.running or (bound is not None and bound.call != self.selection.current()):
            local.running.clear()  # left behind by a pass that was interrupted
        if not local.running:
            local.binding = self.bind(_past_tokens(module, args, kwargs) if self.shifting is not None else 0)
            if self.counting is not None and local.binding.prefixes and not local.binding.shift:
                local.binding.padded = _left_padded(module, args, kwargs)
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                self.latest = local.binding
                self._carry_into_recomputation()
        local.running.append(module)

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        local = self.local
        if local.running and local.running[-1] is module:
            local.running.pop()
        if not local.running:
            local.binding = None

    def bind(self, seen: Any = 0) -> Binding:
        """Compute what the adapters that are active now hand over."""
        call = self.selection.current()
        if call.rows is not None and len(set(call.rows)) > 1:
            return self._bind_rows(call)
        names = call.names if call.rows is None else tuple(name for name in call.rows[:1] if name is not None)
        active = [self.prefixes[name] for name in names if name in self.prefixes]
        shifting = [prefix for prefix in active if prefix.config.layout == "peft"]
        if shifting and len(active) > 1:
            raise StateError(
                f"prefixes {[prefix.name for prefix in active]} are active together, but {shifting[0].name!r} has "
                "layout='peft', which moves the positions of the others; activate one at a time",
                field="layout",
            )
        collected: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for prefix in active:
            for site, pair in prefix.keys_values().items():
                collected.setdefault(site, []).append(pair)
        return Binding(
            call,
            {site: joined(pairs) for site, pairs in collected.items()},
            shift=sum(prefix.config.length for prefix in shifting),
            seen=seen,
            projected=any(prefix.encoder.transform is not None for prefix in active),
        )

    def _bind_rows(self, call: Call) -> Binding:
        """Rows with different adapters: what each of them hands over stands side by side, for the sites to choose."""
        order = tuple(dict.fromkeys(call.rows or ()))
        active = {name: self.prefixes[name] for name in order if name is not None and name in self.prefixes}
        for name, prefix in active.items():
            if prefix.config.layout == "peft":
                raise StateError(
                    f"adapter_names: {name!r} has layout='peft', which moves the positions of its rows and not of the "
                    "others; run its rows in a batch of their own",
                    field="adapter_names",
                    found=name,
                )
        by_name = {name: prefix.keys_values() for name, prefix in active.items()}
        sites = dict.fromkeys(site for by_site in by_name.values() for site in by_site)
        return Binding(
            call,
            {site: stacked([by_name.get(name or "", {}).get(site) for name in order]) for site in sites},
            order,
            projected=any(prefix.encoder.transform is not None for prefix in active.values()),
        )

    def binding(self) -> Binding:
        """What holds for the call that asks: the pass it belongs to, or what is active where there is no pass."""
        if self.local.binding is not None:
            return self.local.binding
        if self.latest is not None and torch._C._current_graph_task_id() != -1:
            return self.latest  # a layer recomputed by a checkpoint function that we did not see
        return self.bind()

    def prefix_of(self, site: str, batch: int | None = None) -> KeysValues | None:
        """What a site gets for a batch of this size; left out, that of the call, after generate() repeated its rows."""
        return self.binding().prefix_of(site, batch)

    def shift(self) -> int:
        return self.binding().shift

    def padded(self) -> Tensor | None:
        return self.binding().padded

    def past(self, site: str) -> Past | None:
        """What PEFT's layout needs to know further; None in the native layout."""
        binding = self.binding()
        if not binding.shift:
            return None
        biased = next((prefix.biased.get(site) for prefix in self.prefixes.values() if prefix.biased), None)
        return Past(binding.seen, biased)

    # ----------------------------------------------------------------------------------------- gradient checkpointing

    def _carry_into_recomputation(self) -> None:
        """Let checkpointed layers of this model take the binding along; checkpointing is often enabled late."""
        for module in self.model.modules():
            for name in _CHECKPOINT_FUNCTIONS:
                function = module.__dict__.get(name)
                if function is not None and getattr(function, "func", None) is not _checkpointed:
                    module.__dict__[name] = functools.partial(_checkpointed, self, function)


def _checkpointed(
    stage: Stage, checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Checkpoint `function` so that both of its runs see the binding of the pass that is running now."""
    binding = stage.local.binding
    if binding is None or torch.compiler.is_compiling():
        return checkpoint(function, *args, **kwargs)
    if binding.projected and getattr(checkpoint, "keywords", {}).get("use_reentrant"):
        raise StateError(
            "prefix_projection does not work with reentrant gradient checkpointing, which runs backward through the "
            "MLP once per layer; pass gradient_checkpointing_kwargs={'use_reentrant': False}",
            field="use_reentrant",
            found=True,
            expected=False,
        )
    return checkpoint(functools.partial(_rerun, stage, binding, function), *args, **kwargs)


def _rerun(stage: Stage, binding: Binding, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    local = stage.local
    before = local.binding
    local.binding = binding
    local.running.append(binding)  # so that models inside of the layer do not bind anew
    try:
        with stage.selection.use(binding.call):
            return function(*args, **kwargs)
    finally:
        local.running.pop()
        local.binding = before


def _past_tokens(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Number of tokens in the cache that a model is called with."""
    cache = _argument("past_key_values", module, args, kwargs)
    if cache is None:
        return 0
    seen = cache.get_seq_length()
    return seen.clone() if isinstance(seen, Tensor) else seen  # static caches count in place


def _left_padded(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The padding mask that a model is called with, where the caller leaves it to the model where tokens stand."""
    mask = _argument("attention_mask", module, args, kwargs)
    if not isinstance(mask, Tensor) or mask.ndim != 2 or _argument("position_ids", module, args, kwargs) is not None:
        return None
    if not torch.compiler.is_compiling() and bool(mask[:, :1].all()):
        return None
    return mask


def _argument(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    found = kwargs.get(name)
    if found is None and args:
        found = dict(zip(list(_parameter_names(type(module)))[1:], args)).get(name)
    return found


@functools.cache
def _parameter_names(model_class: type[nn.Module]) -> tuple[str, ...]:
    import inspect

    return tuple(inspect.signature(model_class.forward).parameters)
