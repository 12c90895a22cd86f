"""The conformance tool that stands beside the project: every architecture is complete but for what is refused."""

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.long
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_architecture_is_complete_or_refused(attention, shared, tmp_path):
    tool = shared / "conformance" / "prefix_matrix.py"
    if not tool.is_file():
        pytest.skip("the conformance tool is not here; set DELTATUNE_SHARED to the folder that holds it")
    out = tmp_path / "matrix.json"
    options = [] if attention == "sdpa" else ["--attention", attention]
    command = [sys.executable, str(tool), "--package", "deltatune", "--json", str(out), "--time-limit", "300", *options]
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]  # 1 when any cell failed
    found = json.loads(out.read_text())["architectures"]
    verdicts = {each["name"]: each["verdict"] for each in found}
    assert len(verdicts) >= 95
    # Mamba has no attention; ProphetNet's decoder attends in several streams, which one prefix cannot serve.
    assert {name: verdict for name, verdict in verdicts.items() if verdict != "complete"} == {
        "mamba": "refused",
        "prophetnet": "refused",
    }
