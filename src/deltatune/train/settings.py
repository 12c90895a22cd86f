"""`TrainSettings`: everything a run is told, checked before anything is loaded. Names are transformers'."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from deltatune.data.example import CAUSAL_TASKS, TEXT_TASKS
from deltatune.errors import ConfigError, LimitError
from deltatune.train.aliases import CANONICAL, canonical, unknown_keys
from deltatune.train.defaults import FULL, for_run, learning_rate, with_defaults
from deltatune.train.method import is_lora, method_fields, method_names, normal_method, peft_config, takes_tasks

Task = Literal["seq2seq", "causal", "chat", "classification", "token_classification", "question_answering"]
Files = str | list[str] | None
Scheduler = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
]
Profile = Literal["auto", "single", "ddp", "fsdp2", "zero3"]
Optimizers = Literal["adamw", "loraplus", "lorafa", "riemannian"]
METRICS_OF_ANSWERS = ("bleu", "rouge_l", "exact_match")
METRICS = {  # that an evaluation has beside the loss
    **dict.fromkeys(TEXT_TASKS, ("perplexity", *METRICS_OF_ANSWERS)),
    "classification": ("accuracy", "macro_f1"),
    "token_classification": ("accuracy", "precision", "recall", "f1", "macro_f1"),
    "question_answering": ("exact_match", "f1"),
}
MAX_VALUES = 10_000  # in a file of settings
UNKNOWN_STEPS = 10**9  # of a run, before its data are read
TASKS = {
    "seq2seq": "seq2seq", "seq_2_seq_lm": "seq2seq", "seq2seq_lm": "seq2seq", "text2text": "seq2seq",
    "causal": "causal", "causal_lm": "causal", "lm": "causal", "clm": "causal",
    "chat": "chat", "sft": "chat", "conversation": "chat", "instruct": "chat",
    "classification": "classification", "seq_cls": "classification", "sequence_classification": "classification",
    "text_classification": "classification",
    "token_classification": "token_classification", "token_cls": "token_classification",
    "tagging": "token_classification", "ner": "token_classification",
    "question_answering": "question_answering", "question_ans": "question_answering", "qa": "question_answering",
    "extractive_qa": "question_answering",
}  # fmt: skip


class TrainSettings(BaseModel):
    """All settings of a run. Options of the method (`r`, `num_virtual_tokens`, ...) are given beside the others."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, protected_namespaces=())

    model_name_or_path: str = Field("demo", min_length=1, description="model folder, hub name, or demo")
    task: Task = Field("seq2seq", description=f"by the data when left out; {', '.join(dict.fromkeys(TASKS.values()))}")
    method: str = Field("lora", description="name of a method, such as lora or prefix_tuning; full for no adapter")
    method_options: dict[str, Any] = Field(default_factory=dict, description="options of the method's config")

    train_file: Files = Field(None, description="jsonl, json, csv, tsv, txt, parquet; folder, pattern, list; FILE#500")
    eval_file: Files = Field(None, description="rows to evaluate on while training")
    test_file: Files = Field(None, description="rows to score once, at the end")
    data_weights: list[float] = Field(default_factory=list, description="shares of the training files, one for each")
    dataset: str | None = Field(None, description="a dataset of the datasets library, instead of files")
    dataset_config: str | None = None
    eval_split: float = Field(0.0, ge=0, lt=1, description="share of the training rows set aside for evaluation")
    column_mapping: dict[str, str] = Field(default_factory=dict, description="name that we know: name in the file")
    input_column: str | None = None
    target_column: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    task_column: str | None = Field(None, description="number of the task of a row, for methods with num_tasks")
    max_train_samples: int | None = Field(None, ge=1)
    max_eval_samples: int | None = Field(None, ge=1)
    max_length: int = Field(
        512, ge=2, description="tokens of an input (causal, chat: with answers; question_answering: of a window)"
    )
    max_target_length: int | None = Field(
        None,
        ge=1,
        description="tokens of an answer; unset: 128; causal: of a learnt one what max_length leaves",
    )
    separator: str = Field("\n", description="between input and answer of a causal model")
    completion_only_loss: bool = Field(True, description="causal, chat: learn the answer only, not the input")
    chat_template: str | None = Field(None, description="chat: chatml, plain, or a jinja file; default: its own")
    train_on: Literal["assistant", "last", "all"] = Field("assistant", description="chat: whose turns are learnt")
    truncation: Literal["left", "right", "drop"] | None = Field(
        None, description="what is cut of too long a row; unset: as suits the task"
    )
    packing: bool = Field(False, description="causal, chat: several rows in one of max_length, none seeing another")
    group_by_length: bool = Field(False, description="rows of like length share a batch")

    learning_rate: float | None = Field(None, gt=0, lt=1e3, description="default: by method")
    num_train_epochs: float = Field(3.0, gt=0)
    max_steps: int = Field(-1, ge=-1, description="steps to do, instead of epochs; -1: by epochs")
    per_device_train_batch_size: int = Field(8, ge=1)
    per_device_eval_batch_size: int = Field(16, ge=1)
    gradient_accumulation_steps: int = Field(1, ge=1)
    warmup_ratio: float = Field(0.03, ge=0, le=1)
    warmup_steps: int | None = Field(None, ge=0, description="instead of warmup_ratio")
    lr_scheduler_type: Scheduler = "cosine"
    weight_decay: float = Field(0.0, ge=0)
    optimizer: Optimizers = Field("adamw", description="for lora also: loraplus, lorafa, riemannian")
    loraplus_lr_ratio: float = Field(16.0, ge=1, lt=1e6, description="loraplus: rate of B over that of A")
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(1.0, ge=0, description="0: no clipping")
    seed: int = Field(42, ge=0, lt=2**32)
    split_seed: int | None = Field(None, ge=0, lt=2**32, description="draws rows and sets some aside; default: seed")

    loss: Literal["auto", "chunked", "model"] = Field(
        "auto", description="chunked: never all logits of a text model at once; model: as it does it; auto: if it can"
    )
    gradient_checkpointing: bool = False
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto: float32 on a CPU")
    load_in_4bit: bool = Field(False, description="the frozen base in 4 bits (NF4, double scales), by bitsandbytes")
    load_in_8bit: bool = Field(False, description="the frozen base in 8 bits (LLM.int8), by bitsandbytes")
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    num_threads: int | None = Field(None, ge=1, description="CPU threads of torch")
    profile: Profile = Field(
        "auto",
        description="of several processes: ddp, each has the base; fsdp2, each has a share of its blocks; zero3, the "
        "same by DeepSpeed",
    )
    shard_across: Literal["node", "all"] = Field("node", description="fsdp2, zero3: processes that share a base")
    zero3_offload: Literal["none", "cpu"] = Field("none", description="zero3: where a share waits; cpu: in host memory")

    device_map: str | dict[str, int | str] | None = Field(
        None, description="a base over several devices, host memory (cpu) and disk: auto, balanced, or part: device"
    )
    offload_folder: str | None = Field(None, description="for what device_map puts on disk")

    output_dir: str = Field("outputs", min_length=1)
    overwrite_output_dir: bool = Field(False, description="start anew where another run has left its files")
    resume_from_checkpoint: bool | str | None = Field(None, description="true: newest whole checkpoint; or a folder")
    allow_change: list[str] = Field(
        default_factory=list, description="conditions that may differ from the checkpoint's"
    )
    logging_steps: float = Field(10, gt=0, description="steps; below 1: share of the run")
    eval_steps: float | None = Field(None, ge=0, description="steps; below 1: share of the run; 0: only at the end")
    save_steps: float | None = Field(None, ge=0, description="as eval_steps; unset: at the end of every epoch")
    save_total_limit: int | None = Field(2, ge=1, description="checkpoints kept; best and last always are")
    load_best_model_at_end: bool = False
    metric_for_best_model: str = Field("loss", description="score by which the best is kept and training stops early")
    early_stopping_patience: int | None = Field(None, ge=1, description="evaluations without a better score")
    predict_with_generate: bool = Field(False, description="evaluations also score num_scored written answers")
    report_to: list[str] | None = Field(
        None, description="trackers of transformers: wandb, mlflow, ...; unset: tensorboard if installed; none: no one"
    )
    num_samples: int = Field(4, ge=0, description="outputs shown before and after")
    num_scored: int = Field(64, ge=0, description="evaluation inputs answered for BLEU and ROUGE-L; 0: loss only")
    num_beams: int = Field(1, ge=1)
    eval_before: bool = Field(True, description="evaluate the base before training")

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**gather(values))
        except ValidationError as error:
            raise _config_error(error) from None

    @model_validator(mode="after")
    def _together(self) -> TrainSettings:
        if self.max_steps == 0:
            raise _refused("max_steps", 0, "a number of 1 or more, or -1 for as many as the epochs take")
        if self.load_in_4bit and self.load_in_8bit:
            raise _refused("load_in_8bit", True, "false beside load_in_4bit")
        if self.train_file is not None and self.dataset is not None:
            raise _refused("dataset", self.dataset, "either train_file or dataset, not both")
        if self.eval_file is not None and self.eval_split:
            raise _refused("eval_split", self.eval_split, "0 beside an eval_file")
        if "task" in self.model_fields_set:  # else it is to be found by the data
            self._check_data()
        if self.task_column is not None and not takes_tasks(self.method):
            raise _refused("task_column", self.task_column, f"a method with num_tasks beside it, not {self.method}")
        if self.optimizer != "adamw" and not is_lora(self.method):
            raise _refused("optimizer", self.optimizer, f"adamw with method {self.method}; the others are LoRA's")
        for name, value in (("num_train_epochs", self.num_train_epochs), ("learning_rate", self.learning_rate)):
            if value is not None and not math.isfinite(value):
                raise _refused(name, value, "a finite number")
        for name in ("logging_steps", "eval_steps", "save_steps"):
            value = getattr(self, name)
            if value is not None and value >= 1 and value != int(value):
                raise _refused(name, value, "a whole number of steps, or a share below 1")
        return self

    def _check_data(self) -> None:
        if self.packing and self.task not in CAUSAL_TASKS:
            raise _refused("packing", True, f"false with task {self.task}; only causal models can be packed")
        if self.packing and self.task_column is not None:
            raise _refused("packing", True, "false beside a task_column: rows of a pack share one task")
        if self.truncation is not None and self.task in ("token_classification", "question_answering"):
            raise _refused("truncation", self.truncation, f"none with task {self.task}, which cuts by its own rule")
        self._check_metric()
        for name in ("chat_template", "train_on"):
            if getattr(self, name) not in (None, "assistant") and self.task != "chat":
                raise _refused(name, getattr(self, name), f"to be left out with task {self.task}; it is for task chat")

    def _check_metric(self) -> None:
        written = self.predict_with_generate
        if written and self.task not in TEXT_TASKS:
            raise _refused("predict_with_generate", True, f"false with task {self.task}, whose rows are all scored")
        if written and self.num_scored == 0:
            raise _refused("num_scored", 0, "1 or more beside predict_with_generate")
        metric = self.metric_for_best_model
        if metric in METRICS_OF_ANSWERS and self.task in TEXT_TASKS and not written:
            raise _refused("metric_for_best_model", metric, "predict_with_generate: true beside it")
        if metric not in (known := ["loss", *METRICS[self.task]]):
            raise _refused("metric_for_best_model", metric, f"one of {', '.join(known)} with task {self.task}")

    @property
    def resolved_learning_rate(self) -> float:
        if self.learning_rate is not None:
            return self.learning_rate
        return learning_rate(self.method, self.method_options)

    def options_of(self, steps: int) -> dict[str, Any]:
        """The method's options in a run of so many optimizer steps."""
        return for_run(self.method, self.method_options, steps)

    def resolved(self) -> dict[str, Any]:
        """The settings with every default filled in, as JSON holds them; a run can be repeated from it."""
        return {**self.model_dump(mode="json"), "learning_rate": self.resolved_learning_rate}


