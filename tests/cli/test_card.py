"""The model card that `train` leaves: metadata that the hub's own library reads, scores, and nobody's text lost."""

import json

import pytest
from huggingface_hub import ModelCard

from deltatune.report.card import MARK
from tests.cli.conftest import trained


@pytest.mark.parametrize(
    ("name", "pipeline", "library"),
    [("lora", "text2text-generation", "peft"), ("classifier", "text-classification", "peft")],
)
def test_the_hubs_library_reads_it(request, name, pipeline, library):
    folder = request.getfixturevalue(name)
    data = ModelCard.load(folder / "README.md").data
    assert (data.pipeline_tag, data.library_name) == (pipeline, library)
    assert "deltatune" in data.tags
    after = json.loads((folder / "metrics.json").read_text())["after"]
    scores = {result.metric_name: result.metric_value for result in data.eval_results or []}
    expected = {key.replace("_", " "): pytest.approx(value, abs=1e-6) for key, value in after.get("eval", {}).items()}
    assert scores == expected
    assert bool(scores) == (name == "lora")  # the classifier's run had nothing to evaluate on


def test_no_folder_of_this_machine_is_in_it(lora, t5, rows):
    text = (lora / "README.md").read_text()
    for folder in (t5, rows.parent, lora.parent):
        assert str(folder) not in text
    assert "train.jsonl" in text and t5.name in text


def test_a_card_of_the_users_own_stays(usual, tmp_path):
    """Saving may complete its metadata; its text is kept to the letter, in a first run and in a second one."""
    own = "# Mine\n\nWritten by hand.\n"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text(f"---\nlicense: mit\n---\n{own}")
    words = [*usual, "method=lora", "--overwrite_output_dir"]
    folder = trained(tmp_path / "mine", *words)
    text = (folder / "README.md").read_text()
    assert text.endswith(own) and "license: mit" in text and MARK not in text
    ours = trained(tmp_path / "ours", *words)
    first = (ours / "README.md").read_text()
    assert MARK in first
    (ours / "README.md").write_text(first.replace(MARK, "").replace("# ours", "# kept"))
    trained(ours, *words)
    assert "# kept" in (ours / "README.md").read_text()
