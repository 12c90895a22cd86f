"""Data files that the fault matrix does not list: encodings, labels of odd types, files that are none."""

import gzip
import json
import os

import pytest

from deltatune.data.prepare import prepare
from deltatune.data.read import read_table, table_of
from deltatune.errors import DataError
from tests.faults.folders import refused

GOOD = {"input": "red", "target": "dog"}


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def put(folder, content, name="rows.jsonl"):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder / name


def texts(path, **options):
    corpus = prepare(read_table(path), None, None, "causal", **options)
    return [(example.text, example.target) for example in corpus.train.examples]


def classes(path):
    return prepare(read_table(path), None, None, "classification").labels.names


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("\n \n\t\n", "is empty"),
        (lines({"input": " ", "target": "\n"}), "line 1: field 'input' is empty"),
        (lines(GOOD).encode("utf-16"), "not UTF-8"),
        ('{"input": "\\ud800", "target": "c"}\n', "lone surrogate"),
        ('{"input": "a", "target": "b", "target": "c"}\n', "line 1: field 'target' stands twice"),
        ('{"input": "a\0b", "target": "c"}\n', "control character"),
        (lines(GOOD, GOOD)[:-5], "line 2: malformed JSON"),
        (lines(GOOD).strip() + lines(GOOD), "line 1: malformed JSON (Extra data"),
        ('{"input": %s, "target": "c"}\n' % ("9" * 5000), "5000 digits"),
        ('{"input": ' + "[" * 100_000 + "]" * 100_000 + "}\n", "nested too deeply"),
        (lines(*[GOOD] * 30, {"prompt": "a", "completion": "b"}), "line 31: field 'input' is missing"),
    ],
    ids=["blank lines", "blank values", "UTF-16", "surrogate", "field twice", "raw NUL", "cut", "two on a line",
         "number of 5000 digits", "deep", "other fields later"],
)  # fmt: skip
def test_lines_that_cannot_be_read(tmp_path, content, words):
    path = put(tmp_path, content)
    with refused(DataError, str(path), words):
        texts(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('input,target\n"a,b\nc,d\n', "malformed CSV"),
        ("input,target\na,b\nc\n", "line 3: 1 fields"),
        ("input,target\n" + "x" * 200_000 + ",b\n", "field larger than"),
        ("input,target\n", "is empty"),
        ("input;target\na;b\n", "no known format"),
        ("input,input\na,b\n", "repeated column name"),
    ],
    ids=["open quote", "ragged", "large field", "header alone", "semicolons", "column twice"],
)
def test_tables_that_cannot_be_read(tmp_path, content, words):
    path = put(tmp_path, content, "rows.csv")
    with refused(DataError, str(path), words):
        texts(path)


def test_files_that_are_cut_or_are_none(tmp_path):
    whole = gzip.compress(lines(*[GOOD] * 1000).encode())
    for content in (whole[: len(whole) // 2], lines(GOOD).encode()):
        path = put(tmp_path, content, "rows.jsonl.gz")
        with refused(DataError, str(path), "cannot be read"):
            texts(path)
    with refused(DataError, "is a folder"):
        texts(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="named pipes are POSIX's")
def test_a_pipe_is_not_waited_for_and_not_called_absent(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    with refused(DataError, "is a device or a pipe"):
        texts(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("value", ["NaN", "Infinity", "0.5", "[1]", "null", '""'])
def test_labels_that_are_no_class(tmp_path, value):
    path = put(tmp_path, f'{{"text": "a", "label": 1}}\n{{"text": "b", "label": {value}}}\n')
    with refused(DataError, str(path), "line 2", "'label'"):
        classes(path)


def test_one_class_in_the_types_of_several_writers_is_one_class(tmp_path):
    rows = [{"text": "a", "label": value} for value in (1, True, 1.0, "1", 0, False)]
    assert classes(put(tmp_path, lines(*rows))) == ("0", "1")


def test_a_label_that_training_never_saw(tmp_path):
    rows = read_table(put(tmp_path, lines({"text": "a", "label": "x"}, {"text": "b", "label": "y"})))
    other = read_table(put(tmp_path, lines({"text": "a", "label": "z"}), "eval.jsonl"))
    with refused(DataError, "eval.jsonl line 1", "'z'", "x, y"):
        prepare(rows, other, None, "classification")


@pytest.mark.parametrize("value", [-1, True, 1.5, "²", "one", None])
def test_a_task_that_is_no_number(tmp_path, value):
    path = put(tmp_path, lines({**GOOD, "t": value}))
    with refused(DataError, "line 1", "'t'", "the number of a task"):
        texts(path, task_column="t")


def test_rows_in_memory_that_are_no_rows():
    for rows in (["abc"], "abc", [GOOD, None], [[("input", "a")]]):
        with refused(DataError, "rows row", "dict"):
            table_of(rows)


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + lines(GOOD, GOOD).encode(),
        lines(GOOD, GOOD).replace("\n", "\r\n").encode(),
        lines(GOOD, GOOD).rstrip("\n").encode(),
        ("\n" + lines(GOOD) + "   \n" + lines(GOOD)).encode(),
    ],
    ids=["mark at the start", "line ends of Windows", "no last line end", "blank lines between"],
)
def test_harmless_oddities_are_read_as_they_are_meant(tmp_path, content):
    assert texts(put(tmp_path, content)) == [("red", "dog")] * 2


def test_text_of_any_characters_and_length_is_kept(tmp_path):
    odd = ["a\0b", "a\u2028b", "\u202e", "\U0001f600", "x" * 5_000_000, "\u200b"]
    path = put(tmp_path, lines(*[{"input": text, "target": text} for text in odd]))
    assert texts(path) == [(text, text) for text in odd]
