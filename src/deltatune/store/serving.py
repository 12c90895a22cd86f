"""`AdapterStore`: serves many adapters with one model, of which a few are on it at a time."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from deltatune.config import PeftConfig
from deltatune.errors import AdapterNameError, ConfigError, LimitError, StateError
from deltatune.names import BASE, check_name
from deltatune.registry import METHODS
from deltatune.storage import options
from deltatune.store.tiers import Entry, Tiers
from deltatune.suggest import did_you_mean

if TYPE_CHECKING:
    from deltatune.model import PeftModel

Tier = Literal["model", "host", "disk"]


class AdapterStore:
    """Serves many adapters of layer methods with one model, under a limit on what is there at once.

        store = AdapterStore(model, most=64)
        for folder in folders:
            store.register(folder.name, folder)
        with store.use(names):                       # on the model, and not taken off within the block
            model.generate(**inputs, adapter_names=names)

    It may be used from several threads. Adapters are served, not trained: what is changed on the model is lost once
    the adapter has gone back to its folder. Those that are active (`set_adapter`) stay on the model.

    Args:
        model: A `PeftModel`. Adapters that are on it already are none of the store's, and do not count.
        most: How many of the store's adapters are on the model at most; None: no limit.
        most_bytes: How many bytes they take there at most; None: no limit.
        host_bytes: How many bytes of those taken off the host's memory keeps. 0: they go back to their folders.

    Raises:
        ConfigError: A limit that is not positive.
    """

    def __init__(
        self, model: PeftModel, most: int | None = None, most_bytes: int | None = None, host_bytes: int = 0
    ) -> None:
        self.model, self._tiers = model, Tiers(model, most, most_bytes, host_bytes)
        self._entries: dict[str, Entry] = {}
        self._waiting: set[int] = set()  # threads that have found no room since the last change
        self._changed = threading.Condition()

    def register(
        self,
        name: str,
        folder: str | Path,
        key_mapping: dict[str, str] | None = None,
        allow_base_mismatch: bool = False,
        **kwargs: Any,
    ) -> None:
        """Make an adapter known; its config is read, its tensors are not.

        Args:
            name: Of the adapter on the model.
            folder: Where it was saved, or a repository of the hub.
            key_mapping: This and all others are those of `load_adapter` (`subfolder`, `revision`, ...).

        Raises:
            AdapterNameError: The name cannot be used.
            StateError: It is taken, in the store or on the model.
            ConfigError: A method outside of single layers (prompts and their kind).
            FormatError: The folder holds no adapter.
        """
        check_name(name)
        allowed, hub = options.loading(allow_base_mismatch, kwargs)
        config = PeftConfig.from_pretrained(folder, **hub)
        method = METHODS.get(config.peft_type)  # type: ignore[arg-type]
        if method is None or method.adapter is None:
            raise ConfigError(
                f"{folder}: {getattr(config.peft_type, 'value', config.peft_type)} acts outside of single layers; "
                "load it with model.load_adapter",
                field="peft_type",
                path=str(folder),
                found=config.peft_type,
            )
        with self._changed:
            if name in self._entries or name in self.model.peft_config:
                where = "registered" if name in self._entries else "on the model"
                raise StateError(
                    f"an adapter named {name!r} is {where} already; choose another name", field="name", found=name
                )
            self._entries[name] = Entry(name, str(folder), {"key_mapping": key_mapping, **hub}, allowed)

    def forget(self, name: str) -> None:
        """Take an adapter off the model, out of the host's memory and out of the store; its folder stays.

        Raises:
            StateError: It is in use, or active.
        """
        with self._changed:
            (entry,) = self._known([name])
            if name in self._tiers.on_model and entry not in self._tiers.idle:
                raise StateError(
                    f"adapter {name!r} is in use; forget it after the blocks that use it", field="name", found=name
                )
            self._tiers.take_off(entry)
            self._tiers.in_host.pop(name, None)
            del self._entries[name]
            self._tell()

    def names(self, tier: Tier | None = None) -> list[str]:
        """Those in a tier, the least recently used first; or all that are registered."""
        with self._changed:
            tiers = {"model": list(self._tiers.on_model), "host": list(self._tiers.in_host)}
            tiers["disk"] = [name for name in self._entries if name not in tiers["model"] + tiers["host"]]
            return list(self._entries) if tier is None else tiers[tier]

    def bytes(self, tier: Literal["model", "host"] = "model") -> int:
        """What the adapters of the store take in a tier."""
        with self._changed:
            on_model, in_host = self._tiers.on_model.values(), self._tiers.in_host.values()
            return sum(e.bytes for e in on_model) if tier == "model" else sum(e.host_bytes for e in in_host)

    @contextmanager
    def use(self, names: str | Iterable[str | None], timeout: float | None = None) -> Iterator[None]:
        """Within the block these adapters are on the model; those that are not yet are loaded first.

        Waits where others in use leave no room. A call that is refused changes no result of any other.

        Args:
            names: A name or several; a list of one name per row may be given as it is, "__base__" included.
            timeout: Seconds to wait for room at most.

        Raises:
            AdapterNameError: One that is not registered.
            LimitError: No room, and none to be hoped for: they exceed the limit, alone or with what this thread uses.
            StateError: No room in time.
            PeftError: A folder is damaged or does not fit the model.
        """
        given, thread = [names] if isinstance(names, str) else list(names), threading.get_ident()
        with self._changed:
            wanted = self._known(dict.fromkeys(name for name in given if name not in (None, BASE)))
            self._bring(wanted, timeout, thread)
            for entry in wanted:
                entry.users[thread] += 1
        try:
            yield
        finally:
            with self._changed:
                for entry in wanted:
                    entry.users[thread] -= 1
                    entry.users += Counter()  # without those at zero
                self._tell()

    def _known(self, names: Iterable[Any]) -> list[Entry]:
        names = list(names)
        for name in names:
            if name not in self._entries:
                raise AdapterNameError(
                    f"no adapter named {name!r} is registered{did_you_mean(str(name), self._entries)}; "
                    "register(name, folder) makes it known",
                    field="names",
                    found=name,
                )
        return [self._entries[name] for name in names]

    def _tell(self) -> None:
        self._waiting.clear()
        self._changed.notify_all()

    def _bring(self, wanted: list[Entry], timeout: float | None, thread: int) -> None:
        """All of them onto the model, once there is room for all, and marked as used last."""
        tiers, contents = self._tiers, {}
        while True:
            for entry in wanted:
                if entry.name not in tiers.on_model and entry not in contents:
                    contents[entry] = entry.read()
            missing = [entry for entry in wanted if entry.name not in tiers.on_model]
            idle = [entry for entry in tiers.idle if entry not in wanted]
            staying = [entry for entry in tiers.on_model.values() if entry not in idle]
            if tiers.fit(staying, [entry.needs(contents[entry]) for entry in missing]):
                break
            self._wait(staying, missing, timeout, thread)
        for entry in missing:
            tiers.put_on(entry, contents[entry], wanted)
        for entry in wanted:
            tiers.on_model.move_to_end(entry.name)

    def _wait(self, staying: list[Entry], missing: list[Entry], timeout: float | None, thread: int) -> None:
        others = {user for entry in staying for user in entry.users} - {thread} - self._waiting
        names, together = [entry.name for entry in missing], len(staying) + len(missing)
        limits = f"most={self._tiers.most}, most_bytes={self._tiers.most_bytes}"
        crowded = self._tiers.most is not None and together > self._tiers.most
        if not others:  # nobody who could leave
            raise LimitError(
                f"no room on the model for {names} beside {[entry.name for entry in staying]}, which are in use or "
                f"asked for too; the limits of this store are {limits}: use fewer in a batch, or raise them",
                field="most" if crowded else "most_bytes",
                found=together if crowded else names,
                expected=self._tiers.most if crowded else self._tiers.most_bytes,
            )
        self._waiting.add(thread)
        if not self._changed.wait(timeout):
            self._waiting.discard(thread)
            raise StateError(
                f"no room on the model for {names} within {timeout} seconds: the limits of this store are {limits}, "
                "and all that is there is in use; wait longer, or raise them",
                field="timeout",
                found=timeout,
            )
