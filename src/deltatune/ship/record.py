"""What a model says about sample inputs: the prompt as the model gets it, its greedy answer, its logits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.bases import as_map
from deltatune.data.collate import Collator
from deltatune.data.example import TEXT_TASKS
from deltatune.generate.load import Ready
from deltatune.inject import adapted_layers
from deltatune.model import PeftModel
from deltatune.targets import walk

ANSWER = 16  # tokens


@dataclass(frozen=True)
class Said:
    """About one input.

    Attributes:
        prompt: Token ids, as the model gets them.
        answer: Token ids of the greedy answer; empty for models that classify.
        logits: (positions, classes), of prompt and answer, or of the head.
    """

    prompt: list[int]
    answer: list[int]
    logits: Tensor


@dataclass(frozen=True)
class Record:
    """About all inputs.

    Attributes:
        special: Special tokens and their ids, and the chat template.
        trace: Path of a layer -> what it puts out for the shortest input, in the order of the forward pass.
    """

    said: list[Said]
    special: dict[str, Any]
    trace: dict[str, Tensor] = field(default_factory=dict)


@torch.no_grad()
def record(ready: Ready, texts: Sequence[str], answers: Iterable[list[int]] | None = None) -> Record:
    """Ask a model.

    Args:
        answers: Those of another model: logits are taken behind them, so that both are compared on equal tokens.
    """
    forced = list(answers) if answers is not None else [None] * len(texts)
    said = [_said(ready, text, answer) for text, answer in zip(texts, forced)]
    shortest = min(range(len(texts)), key=lambda i: len(said[i].prompt))
    with _tracing(ready.model) as trace:
        _logits(ready, said[shortest].prompt, forced[shortest] or said[shortest].answer)
    return Record(said, _special(ready.tokenizer), dict(trace))


def _said(ready: Ready, text: str, forced: list[int] | None) -> Said:
    prompt = ready.encoder.prompt(text)
    answer = _answer(ready, prompt) if ready.task in TEXT_TASKS else []
    return Said(prompt, answer, _logits(ready, prompt, answer if forced is None else forced))


def _answer(ready: Ready, prompt: list[int]) -> list[int]:
    model: Any = ready.model
    made = model.generate(**_batch(ready, prompt), max_new_tokens=ANSWER, do_sample=False, num_beams=1)[0].tolist()
    return made[len(prompt) :] if ready.task == "causal" else made[1:]  # behind the decoder's first token


def _logits(ready: Ready, prompt: list[int], answer: list[int]) -> Tensor:
    model: Any = ready.model
    if ready.task == "causal":
        found = model(**_batch(ready, prompt + answer)).logits[0]
    elif ready.task == "seq2seq":
        start = model.config.decoder_start_token_id
        decoder = torch.tensor([[start, *answer]], device=_device(model))
        found = model(**_batch(ready, prompt), decoder_input_ids=decoder).logits[0]
    else:
        out = model(**_batch(ready, prompt))
        found = torch.stack([out.start_logits[0], out.end_logits[0]]) if hasattr(out, "start_logits") else out.logits[0]
    return found.float().reshape(-1, found.shape[-1]).cpu()


def _batch(ready: Ready, tokens: list[int]) -> dict[str, Tensor]:
    collator = Collator(ready.tokenizer.pad_token_id or 0, ready.task)
    return {name: tensor.to(_device(ready.model)) for name, tensor in collator.inputs([tokens], left=False).items()}


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _special(tokenizer: Any) -> dict[str, Any]:
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    found = {name: [getattr(tokenizer, name), getattr(tokenizer, f"{name}_id")] for name in names}
    return {**found, "chat_template": getattr(tokenizer, "chat_template", None)}


@contextmanager
def _tracing(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Keeps the first output of every layer with a weight, under the path it has in the bare model."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    adapted = dict(adapted_layers(base))
    trace: dict[str, Tensor] = {}
    handles = []
    for path, module in walk(base):
        layer = adapted.get(path, module if as_map(module) is not None else None)
        if layer is not None:
            handles.append(layer.register_forward_hook(_keep(path, trace)))
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()


def _keep(path: str, trace: dict[str, Tensor]) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and path not in trace:
            trace[path] = output.detach().float().cpu()

    return hook
