"""The ways into a trace: a saved adapter on its base, a model with a fresh adapter, or the tiny example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltatune.errors import ConfigError, DataError
from deltatune.model import PeftModel
from deltatune.trace.report import TraceReport
from deltatune.trace.samples import example
from deltatune.trace.tracer import trace

if TYPE_CHECKING:
    from rich.console import Console

    from deltatune.generate import Ready

TEXTS = ("A prefix stands before the words.", "The model is frozen, the prefix learns.")


def run(
    model: str | None = None,
    adapter: str | None = None,
    text: list[str] | None = None,
    target: list[str] | None = None,
    method: str = "prefix_tuning",
    html: str | Path | None = None,
    console: Console | None = None,
    options: Mapping[str, Any] | None = None,
    every: bool = False,
) -> TraceReport:
    """Trace one batch, print the tree and write the page.

    Args:
        model: Base model: folder, hub name or demo. With an adapter, the base instead of the one that it names.
        adapter: Adapter folder. Without it `model` gets a fresh adapter; without both, a tiny random model does.
        text: Inputs, one row of the batch each; two sentences of our own by default.
        target: What is to be answered; by default the input itself, and a classifier's first class.
        method: Method of a fresh adapter.
        html: Where to write the page.
        console: Where to print the tree; None prints nothing.
        options: Fields of a fresh adapter's config, such as {"layout": "peft"}.
        every: Print all layers instead of the first and last.
    """
    if adapter is not None:
        _refuse(options, "options", "which the adapter's folder holds already")
        report = trace_folder(adapter, text, target, model)
    elif model is not None:
        report = _fresh(model, text, target, method, dict(options or {}))
    else:
        _refuse(text, "text", "which the built-in example has no tokenizer for; name a model or an adapter")
        _refuse(target, "target", "which the built-in example has no tokenizer for; name a model or an adapter")
        report = trace(*example(method, **dict(options or {})))
    if html is not None:
        from deltatune.trace.page import write_page

        write_page(report, html)
    if console is not None:
        from deltatune.trace.tree import as_tree

        console.print(as_tree(report, every))
    return report


def trace_folder(
    adapter: str | Path,
    texts: Sequence[str] | None = None,
    targets: Sequence[str] | None = None,
    base: str | None = None,
) -> TraceReport:
    """Trace texts through a saved adapter on its base model (or on `base`), as if it went on training."""
    from deltatune.generate import load_ready

    ready = load_ready(str(adapter), base)
    if not isinstance(ready.model, PeftModel):
        raise ConfigError(
            f"{adapter} is a model without an adapter; trace it with a fresh one by passing it as model",
            field="adapter",
        )
    return _traced(ready, ready.model, texts, targets)


def _fresh(
    name: str, texts: Sequence[str] | None, targets: Sequence[str] | None, method: str, options: dict[str, Any]
) -> TraceReport:
    """A base model with an adapter as it is before its first step."""
    from deltatune.generate import load_ready
    from deltatune.train.defaults import FULL, with_defaults
    from deltatune.train.method import adapt, normal_method

    method = normal_method(method)
    if method == FULL:
        raise ConfigError("method='full' trains the model itself; trace shows adapters, such as lora", field="method")
    ready = load_ready(name)
    model: Any = ready.model
    if not isinstance(model, PeftModel):
        model = adapt(model, method, ready.task, with_defaults(method, options)).eval()
    return _traced(ready, model, texts, targets)


def _traced(ready: Ready, model: PeftModel, texts: Sequence[str] | None, targets: Sequence[str] | None) -> TraceReport:
    model.set_adapter(model.active_adapters)  # loaded for use it would be frozen
    return trace(model, batch_of(ready, texts, targets))


def batch_of(ready: Ready, texts: Sequence[str] | None, targets: Sequence[str] | None) -> dict[str, Any]:
    """Texts and targets as a padded batch with labels."""
    from deltatune.data.collate import Collator
    from deltatune.data.conversation import Conversation
    from deltatune.data.example import Example
    from deltatune.data.features import Features
    from deltatune.data.passages import Passage, windows
    from deltatune.data.tagging import Tagged

    texts = list(TEXTS if texts is None else texts)
    if not texts:
        raise DataError("trace: no text; give at least one", field="text", found=[])
    if targets is not None and len(targets) != len(texts):
        raise DataError(
            f"trace: {len(targets)} targets for {len(texts)} texts; give one for each",
            field="target",
            found=len(targets),
        )
    usual: list[Any] = list(texts)
    if ready.task == "causal":
        usual = [None] * len(texts)  # the text itself is learnt
    elif ready.labels is not None:
        usual = [ready.labels.keys[0]] * len(texts)
    wanted = usual if targets is None else list(targets)
    rows: list[Features]
    if ready.task == "token_classification":
        rows = [ready.encoder(Tagged.of(text), "trace")[0] for text in texts]
    elif ready.task == "question_answering":
        rows = [replace(windows(ready.encoder, Passage.of(text))[0], labels=[0, 0]) for text in texts]
    elif ready.task == "chat":
        rows = [ready.encoder(Conversation.exchange(text, answer), "trace")[0] for text, answer in zip(texts, wanted)]
    else:
        rows = [
            ready.encoder(Example(text, answer, line), "trace")[0]
            for line, (text, answer) in enumerate(zip(texts, wanted), 1)
        ]
    return dict(Collator(ready.tokenizer.pad_token_id or 0, ready.task)(rows))


def _refuse(value: Any, field: str, reason: str) -> None:
    if value:
        raise ConfigError(f"trace: {field}={value!r} is given, {reason}", field=field, found=value)
