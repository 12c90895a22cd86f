"""Features as one padded batch, as long as its longest row."""

from dataclasses import dataclass

import torch
from torch import Tensor

from deltatune.data.features import IGNORE, Features
from deltatune.data.pack import Pack
from deltatune.data.passages import Window


@dataclass(frozen=True)
class Collator:
    """Pads inputs on the right (`left` for generation), labels with the ignored index.

    Packs get positions that begin anew instead of a mask; with `flat`, as flash kernels want it, in a single row.
    """

    pad_token_id: int
    task: str
    task_ids: bool = True  # whether the model takes them
    flat: bool = False

    def __call__(self, rows: list[Features]) -> dict[str, Tensor]:
        packs = [row for row in rows if isinstance(row, Pack)]
        if packs:
            return self._packed(packs)
        batch = self.inputs([row.input_ids for row in rows])
        if self.task == "classification":
            batch["labels"] = torch.tensor([row.labels[0] for row in rows])
        elif self.task == "question_answering":
            batch["start_positions"], batch["end_positions"] = torch.tensor([row.labels for row in rows]).unbind(1)
            types = [row.types for row in rows if isinstance(row, Window) and row.types is not None]
            if types:
                batch["token_type_ids"] = _padded(types, 0)
        else:
            batch["labels"] = _padded([row.labels for row in rows], IGNORE)
        if self.task_ids and rows[0].task_id is not None:
            batch["task_ids"] = torch.tensor([row.task_id for row in rows])
        return batch

    def _packed(self, packs: list[Pack]) -> dict[str, Tensor]:
        if self.flat:
            packs = [Pack.of(packs)]
        width = max(len(pack.input_ids) for pack in packs)
        # what fills a row up is one more sequence of its own
        places = [pack.positions + list(range(width - len(pack.input_ids))) for pack in packs]
        return {
            "input_ids": _padded([pack.input_ids for pack in packs], self.pad_token_id),
            "position_ids": torch.tensor(places),
            "labels": _padded([pack.labels for pack in packs], IGNORE),
        }

    def inputs(self, ids: list[list[int]], left: bool = False) -> dict[str, Tensor]:
        mask = _padded([[1] * len(row) for row in ids], 0, left)
        return {"input_ids": _padded(ids, self.pad_token_id, left), "attention_mask": mask}


def _padded(rows: list[list[int]], value: int, left: bool = False) -> Tensor:
    width = max(len(row) for row in rows)
    filled = [([value] * (width - len(row)) + row) if left else (row + [value] * (width - len(row))) for row in rows]
    return torch.tensor(filled, dtype=torch.long)
