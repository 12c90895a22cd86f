"""What the tensors of an adapted model are called while it is alive: PEFT's names, over our own tree.

A wrapped layer keeps its adapters as `adapters.<adapter>.lora_A.weight`; programs say `lora_A.<adapter>.weight`. They
group parameters by such names and use them as paths (state dicts and their loaders, FSDP, weight synchronisation). So
`named_parameters()`, `named_children()`, `state_dict()`, `load_state_dict()` and `get_submodule()` speak those, and the
tree stays as it is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, MutableMapping
from typing import Any

from torch import Tensor, nn

from deltatune.errors import AdapterNameError

MERGED = "merged"  # metadata of a layer in a state dict: adapters that were merged when it was taken
Place = tuple[nn.Module, str]  # a tensor: the module that holds it, and its name there


def _undeletable(key: str, adapter: str) -> AdapterNameError:
    return AdapterNameError(
        f"{key}: delete_adapter({adapter!r}) takes an adapter off", field="adapter_name", key=key, found=adapter
    )


class _Slots(MutableMapping):
    """Adapter name -> tensor, read from and written to where each is now."""

    def __init__(self, adapters: nn.ModuleDict, name: str, table: str) -> None:
        self.adapters, self.name, self.table = adapters, name, table

    def _places(self) -> dict[str, Place]:
        found = {key: adapter.live_tensors().get(self.name) for key, adapter in self.adapters.items()}  # type: ignore
        return {key: place for key, place in found.items() if place and place[1] in vars(place[0])[self.table]}

    def __getitem__(self, key: str) -> Any:
        module, name = self._places()[key]
        return vars(module)[self.table][name]

    def __setitem__(self, key: str, value: Any) -> None:
        module, name = self._places()[key]
        vars(module)[self.table][name] = value

    def __delitem__(self, key: str) -> None:
        raise _undeletable(key, key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places())

    def __len__(self) -> int:
        return len(self._places())


class Tensors(nn.Module):
    """One tensor of every adapter on a layer, by adapter name: what `layer.hada_w1_a` is to a program."""

    def __init__(self, adapters: nn.ModuleDict, name: str) -> None:
        super().__init__()
        for table in ("_parameters", "_buffers"):
            vars(self)[table] = _Slots(adapters, name, table)

    def _all(self) -> dict[str, Any]:
        return {**self._parameters, **self._buffers}

    def __getitem__(self, name: str) -> Tensor:
        return self._all()[name]

    def __setitem__(self, name: str, value: Tensor) -> None:
        setattr(self, name, value)

    def __contains__(self, name: object) -> bool:
        return name in self._all()

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def keys(self) -> Any:
        return self._all().keys()

    def values(self) -> Any:
        return self._all().values()

    def items(self) -> Any:
        return self._all().items()


class _Parts(MutableMapping):
    """Adapter name -> module that programs know by one name."""

    def __init__(self, adapters: nn.ModuleDict, name: str) -> None:
        self.adapters, self.name = adapters, name

    def _all(self) -> dict[str, nn.Module]:
        found = {key: adapter.live_parts().get(self.name) for key, adapter in self.adapters.items()}  # type: ignore
        return {key: part for key, part in found.items() if part is not None}

    def __getitem__(self, key: str) -> nn.Module:
        return self._all()[key]

    def __setitem__(self, key: str, value: nn.Module) -> None:
        setattr(self.adapters[key], self.name, value)

    def __delitem__(self, key: str) -> None:
        raise _undeletable(key, key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())


class _Left(MutableMapping):
    """What a module of an adapter holds and programs have no name for; it is read here, and changed there."""

    def __init__(self, adapters: nn.ModuleDict, adapter: str, path: str, table: str) -> None:
        self.adapters, self.adapter, self.path, self.table = adapters, adapter, path, table

    def _all(self) -> dict[str, Any]:
        adapter: Any = self.adapters._modules.get(self.adapter)
        if adapter is None:
            return {}
        module = adapter.get_submodule(self.path)
        named = {(id(holder), key) for holder, key in adapter.live_tensors().values()}
        held = vars(module)[self.table].items()
        return {key: tensor for key, tensor in held if tensor is not None and (id(module), key) not in named}

    def __getitem__(self, key: str) -> Any:
        return self._all()[key]

    def __setitem__(self, key: str, value: Any) -> None:
        vars(self.adapters[self.adapter].get_submodule(self.path))[self.table][key] = value

    def __delitem__(self, key: str) -> None:
        raise _undeletable(key, self.adapter)

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())


class Rest(nn.Module):
    """Stands for such a module, which stays out of sight: it has `lora_A` and `scaling` as the layer has, and programs
    find layers by asking for such attributes."""

    def __init__(self, adapters: nn.ModuleDict, adapter: str, path: str) -> None:
        super().__init__()
        for table in ("_parameters", "_buffers"):
            vars(self)[table] = _Left(adapters, adapter, path, table)


class LiveNames:
    """The part of a wrapped layer that names what its adapters hold."""

    def _named(self: Any) -> tuple[dict[str, Tensors], dict[str, dict[str, nn.Module]]]:
        """By name what adapters hold: tensors, and modules by adapter name."""
        adapters = self._modules["adapters"]
        tensors: dict[str, Tensors] = {}
        parts: dict[str, dict[str, nn.Module]] = {}
        known = vars(self).setdefault("_known_tensors", {})  # the same objects each time, for those who compare modules
        for adapter_name, adapter in adapters.items():
            live = adapter.live_tensors()
            for name in live:
                if name not in known:
                    known[name] = Tensors(adapters, name)
                tensors[name] = known[name]
            taken = {id(module) for module, _ in live.values()} if live else ()
            for name, module in adapter.live_parts().items():
                if id(module) not in taken:
                    parts.setdefault(name, {})[adapter_name] = module
        return tensors, parts

    def named(self: Any, name: str) -> nn.Module | None:
        """What the adapters here hold under a name, by adapter name."""
        tensors, parts = self._named()
        if name in tensors:
            return tensors[name]
        inner = {key.partition(".")[2]: value for key, value in tensors.items() if key.startswith(f"{name}.")}
        if inner:
            return nn.ModuleDict(inner)
        return self._part(name) if name in parts else None

    def _part(self: Any, name: str) -> nn.ModuleDict:
        """What adapters here hold under a name; the same object each time."""
        known = vars(self).setdefault("_known_parts", {})
        if name not in known:
            known[name] = nn.ModuleDict()
            vars(known[name])["_modules"] = _Parts(self._modules["adapters"], name)
        return known[name]

    def _rest(self: Any, name: str, adapter: nn.Module) -> Iterator[tuple[str, Rest]]:
        """The modules of an adapter that hold tensors under no name of those above, by path; the same each time."""
        known, inside = vars(self).setdefault("_known_rest", {}), _inside(adapter)
        for path, module in adapter.named_modules():
            if id(module) not in inside and (module._parameters or module._buffers):
                if (name, path) not in known:
                    known[name, path] = Rest(self._modules["adapters"], name, path)
                if known[name, path]._parameters or known[name, path]._buffers:
                    yield path, known[name, path]

    def named_modules(
        self: Any, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        memo = set() if memo is None else memo
        if self in memo:
            return
        if remove_duplicate:
            memo.add(self)
        yield prefix, self
        start, adapters = f"{prefix}." if prefix else "", self._modules["adapters"]
        for name, module in self._modules.items():
            if module is not None and module is not adapters:
                yield from module.named_modules(memo, start + name, remove_duplicate)
        tensors, parts = self._named()
        yield from ((start + name, module) for name, module in tensors.items())
        for name, modules in parts.items():
            yield start + name, self._part(name)
            for adapter, module in modules.items():
                yield from module.named_modules(memo, f"{start}{name}.{adapter}", remove_duplicate)
        for name, adapter in adapters.items():
            yield from (
                (f"{start}adapters.{name}{path and f'.{path}'}", rest) for path, rest in self._rest(name, adapter)
            )

    def named_children(self: Any) -> Iterator[tuple[str, nn.Module]]:
        """By the same names: transformers' Trainer walks over these to tell which parameters decay."""
        yield from ((n, module) for n, module in self._modules.items() if module is not None and n != "adapters")
        tensors, parts = self._named()
        yield from tensors.items()
        yield from ((name, self._part(name)) for name in parts)

    def children(self: Any) -> Iterator[nn.Module]:
        """As they are, for what moves, casts or switches a model."""
        yield from (module for module in dict.fromkeys(self._modules.values()) if module is not None)

    def state_dict(self: Any, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        own: Any = nn.Module.state_dict(self, *args, prefix=prefix, keep_vars=keep_vars)
        if destination is None:
            destination = OrderedDict()
            destination._metadata = OrderedDict()  # type: ignore[attr-defined]
        if hasattr(destination, "_metadata"):  # not in a dict of the caller's, which torch takes too
            destination._metadata.update(own._metadata)
            if self.stash is not None:  # told to whoever loads it, because values in it are those of merged weights
                destination._metadata[prefix[:-1]] = {**own._metadata[prefix[:-1]], MERGED: list(self.stash.names)}
        names = self._names(prefix)
        destination.update((names.get(key, key), value) for key, value in own.items())
        return destination

    def _load_from_state_dict(self: Any, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for own, name in self._names(prefix).items():  # the dict is the loader's own, cut out for this layer
            if name in state_dict:
                state_dict[own] = state_dict.pop(name)
        nn.Module._load_from_state_dict(self, state_dict, prefix, *args)  # type: ignore[arg-type]

    def _names(self: Any, prefix: str) -> dict[str, str]:
        """The key of every adapter tensor in our tree -> the key that programs know."""
        names: dict[str, str] = {}
        for adapter_name, adapter in self._modules["adapters"].items():
            start = f"{prefix}adapters.{adapter_name}."
            special = {(id(module), key): name for name, (module, key) in adapter.live_tensors().items()}
            inside = _inside(adapter)
            for path, module in adapter.named_modules(remove_duplicate=False):
                for key in (*module._parameters, *module._buffers):
                    inner = f"{path}.{key}" if path else key
                    name, below = inside.get(id(module), ("", ""))
                    if (id(module), key) in special:
                        live = f"{special[id(module), key]}.{adapter_name}"
                    elif name:
                        live = f"{name}.{adapter_name}.{below}{key}"
                    else:  # nothing that files or programs know
                        live = f"adapters.{adapter_name}.{inner}"
                    names[start + inner] = prefix + live
        return names


def _inside(adapter: Any) -> dict[int, tuple[str, str]]:
    """Modules of an adapter by id -> the name of the part that each is in, and its path there with a dot behind."""
    found: dict[int, tuple[str, str]] = {}
    for name, part in adapter.live_parts().items():
        for path, module in part.named_modules(remove_duplicate=False):
            found.setdefault(id(module), (name, f"{path}." if path else ""))
    return found


def say_names(layer: Any, incompatible: Any) -> None:
    """A hook after loading: what is missing is reported under the names that programs know."""
    names = {own.split("adapters.", 1)[-1]: name for own, name in layer._names("").items()}
    for index, key in enumerate(incompatible.missing_keys):
        before, found, own = key.rpartition("adapters.")
        if found and own in names and not before.endswith("_"):
            incompatible.missing_keys[index] = before + names[own]
