"""deltatune under PEFT's name: after `import deltatune.as_peft`, every `import peft` of the process is deltatune.

    python -m deltatune.as_peft program.py --its --arguments      # a program as it is, or -m package.module
    import deltatune.as_peft                                      # or this, before anything imports peft

transformers, TRL, accelerate, sentence-transformers and diffusers import `peft` themselves, and so get deltatune too.
Whether PEFT is installed does not matter; `importlib.metadata.version("peft")` answers the version whose names and
files deltatune speaks. `uninstall()` takes the hook away again.
"""

from __future__ import annotations

import sys

from deltatune import manners
from deltatune.as_peft.finder import FINDER, ROOT, ours
from deltatune.errors import StateError
from deltatune.kernels import low_rank
from deltatune.prompts import config as prompts


def install() -> None:
    """Make `peft` deltatune, from here on. A second call changes nothing.

    Raises:
        StateError: PEFT itself has been imported, or transformers has found out that there is none; both keep what they
            know for the life of the process.
    """
    if FINDER in sys.meta_path:
        return
    if ROOT in sys.modules and not ours(ROOT):
        found = getattr(sys.modules[ROOT], "__file__", None)
        raise StateError(
            f"PEFT itself has been imported in this process already (from {found}); "
            "import deltatune.as_peft before anything that imports peft",
            found=found,
        )
    sys.meta_path.insert(0, FINDER)
    if not _believed():
        sys.meta_path.remove(FINDER)
        raise StateError(
            "transformers has been imported in this process and remembers that there is no peft; "
            "import deltatune.as_peft before transformers",
            field="transformers",
            found="imported",
            expected="not imported yet",
            hint="import deltatune.as_peft first",
        )
    _speak(as_peft=True)


def uninstall() -> None:
    """Take the hook and its modules away. Programs that have imported names keep them."""
    _speak(as_peft=False)
    if FINDER in sys.meta_path:
        sys.meta_path.remove(FINDER)
    for name in [name for name in sys.modules if name.split(".")[0] == ROOT and ours(name)]:
        del sys.modules[name]


def _speak(as_peft: bool) -> None:
    """Let what is left open mean what PEFT means by it, so that programs get the numbers that they got with PEFT."""
    low_rank.own_dropout = not as_peft  # its own masks would be others under the same seed
    manners.as_peft = as_peft
    prompts.usual_layout = "peft" if as_peft else "native"


def _believed() -> bool:
    """Whether transformers, if it is loaded, would import `peft`: it asks once and keeps the answer."""
    module = sys.modules.get("transformers.utils.import_utils")
    return module is None or bool(module.is_peft_available())


install()
