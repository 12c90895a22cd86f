"""The attention seam: where the keys and values of a prefix meet those of the tokens.

transformers asks `AttentionInterface` for the function that computes attention ("sdpa", "eager", "flash_attention_2",
...), and every attention module calls what it gets. `install` makes the interface hand out that function with `attend`
before it. `attend` looks whether the calling module is a site of a prefix; if not, it calls the function as if nothing
had happened. The names of implementations, masks, caches, configs and model files stay the base model's own.

The hook is one per process, put on when the first prefix is attached, safe to put on twice, and taken off by
`uninstall`.

There are two ways to attend to prefix and tokens, with the same result. The first is the definition, fits every
implementation, and is what the others are tested against: put the prefix before keys and values and call the function.
The second leaves keys and values where they are and merges the two parts (`deltatune.prompts.merge`); it fits sdpa
without dropout, where all rows have the same prefix. `backend` chooses:

    "auto"     the second where it was measured to be the faster: one query, on a CPU, with more than a few keys
    "concat"   the first
    "merge"    the second wherever it fits
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from deltatune.errors import ConfigError
from deltatune.prompts import masks, merge

if TYPE_CHECKING:
    from deltatune.prompts.handed import KeysValues
    from deltatune.prompts.own import Mount
    from deltatune.prompts.stage import Stage

SLOT = "_deltatune_prefix"  # key in a module's __dict__: not an nn.Module attribute, so no state_dict entry
GATES = "_deltatune_gates"  # the same for gated prompts, which act on the result (`deltatune.prompts.gates`)
_ORIGINALS = "_deltatune_originals"  # set on AttentionInterface while the hook is on

Attention = Callable[..., Any]
Backend = Literal["auto", "concat", "merge"]

backend: Backend = "auto"  # of all models of the process
_COPY = 2**17  # elements of keys above which putting a prefix before them takes longer than a second product
_recorders: list[Recorder] = []
observers: list[Callable[..., Attention]] = []  # each may put itself around `inner`: told of a call before the prefix


@contextmanager
def using(form: Backend) -> Iterator[None]:
    """Within the block, `backend` is this one: `with attention.using("concat"): ...`."""
    global backend
    if form not in ("auto", "concat", "merge"):
        raise ConfigError(f"backend={form!r}: expected 'auto', 'concat' or 'merge'", field="backend", found=form)
    before, backend = backend, form
    try:
        yield
    finally:
        backend = before


class Slot:
    """Marks an attention module as a site: the stage that knows what to hand over, and the site's name there.

    Attributes:
        mount: What adds the prefix where the module does not ask the interface.
    """

    def __init__(self, stage: Stage, site: str) -> None:
        self.stage = stage
        self.site = site
        self.mount: Mount | None = None


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


def recorders_here() -> list[Recorder]:
    """Those that listen to the thread that asks."""
    return [recorder for recorder in _recorders if recorder.thread == threading.get_ident()] if _recorders else []


def with_gates(attend: Attention) -> Attention:
    """`attend` with what gated prompts of the module add to its result."""

    @functools.wraps(attend)
    def gated(inner: Attention, backend: str, module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = attend(inner, backend, module, query, *args, **kwargs)
        slot = module.__dict__.get(GATES)
        if slot is None or recorders_here():
            return result
        return slot.added(module, query, result, kwargs)

    return gated


@with_gates
def attend(
    inner: Attention,
    implementation: str,
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
    listening = recorders_here()
    if listening:
        return _recorded(listening, inner, module, query, key, value, attention_mask, *args, **kwargs)
    for observe in observers:
        inner = observe(inner, implementation, module, key, attention_mask, kwargs)
    slot = module.__dict__.get(SLOT)
    prefix = None if slot is None else slot.stage.prefix_of(slot.site, key.shape[0])
    if slot is None or prefix is None:
        return inner(module, query, key, value, attention_mask, *args, **kwargs)
    past = slot.stage.past(slot.site)
    if backend != "concat" and past is None and not args and _is_sdpa(inner):
        output = _merged(module, query, key, value, attention_mask, prefix, **kwargs)
        if output is not None:
            return output.transpose(1, 2).contiguous(), None
    key, value, attention_mask, kwargs = masks.extend(
        implementation, module, query, key, value, attention_mask, kwargs, prefix.count, past, prefix.visible
    )
    key, value = masks.prepend(prefix.key.to(key), key), masks.prepend(prefix.value.to(value), value)
    return inner(module, query, key, value, attention_mask, *args, **kwargs)


def _is_sdpa(inner: Attention) -> bool:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return inner is sdpa_attention_forward  # not what someone registered under its name, not with an observer around it


def _merged(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    prefix: KeysValues,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Attention (B, heads, Q, dim) without a copy of keys and values; None where that does not fit or does not pay."""
    few = query.shape[2] == 1
    if backend == "auto" and not (few and _pays(key, prefix.count)):
        return None
    unsuited = (
        dropout or prefix.visible is not None or any(kwargs.get(name) is not None for name in ("cache", "softcap"))
    )
    if unsuited or query.shape[0] != key.shape[0] or (mask is not None and mask.ndim != 4):
        return None
    causal = mask is None and masks.is_causal(module, query, kwargs)
    if causal:  # as sdpa does, with a static cache
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    mask = masks.with_bias(masks.cut(mask, key.shape[2]), masks.cut(position_bias, key.shape[2]))
    prefix_key, prefix_value = prefix.key.to(key), prefix.value.to(value)
    if few:
        return merge.joint(query, key, value, prefix_key, prefix_value, mask, False, scaling)
    if (mask is not None and (causal or mask.requires_grad)) or not merge.has_kernel(query, key, value, mask):
        return None
    return merge.merged(query, key, value, prefix_key, prefix_value, mask, causal, scaling)


def _pays(key: Tensor, count: int) -> bool:
    rows, heads, keys, dim = key.shape
    return not torch.compiler.is_compiling() and key.is_cpu and rows * heads * (keys + count) * dim > _COPY


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


def _with_seam(function: Any, implementation: str) -> Any:
    is_seamed = isinstance(function, functools.partial) and function.func is attend
    return function if is_seamed or not callable(function) else functools.partial(attend, function, implementation)


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
