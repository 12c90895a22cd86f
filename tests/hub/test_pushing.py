"""Adapters into a repository."""

import json
import os
import subprocess
import sys

import pytest
import torch

from deltatune import LoraConfig, PeftModel
from deltatune.errors import PeftWarning, SaveError
from tests.core.test_storage import INPUTS, WEIGHTS, adapted
from tests.core.tiny import logits, tiny
from tests.hub.server import TOKEN


def test_a_push_is_one_commit_that_loads_again(hub):
    model = adapted()
    told = model.push_to_hub("me/new", private=True, token=TOKEN, endpoint=hub.url, commit_message="first")
    repo = hub.repos["me/new"]
    assert repo.private and repo.messages == ["", "first"] and repo.refs["main"] in str(told)
    assert sorted(repo.main) == ["README.md", "adapter_config.json", WEIGHTS]
    loaded = PeftModel.from_pretrained(tiny("llama"), "me/new", token=TOKEN, endpoint=hub.url)
    assert torch.equal(logits(loaded, INPUTS), logits(model, INPUTS))


def test_a_push_goes_to_the_branch_it_is_told_and_under_the_users_name(hub):
    adapted().push_to_hub("short", token=TOKEN, endpoint=hub.url)
    before = hub.repos["me/short"].refs["main"]
    adapted(1).push_to_hub("short", token=TOKEN, endpoint=hub.url, revision="dev")
    assert hub.repos["me/short"].refs["main"] == before
    loaded = PeftModel.from_pretrained(tiny("llama"), "me/short", revision="dev", endpoint=hub.url)
    assert torch.equal(logits(loaded, INPUTS), logits(adapted(1), INPUTS))


def test_a_card_of_the_repository_is_left_alone_and_tags_are_for_a_new_one(hub):
    adapted().push_to_hub("me/new", token=TOKEN, endpoint=hub.url, tags=["tagged: here"])
    repo = hub.repos["me/new"]
    assert b'- "tagged: here"' in repo.main["README.md"] and b"library_name: peft" in repo.main["README.md"]
    repo.commit({**repo.main, "README.md": b"mine"})
    adapted(1).push_to_hub("me/new", token=TOKEN, endpoint=hub.url)
    assert repo.main["README.md"] == b"mine"


def test_files_that_a_push_makes_stale_go_with_it(hub):
    repo = hub.add("me/new")
    repo.commit({"adapter_model.bin": b"old", "notes.txt": b"mine"})
    adapted().push_to_hub("me/new", token=TOKEN, endpoint=hub.url)
    assert sorted(repo.main) == ["README.md", "adapter_config.json", WEIGHTS, "notes.txt"]


def test_chosen_adapters_and_a_config_alone_are_pushed(hub):
    model = adapted()
    model.add_adapter("other", LoraConfig(r=2))
    model.push_to_hub("me/one", selected_adapters=["other"], token=TOKEN, endpoint=hub.url)
    assert f"other/{WEIGHTS}" in hub.repos["me/one"].main and WEIGHTS not in hub.repos["me/one"].main
    model.peft_config["other"].push_to_hub("me/config", token=TOKEN, endpoint=hub.url)
    (name,) = hub.repos["me/config"].main
    assert json.loads(hub.repos["me/config"].main[name])["r"] == 2


@pytest.mark.parametrize("name", ["./x", "/x", "a/b/c", "x\\y", "~/x", "a/b/", "..", ""])
def test_nothing_is_pushed_to_a_path(hub, name):
    with pytest.raises(SaveError, match="is a path"):
        adapted().push_to_hub(name, token=TOKEN, endpoint=hub.url)
    assert hub.requests == []


def test_a_broken_adapter_is_not_pushed(hub):
    model = adapted()
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_A" in name).fill_(float("nan"))
    with pytest.raises(SaveError, match="not finite"):
        model.push_to_hub("me/new", token=TOKEN, endpoint=hub.url)
    assert hub.repos == {}


PROGRAM = """
import sys, torch, transformers
from deltatune import AutoPeftModel, AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from deltatune.errors import SaveError
from tests.core.test_storage import INPUTS, logits
base = transformers.AutoModelForCausalLM.from_pretrained("someone/base", revision="v1")
model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM"), revision="v1").eval()
for name, p in model.named_parameters():
    torch.nn.init.normal_(p) if "lora_B" in name else None
expected = logits(model, INPUTS)
model.push_to_hub("me/auto", token=sys.argv[1])
loaded = AutoPeftModelForCausalLM.from_pretrained("me/auto")
assert torch.equal(logits(loaded, INPUTS), expected)
assert loaded.peft_config["default"].base_model_name_or_path == "someone/base"
assert torch.allclose(logits(loaded.merge_and_unload(), INPUTS), expected, atol=1e-5)
assert torch.equal(logits(AutoPeftModel.from_pretrained("me/auto"), INPUTS), expected)
try:
    model.push_to_hub("me/auto", token="hf_wrong")
except SaveError as error:
    print(error)
"""


def test_base_and_adapter_come_from_their_repositories_at_their_revisions(hub, tmp_path):
    """HF_ENDPOINT in a process of its own, as users set it."""
    base = hub.add("someone/base")
    tiny("llama").save_pretrained(tmp_path / "base")
    base.add_folder(tmp_path / "base", "v1")
    tiny("llama", seed=5).save_pretrained(tmp_path / "later")
    base.add_folder(tmp_path / "later", "main")
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": os.pathsep.join(["src", ".", *sys.path])}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, TOKEN], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "was not written" in done.stdout and "token" in done.stdout


def test_the_users_own_card_gets_what_its_head_lacks_and_keeps_its_text(tmp_path):
    model = adapted()
    model.create_or_update_model_card(tmp_path)
    assert (tmp_path / "README.md").read_text().startswith("---\nlibrary_name: peft\n")
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags:\n- mine\n---\n\n# Mine\n---\nkept\n")
    model.create_or_update_model_card(tmp_path)
    assert (tmp_path / "README.md").read_text() == (
        "---\nlicense: mit\ntags:\n- mine\nlibrary_name: peft\n---\n\n# Mine\n---\nkept\n"
    )
    (tmp_path / "README.md").write_text("no head")
    model.create_or_update_model_card(tmp_path)
    assert (tmp_path / "README.md").read_text().endswith("---\n\nno head")
    (tmp_path / "README.md").write_bytes(b"\xff\xfe")
    with pytest.warns(PeftWarning, match="left as it is"):
        model.create_or_update_model_card(tmp_path)
