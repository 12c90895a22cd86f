"""The command line with all its verbs."""

# each adds its verbs, in the order in which the help shows them
from deltatune.cli.verbs import begin, train, use, look, ship  # isort: skip
from deltatune.cli.verbs.root import app

__all__ = ["app", "begin", "look", "ship", "train", "use"]
