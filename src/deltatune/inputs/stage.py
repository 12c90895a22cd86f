"""The input seam: learned rows before the embedded tokens of a model. Who calls the model does not see them.

A pass of the base model, wherever it is called from, goes through three hooks:

1. `enter` puts placeholders before the tokens, lengthens masks, positions and labels (`deltatune.inputs.one_pass`);
2. `embed`, behind the module that embeds the tokens, replaces what the placeholders became by the prompt's rows;
3. `leave` cuts the outputs back to the caller's tokens.

In generation the placeholders are part of the sequence from the start, so every cache holds them like other tokens;
`enter` then only looks how many tokens the cache holds (`deltatune.inputs.generate`).
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deltatune.errors import StateError
from deltatune.inputs import INPUT
from deltatune.inputs.call import for_rows, shorten, span_loss
from deltatune.inputs.generate import Generation, build_processors, generate
from deltatune.inputs.one_pass import Pass, lengthened
from deltatune.inputs.places import DECODER, ENCODER, Places
from deltatune.selection import Selection

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from deltatune.inputs.prompt import Input

_PROCESSORS = "_get_logits_processor"  # what generate() asks for all processors, its own and the caller's


class _PerThread(threading.local):
    """What runs in this thread: a pass, the side of it that embeds, a generation."""

    def __init__(self) -> None:
        self.running: Pass | None = None
        self.side = ENCODER
        self.generation: Generation | None = None


class InputStage:
    """Everything the prompts of one model share."""

    def __init__(self, model: PreTrainedModel, selection: Selection, places: Places) -> None:
        self.model, self.selection, self.places = model, selection, places
        self.prompts: dict[str, Input] = {}
        self.parameters = list(inspect.signature(model.forward).parameters)
        self.local = _PerThread()
        self.hooked: dict[str, tuple[nn.Module, Any]] = {}
        self.handles = [
            model.register_forward_pre_hook(self.enter, with_kwargs=True),
            model.register_forward_hook(self.leave, always_call=True),
        ]
        for side, path in places.stacks.items():
            hook = functools.partial(self.turn, side)
            self.handles.append(model.get_submodule(path).register_forward_pre_hook(hook))
        if hasattr(type(model), _PROCESSORS):
            vars(model)[_PROCESSORS] = functools.partial(build_processors, self)
        self._hook_embeddings()

    def close(self) -> None:
        for handle in self.handles + [handle for _, handle in self.hooked.values()]:
            handle.remove()
        vars(self.model).pop(_PROCESSORS, None)
        vars(self.model).pop(INPUT, None)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "local"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.local = _PerThread()

    def _hook_embeddings(self) -> None:
        """Follow the embedding where it is wrapped by an adapter, or replaced with one of another size."""
        modules = {path: self.model.get_submodule(path) for path in self.places.paths.values()}
        for path in [path for path, (module, _) in self.hooked.items() if module is not modules[path]]:
            self.hooked.pop(path)[1].remove()
        for path, module in modules.items():
            if path not in self.hooked and all(module is not other for other, _ in self.hooked.values()):
                self.hooked[path] = (module, module.register_forward_hook(self.embed))

    # ------------------------------------------------------------------------------------------- during a forward pass

    def active(self) -> list[Input]:
        return [self.prompts[name] for name in self.selection.current().names if name in self.prompts]

    def rows(self, prompts: Sequence[Input], task_ids: Any, batch: int) -> dict[str, Tensor]:
        """What stands before the tokens of each side, the prompts in order."""
        found: dict[str, list[Tensor]] = {}
        for prompt in prompts:
            rows, count = prompt.rows(task_ids, batch), prompt.config.length
            found.setdefault(ENCODER, []).append(rows[..., :count, :])
            if prompt.config.reaches_decoder and rows.shape[-2] > count:
                found.setdefault(DECODER, []).append(rows[..., count:, :])
        return {side: _joined(parts, batch) for side, parts in found.items()}

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**dict(zip(self.parameters, args)), **kwargs}

    @property
    def causal(self) -> bool:
        """Whether tokens see earlier ones only."""
        return not self.places.stacks and bool(self.model.can_generate())

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before a pass: lengthen what it is called with."""
        self.local.running, self.local.side = None, ENCODER
        if not torch.compiler.is_compiling():
            self._hook_embeddings()
        named = self.named(args, kwargs)
        takes_tasks = any(prompt.encoder.takes_tasks for prompt in self.prompts.values())
        task_ids = named.pop("task_ids", None) if takes_tasks else None
        generation, prompts = self.local.generation, self.active()
        if generation is not None:
            self.local.running = Pass(generation.rows, generation.starts(named))
            return None
        if not prompts:
            return ((), named) if takes_tasks else None
        self.local.running = lengthened(self, named, prompts, task_ids)
        return (), named

    def turn(self, side: str, module: nn.Module, args: Any) -> None:
        """Before the encoder or the decoder runs."""
        self.local.side = side

    def embed(self, module: nn.Module, args: Any, output: Any) -> Any:
        """After the embedding: replace what the placeholders became."""
        running, side = self.local.running, self.local.side
        if running is None and self.local.generation is not None:  # generate() runs the encoder on its own
            running = Pass(self.local.generation.rows, {ENCODER: self.local.generation.first[ENCODER]})
        if running is None or side not in running.rows or not isinstance(output, Tensor) or output.ndim != 3:
            return None
        running.met.append(side)
        return _placed(output, running.rows[side], running.starts[side])

    def leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        """After a pass: cut its outputs back; also called, without output, when it failed."""
        running = self.local.running
        self.local.running = None
        if running is None or running.view is None or output is None:
            return None
        if ENCODER in running.rows and ENCODER not in running.met:
            raise StateError(
                f"{type(self.model).__name__}: the input embedding at {self.places.paths[ENCODER]!r} did not run, so "
                "the prompt had no effect; if modules_to_save names a module that holds it, name smaller ones",
                path=self.places.paths[ENCODER],
            )
        view = running.view
        loss = view.loss(output.logits) if view.loss is not None else None
        output = shorten(output, view)
        if view.answers is not None:
            loss = span_loss(output.start_logits, output.end_logits, *view.answers)
        if loss is not None:
            output = type(output)(**{**dict(output.items()), "loss": loss})
        return output.to_tuple() if view.as_tuple else output

    # ------------------------------------------------------------------------------------------------------ generation

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's generate, from and to sequences without virtual tokens."""
        return generate(self, args, kwargs)


