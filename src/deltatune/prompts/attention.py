"""The attention seam: where the keys and values of a prefix meet those of the tokens.

transformers asks `AttentionInterface` for the function that computes attention ("sdpa", "eager", "flash_attention_2",
...), and every attention module calls what it gets. `install` makes the interface hand out that function with `attend`
before it. `attend` looks whether the calling module is a site of a prefix; if not, it calls the function as if nothing
had happened. The names of implementations, masks, caches, configs and model files stay the base model's own.

The hook is one per process, put on when the first prefix is attached, safe to put on twice, and taken off by
`uninstall`.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from deltatune.prompts import masks

if TYPE_CHECKING:
    from deltatune.prompts.stage import Stage

SLOT = "_deltatune_prefix"  # key in a module's __dict__: not an nn.Module attribute, so no state_dict entry
GATES = "_deltatune_gates"  # the same for gated prompts, which act on the result (`deltatune.prompts.gates`)
_ORIGINALS = "_deltatune_originals"  # set on AttentionInterface while the hook is on

Attention = Callable[..., Any]
_recorders: list[Recorder] = []
observers: list[Callable[..., Attention]] = []  # each may put itself around `inner`: told of a call before the prefix


class Slot:
    """Marks an attention module as a site: the stage that knows what to hand over, and the site's name there."""

    def __init__(self, stage: Stage, site: str) -> None:
        self.stage = stage
        self.site = site


class Recorder:
    """Told of every attention call of its thread while it listens. No prefix or gate takes part in what it hears.

    Attributes:
        inside: Number of attention calls that are running.
    """

    inside = 0
    thread = 0

    def record(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> None:
        raise NotImplementedError

    def __enter__(self) -> Recorder:
        install()
        self.thread = threading.get_ident()
        _recorders.append(self)
        return self

    def __exit__(self, *_: Any) -> None:
        _recorders.remove(self)


def with_gates(attend: Attention) -> Attention:
    """`attend` with what gated prompts of the module add to its result."""

    @functools.wraps(attend)
    def gated(inner: Attention, backend: str, module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = attend(inner, backend, module, query, *args, **kwargs)
        slot = module.__dict__.get(GATES)
        if slot is None or (_recorders and _listening()):
            return result
        return slot.added(module, query, result, kwargs)

    return gated


@with_gates
def attend(
    inner: Attention,
    backend: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Call the attention function `inner`, with the prefix of `module` before its keys and values if it has one.

    Where it returns attention weights, their first P columns are those of the prefix, as with PEFT.
    """
    if _recorders and (listening := _listening()):
        return _recorded(listening, inner, module, query, key, value, attention_mask, *args, **kwargs)
    for observe in observers:
        inner = observe(inner, backend, module, key, attention_mask, kwargs)
    slot = module.__dict__.get(SLOT)
    prefix = None if slot is None else slot.stage.prefix_of(slot.site)
    if slot is None or prefix is None:
        return inner(module, query, key, value, attention_mask, *args, **kwargs)
    prefix_key, prefix_value = prefix[0].to(key), prefix[1].to(value)
    key, value, attention_mask, kwargs = masks.extend(
        backend, module, query, key, value, attention_mask, kwargs, prefix_key.shape[1], slot.stage.past(slot.site)
    )
    key, value = masks.prepend(prefix_key, key), masks.prepend(prefix_value, value)
    return inner(module, query, key, value, attention_mask, *args, **kwargs)


def _listening() -> list[Recorder]:
    return [recorder for recorder in _recorders if recorder.thread == threading.get_ident()]


def _recorded(
    recorders: list[Recorder],
    inner: Attention,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    for recorder in recorders:
        recorder.record(module, query, key, value)
        recorder.inside += 1
    try:
        return inner(module, query, key, value, *args, **kwargs)
    finally:
        for recorder in recorders:
            recorder.inside -= 1


def _with_seam(function: Any, backend: str) -> Any:
    is_seamed = isinstance(function, functools.partial) and function.func is attend
    return function if is_seamed or not callable(function) else functools.partial(attend, function, backend)


def install() -> None:
    """Put the hook on; does nothing when it is on."""
    from transformers.modeling_utils import AttentionInterface

    if _ORIGINALS in vars(AttentionInterface):
        return
    get_interface, getitem = AttentionInterface.get_interface, AttentionInterface.__getitem__

    def get_interface_with_prefix(self: Any, attn_implementation: str, default: Attention) -> Attention:
        # Eager attention is no entry of the table: each model file hands in its own as the default.
        return _with_seam(get_interface(self, attn_implementation, default), attn_implementation or "eager")

    def getitem_with_prefix(self: Any, key: str) -> Attention:
        return _with_seam(getitem(self, key), key)

    setattr(AttentionInterface, _ORIGINALS, {"get_interface": get_interface, "__getitem__": getitem})
    AttentionInterface.get_interface = get_interface_with_prefix
    AttentionInterface.__getitem__ = getitem_with_prefix


def uninstall() -> None:
    """Take the hook off. Prefixes that are still attached have no effect until `install` is called again."""
    from transformers.modeling_utils import AttentionInterface

    originals = vars(AttentionInterface).get(_ORIGINALS)
    if originals is None:
        return
    AttentionInterface.get_interface = originals["get_interface"]
    del AttentionInterface.__getitem__  # it is inherited
    delattr(AttentionInterface, _ORIGINALS)
