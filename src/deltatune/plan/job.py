"""A training job without its numbers: the base from its config, the adapter grafted, a batch of its largest shape."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from deltatune.config import PeftConfig
from deltatune.data.encode import answer_length
from deltatune.data.example import CAUSAL_TASKS, TEXT_TASKS
from deltatune.errors import ConfigError, PeftError
from deltatune.kernels.linear_cross_entropy import rows_at_once
from deltatune.loss.stage import chunk_loss
from deltatune.registry import METHODS
from deltatune.train.base import DEMO, auto_class, base_config, load_base, resolve_dtype
from deltatune.train.defaults import FULL, peft_type
from deltatune.train.method import adapt, enable_checkpointing, takes_tasks
from deltatune.train.settings import UNKNOWN_STEPS, TrainSettings


@dataclass(frozen=True)
class Shape:
    """Of a batch: rows, tokens of an input, tokens of an answer (seq2seq)."""

    rows: int
    tokens: int
    answer: int = 0

    @classmethod
    def of(cls, settings: TrainSettings) -> Shape:
        """The largest that the settings allow."""
        answer = answer_length(settings.max_target_length) if settings.task == "seq2seq" else 0
        return cls(settings.per_device_train_batch_size, settings.max_length, answer)


@dataclass(frozen=True)
class Sizes:
    """
    Attributes:
        linear: Entries of frozen linear layers, the head aside, which a quantised base holds in few bits.
        largest: The largest of these.
        block: Bytes of the largest block of a list of layers.
        rest: Bytes of what is in no such list, embeddings and head.
    """

    linear: int
    largest: int
    block: int
    rest: int

    @classmethod
    def of(cls, model: nn.Module) -> Sizes:
        head = model.get_output_embeddings()  # type: ignore[operator]
        linear = [m for m in model.modules() if type(m) is nn.Linear and m is not head and not m.weight.requires_grad]
        entries = [module.weight.numel() for module in linear]
        blocks = [child for module in model.modules() if isinstance(module, nn.ModuleList) for child in module]
        inside = {id(p): _size(p) for block in blocks for p in block.parameters()}
        whole = {id(p): _size(p) for p in model.parameters()}
        block = max((sum(_size(p) for p in block.parameters()) for block in blocks), default=0)
        return cls(sum(entries), max(entries, default=0), block, sum(whole.values()) - sum(inside.values()))


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class _NothingUnusual(TorchDispatchMode):
    """Answers questions about numbers with no: no padding on the left, no token that is out of range."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype is torch.bool:
            return False
        return func(*args, **(kwargs or {}))


@dataclass
class Job:
    """What one step needs; tensors have shapes and no numbers.

    Attributes:
        vocabulary: Tokens that the model embeds.
        sizes: What of it can be held otherwise.
        notes: What was taken for granted.
    """

    settings: TrainSettings
    device: torch.device
    model: nn.Module
    mode: FakeTensorMode
    vocabulary: int
    chunked: bool
    sizes: Sizes
    notes: tuple[str, ...] = ()

    @contextmanager
    def running(self) -> Iterator[None]:
        with self.mode, _NothingUnusual():
            yield

    def autocast(self) -> AbstractContextManager[Any]:
        dtype = resolve_dtype(self.settings.dtype, self.device)
        return torch.autocast("cpu", dtype, enabled=dtype is not torch.float32)

    def batch(self, shape: Shape) -> dict[str, Any]:
        return batch_of(self.settings, shape)


def batch_of(settings: TrainSettings, shape: Shape, vocabulary: int = 2) -> dict[str, Any]:
    """A batch as the collator makes it, of random tokens; the last token of each row but the first is padding."""
    task = settings.task
    ids = torch.randint(0, vocabulary, (shape.rows, shape.tokens))
    mask = torch.ones_like(ids)
    if shape.rows > 1 and shape.tokens > 2:
        mask[1:, -1] = 0
    made: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if task == "classification":
        made["labels"] = torch.zeros(shape.rows, dtype=torch.long)
    elif task == "question_answering":
        made |= {name: torch.zeros(shape.rows, dtype=torch.long) for name in ("start_positions", "end_positions")}
    elif task == "seq2seq":
        made["labels"] = torch.randint(0, vocabulary, (shape.rows, shape.answer))
    else:
        made["labels"] = ids.clone() if task in CAUSAL_TASKS else torch.zeros_like(ids)
    if takes_tasks(settings.method) and settings.task_column is not None:
        made["task_ids"] = torch.zeros(shape.rows, dtype=torch.long)
    return made | ({"use_cache": False} if task in TEXT_TASKS else {})


