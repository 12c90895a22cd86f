"""A search among ranges of settings: optuna proposes (TPE), successive halving stops the losers of each generation.

    learning_rate: {low: 1.0e-5, high: 1.0e-2, log: true}      a number between two
    r: [4, 8, 16]                                              one of these

The winners of the generations are at the same step of their schedules; the best of them are the candidates that the
comparison trains to the end, under all seeds. What is proposed follows from `seed` and the losses: a search that was
broken off proposes the same again and finds what it had measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from deltatune.compare.halving import ROUNDS, Halved, Say, halve, keep_best
from deltatune.compare.leg import Leg
from deltatune.compare.plan import Candidate, Plan
from deltatune.errors import ConfigError
from deltatune.train.method import method_fields
from deltatune.train.settings import TrainSettings

GENERATION = 8  # candidates that are halved together
FINALISTS = 4
TEMPLATE = "candidate"  # the name of the choice among candidates, beside those of the settings

RunLeg = Callable[[Candidate, float], Leg | None]


def search(plan: Plan, run: RunLeg, say: Say) -> tuple[list[Candidate], Halved]:
    """The best candidates that were found, and all that were tried."""
    optuna = _optuna()
    sampler = optuna.samplers.TPESampler(seed=plan.shared.seed, n_startup_trials=GENERATION)
    study = optuna.create_study(direction="minimize", sampler=sampler)
    states = optuna.trial.TrialState
    tried: dict[str, Candidate] = {}
    whole = Halved([])
    left = plan.own.trials
    while left > 0:
        trials: dict[str, Any] = {}
        for _ in range(min(left, GENERATION)):
            left -= 1
            trial = study.ask()
            candidate = propose(plan, trial)
            if candidate.name in tried:  # of few choices some come again
                study.tell(trial, state=states.FAIL)
                continue
            tried[candidate.name], trials[candidate.name] = candidate, trial
        found = halve(list(trials), lambda name, share: run(tried[name], share), say, least=1)
        for name in list(found.alive):  # all winners are compared at the same step
            leg = run(tried[name], ROUNDS[-1])
            if leg is None:
                found.alive.remove(name)
                found.failed.append(name)
            else:
                found.last[name] = leg
        for name, trial in trials.items():
            _tell(study, states, trial, found, name)
        whole.alive += found.alive
        whole.failed += found.failed
        whole.losers |= found.losers
        whole.last |= found.last
        say(f"{plan.own.trials - left} of {plan.own.trials} tried; best so far: {_best(whole)}")
    keep_best(whole, FINALISTS, say)
    return [tried[name] for name in whole.alive], whole


def _tell(study: Any, states: Any, trial: Any, found: Halved, name: str) -> None:
    if name in found.failed:
        study.tell(trial, state=states.FAIL)
        return
    leg = found.last[name]
    trial.report(leg.loss, leg.step)
    if name in found.losers:
        study.tell(trial, state=states.PRUNED)
    else:
        study.tell(trial, leg.loss)


def _best(found: Halved) -> str:
    if not found.alive:
        return "none"
    name = min(found.alive, key=lambda one: found.last[one].loss)
    return f"{name}, loss {found.last[name].loss:.4g}"


def propose(plan: Plan, trial: Any) -> Candidate:
    """A candidate out of the ranges, with those of them that its method takes."""
    by_name = {candidate.name: candidate for candidate in plan.candidates}
    name = trial.suggest_categorical(TEMPLATE, list(by_name)) if len(by_name) > 1 else next(iter(by_name))
    template = by_name[name]
    mine = {key: _suggest(trial, key, space) for key, space in plan.own.search.items() if takes(template, key)}
    told = " ".join(f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in mine.items())
    return Candidate(f"{name} {told}".strip(), varied(template.settings, mine))


def takes(candidate: Candidate, key: str) -> bool:
    return key in TrainSettings.model_fields or key in method_fields(candidate.settings.method)


def varied(settings: TrainSettings, chosen: dict[str, Any]) -> TrainSettings:
    """The same settings but for these, which may be options of the method; checked as if they had been given."""
    own = {key: value for key, value in chosen.items() if key in TrainSettings.model_fields}
    options = {**settings.method_options, **{key: value for key, value in chosen.items() if key not in own}}
    return TrainSettings(**{**settings.model_dump(), **own, "method_options": options})


def _suggest(trial: Any, key: str, space: Any) -> Any:
    if isinstance(space, list):
        return trial.suggest_categorical(key, space)
    low, high, log = space["low"], space["high"], bool(space.get("log", False))
    if isinstance(low, int) and isinstance(high, int):
        return trial.suggest_int(key, low, high, log=log)
    found = trial.suggest_float(key, low, high, log=log)
    # few digits: what is shown is what was trained; more of a narrow range
    short = (float(f"{found:.{digits}g}") for digits in range(3, 7))
    return next((value for value in short if low <= value <= high), found)


def check_space(space: dict[str, Any], candidates: list[Candidate], shared: set[str]) -> None:
    """
    Raises:
        ConfigError: A range is none, or no candidate takes the setting, or it is the same for all; no optuna is here.
    """
    _optuna()
    for key, given in space.items():
        if key in shared:
            raise ConfigError(f"search: {key} must be the same for all", field="search", found=key)
        if not any(takes(candidate, key) for candidate in candidates):
            names = ", ".join(candidate.name for candidate in candidates)
            raise ConfigError(f"search: no candidate takes {key} (candidates: {names})", field="search", found=key)
        if not _is_range(given):
            raise ConfigError(
                f"search: {key}={given!r} is no range; expected a list of values, or low and high (and log: true), "
                "low below high, above 0 where log",
                field="search",
                found=given,
            )


def _is_range(given: Any) -> bool:
    if isinstance(given, list):
        return bool(given) and all(isinstance(value, (str, int, float, bool)) for value in given)
    if not isinstance(given, dict) or not {"low", "high"} <= given.keys() <= {"low", "high", "log"}:
        return False
    low, high = given["low"], given["high"]
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (low, high))
    log = given.get("log", False)
    return isinstance(log, bool) and numbers and math.isfinite(high - low) and low < high and (low > 0 or not log)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ConfigError(
            "search needs optuna, which is not installed; pip install 'deltatune[search]', or list candidates and "
            "learning_rates and set stop_losers: true",
            field="search",
            expected="optuna",
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
