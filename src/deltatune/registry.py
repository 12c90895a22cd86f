"""Every method there is: one line each, and `register_method` for methods of other packages.

A method's file is imported when it is first asked for: a program that uses one reads one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from importlib import import_module
from typing import Any

from deltatune.adapter import Method
from deltatune.config import PeftType
from deltatune.errors import ConfigError

# peft_type -> the module with its `METHOD`
MODULES = {
    # low-rank and other products added to the weight
    "LORA": "deltatune.methods.lora",
    "ADALORA": "deltatune.methods.adalora",
    "LOHA": "deltatune.methods.loha",
    "LOKR": "deltatune.methods.lokr",
    "HIRA": "deltatune.methods.hira",
    "GRALORA": "deltatune.methods.gralora",
    "MISS": "deltatune.methods.miss",
    "DELORA": "deltatune.methods.delora",
    "GLORA": "deltatune.methods.glora",
    # with tensors that layers share
    "VERA": "deltatune.methods.vera",
    "PVERA": "deltatune.methods.pvera",
    "RANDLORA": "deltatune.methods.randlora",
    "VBLORA": "deltatune.methods.vblora",
    "UNILORA": "deltatune.methods.unilora",
    "TINYLORA": "deltatune.methods.tinylora",
    "FROD": "deltatune.methods.frod",
    # spectra, functions of the weight
    "C3A": "deltatune.methods.c3a",
    "FOURIERFT": "deltatune.methods.fourierft",
    "WAVEFT": "deltatune.methods.waveft",
    "PEANUT": "deltatune.methods.peanut",
    # entries and subspaces of the weight
    "SHIRA": "deltatune.methods.shira",
    "SUPERTUNING": "deltatune.methods.supertuning",
    "DIFF_PRUNING": "deltatune.methods.diff_pruning",
    "ADAMSS": "deltatune.methods.adamss",
    "OSF": "deltatune.methods.osf",
    "PSOFT": "deltatune.methods.psoft",
    "DEFT": "deltatune.methods.deft",
    # rotations and scales
    "OFT": "deltatune.methods.oft",
    "BOFT": "deltatune.methods.boft",
    "HRA": "deltatune.methods.hra",
    "ROAD": "deltatune.methods.road",
    "IA3": "deltatune.methods.ia3",
    # biases, norms, rows
    "BITFIT": "deltatune.methods.bitfit",
    "BEFT": "deltatune.methods.beft",
    "LN_TUNING": "deltatune.methods.ln_tuning",
    "TRAINABLE_TOKENS": "deltatune.methods.trainable_tokens",
    # outputs of layers and blocks
    "BOTTLENECK": "deltatune.outputs.bottleneck",
    "COMPACTER": "deltatune.outputs.compacter",
    "REFT": "deltatune.outputs.reft",
    "POLY": "deltatune.outputs.poly",
    "LILY": "deltatune.outputs.lily",
    # keys and values, inputs
    "PREFIX_TUNING": "deltatune.prompts.prefix",
    "CARTRIDGE": "deltatune.prompts.cartridge",
    "ADAPTION_PROMPT": "deltatune.prompts.adaption_prompt",
    "PROMPT_TUNING": "deltatune.prompts.prompt_tuning",
    "P_TUNING": "deltatune.prompts.p_tuning",
    "MULTITASK_PROMPT_TUNING": "deltatune.prompts.multitask",
    "CPT": "deltatune.prompts.cpt",
    # beside the model
    "SHADOW": "deltatune.shadow.graft",
    "XLORA": "deltatune.xlora.graft",
}


class Methods(MutableMapping[PeftType | str, Method]):
    """Methods by `peft_type`; those of `MODULES` come when they are asked for, going through all of them brings all."""

    def __init__(self, entries: Mapping[str, str | Method]) -> None:
        self.entries: dict[str, str | Method] = dict(entries)

    def __copy__(self) -> Methods:
        return Methods(self.entries)

    def __getitem__(self, name: PeftType | str) -> Method:
        key = _text(name)
        entry = self.entries[key]
        if isinstance(entry, str):
            entry = self.entries[key] = import_module(entry).METHOD
        return entry

    def __setitem__(self, name: PeftType | str, method: Method) -> None:
        self.entries[_text(name)] = method

    def __delitem__(self, name: PeftType | str) -> None:
        del self.entries[_text(name)]

    def __contains__(self, name: Any) -> bool:
        return isinstance(name, str) and _text(name) in self.entries

    def __iter__(self) -> Iterator[PeftType | str]:
        for name in list(self.entries):
            yield PeftType(name) if name in PeftType.__members__ else name

    def __len__(self) -> int:
        return len(self.entries)


def _text(name: PeftType | str) -> str:
    return name.value if isinstance(name, PeftType) else name


METHODS = Methods(MODULES)


def register_method(method: Method) -> Method:
    """Add a method of another package: from now on its configs, files and command line names are known.

    Its `peft_type` is a new upper-case name, which its config sets as its `peft_type` too.

    Raises:
        ConfigError: The name is taken, or is not upper-case.
    """
    name = str(getattr(method.peft_type, "value", method.peft_type))
    if name != name.upper() or not name.isidentifier():
        raise ConfigError(
            f"register_method: peft_type={name!r} has to be an upper-case identifier; use {name.upper()!r}",
            field="peft_type",
            found=name,
        )
    if name in METHODS and METHODS[name] is not method:
        raise ConfigError(
            f"register_method: peft_type={name!r} is a method already; choose another name",
            field="peft_type",
            found=name,
        )
    METHODS[method.peft_type] = method
    return method
