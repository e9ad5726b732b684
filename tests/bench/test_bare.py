"""The GPU bench must run on a machine that has torch and nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

#: Runs `python -m bench.gpu` in an interpreter that finds nothing of these.
BARE = """
import runpy, sys
MISSING = set(sys.argv[1].split(","))
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in MISSING else self.finder.find_spec(name, path, target)
sys.meta_path = [Without(finder) for finder in sys.meta_path]
sys.argv = ["bench.gpu", *sys.argv[2:]]
try:
    runpy.run_module("bench.gpu", run_name="__main__", alter_sys=True)
finally:
    print("LOADED", sorted(MISSING & set(sys.modules)))
"""
MISSING = "flwr,ray,pydantic,pydantic_core,typer,rich,sklearn,mlxtend,torchvision,safetensors,jinja2,scipy,pandas,matplotlib,PIL"


def bare(tmp_path, *arguments):
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-W", "ignore", "-c", BARE, MISSING, *arguments, "--json", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # sizes so small that threads would only wait for each other
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    assert "LOADED []" in done.stdout
    return json.loads(out.read_text())["rows"]


def test_with_torch_alone_it_trains_fused_cohorts_that_agree_with_the_loop_written_by_hand(tmp_path):
    rows = bare(tmp_path, "--device", "cpu", "--models", "cnn", "--clients", "6", "--samples", "12", "--rounds", "1")
    found = {row["precision"]: row for row in rows}
    assert found["float32"]["path"] == "fused"
    assert found["float32"]["difference"] < 1e-4  # of the largest number in the mean update
    assert found["float32"]["difference"] < found["bfloat16"]["difference"] < 0.3  # the option does something, and not too much


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_blocks_fit_into_the_free_memory(tmp_path):
    rows = bare(tmp_path, "--models", "cnn", "cnn-large", "--clients", "200", "--rounds", "1", "--precision", "float32")
    total = torch.cuda.get_device_properties(0).total_memory / 1024**2
    for row in rows:
        assert row["difference"] < 1e-3
        assert 0 < row["peak_mib"] < total
        assert row["block"] <= row["largest_block"] <= 200