def build_job(settings: TrainSettings, device: torch.device, labels: int | None = None) -> Job:
    """
    Raises:
        PeftError: As training would, where the config alone shows it; ConfigError where the method needs numbers.
    """
    dtype = resolve_dtype(settings.dtype, device)
    model = _bare(settings, dtype, labels)
    embedding = model.get_input_embeddings()
    vocabulary = getattr(embedding, "num_embeddings", 2)
    notes: list[str] = []
    chunked = uses_chunks(settings, vocabulary)
    if chunked:
        chunk_loss(model)
        if settings.loss == "auto":
            notes.append("the loss is taken to be computed in chunks; training tries first whether it serves the model")
    options = settings.options_of(UNKNOWN_STEPS)
    try:
        adapted: Any = adapt(model, settings.method, settings.task, options, _needs_no_data)
    except PeftError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        raise _needs_numbers(settings, error) from error
    if settings.gradient_checkpointing:
        enable_checkpointing(adapted)
    for parameter in adapted.parameters():  # as training does
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    _without_numbers(adapted, mode)
    sizes = Sizes.of(adapted)
    return Job(settings, device, adapted.train(), mode, vocabulary, chunked, sizes, tuple(notes))


def uses_chunks(settings: TrainSettings, vocabulary: int) -> bool:
    """As `train.chunks` decides where it does not try the model."""
    if settings.task not in TEXT_TASKS or settings.loss == "model":
        return False
    length = settings.max_length if settings.task in CAUSAL_TASKS else answer_length(settings.max_target_length)
    many = settings.per_device_train_batch_size * length > rows_at_once(vocabulary)
    return settings.loss == "chunked" or many


def _bare(settings: TrainSettings, dtype: torch.dtype, labels: int | None) -> Any:
    """The base with parameters that take no memory: on the meta device, or for prompts, whose graft runs it once, zeros
    that the system has promised and not given."""
    if settings.model_name_or_path == DEMO:
        return load_base(settings).model.to(dtype)
    from accelerate import init_empty_weights

    config = base_config(settings)
    if labels is not None:
        config.num_labels = labels
    with init_empty_weights(include_buffers=False):
        model = auto_class(settings.task).from_config(config, dtype=dtype)
    if settings.task == "classification" and getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = 0
    member = peft_type(settings.method)
    if settings.method != FULL and member is not None and METHODS[member].graft is not None:
        _replaced(model, lambda tensor: _promised(tensor) if tensor.device.type == "meta" else tensor)
    model.tie_weights()
    return model


def _promised(tensor: Tensor) -> Tensor:
    """Zeros of a shape; pages of memory are given to them when they are written to."""
    raw = torch.from_numpy(numpy.zeros(max(1, tensor.numel() * tensor.element_size()), numpy.uint8))
    return raw[: tensor.numel() * tensor.element_size()].view(tensor.dtype).reshape(tensor.shape)


def _without_numbers(model: nn.Module, mode: FakeTensorMode) -> None:
    def fake(tensor: Tensor) -> Tensor:
        with mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")

    _replaced(model, fake)


def _replaced(model: nn.Module, make: Any) -> None:
    """Every parameter and buffer by another, those that are shared by one that is shared."""
    made: dict[int, tuple[Tensor, Tensor]] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    new = make(tensor)
                    if isinstance(tensor, nn.Parameter) and new is not tensor:
                        new = nn.Parameter(new, tensor.requires_grad)
                    made[id(tensor)] = (tensor, new)  # the old one is kept, so that no other gets its id
                held[name] = made[id(tensor)][1]  # type: ignore[assignment]


def _needs_no_data(model: nn.Module, config: PeftConfig) -> None:
    from deltatune.lora.preparing import NEEDS_DATA

    start = getattr(config, "init_lora_weights", None)
    if start in NEEDS_DATA:
        raise ConfigError(
            f"init_lora_weights={start!r} begins with a pass over data, which planning has not; plan with "
            "init_lora_weights=true, which trains the same tensors",
            field="init_lora_weights",
            found=start,
        )


def _needs_numbers(settings: TrainSettings, error: Exception) -> ConfigError:
    return ConfigError(
        f"method={settings.method!r} reads numbers of the base when it is built "
        f"({' '.join(str(error).split())[:120]}), "
        "and planning loads none; plan with options that start at random, or with another method of the same size",
        field="method",
        found=settings.method,
    )
