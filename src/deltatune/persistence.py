"""How a `PeftModel` goes into a folder and comes back; the files themselves are `deltatune.storage`'s."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from deltatune import checks, inject
from deltatune.config import PeftConfig
from deltatune.errors import ConfigError, MismatchError
from deltatune.fused import export
from deltatune.names import check_name
from deltatune.state_dict import (
    ROOT,
    Loaded,
    check,
    check_finite,
    collect,
    derived,
    fill,
    matched,
    translated,
    without_base_copies,
)
from deltatune.storage import folder as storage
from deltatune.storage.derived import check_derived

if TYPE_CHECKING:
    from deltatune.model import PeftModel


def load_into(model: nn.Module, name: str, saved: storage.Saved, allow_base_mismatch: bool = False) -> None:
    """Check the tensors of a folder against an adapter on the layers of a bare model, then fill it."""
    saved.tensors = without_base_copies(model, saved.tensors, saved.source)
    saved.tensors = matched(saved.tensors, collect(model, name, given=None))
    saved.tensors = translated(model, name, saved.tensors)
    check(saved.tensors, collect(model, name, given=saved.tensors), saved.source)
    if saved.derived is not None and not allow_base_mismatch:
        check_derived(saved.derived, derived(model, name, saved.tensors), saved.source)
    fill(model, name, saved.tensors)


class Persistence:
    """The verbs of `PeftModel` that read and write adapters."""

    def adapter_tensors(
        self: Any, name: str, format: str | None = None, given: Collection[str] | None = ()
    ) -> dict[str, Tensor]:
        """File key -> tensor of one adapter; of those that a file may leave out only the given ones (None: all)."""
        self._known([name])
        if name not in self.prompts:
            model = self.base_model.model
            checks.one_of("save_pretrained", "format", format, (None, "native", "peft", export.PER_EXPERT))
            tensors = collect(model, name, given=None if format == "peft" else given)
            return export.split(model, name, tensors, ROOT) if format == export.PER_EXPERT else tensors
        copies = collect(self.base_model.model, name, self.prompts[name].root) if self._has_copies(name) else {}
        return {**self.prompts[name].file_tensors(format), **copies}

    def _has_copies(self: Any, name: str) -> bool:
        return any(name in copies.modules_to_save for _, copies in inject.trained_copies(self.base_model.model))

    def fill_adapter(self: Any, name: str, tensors: dict[str, Tensor]) -> None:
        """Put checked tensors into one adapter."""
        if name not in self.prompts:
            fill(self.base_model.model, name, tensors)
            return
        of_prompt = {key: value for key, value in tensors.items() if self.prompts[name].owns(key)}
        if of_prompt:
            self.prompts[name].load_file_tensors(of_prompt)
        fill(self.base_model.model, name, tensors, self.prompts[name].root)

    def save_pretrained(
        self: Any,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: bool | str = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        *,
        format: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Write adapters as PEFT's folders: "default" into the folder itself, others into subfolders.

        Args:
            format: "peft" writes a prefix as PEFT can read it, or raises where PEFT could not express it. Of layer
                methods it also writes the frozen tensors that files otherwise leave out, which PEFT warns of.
                "per_expert" writes LoRA on experts with a pair of factors for each of their layers, as transformers 4
                kept them and vLLM loads them (docs/experts.md).
        """
        if not safe_serialization:
            raise ConfigError(
                "save_pretrained: safe_serialization=False would write a pickle; adapters are saved as safetensors",
                field="safe_serialization",
            )
        if path_initial_model_for_weight_conversion is not None:
            raise ConfigError(
                "save_pretrained: path_initial_model_for_weight_conversion is not available in this version",
                field="path_initial_model_for_weight_conversion",
            )
        names = list(self.peft_config) if selected_adapters is None else list(selected_adapters)
        self._known(names)
        if is_main_process:
            storage.save(self, Path(save_directory), names, format)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        allow_base_mismatch: bool = False,
        **kwargs: Any,
    ) -> PeftModel:
        """A base model with the adapter of a folder (or hub repository) on it, in eval mode unless trainable.

        Raises:
            PeftError: The folder is damaged or does not fit the model, which is left as it was.
        """
        from deltatune.model import PeftModel
        from deltatune.tasks import MODEL_TYPE_TO_PEFT_MODEL_MAPPING

        check_name(adapter_name)
        saved = storage.read(model_id, config=config, key_mapping=key_mapping, **kwargs)
        storage.check_base(saved, model, allow_base_mismatch)
        saved.config.inference_mode = not is_trainable
        by_task = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(saved.config.task_type, PeftModel)
        kind: Any = by_task if cls is PeftModel else cls
        with inject.unchanged_on_error(model):
            made = kind(model, saved.config, adapter_name, autocast_adapter_dtype)
            try:
                made._load(adapter_name, saved, allow_base_mismatch)
            except BaseException:
                made.unload()
                raise
        made.train(is_trainable)
        return made

    def load_adapter(
        self: Any,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        allow_base_mismatch: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Add the adapter of a folder; a name that is there already gets the folder's tensors."""
        saved = storage.read(model_id, key_mapping=key_mapping, **kwargs)
        storage.check_base(saved, self.base_model.model, allow_base_mismatch)
        saved.config.inference_mode = not is_trainable
        fresh = adapter_name not in self.peft_config
        if fresh:
            self.add_adapter(adapter_name, saved.config, autocast_adapter_dtype=autocast_adapter_dtype)
        try:
            self._load(adapter_name, saved, allow_base_mismatch)
        except BaseException:
            if fresh:
                self.delete_adapter(adapter_name)
            raise
        return Loaded([], [])

    def _load(self: Any, name: str, saved: storage.Saved, allow_base_mismatch: bool) -> None:
        """Check the tensors of a folder against an adapter of this model, then fill it."""
        if name not in self.prompts:
            load_into(self.base_model.model, name, saved, allow_base_mismatch)
            return
        saved.tensors = self.prompts[name].from_file(saved.tensors)
        copies = collect(self.base_model.model, name, self.prompts[name].root) if self._has_copies(name) else {}
        heads = {key: value for key, value in saved.tensors.items() if not self.prompts[name].owns(key)}
        check(heads, copies, saved.source)
        if len(heads) == len(saved.tensors):
            raise MismatchError(f"{saved.source}: {self.prompts[name].absent}", path=saved.source)
        for key, tensor in saved.tensors.items():
            check_finite(saved.source, key, tensor)
        self.fill_adapter(name, saved.tensors)
