"""What happens between the config and a trained adapter: one batch, every stop, with shapes and gradients."""

from deltatune.trace.entry import run as run
from deltatune.trace.entry import trace_folder as trace_folder
from deltatune.trace.report import TraceReport as TraceReport
from deltatune.trace.samples import example as example
from deltatune.trace.tracer import trace as trace
