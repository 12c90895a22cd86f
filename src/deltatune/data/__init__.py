"""From a data file to padded batches, every fault told by file, line and field."""

from deltatune.data.prepare import Corpus as Corpus
from deltatune.data.prepare import prepare as prepare
from deltatune.data.read import Table as Table
from deltatune.data.read import read_table as read_table
from deltatune.data.read import table_of as table_of