def gather(values: dict[str, Any]) -> dict[str, Any]:
    """Canonical keys, options of the method sorted out, the method's config tried: what the model is built from."""
    own = set(TrainSettings.model_fields)
    given: dict[str, Any] = canonical(values, own)
    if "task" in given:
        given["task"] = _task(given["task"])
    if str(given.get("profile")).lower() in ("zero1", "zero2", "deepspeed"):
        raise ConfigError(
            f"profile={given['profile']!r} is not known, expected zero3: of a frozen base only the weights can be "
            "shared, which ZeRO-3 does (docs/scale.md)",
            field="profile",
            found=given["profile"],
            expected="zero3",
        )
    method = given["method"] = normal_method(given.get("method", "lora"))
    options = given.pop("method_options", None) or {}
    if not isinstance(options, dict):
        raise ConfigError(
            f"method_options={options!r} is not allowed, expected names with values",
            field="method_options",
            found=options,
        )
    fields = method_fields(method)
    options: dict[str, Any] = {
        CANONICAL.get(key, key) if key not in fields else key: value for key, value in options.items()
    }
    for key in [key for key in given if key not in own]:
        options[key] = given.pop(key)
    if unknown := [key for key in options if key not in fields]:
        owners = {key: [m for m in method_names() if key in method_fields(m)] for key in unknown}
        raise unknown_keys(owners, own | fields, method)
    if isinstance(given.get("report_to"), str):
        given["report_to"] = [] if given["report_to"] in ("none", "") else given["report_to"].split(",")
    if isinstance(given.get("column_mapping"), str):
        given["column_mapping"] = dict(pair.split("=", 1) for pair in given["column_mapping"].split(",") if "=" in pair)
    if isinstance(given.get("allow_change"), str):
        given["allow_change"] = given["allow_change"].split(",")
    if isinstance(given.get("metric_for_best_model"), str):  # transformers writes eval_loss
        given["metric_for_best_model"] = given["metric_for_best_model"].removeprefix("eval_")
    given["method_options"] = with_defaults(method, {k: v for k, v in options.items() if v is not None})
    if method != FULL:
        # refuses bad values before anything is loaded
        peft_config(method, given.get("task", "seq2seq"), for_run(method, given["method_options"], UNKNOWN_STEPS))
    return given


