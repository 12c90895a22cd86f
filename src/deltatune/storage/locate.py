"""Where a file of an adapter is: in a local folder, or in a repository of the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deltatune.errors import FormatError, UnsafeError


def locate(name_or_path: str | Path, filename: str, subfolder: str | None = None, **hub: Any) -> Path:
    """The local path of a file; a name of the form `owner/name` that is no local folder is looked up on the hub.

    Raises:
        FormatError: There is no such file.
        UnsafeError: The subfolder leads out of the folder.
    """
    root = Path(name_or_path)
    folder = root / subfolder if subfolder else root
    if subfolder and not folder.resolve().is_relative_to(root.resolve()):
        raise UnsafeError(f"subfolder {subfolder!r} leads out of {root}", field="subfolder", path=str(root))
    if root.is_dir():
        if (folder / filename).is_file():
            return folder / filename
        raise FormatError(f"{folder} has no {filename}; it is not an adapter folder", path=str(folder / filename))
    if root.is_file():
        raise FormatError(f"{root} is a file; give the folder that holds {filename}", path=str(root))
    if _looks_local(str(name_or_path)):
        raise FormatError(f"{root} does not exist; expected a folder with {filename}", path=str(root))
    return _from_hub(str(name_or_path), filename, subfolder, hub)


def _looks_local(name: str) -> bool:
    return name.count("/") != 1 or name.startswith((".", "/", "~")) or "\\" in name


def _from_hub(name: str, filename: str, subfolder: str | None, hub: dict[str, Any]) -> Path:
    import inspect

    from huggingface_hub import hf_hub_download

    known = {key: value for key, value in hub.items() if key in inspect.signature(hf_hub_download).parameters}
    try:
        return Path(hf_hub_download(name, filename, subfolder=subfolder, **known))
    except Exception as error:  # the hub's client raises many kinds
        raise FormatError(
            f"{name!r} is neither a local folder nor a repository with {filename} that can be reached "
            f"({type(error).__name__}); check the name or the path",
            path=name,
        ) from error