def _placed(output: Tensor, rows: Tensor, start: Any) -> Tensor:
    """`rows` in place of the virtual tokens in `output` (B, S, width), whose first position is number `start`."""
    count, length = rows.shape[-2], output.shape[1]
    if isinstance(start, Tensor):  # rows differ, or a static cache counts on the device
        if start.ndim == 1 and len(start) != len(output):  # beams
            start = start.repeat_interleave(len(output) // len(start))
        number = start.to(output.device).reshape(-1, 1) + torch.arange(length, device=output.device)
        index = number.clamp(0, count - 1).expand(len(output), -1)[..., None].expand(-1, -1, rows.shape[-1])
        picked = for_rows(rows, len(output)).to(output).gather(1, index)
        return torch.where(((number >= 0) & (number < count))[..., None], picked, output)
    before, first = max(-start, 0), max(start, 0)
    shown = min(count - first, length - before)
    if shown <= 0:
        return output
    part = for_rows(rows[..., first : first + shown, :], len(output)).to(output)
    return torch.cat([output[:, :before], part, output[:, before + shown :]], dim=1)


def _joined(parts: list[Tensor], batch: int) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    if any(part.ndim == 3 for part in parts):
        parts = [for_rows(part, batch) for part in parts]
    return torch.cat(parts, dim=-2)
