"""Where the adapters of a store are, and their way from tier to tier. Nothing here knows of threads."""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from deltatune import inject
from deltatune.errors import ConfigError, LimitError
from deltatune.loading import How, load_saved
from deltatune.storage import folder as storage
from deltatune.storage.options import Allowed

if TYPE_CHECKING:
    from deltatune.model import PeftModel


@dataclass(eq=False)
class Entry:
    """One registered adapter.

    Attributes:
        reading: Options for reading the folder.
        allowed: What it may differ in from the model.
        bytes: What it takes on the model; 0 while that is not known.
        saved: What the host's memory keeps of it.
        users: Blocks that use it, by thread.
    """

    name: str
    folder: str
    reading: dict[str, Any]
    allowed: Allowed
    bytes: int = 0
    saved: storage.Saved | None = None
    users: Counter[int] = field(default_factory=Counter)

    @property
    def host_bytes(self) -> int:
        return 0 if self.saved is None else sum(map(_bytes, self.saved.tensors.values()))

    def read(self) -> storage.Saved:
        """Its tensors, out of the host's memory or else the folder."""
        return self.saved or storage.read(self.folder, **self.reading)

    def needs(self, saved: storage.Saved) -> int:
        """The bytes it is going to take: those it took before, or those of its tensors, which are float32 at least."""
        numbers = saved.tensors.values()
        return self.bytes or sum(t.numel() * max(t.element_size(), 4) for t in numbers)


class Tiers:
    """Those on the model and those in the host's memory, the least recently used first."""

    def __init__(self, model: PeftModel, most: int | None, most_bytes: int | None, host_bytes: int) -> None:
        for name, value, least in (("most", most, 1), ("most_bytes", most_bytes, 1), ("host_bytes", host_bytes, 0)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise ConfigError(
                    f"AdapterStore: {name}={value!r}, expected a whole number of {least} or more",
                    field=name,
                    found=value,
                )
        self.model, self.most, self.most_bytes, self.host_bytes = model, most, most_bytes, host_bytes
        self.on_model: OrderedDict[str, Entry] = OrderedDict()
        self.in_host: OrderedDict[str, Entry] = OrderedDict()

    @property
    def idle(self) -> list[Entry]:
        """Those that may be taken off the model: nobody uses them, and they are not active."""
        active = self.model.base_model.selection.active
        return [entry for entry in self.on_model.values() if not entry.users and entry.name not in active]

    def fit(self, staying: Collection[Entry], needed: Collection[int]) -> bool:
        """Whether there is room for those that stay and for others of so many bytes each."""
        if self.most is not None and len(staying) + len(needed) > self.most:
            return False
        return self.most_bytes is None or sum(entry.bytes for entry in staying) + sum(needed) <= self.most_bytes

    def put_on(self, entry: Entry, saved: storage.Saved, wanted: Collection[Entry]) -> None:
        """Onto the model, in the place of those that are idle and not wanted.

        Raises:
            LimitError: It is larger than its file said, and there is no room; it is taken off again.
        """
        self._make_room(entry.needs(saved), 1, wanted)
        shown = copy.copy(saved)
        shown.config = copy.deepcopy(saved.config)  # grafting fills it in
        load_saved(self.model, entry.name, shown, How(), entry.allowed)
        self.in_host.pop(entry.name, None)
        entry.saved = None
        entry.bytes = sum(map(_bytes, inject.adapter_tensors(self.model.base_model.model, entry.name)))
        self.on_model[entry.name] = entry
        self._make_room(0, 0, wanted)
        if not self.fit(self.on_model.values(), ()):
            self.take_off(entry)
            raise LimitError(
                f"adapter {entry.name!r} takes {entry.bytes} bytes, more than its file has; there is no room for it "
                f"within most_bytes={self.most_bytes}",
                field="most_bytes",
                found=entry.bytes,
                expected=self.most_bytes,
            )

    def _make_room(self, bytes_: int, count: int, wanted: Collection[Entry]) -> None:
        for entry in [entry for entry in self.idle if entry not in wanted]:
            if self.fit(self.on_model.values(), [bytes_] * count):
                return
            self.take_off(entry)

    def take_off(self, entry: Entry) -> None:
        """Off the model, into the host's memory as far as that goes, else back to the folder."""
        if self.on_model.pop(entry.name, None) is None:
            return
        if self.host_bytes:
            tensors = {key: t.detach().cpu() for key, t in self.model.adapter_tensors(entry.name).items()}
            entry.saved = storage.Saved(self.model.peft_config[entry.name], tensors, None, entry.folder)
            self.in_host[entry.name] = entry
        self.model.delete_adapter(entry.name)
        while sum(kept.host_bytes for kept in self.in_host.values()) > self.host_bytes:
            self.in_host.popitem(last=False)[1].saved = None


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
