"""Linear layers of which transformers' tensor parallelism (`tp_plan`) has given each process a slice.

Such a layer takes or gives a part of the features, as its neighbours expect of it: `colwise` gives this process' part
of the output, `rowwise` takes its part of the input. Seen as a map it is the whole layer. What it takes is gathered
before an adapter sees it, what it gives is cut to this process' part after that. So an adapter is whole and the same in
every process, its file is that of one process, and any method acts. The price is traffic: one gathering of what is cut
on the way forward, and one on the way back.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.bases.linear import Linear
from deltatune.bases.parallel import ParallelLinear


def style_of(module: nn.Module) -> Any:
    """The style by which transformers runs a layer in slices; None where it is not in slices, or not by these two.

    There is no other trace of it on the layer than the forward that the style has put there.
    """
    library = sys.modules.get("transformers.distributed.tensor_parallel")
    forward = vars(module).get("forward")
    if library is None or forward is None:
        return None
    held = (cell.cell_contents for cell in getattr(forward, "__closure__", None) or ())
    known = (library.ColwiseParallel, library.RowwiseParallel)
    return next((found for found in held if type(found) in known), None)


def is_sliced(tensor: Any) -> bool:
    """Whether other processes have the rest of a tensor."""
    return hasattr(tensor, "placements") and hasattr(tensor, "full_tensor")


class SlicedLinear(ParallelLinear):
    types = ()  # a Linear to those who ask what can be adapted

    @staticmethod
    def fits(module: nn.Module) -> bool:
        return Linear.fits(module) and is_sliced(module._parameters.get("weight")) and style_of(module) is not None

    def __init__(self, module: nn.Module, args: tuple = (), kwargs: dict[str, Any] | None = None) -> None:
        super().__init__(module, args, kwargs)
        library, style = sys.modules["transformers.distributed.tensor_parallel"], style_of(module)
        by_rows = type(style) is library.RowwiseParallel
        self.takes_part = by_rows and _cuts(style.input_layouts)
        self.gives_part = not by_rows and _cuts(style.output_layouts)

    def __call__(self, x: Tensor) -> Tensor:
        y = self.module(self._part(x) if self.takes_part else x, *self.args, **self.kwargs)
        return self._whole(y, self.out_features) if self.gives_part else y

    def taken(self, x: Tensor) -> Tensor:
        return self._whole(x, self.in_features) if self.takes_part else x

    def paired(self, y: Tensor) -> Tensor:
        return self._part(y) if self.gives_part else y

    @property
    def bias(self) -> Tensor | None:
        found: Any = self.module._parameters["bias"]
        return found.full_tensor() if is_sliced(found) else found

    def matrix(self, stored: Any) -> Tensor:
        return stored.full_tensor() if is_sliced(stored) else stored

    def hold(self, weight: Tensor) -> nn.Parameter:
        from torch.distributed.tensor import distribute_tensor

        old: Any = self.module.weight
        cut = distribute_tensor(weight.detach().to(old.dtype), old.device_mesh, old.placements, src_data_rank=None)
        return nn.Parameter(cut, requires_grad=old.requires_grad)

    def _whole(self, part: Tensor, size: int) -> Tensor:
        """All features of this process' share of them; backward takes this process' share of the gradient."""
        from torch.distributed.tensor import DTensor, Replicate, Shard

        shape = torch.Size((*part.shape[:-1], size))
        stride = torch.empty(shape, device="meta").stride()
        mesh = self._mesh
        cut = DTensor.from_local(part, mesh, [Shard(part.ndim - 1)], run_check=False, shape=shape, stride=stride)
        return cut.redistribute(placements=[Replicate()]).to_local()

    def _part(self, whole: Tensor) -> Tensor:
        """This process' share of the features; backward gathers the gradients of all shares."""
        from torch.distributed.tensor import DTensor, Replicate, Shard

        all_of_it = DTensor.from_local(whole, self._mesh, [Replicate()], run_check=False)
        return all_of_it.redistribute(placements=[Shard(whole.ndim - 1)]).to_local()

    @property
    def _mesh(self) -> Any:
        weight: Any = self.module._parameters["weight"]
        return weight.device_mesh


def _cuts(layout: Any) -> bool:
    """Whether a layout leaves each process a part."""
    return layout.is_shard()
