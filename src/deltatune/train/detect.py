"""The task, where the settings name none: by the columns of the first rows, and by the class of the model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from deltatune.data.conversation import MESSAGES
from deltatune.data.formats import ANSWERS, LABELS, PAIRS
from deltatune.data.places import places
from deltatune.data.read import read_table
from deltatune.data.tagging import TAGS, WORDS
from deltatune.errors import PeftError
from deltatune.train.base import DEMO
from deltatune.train.settings import TrainSettings

FIRST = 20  # rows that are looked at


def detected(
    settings: TrainSettings, rows: Iterable[dict[str, Any]] | None = None, config: Any = None
) -> TrainSettings:
    """The settings with their task. What cannot be read here is refused where it is read in earnest.

    Args:
        rows: Rows in memory, which are read instead of files; only where they can be read twice.
        config: That of a model in memory.
    """
    if "task" in settings.model_fields_set:
        return settings
    present = _columns(settings, rows)
    told = settings.chat_template is not None
    task = _task(present, _decodes_only(settings, config), told) if present else settings.task
    return TrainSettings(**{**settings.model_dump(exclude_unset=True), "task": task})


def _task(present: set[str], decoder: bool, template: bool) -> str:
    if present & set(MESSAGES):
        return "chat"
    if present & set(WORDS) and present & set(TAGS):
        return "token_classification"
    if {"question", "context"} <= present and present & set(ANSWERS):
        return "question_answering"
    pairs = any(target in present and set(sources) <= present for sources, target in PAIRS)
    if "text" in present and present & set(LABELS) and not pairs:
        return "classification"
    if decoder and pairs and template:  # inputs and answers are turns where a template is to write them
        return "chat"
    return "causal" if decoder else "seq2seq"


def _columns(settings: TrainSettings, rows: Iterable[dict[str, Any]] | None) -> set[str]:
    found: Sequence[dict[str, Any]] = []
    if rows is not None:
        found = rows[:FIRST] if isinstance(rows, list) else []
    elif settings.train_file:
        given = settings.train_file
        try:
            place = places([given] if isinstance(given, str) else given)[0]
            found = read_table(place.path, [], FIRST).rows if place.path.is_file() else []
        except PeftError:
            pass
    back = {old: new for new, old in settings.column_mapping.items()}
    return {back.get(name, name) for row in found for name in row}


def _decodes_only(settings: TrainSettings, config: Any) -> bool:
    """Whether the model writes on where its input ends, as far as its config tells."""
    if config is None and settings.model_name_or_path != DEMO:
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(settings.model_name_or_path)
        except (OSError, ValueError):
            return False
    if config is None or getattr(config, "is_encoder_decoder", False):
        return False
    return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in getattr(config, "architectures", None) or ())
