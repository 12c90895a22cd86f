"""The crash loop: the 1st, 2nd, ... last file operation of what writes fails or kills; afterwards old or new, whole.

As SQLite tests its transactions: the loop ends with the first run in which nothing was injected (fault matrix, 51-53,
70-72).
"""

import errno
import os
import shutil

import pytest
import torch

from deltatune import LoraConfig, PeftModel
from deltatune.errors import SaveError
from deltatune.train import checkpoint as checkpoints
from deltatune.train.checkpoint import Checkpoint
from tests.core.tiny import logits, tiny
from tests.faults.disk import die, failing_disk, in_child, raising
from tests.faults.folders import INPUTS, adapted

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="fork is POSIX's"),
    pytest.mark.filterwarnings("ignore:.*the saved values are used"),
]
MINE = {"README.md": b"---\nbroken: [\n---\n", "notes.txt": b"mine", "deep/er": b"mine too"}


class Adapter:
    """Saves an adapter over an older one, in a folder where a user keeps files."""

    def __init__(self, safe: bool = True, second: bool = False) -> None:
        self.models = [adapted(0), adapted(1, r=2, lora_alpha=2)]
        for model in self.models if second else ():
            model.add_adapter("second", LoraConfig(r=3, target_modules=["k_proj"]))
        self.safe, self.expected = safe, [logits(model, INPUTS) for model in self.models]

    def old(self, folder) -> None:
        self.models[0].save_pretrained(folder, safe_serialization=self.safe)

    def new(self, folder) -> None:
        self.models[1].save_pretrained(folder, safe_serialization=self.safe)

    def found(self, folder) -> int:
        """0: the old one, 1: the new one."""
        found = logits(PeftModel.from_pretrained(tiny("llama"), folder), INPUTS)
        return next(index for index, one in enumerate(self.expected) if torch.equal(found, one))


class Training:
    """Writes checkpoint 2 after checkpoint 1, and removes the older one."""

    def old(self, folder) -> None:
        checkpoints.write(folder, 1, self._of(1))

    def new(self, folder) -> None:
        checkpoints.write(folder, 2, self._of(2), extra=lambda place: (place / "adapter").mkdir())
        checkpoints.rotate(folder, 1, None)

    def found(self, folder) -> int:
        newest = checkpoints.newest(folder)
        step = int(newest.name.split("-")[1])
        assert checkpoints.read(newest).tensors["trainable"]["w"].tolist() == [step] * 3
        return step - 1

    @staticmethod
    def _of(step: int) -> Checkpoint:
        return Checkpoint(
            {group: {"w": torch.full((3,), float(step))} for group in checkpoints.TENSORS}, {"step": step}
        )


CASES = {
    "safetensors": Adapter,
    "bin": lambda: Adapter(safe=False),
    "two": lambda: Adapter(second=True),
    "checkpoint": Training,
}


@pytest.fixture(params=list(CASES))
def case(request):
    return CASES[request.param]()


def fresh(case, folder):
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in MINE.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    case.old(folder)
    return listing(folder)


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def mine_is_untouched(folder) -> bool:
    return all((folder / name).read_bytes() == content for name, content in MINE.items())


def test_killed_at_any_operation(case, tmp_path):
    """On the next load exactly the old or exactly the new; the next save clears up or leaves what nobody reads."""
    found, at = set(), 0
    while True:
        at += 1
        folder = tmp_path / "folder"
        fresh(case, folder)

        def dying(at=at, folder=folder):
            with failing_disk(at, die):
                case.new(folder)

        code = in_child(dying)
        assert code in (0, 137)
        now = case.found(folder)
        found.add(now)
        assert mine_is_untouched(folder)
        case.new(folder)  # and it can be done again
        assert case.found(folder) == 1
        if code == 0:
            break
    assert found == {0, 1} and at > 8 and now == 1


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="which file is synced is told by Linux")
def test_power_that_fails_at_any_operation_takes_only_what_was_not_synced(case, tmp_path):
    """Every file that was not synced comes back empty; what was said to be saved is on the disk, its name too."""
    found, at = set(), 0
    while True:
        at += 1
        folder = tmp_path / "folder"
        fresh(case, folder)

        def dying(at=at, folder=folder):
            def power_fails(name=""):
                disk.loses_power()
                os._exit(137)

            with failing_disk(at, power_fails) as disk:
                case.new(folder)
                whole = disk.all_on_it()
                disk.loses_power()
            os._exit(0 if whole else 1)

        code = in_child(dying)
        assert code in (0, 137)
        now = case.found(folder)
        found.add(now)
        assert mine_is_untouched(folder)
        if code == 0:
            break
    assert found == {0, 1} and at > 8 and now == 1


@pytest.mark.parametrize("sticky", [False, True], ids=["once", "for good"])
@pytest.mark.parametrize("code", [errno.ENOSPC, pytest.param(errno.EIO, marks=pytest.mark.long)])
def test_a_disk_that_fails_at_any_operation(case, tmp_path, code, sticky):
    """An error means that the old one is there, bit for bit, and nothing else; none means that the new one is."""
    at, refused = 0, 0
    while True:
        at += 1
        folder = tmp_path / "folder"
        files = fresh(case, folder)
        with failing_disk(at, raising(code), sticky) as disk:
            try:
                case.new(folder)
                failed = False
            except SaveError as error:
                failed, said = True, str(error)
                assert os.strerror(code) in said and str(folder) in said
        assert mine_is_untouched(folder)
        if failed:
            refused += 1
            assert ("untouched" in said) or (sticky and "could not all be put back" in said)
            assert case.found(folder) == 0 or "untouched" not in said
            if not sticky:  # a disk on which nothing can be removed keeps what is left over
                assert listing(folder) == files
        else:
            assert case.found(folder) == 1
        if disk.count < at:
            break
    assert refused > 3


@pytest.mark.parametrize("sticky", [False, True], ids=["once", "for good"])
def test_a_merged_model_that_cannot_be_saved_leaves_its_input(tmp_path, sticky):
    """Merge and save: the adapter's folder is as it was, and the model in memory merged, whole and savable."""
    model = adapted(1)
    model.save_pretrained(tmp_path / "adapter")
    before = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    expected = logits(model, INPUTS)
    merged = PeftModel.from_pretrained(tiny("llama"), tmp_path / "adapter").merge_and_unload()
    for at in range(1, 6):
        with failing_disk(at, raising(errno.ENOSPC), sticky):
            try:
                merged.save_pretrained(tmp_path / "merged")
            except Exception as error:
                assert "No space" in str(error)
    assert {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()} == before
    assert torch.allclose(logits(merged, INPUTS), expected, atol=1e-5)
