"""`AdapterCallback`: `model.after_step()` for transformers' Trainer, with the schedules' state in its checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from deltatune.model import PeftModel
from deltatune.notice import warn
from deltatune.schedule import pack, unpack

STATE = "adapter_schedule"


class AdapterCallback(TrainerCallback):
    """Give one to the Trainer where a method follows a schedule, as AdaLoRA does; elsewhere it does nothing.

    Args:
        checkpoint: The folder that training resumes from, where it is not `output_dir/checkpoint-<step>`.
    """

    def __init__(self, checkpoint: str | Path | None = None) -> None:
        self.checkpoint = checkpoint

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        schedules = _schedules(model)
        if not state.global_step or not schedules:
            return
        folder = Path(self.checkpoint or Path(args.output_dir) / f"checkpoint-{state.global_step}")
        try:
            from safetensors.torch import load

            tensors = load((folder / f"{STATE}.safetensors").read_bytes())
            values = json.loads((folder / f"{STATE}.json").read_text(encoding="utf-8"))
        except OSError:
            for schedule in schedules.values():
                schedule.step = state.global_step
            warn(
                f"{folder} holds no {STATE}.safetensors, so the schedule goes on from step {state.global_step} with "
                "fresh sensitivities; pass AdapterCallback(checkpoint=...) if training resumes from another folder"
            )
        else:
            unpack(schedules, tensors, values)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if isinstance(model, PeftModel):
            model.after_step()

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        schedules = _schedules(model)
        if schedules and state.is_world_process_zero:
            from safetensors.torch import save

            from deltatune.storage.files import write_files

            tensors, values = pack(schedules)
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_files(folder, {f"{STATE}.json": json.dumps(values).encode(), f"{STATE}.safetensors": save(tensors)})


def _schedules(model: Any) -> dict[str, Any]:
    return model.base_model.schedules if isinstance(model, PeftModel) else {}
