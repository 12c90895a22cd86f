"""`AutoPeftModelFor...`: base model and adapter from the adapter's folder alone."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from deltatune.config import PeftConfig, TaskType
from deltatune.errors import ConfigError, StateError
from deltatune.model import PeftModel
from deltatune.storage.hub import OPTIONS
from deltatune.storage.locate import place
from deltatune.tasks import MODEL_TYPE_TO_PEFT_MODEL_MAPPING

_LIBRARIES = ("transformers", "diffusers")  # whose own classes a file may name; only what they export is looked at
_ADAPTER_ONLY = {"autocast_adapter_dtype", "ephemeral_gpu_offload", "low_cpu_mem_usage", "key_mapping", "torch_device"}
_ADAPTER_ONLY |= {"allow_base_mismatch", "load_embedding_layers", "allow_nonfinite", "subfolder"}
_SHARED = {"token", "cache_dir", "local_files_only", "force_download"}  # ways of fetching, for base and adapter


class _AutoPeftModel:
    task_type: ClassVar[TaskType | None] = None
    auto_class: ClassVar[str | None] = None  # transformers' class that loads the base

    def __init__(self, *_: Any, **__: Any) -> None:
        raise StateError(
            f"{type(self).__name__} is made by {type(self).__name__}.from_pretrained(folder_or_repository)",
            found=type(self).__name__,
            hint="call from_pretrained",
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        import_allowlist: list[str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load the base model that the adapter's config names, then the adapter onto it.

        When a tokenizer lies beside the adapter that has more tokens than the base, the base's embeddings are resized.

        Args:
            revision: Of the adapter's repository; that of the base stands in the adapter's config.
            import_allowlist: Packages from which a class that the config names may be imported, besides the models that
                transformers and diffusers export themselves.
            kwargs: Options of `PeftModel.from_pretrained`, and for the base's `from_pretrained`; those of the hub
                (`token`, `cache_dir`, ...) go to both, `subfolder` is the adapter's.

        Raises:
            PeftError: The adapter cannot be read, or names no base that can be loaded.
        """
        if (token := kwargs.pop("use_auth_token", None)) is not None:
            kwargs.setdefault("token", token)
        hub = {key: kwargs[key] for key in kwargs if key in OPTIONS or key == "subfolder"}
        known = config or PeftConfig.from_pretrained(pretrained_model_name_or_path, revision=revision, **hub)
        base = known.base_model_name_or_path
        if not base:
            raise ConfigError(
                f"{pretrained_model_name_or_path}: the adapter's config names no base model; load it yourself and use "
                "PeftModel.from_pretrained(base_model, folder)",
                field="base_model_name_or_path",
            )
        if cls.task_type is not None and known.task_type not in (None, cls.task_type):
            raise ConfigError(
                f"{cls.__name__} loads {cls.task_type.value} adapters, this one is for {known.task_type.value}",  # type: ignore
                field="task_type",
                found=known.task_type,
                expected=cls.task_type,
            )
        kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(cls.task_type, PeftModel)
        beyond = _ADAPTER_ONLY | (OPTIONS - _SHARED)
        for_base = {"revision": known.revision, **{key: kwargs[key] for key in kwargs if key not in beyond}}
        for_adapter = {key: kwargs[key] for key in kwargs if key in _ADAPTER_ONLY | {"ignore_mismatched_sizes"}}
        model = cls._class_of(known, import_allowlist or []).from_pretrained(base, **for_base)
        _resize(model, pretrained_model_name_or_path, revision, kwargs)
        return kind.from_pretrained(
            model,
            pretrained_model_name_or_path,
            adapter_name,
            is_trainable,
            config,
            **{"revision": revision, **hub, **for_adapter},
        )

    @classmethod
    def _class_of(cls, config: PeftConfig, allowed: list[str]) -> Any:
        if cls.auto_class is None:
            return _class_of(config, allowed)
        import transformers

        return getattr(transformers, cls.auto_class)


_BY_TASK = {
    TaskType.CAUSAL_LM: "AutoModelForCausalLM",
    TaskType.SEQ_2_SEQ_LM: "AutoModelForSeq2SeqLM",
    TaskType.SEQ_CLS: "AutoModelForSequenceClassification",
    TaskType.TOKEN_CLS: "AutoModelForTokenClassification",
    TaskType.QUESTION_ANS: "AutoModelForQuestionAnswering",
    TaskType.FEATURE_EXTRACTION: "AutoModel",
}


def _class_of(config: PeftConfig, allowed: list[str]) -> Any:
    """The class that loads the base: by the task, or the one that the file names, where it may be imported."""
    if config.task_type is not None:
        import transformers

        return getattr(transformers, _BY_TASK[TaskType(config.task_type)])
    mapping = config.auto_mapping or {}
    name, library = mapping.get("base_model_class"), mapping.get("parent_library")
    known = _exported(name, library, allowed) if isinstance(name, str) and isinstance(library, str) else None
    if not (isinstance(known, type) and issubclass(known, nn.Module)):
        raise ConfigError(
            f"the adapter's config names neither a task nor a model that transformers exports (found {name!r} of "
            f"{library!r}); load the base yourself and use PeftModel.from_pretrained, or, if you trust that package, "
            f"pass import_allowlist=[{library!r}]",
            field="auto_mapping",
            found=name,
        )
    return known


def _exported(name: str, library: str, allowed: list[str]) -> Any:
    top = library.partition(".")[0]
    if any(library == package or library.startswith(f"{package}.") for package in allowed):
        source = library
    elif top in _LIBRARIES:
        source = top
    else:
        return None
    try:
        return getattr(importlib.import_module(source), name, None)
    except ImportError:
        return None


def _resize(model: Any, name: str | Path, revision: str | None, kwargs: dict[str, Any]) -> None:
    """Make room in the base for the tokens of a tokenizer that lies beside the adapter."""
    hub = {key: value for key, value in kwargs.items() if key in OPTIONS}
    where = place(name, **{"revision": revision, **hub})
    if where.find("tokenizer_config.json") is None or getattr(model, "get_input_embeddings", None) is None:
        return
    from transformers import AutoTokenizer

    known = {"revision": revision or "main", **{key: hub[key] for key in _SHARED if key in hub}}
    trusted = kwargs.get("trust_remote_code", False)  # the user's word; no file can give it
    size = len(AutoTokenizer.from_pretrained(name, **known, trust_remote_code=trusted))
    rows = model.get_input_embeddings().weight.shape[0]
    if size > rows:  # a smaller tokenizer is the usual padded table
        model.resize_token_embeddings(size)


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