def load_settings(path: str | Path | None = None, overrides: dict[str, Any] | None = None) -> TrainSettings:
    """Settings from a YAML or JSON file, with `overrides` on top of it."""
    values = {} if path is None else read_settings(path)
    known = set(TrainSettings.model_fields)
    merged = canonical(values, known) | canonical(overrides or {}, known)
    return TrainSettings(**merged)


def read_settings(path: str | Path) -> dict[str, Any]:
    """The values of a YAML or JSON file, as they stand there."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix.lower() == ".json" else _yaml(text, path)
    except LimitError:
        raise
    except OSError as error:
        raise ConfigError(f"settings file {path} cannot be read: {error.strerror}", path=str(path)) from error
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"settings file {path} is malformed: {reason}", path=str(path)) from error
    if not isinstance(values, dict):
        kind = "empty" if values is None else f"a {type(values).__name__}"
        raise ConfigError(f"settings file {path} is {kind}; expected names with values", path=str(path), found=kind)
    return values


def _yaml(text: str, path: Path) -> Any:
    """The values, unless aliases would make them many more than the file has."""
    if (root := yaml.compose(text, Loader=yaml.SafeLoader)) is not None and _values_in(root, {}) > MAX_VALUES:
        raise LimitError(
            f"settings file {path} unfolds to more than {MAX_VALUES} values through its aliases (&, *); write them out",
            path=str(path),
            expected=MAX_VALUES,
        )
    return yaml.safe_load(text)


def _values_in(node: yaml.Node, known: dict[int, float]) -> float:
    """How many values a node stands for, with its aliases written out; infinite where it is inside of itself."""
    if id(node) not in known:
        known[id(node)] = math.inf
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        inner = () if isinstance(node, yaml.ScalarNode) else parts
        known[id(node)] = 1 + sum(_values_in(part, known) for part in inner)
    return known[id(node)]


def _task(value: Any) -> str:
    key = str(getattr(value, "value", value)).lower().replace("-", "_")
    if key not in TASKS:
        known = list(dict.fromkeys(TASKS.values()))
        raise ConfigError(
            f"task={value!r} is not known; expected {', '.join(known)}",
            field="task",
            found=value,
            expected=known,
        )
    return TASKS[key]


def _refused(field: str, value: Any, expected: str) -> ValueError:
    return ValueError(f"{field}={value!r} is not allowed, expected {expected}")  # pydantic makes it a ValidationError


def _config_error(error: ValidationError) -> ConfigError:
    """All faults of the settings in one line."""
    parts = []
    for fault in error.errors():
        name = str(fault["loc"][0]) if fault["loc"] else ""
        message = fault["msg"].removeprefix("Value error, ")
        wanted = message.replace("Input should be", "expected").replace("expected a valid", "expected a")
        parts.append(f"{name}={fault['input']!r} is not allowed, {wanted}" if name else message)
    first = error.errors()[0]
    field = str(first["loc"][0]) if first["loc"] else parts[0].split("=")[0]
    return ConfigError("; ".join(parts), field=field, found=first["input"] if first["loc"] else None)
