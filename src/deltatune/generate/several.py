"""Several adapters on one base model: loaded side by side, one of them acting at a time, or none."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from deltatune.config import PeftConfig
from deltatune.data.encode import within
from deltatune.data.labels import Labels
from deltatune.errors import AdapterNameError, ConfigError
from deltatune.generate.load import Ready, adapter_config, labels_of, make_ready, own_tokenizer, settings_of
from deltatune.registry import METHODS
from deltatune.suggest import did_you_mean
from deltatune.train.base import load_base
from deltatune.train.settings import TrainSettings

BASE = "base"  # the name of the model without any adapter


@dataclass
class Several:
    """`readies` maps names to the same model with inputs as that adapter was trained on them; `base` stands among them.

    Attributes:
        folders: Where each adapter was read from.
    """

    readies: dict[str, Ready]
    folders: dict[str, str] = field(default_factory=dict)

    @property
    def adapters(self) -> list[str]:
        return list(self.folders)

    @property
    def task(self) -> str:
        return self.readies[BASE].task

    def ready(self, name: str) -> Ready:
        """Raises AdapterNameError, with the nearest name that there is."""
        if name not in self.readies:
            raise AdapterNameError(
                f"no adapter named {name!r}{did_you_mean(name, self.readies)}; there are {', '.join(self.readies)}",
                field="adapter_name",
                found=name,
                expected=list(self.readies),
            )
        return self.readies[name]

    @contextmanager
    def using(self, name: str) -> Iterator[Ready]:
        """Within the block the model is the base with this adapter; only the base, bit for bit, for `base`."""
        ready = self.ready(name)
        model: Any = ready.model
        if name != BASE:
            model.set_adapter(name, inference_mode=True)
            yield ready
        elif self.folders:
            with model.disable_adapter():  # acts in this thread, so it is entered where the model is called
                yield ready
        else:
            yield ready


@dataclass(frozen=True)
class Wanted:
    """An adapter before the base is loaded."""

    name: str
    folder: str
    settings: TrainSettings
    labels: Labels | None


@dataclass(frozen=True)
class Plan:
    """What is to be loaded, found to belong together by the folders alone.

    Attributes:
        settings: How the base is loaded, and asked where no adapter acts.
        labels: The classes that the adapters know; None where the model has to be asked for them.
    """

    settings: TrainSettings
    adapters: list[Wanted]
    labels: Labels | None = None

    @property
    def task(self) -> str:
        return self.settings.task


def plan_several(
    adapters: Sequence[str], model: str | None = None, separator: str | None = None, task: str | None = None
) -> Plan:
    """Look at the folders; no weights are loaded.

    Args:
        adapters: Folders or repositories, each also as NAME=FOLDER; else the folder's own name is the adapter's.
        model: The base, instead of the one that the adapters name; without adapters it is all there is.
        task: What the base is asked to do, where no adapter says it.

    Raises:
        ConfigError: The adapters were trained for different tasks, classes or base models, or one is no adapter.
    """
    wanted = [_wanted(name, folder, model, separator) for name, folder in _named(adapters)]
    _check_together(wanted, model)
    if wanted:
        return Plan(wanted[0].settings, wanted, wanted[0].labels)
    if model is None:
        raise ConfigError("no adapter and no model are given; name an adapter folder, or a --model", field="adapter")
    settings = settings_of(Path(model), None, None, separator)
    return Plan(settings if task is None else settings.model_copy(update={"task": task}), [])


def load_several(plan: Plan) -> Several:
    """Load the base once, and every adapter onto it."""
    from deltatune.model import PeftModel

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_base(plan.settings, plan.labels, device)
    whole: Any = loaded.model.to(device)
    tokenizers: dict[str, Any] = {}
    for one in plan.adapters:
        if not isinstance(whole, PeftModel):
            whole = PeftModel.from_pretrained(whole, one.folder, adapter_name=one.name)
        else:
            whole.load_adapter(one.folder, one.name)
        tokenizers[one.name] = own_tokenizer(Path(one.folder)) or loaded.tokenizer
    whole = whole.to(device).eval()
    limit = _room(whole, loaded.positions)

    def ready(tokenizer: Any, settings: TrainSettings, labels: Labels | None) -> Ready:
        lengths = {
            "max_length": min(settings.max_length, limit),
            "max_target_length": within(settings.max_target_length, limit),
        }
        return make_ready(whole, tokenizer, settings.model_copy(update=lengths), labels)

    as_first = next(iter(tokenizers.values()), loaded.tokenizer)  # the base is asked as the first adapter is
    readies = {BASE: ready(as_first, plan.settings, plan.labels)}
    readies |= {one.name: ready(tokenizers[one.name], one.settings, one.labels) for one in plan.adapters}
    return Several(readies, {one.name: one.folder for one in plan.adapters})


def _room(model: Any, positions: int | None) -> int:
    """Tokens that fit beside the virtual tokens of any adapter: the same for all, so that all read the same rows."""
    configs = getattr(model, "peft_config", {}).values()
    taken = [
        int(config.length) for config in configs if getattr(METHODS[config.peft_type].graft, "takes_positions", False)
    ]
    return sys.maxsize if positions is None else positions - max(taken, default=0)


def _wanted(name: str, folder: str, model: str | None, separator: str | None) -> Wanted:
    config: PeftConfig | None = adapter_config(folder)
    if config is None:
        raise ConfigError(
            f"{folder} is a model and no adapter; name adapters, and their base with --model",
            field="adapter",
            found=folder,
        )
    settings = settings_of(Path(folder), config, model, separator)
    return Wanted(name, folder, settings, labels_of(Path(folder), settings, folder))


def _named(adapters: Sequence[str]) -> list[tuple[str, str]]:
    """(name, folder) of each; names that would stand twice are numbered."""
    found: list[tuple[str, str]] = []
    for text in adapters:
        name, equals, folder = text.partition("=")
        if not equals or "/" in name or Path(text).exists():
            name, folder = Path(text).resolve().name if Path(text).exists() else text.rpartition("/")[2], text
        plain = name = (name or "adapter").replace(".", "-")  # names of adapters are parts of module paths
        number = 2
        while name == BASE or name in [there for there, _ in found]:
            name, number = f"{plain}-{number}", number + 1
        found.append((name, folder))
    return found


def _check_together(wanted: Sequence[Wanted], model: str | None) -> None:
    if not wanted:
        return
    first = wanted[0]
    for one in wanted[1:]:
        pairs: list[tuple[str, object, object]] = [("task", first.settings.task, one.settings.task)]
        if model is None:
            bases = first.settings.model_name_or_path, one.settings.model_name_or_path
            pairs.append(("model_name_or_path", *bases))
        pairs.append(("labels", first.labels and first.labels.names, one.labels and one.labels.names))
        for field_name, ours, theirs in pairs:
            if ours != theirs:
                way_out = (
                    "name their base with --model" if field_name == "model_name_or_path" else "ask them one by one"
                )
                raise ConfigError(
                    f"{one.name} and {first.name} do not belong together: {field_name} is {theirs!r} and {ours!r}; "
                    f"{way_out}",
                    field=field_name,
                    found=theirs,
                    expected=ours,
                )
