"""Which modules an adapter is grafted onto: names, patterns, "all-linear", per-architecture defaults.

Paths are those of the bare model: a wrapped layer keeps its path, and nothing inside a wrapper is ever a target.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from deltatune import bounded, checks
from deltatune.adapter import Adapter, LinearMap
from deltatune.bases import as_map, supported
from deltatune.bases.block import Block
from deltatune.config import PeftConfig, TaskType
from deltatune.copies import TrainedCopies
from deltatune.errors import NoMatchingPeftModuleError, TargetError
from deltatune.filling import Source, source
from deltatune.layer import AdaptedLayer
from deltatune.notice import warn
from deltatune.patterns import by_layer, name_matches, pattern_value
from deltatune.shared import SharedModules
from deltatune.suggest import nearest

ALL_LINEAR = "all-linear"
HEAD_NAMES = ("score", "classifier", "qa_outputs")


def walk(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Paths and modules of a model as it was before any adapter; a module reachable twice comes twice."""
    # a stack in one generator: of nested ones every module would be handed through all those around it
    around = [(prefix, iter(module._modules.items()))]
    while around:
        prefix, children = around[-1]
        for name, child in children:  # named_children() leaves out what it has met before
            if child is None or isinstance(child, SharedModules):
                continue
            path = f"{prefix}.{name}" if prefix else name
            yield path, child
            if isinstance(child, TrainedCopies):
                child = child.original_module
            elif isinstance(child, AdaptedLayer):  # a layer with parts of its own, adapted beside it, or a block
                path, child = path if child.is_block else f"{path}.base_layer", child.base_layer
            if child._modules:
                around.append((path, iter(child._modules.items())))
                break
        else:
            around.pop()


def find(model: nn.Module, config: Any, adapter: type[Adapter] | None = None) -> dict[str, nn.Module]:
    """Path -> layer for everything the config targets, in the order of the model. Changes nothing.

    Args:
        adapter: What is to be put there; "all-linear" passes over layers that it does not fit. Where it adapts blocks
            of layers too, the name of a list of them stands for its members.

    Raises:
        TargetError: Nothing matches, or a layer that is named cannot be adapted.
    """
    modules, blocks = dict(walk(model)), adapter is not None and "block" in adapter.base_kinds
    if config.target_modules == ALL_LINEAR:
        found = {path: module for path, module in modules.items() if _is_linear(module)}
        for path in _outputs(model, config.task_type):
            found.pop(path, None)
        found = _that_fit(found, adapter)
    else:
        found = {path: module for path, module in modules.items() if name_matches(config.target_modules, path)}
        if blocks:
            lists = {path for path, module in found.items() if isinstance(module, nn.ModuleList)}
            found = {
                p: m for p, m in modules.items() if p.rpartition(".")[0] in lists or (p in found and p not in lists)
            }
        found = {path: module for path, module in modules.items() if path in found or _is_part(path, found)}
    found = {path: found[path] for path in found if not _excluded(config, path)}
    found = {path: found[path] for path in found if _in_layers(config, path)}
    _check_numbers(model, modules, config)
    if not found:
        raise _nothing(model, modules, config)
    _refuse_unsupported(found, blocks)
    _warn_dead(config, modules, found)
    return found


def _that_fit(found: dict[str, nn.Module], adapter: type[Adapter] | None) -> dict[str, nn.Module]:
    answers = {path: True if adapter is None else adapter.fits(map_of(found[path])) for path in found}  # type: ignore
    if found and True not in answers.values():
        path, reason = next(iter(answers.items()))
        raise TargetError(
            f"target {ALL_LINEAR!r}: {adapter.__name__} fits none of the {len(found)} linear layers, "  # type: ignore
            f"such as {path}: {reason}",
            field="target_modules",
            path=path,
            found=ALL_LINEAR,
        )
    return {path: module for path, module in found.items() if answers[path] is True}


def _is_linear(module: nn.Module) -> bool:
    layer = map_of(module)
    return layer is not None and layer.kind == "linear" and not layer.only_weight


