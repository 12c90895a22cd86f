"""The tensors of a LoRA adapter under the names by which files and programs know them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deltatune.adapter import Adapter
from deltatune.factors import Factor
from deltatune.filling import Source, source
from deltatune.lora.quantised import Quantised
from deltatune.lora.stacked import NAMES, START_A, START_B, unstacked
from deltatune.lora.variants import view
from deltatune.lora.variants.dora import Dora
from deltatune.lora.variants.variant import Variant
from deltatune.room import of_rank
from deltatune.storage.derived import in_waves


class Known(Adapter):
    """Files call the factors of an embedding by names of their own, without `.weight`, and hold no room.

    Attributes:
        r: The rank.
        room: The rank that the tensors have, where it may be higher than its own.
        embedding: Whether it is on one.
        variants: What the config asks for besides.
        start_A, start_B: Where the factors began, if the base gives way by their product.
        stand_in: What stands in the place of the layer's weight.
        awaits_data: Whether its start needs data that have not been read.
    """

    r: int
    room: int | None = None
    embedding: bool
    lora_A: Factor
    lora_B: Factor
    variants: Sequence[Variant]
    start_A: Tensor | None
    start_B: Tensor | None
    stand_in: Quantised | None
    awaits_data: bool

    @property
    def A(self) -> Tensor:
        raise NotImplementedError

    def file_tensors(self) -> dict[str, Tensor]:
        if self.room is None:
            return self._held()
        return {name: of_rank(self, tensor, tensor, self.r) for name, tensor in self._held().items()}

    def load_file_tensors(self, tensors: dict[str, Tensor]) -> None:
        vars(self)["awaits_data"] = False  # past nn.Module's look-ups
        with torch.no_grad():
            for name, tensor in self._held().items():
                value = tensors[name] if self.room is None else of_rank(self, tensor, tensors[name], self.room)
                tensor.copy_(value)  # counted by torch, for what is kept until it changes

    def _held(self) -> dict[str, Tensor]:
        names = NAMES[self.embedding]
        bias = {} if self.lora_B.bias is None else {"lora_B.bias": self.lora_B.bias}
        own = {name: tensor for variant in self.variants for name, tensor in variant.file_tensors().items()}
        return {names[0]: self.lora_A.weight, names[1]: self.lora_B.weight, **bias, **own, **self.kept_tensors()}

    def from_file(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.start_A is None or self.start_B is None:
            return tensors
        found = unstacked(tensors, self.r, NAMES[self.embedding])
        if self.keeps_derived and source() is Source.PEER:  # data have been collected once more for a file of PEFT
            return {START_A: self.start_A, START_B: self.start_B, **found}
        if self.keeps_derived and self.embedding and found.get(NAMES[True][0], self.A).shape == self.A.shape:
            zero = {START_A: torch.zeros_like(self.start_A), START_B: torch.zeros_like(self.start_B)}
            return {**zero, **found}  # one that came from PEFT, which starts embeddings plainly
        return found

    @property
    def reads_plainly(self) -> bool:
        return self.start_A is None or self.start_B is None  # as `from_file`

    def derived_tensors(self) -> dict[str, Tensor]:
        start_A, start_B = self._buffers["start_A"], self._buffers["start_B"]
        frozen = {} if start_A is None else {START_A: start_A, START_B: start_B}
        fixed = self.lora_B._buffers  # its weight, where it does not train
        return {**frozen, **({NAMES[self.embedding][1]: fixed["weight"]} if fixed else {})}  # type: ignore[dict-item]

    def kept_tensors(self) -> dict[str, Tensor]:
        derived = self.derived_tensors()
        if not derived and not self.variants:  # as most are
            return {}
        kept = {name: derived[name] for name in derived if self.keeps_derived or name not in (START_A, START_B)}
        return kept | {name: tensor for variant in self.variants for name, tensor in variant.kept_tensors().items()}

    def checked_tensors(self) -> dict[str, Tensor]:
        """Of Q and of B0 A0, which is all that counts of its factors, whatever their signs and order."""
        if self.stand_in is not None:
            return {"lora_stand_in": in_waves(self.stand_in.weight)}
        if self.start_A is None or self.start_B is None or self.keeps_derived:
            return {}
        return {"lora_start": self.start_B.float() @ in_waves(self.start_A)}

    def live_tensors(self) -> dict[str, tuple[nn.Module, str]]:
        held = [variant.live_tensors() for variant in self.variants]
        own = {name: place for tensors in (super().live_tensors(), *held) for name, place in tensors.items()}
        if not self.embedding:
            return own
        return {"lora_embedding_A": (self.lora_A, "weight"), "lora_embedding_B": (self.lora_B, "weight"), **own}

    def live_parts(self) -> dict[str, nn.Module]:
        own = {name: module for name, module in super().live_parts().items() if module is not self.variants}
        return own | {name: module for variant in self.variants for name, module in variant.named_children()}

    @property
    def lora_embedding_A(self) -> Tensor | None:
        return self.lora_A.weight if self.embedding else None

    @property
    def lora_embedding_B(self) -> Tensor | None:
        return self.lora_B.weight if self.embedding else None

    use_dora = property(lambda self: any(isinstance(variant, Dora) for variant in self.variants))
    lora_magnitude_vector = view("lora_magnitude_vector")
    lora_diag = view("lora_diag")
    lora_monteclora_sampler = view("lora_monteclora_sampler")
    lora_velora_embed = view("lora_velora_embed")
    qalora_group_size = view("qalora_group_size")
