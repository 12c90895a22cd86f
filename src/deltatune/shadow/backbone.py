"""The shadow's own transformer: a fresh small decoder of the base's class, or a pretrained one."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from deltatune.errors import ConfigError, FormatError, TargetError
from deltatune.shadow.config import MIRROR, SIZES, ShadowConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Where the names differ, transformers' configs answer to the first; these have no common name.
_INNER = ("intermediate_size", "ffn_dim", "n_inner", "d_ff")
_PROJECTED = "causal_lm_with_hidden_projection"  # model type of checkpoints that bring P along


def decoder_of(model: nn.Module) -> tuple[str, PreTrainedModel]:
    """Path and module of the decoder whose blocks a shadow can run beside.

    Raises:
        TargetError: The model is no decoder of transformers.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or getattr(model.config, "is_encoder_decoder", False):
        raise TargetError(
            f"{type(model).__name__}: a shadow runs beside a decoder-only model of transformers; use LoRA here",
            found=type(model).__name__,
        )
    found = model.get_decoder()
    for path, module in model.named_modules():
        if module is found and isinstance(found, PreTrainedModel):
            return path, found
    raise TargetError(
        f"{type(model).__name__} does not say which of its modules is the decoder; use LoRA here",
        field="model",
        found=type(model).__name__,
        expected="a model with get_decoder()",
        hint="use LoRA",
    )


def blocks_of(decoder: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder's blocks: the longest list of modules that it has.

    Raises:
        TargetError: There is none.
    """
    lists = {name: child for name, child in decoder.named_children() if isinstance(child, nn.ModuleList)}
    if not lists:
        raise TargetError(
            f"{type(decoder).__name__} keeps no list of blocks that a shadow could run beside",
            field="model",
            found=type(decoder).__name__,
            expected="a decoder with a list of blocks",
        )
    name = max(lists, key=lambda name: len(lists[name]))
    return name, lists[name]


def build(decoder: PreTrainedModel, config: ShadowConfig) -> tuple[nn.Module, nn.Linear | None]:
    """The backbone and, where its width is another than the base's, the projection to that.

    Raises:
        ConfigError: The sizes that are asked for make no model of this class.
    """
    width = decoder.config.hidden_size
    backbone, projection = _mirror(decoder, config), None
    if config.shadow_model != MIRROR:
        try:
            backbone, projection = _pretrained(config.shadow_model)
        except (OSError, ValueError, KeyError) as error:
            raise FormatError(
                f"ShadowConfig: shadow_model={config.shadow_model!r} cannot be loaded as a model: {error}",
                field="shadow_model",
                path=config.shadow_model,
                found=config.shadow_model,
            ) from error
        _frozen_tables(backbone)
    inner = backbone.config.hidden_size
    if projection is not None and (projection.in_features, projection.out_features) != (inner, width):
        raise ConfigError(
            f"ShadowConfig: shadow_model={config.shadow_model!r} projects {projection.in_features} to "
            f"{projection.out_features} features, the base has {width}",
            field="shadow_model",
            found=projection.out_features,
            expected=width,
        )
    if projection is None and inner != width:
        projection = nn.Linear(inner, width, bias=False)
    if config.share_embeddings and config.shadow_model == MIRROR and inner == width:
        _drop_table(backbone)
    return backbone, projection


def shares_embeddings(backbone: nn.Module) -> bool:
    return _table(backbone) is None


def _mirror(decoder: PreTrainedModel, config: ShadowConfig) -> Any:
    small = copy.deepcopy(decoder.config)
    asked = {name: getattr(config, f"shadow_{name}") for name in SIZES}
    asked["num_hidden_layers"] = asked["num_hidden_layers"] or 1
    for name, value in asked.items():
        if value is not None:
            setattr(small, _config_name(small, name), value)
    if getattr(small, "layer_types", None):
        kinds, layers = list(small.layer_types), asked["num_hidden_layers"]
        small.layer_types = (kinds + [kinds[-1]] * layers)[:layers]
    if getattr(small, "max_window_layers", None) is not None:
        small.max_window_layers = min(small.max_window_layers, asked["num_hidden_layers"])
    try:
        with torch.device("cpu"):
            return type(decoder)(small)
    except (ValueError, RuntimeError, AssertionError) as error:
        given = {f"shadow_{name}": value for name, value in asked.items() if value is not None}
        raise ConfigError(
            f"ShadowConfig: {given} make no {type(decoder).__name__}: {error}", field=next(iter(given)), found=given
        ) from error


def _config_name(config: Any, name: str) -> str:
    names = _INNER if name == "intermediate_size" else (name,)
    for candidate in names:
        if hasattr(config, candidate):
            return candidate
    raise ConfigError(f"ShadowConfig: {type(config).__name__} has no {name}", field=f"shadow_{name}")


def _pretrained(source: str) -> tuple[Any, nn.Linear | None]:
    from transformers import AutoConfig, AutoModel
    from transformers.utils.hub import cached_file

    config_path = cached_file(source, "config.json")
    with open(str(config_path), encoding="utf-8") as file:
        raw = json.load(file)
    if raw.get("model_type") != _PROJECTED:
        return AutoModel.from_pretrained(source), None
    from safetensors.torch import load_file

    inner = dict(raw["shadow_model_config"])
    backbone = AutoModel.from_config(AutoConfig.for_model(inner.pop("model_type"), **inner))
    tensors = load_file(str(cached_file(source, "model.safetensors")))
    own = {
        key.removeprefix("shadow_model."): value for key, value in tensors.items() if key.startswith("shadow_model.")
    }
    backbone.load_state_dict(own)
    if "shadow_hidden_projection.weight" not in tensors:
        raise FormatError(f"{source}: model.safetensors lacks shadow_hidden_projection.weight", path=source)
    weight = tensors["shadow_hidden_projection.weight"]
    projection = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    projection.weight.data = weight.to(projection.weight.dtype)
    return backbone, projection


def _table(backbone: Any) -> tuple[nn.Module, str, nn.Module] | None:
    """Where the backbone keeps its table of embeddings: parent, name, table; None once it is dropped."""
    try:
        table = backbone.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    for parent in backbone.modules():
        for name, child in parent._modules.items():
            if child is table and child is not None:
                return parent, name, child
    return None


def _drop_table(backbone: nn.Module) -> None:
    found = _table(backbone)
    if found is not None:
        parent, name, _ = found
        parent._modules[name] = None


def _frozen_tables(backbone: Any) -> None:
    """A pretrained table of embeddings would be most of what is trained."""
    found = _table(backbone)
    if found is not None:
        found[2].requires_grad_(False)
