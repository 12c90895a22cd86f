"""Where a model embeds its tokens, found by watching one small forward pass."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deltatune.errors import TargetError
from deltatune.prompts.example import example_inputs
from deltatune.prompts.positions import learned_tables
from deltatune.prompts.sites import undisturbed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_OF_A_PART = re.compile(r"(image|video|vision|audio|speech)\w*_(token_id|token_index)$")
ENCODER, DECODER = (
    "",
    "decoder_",
)  # a side, as the names of its arguments begin; ENCODER is the only side of most models


@dataclass
class Places:
    """What a model shows of its inputs.

    Attributes:
        paths: Module path of the embedding of each side.
        stacks: Module paths of the encoder and the decoder, where there are both.
        width: Of the embedded tokens.
        limit: Learned positions there are; None where positions are computed.
        counted: Tokens that stand for parts of images, videos and sound, which the model counts.
    """

    paths: dict[str, str]
    stacks: dict[str, str]
    width: int
    limit: int | None
    counted: tuple[int, ...] = ()


def find_places(model: nn.Module) -> Places:
    """TargetError, naming the model and what works instead, where tokens are not embedded within reach."""
    from transformers import PreTrainedModel

    title = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise TargetError(
            f"{title}: a prompt needs a model of transformers, whose input it can lengthen; use LoRA",
            field="model",
            found=title,
            expected="a model of transformers",
            hint="use LoRA",
        )
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise TargetError(
            f"{title} reads {model.main_input_name}, not tokens, so there are no embedded tokens to put a prompt "
            "before; use PrefixTuningConfig, which acts in the attentions, or LoRA",
            field="model",
            found=model.main_input_name,
            expected="input_ids",
        )
    called, failure = _embeddings_called(model)
    stacks = _stacks(model)
    paths = {side: path for side, owner in _owners(model, stacks) if (path := _path(model, owner, called)) is not None}
    if ENCODER not in paths and (only := _only(model, called)) is not None:  # an encoder inside of another model
        paths[ENCODER] = only
    if ENCODER not in paths:
        reason = f"a trial forward pass failed ({failure})" if failure else "none of its modules embeds the token ids"
        raise TargetError(
            f"{title}: there is no input embedding that a prompt could be put before, because {reason}; "
            "use PrefixTuningConfig or LoRA",
            field="model",
            found=title,
            expected="a module that embeds the token ids",
        )
    names = {side: path for side, stack in stacks.items() if (path := _name(model, stack)) is not None}
    width = called[id(model.get_submodule(paths[ENCODER]))]
    return Places(paths, names, width, _limit(model, paths[ENCODER]), _counted(model))


def _embeddings_called(model: PreTrainedModel) -> tuple[dict[int, int], str]:
    """Identity -> width of every module that made vectors (1, T, width) of ids (1, T)."""
    called: dict[int, int] = {}
    given: list[Tensor] = []

    def watch(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        ids: Any = args[0] if args else None
        embeds = isinstance(ids, Tensor) and isinstance(output, Tensor) and not ids.is_floating_point()
        if not embeds or ids.ndim != 2 or output.ndim != 3 or output.shape[:2] != ids.shape:
            return
        if any(torch.equal(ids, tokens) for tokens in given):  # and not positions
            called[id(module)] = output.shape[2]

    failure = ""
    for inputs in example_inputs(model):
        called.clear()
        given[:] = [tensor for name, tensor in inputs.items() if name.endswith("input_ids")]
        handles = [module.register_forward_hook(watch) for module in model.modules()]
        try:
            with undisturbed(model), torch.no_grad():
                model(**inputs)
            return called, ""
        except Exception as error:  # a probe of unknown models: whatever they raise, another input may suit
            failure = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
        finally:
            for handle in handles:
                handle.remove()
    return {}, failure


def _stacks(model: PreTrainedModel) -> dict[str, nn.Module]:
    if not getattr(model.config, "is_encoder_decoder", False):
        return {}
    found = {ENCODER: model.get_encoder(), DECODER: model.get_decoder()}
    known = {id(module) for module in model.modules() if module is not model}
    return {side: stack for side, stack in found.items() if id(stack) in known}


def _owners(model: PreTrainedModel, stacks: dict[str, nn.Module]) -> list[tuple[str, nn.Module]]:
    """For each side, who may know its embedding; later ones are preferred."""
    return [(ENCODER, model), *stacks.items()]


def _path(model: nn.Module, owner: nn.Module, called: dict[int, int]) -> str | None:
    try:
        embedding = owner.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return _name(model, embedding) if id(embedding) in called else None


def _only(model: nn.Module, called: dict[int, int]) -> str | None:
    """The one table that was called; a wrapper counts for what it wraps."""
    tables = [name for name, module in model.named_modules() if id(module) in called and hasattr(module, "weight")]
    return tables[0] if tables and all(f"{name}.".startswith(f"{tables[0]}.") for name in tables) else None


def _name(model: nn.Module, wanted: nn.Module) -> str | None:
    return next((name for name, module in model.named_modules() if module is wanted), None)


def _counted(model: PreTrainedModel) -> tuple[int, ...]:
    values = {name: value for name, value in vars(model.config).items() if _OF_A_PART.search(name)}
    return tuple(sorted({value for value in values.values() if isinstance(value, int)}))


def _limit(model: PreTrainedModel, path: str) -> int | None:
    """How many positions the learned tables beside an embedding have."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0
    sizes = []
    for table in learned_tables(model, [path]):
        reserved = (table.padding_idx + 1) if table.padding_idx is not None else getattr(table, "offset", 0)
        if table.num_embeddings >= longest > 0:  # smaller ones hold distances
            sizes.append(table.num_embeddings - reserved)
    return min(sizes, default=None)
