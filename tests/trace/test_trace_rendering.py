"""The report as data, tree and page."""

import importlib
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from deltatune.errors import ConfigError, DataError
from deltatune.trace import TraceReport, example, run, trace, trace_folder
from deltatune.trace.page import as_page, write_page
from deltatune.trace.tree import as_tree

CASES = [
    ("prefix_tuning", "t5", {"layout": "peft"}),
    ("prefix_tuning", "gpt2", {"prefix_projection": True}),
    ("prefix_tuning", "bert", {"sites": "all"}),
    ("lora", "t5", {"r": 4}),
    ("ia3", "bert", {}),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def report(request):
    method, architecture, options = request.param
    return trace(*example(method, architecture, **options))


def printed(report, width=80, **options):
    console = Console(width=width, file=io.StringIO(), highlight=False, **options)
    console.print(as_tree(report))
    return console.file.getvalue()


def places(value):
    """Every `where` in a report."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from (
                [part] if key.startswith("where") or (key.endswith("_class") and ":" in str(part)) else places(part)
            )
    elif isinstance(value, list):
        for part in value:
            yield from places(part)


def test_json_and_back(report):
    values = report.to_dict()
    text = json.dumps(values, allow_nan=False)
    assert json.loads(text) == values
    assert TraceReport.from_dict(json.loads(text)) == report


def test_every_stop_names_a_place_that_exists(report):
    found = set(places(report.to_dict())) | {report.loss.computed_by} | {call.function for call in report.calls}
    assert len(found) > 5 and {stop.where for stop in report.stops} <= found
    for place in found:
        module, _, path = place.partition(":")
        thing = importlib.import_module(module)
        for name in path.split("."):
            thing = getattr(thing, name)
    assert all(stop.where.startswith("deltatune.") for stop in report.stops)


def test_stops_come_in_the_order_of_the_way(report):
    order = ["config", "registry", "task class", "prefix encoder", "keys and values", "attention", "wrapped layers"]
    order += ["trained copies", "loss", "gradient"]
    names = [stop.name for stop in report.stops]
    assert names == [name for name in order if name in names]
    assert {"config", "registry", "task class", "loss", "gradient"} <= set(names)


def test_the_tree_fits_into_80_columns(report):
    lines = printed(report).splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) > 20
    text = "\n".join(lines)
    assert all(f"{number} {stop.name}" in text for number, stop in enumerate(report.stops, 1))


def test_dead_parts_are_red_in_the_tree_and_live_ones_are_not():
    red = "\x1b[1;31m"
    text = printed(trace(*example(layout="peft")), force_terminal=True, color_system="standard")
    marked = {line.split(red)[1].split("\x1b")[0] for line in text.splitlines() if red in line}
    names = [f"decoder.block.{number}.layer.0.SelfAttention" for number in range(4)]
    assert {names[1], names[3]} <= marked and not {names[0], names[2]} & marked
    assert red not in printed(trace(*example()), force_terminal=True, color_system="standard")


def test_long_lists_are_shortened_and_counted():
    report = trace(*example("lora", "t5"))
    short = printed(report)
    assert "… 18 more" in short and report.layers[10].path not in short
    console = Console(width=80, file=io.StringIO())
    console.print(as_tree(report, every=True))
    assert all(layer.path in console.file.getvalue() for layer in report.layers)


class Page(HTMLParser):
    """Collects tags and checks that they close."""

    VOID = {"meta", "br", "wbr", "rect", "path"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"


def test_the_page_needs_no_network(report):
    text = as_page(report)
    page = Page(text)
    assert not page.open
    assert not {"script", "link", "img", "iframe", "object", "embed", "base"} & set(page.tags)
    assert not [entry for entry in page.attributes if entry[1] in ("src", "href", "srcset", "action", "data")]
    assert "@import" not in text and set(re.findall(r"url\(.", text)) == {"url(#"}  # arrow heads of the drawing


def test_the_page_shows_every_layer_and_part(report):
    text = as_page(report).replace("<wbr>", "")
    for name in [part.site for prefix in report.prefixes for part in prefix.parts] + [
        layer.path for layer in report.layers
    ]:
        assert name in text
    for call in report.calls:
        assert call.module in text
    assert ("verdict dead" in text) == bool(report.dead)
    assert text.count('class="row dead"') == sum(part.dead for prefix in report.prefixes for part in prefix.parts)


def test_the_page_escapes_what_it_shows():
    report = trace(*example())
    report.batch = {"<script>alert(1)</script>": [1]}
    report.prefixes[0].parts[0].site = "<b>bold</b>"
    text = as_page(report)
    assert "<script" not in text and "<b>bold" not in text


def test_run_prints_the_tree_and_writes_the_page(tmp_path):
    console = Console(width=80, file=io.StringIO(), highlight=False)
    report = run(
        method="prefix_tuning", html=tmp_path / "new" / "trace.html", console=console, options={"layout": "peft"}
    )
    assert "no attention reads it" in console.file.getvalue() and len(report.dead) == 2
    assert (tmp_path / "new" / "trace.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert write_page(report, tmp_path / "again.html").is_file()


def test_run_tells_what_it_cannot_do():
    with pytest.raises(ConfigError, match=r"method='lorra' is not known, expected one of .*lora"):
        run(method="lorra")
    with pytest.raises(ConfigError, match=r"text=.*no tokenizer"):
        run(text=["a"])
    with pytest.raises(ConfigError, match="architecture='mamba' is not known"):
        example(architecture="mamba")
    with pytest.raises(ConfigError, match="virtual"):
        example("prefix_tuning", num_virtual_token=3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny T5 with a tokenizer, and a prefix for it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    root = tmp_path_factory.mktemp("trace")
    words = ["<pad>", "</s>", "<unk>", *["the", "prefix", "stands", "before", "words"]]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )
    model, _ = example("prefix_tuning", num_virtual_tokens=3)
    model.save_pretrained(root / "adapter")
    model.unload().save_pretrained(root / "base")
    fast.save_pretrained(root / "base")
    return root


def test_a_saved_adapter_is_traced_on_texts_as_if_it_trained_on(folders):
    report = trace_folder(folders / "adapter", ["the prefix stands"], ["before words"], base=str(folders / "base"))
    assert report.batch["input_ids"][0] == 1 and report.prefixes[0].virtual_tokens == 3
    assert report.gradient.live == report.gradient.elements > 0 and not report.task.training
    with_prefix = [call for call in report.calls if call.prefix]
    length = report.batch["labels"][1]
    assert {(call.length_before, call.length_after) for call in with_prefix} == {(length, length + 3)}


def test_a_model_gets_a_fresh_adapter(folders):
    report = run(model=str(folders / "base"), method="lora", options={"r": 2, "target_modules": ["q", "v"]})
    assert len(report.layers) == 24 and {layer.adapters[0].rank for layer in report.layers} == {2}
    with pytest.raises(DataError, match="1 targets for 2 texts"):
        run(model=str(folders / "base"), text=["the", "words"], target=["the"])
    with pytest.raises(ConfigError, match="method='full'"):
        run(model=str(folders / "base"), method="full")


def test_the_example_of_the_documentation_runs_and_says_what_it_shows():
    text = (Path(__file__).parents[2] / "docs" / "trace.md").read_text(encoding="utf-8")
    names = {}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1), names)
    report = names["report"]
    assert report.prefixes[0].parts[1].readers == []
    assert (report.calls[4].length_before, report.calls[4].length_after) == (5, 25)
    tree, shown = printed(report), re.search(r"```\n(trace .*?)```", text, re.DOTALL).group(1)
    tree, shown = ([bare(line) for line in part.splitlines()] for part in (tree, shown))
    assert len(shown) > 15 and [line for line in shown if line not in tree] == []


def bare(line):
    """A line of a tree without norms, which differ between machines in their last figure."""
    return re.sub(r"(grad [KV]?) ?[\d.e-]+", r"\1", line).rstrip()
