"""The import hook: what `peft` is under it, with PEFT installed, absent, or imported before."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = str(Path(__file__).parents[2] / "src")


def run(code: str, *options: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *options, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": SOURCE, **environment},
    )


def printed(code: str, *options: str, **environment: str) -> str:
    done = run(code, *options, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


ASKS = """
import importlib.metadata, importlib.util
import peft
from peft.tuners.lora.layer import LoraLayer
import peft.utils.other as other
spec = importlib.util.find_spec("peft")
print(peft.LoraConfig.__module__, peft.__version__, importlib.metadata.version("peft"), spec is not None, peft.__file__)
"""


def test_peft_is_deltatune_where_peft_is_installed():
    module, version, metadata, found, file = printed("import deltatune.as_peft" + ASKS).split()
    assert module.startswith("deltatune.") and version == metadata == "0.21.2" and found == "True"
    assert "as_peft" in file


@pytest.fixture(scope="module")
def without_peft(tmp_path_factory) -> str:
    """A folder like site-packages, in which PEFT is not."""
    import torch

    here, there = Path(torch.__file__).parents[1], tmp_path_factory.mktemp("packages")
    for entry in here.iterdir():
        if not entry.name.lower().startswith("peft") and not entry.name.endswith(".pth"):
            (there / entry.name).symlink_to(entry)
    return str(there)


def test_peft_is_deltatune_where_peft_is_absent(without_peft):
    path = f"import sys; sys.path[:0] = [{SOURCE!r}, {without_peft!r}]\n"
    assert "No module named 'peft'" in run(path + "import peft", "-S").stderr
    code = path + "import deltatune.as_peft" + ASKS + "print(importlib.metadata.packages_distributions()['peft'])"
    first, last = printed(code, "-S").splitlines()
    assert first.startswith("deltatune.") and "0.21.2 0.21.2 True" in first and last == "['peft']"


def test_transformers_believes_it_where_peft_is_absent(without_peft):
    code = f"""
import sys; sys.path[:0] = [{SOURCE!r}, {without_peft!r}]
import deltatune.as_peft
from transformers import LlamaConfig, LlamaForCausalLM, Trainer
import transformers.trainer_utils as utils
from peft import LoraConfig, PeftModel, get_peft_model
sizes = dict(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
model = LlamaForCausalLM(LlamaConfig(**sizes))
model.add_adapter(LoraConfig(target_modules=["q_proj"]))
print(model.active_adapters(), utils._is_peft_model(get_peft_model(LlamaForCausalLM(model.config), LoraConfig())))
"""
    assert printed(code, "-S").splitlines()[-1] == "['default'] True"


def test_transformers_that_has_been_told_otherwise_is_refused(without_peft):
    path = f"import sys; sys.path[:0] = [{SOURCE!r}, {without_peft!r}]\n"
    code = "from transformers.utils import is_peft_available\nprint(is_peft_available())\nimport deltatune.as_peft"
    done = run(path + code, "-S")
    assert done.stdout.strip() == "False" and "StateError: transformers has been imported" in done.stderr


def test_peft_imported_before_is_refused():
    done = run("import sys, types\nsys.modules['peft'] = types.ModuleType('peft')\nimport deltatune.as_peft")
    assert done.returncode == 1 and "StateError: PEFT itself has been imported" in done.stderr


def test_what_is_not_there_is_named():
    code = """
import deltatune.as_peft
import peft
for statement in ("peft.Nothing", "from peft import Nothing", "import peft.nothing", "import peft.tuners.nothing"):
    try:
        exec(statement)
    except (AttributeError, ImportError) as error:
        print(type(error).__name__, error)
print(hasattr(peft, "Nothing"), getattr(peft, "Nothing", 0))
"""
    lines = printed(code).splitlines()
    assert lines[0].startswith("AttributeError peft.Nothing is not in deltatune")
    assert lines[1].startswith("ImportError cannot import name 'Nothing' from 'peft'") and "as_peft" in lines[1]
    assert lines[2].startswith("ModuleNotFoundError no module named 'peft.nothing': deltatune stands in")
    assert lines[3].startswith("ModuleNotFoundError no module named 'peft.tuners.nothing'")
    assert lines[4] == "False 0"


def test_the_hook_is_taken_away_again():
    code = """
import sys, deltatune.as_peft as hook
import peft
mine = peft
hook.install()  # a second time changes nothing
hook.uninstall()
import importlib.metadata, importlib.util
print(hook.FINDER in sys.meta_path, "peft" in sys.modules, importlib.util.find_spec("peft").origin)
print(importlib.metadata.distribution("peft").files is not None, mine.LoraConfig.__module__)
hook.install()
import peft
print(peft.LoraConfig is mine.LoraConfig)
"""
    lines = printed(code).splitlines()
    assert lines[0].startswith("False False ") and lines[0].endswith("peft/__init__.py")
    assert lines[1:] == ["True deltatune.lora.config", "True"]


def test_importing_the_hook_costs_torch_and_nothing_heavier():
    code = (
        "import deltatune.as_peft, sys; print([n for n in ('transformers', 'accelerate', 'numba') if n in sys.modules])"
    )
    assert printed(code) == "[]"


def test_a_program_runs_as_python_would_run_it(tmp_path):
    (tmp_path / "beside.py").write_text("name = 'beside'")
    (tmp_path / "program.py").write_text(
        "import sys, peft, beside\n"
        "class Config: pass\n"
        "import pickle; pickle.loads(pickle.dumps(Config()))\n"
        "print(__name__, sys.argv, beside.name, peft.LoraConfig.__module__)\n"
        "sys.exit(3)\n"
    )
    command = [sys.executable, "-m", "deltatune.as_peft"]
    environment = {**os.environ, "PYTHONPATH": SOURCE}
    program = str(tmp_path / "program.py")
    for arguments in ([program, "--its", "own"], ["-m", "program", "--its", "own"]):
        done = subprocess.run(
            [*command, *arguments], capture_output=True, text=True, timeout=120, cwd=tmp_path, env=environment
        )
        assert done.returncode == 3, done.stderr
        assert done.stdout.startswith("__main__ [") and done.stdout.endswith("beside deltatune.lora.config\n")
        assert "'--its', 'own']" in done.stdout
    done = subprocess.run([*command, "missing.py"], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 1 and "no such program: missing.py" in done.stderr
