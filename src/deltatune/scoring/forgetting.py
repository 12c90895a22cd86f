"""What a model lost of what it could before: its loss on text that has nothing to do with the task.

Decoders are given the text as it is. Encoder-decoders, which have no loss on plain text, are given its first half and
have to write the second: comparable between adapters of one base, not with anything else.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files

from deltatune.data.example import CAUSAL_TASKS, TEXT_TASKS
from deltatune.data.prepare import Corpus, Part, prepare
from deltatune.data.read import table_of
from deltatune.data.source import load_tables
from deltatune.errors import ConfigError
from deltatune.generate.load import Ready
from deltatune.scoring.rows import encoded, losses
from deltatune.scoring.sums import Score, loss_scores

BUILTIN = "builtin"


def neutral_text(place: str, task: str) -> Corpus:
    """The texts as rows. `place` is a file, or `builtin`."""
    _check_task(task)
    if place == BUILTIN:
        lines = files("deltatune.scoring").joinpath("neutral.txt").read_text("utf-8").splitlines()
        tables = [table_of([{"text": line} for line in lines if line.strip()], "built-in sentences")]
    else:
        tables, _, _ = load_tables(place, None, None, None, None, 0.0, 0)
    corpus = prepare(tables, None, None, "causal")
    if task == "seq2seq":
        corpus = replace(corpus, train=_halves(corpus.train))
    return corpus


def forgetting_score(corpus: Corpus, ready: Ready, batch_size: int) -> Score:
    """Loss per token, of the model as it stands."""
    task = "causal" if ready.task in CAUSAL_TASKS else ready.task
    plain = replace(ready, task=task, encoder=replace(ready.encoder, task=task, truncation=None))
    rows = encoded(replace(corpus, task=task), plain, tasks=False)
    return loss_scores(losses(rows, plain, batch_size).rows, perplexity=False)["loss"]


def _check_task(task: str) -> None:
    """Raises ConfigError for tasks whose models have no loss on text."""
    if task not in TEXT_TASKS:
        raise ConfigError(
            f"forgetting is the loss on neutral text, which models for {task} do not have; leave it out",
            field="forgetting",
            found=task,
            expected=list(TEXT_TASKS),
        )


def _halves(part: Part) -> Part:
    """Plain texts as pairs of halves; rows that are pairs already stay."""

    def halved(text: str) -> tuple[str, str]:
        words = text.split()
        middle = max(1, len(words) // 2)
        return " ".join(words[:middle]), " ".join(words[middle:])

    made = []
    for example in part.examples:
        if example.target is None:
            first, second = halved(example.text)
            if not second:
                continue
            example = replace(example, text=first, target=second)
        made.append(example)
    return replace(part, examples=made)
