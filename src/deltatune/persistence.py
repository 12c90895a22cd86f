"""How a `PeftModel` goes into a folder and comes back; the files themselves are `deltatune.storage`'s."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deltatune import biases, checks, empty, inject
from deltatune.config import PeftConfig
from deltatune.errors import MismatchError, SaveError, StateError
from deltatune.filling import filled_from
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
    fitting,
    keyed,
    matched,
    parts,
    reads_plainly,
    translated,
)
from deltatune.storage import folder as storage
from deltatune.storage import options
from deltatune.storage.derived import check_derived
from deltatune.storage.embeddings import Replacements, saved_embeddings
from deltatune.storage.keys import adjusted
from deltatune.storage.options import STRICT, Allowed
from deltatune.storage.weights import checked_device

if TYPE_CHECKING:
    from deltatune.model import PeftModel


def load_into(model: nn.Module, name: str, saved: storage.Saved, allowed: Allowed = STRICT) -> list[str]:
    """Check the tensors of a folder against an adapter on the layers of a bare model, then fill it.

    Returns the keys that were left out because their sizes differ.
    """
    found = parts(model, name)
    known = keyed(found, name, given=None)
    tensors = adjusted(model, matched(biases.of_peer(saved.tensors), known), known)
    base = Replacements(model, saved.config, tensors, known, allowed.embeddings, saved.source)
    tensors = translated(model, name, base.rest)
    found = found if reads_plainly(model, name) else parts(model, name)
    expected = keyed(found, name, given=tensors)
    given = fitting(tensors, expected, saved.source) if allowed.mismatched_sizes else tensors
    left_out = sorted(tensors.keys() - given.keys())
    wanted = {key: tensor for key, tensor in expected.items() if key not in left_out}
    check(given, wanted, saved.source, finite=not allowed.nonfinite)
    if saved.derived is not None and not allowed.base_mismatch:
        check_derived(saved.derived, derived(model, name, given), saved.source)
    numberless = any(tensor.is_meta for tensor in known.values())
    if numberless:
        empty.give_room(model, name, left_out)
    fill(model, name, given, found=None if numberless else found)
    base.put()
    return left_out


class Persistence:
    """The verbs of `PeftModel` that read and write adapters."""

    def adapter_tensors(
        self: Any, name: str, format: str | None = None, given: Collection[str] | None = ()
    ) -> dict[str, Tensor]:
        """File key -> tensor of one adapter; of those that a file may leave out only the given ones (None: all)."""
        self._known([name])
        if name not in self.prompts:
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
        return saved_embeddings(self.base_model.model, self.peft_config[name], asked, known, self.root_of(name))

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
        if save_directory == "":
            raise SaveError("save_directory='' names no folder; '.' is the one this program runs in", path="")
        how = options.saving(
            safe_serialization, save_embedding_layers, path_initial_model_for_weight_conversion, format, kwargs
        )
        names = list(self.peft_config) if selected_adapters is None else list(selected_adapters)
        self._known(names)
        if is_main_process:
            storage.save(self, Path(save_directory), names, how)

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
            stale=options.other_formats(kwargs.get("safe_serialization", True)),
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
            ephemeral_gpu_offload: Accepted; there is nothing to move, an adapter computes where its layers are.
            low_cpu_mem_usage: Build the adapter without initialising it, as the file overwrites it.
            key_mapping: Regular expression -> replacement, for keys without `base_model.model.`; the first that is
                found. Renames that transformers knows of the base are made without it.
            allow_base_mismatch: Take an adapter that was made for another base.
            kwargs: For the hub: `revision`, `subfolder`, `token`, `cache_dir`, `local_files_only`, `force_download` and
                other arguments of `hf_hub_download`. `ignore_mismatched_sizes`: leave out, with a warning, tensors of
                other sizes. `load_embedding_layers`: True replaces the base's embeddings by those in the file; "auto"
                (default) if its vocabulary was changed here too. `allow_nonfinite`: take NaN. `allow_unknown`: fields
                of a newer version's config to pass over. `torch_device`: accepted.

        Raises:
            PeftError: The folder is damaged or does not fit the model, which is left as it was.
        """
        from deltatune.model import PeftModel
        from deltatune.tasks import MODEL_TYPE_TO_PEFT_MODEL_MAPPING

        check_name(adapter_name)
        checked_device(kwargs.pop("torch_device", "cpu") or "cpu")
        allowed, hub = options.loading(allow_base_mismatch, kwargs)
        saved = storage.read(model_id, config=config, key_mapping=key_mapping, unknown=allowed.unknown, **hub)
        storage.check_base(saved, model, allowed.base_mismatch)
        saved.config.inference_mode = not is_trainable
        by_task = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(saved.config.task_type, PeftModel)
        kind: Any = by_task if cls is PeftModel else cls
        with inject.unchanged_on_error(model), filled_from(saved.source_kind):
            numberless = low_cpu_mem_usage and not allowed.mismatched_sizes
            made = kind(model, saved.config, adapter_name, autocast_adapter_dtype, numberless)
            try:
                made._load(adapter_name, saved, allowed)
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
        """Add the adapter of a folder or repository; a name that is there already gets its tensors.

        Arguments are those of `from_pretrained`. The model goes to eval mode unless the adapter is trainable.

        Returns:
            `missing_keys`: of tensors that were left out (`ignore_mismatched_sizes`); `unexpected_keys`: none;
            `verified`: whether the tensors agreed with the digest in the file, None for files without one.

        Raises:
            PeftError: As `from_pretrained`; the model and its adapters are as they were.
        """
        checked_device(torch_device or "cpu")
        allowed, hub = options.loading(allow_base_mismatch, kwargs)
        saved = storage.read(model_id, key_mapping=key_mapping, unknown=allowed.unknown, **hub)
        return self.load_saved(adapter_name, saved, is_trainable, autocast_adapter_dtype, low_cpu_mem_usage, allowed)

    def load_saved(
        self: Any,
        adapter_name: str,
        saved: storage.Saved,
        is_trainable: bool = False,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        allowed: Allowed = STRICT,
    ) -> Any:
        """`load_adapter` for the content of a folder that has been read."""
        storage.check_base(saved, self.base_model.model, allowed.base_mismatch)
        saved.config.inference_mode = not is_trainable
        with self._changing(adapter_name, saved.config):
            return self._load_saved(
                adapter_name, saved, is_trainable, autocast_adapter_dtype, low_cpu_mem_usage, allowed
            )

    def _load_saved(
        self: Any,
        adapter_name: str,
        saved: storage.Saved,
        is_trainable: bool,
        autocast_adapter_dtype: bool,
        low_cpu_mem_usage: bool,
        allowed: Allowed,
    ) -> Any:
        fresh = adapter_name not in self.peft_config
        if not fresh:
            self._refuse_merged(adapter_name)
        before = {} if fresh else {k: t.clone() for k, t in self.adapter_tensors(adapter_name).items()}
        if fresh:
            numberless = low_cpu_mem_usage and not allowed.mismatched_sizes
            with filled_from(saved.source_kind):
                self.add_adapter(adapter_name, saved.config, numberless, autocast_adapter_dtype)
        else:
            storage.warn_other_options(adapter_name, self.peft_config[adapter_name], saved)
        try:
            with filled_from(saved.source_kind):
                left_out = self._load(adapter_name, saved, allowed)
        except BaseException:
            if fresh:
                self.delete_adapter(adapter_name)
            elif _differ(before, self.adapter_tensors(adapter_name)):
                self.fill_adapter(adapter_name, before)
            raise
        if is_trainable:
            self.set_requires_grad(adapter_name)
        elif self.training or any(module.training for _, module in inject.targets.walk(self.base_model.model)):
            self.eval()  # which looks into every adapter, so it is asked of none that is there already
        told = Loaded(left_out, [])
        told.verified = saved.verified
        return told

    def _load(self: Any, name: str, saved: storage.Saved, allowed: Allowed) -> list[str]:
        """Check the tensors of a folder against an adapter of this model, then fill it; returns keys left out."""
        if name not in self.prompts:
            return load_into(self.base_model.model, name, saved, allowed)
        model, graft = self.base_model.model, self.prompts[name]
        tensors = graft.from_file(saved.tensors)
        copies = collect(model, name, graft.root) if self._has_copies(name) else {}
        heads = {key: value for key, value in tensors.items() if not graft.owns(key)}
        base = Replacements(model, saved.config, heads, copies, allowed.embeddings, saved.source, graft.root)
        check(base.rest, copies, saved.source, finite=not allowed.nonfinite)
        if len(heads) == len(tensors):
            raise MismatchError(f"{saved.source}: {graft.absent}", path=saved.source)
        for key, tensor in tensors.items() if not allowed.nonfinite else ():
            check_finite(saved.source, key, tensor)
        self.fill_adapter(name, {key: value for key, value in tensors.items() if key not in heads or key in base.rest})
        base.put()
        return []


def _differ(before: dict[str, Tensor], now: dict[str, Tensor]) -> bool:
    """Whether values have changed; of tensors on the meta device, which have none, nothing has."""
    return any(not tensor.is_meta and not torch.equal(tensor, now[key]) for key, tensor in before.items())
