"""Whether a model keeps packed rows apart: tried on the first rows of the data, before anything is trained.

Attention can be told which rows belong together. State-space layers and linear attention carry a state across the
border, a prompt before the embedded tokens stands before the first row only, and some models do not read the positions
they are given. No list of names knows them all. So two questions are put to the model itself, with its adapter moved
off its start: does a row change when other tokens stand before it, and does it get alone what it gets in the pack?
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.data.collate import Collator
from deltatune.data.features import Features
from deltatune.data.pack import Pack
from deltatune.data.prepare import Corpus
from deltatune.errors import ConfigError, StateError
from deltatune.train import randomness
from deltatune.train.base import autocast
from deltatune.train.settings import TrainSettings

TOKENS = 64  # of each row that is tried
APART = {torch.float32: 1e-4, torch.float64: 1e-8}  # of the largest logit; other dtypes round more
COARSE = 5e-2


def pack(corpus: Corpus, model: Any) -> Corpus:
    """The corpus with packs as training rows; flash kernels take them as one row a batch."""
    kernel = str(getattr(model.config, "_attn_implementation", "") or "")
    return corpus.packed(flat="flash" in kernel)


def check_packing(model: nn.Module, corpus: Corpus, settings: TrainSettings, device: torch.device) -> None:
    """Raises ConfigError where packing would change what is learnt."""
    found = next((row for row in corpus.train.features if isinstance(row, Pack) and row.rows > 1), None)
    assert corpus.collator is not None
    if found is None:
        return  # nothing shares a row
    first, second = (replace(row, task_id=None) for row in _rows(found)[:2])
    other = replace(first, input_ids=[_another(first.input_ids, place) for place in range(len(first.input_ids))])
    with randomness.untouched(), _moved(model), autocast(settings, device), torch.no_grad():
        alone = _logits(model, corpus.collator, [second], device)
        try:
            together = _logits(model, corpus.collator, [Pack.of([first, second])], device)[-len(second.input_ids) :]
            changed = _logits(model, corpus.collator, [Pack.of([other, second])], device)[-len(second.input_ids) :]
        except (TypeError, StateError) as error:  # of a forward that has no such argument, of an adapter
            raise _refused(model, settings, f"is not possible ({error})") from error
    scale = float(alone.abs().max().clamp_min(1e-6))
    limit = scale * APART.get(_dtype(model), COARSE)
    seen, shifted = float((changed - together).abs().max()), float((together - alone).abs().max())
    if seen > limit or shifted > limit:
        why = "sees the tokens of the row before it" if seen > limit else "gets other outputs than alone"
        raise _refused(model, settings, f"{why} (outputs differ by {max(seen, shifted):.2g} of {scale:.2g})")


def _refused(model: nn.Module, settings: TrainSettings, why: str) -> ConfigError:
    return ConfigError(
        f"packing=True: in {type(model).__name__} with method {settings.method} a packed row {why}; "
        "use packing: false (group_by_length: true saves padding as well)",
        field="packing",
        found=True,
        expected=False,
    )


def _rows(pack: Pack) -> list[Features]:
    """The rows of a pack, their ends cut off where they are long."""
    made, start = [], 0
    for size in pack.sizes:
        end = start + min(size, TOKENS)
        made.append(Features(pack.input_ids[start:end], pack.labels[start:end], 1))
        start += size
    return made


def _another(ids: list[int], place: int) -> int:
    """Another token that the row has, so that every model knows it; the next number where there is only one."""
    return next((token for token in reversed(ids) if token != ids[place]), max(0, ids[place] - 1))


def _logits(model: Any, collator: Collator, rows: list[Any], device: torch.device) -> Tensor:
    batch = {name: tensor.to(device) for name, tensor in collator(rows).items() if name != "labels"}
    return model(**batch, use_cache=False).logits[0].float()


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


@contextmanager
def _moved(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, with what trains away from its start, where many adapters change nothing; then put back."""
    from deltatune.model import PeftModel

    trained = [p for p in model.parameters() if p.requires_grad] if isinstance(model, PeftModel) else []
    kept = [parameter.detach().clone() for parameter in trained]
    training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for parameter in trained:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator).to(parameter)
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(trained, kept):
                parameter.copy_(value)
        model.train(training)