def _is_part(path: str, found: dict[str, nn.Module]) -> bool:
    """Whether a module is adapted because the one around it is."""
    parent, _, child = path.rpartition(".")
    around = found.get(parent.removesuffix(".base_layer"))
    layer = None if around is None or around is found.get(path) else map_of(around)
    return layer is not None and child in layer.parts


def map_of(module: nn.Module) -> LinearMap | None:
    """A layer as a linear map, adapted or not, without its adapters; None for what is no layer."""
    return module.as_map() if isinstance(module, AdaptedLayer) else as_map(module)


def _outputs(model: nn.Module, task_type: Any) -> list[str]:
    """Paths of the output layer, which "all-linear" leaves alone: the LM head, or a classifier's head."""
    find_head: Any = getattr(model, "get_output_embeddings", None)  # models of transformers have it
    head = find_head() if find_head else None
    if head is not None:
        return [path for path, module in walk(model) if module is head]
    if task_type in (TaskType.SEQ_CLS, TaskType.TOKEN_CLS, TaskType.QUESTION_ANS):
        return [path for path, _ in walk(model) if set(HEAD_NAMES) & set(path.split("."))]
    return []


def _excluded(config: Any, path: str) -> bool:
    parts = path.split(".")
    inside = any(_contains(parts, name.split(".")) for name in config.modules_to_save or ())
    return inside or name_matches(config.exclude_modules, path)


def _contains(parts: list[str], name: list[str]) -> bool:
    return any(parts[start : start + len(name)] == name for start in range(len(parts)))


def _in_layers(config: Any, path: str) -> bool:
    wanted = config.layers_to_transform
    if wanted is None or wanted == []:
        return True
    return _number(config, path) in ([wanted] if isinstance(wanted, int) else wanted)


def _number(config: Any, path: str) -> int | None:
    """Which of a list of layers a path is in, as `layers_to_transform` counts."""
    patterns = config.layers_pattern or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        numbered = bounded.match(rf"(?:^|.*?\.){pattern}\.(\d+)(?:\.|$)", path)
        if numbered:
            return int(numbered[1])
    return None


def _check_numbers(model: nn.Module, modules: dict[str, nn.Module], config: Any) -> None:
    """Refuse layer numbers that no target has; of files of other programs, where they were of no effect, say it."""
    wanted = config.layers_to_transform
    wanted = [wanted] if isinstance(wanted, int) else wanted or []
    present = {number for number in (_number(config, path) for path in modules if wanted) if number is not None}
    dead = [number for number in wanted if number not in present]
    if not present or not dead:
        return  # with no number at all the names are wrong, which is told otherwise
    text = (
        f"layers_to_transform: {checks.shown(dead)} are no layers of {type(model).__name__}, which has {len(present)}, "
        f"numbered {min(present)} to {max(present)}"
    )
    if source() is Source.PEER:
        warn(text)
        return
    raise TargetError(text, field="layers_to_transform", found=dead, expected=sorted(present))


def _refuse_unsupported(found: dict[str, nn.Module], blocks: bool) -> None:
    for path, module in found.items():
        if isinstance(module, AdaptedLayer) or (blocks and Block.fits(module)):
            continue
        if as_map(module) is None:
            raise TargetError(
                f"target {path!r} is a {type(module).__name__}, which cannot be adapted; "
                f"supported are {', '.join(supported())}",
                field="target_modules",
                path=path,
                found=type(module).__name__,
                expected=supported(),
            )


