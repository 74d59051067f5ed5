"""The demo's quick form: the same path, few steps. What it prints is what it measured."""

import json
import re
import subprocess
import sys
from statistics import fmean, stdev

import pytest

pytest.importorskip("timm")

from prior_hub import PriorModel
from prior_hub.demo import METHODS, run_demo


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return run_demo(tmp_path_factory.mktemp("demo"), seeds=2, quick=True, progress=False)


def test_the_prior_is_stored_with_its_card_and_loads_back(demo):
    prior = PriorModel.from_pretrained(demo.prior)
    assert prior.rank == 4
    assert all("classifier" not in name for name in prior.mean)
    assert "library_name: prior-hub" in (demo.prior / "README.md").read_text()


def test_every_method_is_run_on_every_n_and_seed(demo):
    expected = {(method, n, seed) for method in METHODS for n in (10, 20) for seed in (0, 1)}
    assert {(row["method"], row["n"], row["seed"]) for row in demo.rows} == expected
    assert len(demo.rows) == len(expected)


def test_the_table_holds_the_means_and_standard_deviations_of_the_runs(demo):
    runs = json.loads(demo.results.read_text())["runs"]
    for method in METHODS:
        line = next(line for line in demo.table.splitlines() if method in line)
        for n in (10, 20):
            for key, factor, digits in (("accuracy", 100, 1), ("nll", 1, 3)):
                values = [factor * run[key] for run in runs if run["method"] == method and run["n"] == n]
                mean, spread = f"{fmean(values):.{digits}f}", f"{stdev(values):.{digits}f}"
                assert re.search(rf"{re.escape(mean)}\s*±\s*{re.escape(spread)}", demo.table), (method, n, key)
        assert line


def test_a_figure_is_written(demo):
    assert demo.figure.read_bytes().startswith(b"\x89PNG")


def test_no_reported_image_was_used_to_choose_settings():
    from prior_hub.demo import _tasks

    target = _tasks(16)[1]
    parts = [set(target.development), set(target.validation), set(target.training), set(target.test)]
    assert sum(map(len, parts)) == len(set.union(*parts))


def test_the_command_runs_it(tmp_path):
    command = [sys.executable, "-m", "prior_hub.cli", "demo", "--quick", "--seeds", "1", "--output", str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert all(method in result.stdout for method in METHODS)
    assert (tmp_path / "out" / "demo.png").is_file()


def test_without_matplotlib_the_error_says_what_to_install(tmp_path):
    code = "import sys; sys.modules['matplotlib'] = None; from prior_hub.cli import main; sys.exit(main(['demo', '--quick']))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert result.returncode == 1
    assert "pip install 'prior-hub[plots,vision]'" in result.stderr
