"""Mutated `adapter_config.json` of every method, read and put onto a model."""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltatune import PeftConfig, get_peft_model
from deltatune.config import CONFIG_NAME
from deltatune.errors import PeftError
from deltatune.registry import METHODS
from scripts.fuzzing.isolated import WrongError
from scripts.fuzzing.values import as_text, mutated
from tests.core.tiny import tiny
from tests.faults.folders import state, unchanged


@dataclass
class Case:
    """A folder with a config, and what was done to it."""

    folder: Path
    story: str


class Target:
    """Reads a config, injects it, and looks whether a refusal has left the model as it was."""

    def __init__(self, room: Path) -> None:
        self.room, self.base = room, tiny("llama")
        self.before = state(self.base)
        self.starts = [values for kind in METHODS.values() if (values := _start(kind.config)) is not None]

    def make(self, number: int) -> Case:
        draw = random.Random(number)
        values: Any = draw.choice(self.starts)
        story = [str(values["peft_type"])]
        for _ in range(draw.choice([1, 1, 2, 3])):
            values, told = mutated(values, draw, list(self.starts[0]))
            story.append(told)
        content, told = as_text(values, draw)
        folder = self.room / str(number)
        folder.mkdir()
        (folder / CONFIG_NAME).write_bytes(content)
        return Case(folder, "; ".join([*story, told]))

    def use(self, case: Case) -> None:
        try:
            config = PeftConfig.from_pretrained(case.folder)
            get_peft_model(self.base, config)
        except PeftError:
            if not unchanged(self.base, self.before):
                raise WrongError("a refused config has changed the model") from None
            raise

    def clear(self, case: Case) -> None:
        shutil.rmtree(case.folder)


def _start(kind: Any) -> dict[str, Any] | None:
    """The content of the file of a method's config with its defaults, and what it cannot do without."""
    for options in ({}, {"num_virtual_tokens": 3}, {"num_frozen_layers": 1}):
        try:
            return {"target_modules": None, **kind(task_type="CAUSAL_LM", **options).to_file_dict()}
        except PeftError:
            continue
    return None
