"""The model card of a run: `README.md` with the metadata that the hub and its tools read, and the scores."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from deltatune.config import CONFIG_NAME, PeftConfig
from deltatune.report.words import duration, share
from deltatune.storage.card import CARD_NAME, model_card
from deltatune.storage.files import write_files
from deltatune.storage.locate import is_repository
from deltatune.train.defaults import FULL
from deltatune.train.result import TrainResult

# whoever takes this line out keeps the card as it is
MARK = "<!-- Written by deltatune train. Without this line it is yours, and is left as it is. -->"
PIPELINES = {
    "seq2seq": "text2text-generation",
    "causal": "text-generation",
    "chat": "text-generation",
    "classification": "text-classification",
    "token_classification": "token-classification",
    "question_answering": "question-answering",
}
# our names of scores -> those of the hub's metrics, where they are others
METRICS = {"macro_f1": "f1", "rouge_l": "rougeL", "rouge_1": "rouge1", "rouge_2": "rouge2"}


def write_card(result: TrainResult) -> Path | None:
    """Write the card beside the adapter; None where the user's own is there, which stays."""
    file = result.output_dir / CARD_NAME
    if file.is_file() and not _ours(file):
        return None
    write_files(result.output_dir, {CARD_NAME: render_card(result).encode()})
    return file


def render_card(result: TrainResult) -> str:
    """The card as text."""
    return f"---\n{_metadata(result)}\n---\n\n{MARK}\n\n{_text(result)}"


def _ours(file: Path) -> bool:
    """Written by a run, or by saving an adapter, and not touched since."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    return MARK in text or text.partition("\n---\n")[2] == _saved_text(file.parent)


def _saved_text(folder: Path) -> str | None:
    """What saving the adapter writes below the metadata; None where there is no adapter."""
    if not (folder / CONFIG_NAME).is_file():
        return None
    return model_card(PeftConfig.from_pretrained(folder)).partition("\n---\n")[2]


def _metadata(result: TrainResult) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    settings, after = result.settings, result.metrics.get("after", {})
    pipeline, name = PIPELINES[settings.task], result.output_dir.resolve().name
    found = [
        EvalResult(
            task_type=pipeline,
            dataset_type=_data(result, part),
            dataset_name=_data(result, part),
            dataset_split=part,
            metric_type=_metric(metric),
            metric_name=metric.replace("_", " "),
            metric_value=round(value, 6),
        )
        for part, scores in after.items()
        for metric, value in scores.items()
    ]
    data = ModelCardData(
        base_model=settings.model_name_or_path if is_repository(settings.model_name_or_path) else None,
        library_name="transformers" if settings.method == FULL else "peft",
        pipeline_tag=pipeline,
        datasets=[settings.dataset] if settings.dataset and is_repository(settings.dataset) else None,
        tags=["deltatune", settings.method, *(["chat"] if settings.task == "chat" else [])],
        metrics=sorted({_metric(name) for scores in after.values() for name in scores}) or None,
        model_name=name if found else None,
        eval_results=found or None,
    )
    return data.to_yaml().strip()


def _metric(name: str) -> str:
    return METRICS.get(name, name)


def _text(result: TrainResult) -> str:
    settings, metrics = result.settings, result.metrics
    adapter = settings.method != FULL
    base = Path(settings.model_name_or_path).name  # no folders of this machine
    trained, total = metrics["trainable_parameters"], metrics["total_parameters"]
    kind = f"A {settings.method} adapter for" if adapter else "A fully trained copy of"
    lines = [
        f"# {result.output_dir.resolve().name}",
        "",
        f"{kind} `{base}`, task {settings.task}: {trained:,} of {total:,} parameters train "
        f"({share(trained, total)}), {metrics['steps']:,} steps over {metrics['train_rows']:,} rows of "
        f"`{_data(result, 'train')}` in {duration(metrics['train_seconds'])}.",
        "",
        *_scores(metrics),
        "## Use",
        "",
        "```sh",
        f"deltatune generate {shlex.quote(result.output_dir.resolve().name)} --compare 'your input'",
        "```",
        "",
        *(_loading() if adapter else ()),
        "## Training",
        "",
        "| setting | value |",
        "|---|---|",
        *(f"| `{name}` | {_cell(value)} |" for name, value in _settings(result)),
        "",
        "All settings are in `settings.json`, curves and samples in `report.html`.",
        "",
    ]
    return "\n".join(lines)


def _loading() -> list[str]:
    code = "from deltatune import PeftModel  # or from peft\n\nmodel = PeftModel.from_pretrained(base_model, folder)"
    return ["```python", *code.splitlines(), "```", ""]


def _scores(metrics: dict[str, Any]) -> list[str]:
    rows = []
    for part, scores in metrics.get("after", {}).items():
        before = metrics.get("before", {}).get(part, {})
        for name, value in scores.items():
            old = f"{before[name]:.4g}" if name in before else ""
            rows.append(f"| {part} {name.replace('_', ' ')} | {old} | {value:.4g} |")
    return ["| score | base | trained |", "|---|---|---|", *rows, ""] if rows else []


def _settings(result: TrainResult) -> list[tuple[str, Any]]:
    settings = result.settings
    named = ("num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "lr_scheduler_type")
    rest = [(name, getattr(settings, name)) for name in (*named, "max_length", "seed")]
    return [*settings.method_options.items(), ("learning_rate", settings.resolved_learning_rate), *rest]


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _data(result: TrainResult, part: str) -> str:
    """A data set by its name, or by the name of its file, without the folders of this machine."""
    settings = result.settings
    own = {"train": settings.train_file, "eval": settings.eval_file, "test": settings.test_file}[part]
    given = own or settings.train_file or settings.dataset or "rows in memory"
    return Path(given if isinstance(given, str) else given[0]).name
