"""The base model under its adapters: the verbs that act on layers. `PeftModel.base_model` is one of these."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from deltatune import inject, replication
from deltatune.config import PeftConfig
from deltatune.errors import AdapterNameError, MergeError, StateError
from deltatune.gate import STANDING
from deltatune.lora.losses import PeerLosses
from deltatune.lora.stacked import subtracted
from deltatune.merging import Merged
from deltatune.notice import warn
from deltatune.peer.methods import PREFIXES
from deltatune.peer.tuner_verbs import TunerVerbs
from deltatune.registry import METHODS
from deltatune.selection import Selection, each_once
from deltatune.state_dict import collect
from deltatune.stepping import Stepping

LOST_WORTH_SAYING = 0.01  # of the update, in one layer
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def alone(
    verb: Callable[Concatenate[Tuner, Arguments], Result],
) -> Callable[Concatenate[Tuner, Arguments], Result]:
    """A verb that changes what every pass uses: it waits for those that are running."""

    @wraps(verb)
    def run(tuner: Tuner, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with torch.inference_mode(False), tuner.selection.gate.changing():  # what it puts in place may be trained
            return verb(tuner, *args, **kwargs)

    return run


class Tuner(TunerVerbs, PeerLosses, Stepping):
    """Holds the original model, whose layers are wrapped in place, and the selection that all wrappers share."""

    def __init__(self, model: nn.Module, configs: dict[str, PeftConfig]) -> None:
        super().__init__()
        self.model = model
        self.selection = Selection()
        self.peft_config = configs  # the same dict as the PeftModel's
        self.merged_for_good: tuple[str, ...] = ()  # by `merge_and_unload`
        self.taken_off: frozenset[str] = frozenset()  # adapters that have configs here and are on no layer any more
        self.merge_loss: dict[str, float] = {}  # path -> share of the last merged update that rounding lost

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    @property
    def prefix(self) -> str:
        """How the names of the active method's tensors begin."""
        names = self.selection.active or tuple(self.peft_config)
        peft_type: Any = self.peft_config[names[0]].peft_type
        return PREFIXES.get(getattr(peft_type, "value", peft_type), METHODS[peft_type].key_prefix)

    @property
    def active_adapters(self) -> list[str]:
        return list(self.selection.active)

    @property
    def active_adapter(self) -> list[str]:
        return list(self.selection.active)

    @property
    def targeted_module_names(self) -> list[str]:
        return [path for path, _ in inject.adapted_layers(self.model)]

    def enable_adapter_layers(self) -> None:
        with self.switching():
            self.selection.enabled = True

    def disable_adapter_layers(self) -> None:
        """Every call uses the base, bit for bit, until `enable_adapter_layers()`."""
        with self.switching():
            self.selection.enabled = False

    @contextmanager
    def switching(self) -> Iterator[None]:
        """While no pass runs that uses the model's standing choice; while none runs at all where merged weights go."""
        gate = self.selection.gate
        with gate.changing([STANDING]):
            merged = any(layer.merged for _, layer in inject.adapted_layers(self.model))
            with gate.changing() if merged else nullcontext():
                yield

    # ------------------------------------------------------------------------------------------------------- merging

    @alone
    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False, max_loss: float | None = None
    ) -> None:
        """Compute the adapted weights once and put them into the layers, which then run like plain layers.

        The original parameters are kept and come back, the same objects, with `unmerge_adapter()`. All new weights are
        computed before the first is put in place. Adapters that are merged already stay so, beside the new ones.

        Args:
            adapter_names: Adapters to merge, in order; the active ones by default. Active ones that are not merged go
                on acting, on the merged weights.
            safe_merge: Refuse weights that are not finite even where those of the base are not.
            max_loss: Refuse where rounding to the base's precision would lose more than this share of an update, in
                any layer. None: say so in a warning.

        Raises:
            MergeError: A layer cannot hold the result, or it is not finite, or too much is lost; nothing has changed.
        """
        names = self._mergeable(adapter_names)
        planned: dict[str, tuple[Any, Merged]] = {}
        for path, layer in inject.adapted_layers(self.model):
            if new := layer.unmerged(names):
                try:
                    planned[path] = (layer, layer.more_merged(new, safe_merge))
                except MergeError as error:
                    raise MergeError(f"{path}: {error}", path=path, found=error.found) from error
        if not planned:
            warn(f"merge_adapter: nothing of {list(names)} is left to merge")
            return
        losses = {path: merged.lost for path, (_, merged) in planned.items()}
        _tell_loss(losses, max_loss)
        _put_all(list(planned.values()))
        self.merge_loss = losses

    @alone
    def unmerge_adapter(self) -> None:
        """Put the original parameters back, bit for bit."""
        layers = [layer for _, layer in inject.adapted_layers(self.model)]
        if not any(layer.merged for layer in layers):
            warn("unmerge_adapter: nothing is merged")
        for layer in layers:
            layer.unmerge()

    @alone
    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """The plain model with the adapters in its weights; the wrappers are gone."""
        names = self._mergeable(adapter_names)
        layers = [layer for _, layer in inject.adapted_layers(self.model)]
        if any(layer.unmerged(names) for layer in layers) or not any(layer.merged for layer in layers):
            self.merge_adapter(list(names), safe_merge)
        untied = self._untie()
        inject.strip(self.model, keep=names)
        self.merged_for_good += tuple(name for name in names if name not in self.taken_off)
        self.taken_off = frozenset(self.peft_config)
        replication.unshare(self.model)
        if untied:
            warn(
                "the merged embedding and the output layer no longer share their weights: "
                "config.tie_word_embeddings is False now"
            )
        return self.model

    @alone
    def unload(self) -> nn.Module:
        """The plain model as it was; adapters and trained copies are dropped. Its parameters stay frozen."""
        for _, layer in inject.adapted_layers(self.model):
            layer.unmerge()
        inject.strip(self.model)
        self.taken_off = frozenset(self.peft_config)
        replication.restore(self.model)
        return self.model

    def _mergeable(self, adapter_names: list[str] | None) -> tuple[str, ...]:
        names = self.selection.active if adapter_names is None else each_once(adapter_names)
        if adapter_names is not None and not names:
            raise StateError(
                "adapter_names=[] merges nothing; leave it out to merge the active adapters, or call unload()",
                field="adapter_names",
                found=[],
                expected=list(self.peft_config),
            )
        unknown = [name for name in names if name not in self.peft_config]
        if unknown:
            raise AdapterNameError(
                f"no adapter named {unknown[0]!r}; there are {list(self.peft_config)}",
                field="adapter_names",
                found=unknown,
                expected=list(self.peft_config),
            )
        for name in names:
            graft = METHODS[self.peft_config[name].peft_type].graft  # type: ignore[index]
            if graft is not None:
                raise MergeError(f"adapter {name!r} is {graft.unmergeable}; it cannot be merged", found=[name])
        return names

    def _untie(self) -> bool:
        """A merged embedding differs from the head that was tied to it: say so in the model's config."""
        config = getattr(self.model, "config", None)
        if not getattr(config, "tie_word_embeddings", False):
            return False
        inputs, outputs = self.model.get_input_embeddings(), self.model.get_output_embeddings()  # type: ignore
        if inputs is None or outputs is None or inputs.weight is outputs.weight:
            return False
        config.tie_word_embeddings = False  # type: ignore[union-attr]
        return True

    def subtract_mutated_init(
        self, output_state_dict: dict[str, Tensor], adapter_name: str, kwargs: Any = None
    ) -> dict[str, Tensor]:
        """Plain LoRA of rank 2r: an adapter's tensors, by key, less those of `adapter_name`, where it began."""
        return subtracted(output_state_dict, collect(self.model, adapter_name))

    # ------------------------------------------------------------------------------------------- like the base model

    def set_adapter(self, adapter_name: str | Iterable[str], inference_mode: bool = False) -> None:
        names = each_once(adapter_name)
        for name in names:
            if name not in self.grafts and not inject.holds(self.model, name):
                raise AdapterNameError(
                    f"no layer has an adapter named {name!r}; a config under another name does not rename one: save "
                    "the adapter, and load it under the new name",
                    field="adapter_name",
                    found=name,
                )
        with self.switching():
            for _, layer in inject.adapted_layers(self.model):
                layer.unmerge()
            self.selection.active = names
            self.let_train(self.selection.trained - set(names), False)
            self.let_train(names, not inference_mode)

    def let_train(self, names: Collection[str], trains: bool) -> None:
        """Let the named adapters train or not, whatever the others do."""
        inject.train(self.model, self.selection, names, trains)
        for name in names:
            if name in self.grafts:
                self.grafts[name].encoder.requires_grad_(trains)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take a layer method's adapter off the layers; `PeftModel.delete_adapter` is the verb for a model."""
        if adapter_name not in self.peft_config:
            raise AdapterNameError(
                f"no adapter named {adapter_name!r}; there are {list(self.peft_config)}",
                field="adapter_name",
                found=adapter_name,
                expected=list(self.peft_config),
            )
        from deltatune.functional import delete_adapter

        delete_adapter(self.model, adapter_name)
        del self.peft_config[adapter_name]
        self.schedules.pop(adapter_name, None)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Graft the adapter whose config `peft_config` has under that name; it becomes the active one.

        Args:
            model: The model of this tuner.
            state_dict: Tensors under the keys of an adapter's file: the layers it names are adapted and start there.
        """
        from deltatune.functional import inject_adapter_in_model

        inject_adapter_in_model(self.peft_config[adapter_name], model, adapter_name, low_cpu_mem_usage, state_dict)

    def get_model_config(self, model: nn.Module) -> dict[str, Any]:
        config = getattr(model, "config", None)
        return {"model_type": "custom"} if config is None else config.to_dict()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "_modules" not in self.__dict__ or "model" not in self._modules:
                raise
        for graft in [self.grafts[key] for key in self.selection.active if key in self.grafts]:
            if name in graft.verbs:
                return getattr(graft, name)
        return getattr(self._modules["model"], name)


def _tell_loss(losses: dict[str, float], most: float | None) -> None:
    path, lost = max(losses.items(), key=lambda item: item[1])
    hint = "merge into a float32 copy of the base to keep it"
    if most is not None and lost > most:
        raise MergeError(
            f"{path}: rounding to the base's precision would lose {lost:.1%} of the update, more than max_loss={most}; "
            + hint,
            field="max_loss",
            path=path,
            found=lost,
            expected=most,
        )
    if lost > LOST_WORTH_SAYING:
        warn(
            f"merge_adapter: rounding to the base's precision lost up to {lost:.0%} of the update (at {path}; "
            f"base_model.merge_loss has every layer); {hint}"
        )


def _put_all(planned: list[tuple[Any, Merged]]) -> None:
    """Into all layers, or into none."""
    _keep_tied(planned)
    before = [(layer, layer.stash and layer._present(layer.stash)) for layer, _ in planned]
    try:
        for layer, merged in planned:
            layer.swap_in(merged)
    except BaseException:
        for layer, merged in before:
            layer.unmerge()
            if merged is not None:
                layer.swap_in(merged)
        raise


def _keep_tied(planned: list[tuple[Any, Merged]]) -> None:
    """Layers that share their weight go on sharing it if it becomes the same for both."""
    by_weight: dict[int, Merged] = {}
    for layer, merged in planned:
        if merged.weight is None:
            continue
        stored = getattr(layer.base_layer, layer.as_map().keeps[0])
        other = by_weight.setdefault(id(stored), merged)
        if other is not merged and other.weight is not None and torch.equal(other.weight, merged.weight):
            merged.weight = other.weight
