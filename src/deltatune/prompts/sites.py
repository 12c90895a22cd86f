"""Which attentions of a model get a prefix: what a config asks for, among what the probe found."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltatune import bounded
from deltatune.errors import TargetError
from deltatune.notice import warn
from deltatune.prompts.config import SITE_KINDS
from deltatune.prompts.probe import Site as Site
from deltatune.prompts.probe import Survey, Unreached
from deltatune.prompts.probe import survey as survey
from deltatune.prompts.probe import undisturbed as undisturbed
from deltatune.suggest import did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def choose_sites(model: PreTrainedModel, wanted: str | list[str]) -> list[Site]:
    """The sites that a config asks for; TargetError, naming the model, where none of them can get a prefix.

    Where a kind of site is asked for and only a part of it can be reached, a warning says what is left out.
    """
    found = survey(model)
    title = f"{type(model).__name__} ({getattr(model.config, 'model_type', '?')!r})"
    if not found.sites and not found.unreached:
        raise TargetError(
            f"{title} has no attention, so there is nothing that a prefix could be put before; use LoRA",
            field="model",
            found=title,
            expected="a model with attention",
            hint="use LoRA",
        )
    chosen = [site for site in found.sites if _is_wanted(site.name, site.kind, wanted, model)]
    missed = [each for each in found.unreached if _is_wanted(each.name, each.kind, wanted, model)]
    _check_named(title, found, wanted, chosen, missed, model)
    if missed and not chosen:
        raise TargetError(
            f"{title}: {_described(missed)} attention in a way that a prefix cannot be added to; use LoRA"
            + (f", or choose among sites like {found.sites[0].name!r}" if found.sites else ""),
            field="sites",
            found=wanted,
        )
    if missed:
        warn(
            f"{title}: {_described(missed)} attention in a way that a prefix cannot be added to; the prefix acts on "
            f"the rest, at {len(chosen)} sites (deltatune inspect lists both)"
        )
    return chosen


def _check_named(
    title: str,
    found: Survey,
    wanted: str | list[str],
    chosen: list[Site],
    missed: list[Unreached],
    model: PreTrainedModel,
) -> None:
    """Whoever names sites gets all of them, or an error."""
    names = [site.name for site in found.sites]
    if not chosen and not missed:
        near = did_you_mean(wanted, [*SITE_KINDS, *names]) if isinstance(wanted, str) else ""
        raise TargetError(
            f"{title}: sites={wanted!r} matches none of its attentions, which are named like {names[:3]}"
            f"{'' if wanted in SITE_KINDS else near}",
            field="sites",
            found=wanted,
            expected=names,
        )
    patterns = [wanted] if isinstance(wanted, str) else wanted
    by_name = [pattern for pattern in patterns if pattern not in SITE_KINDS]
    beyond = [
        each
        for each in missed
        if any(_is_wanted(each.name, each.kind, p if isinstance(wanted, str) else [p], model) for p in by_name)
    ]
    if beyond:
        raise TargetError(
            f"{title}: {_described(beyond)} attention in a way that a prefix cannot be added to; "
            + (f"choose among sites like {names[0]!r}, or use LoRA" if names else "use LoRA"),
            field="sites",
            found=wanted,
            expected=names,
        )
    for name in wanted if isinstance(wanted, list) else ():
        if not any(_is_wanted(site.name, site.kind, [name], model) for site in chosen):
            raise TargetError(
                f"{title}: sites names {name!r}, which is none of its attentions{did_you_mean(name, names)}",
                field="sites",
                found=name,
                expected=names,
            )


def _described(missed: list[Unreached]) -> str:
    first = missed[0]
    more = f" (and {len(missed) - 1} more)" if len(missed) > 1 else ""
    return f"{first.class_name} at {first.name!r}{more} computes {'a part of its' if first.partly else 'its'}"


def _is_wanted(name: str, kind: str, wanted: str | list[str], model: PreTrainedModel) -> bool:
    if isinstance(wanted, list):
        return any(
            _is_wanted(name, kind, part, model) if part in SITE_KINDS else name == part or name.endswith(f".{part}")
            for part in wanted
        )
    if wanted == "all":
        return True
    if wanted in ("default", "self"):
        return kind == "self"
    if wanted == "encoder":
        return kind == "encoder" or (kind == "self" and not getattr(model.config, "is_encoder_decoder", False))
    return kind == wanted if wanted == "cross" else bounded.fullmatch(wanted, name)
