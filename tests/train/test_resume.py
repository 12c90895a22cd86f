"""A run that was killed and resumed ends in the same bits as one that was not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from deltatune.errors import ResumeError
from deltatune.train import Listener, train
from deltatune.train import checkpoint as checkpoints

NURSERY = Path(__file__).with_name("nursery.py")


class Stop(Exception):
    """What a test throws to break a run off."""


class BreakAt(Listener):
    """Ends a run in the middle of a step, as an exception in it would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, progress: Any) -> None:
        if progress.step == self.step:
            raise Stop


class Notices(Listener):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def on_notice(self, text: str) -> None:
        self.texts.append(text)


def same_tensors(one: Path, other: Path, name: str = "adapter_model.safetensors") -> bool:
    a, b = load_file(one / name), load_file(other / name)
    return a.keys() == b.keys() and all(a[key].equal(b[key]) for key in a)


def nursery(tmp_path: Path, values: dict[str, Any], *arguments: str) -> dict[str, Any]:
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({**values, "output_dir": str(tmp_path / "runs")}))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, str(NURSERY), str(file), *arguments],
        capture_output=True, text=True, timeout=900, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


DROPOUT_AND_ACCUMULATION = {
    "lora_dropout": 0.1, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "max_steps": 9,
    "save_steps": 1, "eval_split": 0.2, "eval_steps": 3,
}  # fmt: skip


def raw(settings: Any, **changes: Any) -> dict[str, Any]:
    return settings(**changes).model_dump(mode="json")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_killed_at_random_moments_ends_in_the_same_bits(settings, tmp_path):
    told = nursery(tmp_path, raw(settings, **DROPOUT_AND_ACCUMULATION), "7", "3")
    assert told["kills"] == 3
    assert told["digest"] == told["whole"]


def test_resuming_in_the_middle_of_an_epoch_with_dropout_changes_nothing(settings, tmp_path):
    changes = {**DROPOUT_AND_ACCUMULATION, "save_steps": 2, "max_steps": 7, "eval_steps": 0}  # 4 an epoch
    train(settings(output_dir=str(tmp_path / "whole"), **changes))
    with pytest.raises(Stop):
        train(settings(output_dir=str(tmp_path / "broken"), **changes), callbacks=[BreakAt(6)])
    result = train(settings(output_dir=str(tmp_path / "broken"), resume_from_checkpoint=True, **changes))
    assert result.resumed_from == tmp_path / "broken" / "checkpoint-4"
    assert same_tensors(tmp_path / "whole", tmp_path / "broken")
    assert (tmp_path / "whole/history.jsonl").read_text() == (tmp_path / "broken/history.jsonl").read_text()


OPTIONS = {
    "prefix_tuning": {"num_virtual_tokens": 3, "prefix_projection": True},
    "adalora": {"init_r": 4, "target_r": 2},  # the schedule has a state of its own
    "adamss": {"r": 4, "num_subspaces": 2, "use_asa": True, "asa_target_subspaces": 3},  # freezes parameters on the way
    "full": {},
}


@pytest.mark.parametrize("method", OPTIONS)
def test_every_kind_of_training_resumes_exactly(method, settings, tmp_path):
    options = OPTIONS[method]
    changes = {"method": method, "save_steps": 2, "max_steps": 5, **options}
    name = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    train(settings(output_dir=str(tmp_path / "whole"), **changes))
    with pytest.raises(Stop):
        train(settings(output_dir=str(tmp_path / "broken"), **changes), callbacks=[BreakAt(4)])
    train(settings(output_dir=str(tmp_path / "broken"), resume_from_checkpoint=True, **changes))
    whole, broken = load_file(next((tmp_path / "whole").glob(name))), load_file(next((tmp_path / "broken").glob(name)))
    assert whole.keys() == broken.keys()
    assert all(whole[key].equal(broken[key]) for key in whole)


def test_the_schedule_of_a_run_follows_its_length_and_its_best_checkpoint(settings, tmp_path):
    import deltatune

    changes = {"method": "adalora", **OPTIONS["adalora"], "max_steps": 5, "save_steps": 1}
    result = train(settings(output_dir=str(tmp_path / "whole"), **changes), callbacks=[deltatune.AdapterCallback()])
    config = deltatune.PeftConfig.from_pretrained(tmp_path / "whole")
    assert (config.total_step, config.tinit, config.tfinal, config.deltaT) == (5, 0, 1, 1)
    ranks = [sum(kept) for kept in config.rank_pattern.values()]
    assert sum(ranks) == 2 * len(ranks)
    middle = checkpoints.read(tmp_path / "whole/checkpoint-4")
    assert middle.state["schedule"]["default"]["step"] == 4
    from deltatune.train import snapshot

    # as load_best_model_at_end does: what was decided after the best step is taken back
    best = checkpoints.read(tmp_path / "whole/checkpoint-4")
    best.state["schedule"]["default"]["kept"] = {}
    snapshot.put_back_tensors(best, result.model)
    assert result.model.peft_config["default"].rank_pattern is None
    assert all(len(t) == 4 for key, t in result.model.adapter_tensors("default").items() if key.endswith("lora_A"))


