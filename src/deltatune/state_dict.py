"""An adapter's tensors under the keys of its file, out of a model and into it."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.adapter import Stored
from deltatune.bases.parameter import is_finite
from deltatune.copies import TrainedCopies
from deltatune.errors import AdapterNameError, MismatchError, SaveError
from deltatune.fused.apart import renamed
from deltatune.inject import adapted_layers, trained_copies
from deltatune.notice import warn
from deltatune.shared import shared_modules
from deltatune.storage.keys import once_each

ROOT = "base_model.model."
TOP = "base_model."  # before what all layers share


class Loaded(namedtuple("Loaded", ["missing_keys", "unexpected_keys"])):
    """What loading reports.

    Attributes:
        verified: Whether the file's values agreed with the digest that was saved with them; None: it has none.
    """

    verified: bool | None = None


@dataclass
class Part:
    """One module of an adapter.

    Attributes:
        prefix: Of its keys in the file, below the root; None at the top, for what all layers share.
        tensors: What the file holds of it.
        fill: Puts such tensors in place.
        derived: What config and base give again; a file may hold it all the same.
        checked: What checksums are taken of.
    """

    prefix: str | None
    tensors: dict[str, Tensor]
    fill: Callable[[dict[str, Tensor]], None]
    derived: dict[str, Tensor] = field(default_factory=dict)
    checked: Callable[[], dict[str, Tensor]] = dict

    def under(self, root: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of this module under their keys in the file."""
        start = root.removesuffix("model.") if self.prefix is None else root + self.prefix
        return {start + name: tensor for name, tensor in tensors.items()}

    def found(self, root: str, given: Collection[str] | None) -> dict[str, Tensor]:
        """What the file holds of it, and those of the derived tensors that are given (None: all)."""
        derived = self.under(root, self.derived).items()
        return self.under(root, self.tensors) | {key: value for key, value in derived if given is None or key in given}


def parts(model: nn.Module, name: str) -> list[Part]:
    """All that belongs to one adapter of a bare (perhaps adapted) model."""
    found = [_stored(None, shared) for key, shared in shared_modules(model).items() if key == name]
    found += [
        _stored(f"{path}.", layer.adapters[name])  # type: ignore[arg-type]
        for path, layer in adapted_layers(model)
        if name in layer.adapters
    ]
    found = [part for part in found if part.tensors or part.derived]  # a tied layer's are those of the layer it follows
    found += [
        Part(f"{path}.", copies.modules_to_save[name].state_dict(keep_vars=True), _filler(copies, name))
        for path, copies in trained_copies(model)
        if name in copies.modules_to_save
    ]
    return found


def _stored(prefix: str | None, stored: Stored) -> Part:
    derived = stored.derived_tensors()
    kept = stored.kept_tensors() if derived else {}
    derived = {name: tensor for name, tensor in derived.items() if name not in kept}

    def load(tensors: dict[str, Tensor]) -> None:
        if derived.keys() & tensors.keys():
            stored.keeps_derived = True
            tensors = {**stored.file_tensors(), **tensors}
        stored.load_file_tensors(tensors)

    return Part(prefix, stored.file_tensors(), load, derived, stored.checked_tensors)


