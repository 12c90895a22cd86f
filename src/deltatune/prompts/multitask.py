"""Multitask prompt tuning: X' = [P * (u_t v_t); X], one shared P, a low-rank scale per task t.

https://arxiv.org/abs/2303.02861, section 3: train on source tasks, then start a target task from what they share.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from pathlib import Path

import torch
from torch import Tensor, nn

from deltatune import checks
from deltatune.adapter import Method
from deltatune.config import PeftType, config
from deltatune.errors import ConfigError, MismatchError
from deltatune.inputs.encoder import ROWS
from deltatune.inputs.prompt import Input
from deltatune.prompts.config import twenty_tokens
from deltatune.prompts.prompt_tuning import PromptEmbedding, PromptTuningConfig

COLUMNS, SCALES = "prefix_task_cols", "prefix_task_rows"


class MultitaskPromptTuningInit(str, Enum):
    """Where the prompt starts: at text, at random, or at what source tasks have left in a file."""

    TEXT = "TEXT"
    RANDOM = "RANDOM"
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"


FROM_FILE = ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED")


@config
class MultitaskPromptTuningConfig(PromptTuningConfig):
    """Fields and meaning are PEFT's; calls take `task_ids`, one task per row.

    Attributes:
        prompt_tuning_init: "RANDOM", "TEXT"; from a file, the shared prompt with "AVERAGE_SOURCE_TASKS" the mean of the
            tasks' factors, "EXACT_SOURCE_TASK" those of one task, "ONLY_SOURCE_SHARED" none of them.
        prompt_tuning_init_state_dict_path: That file, safetensors.
        prompt_tuning_init_task: The one task.
        num_ranks: Rank of the tasks' scales.
        num_tasks: Number of tasks; 1 with a start from source tasks' factors.
    """

    unsaved = PromptTuningConfig.unsaved
    inits = MultitaskPromptTuningInit
    reaches_decoder = True

    prompt_tuning_init: str | Enum = MultitaskPromptTuningInit.RANDOM
    prompt_tuning_init_state_dict_path: str | None = None
    prompt_tuning_init_task: int | None = 0
    num_ranks: int | None = 1
    num_tasks: int | None = 1

    def __post_init__(self) -> None:
        if self.peft_type is None:
            self.peft_type = PeftType.MULTITASK_PROMPT_TUNING
        super().__post_init__()

    def validate(self) -> None:
        super().validate()
        owner = type(self).__name__
        checks.positive_int(owner, "num_ranks", self.num_ranks)
        checks.positive_int(owner, "num_tasks", self.num_tasks)
        path = self.prompt_tuning_init_state_dict_path
        if self.prompt_tuning_init not in FROM_FILE or self.inference_mode:
            return
        if path is None:
            raise ConfigError(
                f"{owner}: prompt_tuning_init={self.prompt_tuning_init.value!r} needs "  # type: ignore[union-attr]
                "prompt_tuning_init_state_dict_path, the adapter_model.safetensors of the source tasks",
                field="prompt_tuning_init_state_dict_path",
            )
        if self.prompt_tuning_init != "ONLY_SOURCE_SHARED" and self.num_tasks != 1:
            checks.refuse(owner, "num_tasks", self.num_tasks, "1 where the start is one pair of factors")


class MultitaskPromptEmbedding(PromptEmbedding):
    """The trainable part, under PEFT's names.

    `embedding` (P, d) is shared, `prefix_task_cols` (tasks, P, ranks) and `prefix_task_rows` (tasks, ranks, d) are not.
    """

    takes_tasks = True

    def __init__(
        self, config: MultitaskPromptTuningConfig, word_embeddings: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__(config, word_embeddings)
        count, width = self.embedding.weight.shape
        tasks, ranks = config.num_tasks or 1, config.num_ranks or 1
        self.prefix_task_cols = nn.Parameter(torch.normal(0, 0.02, (tasks, count, ranks)))
        self.prefix_task_rows = nn.Parameter(torch.normal(0, 0.02, (tasks, ranks, width)))
        if config.prompt_tuning_init in FROM_FILE and not config.inference_mode:
            self._start_from_sources(config)

    def forward(self, tokens: Tensor | None = None, task_ids: Tensor | None = None) -> Tensor:
        """Rows (B, P, width) of the tasks (B,)."""
        shared = super().forward(tokens)
        if task_ids is None:
            raise ConfigError("task_ids is missing; each row needs the number of its task", field="task_ids")
        return shared * (self.prefix_task_cols[task_ids] @ self.prefix_task_rows[task_ids])

    def _start_from_sources(self, config: MultitaskPromptTuningConfig) -> None:
        found = _source(str(config.prompt_tuning_init_state_dict_path))
        picked = {ROWS: found[ROWS], COLUMNS: self.prefix_task_cols, SCALES: self.prefix_task_rows}
        if config.prompt_tuning_init == "AVERAGE_SOURCE_TASKS":
            picked |= {name: found[name].mean(0, keepdim=True) for name in (COLUMNS, SCALES)}
        elif config.prompt_tuning_init == "EXACT_SOURCE_TASK":
            task, tasks = config.prompt_tuning_init_task or 0, len(found[COLUMNS])
            if not 0 <= task < tasks:
                checks.refuse(type(config).__name__, "prompt_tuning_init_task", task, f"a task from 0 to {tasks - 1}")
            picked |= {name: found[name][task : task + 1] for name in (COLUMNS, SCALES)}
        own = self.file_tensors()
        for name, tensor in picked.items():
            if tensor.shape != own[name].shape:
                raise MismatchError(
                    f"{config.prompt_tuning_init_state_dict_path}: {name} has shape {tuple(tensor.shape)}, this prompt "
                    f"needs {tuple(own[name].shape)}; num_virtual_tokens, num_ranks and the base must be the file's",
                    key=name,
                    found=tuple(tensor.shape),
                    expected=tuple(own[name].shape),
                )
        self.load_file_tensors(picked)

    def file_tensors(self) -> dict[str, Tensor]:
        return {
            ROWS: self.embedding.weight.detach(),
            COLUMNS: self.prefix_task_cols.detach(),
            SCALES: self.prefix_task_rows.detach(),
        }

    def load_file_tensors(self, tensors: dict[str, Tensor]) -> None:
        super().load_file_tensors(tensors)
        with torch.no_grad():
            self.prefix_task_cols.copy_(tensors[COLUMNS])
            self.prefix_task_rows.copy_(tensors[SCALES])


def _source(path: str) -> dict[str, Tensor]:
    from deltatune.storage.locate import place
    from deltatune.storage.tensors import read_file
    from deltatune.storage.weights import read_weights
    from deltatune.storage.zipped import read_zipped

    file = Path(path)
    if file.is_dir():
        _, tensors, _ = read_weights(place(file))
    else:
        tensors, _ = (read_file if file.suffix == ".safetensors" else read_zipped)(file)
    missing = sorted({ROWS, COLUMNS, SCALES} - tensors.keys())
    if missing:
        raise MismatchError(f"{path}: {missing} are missing; it is no file of multitask prompts", key=missing[0])
    return tensors


METHOD = Method(
    PeftType.MULTITASK_PROMPT_TUNING,
    MultitaskPromptTuningConfig,
    None,
    key_prefix="prompt_",
    graft=Input,
    encoder=MultitaskPromptEmbedding,
    learning_rate=3e-2,
    train_options=twenty_tokens,
)
