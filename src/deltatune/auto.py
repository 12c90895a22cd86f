"""`AutoPeftModelFor...`: base model and adapter from the adapter's folder alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from deltatune.config import PeftConfig, TaskType
from deltatune.errors import ConfigError
from deltatune.model import PeftModel
from deltatune.tasks import MODEL_TYPE_TO_PEFT_MODEL_MAPPING


class _AutoPeftModel:
    task_type: ClassVar[TaskType | None] = None
    auto_class: ClassVar[str | None] = None  # transformers' class that loads the base

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load the base model that the adapter's config names, then the adapter onto it.

        Keyword arguments go to the base model's `from_pretrained`. When a tokenizer lies beside the adapter, the
        base's embeddings are resized to it.
        """
        import transformers

        hub = {key: kwargs[key] for key in ("token", "subfolder", "cache_dir") if key in kwargs}
        config = config or PeftConfig.from_pretrained(pretrained_model_name_or_path, revision=revision, **hub)
        base = config.base_model_name_or_path
        if not base:
            raise ConfigError(
                f"{pretrained_model_name_or_path}: the adapter's config names no base model; load it yourself and use "
                "PeftModel.from_pretrained(base_model, folder)",
                field="base_model_name_or_path",
            )
        if cls.task_type is not None and config.task_type not in (None, cls.task_type):
            raise ConfigError(
                f"{cls.__name__} loads {cls.task_type.value} adapters, this one is for {config.task_type.value}",  # type: ignore
                field="task_type",
                found=config.task_type,
                expected=cls.task_type,
            )
        name = cls.auto_class or _class_of(config)
        model = getattr(transformers, name).from_pretrained(
            base, revision=config.revision, **_without(kwargs, "subfolder")
        )
        _resize(model, pretrained_model_name_or_path)
        kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(cls.task_type, PeftModel)
        return kind.from_pretrained(
            model, pretrained_model_name_or_path, adapter_name, is_trainable, revision=revision, **hub
        )


_BY_TASK = {
    TaskType.CAUSAL_LM: "AutoModelForCausalLM",
    TaskType.SEQ_2_SEQ_LM: "AutoModelForSeq2SeqLM",
    TaskType.SEQ_CLS: "AutoModelForSequenceClassification",
    TaskType.TOKEN_CLS: "AutoModelForTokenClassification",
    TaskType.QUESTION_ANS: "AutoModelForQuestionAnswering",
    TaskType.FEATURE_EXTRACTION: "AutoModel",
}


def _class_of(config: PeftConfig) -> str:
    """transformers' class for a config: by its task; a class named in a file is used only if transformers has it."""
    import transformers

    if config.task_type is not None:
        return _BY_TASK[TaskType(config.task_type)]
    name = (config.auto_mapping or {}).get("base_model_class")
    known = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(known, type) and issubclass(known, transformers.PreTrainedModel)):
        raise ConfigError(
            f"the adapter's config names neither a task nor a model class of transformers (found {name!r}); "
            "load the base yourself and use PeftModel.from_pretrained",
            field="auto_mapping",
            found=name,
        )
    return str(name)


def _resize(model: Any, folder: str | Path) -> None:
    if not (Path(folder) / "tokenizer_config.json").is_file():
        return
    from transformers import AutoTokenizer

    size = len(AutoTokenizer.from_pretrained(folder))
    rows = model.get_input_embeddings().weight.shape[0]
    if size > rows:  # a smaller tokenizer is the usual padded table
        model.resize_token_embeddings(size)


def _without(values: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != name}


class AutoPeftModel(_AutoPeftModel):
    pass


class AutoPeftModelForCausalLM(_AutoPeftModel):
    task_type, auto_class = TaskType.CAUSAL_LM, "AutoModelForCausalLM"


class AutoPeftModelForSeq2SeqLM(_AutoPeftModel):
    task_type, auto_class = TaskType.SEQ_2_SEQ_LM, "AutoModelForSeq2SeqLM"


class AutoPeftModelForSequenceClassification(_AutoPeftModel):
    task_type, auto_class = TaskType.SEQ_CLS, "AutoModelForSequenceClassification"


class AutoPeftModelForTokenClassification(_AutoPeftModel):
    task_type, auto_class = TaskType.TOKEN_CLS, "AutoModelForTokenClassification"


class AutoPeftModelForQuestionAnswering(_AutoPeftModel):
    task_type, auto_class = TaskType.QUESTION_ANS, "AutoModelForQuestionAnswering"


class AutoPeftModelForFeatureExtraction(_AutoPeftModel):
    task_type, auto_class = TaskType.FEATURE_EXTRACTION, "AutoModel"
