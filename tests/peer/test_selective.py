"""Methods that train a chosen part (the bias, entries, subspaces) against PEFT's, both ways."""

import pytest

import deltatune
from tests.core.tiny import TASKS
from tests.peer.crossing import crosses_over, trains_alike
from tests.peer.pairs import ATTENTION, peft

quiet = pytest.mark.filterwarnings("ignore:.*match no module:deltatune.PeftWarning")
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "bert": ["query", "value", "output.dense"], "t5": ["q", "wo"]}


def pair(name, arch, **options):
    """PEFT's config and ours of one method."""
    arguments = {"task_type": TASKS[arch], **options}
    return getattr(peft, name)(**arguments), getattr(deltatune, name)(**arguments)


@quiet
@pytest.mark.parametrize("arch", ["llama", "bert", "t5", "bart"])
def test_beft_on_its_usual_targets(arch, tmp_path):
    crosses_over(*pair("BeftConfig", arch), arch, tmp_path)


@pytest.mark.parametrize("arch", ["llama", "bert"])
@pytest.mark.parametrize("init", [True, False])
def test_beft(arch, init, tmp_path):
    crosses_over(*pair("BeftConfig", arch, target_modules=ATTENTION[arch], init_weights=init), arch, tmp_path)


def test_beft_trains_alike(tmp_path):
    trains_alike(pair("BeftConfig", "bert")[0], "bert", tmp_path, lr=1e-2)
