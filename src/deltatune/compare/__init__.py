"""`deltatune compare`: several methods on the same rows, over several seeds, and which differences are within noise."""

from deltatune.compare.plan import Candidate as Candidate
from deltatune.compare.plan import CompareSettings as CompareSettings
from deltatune.compare.run import Comparison as Comparison
from deltatune.compare.run import compare as compare
