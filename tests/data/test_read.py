"""Files: every kind is read, every fault is told by file and line."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma

import pytest

from deltatune.data.read import read_table, table_of
from deltatune.data.source import load_tables, split
from deltatune.errors import DataError

ROWS = [{"input": "a b", "target": "b a"}, {"input": 'c, "d"', "target": "é\u2028x"}]


@pytest.mark.parametrize("kind", ["jsonl", "json", "json data", "csv", "tsv"])
@pytest.mark.parametrize(("ending", "opener"), [("", open), (".gz", gzip.open), (".xz", lzma.open), (".bz2", bz2.open)])
def test_every_kind_of_file_is_read(kind, ending, opener, tmp_path):
    path = tmp_path / f"rows.{kind.split()[0]}{ending}"
    with opener(path, "wt", encoding="utf-8", newline="") as file:
        if kind == "jsonl":
            file.write("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n\n")
        elif kind == "json":
            json.dump(ROWS, file)
        elif kind == "json data":
            json.dump({"data": ROWS}, file)
        else:
            mark = "," if kind == "csv" else "\t"
            file.write("\ufeff" + mark.join(["input", "target"]) + "\r\n")
            for row in ROWS:
                file.write(mark.join('"' + value.replace('"', '""') + '"' for value in row.values()) + "\r\n")
    assert read_table(path).rows == ROWS


def test_lines_are_the_files_own(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('\n{"a": 1}\n\n{"a": 2}\n')
    assert read_table(path).lines == [2, 4]
    path = tmp_path / "rows.csv"
    path.write_text('a,b\n"1\n1",2\n3,4\n')
    assert read_table(path).lines == [2, 4]


def test_plain_text_is_a_row_a_line(tmp_path):
    path = tmp_path / "rows.txt"
    path.write_text("one\n\ntwo\n")
    assert read_table(path).rows == [{"text": "one"}, {"text": "two"}]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b"\n \n", "is empty"),
        ("a.json", b"[]", "is empty"),
        ("a.csv", b"input,target\n", "is empty"),
        ("a.jsonl", b'{"a": 1}\n{"a": \n', "line 2: malformed JSON"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', "line 2: a JSON list; each row must be an object"),
        ("a.json", b'[{"a": 1}, 3]', "item 2: a JSON number"),
        ("a.json", b'{"a": 1}', "holds a JSON object; expected a list of objects"),
        ("a.json", b'[{"a": 1},\n{"a"]', "line 2: malformed JSON"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", "line 3: 3 fields where the header names 2"),
        ("a.csv", b"a,a\n1,2\n", "line 1: the header"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "line 2 is not UTF-8 (byte 0xff)"),
        ("a.parquet", b"PAR1", "cannot be read"),
        ("a.xlsx", b"PK", "unknown ending '.xlsx'"),
        ("a.jsonl.gz", b"not gzip", "cannot be read"),
        ("a.jsonl", b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_faulty_file_is_told_by_name_and_line(name, content, told, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_table(path)
    assert told in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_told(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read_table(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="is a folder"):
        read_table(tmp_path)


def test_a_cut_gzip_is_told(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n' * 1000)[:-9])
    with pytest.raises(DataError, match="cannot be read"):
        read_table(path)


def test_equal_content_has_an_equal_digest(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "b.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "c.jsonl").write_text('{"a": 2}\n')
    a, b, c = (read_table(tmp_path / f"{name}.jsonl").digest for name in "abc")
    assert a == b != c
    assert table_of([{"a": 1}]).digest == table_of([{"a": 1}]).digest != table_of([{"a": 2}]).digest


def test_a_split_is_disjoint_whole_and_repeatable():
    table = table_of([{"a": i} for i in range(50)])
    train, held_out = split(table, 0.2, seed=3)
    assert len(held_out) == 10
    assert sorted(row["a"] for row in train.rows + held_out.rows) == list(range(50))
    assert split(table, 0.2, seed=3)[1].rows == held_out.rows != split(table, 0.2, seed=4)[1].rows


def test_a_split_that_leaves_nothing_is_refused():
    with pytest.raises(DataError, match=r"eval_split=0\.6 leaves none"):
        split(table_of([{"a": 1}]), 0.6, seed=0)


def test_a_run_without_data_is_refused():
    with pytest.raises(DataError, match="no training data: set train_file"):
        load_tables(None, None, None, None, None, 0.0, 0)
