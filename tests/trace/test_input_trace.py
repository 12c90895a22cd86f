"""What a trace, an inspection and the status say of a prompt."""

import pytest

from deltatune import get_model_status
from deltatune.inspect.adapter import inspect_adapter
from deltatune.trace import example, trace
from deltatune.trace.page import as_page
from deltatune.trace.report import TraceReport


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning", "multitask_prompt_tuning"])
@pytest.mark.parametrize("architecture", ["t5", "gpt2", "bert"])
def test_the_stop_of_a_prompt_names_rows_and_places(method, architecture, tmp_path):
    model, batch = example(method, architecture, num_virtual_tokens=4)
    report = trace(model, batch)
    (stop,) = report.inputs
    both = architecture == "t5" and method == "multitask_prompt_tuning"
    trained = [p for p in report.gradient.others if "prompt_encoder" in p.name]
    assert stop.parameters and not trained
    assert stop.rows == [8 if both else 4, 32] and list(stop.sides.values()) == [4] * (2 if both else 1)
    for path in stop.sides:
        model.get_base_model().get_submodule(path)
    summary = next(stop.summary for stop in report.stops if stop.name == "prompt")
    assert "7 tokens become 11, outputs keep 7" in summary
    assert not report.dead and summary.split(":")[0] in as_page(report).replace("<wbr>", "")
    assert TraceReport.from_dict(report.to_dict()) == report

    assert get_model_status(model).trainable_params == model.get_nb_trainable_parameters()[0]
    model.save_pretrained(tmp_path)
    facts = inspect_adapter(tmp_path)
    assert facts.problems == [] and facts.virtual_tokens == 4
