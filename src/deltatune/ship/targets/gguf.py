"""llama.cpp: a GGUF adapter, its tensors called and ordered as llama.cpp keeps the base's.

The base that it goes onto is the model as convert_hf_to_gguf.py writes it. That script turns the rows of queries and
keys of some architectures, for another form of rotary positions; B has to be turned alike.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltatune.errors import ConversionError
from deltatune.functional import set_peft_model_state_dict
from deltatune.generate.load import Ready
from deltatune.lora.config import LoraConfig
from deltatune.ship.targets.llama_layout import Architecture, architecture, library, names, turned
from deltatune.ship.targets.target import Target
from deltatune.ship.uniform import A, B, uniform
from deltatune.state_dict import ROOT
from deltatune.tasks import get_peft_model

FILE = "adapter.gguf"


def write(ready: Ready, adapter: str, folder: Path) -> None:
    """One file: `lora_a` (rank, in) and `lora_b` (out, rank) of every layer, and alpha = rank."""
    model: Any = ready.model
    base = model.get_base_model()
    kind = architecture(base)
    config, tensors = uniform(model)
    _refuse(tensors, names(kind, base))
    write_file(folder / FILE, kind, config, tensors, base)


def write_file(file: Path, kind: Architecture, config: LoraConfig, tensors: dict[str, Tensor], base: Any) -> None:
    gguf, called = library(), names(kind, base)
    writer = gguf.GGUFWriter(str(file), gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[kind.name]])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(config.lora_alpha))
    writer.add_string("general.name", str(config.base_model_name_or_path or type(base).__name__))
    for key in sorted(key for key in tensors if key.endswith(A)):
        layer = key.removeprefix(ROOT).removesuffix(A)
        up = turned(layer, tensors[key.removesuffix(A) + B], kind, base)
        for ending, tensor in (("lora_a", tensors[key]), ("lora_b", up)):
            writer.add_tensor(f"{called[layer]}.{ending}", tensor.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_file(file: Path, kind: Architecture, base: Any) -> tuple[float, dict[str, Tensor]]:
    """alpha, and the tensors under the keys of an adapter's file, in the order of the base's rows."""
    gguf = library()
    reader = gguf.GGUFReader(str(file))
    held = {value: path for path, value in names(kind, base).items()}
    alpha = float(reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents())
    found = {}
    for tensor in reader.tensors:
        name, _, ending = tensor.name.rpartition(".")
        values = torch.from_numpy(tensor.data.copy())
        if ending == "lora_b":
            values = turned(held[name], values, kind, base, back=True)
        found[f"{ROOT}{held[name]}" + {"lora_a": A, "lora_b": B}[ending]] = values
    return alpha, found


def read_back(folder: Path, ready: Ready) -> Ready:
    """The file on a fresh copy of the base, as LoRA."""
    model: Any = ready.model
    kind = architecture(model.get_base_model())
    alpha, tensors = read_file(folder / FILE, kind, model.get_base_model())
    base = model.unload()
    rank = next(iter(tensors.values())).shape[0]
    layers = sorted(key.removeprefix(ROOT).removesuffix(A) for key in tensors if key.endswith(A))
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers)
    made: Any = get_peft_model(base, config)
    set_peft_model_state_dict(made, tensors)
    return replace(ready, model=made.eval())


def _refuse(tensors: dict[str, Tensor], known: dict[str, str]) -> None:
    strange = [key for key in tensors if not key.endswith((A, B))]
    if strange:
        raise ConversionError(
            f"a GGUF adapter holds factors of linear layers alone, this one has {strange[0].removeprefix(ROOT)} too; "
            "`deltatune merge` makes a plain model of it",
            key=strange[0],
        )
    unknown = [key for key in tensors if key.endswith(A) and key.removeprefix(ROOT).removesuffix(A) not in known]
    if unknown:
        raise ConversionError(f"llama.cpp has no weight for {unknown[0].removeprefix(ROOT)}", key=unknown[0])


def use(out: str, ready: Ready) -> str:
    return f"llama-cli -m BASE.gguf --lora {out}/{FILE}"


TARGET = Target(write, use, carries=False, read_back=read_back)
