"""Mutated adapter folders: bytes, header, JSON, tensors, files that are missing, surplus or no files."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import deltatune
from deltatune import PeftModel, get_peft_model
from deltatune.config import CONFIG_NAME
from deltatune.errors import PeftError
from deltatune.storage.tensors import MARKER, WEIGHTS_NAME
from deltatune.storage.weights import ZIPPED_NAME
from scripts.fuzzing.isolated import WrongError
from scripts.fuzzing.values import ODD, as_text, mutated, spoilt
from tests.core.tiny import tiny
from tests.faults.folders import state

GOOD: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"r": 2}),
    "whole": ("LoraConfig", {"r": 2, "modules_to_save": ["norm"], "bias": "lora_only"}),
    "dora": ("LoraConfig", {"r": 2, "use_dora": True, "rank_pattern": {"layers.0": 3}}),
    "ia3": ("IA3Config", {}),
    "vera": ("VeraConfig", {"r": 2, "target_modules": ["q_proj"]}),
    "prefix": ("PrefixTuningConfig", {"num_virtual_tokens": 2}),
    "prompt": ("PromptTuningConfig", {"num_virtual_tokens": 2}),
}


@dataclass
class Case:
    """A folder, the same folder's content before it is used, and what was done to it."""

    folder: Path
    trap: Path
    story: str


class Target:
    """Loads a folder onto a model: the base stays as it is, and no trap snaps."""

    def __init__(self, room: Path) -> None:
        self.room, self.base = room, tiny("llama")
        self.weights = {name: tensor for name, (tensor, _) in state(self.base).items()}
        self.starts = [room / "good" / name for name in _good(room / "good")]

    def make(self, number: int) -> Case:
        draw = random.Random(number)
        start = draw.choice(self.starts)
        folder, trap = self.room / f"case{number}", self.room / f"trap{number}"
        shutil.copytree(start, folder)
        story = [start.name]
        for _ in range(draw.choice([1, 1, 1, 2, 3])):
            change = draw.choice(CHANGES)
            try:
                story.append(f"{change.__name__} {change(folder, draw, trap) or ''}")
            except Exception:
                story.append(f"({change.__name__} was not possible)")  # on what an earlier change has left
            if change is no_file:  # a further one would itself wait for the pipe, or read the device to no end
                break
        return Case(folder, trap, "; ".join(story))

    def use(self, case: Case) -> None:
        before = _content(case.folder)
        try:
            model = PeftModel.from_pretrained(self.base, case.folder)
        except PeftError:
            self._look(case, before, self.base)
            raise
        self._look(case, before, model.get_base_model())

    def _look(self, case: Case, before: dict[str, bytes], base: Any) -> None:
        if case.trap.exists():
            raise WrongError("code of the folder has run")
        if _content(case.folder) != before:
            raise WrongError("loading has changed the folder")
        for name, tensor in base.named_parameters():
            own = self.weights.get(name.replace(".base_layer.", ".").replace(".original_module.", "."))
            if own is not None and not torch.equal(tensor, own):
                raise WrongError(f"{name} of the base has changed")

    def clear(self, case: Case) -> None:
        shutil.rmtree(case.folder, ignore_errors=True)


def _good(room: Path) -> list[str]:
    """Folders to begin with: of ours, as another tool would have written them, and in the older format."""
    for name, (kind, options) in GOOD.items():
        config = getattr(deltatune, kind)(task_type="CAUSAL_LM", **options)
        model = get_peft_model(tiny("llama"), config)
        model.save_pretrained(room / name)
        shutil.copytree(room / name, room / f"{name} of others")
        file = room / f"{name} of others" / WEIGHTS_NAME
        save_file(load_file(file), file)
        if name != "prefix":
            model.save_pretrained(room / f"{name} as bin", safe_serialization=False)
    return sorted(path.name for path in room.iterdir())


def _content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and not path.is_symlink()}


def _weights(folder: Path) -> Path:
    return next(folder / name for name in (WEIGHTS_NAME, ZIPPED_NAME) if (folder / name).is_file())


# ------------------------------------------------------------------------------------------------------------ changes


def any_bytes(folder: Path, draw: random.Random, trap: Path) -> str:
    file = draw.choice(sorted(path for path in folder.iterdir() if path.is_file()))
    content, told = spoilt(file.read_bytes(), draw)
    file.write_bytes(content)
    return f"{file.name} {told}"


def config_values(folder: Path, draw: random.Random, trap: Path) -> str:
    file = folder / CONFIG_NAME
    values, told = mutated(json.loads(file.read_text()), draw)
    content, how = as_text(values, draw)
    file.write_bytes(content)
    return f"{told} ({how})"


def header_table(folder: Path, draw: random.Random, trap: Path) -> str:
    table, body = _opened(folder / WEIGHTS_NAME)
    table, told = mutated(table, draw, list(table))
    content, how = as_text(table, draw)
    _write(folder / WEIGHTS_NAME, content, body, draw)
    return f"{told} ({how})"


def header_facts(folder: Path, draw: random.Random, trap: Path) -> str:
    table, body = _opened(folder / WEIGHTS_NAME)
    facts, told = mutated(json.loads(table["__metadata__"][MARKER]), draw)
    text, how = as_text(facts, draw)
    table["__metadata__"][MARKER] = text.decode(errors="replace")
    _write(folder / WEIGHTS_NAME, json.dumps(table).encode(), body, draw)
    return f"{told} ({how})"


