"""Adapters put together: the rules of weighted sums, changes of weights as products of factors, conversion to LoRA."""

from deltatune.combine.rules import (
    dare_linear,
    dare_ties,
    disjoint_merge,
    magnitude_prune,
    majority_sign_mask,
    prune,
    task_arithmetic,
    ties,
)

calculate_majority_sign_mask = majority_sign_mask  # PEFT's name

__all__ = [
    "calculate_majority_sign_mask",
    "dare_linear",
    "dare_ties",
    "disjoint_merge",
    "magnitude_prune",
    "majority_sign_mask",
    "prune",
    "task_arithmetic",
    "ties",
]
