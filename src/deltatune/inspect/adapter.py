"""An adapter folder: method, config, tensors, norms, sizes, and what is wrong with it."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltatune.config import CONFIG_NAME, PeftConfig
from deltatune.errors import IntegrityError, UnsafeError
from deltatune.inspect.origin import Origin, origin
from deltatune.inspect.problems import find_problems
from deltatune.inspect.spectrum import Spectrum, spectra
from deltatune.prompts.config import PromptLearningConfig
from deltatune.registry import METHODS
from deltatune.storage.locate import Place, place
from deltatune.storage.tensors import WEIGHTS_NAME, read_file
from deltatune.storage.weights import read_weights

ROOT = re.compile(r"^(base_model\.)?(model\.)?")


@dataclass(frozen=True)
class TensorFacts:
    name: str
    shape: tuple[int, ...]
    dtype: str
    parameters: int
    norm: float


@dataclass(frozen=True)
class GroupFacts:
    """All tensors whose names differ in layer numbers only: `encoder.block.*.layer.0.SelfAttention.q.lora_A.weight`."""

    name: str
    count: int
    shapes: list[tuple[int, ...]]
    parameters: int
    norm_least: float
    norm_most: float


@dataclass(frozen=True)
class AdapterFacts:
    """`config` holds what differs from the method's defaults; `base_facts` is there in files that deltatune wrote.

    Attributes:
        spectra: How much of its rank each layer uses, for methods with factors A and B.
        origin: The run that wrote the folder, where it left its settings there.
    """

    folder: str
    method: str
    task: str | None
    base: str | None
    base_facts: dict[str, Any] | None
    config: dict[str, Any]
    parameters: int
    file_bytes: int
    virtual_tokens: int | None
    ranks: list[int]
    tensors: list[TensorFacts]
    groups: list[GroupFacts]
    spectra: list[Spectrum]
    origin: Origin | None
    problems: list[str]


@dataclass(frozen=True)
class Opened:
    """What an adapter folder holds, read.

    Attributes:
        facts: Those of the header; None where another tool wrote the file.
        problems: What is wrong with config and file as such.
    """

    where: Place
    config: Any
    weights: Path
    tensors: dict[str, Tensor]
    facts: dict[str, Any] | None
    problems: list[str]

    @property
    def method(self) -> str:
        return str(getattr(self.config.peft_type, "value", None))


def opened(name_or_path: str | Path) -> Opened:
    """Read an adapter folder (or a hub repository); what can be read all the same is a problem, not an error.

    Raises:
        FormatError: It has no config or no whole tensor file.
    """
    where = place(name_or_path)
    config_file = where.find(CONFIG_NAME)
    if config_file is None:
        raise where.missing(CONFIG_NAME)
    problems: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = PeftConfig.from_file_dict(PeftConfig.from_json_file(config_file), str(config_file))
    problems += [str(warning.message) for warning in caught]
    weights, tensors, facts = _read(where, problems)
    return Opened(where, config, weights, tensors, facts, problems)


def inspect_adapter(name_or_path: str | Path) -> AdapterFacts:
    """Read an adapter folder (or a hub repository).

    Raises:
        FormatError: It has no config or no whole tensor file. Lesser faults are listed in `problems`.
    """
    found = opened(name_or_path)
    config, tensors, facts = found.config, found.tensors, found.facts
    stem = METHODS[config.peft_type].pairs
    return AdapterFacts(
        folder=str(name_or_path),
        method=found.method,
        task=config.task_type.value if config.task_type is not None else None,  # type: ignore[union-attr]
        base=config.base_model_name_or_path,
        base_facts=(facts or {}).get("base"),
        config=_differing(config),
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        file_bytes=found.weights.stat().st_size,
        virtual_tokens=config.num_virtual_tokens if isinstance(config, PromptLearningConfig) else None,
        ranks=sorted({tensor.shape[0] for key, tensor in tensors.items() if ".lora_A" in key}),
        tensors=[_tensor(name, tensors[name]) for name in sorted(tensors, key=natural)],
        groups=_groups(tensors),
        spectra=spectra(config, tensors, stem) if stem else [],
        origin=origin(found.where, str(name_or_path)),
        problems=found.problems + find_problems(config, tensors, facts),
    )


def _read(where: Place, problems: list[str]) -> tuple[Path, dict[str, Tensor], dict[str, Any] | None]:
    """The tensors, with what loading would refuse among the problems where they can be read all the same."""
    try:
        return read_weights(where)
    except (IntegrityError, UnsafeError) as error:
        newer = where.find(WEIGHTS_NAME)
        if newer is None:
            raise
        problems.append(str(error))
        if isinstance(error, UnsafeError):
            return (newer, *read_file(newer))
        from safetensors.torch import load_file

        return newer, load_file(newer), None


def natural(name: str) -> list[Any]:
    """Sorts layer 10 after layer 9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def pattern(name: str) -> str:
    """A tensor's name without PEFT's root, layer numbers as stars."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", "." + ROOT.sub("", name)).removeprefix(".")


def norm(tensor: Tensor) -> float:
    return tensor.to(torch.float64).norm().item() if tensor.numel() else 0.0


def _tensor(name: str, tensor: Tensor) -> TensorFacts:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorFacts(name, tuple(tensor.shape), dtype, tensor.numel(), norm(tensor))


def _groups(tensors: dict[str, Tensor]) -> list[GroupFacts]:
    members: dict[str, list[Tensor]] = defaultdict(list)
    for name in sorted(tensors, key=natural):
        members[pattern(name)].append(tensors[name])
    made = []
    for name, group in members.items():
        norms = [norm(tensor) for tensor in group]
        shapes = sorted({tuple(tensor.shape) for tensor in group})
        total = sum(tensor.numel() for tensor in group)
        made.append(GroupFacts(name, len(group), shapes, total, min(norms), max(norms)))
    return made


def _differing(config: PeftConfig) -> dict[str, Any]:
    """Fields whose value is not the default, as JSON holds them."""
    defaults = {}
    for field in dataclasses.fields(config):
        if field.default is not dataclasses.MISSING:
            defaults[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            defaults[field.name] = field.default_factory()
    told = {"peft_type", "task_type", "base_model_name_or_path", "inference_mode", "peft_version"}
    values = config.to_file_dict()
    return {
        key: value for key, value in sorted(values.items()) if key not in told and value != defaults.get(key, object())
    }
