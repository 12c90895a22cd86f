"""`report.html`: self-contained, and its numbers are the run's."""

import itertools
import json
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from deltatune import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from deltatune.report.curves import loss_curves, ticks
from deltatune.report.sites import adapter_map
from deltatune.report.words import duration, share, size


class Page(HTMLParser):
    """Remembers what a page refers to and whether its tags close."""

    VOID = {"meta", "link", "br", "img", "input", "hr"}

    def __init__(self, text):
        super().__init__()
        self.open, self.links = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("name", ["lora", "prefix", "classifier"])
def test_the_page_is_whole_and_needs_nothing_from_elsewhere(request, name):
    text = (request.getfixturevalue(name) / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert page.links == []
    assert not re.search(r"https?://|url\(|@import|<script", text)


def test_curves_samples_and_command_are_on_the_page(lora):
    text = (lora / "report.html").read_text()
    assert text.count("<polyline") == 3  # training raw and smoothed, evaluation
    assert text.count("<circle") == 3  # before, and at steps 2 and 4
    assert "settings.json" in text
    assert "method=lora" in text or "deltatune train" in text


def test_text_of_a_sample_cannot_become_markup(lora, tmp_path):
    from deltatune.report.page import render
    from deltatune.train import TrainResult, TrainSettings
    from deltatune.train.result import Sample

    settings = TrainSettings(model_name_or_path="<b>demo</b>")
    sample = Sample("<script>alert(1)</script>", ("a & b",), None, "</main>")
    metrics = json.loads((lora / "metrics.json").read_text())
    result = TrainResult(
        tmp_path, settings, nn.Linear(2, 2), None, steps=1, metrics=metrics, history=[], samples=[sample]
    )
    text = render(result, "deltatune train '<i>'")
    assert Page(text).open == []
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def tiny_t5():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=16, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4)
    return T5ForConditionalGeneration(config)


def cells(place):
    return [c for stack in place.stacks for row in stack.rows.values() for c in row.values()]


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_2_SEQ_LM"),
        LoraConfig(r=2, target_modules=["q"], modules_to_save=["shared"], task_type="SEQ_2_SEQ_LM"),
        PrefixTuningConfig(num_virtual_tokens=3, sites="all", task_type="SEQ_2_SEQ_LM"),
        PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_2_SEQ_LM"),
        PromptEncoderConfig(num_virtual_tokens=3, task_type="SEQ_2_SEQ_LM"),
    ],
)
def test_the_map_counts_every_trained_parameter_once(config):
    model = get_peft_model(tiny_t5(), config)
    place = adapter_map(model)
    trained, total = model.get_nb_trainable_parameters()
    assert (place.trained, place.parameters) == (trained, total)
    assert sum(c.trained for c in [*cells(place), *place.outside.values()]) == trained


def test_the_map_of_a_fully_trained_model_counts_tied_weights_once():
    model = tiny_t5()
    place = adapter_map(model)
    whole = sum(parameter.numel() for parameter in model.parameters())
    assert sum(c.trained for c in [*cells(place), *place.outside.values()]) == whole == place.trained


def test_a_prefix_sits_at_its_attentions_only():
    place = adapter_map(get_peft_model(tiny_t5(), PrefixTuningConfig(num_virtual_tokens=3, task_type="SEQ_2_SEQ_LM")))
    at = [(s.name, n, c) for s in place.stacks for n, row in s.rows.items() for c, cell in row.items() if cell.trained]
    assert [(stack, number) for stack, number, _ in at] == [("decoder.block", 0), ("decoder.block", 1)]
    assert all(column.endswith("SelfAttention.prefix") for _, _, column in at)


def test_a_model_without_blocks_has_a_map():
    place = adapter_map(get_peft_model(nn.Sequential(nn.Linear(4, 3)), LoraConfig(r=1, target_modules=["0"])))
    assert [cell.trained for cell in place.outside.values()] == [7]


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
def test_ticks_are_even_and_cover_the_range(one, two):
    low, high = sorted((one, two))
    found = ticks(low, high, 5)
    step = found[1] - found[0]
    assert found[0] <= low + step / 100
    assert found[-1] >= high - step / 100
    assert all(abs(b - a - step) < step / 100 for a, b in itertools.pairwise(found))
    assert len(found) <= 8


def test_curves_without_losses_are_empty_and_bad_values_are_left_out():
    assert loss_curves([]) == ""
    text = loss_curves([{"step": 1, "loss": float("nan")}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": 2.0}])
    assert "nan" not in text


def test_numbers_in_words():
    assert (size(999), size(1500), size(2.5e6)) == ("999 B", "1.5 KB", "2.5 MB")
    assert (duration(2.5), duration(42), duration(185), duration(7800)) == ("2.5 s", "42 s", "3 min 05 s", "2 h 10 min")
    assert (share(1, 3), share(0, 3), share(1, 250_000)) == ("33 %", "0 %", "0.0004 %")
