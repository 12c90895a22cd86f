"""Folders, patterns, datasets, several files in given shares, other names for columns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deltatune.data.prepare import prepare
from deltatune.data.read import read_table
from deltatune.data.source import load_tables
from deltatune.errors import DataError


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def numbered(name: str, count: int) -> list[dict[str, Any]]:
    return [{"input": f"{name}{i}", "target": "t"} for i in range(count)]


def load(train: Any, evaluation: Any = None, split: float = 0.0, **options: Any) -> tuple[list[Any], list[Any]]:
    tables, held_out, _ = load_tables(train, evaluation, None, None, None, split, 0, **options)
    return [[row["input"] for row in t.rows] for t in tables], [[row["input"] for row in t.rows] for t in held_out]


def test_a_folder_and_a_pattern_give_all_their_files_by_name(tmp_path):
    write(tmp_path / "b.jsonl", numbered("b", 2))
    write(tmp_path / "deep/a.jsonl", numbered("a", 1))
    (tmp_path / "README.md").write_text("no data")
    write(tmp_path / ".cache/c.jsonl", numbered("c", 1))
    assert load(str(tmp_path))[0] == [["b0", "b1"], ["a0"]]
    assert load(f"{tmp_path}/*.jsonl")[0] == [["b0", "b1"]]
    assert load(f"{tmp_path}/**/a*.jsonl")[0] == [["a0"]]
    assert load([f"{tmp_path}/deep/a.jsonl", f"{tmp_path}/b.jsonl"])[0] == [["a0"], ["b0", "b1"]]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("row.jsonl", "does not exist; did you mean 'rows.jsonl'?"),
        ("*.csv", "matches no data file"),
        ("empty", "holds no data file"),
        ("rows.jsonl#0", "asks for no row"),
        ("*.jsonl#3", "stands behind 2 files"),
    ],
)
def test_places_without_data_are_told(tmp_path, name, told):
    write(tmp_path / "rows.jsonl", numbered("a", 2))
    write(tmp_path / "more.jsonl", numbered("b", 2))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"data|pattern") as caught:
        load(str(tmp_path / name))
    assert told in str(caught.value)


def test_a_number_behind_a_file_takes_as_many_random_rows(tmp_path):
    path = write(tmp_path / "a.jsonl", numbered("a", 20))
    ((five,), _) = load(f"{path}#5")
    assert len(set(five)) == 5 and five != [f"a{i}" for i in range(5)]
    assert load(f"{path}#5")[0] == [five]
    ((many,), _) = load(f"{path}#50")
    assert {many.count(f"a{i}") for i in range(20)} == {2, 3} and len(many) == 50


def test_weights_are_shares_and_repeat_no_row(tmp_path):
    files = [write(tmp_path / f"{name}.jsonl", numbered(name, count)) for name, count in (("a", 10), ("b", 100))]
    (a, b), _ = load(files, weights=[1, 3])
    assert (len(a), len(b), len(set(b))) == (10, 30, 30)
    (a, b), _ = load(files, weights=[0.5, 0.5])
    assert (len(a), len(b)) == (10, 10)
    for weights, told in (
        ([1], "1 weights for 2 data files"),
        ([1, 0], "not above 0"),
        ([1, float("nan")], "not above"),
    ):
        with pytest.raises(DataError, match=told):
            load(files, weights=weights)


def test_a_share_is_set_aside_of_each_file_and_limits_count_all(tmp_path):
    files = [write(tmp_path / f"{name}.jsonl", numbered(name, 20)) for name in "ab"]
    train, held_out = load(files, split=0.25)
    assert [len(rows) for rows in train + held_out] == [15, 15, 5, 5]
    assert not set(train[0]) & set(held_out[0])
    train, held_out = load(files, split=0.25, max_train=10, max_eval=4)
    assert [len(rows) for rows in train + held_out] == [5, 5, 2, 2]


def test_reading_stops_at_the_limit(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"input": "a", "target": "t"}\n{"input": "b", "target": "t"}\nbroken\n')
    assert load(str(path), max_train=2)[0] == [["a", "b"]]
    with pytest.raises(DataError, match="line 3: malformed JSON"):
        load(str(path), max_train=3)


def test_columns_go_by_other_names_and_faults_by_those_of_the_file(tmp_path):
    rows = [{"q": "one", "a": "two", "input": "x"}, {"q": "one", "a": ""}]
    mapping = {"input": "q", "target": "a"}
    tables, _, _ = load_tables(write(tmp_path / "r.jsonl", rows), None, None, None, None, 0.0, 0, columns=mapping)
    assert tables[0].rows[0] == {"input": "one", "target": "two"}
    with pytest.raises(DataError, match=r"line 2: field 'a' is empty") as caught:
        prepare(tables, None, None, "seq2seq")
    assert caught.value.field == "a"
    with pytest.raises(DataError, match=r"column_mapping input=qq: 'qq' is not a column .*did you mean 'q'"):
        load_tables(str(tmp_path / "r.jsonl"), None, None, None, None, 0.0, 0, columns={"input": "qq"})


def test_files_of_different_forms_train_together_and_faults_name_their_file(tmp_path, words):
    one = write(tmp_path / "one.jsonl", [{"prompt": "red", "completion": "cat"}])
    two = write(tmp_path / "two.jsonl", [{"instruction": "old", "input": "dog", "output": "new"}, {"instruction": "o"}])
    tables, _, _ = load_tables([one, two], None, None, None, None, 0.0, 0)
    with pytest.raises(DataError, match=r"two\.jsonl line 2: field 'output' is missing"):
        prepare(tables, None, None, "causal")
    corpus = prepare([tables[0], tables[1].head(1)], None, None, "causal")
    assert [(e.text, e.target) for e in corpus.train.examples] == [("red", "cat"), ("old\ndog", "new")]
    with pytest.raises(DataError, match=r"two\.jsonl line 1: token \d+ but the model"):
        known = words.convert_tokens_to_ids("cat") + 1  # "dog" of the second file comes after it
        corpus.encode(words, max_length=8, max_target_length=8, vocabulary=known)


def test_parquet_is_read_and_hashed(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 3
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    table = read_table(tmp_path / "rows.parquet")
    assert table.rows == rows and table.lines == [1, 2, 3] and len(table.digest) == 64
    assert prepare(table, None, None, "chat").train.examples[0].target == "b"


def test_datasets_saved_on_disk_are_read_with_the_names_of_their_classes(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        tokens=datasets.Sequence(datasets.Value("string")),
        ner_tags=datasets.Sequence(datasets.ClassLabel(names=["O", "B-loc"])),
    )
    rows = {"tokens": [["in", "Rome"], ["no"]], "ner_tags": [[0, 1], [0]]}
    part = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(train=part, validation=part).save_to_disk(tmp_path / "saved")
    train, held_out, _ = load_tables(None, None, None, str(tmp_path / "saved"), None, 0.0, 0)
    assert train[0].rows[0] == {"tokens": ["in", "Rome"], "ner_tags": ["O", "B-loc"]}
    assert len(held_out[0]) == 2
    part.save_to_disk(tmp_path / "one")
    assert len(load_tables(str(tmp_path / "one"), None, None, None, None, 0.0, 0)[0][0]) == 2
    (tmp_path / "one" / "dataset_info.json").write_text("{")
    with pytest.raises(DataError, match="cannot be loaded"):
        load_tables(str(tmp_path / "one"), None, None, None, None, 0.0, 0)


def test_squads_own_files_are_rows_of_questions(tmp_path):
    question = {"id": "1", "question": "which animal?", "answers": [{"text": "cat", "answer_start": 4}]}
    article = {"title": "t", "paragraphs": [{"context": "the cat", "qas": [question, {**question, "id": "2"}]}]}
    (tmp_path / "squad.json").write_text(json.dumps({"version": "1.1", "data": [article]}))
    table = read_table(tmp_path / "squad.json")
    assert [row["id"] for row in table.rows] == ["1", "2"]
    assert prepare(table, None, None, "question_answering").train.examples[0].target == "cat"
