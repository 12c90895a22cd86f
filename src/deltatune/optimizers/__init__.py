"""Optimizers that know what a LoRA's two factors are to each other. Names and arguments are PEFT's."""

from deltatune.optimizers.lorafa import LoraFAOptimizer as LoraFAOptimizer
from deltatune.optimizers.lorafa import create_lorafa_optimizer as create_lorafa_optimizer
from deltatune.optimizers.loraplus import create_loraplus_optimizer as create_loraplus_optimizer
from deltatune.optimizers.loraplus import loraplus_groups as loraplus_groups
from deltatune.optimizers.riemannian import create_riemannian_optimizer as create_riemannian_optimizer
