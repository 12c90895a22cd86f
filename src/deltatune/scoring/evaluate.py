"""`evaluate_adapters`: every adapter on one frozen base, on the same rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

from deltatune.data.example import TEXT_TASKS
from deltatune.data.labels import Labels
from deltatune.data.prepare import Corpus
from deltatune.data.source import Source
from deltatune.errors import DataError
from deltatune.generate.load import LABELLED
from deltatune.generate.several import BASE, Several, load_several, plan_several
from deltatune.scoring.bootstrap import DRAWS, LEVEL, Draws, Interval
from deltatune.scoring.forgetting import forgetting_score, neutral_text
from deltatune.scoring.harness import check_harness, run_harness
from deltatune.scoring.result import Comparison, Evaluated, Sample
from deltatune.scoring.rows import read, run_settings
from deltatune.scoring.scores import Asked, Seen, seen
from deltatune.scoring.sums import Score
from deltatune.train import randomness
from deltatune.train.events import Listener


def evaluate_adapters(
    adapters: Sequence[str],
    data: Source | None = None,
    *,
    model: str | None = None,
    task: str | None = None,
    base: bool = True,
    columns: Mapping[str, str] | None = None,
    separator: str | None = None,
    limit: int | None = None,
    answers: bool = True,
    max_new_tokens: int | None = None,
    num_beams: int = 1,
    batch_size: int = 16,
    num_samples: int = 2,
    draws: int = DRAWS,
    seed: int = 42,
    forgetting: str | None = None,
    lm_eval: Sequence[str] = (),
    lm_eval_limit: int | None = None,
    lm_eval_include: str | None = None,
    listener: Listener | None = None,
) -> Comparison:
    """The base and adapters side by side; the base is loaded once.

    Args:
        adapters: Folders or repositories, also as NAME=FOLDER. They share task, classes and base.
        data: Rows as `train` takes them; by default what the first adapter's run was tested or evaluated on. Without
            any, there has to be `forgetting` or `lm_eval`.
        task: What the base is asked to do, where there is no adapter to say it.
        base: Whether the base itself is asked too; without it there are no differences.
        answers: Whether answers are written and scored, where the task is one of text.
        forgetting: A file of neutral text, or `builtin` (`deltatune.scoring.forgetting`).
        lm_eval: Tasks of lm-evaluation-harness; `lm_eval_include` is a folder with further ones.

    Raises:
        ConfigError: The adapters do not belong together, or the task has no such scores.
        DataError: There is no data, or a row of it is not as it should be.
    """
    told = run_settings(adapters[0].rpartition("=")[2]) if adapters else {}
    source = data if data is not None else told.get("test_file") or told.get("eval_file")
    if source is None and forgetting is None and not lm_eval:
        raise DataError(
            "no data: name a file with --data; the run of the first adapter was neither tested nor evaluated on one",
            field="data",
        )
    listener = listener or Listener()
    plan = plan_several(adapters, model, separator, task)
    if lm_eval:
        check_harness(plan.task)
    neutral = None if forgetting is None else neutral_text(forgetting, plan.task)

    def rows(labels: Labels | None) -> Corpus | None:
        classes = None if labels is None else labels.names
        return None if source is None else read(source, plan.task, classes, told, columns or {}, limit)

    early = plan.labels is not None or plan.task not in LABELLED
    corpus = rows(plan.labels) if early else None  # a faulty row ends it before the base is loaded
    listener.on_stage("model")
    randomness.seed_all(seed)  # a head that the base's files lack is drawn
    several = load_several(plan)
    names = [*([BASE] if base or not adapters else []), *several.adapters]
    corpus = corpus if early else rows(several.ready(BASE).labels)
    asked = Asked(answers, batch_size, num_beams, max_new_tokens)
    found = {} if corpus is None else _on_data(several, names, corpus, asked, listener)
    neutral_scores = {} if neutral is None else _on_neutral(several, names, neutral, batch_size, listener)
    models = _with_intervals(several, names, found, neutral_scores, draws, seed)
    for one in models if lm_eval else ():
        listener.on_stage("lm-eval")
        with several.using(one.name) as ready:
            one.harness.update(run_harness(ready, lm_eval, batch_size, lm_eval_limit, lm_eval_include))
    first = next(iter(found.values()), None)
    loss = None if first is None else first.scores["loss"]
    return Comparison(
        task=several.task,
        source=source if isinstance(source, str) else None if source is None else "rows in memory",
        rows=0 if loss is None else len(loss.rows),
        inputs=0 if first is None else len(first.answers),
        level=LEVEL,
        models=models,
        samples=_samples(found, num_samples),
        neutral=None if neutral is None else f"{neutral.train.source}, {len(neutral.train.examples)} rows",
        rising=() if first is None else tuple(name for name, score in first.scores.items() if score.rising),
        notes=_notes(several, base),
    )


def _on_data(
    several: Several,
    names: Sequence[str],
    corpus: Corpus,
    asked: Asked,
    listener: Listener,
) -> dict[str, Seen]:
    found: dict[str, Seen] = {}
    for name in names:
        listener.on_notice(name)
        with several.using(name) as ready:
            found[name] = seen(corpus, ready, asked, listener, tasks=name != BASE)
    return found


def _on_neutral(
    several: Several, names: Sequence[str], corpus: Corpus, batch_size: int, listener: Listener
) -> dict[str, Score]:
    listener.on_stage("forgetting", len(names))
    scores: dict[str, Score] = {}
    for done, name in enumerate(names, 1):
        with several.using(name) as ready:
            scores[name] = forgetting_score(corpus, ready, batch_size)
        listener.on_stage_progress(done)
    return scores


def _with_intervals(
    several: Several,
    names: Sequence[str],
    found: Mapping[str, Seen],
    neutral: Mapping[str, Score],
    draws: int,
    seed: int,
) -> list[Evaluated]:
    of_rows = cache(lambda rows: Draws(rows, draws, seed))

    def of(score: Score) -> Draws:
        return of_rows(len(score.rows))

    def compared(name: str, scores: Mapping[str, Score], base: Mapping[str, Score] | None) -> dict[str, Interval]:
        if name == BASE or base is None:
            return {}
        # tokenizers may differ, and with them how many rows are kept: then rows cannot be paired
        pairs = [(key, score, base[key]) for key, score in scores.items() if len(base[key].rows) == len(score.rows)]
        return {key: of(score).difference(score, other) for key, score, other in pairs}

    result = []
    for name in names:
        scores = found[name].scores if name in found else {}
        text = {"loss": neutral[name]} if name in neutral else {}
        before = {"loss": neutral[BASE]} if BASE in neutral else None
        result.append(
            Evaluated(
                name,
                several.folders.get(name),
                {key: of(score).interval(score) for key, score in scores.items()},
                compared(name, scores, found[BASE].scores if BASE in found else None),
                next((of(score).interval(score) for score in text.values()), None),
                compared(name, text, before).get("loss"),
            )
        )
    return result


def _samples(found: Mapping[str, Seen], count: int) -> list[Sample]:
    first = next(iter(found.values()), None)
    if first is None or not first.answers:
        return []
    total = len(first.answers)
    places = [i * total // min(count, total) for i in range(min(count, total))]
    return [
        Sample(first.inputs[i], first.references[i], {name: one.answers[i] for name, one in found.items()})
        for i in places
    ]


def _notes(several: Several, base: bool) -> tuple[str, ...]:
    if base and several.adapters and several.task not in TEXT_TASKS:
        return ("the base has the head of its own files; where they lack one, a random head",)
    return ()
