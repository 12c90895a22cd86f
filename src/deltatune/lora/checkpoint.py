"""`Checkpoint`: the weights of a model in safetensors, in one file or in shards, read one by one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from deltatune.config import read_json
from deltatune.errors import FormatError, MismatchError

FILE = "model.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """Which file has which tensor, and how the names of a model without its head begin in it."""

    place: Path
    files: dict[str, Path]
    prefix: str

    @classmethod
    def of(cls, model: Any, path: str | None) -> Checkpoint:
        """That of a file or folder; of the model's own, if it is local, where none is named.

        Raises:
            FormatError: Nothing is there.
        """
        place = Path(path) if path is not None else _own(model)
        file = place if place.suffix == ".safetensors" else place / FILE
        prefix = getattr(model, "base_model_prefix", "") or ""
        index = file.with_name(f"{FILE}.index.json")
        if file.is_file():
            with safe_open(file, "pt") as opened:
                return cls(file, dict.fromkeys(opened.keys(), file), prefix)
        if index.is_file():
            shards = read_json(index).get("weight_map", {})
            return cls(index, {key: index.parent / Path(name).name for key, name in shards.items()}, prefix)
        raise FormatError(f"{file} is not there, nor {index.name}; name the model's safetensors file", path=str(file))

    def key(self, name: str) -> str:
        """The key of a parameter, with or without the prefix.

        Raises:
            MismatchError: There is none.
        """
        for key in (name, name.removeprefix(f"{self.prefix}."), f"{self.prefix}.{name}"):
            if key in self.files:
                return key
        raise MismatchError(f"{self.place} holds no {name}; was the base loaded from there?", path=str(self.place))

    def shape(self, key: str) -> tuple[int, ...]:
        with safe_open(self.files[key], "pt") as opened:
            return tuple(opened.get_slice(key).get_shape())

    def tensor(self, key: str) -> Tensor:
        with safe_open(self.files[key], "pt") as opened:
            return opened.get_tensor(key)


def _own(model: Any) -> Path:
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    if not name:
        raise FormatError(
            "replace_lora_weights_loftq: the model does not say where it comes from; pass model_path",
            field="model_path",
            expected="the folder or repository of the base",
        )
    if Path(name).exists():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError) as error:
        raise FormatError(
            f"replace_lora_weights_loftq: the files of {name!r} are not on this machine; pass model_path", path=name
        ) from error
