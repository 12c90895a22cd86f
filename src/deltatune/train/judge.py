"""How good a model is at a step: loss over the evaluation rows, scores of its answers, samples to look at."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from deltatune.data.encode import Encoder
from deltatune.data.example import CAUSAL_TASKS, TEXT_TASKS, Example
from deltatune.data.passages import Passage
from deltatune.data.prepare import Corpus, Part
from deltatune.data.tagging import Tagged
from deltatune.errors import TrainError
from deltatune.evaluate import Loss, Question, answer, bleu, dataset_loss, exact_match, read, rouge_l, shown
from deltatune.evaluate.loss import joined
from deltatune.train import randomness
from deltatune.train.base import autocast
from deltatune.train.events import Listener
from deltatune.train.processes import gathered
from deltatune.train.scores import row_scores
from deltatune.train.settings import TrainSettings


class StopAsked(Exception):
    """Raised inside an evaluation when a signal has come: the loop saves and ends."""


@dataclass
class Judge:
    """Evaluates one part of a corpus. It leaves the random states, and so the training, exactly as they were."""

    settings: TrainSettings
    corpus: Corpus
    tokenizer: Any
    accelerator: Any
    listener: Listener
    stop: Callable[[], bool] = lambda: False

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def loss(self, model: nn.Module, part: Part) -> dict[str, float]:
        """`loss`, and the perplexity of text, or the scores of what was predicted for each row."""
        size = self.settings.per_device_eval_batch_size
        order = sorted(range(len(part.features)), key=lambda i: part.features[i].length)
        rows = [part.features[i] for i in order]
        batches = [rows[i : i + size] for i in range(0, len(rows), size)]
        processes, index = self.accelerator.num_processes, self.accelerator.process_index
        mine, most = batches[index::processes], -(-len(batches) // processes)
        self.listener.on_stage("evaluate", most)
        with randomness.untouched(), autocast(self.settings, self.device):
            found = self._over(model, mine)
            if len(mine) < most:
                self._over(model, batches[:1])  # processes go through the model together; this counts nothing
        if processes > 1:
            found = joined(gathered(self.accelerator, found))
            order = [
                i
                for process in range(processes)
                for start in range(process * size, len(rows), processes * size)
                for i in order[start : start + size]
            ]
        if not math.isfinite(found.mean):
            raise TrainError(
                f"the loss over {part.source} is {found.mean}; look for broken weights of the base, or a learning_rate "
                "that is too high",
                path=part.source,
                found=found.mean,
            )
        if self.settings.task in TEXT_TASKS:
            return {"loss": found.mean, "perplexity": math.exp(min(found.mean, 700.0))}
        assert self.corpus.encoder is not None
        predicted = dict(zip(order, found.predicted))
        scores = row_scores(part, [predicted[i] for i in range(len(rows))], self.corpus.encoder)
        return {"loss": found.mean, **scores}

    def _over(self, model: nn.Module, batches: list[list[Any]]) -> Loss:
        collate = self.corpus.collator
        assert collate is not None
        made = (collate(rows) for rows in batches)
        return dataset_loss(model, made, self.settings.task, self.device, self._done)

    def questions(self, part: Part, count: int) -> list[Question]:
        """`count` different inputs, evenly spread over the rows, each with all its references."""
        assert self.corpus.encoder is not None
        if self.corpus.columns.form == "text":
            return [_continuation(self.corpus.encoder, e.text) for e in _spread(part.examples, count)]
        answers: dict[tuple[str, int | None], list[Example]] = {}
        for example in part.examples:
            answers.setdefault((example.text, example.task_id), []).append(example)
        prompt = self.corpus.encoder.prompt
        made = []
        for (text, task_id), same in _spread(list(answers.items()), count):
            references = tuple(reference for example in same for reference in self._references(example))
            made.append(Question(text, prompt(same[0]), references, task_id))
        return made

    def answers(self, model: nn.Module, questions: list[Question]) -> list[str]:
        if not questions:
            return []
        assert self.corpus.encoder is not None
        self.listener.on_stage("samples", len(questions))
        with randomness.untouched(), autocast(self.settings, self.device):
            if self.settings.task == "classification":
                return self._classes(model, questions)
            task_ids = self._task_ids(questions)
            if self.settings.task not in TEXT_TASKS:
                return read(
                    model,
                    self.corpus.encoder,
                    [question.text for question in questions],
                    task_ids=task_ids,
                    batch_size=self.settings.per_device_eval_batch_size,
                    device=self.device,
                    after_batch=self._done,
                )
            return answer(
                model,
                self.tokenizer,
                [question.prompt for question in questions],
                causal=self.settings.task in CAUSAL_TASKS,
                task_ids=task_ids,
                max_new_tokens=self.corpus.encoder.answer_length,
                max_length=self.corpus.encoder.max_length,
                num_beams=self.settings.num_beams,
                batch_size=self.settings.per_device_eval_batch_size,
                device=self.device,
                after_batch=self._done,
            )

    def written(self, model: nn.Module, part: Part) -> dict[str, float]:
        """Scores of what the model writes for `num_scored` inputs, the same ones every time."""
        questions = self.questions(part, self.settings.num_scored)
        return self.text_scores(self.answers(model, questions), questions)

    def text_scores(self, answers: list[str], questions: list[Question]) -> dict[str, float]:
        """Scores of generated answers; nothing for other tasks (scored over all rows) and for plain text."""
        if not answers or self.settings.task not in TEXT_TASKS or self.corpus.columns.form == "text":
            return {}
        references = [question.references for question in questions]
        return {
            "bleu": bleu(answers, references),
            "rouge_l": rouge_l(answers, references),
            "exact_match": exact_match(answers, references),
        }

    def _classes(self, model: nn.Module, questions: list[Question]) -> list[str]:
        assert self.corpus.collator is not None and self.corpus.labels is not None
        was_training = model.training
        model.eval()
        inputs = self.corpus.collator.inputs([question.prompt for question in questions])
        task_ids = self._task_ids(questions)
        if task_ids is not None:
            inputs["task_ids"] = torch.tensor(task_ids)
        with torch.no_grad():
            logits = model(**{name: tensor.to(self.device) for name, tensor in inputs.items()}).logits
        model.train(was_training)
        return [self.corpus.labels.names[i] for i in logits.argmax(-1).tolist()]

    def _task_ids(self, questions: list[Question]) -> list[int] | None:
        assert self.corpus.collator is not None
        ids = [question.task_id for question in questions if question.task_id is not None]
        return ids if ids and self.corpus.collator.task_ids else None

    def _references(self, example: Example) -> list[str]:
        """Every answer that is right, as people read it."""
        if isinstance(example, Tagged):
            return [shown(example.words, example.tags)]
        if isinstance(example, Passage):
            return list(dict.fromkeys(span.text for span in example.answers))
        target, labels = example.target or "", self.corpus.labels
        return [target if labels is None or target not in labels.keys else labels.names[labels.keys.index(target)]]

    def _done(self, count: int) -> None:
        self.listener.on_stage_progress(count)
        if self.stop():
            raise StopAsked


def _spread(rows: list[Any], count: int) -> list[Any]:
    if count >= len(rows):
        return rows
    return [rows[i * len(rows) // count] for i in range(count)]


def _continuation(encoder: Encoder, text: str) -> Question:
    """Plain text: its first words are the prompt, the rest is what really followed."""
    words = text.split()
    cut = max(1, min(12, len(words) // 3))
    start = " ".join(words[:cut])
    prompt = [*encoder.tokenizer(start)["input_ids"]]
    if len(prompt) > 1 and prompt[-1] == encoder.tokenizer.eos_token_id:
        prompt.pop()
    return Question(start, prompt, (" ".join(words[cut:]),))
