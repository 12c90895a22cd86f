"""The base model and its tokenizer: a folder, a hub name, or the embedded one; float32 on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deltatune.bases.bitsandbytes import keep_layout
from deltatune.data.example import CAUSAL_TASKS, TEXT_TASKS
from deltatune.data.labels import Labels
from deltatune.errors import ConfigError, FormatError
from deltatune.suggest import did_you_mean
from deltatune.train.direction import check_direction
from deltatune.train.quantised import loading_options, refuse_embedded
from deltatune.train.settings import TrainSettings

DEMO = "demo"


@dataclass(frozen=True)
class Base:
    """A model that has not been adapted yet."""

    model: nn.Module
    tokenizer: Any
    vocabulary: int | None  # rows of the input embedding
    positions: int | None = None  # tokens a row can have at most
    notices: tuple[str, ...] = ()


def load_base(settings: TrainSettings, labels: Labels | None = None, device: torch.device | None = None) -> Base:
    """Load what `model_name_or_path` names, with a head for the task."""
    device = device or torch.device("cpu")
    dtype = resolve_dtype(settings.dtype, device)
    if settings.model_name_or_path == DEMO:
        refuse_embedded(settings)
        model, tokenizer = _demo(settings)
        return finish_base(model.to(dtype), tokenizer, settings)
    model, tokenizer, fresh = _load(settings, labels, dtype, device)
    keep_layout(model)
    if settings.task not in TEXT_TASKS:  # the head is new, the model below it must not be
        fresh = [name for name in fresh if name.startswith(f"{model.base_model_prefix}.")]
    notices = []
    if fresh:
        shown = ", ".join(fresh[:3]) + (", ..." if len(fresh) > 3 else "")
        notices.append(
            f"{len(fresh)} tensors of {settings.model_name_or_path} are not in its files and random: {shown}"
        )
    if settings.task in CAUSAL_TASKS:
        notices += check_direction(model, settings.model_name_or_path)
    return replace(finish_base(model, tokenizer, settings), notices=tuple(notices))


def load_words(settings: TrainSettings) -> Base:
    """The base without its weights: the tokenizer, and what is known of its limits. `model` is not to be used."""
    if settings.model_name_or_path == DEMO:
        model, tokenizer = _demo(settings)
        return finish_base(model, tokenizer, settings)
    import transformers

    source = _place(settings.model_name_or_path)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        config = transformers.AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise _unloadable(settings, error) from error
    _fill_with_end(tokenizer)
    text = config.get_text_config()
    vocabulary, positions = getattr(text, "vocab_size", None), getattr(text, "max_position_embeddings", None)
    return Base(nn.Identity(), tokenizer, vocabulary, _positions(positions, tokenizer))


def finish_base(model: nn.Module, tokenizer: Any, settings: TrainSettings) -> Base:
    """What loading and a model given in memory share."""
    _fill_with_end(tokenizer)
    config: Any = model.config
    if settings.task == "classification" and getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id  # decoder classifiers look for the last real token with it
    embedding = model.get_input_embeddings() if callable(getattr(model, "get_input_embeddings", None)) else None  # type: ignore[operator]
    vocabulary = getattr(embedding, "num_embeddings", None)
    positions = _positions(getattr(config, "max_position_embeddings", None), tokenizer)
    return Base(model, tokenizer, vocabulary, positions)


def _fill_with_end(tokenizer: Any) -> None:
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked: any token will do


def _positions(positions: int | None, tokenizer: Any) -> int | None:
    """Some tables have rows beyond the last usable position: the tokenizer knows."""
    return None if positions is None else min(positions, tokenizer.model_max_length)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """auto: bfloat16 where the accelerator has it, float32 on a CPU, where half precision is slow and less exact."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.bfloat16
    return torch.float32


def check_device(name: str) -> None:
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not present.get(name, True):
        raise ConfigError(
            f"device={name!r} is not available on this machine or in this build of torch; use device: cpu, or auto",
            field="device",
            found=name,
            expected=["cpu", *(device for device, there in present.items() if there)],
        )


