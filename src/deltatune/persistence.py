"""How a `PeftModel` goes into a folder and comes back; the files themselves are `deltatune.storage`'s.

Much of that is of no use before the first save or load, and is imported there.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from deltatune import checks, inject
from deltatune.config import PeftConfig
from deltatune.errors import SaveError, StateError
from deltatune.live_names import MERGED
from deltatune.names import listed
from deltatune.state_dict import ROOT, collect, fill

if TYPE_CHECKING:
    from deltatune.model import PeftModel


class Persistence:
    """The verbs of `PeftModel` that read and write adapters."""

    def adapter_tensors(
        self: Any, name: str, format: str | None = None, given: Collection[str] | None = ()
    ) -> dict[str, Tensor]:
        """File key -> tensor of one adapter; of those that a file may leave out only the given ones (None: all)."""
        self._known([name])
        if name not in self.prompts:
            from deltatune.fused import export

            model = self.base_model.model
            checks.one_of("save_pretrained", "format", format, (None, "native", "peft", "lora", export.PER_EXPERT))
            tensors = collect(model, name, given=None if format == "peft" else given)
            return export.split(model, name, tensors, ROOT) if format == export.PER_EXPERT else tensors
        copies = collect(self.base_model.model, name, self.prompts[name].root) if self._has_copies(name) else {}
        return {**self.prompts[name].file_tensors(format), **copies}

    def _has_copies(self: Any, name: str) -> bool:
        return any(name in copies.modules_to_save for _, copies in inject.trained_copies(self.base_model.model))

    def root_of(self: Any, name: str) -> str:
        """How keys of the base's modules begin in the file of an adapter."""
        return self.prompts[name].root if name in self.prompts else ROOT

    def base_embeddings(self: Any, name: str, asked: bool | str, known: Collection[str] = ()) -> dict[str, Tensor]:
        """The base's embeddings as far as they belong into the adapter's file: `save_embedding_layers`."""
        from deltatune.storage.embeddings import saved_embeddings

        return saved_embeddings(self.base_model.model, self.peft_config[name], asked, known, self.root_of(name))

    def load_state_dict(self: Any, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """torch's, for values that were taken while nothing was merged.

        Raises:
            StateError: Something was, or is here: merged weights would be adapted once more, or replaced by the base's.
        """
        facts = (getattr(state_dict, "_metadata", None) or {}).values()  # gone where the values were copied to a dict
        taken = sorted({name for fact in facts for name in fact.get(MERGED, ())})
        layers = inject.adapted_layers(self.base_model.model)
        here = sorted({name for _, layer in layers for name in layer.merged_adapters})
        if taken or here:
            raise StateError(
                f"load_state_dict: the values were taken while {taken} were merged, and here {here} are; call "
                "unmerge_adapter() before state_dict(), and before load_state_dict()",
                field="state_dict",
                found=taken,
                expected=[],
                hint="call unmerge_adapter() first",
            )
        return nn.Module.load_state_dict(self, state_dict, *args, **kwargs)

    def fill_adapter(self: Any, name: str, tensors: dict[str, Tensor]) -> None:
        """Put checked tensors into one adapter."""
        self._refuse_merged(name)
        with self.base_model.selection.gate.changing([name]):
            if name not in self.prompts:
                fill(self.base_model.model, name, tensors)
                return
            of_prompt = {key: value for key, value in tensors.items() if self.prompts[name].owns(key)}
            if of_prompt:
                self.prompts[name].load_file_tensors(of_prompt)
            fill(self.base_model.model, name, tensors, self.prompts[name].root)

    def _refuse_merged(self: Any, name: str) -> None:
        if any(name in layer.merged_adapters for _, layer in inject.adapted_layers(self.base_model.model)):
            raise StateError(
                f"adapter {name!r} is merged, and other values would not reach the merged weights; call "
                "unmerge_adapter() first",
                field="adapter_name",
                found=name,
            )

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
            safe_serialization: False writes adapter_model.bin, for programs that read no other format.
            save_embedding_layers: Save the base's embeddings too. "auto": if its vocabulary was changed after loading,
                as far as the files of the base on this machine tell; the network is not asked.
            is_main_process: False writes nothing.
            path_initial_model_for_weight_conversion: Folder of the LoRA adapter as it was before training, to save one
                that was started from the base's own weights (PiSSA, OLoRA, ...) as LoRA on the unchanged base, as
                format="lora" does. The folder is compared with what the adapter knows of it.
            format: "lora" writes PiSSA, OLoRA, CorDA and LoRA-GA as plain LoRA of twice the rank, which every program
                reads without the start. "peft" writes a prefix as PEFT can read it, or raises where PEFT could not
                express it; of layer methods it also writes the frozen tensors that files otherwise leave out, which
                PEFT warns of.
                "per_expert" writes LoRA on experts with a pair of factors for each of their layers, as transformers 4
                kept them and vLLM loads them (docs/experts.md).
            kwargs: `state_dict`: values to use instead of the model's own, under the model's keys. `allow_nonfinite`:
                save NaN and infinities.

        Raises:
            SaveError: Nothing was written.
        """
        from deltatune.storage import folder, options

        checks.instance("save_directory", save_directory, (str, os.PathLike), "the path of a folder")
        if save_directory == "" or "\0" in str(save_directory):
            raise SaveError(
                f"save_directory={str(save_directory)!r} names no folder; '.' is the one this program runs in",
                field="save_directory",
                path=str(save_directory),
                expected="the path of a folder",
            )
        how = options.saving(
            safe_serialization, save_embedding_layers, path_initial_model_for_weight_conversion, format, kwargs
        )
        names = (
            list(self.peft_config) if selected_adapters is None else [*listed(selected_adapters, "selected_adapters")]
        )
        self._known(names)
        if is_main_process:
            folder.save(self, Path(save_directory), names, how)

    def push_to_hub(
        self: Any,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        tags: list[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save into a repository of the hub, as one commit; the repository is made if there is none.

        Args:
            private: Whether a new repository is; None: as the owner's settings say.
            revision: Branch to commit to, made if there is none.
            tags: Further tags for the model card. A card that the repository has is left alone.
            kwargs: Options of `save_pretrained`; `endpoint`.

        Returns:
            What huggingface_hub tells of the commit: a string, its address.

        Raises:
            SaveError: The hub refused or cannot be reached; the repository is as it was.
        """
        from deltatune.storage.hub import push
        from deltatune.storage.options import other_formats

        endpoint = kwargs.pop("endpoint", None)

        def write(folder: Path) -> None:
            self.save_pretrained(folder, **{"card_tags": tags or [], **kwargs})

        return push(
            write,
            repo_id,
            commit_message=commit_message or f"Upload {type(self).__name__}",
            commit_description=commit_description,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            endpoint=endpoint,
            stale=other_formats(kwargs.get("safe_serialization", True)),
        )

    def create_or_update_model_card(self: Any, output_dir: str | Path) -> None:
        """A model card in a folder; of one that is there only what its head lacks is filled in."""
        from deltatune.storage.card import update_card

        update_card(Path(output_dir), self.active_peft_config)

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
        """A base model with the adapter of a folder or repository on it, in eval mode unless trainable.

        Args:
            model_id: A folder, or 'owner/name' of a repository. What looks like a path is never sent to the network.
            config: To be used instead of the folder's.
            ephemeral_gpu_offload: Work out what DoRA starts from on the first accelerator, of a base on the CPU. A
                warning says where it changes nothing: other methods, no accelerator.
            low_cpu_mem_usage: Build the adapter without initialising it, as the file overwrites it.
            key_mapping: Regular expression -> replacement, for keys without `base_model.model.`; the first that is
                found. Renames that transformers knows of the base are made without it.
            allow_base_mismatch: Take an adapter that was made for another base.
            kwargs: For the hub: `revision`, `subfolder`, `token`, `cache_dir`, `local_files_only`, `force_download` and
                other arguments of `hf_hub_download`. `ignore_mismatched_sizes`: leave out, with a warning, tensors of
                other sizes. `load_embedding_layers`: True replaces the base's embeddings by those in the file; "auto"
                (default) if its vocabulary was changed here too. `allow_nonfinite`: take NaN. `allow_unknown`: fields
                of a newer version's config to pass over. `torch_device`: where tensors are read to, the CPU by
                default; the adapter itself is where its layers are.

        Raises:
            PeftError: The folder is damaged or does not fit the model, which is left as it was.
        """
        from deltatune import loading

        how = loading.How(is_trainable, autocast_adapter_dtype, low_cpu_mem_usage, ephemeral_gpu_offload)
        return loading.from_pretrained(
            cls, model, model_id, adapter_name, how, config, key_mapping, allow_base_mismatch, kwargs
        )

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
        """Add the adapter of a folder or repository; a name that is there already gets its tensors.

        Arguments are those of `from_pretrained`. The model goes to eval mode unless the adapter is trainable.

        Returns:
            `missing_keys`: of tensors that were left out (`ignore_mismatched_sizes`); `unexpected_keys`: none;
            `verified`: whether the tensors agreed with the digest in the file, None for files without one.

        Raises:
            PeftError: As `from_pretrained`; the model and its adapters are as they were.
        """
        from deltatune import loading

        how = loading.How(is_trainable, autocast_adapter_dtype, low_cpu_mem_usage, ephemeral_gpu_offload)
        return loading.load_adapter(
            self, model_id, adapter_name, how, torch_device, key_mapping, allow_base_mismatch, kwargs
        )
