"""Adapters on a base in tensor parallel are those of one process: outputs, gradients, training, files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from torch import nn

from deltatune.bases.sliced import SlicedLinear, style_of
from tests.train import toys

ROUNDING = 1e-11  # float64, with a step through float32 in Llama's norms
METHODS = ("lora", "head", "dora", "pissa", "ia3", "oft", "vera")


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What two processes found, by rank."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("needs torch.distributed with gloo")
    pytest.importorskip("transformers.distributed.tensor_parallel")
    folder = tmp_path_factory.mktemp("tensor_parallel")
    base = toys.llama(folder / "base")
    script = Path(__file__).with_name("tensor_parallel.py")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script), str(base), str(folder)],
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_an_adapter_on_slices_is_that_on_the_whole(told, name):
    for found in (one[name] for one in told):
        assert found["share"] == 0.5  # it is in slices
        assert found["apart"] == 0  # and the adapter is not: every process has the same
        assert found["largest"] > 1e-3
        for what in ("losses", "gradients", "outputs", "reloaded"):
            assert found[what] < ROUNDING, (what, found)
        assert found["disabled"] == 0  # bit for bit the base
        assert found["written"] == 0  # generate gives the same tokens
        assert found["merge"] == 0  # refused, as of any base in shards


@pytest.mark.slow
def test_dropout_falls_alike_in_all_processes(told):
    for one in told:
        assert one["dropout"]["apart"] == 0 < one["dropout"]["moved"]


@pytest.mark.slow
def test_what_cannot_be_adapted_in_slices_is_refused_and_the_model_left_as_it_was(told):
    for refused in (one["refused"] for one in told):
        assert "each process has some of the heads and prefix_tuning is trained for all" in refused["prefix"]
        assert "'model.embed_tokens' is a Embedding in tensor parallel" in refused["embedding"]
        assert "'lm_head' is a Linear in tensor parallel" in refused["whole"]
        assert "the processes that share it draw different random numbers" in refused["seeds"]


def test_other_layers_with_a_forward_of_their_own_are_not_taken_for_slices():
    layer = nn.Linear(3, 4)
    kept = layer.forward
    layer.forward = lambda x: kept(x)
    assert style_of(layer) is None and not SlicedLinear.fits(layer)
