"""A tokenizer of a few words."""

from __future__ import annotations

from typing import Any

import pytest

from tests.train import toys


@pytest.fixture(scope="session")
def words() -> Any:
    return toys.tokenizer()
