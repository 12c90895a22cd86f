"""The loss of language models without whole logits.

`chunk_loss(model)` puts two hooks on the model's head: in a call with labels it hands on `LazyLogits`, which know the
head's input. The model's own code scales, shifts and flattens them, and its cross-entropy, when it meets them, computes
a few rows at a time. Whatever else is done with them gets the logits themselves.
"""

from __future__ import annotations
