"""The head of one forward pass: its logits as a whole, or the loss of them in chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deltatune.copies import TrainedCopies
from deltatune.errors import StateError
from deltatune.kernels.linear_cross_entropy import linear_cross_entropy, rows_at_once
from deltatune.layer import AdaptedLayer
from deltatune.loss.form import kernel_form
from deltatune.loss.logits import Recipe


class Head:
    """A head as one pass uses it.

    Attributes:
        module: What the model calls: a linear layer, one under adapters, a trained copy, a quantised one.
        vocabulary: Number of logits per row, once the head has run on one.
        hidden: What it was called with, until it has put something out.
        busy: Being called from here, for the logits of its own input.
        whole: Why whole logits were made in this pass; None: they were not.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.vocabulary = 0
        self.hidden: Tensor | None = None
        self.busy = False
        self.whole: str | None = "the model did not call its head"
        self.selection: Any = getattr(module, "selection", None)
        self.call = None if self.selection is None else self.selection.current()
        self.trained = [(part, part._version) for part in module.parameters() if part.requires_grad]

    def stands_aside(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Why its logits have to be made at once; None if they can wait."""
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor) or args[0].ndim != 3 or not args[0].numel():
            return "the head was called with more than one tensor (rows, tokens, width)"
        if self.call is not None and (self.call.rows is not None or self.call.values):
            return "rows of the batch go through the head in different ways"
        if hasattr(self.module, "_get_fsdp_state") or any(hasattr(p, "ds_id") for p in self.module.parameters()):
            return "the head is sharded (FSDP, ZeRO-3), and whole only while the model calls it"
        return None

    def dense(self, recipe: Recipe, used_by: str) -> Tensor:
        """The logits of a recipe.

        Raises:
            StateError: The head was trained since it was called, so they would be others.
        """
        if any(part._version != version for part, version in self.trained):
            raise StateError(
                f"the logits of a pass under chunk_loss are first used (by {used_by}) after the head was changed; read "
                "them before optimizer.step()",
                field="chunk_loss",
                found=used_by,
                hint="read the logits before optimizer.step()",
            )
        if self.whole is not None:
            self.whole = f"{used_by} needs them"
        with self._calling():
            return self._logits(recipe, recipe.hidden)

    def loss(self, recipe: Recipe, labels: Tensor, ignore_index: int, label_smoothing: float) -> Tensor:
        """The sum of the cross-entropies of all rows, with `labels` (N,)."""
        self.whole = None
        rows = recipe.hidden.reshape(-1, recipe.hidden.shape[-1])
        layer, form = self._plain_layer(), kernel_form(recipe.steps)
        if layer is not None and form is not None:
            return linear_cross_entropy(
                rows,
                layer.weight,
                labels,
                form.with_bias(layer.bias),
                ignore_index=ignore_index,
                label_smoothing=label_smoothing,
                reduction="sum",
                scale=form.scale,
                softcap=form.softcap,
            )

        def part(hidden: Tensor, targets: Tensor) -> Tensor:
            logits = self._logits(recipe, hidden)
            exact = logits if logits.dtype is torch.float64 else logits.float()
            return F.cross_entropy(exact, targets, reduction="sum", label_smoothing=label_smoothing)

        with self._calling():
            return self._in_chunks(part, rows, labels, labels != ignore_index)

    def _in_chunks(self, part: Callable[..., Tensor], rows: Tensor, labels: Tensor, kept: Tensor) -> Tensor:
        """The sum of `part` over chunks of rows, whose logits are made once more for the gradient."""
        rows, labels, chunk = rows[kept], labels[kept], rows_at_once(self.vocabulary)
        if not len(rows):
            return rows.sum()  # zero, with a gradient
        if not torch.is_grad_enabled():
            return torch.stack([part(*both) for both in zip(rows.split(chunk), labels.split(chunk))]).sum()
        parts = [
            checkpoint(part, *both, use_reentrant=False, context_fn=lambda: (nullcontext(), self._bound()))
            for both in zip(rows.split(chunk), labels.split(chunk))
        ]
        return torch.stack(parts).sum()  # type: ignore[arg-type]

    def _logits(self, recipe: Recipe, hidden: Tensor) -> Tensor:
        logits = self.module(hidden)
        for step in recipe.steps:
            logits = step(logits)
        return logits

    def _plain_layer(self) -> nn.Linear | None:
        """The layer that says all of what the head does, if there is one."""
        module: Any = self.module
        if isinstance(module, TrainedCopies):
            module = module.current
        elif isinstance(module, AdaptedLayer):
            acting = any(name in module.adapters for name in module.selection.names())
            module = module.base_layer if acting == (module.stash is not None) else module
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        foreign = [hook for hook in hooks if not getattr(getattr(hook, "__self__", None), "of_chunk_loss", False)]
        plain = type(module) is nn.Linear and _is_plain(module.weight) and not foreign
        # accelerate puts a forward of its own on layers that it moves
        return module if plain and "forward" not in vars(module) else None

    @contextmanager
    def _calling(self) -> Iterator[None]:
        before, self.busy = self.busy, True
        try:
            with self._bound():
                yield
        finally:
            self.busy = before

    def _bound(self) -> AbstractContextManager[Any]:
        """The adapters of the pass, whenever the head is called."""
        return nullcontext() if self.call is None else self.selection.use(self.call)


def _is_plain(weight: Tensor) -> bool:
    """A parameter that holds a matrix as it is; or when a step is planned, one without numbers."""
    if type(weight) is nn.Parameter:
        return True
    from torch._subclasses.fake_tensor import FakeTensor

    return type(weight) is FakeTensor
