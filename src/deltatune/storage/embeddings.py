"""Embeddings of a base whose vocabulary was changed after it was loaded: in an adapter's file, and back.

The new rows are in no file of the base, so the adapter would be lost without them. The network is never asked: what
the vocabulary was is read off the base's own folder or the hub's local cache.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.errors import ConfigError, MismatchError, PeftError, UnsafeError
from deltatune.notice import warn
from deltatune.state_dict import ROOT
from deltatune.storage.fingerprint import base_parameters
from deltatune.storage.locate import is_repository

Option = bool | str  # True, False or "auto": where the vocabulary was changed


def saved_embeddings(model: nn.Module, config: Any, asked: Option, known: Collection[str], root: str = ROOT) -> dict:
    """File key -> tensor of the embeddings that belong into an adapter's file.

    Args:
        known: Keys that the file has anyway (an embedding trained whole).
    """
    if not wanted(model, config, asked):
        return {}
    found = {root + path: tensor for path, tensor in _embeddings(model)}
    if not found:
        warn(
            f"save_embedding_layers={asked!r}: {type(model).__name__} does not say which its embeddings are; none saved"
        )
    return {key: tensor for key, tensor in found.items() if key not in known}


def wanted(model: nn.Module, config: Any, asked: Option, option: str = "save_embedding_layers") -> bool:
    if asked not in (True, False, "auto"):
        raise ConfigError(f"{option}={asked!r} is not known, expected True, False or 'auto'", field=option, found=asked)
    return resized(model, config) if asked == "auto" else bool(asked)


def resized(model: nn.Module, config: Any) -> bool:
    """Whether the vocabulary differs from that of the base's own files; False where those are not on this machine."""
    own = _vocabulary(getattr(model, "config", None))
    name = getattr(config, "base_model_name_or_path", None) or model.__dict__.get("name_or_path")
    recorded = _recorded(name, getattr(config, "revision", None)) if own else None
    return recorded is not None and recorded != own


def _vocabulary(config: Any) -> int | None:
    if isinstance(config, dict):
        text = config.get("text_config")
        return config.get("vocab_size") or (_vocabulary(text) if isinstance(text, dict) else None)
    text = getattr(config, "get_text_config", lambda: config)
    return getattr(text(), "vocab_size", None)


def _recorded(name: str | None, revision: str | None) -> int | None:
    from deltatune.config import read_json

    file = _config_file(name, revision) if name else None
    if file is None:
        return None
    try:
        return _vocabulary(read_json(file))
    except PeftError:  # whatever it is, it does not say
        return None


def _config_file(name: str, revision: str | None) -> Path | None:
    local = Path(name) / "config.json"
    if os.path.isfile(local):  # whatever the name is, a question and no error
        return local
    if not is_repository(name) and not is_repository(f"owner/{name}"):
        return None
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    found = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(found) if isinstance(found, str) else None


def _embeddings(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Keys below the root, as PEFT writes them, and values of the weights of input and output embedding."""
    ends = _ends(model)
    for name, tensor in base_parameters(model):
        if id(tensor) in ends:
            yield (name if ends[id(tensor)] else name.replace(".weight", ".base_layer.weight")), tensor


def _ends(model: nn.Module) -> dict[int, bool]:
    """Parameters of both, by id, and whether their layer is bare."""
    from deltatune.copies import TrainedCopies
    from deltatune.layer import AdaptedLayer

    found = {}
    for get in ("get_input_embeddings", "get_output_embeddings"):
        try:
            layer: nn.Module | None = getattr(model, get, lambda: None)()
        except NotImplementedError:  # how transformers says that images and sound are no tokens
            layer = None
        adapted = isinstance(layer, AdaptedLayer)
        if isinstance(layer, AdaptedLayer):
            layer = layer.base_layer
        elif isinstance(layer, TrainedCopies):
            layer = layer.original_module
        if layer is not None:
            found |= {id(parameter): not adapted for parameter in layer.parameters(recurse=False)}
    return found


class Replacements:
    """Embeddings of a file on their way into the base.

    Args:
        tensors: The file's; what is here of them is taken out.
        known: Keys that the adapter itself expects.
        asked: Whether the base's may be replaced; "auto": if its vocabulary was changed on this machine as well.
        refuse: Raise for those that must not; otherwise they stay among the rest.

    Raises:
        MismatchError: An embedding of another size.
        UnsafeError: One that differs from the base's, which nobody has allowed to replace; any other
            tensor of the base.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Any,
        tensors: dict[str, Tensor],
        known: Collection[str],
        asked: Option,
        source: str,
        root: str = ROOT,
        refuse: bool = True,
    ) -> None:
        known_all = tensors.keys() <= set(known)  # as nearly always; then nothing has to be looked up in the base
        base = {} if known_all else {root + name: tensor for name, tensor in base_parameters(model)}
        ends = _ends(model)
        self.rest: dict[str, Tensor] = {}
        self.found: list[tuple[Tensor, Tensor]] = []
        for key, tensor in tensors.items():
            present = None if key in known else base.get(key.replace(".base_layer.", "."))
            if present is not None and ".base_layer." not in key and id(present) not in ends and refuse:
                raise UnsafeError(
                    f"{source}: surplus tensor {key} would overwrite the base model, and no config asks for it; "
                    "no adapter may, unless modules_to_save names the module",
                    path=source,
                    key=key,
                    found=tuple(tensor.shape),
                )
            if present is None or (".base_layer." not in key and id(present) not in ends):
                self.rest[key] = tensor
            elif _same(present, tensor):
                continue
            elif present.shape == tensor.shape and wanted(model, config, asked, "load_embedding_layers"):
                self.found.append((present, tensor))
            elif refuse:
                raise _refused(key, tensor, present, source)
            else:
                self.rest[key] = tensor

    @torch.no_grad()
    def put(self) -> None:
        for present, tensor in self.found:
            present.copy_(tensor)


def _same(present: Tensor, tensor: Tensor) -> bool:
    return present.shape == tensor.shape and torch.equal(present.cpu(), tensor.to(present.dtype).cpu())


def _refused(key: str, tensor: Tensor, present: Tensor, source: str) -> PeftError:
    if present.shape != tensor.shape:
        return MismatchError(
            f"{source}: {key} has shape {tuple(tensor.shape)}, this base's {tuple(present.shape)}; call "
            f"resize_token_embeddings({len(tensor)}) on the base first",
            path=source,
            key=key,
            found=tuple(tensor.shape),
            expected=tuple(present.shape),
        )
    return UnsafeError(
        f"{source}: {key} is an embedding that differs from this base's; load the base it was saved with, or pass "
        "load_embedding_layers=True to replace the base's by it",
        path=source,
        key=key,
    )
