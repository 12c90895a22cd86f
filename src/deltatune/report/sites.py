"""Where an adapter sits: every layer of the model by block and name, with the share of it that trains."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from torch import nn

from deltatune.bases import as_map
from deltatune.copies import TrainedCopies
from deltatune.counting import counts, packed_sizes
from deltatune.layer import AdaptedLayer
from deltatune.targets import walk

BLOCK = re.compile(r"^(.*?)\.?(\d+)\.(.+)$")  # stack, number of the block, place in the block


@dataclass
class Cell:
    """One layer of one block: `trained` parameters beside or among its own."""

    parameters: int
    trained: int


@dataclass
class Stack:
    """A row of equal blocks (`encoder.block`): `rows[i]` maps a place in block i to its cell."""

    name: str
    rows: dict[int, dict[str, Cell]] = field(default_factory=dict)

    @property
    def columns(self) -> list[str]:
        seen: dict[str, None] = {}
        for cells in self.rows.values():
            seen.update(dict.fromkeys(cells))
        return list(seen)

    @property
    def labels(self) -> list[str]:
        """The columns without what all of them begin with."""
        columns = self.columns
        first = {column.partition(".")[0] for column in columns}
        common = len(first) == 1 and all("." in column for column in columns)
        return [column.partition(".")[2] if common else column for column in columns]


@dataclass
class AdapterMap:
    stacks: list[Stack]
    outside: dict[str, Cell]  # embeddings, heads, norms beside the blocks
    trained: int
    parameters: int


def adapter_map(model: nn.Module) -> AdapterMap:
    """The map of a `PeftModel`, or of any model whose own parameters train."""
    from deltatune.model import PeftModel

    prefixed = isinstance(model, PeftModel)
    base = model.get_base_model() if prefixed else model
    cells: dict[str, Cell] = {}
    counted: set[int] = set()
    packed = packed_sizes(base)
    for path, module in _leaves(base):
        new = [p for p in module.parameters() if id(p) not in counted]
        counted.update(id(p) for p in new)
        trained, whole = counts(new, packed)
        if trained or BLOCK.match(path) is None or _is_matrix(module):  # frozen norms would only widen the map
            cells[path] = Cell(whole - (trained if isinstance(module, AdaptedLayer) else 0), trained)
    if prefixed:
        cells = _with_prefixes(model, cells)
    stacks: dict[str, Stack] = {}
    outside: dict[str, Cell] = {}
    for path, cell in cells.items():
        matched = BLOCK.match(path)
        if matched is None:
            if cell.parameters or cell.trained:
                outside[path] = cell
            continue
        stack = stacks.setdefault(matched[1] or "layers", Stack(matched[1] or "layers"))
        place = re.sub(r"(^|\.)\d+\.", r"\1", matched[3])
        row = stack.rows.setdefault(int(matched[2]), {})
        if place in row:  # T5 numbers the parts of a block; two norms of one name are one column
            row[place] = Cell(row[place].parameters + cell.parameters, row[place].trained + cell.trained)
        else:
            row[place] = cell
    if prefixed:
        outside = {**_inputs(model), **outside}
    return AdapterMap(list(stacks.values()), outside, *counts(model.parameters(), packed))


def _inputs(model: nn.Module) -> dict[str, Cell]:
    """Adapters that sit before the first block: virtual tokens beside the embedded ones."""
    from deltatune.model import PeftModel

    assert isinstance(model, PeftModel)
    found: dict[str, Cell] = {}
    for name, graft in model.prompts.items():
        encoder = getattr(graft, "encoder", None)
        if name not in model.prefixes and isinstance(encoder, nn.Module):
            trained = sum(p.numel() for p in encoder.parameters() if p.requires_grad)
            found[f"virtual tokens ({name})"] = Cell(0, trained)
    return found


def _is_matrix(module: nn.Module) -> bool:
    layer = as_map(module)
    return isinstance(module, AdaptedLayer) or (layer is not None and layer.kind not in ("embedding", "module"))


def _leaves(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Layers that hold parameters; wrapped and copied ones as they are."""
    found, copied = [], []
    for path, module in walk(model):
        if any(path.startswith(f"{other}.") for other in copied):
            continue
        if isinstance(module, TrainedCopies):
            copied.append(path)
            found.append((path, module))
        elif (
            isinstance(module, AdaptedLayer)
            or as_map(module) is not None
            or any(p is not None for p in module._parameters.values())
        ):
            found.append((path, module))
    return found


def _with_prefixes(model: nn.Module, cells: dict[str, Cell]) -> dict[str, Cell]:
    """The cells with a cell for each prefix, before the layers of its attention.

    A prefix has one encoder for all attentions; each is told the share of it that its keys and values are.
    """
    from deltatune.model import PeftModel

    assert isinstance(model, PeftModel)
    added: dict[str, Cell] = {}
    for prefix in model.prefixes.values():
        trained = sum(p.numel() for p in prefix.encoder.parameters() if p.requires_grad)
        widths = [heads * dim + value_heads * value_dim for heads, dim, value_heads, value_dim in prefix.encoder.shapes]
        for site, width in zip(prefix.sites, widths):
            cell = added.setdefault(site.name, Cell(0, 0))
            cell.trained += round(trained * width / sum(widths))
    result: dict[str, Cell] = {}
    for path, cell in cells.items():
        for name in [name for name in added if path.startswith(f"{name}.")]:
            result[f"{name}.prefix"] = added.pop(name)
        result[path] = cell
    return result | {f"{name}.prefix": cell for name, cell in added.items()}
