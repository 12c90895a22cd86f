"""`PeftModel`: a frozen base model, the configs of its adapters by name, and which of them are active.

- `get_peft_model(model, config)` picks the task class (`deltatune.tasks`), which freezes the model and grafts onto it;
- `PeftModel.from_pretrained(model, folder)` does the same with the adapter's tensors from a folder;
- `model(...)` and `model.generate(...)` are the base model's own: the grafts act where they sit.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from deltatune import calls, checks, empty, inject, manners, recompute
from deltatune.building import find_saved
from deltatune.calling import Calling
from deltatune.combine.verbs import CombineVerbs
from deltatune.config import A_CONFIG, PeftConfig
from deltatune.counting import parameter_counts
from deltatune.errors import AdapterNameError, ConfigError, StateError
from deltatune.memory import SMALLER, told
from deltatune.names import check_name, listed
from deltatune.notice import warn
from deltatune.peer.verbs import PeerVerbs
from deltatune.persistence import Persistence
from deltatune.prompts.graft import Graft
from deltatune.registry import METHODS
from deltatune.selection import Call
from deltatune.slices import refuse_prompt
from deltatune.tuner import Tuner

if TYPE_CHECKING:
    from deltatune.prompts.key_values import Prefix


class PeftModel(Persistence, CombineVerbs, PeerVerbs, Calling):
    """A base model with adapters.

    Args:
        model: The base model; it is frozen and its layers are wrapped in place.
        peft_config: Config of the first adapter.
        adapter_name: Its name.
        autocast_adapter_dtype: Keep adapters of a half-precision base in float32.
        low_cpu_mem_usage: The adapter gets no numbers until a file or a state dict fills it.

    Raises:
        PeftError: The config does not fit the model, which is left as it was.
    """

    heads: ClassVar[tuple[str, ...]] = ()  # modules that a task trains whole besides the adapter

    base_model: Tuner
    prompt_encoder: nn.ModuleDict

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        super().__init__()
        inject.refuse_adapted(model, PeftModel)
        self.peft_config: dict[str, PeftConfig] = {}
        self.prompts: dict[str, Graft] = {}
        self.base_model = Tuner(model, self.peft_config)
        self.base_model.grafts = self.prompts
        self.prompt_encoder = nn.ModuleDict()
        self.autocast_adapter_dtype = autocast_adapter_dtype
        self.add_adapter(adapter_name, peft_config, low_cpu_mem_usage)
        recompute.bind(model, self.base_model.selection, self.prompts)
        self.training = model.training or manners.as_peft

    # ------------------------------------------------------------------------------------------------------ training

    def after_step(self, step: int | None = None) -> None:
        """To be called after `optimizer.step()` and before `optimizer.zero_grad()` in a loop of your own.

        Runs the schedules of methods that have one (AdaLoRA's ranks); nothing otherwise. `deltatune.train` does it by
        itself, transformers' Trainer with `AdapterCallback()`.
        """
        self.base_model.after_step(step)

    def penalty(self, labels: Tensor | None = None, attention_mask: Tensor | None = None) -> Tensor | None:
        """The extra loss of the active methods, for loops that compute a loss from the logits; see `Tuner.penalty`."""
        return self.base_model.penalty(labels, attention_mask)

    def enable_adapter_layers(self) -> None:
        self.base_model.enable_adapter_layers()

    def disable_adapter_layers(self) -> None:
        self.base_model.disable_adapter_layers()

    # ------------------------------------------------------------------------------------------------------ adapters

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool | None = None,
    ) -> None:
        """Graft one more adapter of any method. The first is active at once, later ones after `set_adapter`."""
        check_name(adapter_name)
        checks.instance("peft_config", peft_config, PeftConfig, A_CONFIG)
        with torch.inference_mode(False), self._changing(adapter_name, peft_config):  # its parameters are to train
            self._add(adapter_name, peft_config, low_cpu_mem_usage, autocast_adapter_dtype)

    def _add(self, adapter_name: str, peft_config: PeftConfig, low_cpu_mem_usage: bool, autocast: bool | None) -> None:
        if adapter_name in self.peft_config:
            raise StateError(
                f"an adapter named {adapter_name!r} is there already; delete_adapter({adapter_name!r}) first, or "
                "choose another name",
                field="adapter_name",
                found=adapter_name,
            )
        config = self._prepared(peft_config)
        autocast = self.autocast_adapter_dtype if autocast is None else autocast
        first = not self.peft_config
        with inject.unchanged_on_error(self.base_model.model) if first else nullcontext():
            if METHODS[config.peft_type].graft is not None:
                with told(f"building adapter {adapter_name!r}", SMALLER):
                    self._add_prompt(adapter_name, config)
            else:
                with empty.without_numbers(low_cpu_mem_usage):
                    inject.graft(self.base_model.model, config, adapter_name, self.base_model.selection, autocast)
            vars(peft_config).update(vars(config))
            self.peft_config[adapter_name] = own = peft_config.copy()  # the user's may serve for the next model
            if adapter_name in self.prompts:
                self.prompts[adapter_name].adopt(own)
            self._add_schedule(adapter_name)
            if first:
                inject.freeze(self.base_model.model)
                self.base_model.selection.active = (adapter_name,)
        trains = adapter_name in self.base_model.selection.active and not peft_config.inference_mode
        self.base_model.let_train([adapter_name], trains)

    def _changing(self, name: str, config: PeftConfig) -> AbstractContextManager[None]:
        """While no pass runs that an adapter which comes, goes or gets other values could disturb."""
        method = METHODS.get(config.peft_type)  # type: ignore[arg-type]
        alone = list(self.peft_config) in ([], [name]) or method is None or method.graft is not None
        return self.base_model.selection.gate.changing(None if alone else [name])

    def _prepared(self, peft_config: PeftConfig) -> Any:
        """A copy of the config with what is known of the base and the task; the user's changes only on success."""
        config: Any = copy.copy(peft_config)
        config.validate()
        if config.peft_type not in METHODS:
            raise ConfigError(
                f"{type(config).__name__}: peft_type={config.peft_type!r} names no method", field="peft_type"
            )
        model = self.base_model.model
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = model.__dict__.get("name_or_path") or None
        if config.task_type is None:
            config.auto_mapping = {
                "base_model_class": type(model).__name__,
                "parent_library": type(model).__module__,
            }
        if self.heads:
            present = {path.rpartition(".")[2] for path, _ in inject.targets.walk(model)}
            heads = [name for name in self.heads if name in present or name in ("classifier", "score", "qa_outputs")]
            given = list(config.modules_to_save or [])
            config.modules_to_save = given + [name for name in heads if name not in given]
        return config

    def _add_schedule(self, name: str) -> None:
        kind = METHODS[self.peft_config[name].peft_type].schedule  # type: ignore[index]
        if kind is None:
            return
        layers = inject.adapted_layers(self.base_model.model)
        adapters = {path: layer.adapters[name].core for path, layer in layers if name in layer.adapters}
        try:
            made = kind(name, self.peft_config, adapters)
        except BaseException:
            inject.remove(self.base_model.model, name)
            del self.peft_config[name]
            raise
        if made is not None:
            self.base_model.schedules[name] = made

    def _add_prompt(self, name: str, config: Any) -> None:
        model, selection = self.base_model.model, self.base_model.selection
        refuse_prompt(model, METHODS[config.peft_type].name)
        saved = find_saved(model, config)
        method = METHODS[config.peft_type]
        assert method.graft is not None
        # nobody gives a trial pass what adapters read of a call, so it runs without them
        trial = nullcontext() if calls.readers(model) is None else selection.use(Call())
        with trial:
            graft = method.graft.attach(model, config, name, selection, method.encoder)
        self.prompts[name] = graft
        self.prompt_encoder[name] = graft.encoder
        inject.add_copies(model, saved, name, selection)

    def delete_adapter(self, adapter_name: str) -> None:
        self._present(adapter_name)
        with self._changing(adapter_name, self.peft_config[adapter_name]):
            self._delete(adapter_name)

    def _delete(self, adapter_name: str) -> None:
        self._present(adapter_name)  # still
        if any(adapter_name in layer.merged_adapters for _, layer in inject.adapted_layers(self.base_model.model)):
            raise StateError(
                f"adapter {adapter_name!r} is merged; call unmerge_adapter() before deleting it",
                field="adapter_name",
                found=adapter_name,
                hint="call unmerge_adapter()",
            )
        inject.remove(self.base_model.model, adapter_name)
        if adapter_name in self.prompts:
            self.prompts.pop(adapter_name).detach()
            self.prompt_encoder.pop(adapter_name)
        self.base_model.schedules.pop(adapter_name, None)
        self.base_model.taken_off -= {adapter_name}
        del self.peft_config[adapter_name]
        selection = self.base_model.selection
        selection.trained -= {adapter_name}
        if adapter_name not in selection.active:
            return
        left = tuple(name for name in selection.active if name != adapter_name)
        instead = () if left else tuple(self.peft_config)[:1]
        selection.active = left + instead
        self.base_model.let_train(selection.active, True)
        if instead:
            warn(f"the active adapter was deleted; {instead[0]!r} is active now")

    def set_adapter(self, adapter_name: str | Iterable[str], inference_mode: bool = False) -> None:
        """Make one adapter, or several in order, the active ones; they train, those that trained before do not.

        Its cost does not grow with the number of adapters: flags that a program has set by hand on the parameters of
        others are left as they are (`set_requires_grad` is the verb for them).
        """
        names = listed(adapter_name, "adapter_name")
        with self.base_model.switching():
            self._known(names)
            self.base_model.set_adapter(names, inference_mode)
        for path, copies in inject.trained_copies(self.base_model.model):
            rivals = [name for name in names if name in copies.modules_to_save]
            if len(rivals) > 1:
                warn(
                    f"set_adapter: {', '.join(map(repr, rivals))} have a copy of {path!r} each, and that of "
                    f"{rivals[-1]!r} alone acts and trains; activate one of them to train its own"
                )
        self._warn_replaced(names)

    def _warn_replaced(self, names: tuple[str, ...]) -> None:
        hidden: dict[tuple[str, str], str] = {}
        for path, layer in inject.adapted_layers(self.base_model.model):
            here = [name for name in names if name in layer.adapters]
            last = max((index for index, name in enumerate(here) if layer.adapters[name].replaces), default=0)
            for name in here[:last]:
                hidden.setdefault((here[last], name), path)
        for (name, before), path in hidden.items():
            warn(
                f"set_adapter: {name!r} replaces the whole weight of {path!r}, so that {before!r} before it has no "
                f"effect there; name {before!r} after it"
            )

    def set_requires_grad(self, adapter_names: str | Iterable[str], requires_grad: bool = True) -> None:
        names = listed(adapter_names)
        self._known(names)
        self.base_model.let_train(names, requires_grad)

    def _present(self, name: str) -> None:
        if not isinstance(name, str) or name not in self.peft_config:
            raise AdapterNameError(
                f"no adapter named {name!r}; there are {list(self.peft_config)}",
                field="adapter_name",
                found=name,
                expected=list(self.peft_config),
            )

    def _known(self, names: Iterable[str]) -> None:
        for name in names:
            self._present(name)
            if name in self.base_model.taken_off:
                raise StateError(
                    f"adapter {name!r} is no longer on the layers of this model, which unload() or merge_and_unload() "
                    "has taken off; use the model that was returned, or load the adapter anew after "
                    f"delete_adapter({name!r})",
                    field="adapter_name",
                    found=name,
                )

    @property
    def active_adapters(self) -> list[str]:
        return list(self.base_model.selection.active)

    @property
    def active_adapter(self) -> str | list[str]:
        active = self.active_adapters
        return active[0] if len(active) == 1 else active

    @property
    def active_peft_config(self) -> PeftConfig:
        if not self.active_adapters:
            raise StateError(
                f"no adapter is active; call set_adapter with one of {list(self.peft_config)}",
                field="active_adapters",
                found=[],
                expected=list(self.peft_config),
            )
        return self.peft_config[self.active_adapters[0]]

    @property
    def peft_type(self) -> Any:
        return self.active_peft_config.peft_type

    @property
    def modules_to_save(self) -> set[str] | None:
        names = {
            name for config in self.peft_config.values() for name in getattr(config, "modules_to_save", None) or ()
        }
        return names or None

    @property
    def has_active_enabled_adapter(self) -> bool:
        return bool(self.base_model.selection.names())

    @property
    def prefixes(self) -> dict[str, Prefix]:
        """The adapters that hand keys and values to attentions."""
        return {name: cast("Prefix", graft) for name, graft in self.prompts.items() if graft.gives_key_values}

    @property
    def config(self) -> Any:
        return getattr(self.base_model.model, "config", {"model_type": "custom"})

    # ------------------------------------------------------------------------------------------------------- looking

    def get_base_model(self) -> nn.Module:
        """The base model; while adapters are grafted its layers are wrapped."""
        return self.base_model.model

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Trainable and all parameters, each counted once; packed ones (4 bits) as the numbers that they stand for."""
        return parameter_counts(self)

    def print_trainable_parameters(self) -> None:
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    def get_layer_status(self) -> list[Any]:
        from deltatune.status import get_layer_status

        return get_layer_status(self)

    def get_model_status(self) -> Any:
        from deltatune.status import get_model_status

        return get_model_status(self)

    # ------------------------------------------------------------------------------------------------- off the model

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Any = None
    ) -> nn.Module:
        """The plain model with adapters in its weights, prompts that were left out of them gone."""
        with self.base_model.selection.gate.changing():
            model = self.base_model.merge_and_unload(progressbar, safe_merge, adapter_names)
            self._detach_prompts()
        return model

    def unload(self) -> nn.Module:
        """The base model as it was before; its parameters stay frozen."""
        with self.base_model.selection.gate.changing():
            self._detach_prompts()
            return self.base_model.unload()

    def _detach_prompts(self) -> None:
        for name in list(self.prompts):
            self.prompts.pop(name).detach()
            self.prompt_encoder.pop(name)

    # ------------------------------------------------------------------------------------------- like the base model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "_modules" not in self.__dict__ or "base_model" not in self._modules:
                raise
        return getattr(self._modules["base_model"], name)
