"""`Input`: the prompt of one adapter, X' = [P; X]. The seam it acts at is `deltatune.inputs.stage`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deltatune.config import TaskType
from deltatune.errors import AdapterNameError, ConfigError, DataError, MismatchError
from deltatune.inputs import INPUT
from deltatune.inputs.encoder import STATE, InputEncoder
from deltatune.inputs.places import ENCODER, Places, find_places
from deltatune.inputs.stage import InputStage
from deltatune.prompts.graft import Graft
from deltatune.selection import Selection


class Input(Graft):
    """One adapter's prompt on one model."""

    takes_positions = True
    place = "the input"

    encoder: InputEncoder

    def __init__(self, name: str, config: Any, encoder: InputEncoder, stage: InputStage) -> None:
        self.name, self.config, self.encoder, self.stage = name, config, encoder, stage
        self.reads = ("task_ids",) if encoder.takes_tasks else ()
        self._folded: tuple[Any, Tensor] | None = None

    @classmethod
    def attach(cls, model: nn.Module, config: Any, name: str, selection: Selection, encoder: type[nn.Module]) -> Input:
        """Find the embedding, fill in the config, build the encoder, put the hooks on; or raise, changing nothing."""
        config.validate()
        _ = config.length
        stage: InputStage | None = vars(model).get(INPUT)
        if stage is not None and name in stage.prompts:
            raise AdapterNameError(f"adapter {name!r} already has a prompt on this {type(model).__name__}", found=name)
        places = find_places(model) if stage is None else stage.places
        for key, value in _filled_in(model, config, places).items():
            setattr(config, key, value)
        embedding = model.get_submodule(places.paths[ENCODER])
        built: Any = encoder(config, embedding)  # type: ignore[call-arg]
        if stage is None:
            stage = vars(model)[INPUT] = InputStage(model, selection, places)  # type: ignore[arg-type]
        device = next((p.device for p in embedding.parameters()), torch.device("cpu"))
        prompt = stage.prompts[name] = cls(name, config, built.to(device), stage)
        return prompt

    def detach(self) -> None:
        self.stage.prompts.pop(self.name, None)
        if not self.stage.prompts:
            self.stage.close()

    def rows(self, task_ids: Any, batch: int) -> Tensor:
        """(P, width), or by task (batch, P, width). Without gradients they are kept while the parameters stay."""
        if self.encoder.takes_tasks:
            return self.encoder(task_ids=_checked_tasks(self, task_ids, batch))
        parameters = list(self.encoder.parameters())
        learning = torch.is_grad_enabled() and any(p.requires_grad for p in parameters)
        if (
            torch.compiler.is_compiling()
            or learning
            or self.encoder.training
            or any(p.is_inference() for p in parameters)
        ):
            return self.encoder()
        state = [(id(p), p.data_ptr(), p._version, p.dtype) for p in parameters]
        if self._folded is None or self._folded[0] != state:
            self._folded = (state, self.encoder().detach())
        return self._folded[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_folded": None}

    # ----------------------------------------------------------------------------------------------------------- files

    def file_tensors(self, format: str | None = None) -> dict[str, Tensor]:
        """PEFT's tensors, and an encoder that they do not hold whole beside them."""
        if format not in (None, "peft", "native"):
            raise ConfigError(f"format={format!r} is not known, expected 'peft' or None", field="format", found=format)
        with torch.no_grad():
            return {name: tensor.clone().contiguous() for name, tensor in self.encoder.file_tensors().items()}

    def load_file_tensors(self, tensors: dict[str, Tensor]) -> None:
        needed = self.file_tensors()
        plain = {name: tensor for name, tensor in needed.items() if not name.startswith(STATE)}
        whole = any(name.startswith(STATE) for name in tensors)
        wanted = needed if whole else plain
        wrong = sorted(wanted.keys() ^ tensors.keys())
        if wrong:
            raise MismatchError(
                f"adapter {self.name!r} has the tensors {sorted(wanted)}, the file {sorted(tensors)}",
                key=wrong[0],
                found=sorted(tensors),
                expected=sorted(wanted),
            )
        for name, tensor in wanted.items():
            if tensor.shape != tensors[name].shape:
                raise MismatchError(
                    f"adapter {self.name!r}: {name} has shape {tuple(tensors[name].shape)} in the file, this model "
                    f"needs {tuple(tensor.shape)}; the file was made for another base or number of virtual tokens",
                    key=name,
                    found=tuple(tensors[name].shape),
                    expected=tuple(tensor.shape),
                )
        self._folded = None
        self.encoder.load_file_tensors(tensors)


def _checked_tasks(prompt: Input, task_ids: Any, batch: int) -> Tensor:
    """One task per row, checked."""
    device, tasks = prompt.encoder.embedding.weight.device, prompt.config.num_tasks
    if task_ids is None:
        if tasks == 1:
            return torch.zeros(batch, dtype=torch.long, device=device)
        raise DataError(
            f"adapter {prompt.name!r} has {tasks} tasks; pass task_ids, one of 0 to {tasks - 1} per row",
            field="task_ids",
            expected=list(range(tasks)),
        )
    ids = torch.as_tensor(task_ids, device=device).reshape(-1)
    if ids.numel() == 1 and batch > 1:
        ids = ids.expand(batch)
    if ids.is_floating_point() or len(ids) != batch:
        raise DataError(
            f"task_ids of shape {tuple(ids.shape)} and {ids.dtype} for {batch} rows; expected one integer per row",
            field="task_ids",
        )
    if not torch.compiler.is_compiling() and ((ids < 0) | (ids >= tasks)).any():
        raise DataError(
            f"task_ids holds {sorted({task for task in ids.tolist() if not 0 <= task < tasks})}; adapter "
            f"{prompt.name!r} has tasks 0 to {tasks - 1}",
            field="task_ids",
            found=ids.tolist(),
            expected=list(range(tasks)),
        )
    return ids.long()


def _filled_in(model: nn.Module, config: Any, places: Places) -> dict[str, Any]:
    """The config's fields that follow from the model; what a user or a file set must agree."""
    if config.token_dim not in (None, places.width):
        raise ConfigError(
            f"{type(config).__name__}: token_dim={config.token_dim} does not fit {type(model).__name__}, whose "
            f"embedded tokens have width {places.width} (leave it out; a file that says so was made for another base)",
            field="token_dim",
            found=config.token_dim,
            expected=places.width,
        )
    seq2seq = config.task_type == TaskType.SEQ_2_SEQ_LM
    submodules = config.num_transformer_submodules or (2 if seq2seq and config.reaches_decoder else 1)
    if submodules > 2:
        raise ConfigError(
            f"{type(config).__name__}: num_transformer_submodules={submodules}, expected 1 or 2 (encoder and decoder)",
            field="num_transformer_submodules",
            found=submodules,
        )
    text = model.config.get_text_config()  # type: ignore[union-attr, operator]
    values = {
        "token_dim": places.width,
        "num_transformer_submodules": submodules,
        "num_layers": config.num_layers or getattr(text, "num_hidden_layers", None),
        "num_attention_heads": config.num_attention_heads or getattr(text, "num_attention_heads", None),
    }
    if hasattr(config, "encoder_hidden_size"):
        values["encoder_hidden_size"] = config.encoder_hidden_size or places.width
    return values
