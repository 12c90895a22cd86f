"""Whether a model ends in the head that a config's task is about; transformers' tables say which class has which."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from deltatune.config import TaskType
from deltatune.notice import warn

_TABLES = {
    TaskType.SEQ_CLS: ("SEQUENCE_CLASSIFICATION", "AutoModelForSequenceClassification"),
    TaskType.TOKEN_CLS: ("TOKEN_CLASSIFICATION", "AutoModelForTokenClassification"),
    TaskType.QUESTION_ANS: ("QUESTION_ANSWERING", "AutoModelForQuestionAnswering"),
    TaskType.CAUSAL_LM: ("CAUSAL_LM", "AutoModelForCausalLM"),
    TaskType.SEQ_2_SEQ_LM: ("SEQ_TO_SEQ_CAUSAL_LM", "AutoModelForSeq2SeqLM"),
}
_NEW = {TaskType.SEQ_CLS, TaskType.TOKEN_CLS, TaskType.QUESTION_ANS}  # heads that begin at random, so they must train


def warn_other_head(model: nn.Module, task: Any) -> None:
    """Say that the task's head is not there, as PEFT does not: what was to be trained beside the adapter is missing.

    A warning and no error, because such models train and programs rely on it. Between generating tasks there is no
    head to miss, and of classes that transformers does not list nothing is known.
    """
    if task not in _TABLES or (there := _heads(model)) == set() or task in there:
        return
    if task in _NEW or there & _NEW:
        name, heads = type(model).__name__, " or ".join(sorted(str(head.value) for head in there))
        warn(
            f"task_type={str(TaskType(task).value)!r}, and {name} has the head of {heads}: no head of the task is "
            f"trained or saved; load the base with {_TABLES[task][1]}, or give the model's own task_type"
        )


def _heads(model: nn.Module) -> set[TaskType]:
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None or not isinstance(model, modeling.PreTrainedModel):
        return set()
    from transformers.models.auto import modeling_auto

    name = type(model).__name__
    return {
        task
        for task, (table, _) in _TABLES.items()
        for listed in getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES").values()
        if name == listed or (isinstance(listed, tuple) and name in listed)
    }
