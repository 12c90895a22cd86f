"""What `merge` and `export` write is there whole or not at all, and what it is made of stays (fault matrix, row 70)."""

import errno
import os
import resource

import pytest

from deltatune.errors import SaveError
from deltatune.ship import merge as merging
from deltatune.ship import merge_to_folder
from deltatune.ship.place import new_folder
from tests.faults.disk import die, failing_disk, in_child, raising
from tests.faults.folders import refused
from tests.ship.test_ship import lora, trained

pytestmark = pytest.mark.skipif(os.name != "posix", reason="fork is POSIX's")
FILES = {"config.json": b"{}" * 100, "model.safetensors": b"x" * 10_000, "tokenizer.json": b"{}"}


def fill(out):
    with new_folder(out) as folder:
        for name, content in FILES.items():
            with open(folder / name, "wb") as file:
                file.write(content)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_killed_at_any_operation_it_is_whole_or_absent(tmp_path):
    at, found = 0, set()
    while True:
        at += 1
        out = tmp_path / f"out{at}"

        def dying(at=at, out=out):
            with failing_disk(at, die):
                fill(out)

        code = in_child(dying)
        found.add(out.exists())
        assert not out.exists() or content(out) == FILES
        if not out.exists():
            fill(out)  # and it can be done again
        if code == 0:
            break
    assert at > 8 and found == {False, True}


def test_all_is_on_the_disk_before_it_has_its_name(tmp_path):
    with failing_disk(0, die) as disk:
        fill(tmp_path / "out")
    assert disk.log[: disk.log.index("replace")].count("fsync") == len(FILES) + 1


@pytest.mark.parametrize("sticky", [False, True], ids=["once", "for good"])
def test_a_disk_that_fails_at_any_operation(tmp_path, sticky):
    at, failures = 0, 0
    while True:
        at += 1
        out = tmp_path / f"out{at}"
        with failing_disk(at, raising(errno.ENOSPC), sticky) as disk:
            try:
                fill(out)
            except SaveError as error:
                failures += 1
                assert os.strerror(errno.ENOSPC) in str(error) and not out.exists()
            else:
                assert content(out) == FILES
        if not sticky:  # on a disk on which nothing can be removed it stays
            assert not list(tmp_path.glob(".*"))
        if disk.count < at:
            break
    assert failures > 5


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("adapter") / "lora", lora())


def test_a_disk_that_fills_while_the_merged_model_is_written(adapter, tmp_path):
    """transformers writes it with safetensors, whose errors are no OSErrors."""
    before = content(type(tmp_path)(adapter))

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with refused(SaveError, str(tmp_path / "out"), "File too large", "nothing is left"):
            merge_to_folder(adapter, tmp_path / "out", inputs=["Once"])

    assert in_child(full) == 0
    assert content(type(tmp_path)(adapter)) == before and not list(tmp_path.iterdir())


def test_memory_that_runs_out_while_the_merged_model_is_proven(adapter, tmp_path, monkeypatch):
    before = content(type(tmp_path)(adapter))

    def out_of_memory(*_):
        raise MemoryError("injected")

    monkeypatch.setattr(merging, "_again", out_of_memory)
    with pytest.raises(MemoryError):
        merge_to_folder(adapter, tmp_path / "out", inputs=["Once"])
    assert content(type(tmp_path)(adapter)) == before and not list(tmp_path.iterdir())
