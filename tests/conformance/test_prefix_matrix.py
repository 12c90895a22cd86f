"""The conformance tool that stands beside the project: all of transformers' attention interface is complete."""

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.long
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_architecture_of_the_attention_interface_is_complete(attention, shared, tmp_path):
    tool = shared / "conformance" / "prefix_matrix.py"
    if not tool.is_file():
        pytest.skip("the conformance tool is not here; set DELTATUNE_SHARED to the folder that holds it")
    out = tmp_path / "matrix.json"
    options = [] if attention == "sdpa" else ["--attention", attention]
    command = [sys.executable, str(tool), "--package", "deltatune", "--json", str(out), "--time-limit", "300", *options]
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]  # 1 when any cell failed
    found = json.loads(out.read_text())["architectures"]
    verdicts = {each["name"]: each["verdict"] for each in found if each["attention"] == "interface"}
    assert len(verdicts) > 70
    assert {name: verdict for name, verdict in verdicts.items() if verdict != "complete"} == {}
