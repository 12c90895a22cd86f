"""Adapters out of folders onto a model. `deltatune.persistence` has the verbs, which load this when they are called."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from deltatune import biases, checks, empty, inject, manners, targets
from deltatune.config import A_CONFIG, PeftConfig
from deltatune.errors import MismatchError
from deltatune.filling import filled_from
from deltatune.names import check_name
from deltatune.notice import warn
from deltatune.state_dict import (
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
from deltatune.storage.embeddings import Replacements
from deltatune.storage.keys import adjusted
from deltatune.storage.options import STRICT, Allowed
from deltatune.storage.weights import checked_device

if TYPE_CHECKING:
    from deltatune.model import PeftModel


class How(NamedTuple):
    """How the adapter is built that a folder fills; the fields are arguments of `PeftModel.load_adapter`."""

    is_trainable: bool = False
    autocast_adapter_dtype: bool = True
    low_cpu_mem_usage: bool = False
    ephemeral_gpu_offload: bool = False

    def offload(self, config: PeftConfig) -> None:
        """Tell a config that a start is to be worked out on an accelerator; warn where it has no such start."""
        if not self.ephemeral_gpu_offload:
            return
        from deltatune.lora.config import LoraConfig
        from deltatune.lora.options import OF_DORA, LoraRuntimeConfig

        if isinstance(config, LoraConfig):
            config.runtime_config = LoraRuntimeConfig(ephemeral_gpu_offload=True)
        else:
            warn(f"ephemeral_gpu_offload=True {OF_DORA}, not for {type(config).__name__}; it changes nothing")


def from_pretrained(
    cls: Any,
    model: nn.Module,
    model_id: str | Path,
    name: str,
    how: How,
    config: PeftConfig | None,
    key_mapping: dict[str, str] | None,
    base_mismatch: bool,
    given: dict[str, Any],
) -> PeftModel:
    """`PeftModel.from_pretrained`; `given` are its `kwargs`."""
    from deltatune.model import PeftModel
    from deltatune.tasks import MODEL_TYPE_TO_PEFT_MODEL_MAPPING

    check_name(name)
    checks.instance("model", model, nn.Module, "the base model, a torch module")
    if config is not None:
        checks.instance("config", config, PeftConfig, A_CONFIG)
    device = checked_device(given.pop("torch_device", None) or "cpu")
    allowed, hub = options.loading(base_mismatch, given)
    saved = storage.read(model_id, config=config, key_mapping=key_mapping, unknown=allowed.unknown, **hub).on(device)
    storage.check_base(saved, model, allowed.base_mismatch or key_mapping is not None)
    saved.config.inference_mode = not how.is_trainable
    how.offload(saved.config)
    by_task = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(saved.config.task_type, PeftModel)
    kind: Any = by_task if cls is PeftModel else cls
    with torch.inference_mode(False), inject.unchanged_on_error(model), filled_from(saved.source_kind):
        numberless = how.low_cpu_mem_usage and not allowed.mismatched_sizes
        made = kind(model, saved.config, name, how.autocast_adapter_dtype, numberless)
        try:
            load(made, name, saved, allowed)
        except BaseException:
            made.unload()
            raise
    if not (how.is_trainable and manners.as_peft):
        made.train(how.is_trainable)
    return made


def load_adapter(
    model: PeftModel,
    model_id: str | Path,
    name: str,
    how: How,
    torch_device: str | None,
    key_mapping: dict[str, str] | None,
    base_mismatch: bool,
    given: dict[str, Any],
) -> Any:
    """`PeftModel.load_adapter`; `given` are its `kwargs`."""
    device = checked_device(torch_device or "cpu")
    allowed, hub = options.loading(base_mismatch, given)
    saved = storage.read(model_id, key_mapping=key_mapping, unknown=allowed.unknown, **hub).on(device)
    how.offload(saved.config)
    return load_saved(model, name, saved, how, allowed)


def load_saved(model: PeftModel, name: str, saved: storage.Saved, how: How, allowed: Allowed = STRICT) -> Any:
    """`load_adapter` for the content of a folder that has been read."""
    storage.check_base(saved, model.base_model.model, allowed.base_mismatch)
    saved.config.inference_mode = not how.is_trainable
    with torch.inference_mode(False), model._changing(name, saved.config):
        return _load_saved(model, name, saved, how, allowed)


def _load_saved(model: PeftModel, name: str, saved: storage.Saved, how: How, allowed: Allowed) -> Any:
    fresh = name not in model.peft_config
    if not fresh:
        model._refuse_merged(name)
    before = {} if fresh else {k: t.clone() for k, t in model.adapter_tensors(name).items()}
    if fresh:
        numberless = how.low_cpu_mem_usage and not allowed.mismatched_sizes
        whole = not allowed.mismatched_sizes and not manners.as_peft  # PEFT draws, which moves on the random state
        with filled_from(saved.source_kind, whole):
            model.add_adapter(name, saved.config, numberless, how.autocast_adapter_dtype)
    else:
        storage.warn_other_options(name, model.peft_config[name], saved)
    try:
        with filled_from(saved.source_kind):
            left_out = load(model, name, saved, allowed)
    except BaseException:
        if fresh:
            model.delete_adapter(name)
        elif _differ(before, model.adapter_tensors(name)):
            model.fill_adapter(name, before)
        raise
    if how.is_trainable:
        model.set_requires_grad(name)
    elif model.training or any(module.training for _, module in targets.walk(model.base_model.model)):
        model.eval()  # which looks into every adapter, so it is asked of none that is there already
    told = Loaded(left_out, [])
    told.verified = saved.verified
    return told


def load(model: PeftModel, name: str, saved: storage.Saved, allowed: Allowed) -> list[str]:
    """Check the tensors of a folder against an adapter of this model, then fill it; returns keys left out."""
    if name not in model.prompts:
        return load_into(model.base_model.model, name, saved, allowed)
    base, graft = model.base_model.model, model.prompts[name]
    tensors = graft.from_file(saved.tensors)
    copies = collect(base, name, graft.root) if model._has_copies(name) else {}
    heads = {key: value for key, value in tensors.items() if not graft.owns(key)}
    embeddings = Replacements(base, saved.config, heads, copies, allowed.embeddings, saved.source, graft.root)
    check(embeddings.rest, copies, saved.source, finite=not allowed.nonfinite)
    if len(heads) == len(tensors):
        raise MismatchError(f"{saved.source}: {graft.absent}", path=saved.source)
    for key, tensor in tensors.items() if not allowed.nonfinite else ():
        check_finite(saved.source, key, tensor)
    wanted = {key: value for key, value in tensors.items() if key not in heads or key in embeddings.rest}
    model.fill_adapter(name, wanted)
    embeddings.put()
    return []


def load_into(model: nn.Module, name: str, saved: storage.Saved, allowed: Allowed = STRICT) -> list[str]:
    """Check the tensors of a folder against an adapter on the layers of a bare model, then fill it.

    Returns the keys that were left out because their sizes differ.
    """
    found = parts(model, name)
    known = keyed(found, name, given=None)
    try:
        tensors = adjusted(model, matched(biases.of_peer(saved.tensors), known), known)
    except MismatchError as error:
        error.in_file(saved.source)
        raise
    base = Replacements(model, saved.config, tensors, known, allowed.embeddings, saved.source)
    plainly = reads_plainly(model, name)
    tensors = translated(model, name, base.rest, plainly=plainly)
    found = found if plainly else parts(model, name)
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


def _differ(before: dict[str, Tensor], now: dict[str, Tensor]) -> bool:
    """Whether values have changed; of tensors on the meta device, which have none, nothing has."""
    return any(not tensor.is_meta and not torch.equal(tensor, now[key]) for key, tensor in before.items())
