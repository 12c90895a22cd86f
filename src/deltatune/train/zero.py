"""`profile: zero3`: the blocks of a frozen base in shards by DeepSpeed's ZeRO-3; what trains is whole everywhere.

DeepSpeed is handed the model without an optimizer: it partitions every parameter, and gathers a block for the time of
its own forward and backward pass. What trains, and what stands outside of the blocks, is gathered once and for all. So
gradients are plain ones that DDP averages, and steps, clipping, checkpoints and
files are those of any other profile: no optimizer of DeepSpeed, no step inside of `backward`, none of its pickles.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.errors import ConfigError, StateError
from deltatune.helpers.bare import bare
from deltatune.storage.fingerprint import keep_fingerprint
from deltatune.train import randomness
from deltatune.train.sharding import blocks_of, mesh_across, place, whole_parameters

CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,  # asked for, and of no meaning without its optimizer
    # small parameters of a block stay in shards as well: what is to be whole is said by us
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}
HELD = -1  # no module's number: the user of a parameter that stays whole


def check_installed() -> None:
    """
    Raises:
        ConfigError: DeepSpeed is not there.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "profile='zero3' needs DeepSpeed, which is not installed: pip install 'deltatune[deepspeed]'; profile: "
            "fsdp2 shares the same frozen weights with torch alone",
            field="profile",
            found="zero3",
            expected="fsdp2",
        )


def config_for(offload: str) -> dict[str, Any]:
    """DeepSpeed's config.

    Args:
        offload: "cpu": this process's shards wait in the memory of the host; "none": on its device.
    """
    zero = dict(CONFIG["zero_optimization"])
    if offload != "none":
        zero["offload_param"] = {"device": offload, "pin_memory": torch.accelerator.is_available()}
    return {**CONFIG, "zero_optimization": zero}


def partition(
    model: nn.Module, device: torch.device, across: str, offload: str, batch: dict[str, Tensor], deepspeed: Any = None
) -> None:
    """Partition an adapted base in place. Arguments and what they mean are those of `deltatune.train.sharding.shard`.

    Args:
        deepspeed: The library; imported if left out.
    """
    library = deepspeed if deepspeed is not None else importlib.import_module("deepspeed")
    base = bare(model)
    keep_fingerprint(base)
    blocks = blocks_of(base)
    whole = whole_parameters(model, blocks)
    config = config_for(offload)
    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it tells every group and bucket
    try:
        for block in blocks:
            library.utils.set_z3_leaf_module(block, True)  # all that happens inside of it sees whole weights
        group = mesh_across(device, across).get_group()
        # parameter by parameter onto the device: `initialize` alone would put the whole base there first
        library.zero.Init(module=base, data_parallel_group=group, config_dict_or_path=config)
        library.initialize(model=base, config=config, dist_init_required=False)
    finally:
        logger.setLevel(level)
    keep_whole(whole)
    for module in model.modules():
        place(module, device)
    with randomness.untouched(), torch.no_grad():
        model(**{name: tensor.to(device) for name, tensor in batch.items()})


def keep_whole(parameters: set[nn.Parameter]) -> None:
    """Gather parameters for good.

    DeepSpeed's own mark (`ds_persist`) holds only once it has recorded the order of modules, and a parameter that is
    released comes back as it was partitioned: steps made since then would be lost, without a word. So a user is entered
    who never leaves, and releasing one all the same is an error.
    """
    known: list[Any] = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    known.sort(key=lambda parameter: parameter.ds_id)  # all processes in one order
    if known:
        known[0].all_gather(known)
    for parameter in known:
        parameter.ds_persist = True
        parameter.ds_active_sub_modules.add(HELD)
        parameter.partition = _refuse


def _refuse(*args: Any, **kwargs: Any) -> None:
    raise StateError(
        "DeepSpeed was about to partition a parameter that trains again, which would lose its steps; report this",
        field="profile",
        found="zero3",
    )
