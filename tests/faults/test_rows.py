"""The fault matrix is whole: 92 rows, each with a test that exists or with the issue that brings its subject."""

import ast
import functools
from pathlib import Path

import pytest

from tests.faults.rows import HOLDS, OURS, REFUSED, ROWS

TESTS = Path(__file__).parents[1]


@functools.cache
def functions(file):
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_row_of_the_matrix_is_there_once_and_in_order():
    assert [row.number for row in ROWS] == list(range(1, 93))
    assert all(row.policy in (REFUSED, OURS, HOLDS) for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: str(row.number))
def test_a_row_has_tests_that_exist_or_waits_for_its_subject(row):
    assert bool(row.tests) != bool(row.waits), "either tests, or the issue that brings them"
    for test in row.tests:
        file, name = test.split("::")
        assert name.startswith("test_") and name in functions(file), test