@pytest.fixture(scope="session")
def ended_early(settings_into, tmp_path_factory):
    """A run that broke off in its fourth and last step, with the checkpoints of steps 2 and 3."""
    output = tmp_path_factory.mktemp("early") / "out"
    with pytest.raises(Stop):
        train(settings_into(output, save_steps=1), callbacks=[BreakAt(4)])
    assert [step for step, _ in checkpoints.listed(output)] == [2, 3]
    return output


@pytest.fixture(scope="session")
def whole(settings_into, tmp_path_factory):
    """The same run, not broken off."""
    output = tmp_path_factory.mktemp("whole") / "out"
    train(settings_into(output, save_steps=1))
    return output


@pytest.fixture
def broken_off(ended_early, tmp_path):
    return shutil.copytree(ended_early, tmp_path / "out")


@pytest.mark.parametrize("damage", ["manifest gone", "file gone", "cut short", "one bit", "no state"])
def test_a_torn_checkpoint_is_passed_over_and_told(damage, settings, broken_off, whole):
    tear(broken_off / "checkpoint-3", damage)
    notices = Notices()
    result = train(settings(save_steps=1, resume_from_checkpoint=True), callbacks=[notices])
    assert result.resumed_from == broken_off / "checkpoint-2"
    assert any("checkpoint-3" in text and "skipping" in text for text in notices.texts)
    assert same_tensors(broken_off, whole)


def test_resuming_is_refused_when_no_checkpoint_is_whole(settings, broken_off):
    for _, folder in checkpoints.listed(broken_off):
        tear(folder, "cut short")
    with pytest.raises(ResumeError, match=r"checkpoint-2: optimizer\.safetensors has \d+ bytes"):
        train(settings(save_steps=1, resume_from_checkpoint=True))


def tear(folder: Path, damage: str) -> None:
    victim = folder / "optimizer.safetensors"
    content = bytearray(victim.read_bytes())
    if damage == "manifest gone":
        (folder / "manifest.json").unlink()
    elif damage == "file gone":
        victim.unlink()
    elif damage == "no state":
        (folder / "state.json").unlink()
    elif damage == "cut short":
        victim.write_bytes(content[:-7])
    else:
        content[-3] ^= 1
        victim.write_bytes(content)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"learning_rate": 2e-2}, r"learning_rate: 0\.01 then, 0\.02 now"),
        ({"seed": 1}, "seed: 42 then, 1 now"),
        ({"r": 4}, "method_options"),
        ({"max_steps": 6}, "max_steps: 4 then, 6 now"),
        (
            {"per_device_train_batch_size": 2, "lr_scheduler_type": "linear"},
            "lr_scheduler_type.*per_device_train_batch",
        ),
        ({"num_threads": 2}, "num_threads: 1 then, 2 now"),
    ],
)
def test_changed_settings_are_refused_by_name(changes, named, settings, broken_off):
    with pytest.raises(ResumeError, match=named):
        train(settings(**{"save_steps": 1, "resume_from_checkpoint": True, **changes}))


def test_changed_data_is_refused_and_moved_data_is_not(settings, broken_off, files, tmp_path):
    moved = tmp_path / "moved.jsonl"
    shutil.copy(files["seq2seq"], moved)
    with moved.open("a") as file:
        file.write('{"input": "red", "target": "cat"}\n')
    with pytest.raises(ResumeError, match="training data"):
        train(settings(resume_from_checkpoint=True, train_file=str(moved)))
    shutil.copy(files["seq2seq"], moved)
    assert train(settings(resume_from_checkpoint=True, train_file=str(moved), save_steps=3)).steps == 4


def test_another_base_is_refused(settings, broken_off, tmp_path, bases):
    from transformers import T5ForConditionalGeneration

    other = shutil.copytree(bases["seq2seq"], tmp_path / "other")
    model = T5ForConditionalGeneration.from_pretrained(other)
    model.shared.weight.data += 1
    model.save_pretrained(other)
    with pytest.raises(ResumeError, match="base model"):
        train(settings(resume_from_checkpoint=True, model_name_or_path=str(other)))


def test_a_change_can_be_allowed_by_name(settings, broken_off):
    notices = Notices()
    changed = settings(resume_from_checkpoint=True, learning_rate=2e-2, allow_change=["learning_rate"])
    assert train(changed, callbacks=[notices]).steps == 4
    assert any("learning_rate changed from 0.01 to 0.02" in text for text in notices.texts)


def test_resuming_a_finished_run_writes_the_same_results_again(settings, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "out")
    (tmp_path / "out/adapter_model.safetensors").unlink()
    assert train(settings(resume_from_checkpoint=True)).steps == 4
    assert same_tensors(tmp_path / "out", whole)


def test_no_pickle_is_written(whole):
    suffixes = {path.suffix for path in whole.rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".jsonl", ".safetensors", ".md", ".jinja"}
