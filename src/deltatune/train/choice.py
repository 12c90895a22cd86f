"""Which score says what the best evaluation of a run was: the best checkpoint and early stopping go by it."""

from __future__ import annotations

from deltatune.data.example import TEXT_TASKS
from deltatune.errors import ConfigError
from deltatune.train.settings import METRICS_OF_ANSWERS, TrainSettings

LOWER_IS_BETTER = ("loss", "perplexity")


def better(metric: str, score: float, best: float | None) -> bool:
    return best is None or (score < best if metric in LOWER_IS_BETTER else score > best)


def check_choice(settings: TrainSettings, evaluated: bool, form: str) -> None:
    """Refuse, before the model is loaded, a run that could never choose.

    Args:
        evaluated: Whether there are rows to evaluate on.
        form: Of the rows; plain text ("text") has no answers to compare with.

    Raises:
        ConfigError: No evaluation rows, or none of those has what the score compares.
    """
    chooses = settings.metric_for_best_model != "loss"
    if not chooses and not settings.predict_with_generate:
        return
    field = "metric_for_best_model" if chooses else "predict_with_generate"
    found = getattr(settings, field)
    if not evaluated:
        raise ConfigError(
            f"{field}={found!r} needs rows to evaluate on; give eval_file, or eval_split: 0.1", field=field, found=found
        )
    if form == "text" and (settings.predict_with_generate or settings.metric_for_best_model in METRICS_OF_ANSWERS):
        raise ConfigError(
            f"{field}={found!r} needs rows with an input and an answer; these are plain text, which has a loss only",
            field=field,
            found=found,
        )


def refuse_missing(metric: str, scores: dict[str, float]) -> None:
    """
    Raises:
        ConfigError: The evaluation has no such score (entity scores of tags that are not BIO, for one).
    """
    if metric not in scores:
        raise ConfigError(
            f"metric_for_best_model={metric!r} is no score of this evaluation; there are {', '.join(scores)}",
            field="metric_for_best_model",
            found=metric,
            expected=list(scores),
        )


def answers_wanted(settings: TrainSettings) -> bool:
    """Whether every evaluation lets the model answer."""
    return settings.predict_with_generate and settings.task in TEXT_TASKS
