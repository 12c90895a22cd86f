"""Two who save to one folder at once: one waits, and who dies or was killed holds nobody up (fault matrix, 56)."""

import json
import os
import signal
import threading
import time

import pytest
import torch

from deltatune import LoraConfig, PeftModel
from deltatune.errors import SaveError
from deltatune.storage import lock
from deltatune.storage.files import write_files, write_folders
from deltatune.storage.tensors import read_file
from tests.core.tiny import logits, tiny
from tests.faults.disk import in_child
from tests.faults.folders import CONFIG, INPUTS, WEIGHTS, adapted, failing, refused

pytestmark = pytest.mark.skipif(lock.fcntl is None, reason="the system has no locks of folders")


def test_who_comes_second_waits_for_the_first_to_end(tmp_path, monkeypatch):
    """Without a lock: one file of the first, then both of the second, then the first's other one over it."""
    reached, go = threading.Event(), threading.Event()
    replace = os.replace

    def slowly(source, target):
        replace(source, target)
        if threading.current_thread().name == "first" and not reached.is_set():
            reached.set()
            assert go.wait(60)

    monkeypatch.setattr(os, "replace", slowly)
    first = threading.Thread(target=write_files, args=(tmp_path, {"a": b"first", "b": b"first"}), name="first")
    second = threading.Thread(target=write_files, args=(tmp_path, {"a": b"second", "b": b"second"}), name="second")
    first.start()
    assert reached.wait(60)
    second.start()
    second.join(0.5)
    assert second.is_alive() and (tmp_path / "b").exists() is False
    go.set()
    first.join(60), second.join(60)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"second", "b": b"second"}


def test_who_fails_puts_its_own_old_files_back_and_not_over_anothers_new_ones(tmp_path, monkeypatch):
    write_files(tmp_path, {"a": b"old", "b": b"old"})
    reached, go, failures = threading.Event(), threading.Event(), []
    replace = os.replace

    def failing_second(source, target):
        if threading.current_thread().name == "first" and str(target).endswith("b"):
            reached.set()
            assert go.wait(60)
            raise OSError(5, "Input/output error")
        replace(source, target)

    def save_first():
        try:
            write_files(tmp_path, {"a": b"first", "b": b"first"})
        except SaveError as error:
            failures.append(str(error))

    monkeypatch.setattr(os, "replace", failing_second)
    first = threading.Thread(target=save_first, name="first")
    second = threading.Thread(target=write_files, args=(tmp_path, {"a": b"second", "b": b"second"}), name="second")
    first.start()
    assert reached.wait(60)
    second.start()
    second.join(0.5)
    go.set()
    first.join(60), second.join(60)
    assert len(failures) == 1 and "Input/output error" in failures[0]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"second", "b": b"second"}


@pytest.mark.filterwarnings("error")
def test_processes_that_save_adapters_at_once_leave_config_and_tensors_of_one(tmp_path):
    """Also for PEFT, which looks at `adapter_config.json` only."""
    models = [adapted(1), adapted(2, r=2, lora_alpha=2)]
    for model in models:
        model.add_adapter("second", LoraConfig(r=model.peft_config["default"].r, target_modules=["k_proj"]))
    expected = [logits(model, INPUTS) for model in models]
    for _ in range(5):
        children = []
        for model in models:
            child = os.fork()
            if child == 0:
                try:
                    for _ in range(5):
                        model.save_pretrained(tmp_path)
                    os._exit(0)
                finally:
                    os._exit(1)
            children.append(child)
        assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
        configs = [json.loads((place / CONFIG).read_text()) for place in (tmp_path, tmp_path / "second")]
        for place, config in zip((tmp_path, tmp_path / "second"), configs, strict=True):
            facts = read_file(place / WEIGHTS)[1]
            assert facts is not None and facts["config"] == config, "config and tensors are of one writer"
        assert configs[0]["r"] == configs[1]["r"], "so are both adapters"
        found = logits(PeftModel.from_pretrained(tiny("llama"), tmp_path), INPUTS)
        assert any(torch.equal(found, one) for one in expected)
        assert not list(tmp_path.rglob("*.tmp")) + list(tmp_path.rglob("*lock*"))


def holding(folder):
    """A child that has taken the lock, and stays."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with lock.locked([folder]):
            os.write(writing, b"x")
            time.sleep(600)
        os._exit(0)
    os.read(reading, 1)
    os.close(reading), os.close(writing)
    return child


def ended(child):
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_dead_saver_holds_nobody_up(tmp_path):
    ended(holding(tmp_path))
    write_files(tmp_path, {"a": b"new"})
    assert (tmp_path / "a").read_bytes() == b"new"


def test_one_that_does_not_end_is_named_and_nothing_is_written(tmp_path, monkeypatch):
    write_files(tmp_path, {"a": b"old"})
    child = holding(tmp_path)
    try:
        monkeypatch.setattr(lock, "PATIENCE", 0.1)
        said = [str(tmp_path), "is being saved to"]
        said += [f"process {child}"] if os.path.exists("/proc/locks") else []
        with refused(SaveError, *said):
            write_files(tmp_path, {"a": b"new"})
        with refused(SaveError, *said):
            write_folders({tmp_path / "made": {"a": b"new"}, tmp_path: {"a": b"new"}})
    finally:
        ended(child)
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_bytes() == b"old"


def test_a_process_forked_meanwhile_does_not_hold_the_lock_on(tmp_path):
    """Workers of a data loader, say: they have every open file of their parent."""
    with lock.locked([tmp_path]):
        child = os.fork()
        if child == 0:
            time.sleep(600)
            os._exit(0)
    try:
        assert in_child(lambda: write_files(tmp_path, {"a": b"new"})) == 0
    finally:
        ended(child)


def test_a_folder_that_its_saver_has_removed_again_is_made_again(tmp_path):
    """The first made the folder, failed, and removed it; the second had it open already."""
    folder = tmp_path / "new"
    folder.mkdir()
    with lock.locked([folder]):
        second = threading.Thread(target=write_files, args=(folder, {"a": b"second"}))
        second.start()
        second.join(0.3)
        folder.rmdir()
    second.join(60)
    assert (folder / "a").read_bytes() == b"second"


def test_a_file_system_without_locks_is_saved_to_all_the_same(tmp_path, monkeypatch):
    with failing(monkeypatch, lock.fcntl, "flock", 0, OSError(95, "Operation not supported")):
        adapted(1).save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny("llama"), tmp_path), INPUTS), logits(adapted(1), INPUTS))


def test_a_folder_that_cannot_be_made_again_says_why(tmp_path, monkeypatch):
    """And closes what it has opened once, not what another thread may have opened under that number since."""
    folder, opened, closed = tmp_path / "new", [], []
    folder.mkdir()
    close, take = os.close, lock._take

    def open_once(path):
        if opened:
            raise PermissionError(f"{path} cannot be made")
        opened.append(os.open(path, os.O_RDONLY))
        return opened[0]

    def take_and_lose(handle, path, deadline):
        path.rmdir()
        return take(handle, path, deadline)

    monkeypatch.setattr(lock, "_open", open_once)
    monkeypatch.setattr(lock, "_take", take_and_lose)
    monkeypatch.setattr(lock.os, "close", lambda handle: closed.append(handle) or close(handle))
    with pytest.raises(PermissionError, match="cannot be made"), lock.locked([folder]):
        pass
    assert closed == opened
