"""Other programs' names for our settings, and the nearest name for those nobody knows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from deltatune.errors import ConfigError
from deltatune.suggest import did_you_mean
from deltatune.train import foreign

# canonical name <- names that other programs use for the same thing
ALIASES: dict[str, tuple[str, ...]] = {
    "model_name_or_path": ("model", "base_model", "base"),
    "method": ("peft_type", "tuner_type", "finetuning_type", "adapter", "training_type", "peft_method"),
    "task": ("task_type",),
    "r": ("lora_r", "lora_rank", "rank"),
    "target_modules": ("lora_target", "lora_target_modules"),
    "modules_to_save": ("lora_modules_to_save", "additional_target"),
    "use_dora": ("peft_use_dora",),
    "train_file": ("data", "data_file", "train_data", "train_path"),
    "eval_file": ("validation_file", "dev_file", "valid_file", "eval_data"),
    "dataset": ("dataset_name", "local_dataset"),
    "dataset_config": ("dataset_config_name", "name"),
    "eval_split": ("val_size", "val_set_size", "split_dataset_ratio"),
    "data_weights": ("mix", "weights", "interleave_probs"),
    "column_mapping": ("column", "columns"),
    "packing": ("sample_packing", "neat_packing", "packed"),
    "chat_template": ("template",),
    "input_column": ("source_column", "prompt_column"),
    "target_column": ("completion_column", "response_column", "output_column"),
    "text_column": ("text_field", "dataset_text_field"),
    "max_train_samples": ("max_samples",),
    "optimizer": ("optim",),
    "max_length": (
        "max_seq_length",
        "cutoff_len",
        "sequence_len",
        "model_max_length",
        "max_source_length",
    ),
    "per_device_train_batch_size": ("batch_size", "micro_batch_size", "train_batch_size"),
    "per_device_eval_batch_size": ("eval_batch_size",),
    "gradient_accumulation_steps": ("gradient_accumulation", "accumulation_steps"),
    "learning_rate": ("lr",),
    "num_train_epochs": ("epochs", "num_epochs"),
    "lr_scheduler_type": ("lr_scheduler", "scheduler"),
    "max_grad_norm": ("gradient_clipping", "grad_clip"),
    "dtype": ("torch_dtype", "mixed_precision", "precision"),
    "gradient_checkpointing": ("enable_activation_checkpointing",),
    "output_dir": ("out_dir", "output", "project_name"),
    "resume_from_checkpoint": ("resume",),
    "early_stopping_patience": ("early_stopping_steps", "early_stop_interval"),
    "report_to": ("log", "logger_name"),
    "metric_for_best_model": ("best_metric",),
    "predict_with_generate": ("eval_with_generate", "do_predict_with_generate"),
    "completion_only_loss": ("assistant_only_loss", "train_on_completions", "mask_prompt"),
    "num_threads": ("threads",),
}

CANONICAL = {alias: name for name, aliases in ALIASES.items() for alias in aliases}

# names whose value says the opposite, or says it in other words
TRANSLATED = ("train_on_inputs", "train_on_prompt", "bf16", "lora_target_linear")
BITS = ("quantization", "quantization_bit", "quantize", "quant_bits")  # of the frozen base
IN_FOUR = ("4", "int4", "nf4", "4bit", "bnb", "bnb.nf4", "bnb.nf4-dq")
IN_EIGHT = ("8", "int8", "8bit", "bnb.int8")


def canonical(values: dict[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """Keys by their canonical names; a thing said twice with two values is an error."""
    fields = set(known)
    result: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for key, value in values.items():
        if not isinstance(key, str):
            raise ConfigError(f"setting {key!r} is not a name; keys must be words", field=str(key), found=key)
        plain = key.replace("-", "_")
        if plain not in fields and foreign.passed_over(plain, value):
            continue
        plain, value = foreign.translated(plain, value)
        name, value = _translated(plain, value) if plain not in fields else (plain, value)
        if name is None:
            continue
        if name in result and result[name] != value:
            raise ConfigError(
                f"{key}={value!r} and {origin[name]}={result[name]!r} both set {name}; keep one of them",
                field=name,
                found=[result[name], value],
            )
        result[name], origin[name] = value, key
    return result


def _translated(key: str, value: Any) -> tuple[str | None, Any]:
    if key in ("train_on_inputs", "train_on_prompt") and isinstance(value, bool):
        return "completion_only_loss", not value
    if key == "bf16" and isinstance(value, bool):
        return ("dtype", "bfloat16") if value else (None, None)
    if key == "lora_target_linear" and isinstance(value, bool):
        return ("target_modules", "all-linear") if value else (None, None)
    if key in BITS:
        return _bits(key, value)
    name = CANONICAL.get(key, key)
    if name == "target_modules" and value == "all":
        return name, "all-linear"
    return name, value


def _bits(key: str, value: Any) -> tuple[str | None, Any]:
    """The setting that means what another program calls so."""
    said = str(value).lower()
    if value is None or said in ("none", "false", "0", "16"):
        return None, None
    if said in IN_FOUR or said in IN_EIGHT:
        return ("load_in_4bit" if said in IN_FOUR else "load_in_8bit"), True
    raise ConfigError(
        f"{key}={value!r} is not allowed, expected 4 or 8 (or int4, nf4, int8), or load_in_4bit: true",
        field=key,
        found=value,
        expected=[*IN_FOUR, *IN_EIGHT],
    )


def unknown_keys(owners: Mapping[str, Iterable[str]], known: Iterable[str], method: str) -> ConfigError:
    """All of them at once; `owners`: for each the methods that do have such an option."""
    told = {key: unknown_key(key, known, method, elsewhere) for key, elsewhere in owners.items()}
    first = next(iter(told))
    if len(told) == 1:
        return told[first]
    words = "; ".join(str(one) for one in told.values())
    return ConfigError(words, field=first, found=list(told), expected=told[first].expected)


def unknown_key(key: str, known: Iterable[str], method: str, elsewhere: Iterable[str]) -> ConfigError:
    """`elsewhere`: the methods that do have such an option."""
    owners = sorted(elsewhere)
    names = sorted({*known, *CANONICAL, *TRANSLATED, *BITS})
    if owners:
        named = ", ".join(owners[:4]) + (f" and {len(owners) - 4} others" if len(owners) > 4 else "")
        told = f"{key!r} is an option of {named}; method is {method}"
    else:
        told = f"unknown setting {key!r}" + (did_you_mean(key, names) or "; see the list of settings in docs or --help")
    return ConfigError(told, field=key, expected=names)
