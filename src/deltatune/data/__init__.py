"""From a data file to padded batches, every fault told by file, line and field."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deltatune.data.prepare import Corpus as Corpus
from deltatune.data.prepare import prepare as prepare
from deltatune.data.read import Table as Table
from deltatune.data.read import read_table as read_table
from deltatune.data.read import table_of as table_of

if TYPE_CHECKING:
    from deltatune.data.checking import Report as Report
    from deltatune.data.checking import check as check


def __getattr__(name: str) -> Any:
    if name in ("check", "Report"):  # needs the settings of training, and so pydantic
        from deltatune.data import checking

        return getattr(checking, name)
    raise AttributeError(f"module 'deltatune.data' has no attribute {name!r}")