def _nothing(model: nn.Module, modules: dict[str, nn.Module], config: Any) -> NoMatchingPeftModuleError:
    wanted = config.target_modules
    names = sorted(wanted) if isinstance(wanted, (set, list)) else [wanted]
    linear = [path for path, module in modules.items() if _is_linear(module)]
    by_ending = {path.rpartition(".")[2]: path for path in reversed(linear)}
    close = [by_ending[near] for name in names for near in nearest(str(name).rpartition(".")[2], by_ending, 3)]
    examples = (close or linear)[:5] or list(modules)[:5]
    return NoMatchingPeftModuleError(
        f"target {wanted if isinstance(wanted, str) else names!r} matches no module of {type(model).__name__} "
        f"(exclude_modules={config.exclude_modules!r}, layers_to_transform={config.layers_to_transform!r}); "
        f"its layers are named like {examples}",
        field="target_modules",
        found=names,
        expected=examples,
        hint='target_modules="all-linear" takes every linear layer',
    )


def _warn_dead(config: Any, modules: dict[str, nn.Module], found: dict[str, nn.Module]) -> None:
    """A name that matches nothing beside others that do: PEFT's files hold such names, so it is no error."""
    lists = {"target_modules": (config.target_modules, found), "exclude_modules": (config.exclude_modules, modules)}
    for field, (names, candidates) in lists.items():
        if isinstance(names, (set, list)):
            paths = set(candidates) | {path.rpartition(".")[0] for path in candidates}
            dead = [name for name in sorted(names) if not any(name_matches([name], path) for path in paths)]
            if dead:
                warn(f"{field}: {dead} match no module of the model")
        elif field == "exclude_modules" and names and not any(name_matches(names, path) for path in modules):
            warn(f"{field}: the pattern {names!r} matches no module of the model")
    if getattr(config, "target_parameters", None) is not None:
        return  # patterns may mean parameters
    for field, values in by_layer(config).items():
        for pattern in values:
            if not any(pattern_value({pattern: True}, path, False) for path in found):
                warn(f"{field}: {pattern!r} matches none of the adapted layers")


def with_defaults(config: PeftConfig, model: nn.Module, usual: Any, search: Any = None) -> None:
    """Fill `target_modules` from the architecture's usual layers when the user named none.

    Args:
        usual: Model type -> these layers, or None.
        search: Model -> them, or None, where its type does not tell.
    """
    if getattr(config, "target_modules", None) is not None:
        return
    model_type = model_type_of(model)
    found = usual(model_type) if usual and model_type else None
    if found is None and search is not None:
        found = _shortened({path for path in search(model) or () if not _excluded(config, path)}, config, model)
    if found is None:
        linear = [path for path, module in walk(model) if _is_linear(module)][:5]
        raise TargetError(
            f"{type(config).__name__}: no usual target_modules are known for {model_type or type(model).__name__!r}; "
            f'name them, or use target_modules="all-linear"; the model\'s linear layers are named like {linear}',
            field="target_modules",
            found=None,
            expected=linear,
        )
    values = found if isinstance(found, dict) else {"target_modules": found}
    for name, value in values.items():
        setattr(config, name, set(value) if isinstance(value, list) else value)


def model_type_of(model: nn.Module) -> str | None:
    """What transformers calls the architecture."""
    return getattr(getattr(model, "config", None), "model_type", None)


def _shortened(paths: set[str], config: Any, model: nn.Module) -> set[str] | None:
    """The last parts of many paths where they mean the same layers, else the paths; None for none."""
    endings = {path.rpartition(".")[2] for path in paths}
    named = {path for path, _ in walk(model) if name_matches(endings, path) and not _excluded(config, path)}
    return (endings if named == paths and len(paths) > 1 else paths) or None


def transformer_layers(model: nn.Module) -> set[str] | None:
    """Paths of the lists of transformer layers of a model."""
    try:
        from transformers.modeling_layers import GradientCheckpointingLayer
    except ImportError:
        return None
    lists = {path: module for path, module in walk(model) if isinstance(module, nn.ModuleList)}
    found = [
        path for path, parts in lists.items() if len(parts) and all(_is(p, GradientCheckpointingLayer) for p in parts)
    ]
    return {path for path in found if not any(path.startswith(f"{other}.") for other in found)} or None


def _is(module: nn.Module, kind: type) -> bool:
    return isinstance(getattr(module, "base_layer", module), kind)
