"""`chunk_loss`: the hooks under which a model's loss is computed in chunks."""

from __future__ import annotations

import inspect
import threading
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.errors import StateError
from deltatune.helpers.bare import bare
from deltatune.loss.head import Head
from deltatune.loss.logits import LazyLogits, Recipe

STAGE = "_deltatune_loss"  # key in the __dict__ of the model


def chunk_loss(model: nn.Module) -> LossStage:
    """From now on, calls of the model with `labels` compute their loss without holding all logits at once.

    The loss is the model's own, whatever it does with the logits: to its code they are a tensor like any other, only
    torch's cross-entropy takes them a few rows at a time. A loss that needs them otherwise (label smoothing by
    transformers' Trainer) gets them whole. `outputs.logits` are computed when they are used.

    Args:
        model: A language model of transformers, or a `PeftModel` on one; adapters may come and go later.

    Returns:
        A handle: `remove()` ends it, `whole` tells why the last pass made whole logits, and is None if it did not.

    Raises:
        StateError: The model has no head over its vocabulary.
    """
    base = bare(model)
    stage = vars(base).get(STAGE)
    if stage is None:
        stage = vars(base)[STAGE] = LossStage(base)
    return stage


class _PerThread(threading.local):
    head: Head | None = None  # of the pass that runs in this thread


class LossStage:
    """The hooks on one model and its head."""

    of_chunk_loss = True  # tells these hooks from others'

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.local = _PerThread()
        self.whole: str | None = "no pass with labels has run"
        self.enabled = True
        self.parameters = list(inspect.signature(model.forward).parameters)
        self.head: nn.Module | None = None
        self.on_head: list[Any] = []
        self._follow_head()
        self.handles = [
            model.register_forward_pre_hook(self.enter, with_kwargs=True),
            model.register_forward_hook(self.leave, always_call=True),
        ]

    def remove(self) -> None:
        """Leave the loss to the model again."""
        for handle in [*self.handles, *self.on_head]:
            handle.remove()
        vars(self.model).pop(STAGE, None)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "local"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.local = _PerThread()

    def _follow_head(self) -> nn.Module:
        """The head, with hooks: another than before when adapters were put on it, or the vocabulary was changed."""
        find = getattr(self.model, "get_output_embeddings", None)
        head = None if find is None else find()
        if head is None:
            raise StateError(
                f"{type(self.model).__name__} has no head over a vocabulary (get_output_embeddings() gives none), so "
                "there is no loss to compute in chunks; leave chunk_loss out",
                field="chunk_loss",
                found=type(self.model).__name__,
                expected="a model with a head over a vocabulary",
            )
        if head is not self.head:
            for handle in self.on_head:
                handle.remove()
            self.on_head = [
                head.register_forward_pre_hook(self.before_head, with_kwargs=True),
                head.register_forward_hook(self.behind_head),
            ]
            self.head = head
        return head

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a pass."""
        self.local.head = None
        if not self.enabled or torch.compiler.is_compiling():  # a graph has no place for logits that are not there
            return
        if {**dict(zip(self.parameters, args)), **kwargs}.get("labels") is not None:
            self.local.head = Head(self._follow_head())

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """After a pass, or when it failed."""
        if self.local.head is not None:
            self.whole = self.local.head.whole
        self.local.head = None

    def before_head(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Let the head run on one row, which tells all that is to be known about its logits."""
        head = self.local.head
        if head is None or head.busy or torch.compiler.is_compiling():
            return None
        head.whole = head.stands_aside(args, kwargs)
        if head.whole is not None:
            return None
        hidden: Tensor = args[0]
        head.hidden, head.whole = hidden, "the model did not use its logits for a loss"
        return (hidden[:1, :1].detach(),), kwargs

    def behind_head(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Hand on what stands for the logits of all rows."""
        head = self.local.head
        if head is None or head.busy or head.hidden is None:
            return None
        hidden, head.hidden = head.hidden, None
        if not isinstance(output, Tensor):  # as layers of Megatron's, which put out their bias too
            head.whole = f"the head puts out a {type(output).__name__}"
            with head._calling():
                return module(hidden)
        head.vocabulary = output.shape[-1]
        return LazyLogits(Recipe(head, hidden, output.dtype))
