"""Real instructions through a real tiny model: what the check says is what a run learns."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from deltatune.data import check
from deltatune.train import TrainSettings, train

SHARED = Path(os.environ.get("DELTATUNE_SHARED", "/nowhere"))
DATA = SHARED / "data/self_instruct/seed.jsonl.gz"
MODEL = SHARED / "data/weights/stories260K"

pytestmark = pytest.mark.skipif(not (DATA.is_file() and MODEL.is_dir()), reason="no real data in DELTATUNE_SHARED")


@pytest.fixture(scope="module")
def settings() -> TrainSettings:
    return TrainSettings(
        model_name_or_path=str(MODEL), train_file=f"{DATA}#60", task="chat", chat_template="chatml", eval_split=0.2,
        max_length=256, packing=True, max_steps=8, learning_rate=5e-3, per_device_train_batch_size=4, device="cpu",
        num_samples=0, num_scored=0, num_threads=1, r=8,
    )  # fmt: skip


def test_what_is_checked_is_what_is_learnt(settings, tmp_path):
    report = check(settings=settings)
    train_part, held_out = report.parts
    assert train_part.rows == 48 and held_out.rows == 12
    assert not report.faults and train_part.without_end == 0 and train_part.unlike_prompts == 0
    assert all(
        pieces[-1][0].endswith("<|im_end|></s>") for pieces in [s.pieces for s in train_part.samples if not s.cut]
    )
    result = train(settings.model_copy(update={"output_dir": str(tmp_path / "out")}))
    assert result.metrics["train_rows"] == train_part.used
    assert result.metrics["after"]["eval"]["loss"] < result.metrics["before"]["eval"]["loss"] - 0.1
