"""A pass through a model: which adapters it uses, what these know of it, and what changes wait for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from deltatune import calls, recompute
from deltatune.gate import STANDING
from deltatune.inputs import INPUT
from deltatune.names import BASE, check_rows
from deltatune.notice import warn
from deltatune.prompts.graft import Graft
from deltatune.selection import Call, Recomputation
from deltatune.tuner import Tuner


class Calling(nn.Module):
    """How a `PeftModel` is called.

    Attributes:
        prompts: The adapters that act outside of single layers.
    """

    base_model: Tuner
    prompts: dict[str, Graft]

    def _known(self, names: Iterable[str]) -> None:
        """
        Raises:
            AdapterNameError: There is no such adapter.
        """
        raise NotImplementedError

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """The base model's forward; `adapter_names` gives one adapter per row ("__base__" for none)."""
        if (by_prompt := self._by_prompt(adapter_names)) is not None:
            with self._passing(adapter_names):
                return by_prompt.forward(self, adapter_names, args, kwargs)
        tuner = self.base_model
        with self._passing(adapter_names, kwargs):
            if not (self.training and torch.is_grad_enabled()):
                return tuner(*args, **kwargs)
            if self.base_model.selection.choosing and not torch.compiler.is_compiling():
                # a choice of this call alone, and checkpointing may have been switched on behind our back
                recompute.bind(self.base_model.model, self.base_model.selection, self.prompts)
            self.base_model.check_starts()
            for schedule in self.base_model.schedules.values():
                if schedule.name in self.base_model.selection.active:
                    schedule.forward_begins()
            return self.base_model.with_penalty(self.base_model(*args, **kwargs), kwargs)

    def generate(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """The base model's generate; with beams or several sequences per row, names are repeated to match."""
        if (by_prompt := self._by_prompt(adapter_names)) is not None:
            with self._passing(adapter_names):
                return by_prompt.generate(self, adapter_names, args, kwargs)
        model: Any = self.base_model.model
        with self._passing(adapter_names, kwargs, {**dict(zip(("inputs", "generation_config"), args)), **kwargs}):
            return vars(model).get(INPUT, model).generate(*args, **kwargs)

    def _by_prompt(self, names: list[str] | None) -> Any:
        """What runs a batch whose rows have prompts of their own; None: no row has one."""
        if names is None:
            return None
        check_rows(names)
        if not self.prompts:
            return None
        from deltatune.inputs import rows  # a model without prompts has no use for any of it

        return rows if rows.mixes_prompts(self, names) else None

    def _passing(
        self,
        names: list[str] | None,
        kwargs: dict[str, Any] | None = None,
        generation: dict[str, Any] | None = None,
    ) -> AbstractContextManager[Any]:
        """A pass under its choice of adapters, which changes of these wait for.

        Args:
            names: One per row, or None.
            kwargs: Arguments of the call; None where the rows are run in groups, each with a choice of its own.
            generation: Those of generate.
        """
        tuner = self.base_model
        selection = tuner.selection

        def choice() -> Any:
            if kwargs is None or (names is None and calls.readers(tuner.model) is None):
                return nullcontext()
            return self._chosen(names, kwargs, generation)

        def checked_choice() -> Any:
            if STANDING not in (used := uses()):  # what was chosen some time ago may be gone
                self._known(used)
            return choice()

        if torch.compiler.is_compiling():  # a graph has no room for waiting
            return choice()
        uses = (
            selection.uses if names is None else lambda: frozenset(name for name in names if name not in (BASE, None))
        )
        return selection.gate.passing(uses, checked_choice)

    def _chosen(self, names: list[str] | None, kwargs: dict[str, Any], generation: dict[str, Any] | None) -> Any:
        """What a call asks for beyond the arguments of the base model, which is taken out of them."""
        call = self.base_model.selection.current()
        if names is not None:
            rows = tuple(None if name in (BASE, None) else name for name in names)
            self._known([name for name in rows if name is not None])
            stacks = WeakKeyDictionary() if call.stacks is None and generation is not None else call.stacks
            call = Call(rows=rows, stacks=stacks, scale=call.scale)
        call = self.informed(call, kwargs, generation)
        if names is None and not call.values:
            return nullcontext()
        return self.base_model.selection.use(
            replace(call, copies=1 if generation is None else self._copies_per_row(generation))
        )

    def informed(self, call: Call, kwargs: dict[str, Any], generation: dict[str, Any] | None = None) -> Call:
        """The call with what adapters read of it, as task_ids, taken out of the arguments."""
        readers = calls.readers(self.base_model.model)
        if readers is None:
            return call
        kept = {name for graft in self.prompts.values() for name in graft.reads}
        return replace(call, values={**call.values, **readers.taken(kwargs, kept, generation)})

    def _copies_per_row(self, kwargs: dict[str, Any]) -> int:
        settings = kwargs.get("generation_config") or getattr(self.base_model.model, "generation_config", None)
        values = [kwargs.get(n, getattr(settings, n, None)) or 1 for n in ("num_beams", "num_return_sequences")]
        return max(values)  # beams already hold the returned sequences

    @contextmanager
    def fixed_adapters(self) -> Iterator[None]:
        """Within the block no adapter changes: calls with `adapter_names` keep what they stack from one to the next.

        For loops that decode token by token without `generate`, which does it by itself. What is kept is at most a copy
        of the adapters of the last batch; training steps and edits of weights belong outside of the block.
        """
        selection = self.base_model.selection
        with selection.use(replace(selection.current(), stacks=WeakKeyDictionary())):
            yield

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block, calls of this thread or task run the base model, bit for bit.

        A generator that yields within the block has to be continued by the thread or task that began it.
        """
        if self.base_model.merged_for_good:
            warn(
                f"disable_adapter: merge_and_unload() has put {list(self.base_model.merged_for_good)} into the weights "
                "for good, so the base without them is no longer there; merge_adapter() keeps it"
            )
        with self.base_model.selection.use(Call()):
            yield

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """The base model's, with the recomputation bound to the adapters of the forward pass it repeats.

        Layers are recomputed without the reentrant engine unless asked for, so no input needs a gradient, and the hook
        that transformers puts on the embeddings for that engine's sake is taken off again: it would make backward run
        through frozen layers below the first adapter.
        """
        model: Any = self.base_model.model
        kwargs = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        hooked = bool(getattr(model, "_require_grads_hooks", None))
        if kwargs["use_reentrant"]:
            model.activation_checkpointing_enable(kwargs, **options)
            recompute.bind(model, self.base_model.selection, self.prompts)
            return
        kwargs.setdefault("context_fn", Recomputation(self.base_model.selection, self.prompts))
        model.activation_checkpointing_enable(kwargs, **options)
        if not hooked:
            model.disable_input_require_grads()

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """The older name of `activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)
