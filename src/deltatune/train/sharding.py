"""`profile: fsdp2`: the blocks of a frozen base in shards (torch's `fully_shard`); what trains is whole everywhere.

Blocks are the modules that transformers does not split. Every process keeps a part of each and gathers it for the time
of the block's own forward and backward pass, so all that happens inside of a block sees whole weights: adapters that
read the matrix, prefixes, fused functions. What stands outside of the blocks (embeddings, last norm, head) would have
to be gathered from the first layer to the last anyway; it stays whole, and can be read at any time.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.adapter import Stored
from deltatune.errors import ConfigError, MismatchError
from deltatune.helpers.bare import bare
from deltatune.helpers.sharded import block_names
from deltatune.storage.fingerprint import keep_fingerprint, packed_weights
from deltatune.train import randomness


def check_shardable(model: nn.Module, profile: str = "fsdp2") -> None:
    """
    Raises:
        ConfigError: The base has no blocks that are known.
        MismatchError: It is quantised, so that a part of its weights means nothing.
    """
    packed = next(packed_weights(model), None)
    if packed is not None:
        name, (_, kind) = packed
        raise MismatchError(
            f"profile={profile!r} cannot shard {name}, whose weight is packed ({kind}); use profile: ddp, in which "
            "every process has the whole quantised base, or load it unquantised",
            field="profile",
            key=name,
            found=kind,
        )
    if not blocks_of(model):
        raise ConfigError(
            f"profile={profile!r} shards a model by its blocks, and {type(model).__name__} names none that it has "
            f"({', '.join(block_names(model)) or 'its _no_split_modules are empty'}); set FSDP_TRANSFORMER_CLS_TO_WRAP "
            "to the class of its blocks, or use profile: ddp",
            field="profile",
            found=profile,
            expected="ddp",
        )


def shard(model: nn.Module, device: torch.device, across: str, batch: dict[str, Tensor]) -> None:
    """Shard an adapted base in place, block by block, so that no device has to hold the whole.

    Args:
        model: On the CPU, the same in every process.
        across: "node": over the processes of a machine, each machine with the whole base; "all": over all processes.
        batch: A row, on the CPU, with which the model is run once: a model that is sharded has to meet its first pass
            as a whole, and may later be entered at its encoder.
    """
    from torch.distributed.fsdp import fully_shard

    base, mesh = bare(model), mesh_across(device, across)
    keep_fingerprint(base)
    blocks = blocks_of(base)
    whole = whole_parameters(model, blocks)
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    fully_shard(base, mesh=mesh, ignored_params=whole)
    for module in model.modules():
        place(module, device)
    with randomness.untouched(), torch.no_grad():
        model(**{name: tensor.to(device) for name, tensor in batch.items()})


def sharded(model: nn.Module) -> bool:
    """Whether this process has only a part of the base: of FSDP2, or of ZeRO-3."""
    return hasattr(bare(model), "_get_fsdp_state") or any(hasattr(p, "ds_id") for p in model.parameters())


def mesh_across(device: torch.device, across: str) -> Any:
    """The processes that share a base: those of a machine ("node"), or all."""
    from torch.distributed.device_mesh import init_device_mesh

    count = torch.distributed.get_world_size()
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", count)) if across == "node" else count
    # frozen weights have no gradients that machines would have to add up: nothing of the base leaves its machine
    return init_device_mesh(device.type, (count // beside, beside), mesh_dim_names=("machine", "shard"))["shard"]


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks that transformers does not split, the outermost ones."""
    names = set(block_names(model))
    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        if type(module).__name__ in names and id(module) not in inside:
            found.append(module)
            inside |= {id(part) for part in module.modules()}
    return found


def whole_parameters(model: nn.Module, blocks: list[nn.Module]) -> set[nn.Parameter]:
    """What no shard is made of: what trains, adapters that are frozen, and what does not belong to one block alone."""
    homes: dict[nn.Parameter, int] = {}
    inside: set[int] = set()
    for block in blocks:
        inside |= {id(part) for part in block.modules()}
        for parameter in set(block.parameters()):
            homes[parameter] = homes.get(parameter, 0) + 1
    outside = {p for part in model.modules() if id(part) not in inside for p in part.parameters(recurse=False)}
    adapters = {p for part in model.modules() if isinstance(part, Stored) for p in part.parameters()}
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    return outside | adapters | trained | {parameter for parameter, count in homes.items() if count > 1}


def place(module: nn.Module, device: torch.device) -> None:
    """Onto the device what is no shard there already; parameters stay the same objects."""
    from torch.distributed.tensor import DTensor

    for parameter in module.parameters(recurse=False):
        if not isinstance(parameter, DTensor):
            parameter.data = parameter.data.to(device)
    for name, buffer in module._buffers.items():
        if buffer is not None and not isinstance(buffer, DTensor):
            module._buffers[name] = buffer.to(device)
