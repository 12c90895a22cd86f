"""What the laws of prompts range over: every method of the registry that acts outside of single layers.

Each with each of its options, on a decoder, an encoder with a classifier, and an encoder-decoder. Nothing here knows a
method. Sizes are set by the names of the fields that a config has; every option is switched, one at a time, and kept
where config and model allow it.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deltatune import METHODS, LoraConfig, PeftModel, get_peft_model
from deltatune.adapter import Method
from deltatune.config import PeftConfig
from deltatune.errors import PeftError
from deltatune.inject import adapter_parameters
from deltatune.prompts.config import PromptLearningConfig
from tests.prompts.models import KINDS, bare, batch

BASES = ("llama", "bert", "t5")
PROMPT_METHODS: dict[str, Method] = {method.name: method for method in METHODS.values() if method.graft is not None}
_TOKENS = [9, 33, 12, 40]


@functools.cache
def _experts() -> dict[str, str]:
    """Folders of two trained adapters of the first base, for methods that are made of others."""
    root, found = Path(tempfile.mkdtemp()), {}
    for index, names in enumerate((["q_proj", "o_proj"], ["q_proj", "up_proj"])):
        torch.manual_seed(index)
        config = LoraConfig(r=2, target_modules=names, init_lora_weights=False)
        get_peft_model(bare(BASES[0]), config).save_pretrained(root / str(index))
        found[str(index)] = str(root / str(index))
    return found


# What a config needs before it means anything, by the field's name; functions are called when a method has the field.
_SIZES: dict[str, Any] = {
    "num_virtual_tokens": 3, "adapter_len": 3, "adapter_layers": 2, "num_tasks": 2, "num_ranks": 2,
    "cpt_token_ids": _TOKENS, "cpt_mask": [1] * 4, "cpt_tokens_type_mask": [1, 2, 3, 4], "adapters": _experts,
}  # fmt: skip
# Values for options that are no switches, by the option's name.
_FURTHER: dict[str, tuple[Any, ...]] = {
    "sites": ("all", "cross"),
    "init_token_ids": (_TOKENS,),
    "token_dim": (16,),
    "encoder_hidden_size": (6,),
}
_INHERITED = {field.name for field in dataclasses.fields(PeftConfig)}
_DERIVED = {field.name for field in dataclasses.fields(PromptLearningConfig)} - {"num_virtual_tokens"}


@functools.cache
def variants(method: str) -> dict[str, dict[str, Any]]:
    """Option changed -> keyword arguments of a config; the first, "default", changes none."""
    kind = PROMPT_METHODS[method].config
    fields = {field.name: field for field in dataclasses.fields(kind)}
    sizes = {name: value() if callable(value) else value for name, value in _SIZES.items() if name in fields}
    if "cpt_token_ids" in sizes:  # which say the length themselves
        sizes.pop("num_virtual_tokens")
    found = {"default": sizes}
    for name, field in fields.items():
        for value in [] if name in _INHERITED | _DERIVED else _other_values(kind, field):
            found[f"{name}={value}"] = {**sizes, name: value}
    return found


def _other_values(kind: type[PeftConfig], field: dataclasses.Field) -> list[Any]:
    if field.name in _FURTHER:
        return list(_FURTHER[field.name])
    annotation = typing.get_type_hints(kind)[field.name]
    if annotation is bool:
        return [not field.default]
    choices = [annotation, *typing.get_args(annotation)]
    return [
        value
        for choice in choices
        if typing.get_origin(choice) is typing.Literal
        for value in typing.get_args(choice)
        if value != field.default
    ]


@dataclass(frozen=True)
class Case:
    """One method with one option set, on one model."""

    method: str
    variant: str
    base: str

    def config(self, **changes: Any) -> PeftConfig:
        arguments = {**variants(self.method)[self.variant], **changes}
        return PROMPT_METHODS[self.method].config(task_type=KINDS[self.base][1], **arguments)

    def bare(self, dtype: torch.dtype = torch.float32) -> Any:
        return bare(self.base).to(dtype)

    def model(self, dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
        """The model in evaluation mode, its prompt moved off the start."""
        base = self.bare(dtype)
        torch.manual_seed(1)
        model = get_peft_model(base, self.config(), **options)
        move(model)
        return model.eval()

    def batch(self) -> dict[str, Tensor]:
        inputs = batch(self.base)
        return {**inputs, "task_ids": torch.tensor([0, 1])} if hasattr(self.config(), "num_tasks") else inputs

    def logits(self, model: Any) -> Tensor:
        with torch.no_grad():
            return model(**self.batch()).logits

    def expected(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """What the base alone answers."""
        with torch.no_grad():
            return self.bare(dtype)(**batch(self.base)).logits


def cases(options: bool = True, bases: typing.Iterable[str] = BASES) -> list[Any]:
    return [
        pytest.param(case, id=f"{name}-{variant}-{base}")
        for name in PROMPT_METHODS
        for variant in (variants(name) if options else ("default",))
        for base in (bases if variant == "default" else _first_possible(name, variant))
        if _possible(case := Case(name, variant, base))
    ]


def _first_possible(name: str, variant: str) -> list[str]:
    """One model for an option: the first that takes it."""
    return [base for base in BASES if _possible(Case(name, variant, base))][:1]


@functools.cache
def _possible(case: Case) -> bool:
    """An option may be refused; what a method does by default must work on the decoder."""
    try:
        get_peft_model(case.bare(), case.config())
    except PeftError:
        if (case.variant, case.base) == ("default", BASES[0]):
            raise
        return False
    return True


def move(model: PeftModel, name: str = "default", scale: float = 0.5, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.prompt_encoder[name].parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def adapters(model: PeftModel, name: str = "default") -> list[Tensor]:
    """What an adapter may train: its encoder, what it has in layers, and modules of the base that it trains whole."""
    return [*model.prompt_encoder[name].parameters(), *adapter_parameters(model.get_base_model(), name)]