def header_config(folder: Path, draw: random.Random, trap: Path) -> str:
    """The config in the header and its view alike, as a hostile author would write them."""
    table, body = _opened(folder / WEIGHTS_NAME)
    facts = json.loads(table["__metadata__"][MARKER])
    facts["config"], told = mutated(facts["config"], draw)
    table["__metadata__"][MARKER] = json.dumps(facts)
    _write(folder / WEIGHTS_NAME, json.dumps(table).encode(), body, draw, honest=True)
    (folder / CONFIG_NAME).write_text(json.dumps(facts["config"]))
    return told


def tensors(folder: Path, draw: random.Random, trap: Path) -> str:
    """Other tensors under a header that fits them."""
    file = _weights(folder)
    found = load_file(file) if file.name == WEIGHTS_NAME else torch.load(file, weights_only=True)
    key = draw.choice(sorted(found))
    kind = draw.choice(
        ["drop", "rename", "base", "surplus", "nan", "huge", "int", "bool", "complex", "half", "shape", "empty",
         "scalar", "other adapter", "swap", "many", "float8"]
    )  # fmt: skip
    tensor = found[key]
    if kind == "drop":
        del found[key]
    elif kind == "rename":
        found[draw.choice([key[1:], key.upper(), key.replace("model.", "", 1), "é" + key, str(draw.choice(ODD))])] = (
            found.pop(key)
        )
    elif kind == "base":
        found["base_model.model.model.embed_tokens.weight"] = torch.zeros(61, 16)
        found["base_model.model.model.layers.0.self_attn.q_proj.weight"] = torch.zeros(16, 16)
    elif kind == "surplus":
        found["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"] = torch.ones(2, 16)
    elif kind == "other adapter":
        found[key.replace(".weight", ".other.weight")] = tensor.clone()
    elif kind == "swap":
        other = draw.choice(sorted(found))
        found[key], found[other] = found[other].clone(), tensor.clone()
    elif kind == "many":
        found |= {f"{key}.{index}": torch.zeros(0) for index in range(5000)}
    else:
        change: dict[str, Callable[[Any], Any]] = {
            "nan": lambda t: t * float("nan"), "huge": lambda t: t * 0 + 3e38, "int": lambda t: t.int(),
            "bool": lambda t: t > 0, "complex": lambda t: t.to(torch.complex64), "half": lambda t: t.half(),
            "shape": lambda t: torch.cat([t, t]), "empty": lambda t: t[:0], "scalar": lambda t: torch.tensor(1.0),
            "float8": lambda t: t.to(torch.float8_e4m3fn),
        }  # fmt: skip
        found[key] = change[kind](tensor).contiguous()
    save_file(found, file) if file.name == WEIGHTS_NAME else torch.save(found, file)
    return f"{kind} {key}"


def no_file(folder: Path, draw: random.Random, trap: Path) -> str:
    """A file that is missing, or something else in its place."""
    file = draw.choice(sorted(path for path in folder.iterdir()))
    kind = draw.choice(["missing", "folder", "pipe", "loop", "device", "passwd", "empty", "nowhere"])
    file.unlink()
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "empty":
        file.touch()
    elif kind != "missing":
        places = {"loop": file, "device": "/dev/zero", "passwd": "/etc/passwd", "nowhere": folder / "nowhere"}
        file.symlink_to(places[kind])
    return f"{kind} {file.name}"


def surplus_file(folder: Path, draw: random.Random, trap: Path) -> str:
    """Files beside the adapter's: pickles that set off a trap, modules, templates, names that are no text."""
    names = [ZIPPED_NAME, WEIGHTS_NAME, "pytorch_model.bin", "adapter_model.pt", "__init__.py", "sitecustomize.py",
             "torch.py", "tokenizer_config.json", "chat_template.jinja", "training_args.bin", "config.json",
             "\udcff\udcfe", "a\nb", "x" * 200]  # fmt: skip
    name = draw.choice(names)
    program = f"open({str(trap)!r}, 'w').close()"
    body = draw.choice([pickle.dumps(_Trap(program)), program.encode(), b"{{ ''.__class__.__mro__ }}", b"", b"{"])
    (folder / name).write_bytes(body)
    return repr(name)


class _Trap:
    def __init__(self, program: str) -> None:
        self.program = program

    def __reduce__(self) -> Any:
        return exec, (self.program,)


CHANGES: list[Callable[[Path, random.Random, Path], str]] = [
    any_bytes, any_bytes, config_values, config_values, header_table, header_table, header_facts, header_config,
    tensors, tensors, no_file, surplus_file,
]  # fmt: skip


def _opened(file: Path) -> tuple[dict[str, Any], bytes]:
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _write(file: Path, table: bytes, body: bytes, draw: random.Random, honest: bool = False) -> None:
    length = len(table)
    if not honest and draw.random() < 0.1:
        length = draw.choice([0, 1, length - 1, length + 1, 2**32, 2**63, 2**64 - 1, 60_000_000])
    file.write_bytes(struct.pack("<Q", length) + table + body)
