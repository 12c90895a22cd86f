"""How learned keys and values start, other than at random: from text, from a trained prefix, by size."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deltatune.errors import AdapterNameError, ConfigError, MismatchError, TargetError
from deltatune.prompts.capture import capture, rows_of
from deltatune.prompts.example import token_embedding
from deltatune.prompts.files import NAMES
from deltatune.prompts.sites import Site
from deltatune.prompts.text import rows_of_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from deltatune.prompts.config import KeyValueConfig
    from deltatune.prompts.key_values import Prefix

TOKENS = 32  # of the random text whose keys and values show the scale of a model's own


def start_rows(
    model: PreTrainedModel, config: KeyValueConfig, sites: list[Site], others: dict[str, Prefix]
) -> Tensor | None:
    """Rows (P, width) that a config asks to start from; None where the encoder's own start is meant.

    Args:
        others: The prefixes that the model has already.
    """
    if config.init_text is not None or config.init_token_ids is not None:
        return rows_of_config(model, config, sites)
    if config.init_from is not None:
        return _fitted(_trained(config, sites, others), config.length)
    if config.init_weights == "scaled":
        return drawn_like(_rows_of_noise(model, config, sites), config.length)
    return None


def drawn_like(rows: Tensor, count: int) -> Tensor:
    """New rows whose every column is normal with the mean and the deviation of that column in `rows`."""
    mean, deviation = rows.mean(0), rows.std(0, correction=0)
    return mean + deviation * torch.randn(count, rows.shape[1]).to(rows)


def _fitted(rows: Tensor, count: int) -> Tensor:
    more = count - len(rows)
    return rows[:count] if more <= 0 else torch.cat([rows, drawn_like(rows, more)])


def _rows_of_noise(model: PreTrainedModel, config: KeyValueConfig, sites: list[Site]) -> Tensor:
    embedding = token_embedding(model) if model.main_input_name == "input_ids" else None
    if embedding is None:
        raise TargetError(
            f"{type(model).__name__}: init_weights='scaled' measures keys and values of random text, which it does not "
            "read; leave init_weights out",
            field="init_weights",
            found="scaled",
        )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(len(embedding.weight), (1, TOKENS), generator=generator)  # type: ignore[arg-type]
    first = -config.length if config.layout == "native" else 0
    return rows_of(capture(model, sites, ids.to(model.device), first), TOKENS)


def _trained(config: KeyValueConfig, sites: list[Site], others: dict[str, Prefix]) -> Tensor:
    """The rows of the prefix that `init_from` names, checked against the sites that are to read them."""
    source = str(config.init_from)
    if source in others:
        theirs: Any = others[source].config
        rows = others[source].encoder().detach()
    elif Path(source).is_dir():
        from deltatune.storage import folder

        saved = folder.read(source)
        theirs, rows = saved.config, saved.tensors.get(NAMES.get(getattr(saved.config, "layout", ""), ""))
    else:
        raise ConfigError(
            f"{type(config).__name__}: init_from={source!r} is neither a folder nor a prefix of this model, which has "
            f"{list(others)}",
            field="init_from",
            found=source,
            expected=list(others),
        )
    if rows is None:
        raise ConfigError(
            f"{type(config).__name__}: init_from={source!r} holds no keys and values, but {type(theirs).__name__}",
            field="init_from",
            found=source,
        )
    names, shapes = [site.name for site in sites], [list(site.shape) for site in sites]
    for what, found, wanted in (
        ("layout", theirs.layout, config.layout),
        ("sites", theirs.site_names or names, names),  # PEFT's files name none
        ("shapes", [list(shape) for shape in theirs.shapes], shapes),
    ):
        if found != wanted:
            raise MismatchError(
                f"{type(config).__name__}: init_from={source!r} has other {what} ({found}) than are asked for "
                f"({wanted}); choose the same sites and layout",
                field="init_from",
                found=found,
                expected=wanted,
            )
    return rows


def fillable(model: Any, adapter_name: str | None, num_virtual_tokens: int | None, caller: str) -> Prefix:
    """The prefix of a PeftModel that is meant (the active one where no name is given), if it can take rows."""
    prefix = named_prefix(model, adapter_name, caller)
    if num_virtual_tokens not in (None, prefix.config.num_virtual_tokens):
        raise ConfigError(
            f"num_virtual_tokens={num_virtual_tokens}, but the prefix {prefix.name!r} has "
            f"{prefix.config.num_virtual_tokens}; leave it out",
            field="num_virtual_tokens",
            found=num_virtual_tokens,
            expected=prefix.config.num_virtual_tokens,
        )
    if prefix.encoder.transform is not None:
        raise ConfigError(
            f"the prefix {prefix.name!r} has prefix_projection=True, whose MLP cannot start from keys and values; "
            "set prefix_projection=False",
            field="prefix_projection",
            found=True,
        )
    return prefix


def named_prefix(model: Any, adapter_name: str | None, caller: str) -> Prefix:
    """A prefix of a PeftModel by name; the active one where no name is given."""
    wanted = [adapter_name] if adapter_name is not None else [n for n in model.active_adapters if n in model.prefixes]
    if len(wanted) != 1 or wanted[0] not in model.prefixes:
        raise AdapterNameError(
            f"{caller}: adapter_name={adapter_name!r} names no single prefix; there are {list(model.prefixes)}",
            field="adapter_name",
            found=adapter_name,
            expected=list(model.prefixes),
        )
    return model.prefixes[wanted[0]]