def _demo(settings: TrainSettings) -> tuple[nn.Module, Any]:
    from deltatune.demo.base import load_base as load_embedded

    if settings.task not in TEXT_TASKS:
        raise ConfigError(
            "model_name_or_path='demo' is a text-to-text model; use task: seq2seq, or name an encoder",
            field="task",
            found=settings.task,
        )
    return load_embedded()


def _load(
    settings: TrainSettings, labels: Labels | None, dtype: torch.dtype, device: torch.device
) -> tuple[nn.Module, Any, list[str]]:
    """Model, tokenizer, and the tensors that the files lack."""
    import transformers

    source = _place(settings.model_name_or_path)
    options: dict[str, Any] = {"dtype": dtype, **loading_options(settings, dtype, device)}
    if settings.device_map is not None:
        options |= {"device_map": settings.device_map, "offload_folder": settings.offload_folder}
    if labels is not None:
        options["num_labels"] = len(labels)
        options["id2label"] = dict(enumerate(labels.names))
        options["label2id"] = {label: number for number, label in enumerate(labels.names)}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        with quiet():
            model, found = auto_class(settings.task).from_pretrained(source, output_loading_info=True, **options)
    except (OSError, ValueError, KeyError) as error:
        raise _unloadable(settings, error) from error
    return model, tokenizer, sorted(found["missing_keys"])


def auto_class(task: str) -> Any:
    """Of transformers, with the head for a task."""
    import transformers

    return {
        "seq2seq": transformers.AutoModelForSeq2SeqLM,
        "causal": transformers.AutoModelForCausalLM,
        "chat": transformers.AutoModelForCausalLM,
        "classification": transformers.AutoModelForSequenceClassification,
        "token_classification": transformers.AutoModelForTokenClassification,
        "question_answering": transformers.AutoModelForQuestionAnswering,
    }[task]


def base_config(settings: TrainSettings) -> Any:
    """The config of the base, without its weights."""
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(_place(settings.model_name_or_path))
    except (OSError, ValueError, KeyError) as error:
        raise _unloadable(settings, error) from error


def _place(name: str) -> str:
    """A model folder that is there, or a hub name."""
    folder = Path(name).expanduser()
    local = folder.is_dir()
    if local and not (folder / "config.json").is_file():
        raise FormatError(
            f"model folder {name} has no config.json; give a folder that save_pretrained wrote",
            path=str(folder),
            expected="config.json",
        )
    if not local and (name.startswith(("/", "./", "../", "~")) or name.count("/") > 1):
        raise FormatError(f"model folder {name} does not exist; give a model folder, a hub name, or demo", path=name)
    return str(folder) if local else name


def _unloadable(settings: TrainSettings, error: Exception) -> FormatError:
    name = settings.model_name_or_path
    if served := _served(name, error):
        return FormatError(
            f"model {name!r} has no class for task {settings.task}; it has one for task: {', '.join(served)}",
            path=name,
            field="task",
            found=settings.task,
            expected=served,
        )
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return FormatError(
        f"model {name!r} cannot be loaded for task {settings.task}: {reason.rstrip('.')}; "
        f"check the name{_near(name)}, and that the architecture has this task",
        path=name,
        field="model_name_or_path",
    )


def _served(name: str, error: Exception) -> list[str]:
    """The tasks that transformers has a class for, where it refused this one for want of one."""
    import transformers

    if "Unrecognized configuration class" not in str(error):
        return []
    config = type(transformers.AutoConfig.from_pretrained(_place(name)))
    tasks = ("seq2seq", "causal", "chat", "classification", "token_classification", "question_answering")
    return [task for task in tasks if config in auto_class(task)._model_mapping]


def _near(name: str) -> str:
    """Model folders here that are called almost so."""
    folder = Path(name)
    beside = [one.name for one in folder.parent.iterdir() if (one / "config.json").is_file()] if "/" not in name else []
    return did_you_mean(name, beside)


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' bars over weight files and its report on them, which tear up ours."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def autocast(settings: TrainSettings, device: torch.device) -> AbstractContextManager[Any]:
    """Where the base is in half precision, forward passes run so too; parameters that train are float32."""
    dtype = resolve_dtype(settings.dtype, device)
    return nullcontext() if dtype is torch.float32 else torch.autocast(device.type, dtype)
