"""The benchmarks of loading run, and write what they print."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="measures memory through /proc")
@pytest.mark.parametrize("name", ["load", "billion"])
def test_a_quick_run_writes_its_figures(tmp_path, name):
    command = [
        sys.executable,
        f"{ROOT}/benchmarks/{name}.py",
        "--quick",
        "--json",
        f"{tmp_path}/x.json",
        "--folder",
        str(tmp_path),
    ]
    run = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["benchmark"] == name
    assert all(row["own MB"] >= 0 and row["mapped MB"] >= 0 for row in found["rows"])
    by = {row["method"]: row for row in reversed(found["rows"])} if name == "load" else {}
    if by:  # the whole prior has 32 MB
        assert by["torch.load of the four .pt files"]["own MB"] > 30 > 1 > by["from_pretrained, verify=False"]["own MB"]
    else:  # the claims about memory hold at every size
        assert [claim["met"] for claim in found["claims"]] == [True] * 4
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
