"""What is compared: candidates, each a whole run's settings, over the same seeds and rows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deltatune.compare.scores import choose_metric
from deltatune.data.example import TEXT_TASKS
from deltatune.errors import ConfigError
from deltatune.train.aliases import canonical
from deltatune.train.detect import detected
from deltatune.train.method import method_fields, normal_method
from deltatune.train.quantised import check_quantised
from deltatune.train.settings import TrainSettings

SEEDS = 3
HELD_OUT = 0.2  # of the training rows, where no others are given to score on
# one adapter per cell is all that is left of it; what a run would show or keep beside it costs time
QUIET = {"eval_before": False, "num_samples": 0, "num_scored": 0, "save_steps": 0, "eval_steps": 0, "report_to": []}
# said for all candidates or decided by the comparison itself
_SHARED = {"output_dir", "overwrite_output_dir", "resume_from_checkpoint", "seed", "split_seed", "model_name_or_path",
           "task", "train_file", "eval_file", "test_file", "dataset", "dataset_config", "eval_split", "data_weights",
           "max_train_samples", "max_eval_samples", *QUIET}  # fmt: skip


class CompareSettings(BaseModel):
    """What a comparison is told beside the settings of its runs."""

    model_config = ConfigDict(extra="forbid")

    candidates: list[str | dict[str, Any]] = Field(
        default_factory=list, description="methods, or settings of one candidate each: name, method, learning_rate, r"
    )
    seeds: int | list[int] = Field(SEEDS, description="how many, counted up from seed; or the seeds themselves")
    metric: Literal["auto", "loss", "accuracy", "f1", "exact_match", "rouge_l"] = "auto"
    forget_file: str | None = Field(None, description="rows of something else: how much worse does the base get on it?")
    one_pass: Literal["auto", "always", "never"] = "auto"
    learning_rates: list[float] = Field(default_factory=list, description="each candidate is tried with each of them")
    stop_losers: bool = Field(False, description="train a part of the steps, stop the worse half, and again")
    search: dict[str, Any] = Field(
        default_factory=dict, description="ranges of settings to search with optuna: {low, high, log} or a list"
    )
    trials: int = Field(16, ge=2, description="how many candidates a search proposes")

    def __init__(self, **values: Any) -> None:
        for name in ("candidates", "learning_rates"):
            if isinstance(values.get(name), str):
                values[name] = [part.strip() for part in values[name].split(",") if part.strip()]
            elif isinstance(values.get(name), (int, float)):
                values[name] = [values[name]]
        try:
            super().__init__(**values)
        except ValidationError as error:
            fault = error.errors()[0]
            field = str(fault["loc"][0])
            raise ConfigError(
                f"{field}={fault['input']!r} is not allowed: {fault['msg']}", field=field, found=fault["input"]
            ) from None


@dataclass(frozen=True)
class Candidate:
    """One way to train. Seed and folder of `settings` are filled in for each run."""

    name: str
    settings: TrainSettings


@dataclass(frozen=True)
class Plan:
    """A comparison that has been checked, all but its rows."""

    candidates: list[Candidate]
    seeds: list[int]
    metric: str
    own: CompareSettings
    output: Path
    notices: list[str]

    @property
    def shared(self) -> TrainSettings:
        """Settings that say where rows and base come from; the same for all candidates."""
        return self.candidates[0].settings


def make_plan(own: CompareSettings, values: dict[str, Any]) -> Plan:
    """The candidates with all settings filled in.

    Args:
        values: Settings that all runs share, by the names of `TrainSettings`. Options of methods among them go to the
            candidates whose method takes them.

    Raises:
        ConfigError: A setting or method is unknown, or a candidate is there twice.
    """
    values, notices = canonical(values, set(TrainSettings.model_fields)), []
    given = own.candidates or ([values["method"]] if "method" in values else [])
    values.pop("method", None)
    early = own.stop_losers or bool(own.search)
    if "eval_file" not in values and not values.get("eval_split") and (early or "test_file" not in values):
        values["eval_split"] = HELD_OUT
        what = "judge losers by" if "test_file" in values else "score on"
        notices.append(f"{HELD_OUT:.0%} of the training rows are held out to {what} (eval_split, or an eval_file)")
    values.setdefault("split_seed", values.get("seed", TrainSettings.model_fields["seed"].default))
    candidates = [one for item in given for one in _candidates(item, values, own.learning_rates)]
    _check_options(given, values)
    _check_different(candidates)
    if early:
        _check_early(own, candidates)
    if len(candidates) < (1 if own.search else 2):
        raise ConfigError(
            f"{len(candidates)} candidate{'' if candidates else 's'} cannot be compared; give two or more, "
            "such as --methods lora,prefix_tuning",
            field="candidates",
            found=[candidate.name for candidate in candidates],
        )
    shared = candidates[0].settings
    if own.forget_file is not None and shared.task not in TEXT_TASKS:
        raise ConfigError(
            f"forget_file={own.forget_file!r} is for tasks with text; a base has no {shared.task} to forget",
            field="forget_file",
            found=own.forget_file,
        )
    metric = choose_metric(shared.task, own.metric)
    if own.search:
        from deltatune.compare.search import check_space

        check_space(own.search, candidates, _SHARED)
    return Plan(candidates, _seeds(own.seeds, shared.seed), metric, own, Path(shared.output_dir), notices)


def _candidates(item: str | dict[str, Any], values: dict[str, Any], rates: list[float]) -> list[Candidate]:
    given = {"method": item} if isinstance(item, str) else dict(item)
    name = given.pop("name", None)
    given = canonical(given, set(TrainSettings.model_fields))
    if "method" not in given:
        raise ConfigError(f"candidate {item!r} names no method; expected method: lora, say", field="candidates")
    method = given["method"] = normal_method(given["method"])
    if taken := sorted(_SHARED & given.keys()):
        raise ConfigError(
            f"candidate {name or method}: {', '.join(taken)} must be the same for all; set it beside the candidates",
            field=taken[0],
            found=given[taken[0]],
        )
    own = set(TrainSettings.model_fields)
    common = {key: value for key, value in values.items() if key in own or key in method_fields(method)}
    options = common.pop("method_options", None) or {}
    common |= {key: value for key, value in options.items() if key in method_fields(method)}
    made = []
    for rate in rates or [None]:
        whole = {**QUIET, **common, **given, **({} if rate is None else {"learning_rate": rate})}
        label = str(name or _label(given)) + ("" if rate is None else f" lr={rate:g}")
        candidate = detected(TrainSettings(**whole))
        check_quantised(candidate)
        made.append(Candidate(label, candidate))
    return made


def _label(given: dict[str, Any]) -> str:
    """A name that says what was asked for: `lora r=16`."""
    words = [f"{key}={value}" for key, value in given.items() if key not in ("method", "method_options")]
    words += [f"{key}={value}" for key, value in (given.get("method_options") or {}).items()]
    return " ".join([given["method"], *words])


def _check_options(given: list[str | dict[str, Any]], values: dict[str, Any]) -> None:
    """Options said for all that no candidate takes."""
    methods = [normal_method(item if isinstance(item, str) else item["method"]) for item in given]
    known = set(TrainSettings.model_fields).union(*(method_fields(method) for method in methods))
    unknown = {*values, *(values.get("method_options") or {})} - known
    if unknown and methods:
        # says what was meant, and which methods would take it
        TrainSettings(method=methods[0], **{name: values.get(name) for name in sorted(unknown)})


def _check_early(own: CompareSettings, candidates: list[Candidate]) -> None:
    """What cannot be stopped on the way."""
    for name, settings in ((candidate.name, candidate.settings) for candidate in candidates):
        if settings.load_best_model_at_end or settings.early_stopping_patience is not None:
            raise ConfigError(
                f"candidate {name}: load_best_model_at_end and early_stopping_patience choose by evaluations of their "
                "own; drop them, or stop_losers and search",
                field="stop_losers",
                found=name,
            )
    if own.one_pass == "always":
        raise ConfigError(
            "one_pass='always' trains all candidates to the end; with stop_losers or search leave it at auto",
            field="one_pass",
            found=own.one_pass,
            expected="auto",
        )


def _check_different(candidates: list[Candidate]) -> None:
    names: dict[str, Candidate] = {}
    settings: dict[str, str] = {}
    for candidate in candidates:
        told = json.dumps(candidate.settings.resolved(), sort_keys=True)
        same = candidate.name if candidate.name in names else settings.get(told)
        if same is not None:
            what = "the same settings" if told in settings else "another candidate with its name"
            raise ConfigError(
                f"candidate {candidate.name!r} is there twice: {same!r} has {what}; drop one, or give it a name",
                field="candidates",
                found=candidate.name,
            )
        names[candidate.name], settings[told] = candidate, candidate.name


def _seeds(given: int | list[int], first: int) -> list[int]:
    seeds = list(range(first, first + given)) if isinstance(given, int) else given
    if not seeds or len(set(seeds)) < len(seeds) or not all(0 <= seed < 2**32 for seed in seeds):
        raise ConfigError(
            f"seeds={given!r} is not allowed, expected a number of 1 or more, or different seeds", field="seeds",
            found=given,
        )  # fmt: skip
    return seeds