def _filler(copies: TrainedCopies, name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: _discard(copies.modules_to_save[name].load_state_dict(tensors))


def _discard(_: Any) -> None:
    return None


def collect(model: nn.Module, name: str, root: str = ROOT, given: Collection[str] | None = ()) -> dict[str, Tensor]:
    """File key -> tensor of one adapter: what its file holds, and the given ones (None: all) of the derived tensors."""
    return keyed(parts(model, name), name, root, given)


def keyed(found: list[Part], name: str, root: str = ROOT, given: Collection[str] | None = ()) -> dict[str, Tensor]:
    """What `collect` returns, out of parts that are known."""
    if not found:
        raise AdapterNameError(f"no adapter named {name!r} on this model", field="adapter_name", found=name)
    return {key: tensor for part in found for key, tensor in part.found(root, given).items()}


def derived(model: nn.Module, name: str, given: Collection[str] = ()) -> Iterator[tuple[str, Tensor]]:
    """Names and values of what a file leaves out and is to be checked; without modules of which some are given."""
    for part in parts(model, name):
        if not part.under(ROOT, part.derived).keys() & set(given):
            yield from part.checked().items()


def matched(given: Mapping[str, Tensor], expected: Collection[str]) -> dict[str, Tensor]:
    """Tensors under the expected keys, whether they were written with or without a `PeftModel` around the model.

    Raises:
        MismatchError: One stands under both keys.
    """
    known = {_bare(key): key for key in expected}
    return once_each(
        (key, key if key in expected else known.get(_bare(key), key), tensor) for key, tensor in given.items()
    )


def _bare(key: str) -> str:
    return key.removeprefix(ROOT if key.startswith(ROOT) else TOP)


def translated(
    model: nn.Module, name: str, tensors: Mapping[str, Tensor], root: str = ROOT, plainly: bool | None = None
) -> dict[str, Tensor]:
    """A file's tensors as the adapters that are to hold them read them (`Adapter.from_file`).

    Args:
        plainly: What `reads_plainly` says, where it has been asked.
    """
    found, top = renamed(tensors, model), root.removesuffix("model.")
    if (shared := shared_modules(model).get(name)) is not None:
        inner = {key: tensor for key, tensor in found.items() if top != root and key.startswith(root)}
        own = {key.removeprefix(top): tensor for key, tensor in found.items() if key not in inner}
        found = inner | {top + key: tensor for key, tensor in shared.from_file(own).items()}
    if reads_plainly(model, name) if plainly is None else plainly:
        return found
    layers = {path: layer for path, layer in adapted_layers(model) if name in layer.adapters}
    for path, own in _by_layer(found, layers, root).items():
        read = layers[path].adapters[name].from_file(own)  # type: ignore[operator]
        if read is not own:
            for key in own:
                del found[f"{root}{path}.{key}"]
            found |= {f"{root}{path}.{key}": tensor for key, tensor in read.items()}
    return found


def reads_plainly(model: nn.Module, name: str) -> bool:
    """Whether the adapters on layers take a file's tensors as they are; others may change their shape to take them."""
    here = (layer.adapters[name] for _, layer in adapted_layers(model) if name in layer.adapters)
    return all(adapter.reads_plainly for adapter in here)


def _by_layer(tensors: Mapping[str, Tensor], layers: Collection[str], root: str) -> dict[str, dict[str, Tensor]]:
    """The tensors of each layer under their names in it; of layers in each other the inner one has its own."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        path, name = key.removeprefix(root), ""
        while path and path not in layers:
            path, _, last = path.rpartition(".")
            name = f"{last}.{name}" if name else last
        if path and key.startswith(root):
            found.setdefault(path, {})[name] = tensor
    return found


def check(
    given: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    source: str,
    strict: bool = True,
    finite: bool = True,
) -> tuple[list[str], list[str]]:
    """Compare a file's tensors with what a model expects; returns missing and surplus keys.

    Raises:
        MismatchError: Wrong shapes or dtypes, values that are not finite, and (strict) missing or surplus keys.
    """
    missing = sorted(expected.keys() - given.keys())
    surplus = sorted(given.keys() - expected.keys())
    if strict and (missing or surplus):
        raise MismatchError(
            f"{source} does not fit the adapter: "
            + "; ".join(
                f"{len(keys)} {kind} ({', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''})"
                for kind, keys in (("missing", missing), ("surplus", surplus))
                if keys
            )
            + "; check base model, target_modules and adapter type",
            path=source,
            found=surplus,
            expected=missing,
        )
    for key in sorted(given.keys() & expected.keys()):
        _check_tensor(key, given[key], expected[key], source, finite)
    return missing, surplus


def fitting(given: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Tensors without those of another shape, which a warning names (`ignore_mismatched_sizes`)."""
    wrong = {key for key in given.keys() & expected.keys() if given[key].shape != expected[key].shape}
    if wrong:
        shapes = [f"{key} {tuple(given[key].shape)} for {tuple(expected[key].shape)}" for key in sorted(wrong)]
        warn(
            f"{source}: {len(wrong)} tensors of other shapes are left out, these stay as they are: {'; '.join(shapes)}"
        )
    return {key: tensor for key, tensor in given.items() if key not in wrong}


def _check_tensor(key: str, given: Tensor, expected: Tensor, source: str, finite: bool) -> None:
    if not isinstance(given, Tensor) or (given.is_meta and not expected.is_meta):
        what = (
            "is on the meta device and has no numbers" if isinstance(given, Tensor) else f"is a {type(given).__name__}"
        )
        raise MismatchError(
            f"{source}: {key} {what}, expected a tensor", path=source, key=key, found=type(given), expected=Tensor
        )
    if given.shape != expected.shape:
        raise MismatchError(
            f"{source}: {key} has shape {tuple(given.shape)}, the model expects {tuple(expected.shape)}; "
            "was it made for another base, rank or set of layers?",
            path=source,
            key=key,
            found=tuple(given.shape),
            expected=tuple(expected.shape),
        )
    if given.is_floating_point() != expected.is_floating_point():
        raise MismatchError(f"{source}: {key} is {given.dtype}, expected {expected.dtype}", path=source, key=key)
    if finite:
        check_finite(source, key, given)
    if given.is_floating_point() and expected.dtype == torch.float16:
        largest = given[given.isfinite()].abs().max().item() if given.isfinite().any() else 0.0
        if largest > torch.finfo(torch.float16).max:
            raise MismatchError(f"{source}: {key} reaches {largest:g}, too large for float16", path=source, key=key)


def check_finite(source: str, key: str, given: Tensor) -> None:
    if given.is_floating_point() and not is_finite(given):
        count = int((~given.float().isfinite()).sum())
        raise MismatchError(f"{source}: {key} holds {count} values that are not finite", path=source, key=key)


@torch.no_grad()
def fill(
    model: nn.Module, name: str, tensors: Mapping[str, Tensor], root: str = ROOT, found: list[Part] | None = None
) -> None:
    """Put tensors that `check` has passed into an adapter, whose parts may be known already."""
    for part in parts(model, name) if found is None else found:
        names = {**part.tensors, **part.derived}
        keys = dict(zip(names, part.under(root, names)))
        own = {name: tensors[key] for name, key in keys.items() if key in tensors}
        if own:
            part.fill({**part.tensors, **own})
    for _, layer in adapted_layers(model):
        if name in layer.adapters and layer.adapters[name].settles:
            layer.adapters[name].settle(layer.as_map())  # type: ignore[operator]


def replaced(model: nn.Module, own: Mapping[str, Tensor], values: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Tensors of an adapter with other values, which go by the model's own keys (gathered from shards, say)."""
    if values is None:
        return {key: tensor.detach() for key, tensor in own.items()}
    names = {id(tensor): key for key, tensor in model.state_dict(keep_vars=True).items()}
    if own and not any(names.get(id(tensor)) in values for tensor in own.values()):
        wanted = next((names[id(tensor)] for tensor in own.values() if id(tensor) in names), None)
        raise SaveError(
            f"state_dict: none of the {len(own)} tensors of the adapter is among its {len(values)} keys "
            f"({', '.join(list(values)[:3])}); they are those of the model, such as {wanted}",
            field="state_dict",
            found=list(values)[:3],
            expected=wanted,
        )
    found = {key: values.get(names.get(id(tensor), ""), tensor).detach() for key, tensor in own.items()}
    for key, tensor in found.items():
        if tensor.shape != own[key].shape:
            raise SaveError(
                f"state_dict: {key} has shape {tuple(tensor.shape)}, the adapter's is {tuple(own[key].shape)}; a part "
                "of a sharded model? Gather it first",
                field="state_dict",
                key=key,
                found=tuple(tensor.shape),
                expected=tuple(own[key].shape),
            )
    return found
