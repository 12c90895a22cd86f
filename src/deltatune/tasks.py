"""The six task classes: which heads they train, what they read; and `get_peft_model`, which picks one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from deltatune import checks
from deltatune.config import A_CONFIG, PeftConfig, TaskType
from deltatune.heads import warn_other_head
from deltatune.model import PeftModel
from deltatune.notice import warn
from deltatune.peer.mixed import PeftMixedModel

Task = TypeVar("Task", bound=type[PeftModel])

_TEXT = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")


def _reading(*columns: str) -> Callable[[Task], Task]:
    """Name the columns in the signature of `forward`: transformers' Trainer drops all others of a data set."""

    def named(task: Task) -> Task:
        def forward(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
            return PeftModel.forward(self, *args, **kwargs)

        own = inspect.signature(PeftModel.forward)
        first, rest, *further = own.parameters.values()
        read = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in columns]
        forward.__signature__ = own.replace(parameters=[first, rest, *read, *further])  # type: ignore[attr-defined]
        forward.__doc__ = PeftModel.forward.__doc__
        task.forward = forward  # pyright: ignore[reportAttributeAccessIssue]
        return task

    return named


@_reading(*_TEXT, "labels")
class PeftModelForSequenceClassification(PeftModel):
    heads = ("classifier", "score", "classification_head")


@_reading(*_TEXT, "labels")
class PeftModelForTokenClassification(PeftModel):
    heads = ("classifier", "score")


@_reading(*_TEXT, "start_positions", "end_positions")
class PeftModelForQuestionAnswering(PeftModel):
    heads = ("qa_outputs",)


@_reading(*_TEXT, "labels")
class PeftModelForCausalLM(PeftModel):
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model.model.prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[operator]


@_reading(*_TEXT, "decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds", "labels")
class PeftModelForSeq2SeqLM(PeftModel):
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model.model.prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[operator]


@_reading(*_TEXT)
class PeftModelForFeatureExtraction(PeftModel):
    pass


MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[Any, type[PeftModel]] = {
    TaskType.SEQ_CLS: PeftModelForSequenceClassification,
    TaskType.SEQ_2_SEQ_LM: PeftModelForSeq2SeqLM,
    TaskType.CAUSAL_LM: PeftModelForCausalLM,
    TaskType.TOKEN_CLS: PeftModelForTokenClassification,
    TaskType.QUESTION_ANS: PeftModelForQuestionAnswering,
    TaskType.FEATURE_EXTRACTION: PeftModelForFeatureExtraction,
}


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Freeze a model and graft a small trainable part onto it, in place.

    Args:
        model: Any `nn.Module`; methods that act on attention or inputs need a transformers model.
        peft_config: Which method, where, how large. It is filled in with what the model tells (targets, sizes).
        mixed: Return a `PeftMixedModel`, whatever the task. Any model can have adapters of different methods.

    Raises:
        PeftError: The config does not fit the model, which is left as it was.
    """
    checks.instance("model", model, nn.Module, "the base model, a torch module")
    checks.instance("peft_config", peft_config, PeftConfig, A_CONFIG)
    if "_orig_mod" in model._modules:
        warn(
            "get_peft_model: the model is compiled already, and files of its adapters would name its layers "
            "'_orig_mod...', which no plain base has; graft first, and compile what comes back"
        )
    if revision is not None:
        peft_config.revision = revision
    kind = PeftMixedModel if mixed else MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(peft_config.task_type, PeftModel)
    made = kind(model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
    warn_other_head(model, peft_config.task_type)
    return made
