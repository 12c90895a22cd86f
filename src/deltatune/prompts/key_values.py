"""`Prefix`: the keys and values that one adapter hands to the attentions of one model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deltatune.config import TaskType
from deltatune.errors import AdapterNameError, ConfigError, TargetError
from deltatune.notice import warn
from deltatune.patterns import modules_by_name
from deltatune.prompts import files
from deltatune.prompts.attention import SLOT, Slot
from deltatune.prompts.capture import check_shift
from deltatune.prompts.config import KeyValueConfig, Layout
from deltatune.prompts.encoder import KeyValueEncoder
from deltatune.prompts.graft import Graft
from deltatune.prompts.own import Mount
from deltatune.prompts.padding import FromFirstToken
from deltatune.prompts.peer import check_as_peft
from deltatune.prompts.positions import PositionShift, position_modules
from deltatune.prompts.sites import Site, choose_sites
from deltatune.prompts.stage import STAGE, Stage
from deltatune.prompts.starts import start_rows
from deltatune.selection import Selection

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Prefix(Graft):
    """One adapter's prefix on one model.

    Attributes:
        encoder: The trainable part (`KeyValueEncoder`), whose rows are cut into the keys and values of the sites.
        sites: The attentions that get a prefix, in the order of the encoder's rows.
        biased: With PEFT's layout, the module that holds the relative position bias of each site.
    """

    gives_key_values = True

    encoder: KeyValueEncoder

    def __init__(
        self, name: str, config: KeyValueConfig, encoder: KeyValueEncoder, sites: list[Site], stage: Stage
    ) -> None:
        self.name = name
        self.config = config
        self.encoder = encoder
        self.sites = sites
        self.stage = stage
        self.biased: dict[str, nn.Module] = {}
        self._folded: tuple[Any, dict[str, tuple[Tensor, Tensor]]] | None = None

    @classmethod
    def attach(cls, model: nn.Module, config: Any, name: str, selection: Selection, encoder: type[nn.Module]) -> Prefix:
        """Find the sites, fill in the config, build the encoder and put the hooks on; raises before any change."""
        config.validate()
        _ = config.length
        from transformers import PreTrainedModel

        if not isinstance(model, PreTrainedModel):
            raise TargetError(
                f"{type(model).__name__}: prefix tuning needs a model of transformers, whose attention it can reach; "
                "use LoRA",
                field="model",
                found=type(model).__name__,
                expected="a model of transformers",
                hint="use LoRA",
            )
        stage = vars(model).get(STAGE)
        if stage is not None and name in stage.prefixes:
            raise AdapterNameError(f"adapter {name!r} already has a prefix on this {type(model).__name__}", found=name)
        sites = choose_sites(model, config.sites)
        values = _filled_in(model, config, sites)
        left_open = config.layout is None
        values["layout"] = layout = _open_layout(model, sites) if left_open else config.layout
        shifted = layout == "peft" and _check_layout(model, sites)
        meant = copy.copy(config)
        meant.layout = layout
        start = start_rows(model, meant, sites, {} if stage is None else stage.prefixes)
        before = {field: getattr(config, field) for field in values}
        for field, value in values.items():
            setattr(config, field, value)

        built: Any = encoder(config).to(model.device)
        if left_open and len(set(built.layer_of_site)) < len(sites):
            warn(
                f"{type(model).__name__}: a part of this prefix is never read, as in PEFT, which hands the layers of "
                "an encoder-decoder each other's keys and values; with layout='native' every layer has its own"
            )
        if start is not None:
            built.fill(start)
        if stage is None:
            stage = vars(model)[STAGE] = Stage(model, selection)
        prefix = cls(name, config, built, sites, stage)
        modules = modules_by_name(model)
        for site in sites:
            if SLOT not in vars(modules[site.name]):
                vars(modules[site.name])[SLOT] = slot = Slot(stage, site.name)
                if site.layout is not None:
                    slot.mount = Mount(slot, site.layout).put_on(modules[site.name])
        if stage.counting is None and not getattr(model.config, "is_encoder_decoder", False):  # two masks in one call
            stage.counting = FromFirstToken(stage)
            stage.counting.attach(model, [site.name for site in sites])
        if shifted:
            prefix.biased = _bias_tables(modules, sites)
            if stage.shifting is None:
                stage.shifting = PositionShift(stage)
                stage.shifting.attach(model, [site.name for site in sites])
        stage.prefixes[name] = prefix
        if shifted and any(site.layout is not None for site in sites):
            try:
                check_as_peft(prefix)
            except TargetError as reason:
                prefix.detach()
                for field, value in before.items():
                    setattr(config, field, value)
                if not left_open:
                    raise
                warn(_instead(reason))
                config.layout = "native"
                return cls.attach(model, config, name, selection, encoder)
        return prefix

    def detach(self) -> None:
        """Take this prefix off; with the last one go all hooks and slots."""
        stage, model = self.stage, self.stage.model
        stage.prefixes.pop(self.name, None)
        still = {site.name for prefix in stage.prefixes.values() for site in prefix.sites}
        modules = modules_by_name(model)
        for site in self.sites:
            slot = None if site.name in still else vars(modules[site.name]).pop(SLOT, None)
            if slot is not None and slot.mount is not None:
                slot.mount.take_off()
        if stage.shifting is not None and all(prefix.config.layout != "peft" for prefix in stage.prefixes.values()):
            stage.shifting.detach()
            stage.shifting = None
        if not stage.prefixes:
            if stage.counting is not None:
                stage.counting.detach()
            stage.close()
            vars(model).pop(STAGE, None)

    def keys_values(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Keys and values by site. Without gradients they are kept for as long as the encoder's parameters stay."""
        parameters, buffers = list(self.encoder.parameters()), list(self.encoder.buffers())
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(p.requires_grad for p in parameters)):
            self._folded = None
            return self._by_site()
        if any(p.is_inference() for p in (*parameters, *buffers)):  # they count no versions
            return self._by_site()
        state = [(id(p), p.data_ptr(), p._version) for p in (*parameters, *buffers)]
        if self._folded is None or self._folded[0] != state:
            self._folded = (state, self._by_site())
        return self._folded[1]

    def to_cache(self, batch_size: int = 1) -> Any:
        """An ordinary cache of transformers that holds this prefix (`deltatune.prompts.serve` says how to use it)."""
        from deltatune.prompts.serve import cache_of

        return cache_of(self, batch_size)

    def _by_site(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {site.name: pair for site, pair in zip(self.sites, self.encoder.keys_values())}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_folded": None}

    # ----------------------------------------------------------------------------------------------------------- files

    def file_tensors(self, format: str | None = None) -> dict[str, Tensor]:
        """`format`: None for that of the layout, "native", or "peft" for files that PEFT reads."""
        return files.tensors(self, format)

    def file_config(self, format: str | None = None) -> dict[str, Any]:
        return files.config_entries(self, format)

    def load_file_tensors(self, tensors: dict[str, Tensor]) -> None:
        files.load(self, tensors)
        self._folded = None


def _filled_in(model: PreTrainedModel, config: KeyValueConfig, sites: list[Site]) -> dict[str, Any]:
    """The config's fields that follow from the sites; those that a user or a file set must agree."""
    width = max(site.shape[0] * site.shape[1] for site in sites)
    is_seq2seq = config.task_type == TaskType.SEQ_2_SEQ_LM
    values: dict[str, Any] = {
        "num_layers": len(sites),
        "token_dim": width,
        "num_attention_heads": sites[0].shape[0],
        "num_transformer_submodules": 2 if is_seq2seq else 1,
        **config.derived(width),
        "site_names": [site.name for site in sites],
        "site_shapes": [list(site.shape) for site in sites],
    }
    for field in ("num_layers", "token_dim", "num_attention_heads", "site_shapes"):
        given = getattr(config, field)
        if given is not None and given != values[field]:
            raise ConfigError(
                f"{type(config).__name__}: {field}={given!r} does not fit {type(model).__name__}, which has "
                f"{values[field]!r} (leave it out to have it filled in; a file that says so was made for another base)",
                field=field,
                found=given,
                expected=values[field],
            )
    if config.num_transformer_submodules is not None:
        values["num_transformer_submodules"] = config.num_transformer_submodules
    return values


def _open_layout(model: PreTrainedModel, sites: list[Site]) -> Layout:
    """The layout of a config that leaves it open, as programs written for PEFT do."""
    try:
        _check_layout(model, sites)
    except TargetError as reason:
        warn(_instead(reason))
        return "native"
    return "peft"


def _instead(reason: TargetError) -> str:
    return f"{reason}. That is what this prefix has; its numbers are not those that PEFT would compute"


def _check_layout(model: PreTrainedModel, sites: list[Site]) -> bool:
    """Raise TargetError where PEFT's numbers cannot be reproduced; True otherwise."""
    position_modules(model, [site.name for site in sites])
    text = model.config.get_text_config(decoder=True)
    reason = None
    if len({site.shape for site in sites}) > 1 or any(site.shape[:2] != site.shape[2:] for site in sites):
        reason = "its attentions differ in shape"
    elif any(site.calls > 1 for site in sites):
        reason = "its attention modules are called several times in a pass"
    elif getattr(text, "attention_chunk_size", None):
        reason = "its attention works in chunks, whose borders PEFT moves"
    elif getattr(text, "num_kv_shared_layers", 0):
        reason = "some of its layers share keys and values"
    elif getattr(model, "main_input_name", "input_ids") not in ("input_ids", "input_features"):
        reason = "PEFT has no prefix for models without text"
    if reason is not None:
        raise TargetError(
            f"{type(model).__name__}: PEFT's layout is not available, because {reason}; use layout='native'",
            field="layout",
            found="peft",
            expected="native",
        )
    check_shift(model, sites)
    return True


def _bias_tables(modules: Mapping[str, nn.Module], sites: list[Site]) -> dict[str, nn.Module]:
    """T5's first layer holds the relative bias of all; in UMT5 each layer has its own."""
    tables: dict[str, nn.Module] = {}
    latest = None
    for site in sites:
        module = modules[site.name]
        if getattr(module, "has_relative_attention_bias", False):
            latest = module
        if latest is not None:
            tables[site.name] = latest
    return tables
