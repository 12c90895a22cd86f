"""Answers of an adapted model: base and adapter from the adapter's folder, inputs in batches, text or classes out."""

from deltatune.generate.answers import Answer as Answer
from deltatune.generate.answers import answers as answers
from deltatune.generate.decoding import Decoding as Decoding
from deltatune.generate.load import Ready as Ready
from deltatune.generate.load import load_ready as load_ready
from deltatune.generate.several import BASE as BASE
from deltatune.generate.several import Several as Several
from deltatune.generate.several import load_several as load_several
from deltatune.generate.several import plan_several as plan_several
