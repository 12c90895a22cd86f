"""The memory and time of a training job before it runs: steps of it with tensors that have shapes and no numbers."""

from deltatune.plan.plan import Plan as Plan
from deltatune.plan.plan import plan as plan
