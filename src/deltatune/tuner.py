"""The base model under its adapters: the verbs that act on layers. `PeftModel.base_model` is one of these."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from deltatune import inject, replication
from deltatune.config import PeftConfig
from deltatune.errors import AdapterNameError, MergeError, StateError
from deltatune.gate import STANDING
from deltatune.layer import Merged
from deltatune.lora.losses import PeerLosses
from deltatune.lora.stacked import subtracted
from deltatune.notice import warn
from deltatune.peer.methods import PREFIXES
from deltatune.peer.tuner_verbs import TunerVerbs
from deltatune.prompts.graft import Graft
from deltatune.registry import METHODS
from deltatune.schedule import Schedule
from deltatune.selection import Selection
from deltatune.state_dict import collect

LOST_WORTH_SAYING = 0.01  # of the update, in one layer
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def alone(
    verb: Callable[Concatenate[Tuner, Arguments], Result],
) -> Callable[Concatenate[Tuner, Arguments], Result]:
    """A verb that changes what every pass uses: it waits for those that are running."""

    @wraps(verb)
    def run(tuner: Tuner, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with tuner.selection.gate.changing():
            return verb(tuner, *args, **kwargs)

    return run


class Tuner(TunerVerbs, PeerLosses, nn.Module):
    """Holds the original model, whose layers are wrapped in place, and the selection that all wrappers share."""

    model: nn.Module

    def __init__(self, model: nn.Module, configs: dict[str, PeftConfig]) -> None:
        super().__init__()
        self.model = model
        self.selection = Selection()
        self.peft_config = configs  # the same dict as the PeftModel's
        self.schedules: dict[str, Schedule] = {}  # of the adapters that have one
        self.grafts: dict[str, Graft] = {}  # the adapters that act outside of single layers; the PeftModel's dict
        self.loss_given = True  # by the last training pass, and so with the penalty in it
        # Whether a training pass gave no loss that the penalty could have been added to; None once that is settled.
        self.penalty_due: bool | None = False
        self.begun: set[str] = set()  # the adapters that have been trained
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

    # ------------------------------------------------------------------------------------------------------ training

    def penalty(self, labels: Tensor | None = None, attention_mask: Tensor | None = None) -> Tensor | None:
        """The extra loss of the active adapters that train, None where their methods have none.

        A training pass adds it to `outputs.loss` by itself. A loop that computes its own loss from the logits adds it.

        Args:
            labels: Those of the pass that has just ended, for methods whose extra loss is one of the task.
            attention_mask: Likewise.
        """
        self.penalty_due = None
        return self._penalty({"labels": labels, "attention_mask": attention_mask})

    def _penalty(self, inputs: Mapping[str, Any]) -> Tensor | None:
        call, total = self.selection.current(), None
        names = {name for name in call.rows or call.names if name}
        kinds = {name: METHODS[self.peft_config[name].peft_type].adapter for name in names}  # type: ignore[index]
        plain = {name for name, kind in kinds.items() if kind is None or not kind.penalises(self.peft_config[name])}
        terms = []
        for _, layer in inject.adapted_layers(self.model) if names - plain else ():
            for adapter in [layer.adapters[name] for name in names - plain if name in layer.adapters]:
                trained = next((p for p in adapter.parameters() if p.requires_grad), None)
                if trained is not None:
                    with torch.autocast(trained.device.type, enabled=False):
                        terms.append(adapter.penalty())  # type: ignore[operator]
        for name in names & self.grafts.keys():
            graft = self.grafts[name]
            if any(p.requires_grad for p in graft.encoder.parameters()):
                terms.append(graft.penalty(self.model, inputs.get("labels"), inputs.get("attention_mask")))
        for term in terms:
            if term is not None:
                total = term if total is None else total + term.to(total)
        return total

    def with_penalty(self, outputs: Any, inputs: Mapping[str, Any]) -> Any:
        """The outputs of a training pass with these inputs, the penalty added to their loss."""
        loss: Tensor | None = getattr(outputs, "loss", None)
        as_tuple = isinstance(outputs, tuple) and outputs and isinstance(outputs[0], Tensor) and outputs[0].ndim == 0
        self.loss_given = bool(isinstance(loss, Tensor) or as_tuple)
        if not isinstance(loss, Tensor) and not as_tuple:
            if self.penalty_due is False:
                self.penalty_due = self._penalty({}) is not None
            return outputs
        term = self._penalty(inputs)
        if term is None:
            return outputs
        if loss is None:
            return (outputs[0] + term.to(outputs[0]), *outputs[1:])
        outputs.loss = loss + term.to(loss)  # type: ignore[attr-defined]
        return outputs

    def check_starts(self) -> None:
        """In the first training pass of an adapter: say so if its start needs data that it has not got."""
        names = () if torch.compiler.is_compiling() else self.selection.active
        for name in [name for name in names if name not in self.begun]:
            self.begun.add(name)
            if not isinstance(getattr(self.peft_config.get(name), "init_lora_weights", None), str):
                continue  # the others begin without data, and need no walk over the layers
            held = (layer.adapters[name] for _, layer in inject.adapted_layers(self.model) if name in layer.adapters)
            if any(getattr(adapter, "awaits_data", False) for adapter in held):
                init = self.peft_config[name].init_lora_weights  # type: ignore[attr-defined]
                warn(
                    f"adapter {name!r} has init_lora_weights={init!r} and has seen no data, so it trains as plain "
                    "LoRA; call initialize_lora_eva_weights(model, dataloader) before the first step, or "
                    "deltatune.lora.prepare(base, config, dataloader) before get_peft_model"
                )

    def after_step(self, step: int | None = None) -> None:
        """After every optimizer step, before its gradients are cleared: the schedules of the adapters that train.

        Nothing happens where no active method has one. Counts the steps itself, from 1; `step` sets the count.
        """
        for name in self.selection.active:
            if name in self.schedules and self.schedules[name].trains:
                self.schedules[name].advance(step)
        if self.penalty_due:
            self.penalty_due = None
            warn(
                "the outputs of this training pass held no loss, so the penalty of the adapter's method is in none; "
                "add model.penalty() to your own loss"
            )

    def update_and_allocate(self, global_step: int) -> None:
        """PEFT's name of `after_step(global_step)`."""
        self.after_step(global_step)

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
        replication.restore(self.model)
        return self.model

    def _mergeable(self, adapter_names: list[str] | None) -> tuple[str, ...]:
        names = self.selection.active if adapter_names is None else tuple(adapter_names)
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
        names = (adapter_name,) if isinstance(adapter_name, str) else tuple(adapter_name)
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
            raise AdapterNameError(f"no adapter named {adapter_name!r}; there are {list(self.peft_config)}")
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
