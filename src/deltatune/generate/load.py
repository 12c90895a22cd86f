"""From an adapter folder, or a model's name, to a model that is ready to answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from deltatune.config import CONFIG_NAME, PeftConfig, TaskType, read_json
from deltatune.data.encode import Encoder
from deltatune.data.labels import Labels
from deltatune.errors import ConfigError, FormatError
from deltatune.storage.files import write_files
from deltatune.storage.locate import place
from deltatune.storage.weights import read_weights
from deltatune.targets import HEAD_NAMES
from deltatune.train.base import DEMO, load_base
from deltatune.train.defaults import FULL
from deltatune.train.result import SETTINGS, TrainResult, as_json
from deltatune.train.settings import TrainSettings

# of the settings of training
KEPT = (
    *("task", "max_length", "max_target_length", "separator", "model_name_or_path"),
    *("completion_only_loss", "truncation", "train_on", "load_in_4bit", "load_in_8bit"),
)
AS_STORED = {"load_in_4bit": False, "load_in_8bit": False}
LABELS = "labels.json"  # names of the classes, in order
TASKS = {
    TaskType.SEQ_2_SEQ_LM: "seq2seq",
    TaskType.CAUSAL_LM: "causal",
    TaskType.SEQ_CLS: "classification",
    TaskType.TOKEN_CLS: "token_classification",
    TaskType.QUESTION_ANS: "question_answering",
}
LABELLED = ("classification", "token_classification")
HEADS = {  # endings of transformers' classes
    "ForSequenceClassification": "classification",
    "ForTokenClassification": "token_classification",
    "ForQuestionAnswering": "question_answering",
}


@dataclass
class Ready:
    """A model with its tokenizer, and how inputs were written when it was trained."""

    model: nn.Module
    tokenizer: Any
    task: str
    encoder: Encoder
    labels: Labels | None = None
    base: nn.Module | None = None  # the untouched model, where it is not this one with its adapter switched off
    settings: TrainSettings | None = None  # of the run that trained it, as far as answering needs them

    @contextmanager
    def untouched(self) -> Iterator[nn.Module]:
        """The base model, without the adapter."""
        from deltatune.model import PeftModel

        with self.model.disable_adapter() if isinstance(self.model, PeftModel) else nullcontext():
            yield self.base if self.base is not None else self.model


def load_ready(
    name: str,
    model: str | None = None,
    separator: str | None = None,
    compare: bool = False,
    adapter_name: str = "default",
) -> Ready:
    """Load what `name` says: an adapter folder or repository, a model folder, a hub name, or demo.

    Args:
        model: The base, instead of the one that the adapter's config names.
        separator: Between input and answer of a causal model, instead of the one it was trained with.
        compare: Whether `untouched` will be needed.
        adapter_name: The adapter's in the model.
    """
    import torch

    from deltatune.model import PeftModel

    config = adapter_config(name)
    settings = settings_of(Path(name), config, model, separator)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    labels = labels_of(Path(name), settings, name if config is not None else None)
    base = load_base(settings, labels if config is not None else None, device)
    tokenizer, loaded, bare = base.tokenizer, base.model, None
    if config is not None:
        loaded = PeftModel.from_pretrained(base.model, name, adapter_name)
        tokenizer = own_tokenizer(Path(name)) or tokenizer
    elif compare:
        bare = _before(Path(name), device)
    return make_ready(loaded.to(device).eval(), tokenizer, settings, labels, bare)


def make_ready(
    model: nn.Module, tokenizer: Any, settings: TrainSettings, labels: Labels | None, base: nn.Module | None = None
) -> Ready:
    """A loaded model, with inputs written as `settings` say."""
    if labels is None and settings.task in LABELLED:
        known: Any = model.config
        names = tuple(known.id2label[i] for i in range(known.num_labels))
        labels = Labels(names, names)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    encoder = Encoder(
        tokenizer,
        settings.task,
        settings.max_length,
        settings.max_target_length,
        settings.separator,
        settings.completion_only_loss,
        labels,
        settings.truncation,
        settings.train_on,
    )
    return Ready(model, tokenizer, settings.task, encoder, labels, base, settings)


def adapter_config(name: str) -> PeftConfig | None:
    """The config of an adapter; None where `name` is a model."""
    folder = Path(name)
    is_model = (folder / "config.json").is_file() and not (folder / CONFIG_NAME).is_file()
    if name == DEMO or is_model:
        return None
    if folder.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        return PeftConfig.from_pretrained(name)  # raises when it is not there
    try:
        return PeftConfig.from_pretrained(name)
    except FormatError:
        return None  # perhaps the hub's name of a model; loading it will tell


def settings_of(folder: Path, config: PeftConfig | None, model: str | None, separator: str | None) -> TrainSettings:
    """The settings of the training run beside the adapter, or what its config tells."""
    values: dict[str, Any] = {}
    if (folder / SETTINGS).is_file():
        values = read_json(folder / SETTINGS)
        values = {key: values[key] for key in KEPT if key in values}
    elif config is not None:
        values["separator"] = ""  # of a foreign adapter nothing is known: the input is taken as it is
        if config.task_type is not None and config.task_type not in TASKS:
            raise ConfigError(
                f"{folder}: generate answers {', '.join(TASKS.values())} tasks, this adapter is for "
                f"{config.task_type.value}",  # type: ignore[union-attr]
                field="task_type",
                found=config.task_type,
            )
        values["task"] = TASKS.get(config.task_type, "causal")  # type: ignore[arg-type]
    else:
        values |= {"separator": "", "task": _task_of(str(folder))}
    if config is None:
        values |= {"model_name_or_path": str(folder), **AS_STORED}  # a merged one has the settings of its adapter's run
    elif model is not None:
        values |= {"model_name_or_path": model, **AS_STORED}
    elif config.base_model_name_or_path:
        values.setdefault("model_name_or_path", config.base_model_name_or_path)
    if not values.get("model_name_or_path"):
        raise ConfigError(
            f"{folder}: the adapter does not name its base model; give it with --model", field="base_model_name_or_path"
        )
    if separator is not None:
        values["separator"] = separator
    return TrainSettings(**values, method=FULL)


def _task_of(name: str) -> str:
    """What a plain model is for, by the class its config names."""
    if name == DEMO:
        return "seq2seq"
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FormatError(f"{name} is neither an adapter nor a model that loads: {reason}", path=name) from error
    name_of_class = (getattr(config, "architectures", None) or [""])[0]
    head = next((task for ending, task in HEADS.items() if name_of_class.endswith(ending)), None)
    return head or ("seq2seq" if config.is_encoder_decoder else "causal")


def labels_of(folder: Path, settings: TrainSettings, adapter: str | None) -> Labels | None:
    """The classes of an adapter: their names from beside it, or their number from its head."""
    if settings.task not in LABELLED or adapter is None:
        return None
    if (folder / LABELS).is_file():
        names = tuple(read_json(folder / LABELS)["names"])
        return Labels(names, names)
    _, tensors, _ = read_weights(place(adapter))
    heads = [
        tensor.shape[0]
        for key, tensor in tensors.items()
        if key.endswith(".weight") and set(HEAD_NAMES) & set(key.split("."))
    ]
    if not heads:
        return None
    names = tuple(f"LABEL_{i}" for i in range(heads[-1]))
    return Labels(names, names)


def write_labels(result: TrainResult) -> None:
    """Keep the names of the classes beside the adapter, which has no config of the base to hold them."""
    if result.settings.task in LABELLED:
        config: Any = result.model.config
        names = [config.id2label[i] for i in range(config.num_labels)]
        write_files(result.output_dir, {LABELS: as_json({"names": names})})


def own_tokenizer(folder: Path) -> Any:
    if not (folder / "tokenizer_config.json").is_file():
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder))


def _before(folder: Path, device: Any) -> nn.Module | None:
    """What a fully trained model was before."""
    if not (folder / SETTINGS).is_file():
        return None
    values = read_json(folder / SETTINGS)
    settings = TrainSettings(model_name_or_path=values["model_name_or_path"], task=values["task"], method=FULL)
    return load_base(settings, None, device).model.to(device).eval()
