"""What a folder holds, without loading the base model: adapters by their files, models by their config."""

from deltatune.inspect.adapter import AdapterFacts as AdapterFacts
from deltatune.inspect.adapter import inspect_adapter as inspect_adapter
from deltatune.inspect.difference import AdapterDifference as AdapterDifference
from deltatune.inspect.difference import diff_adapters as diff_adapters
from deltatune.inspect.model import ModelFacts as ModelFacts
from deltatune.inspect.model import inspect_model as inspect_model
