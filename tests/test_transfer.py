"""The transfer grid: cells in order, resumed where it stopped, chosen on validation rows only, reported as they are."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from test_examples import EXAMPLES, parquet

pytestmark = pytest.mark.slow  # a minute and a half of interpreters that start

GRID = Path(__file__).parent.parent / "benchmarks" / "transfer"

CONFIG = """
task = "cifar"
seeds = [0, 1]

[source]
dataset = "{folder}/source"
weights = "{folder}/weights.safetensors"
steps = 6
batch_size = 8
learning_rate = 0.02
start = 0.0
rank = 2
variance_floor = 1e-6
augment = true

[target]
dataset = "{folder}/target"
numbers = [30]
steps = [2]
batch_size = 8
learning_rates = [0.02]
augment = true

[strengths]
plain = [0.001, 0.01]
"low rank" = [1, 1000]

[auto]
"low rank, auto" = "low rank"

[oracle]
seeds = [0]
"low rank" = [1, 1000]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A source task, weights, a target task and a configuration, all of noise."""
    import torch
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("transfer")
    sys.path.insert(0, str(EXAMPLES))
    from cifar_resnet20 import ResNet20

    sys.path.remove(str(EXAMPLES))
    torch.manual_seed(0)
    save_file(ResNet20(10).state_dict(), path / "weights.safetensors")
    parquet(path / "source", classes=10, column="other", rows=32)
    parquet(path / "target", classes=20, column="coarse_label", rows=40)
    (path / "tiny.toml").write_text(CONFIG.format(folder=path.as_posix()))
    return path


def run(folder, script, *arguments):
    command = [sys.executable, str(GRID / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_grid_runs_resumes_and_is_reported(folder, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    results = folder / "results.csv"
    options = (folder / "tiny.toml", "--results", results, "--work", folder / "work", "--workers", "1")
    named = run(folder, "run.py", *options, "--list")
    assert named.count("missing") == 4 + 2  # candidates and frozen starts; nothing else can be named yet

    run(folder, "run.py", *options)
    found = rows(results)
    count = {stage: sum(r["stage"] == stage for r in found) for stage in ("tune", "final", "oracle")}
    assert count == {"tune": 4, "final": 2 + 2 * 2 + 2, "oracle": 2}
    for method in ("plain", "low rank"):  # the finals are the candidate with the lowest validation NLL
        tuned = {r["strength"]: float(r["nll"]) for r in found if r["stage"] == "tune" and r["method"] == method}
        finals = {r["strength"] for r in found if r["stage"] == "final" and r["method"] == method}
        assert finals == {min(tuned, key=tuned.get)}
    same = {(r["seed"], r["strength"]): r["nll"] for r in found if r["method"] == "low rank" and r["stage"] == "final"}
    for r in found:  # the same cell measured twice gives the same number
        if r["stage"] == "oracle" and (r["seed"], r["strength"]) in same:
            assert r["nll"] == same[r["seed"], r["strength"]]

    before = results.read_text()
    run(folder, "run.py", *options)
    assert results.read_text() == before  # nothing was missing
    lines = before.splitlines()
    lost = next(line for line in lines if ",final,plain," in line)
    results.write_text("\n".join(line for line in lines if line != lost) + "\n")
    run(folder, "run.py", *options)
    again = results.read_text().splitlines()[-1]
    assert [again.split(",")[i] for i in range(8)] == [lost.split(",")[i] for i in range(8)]  # key, accuracy and NLL
    assert len(results.read_text().splitlines()) == len(lines)

    printed = run(folder, "report.py", results, "--figures", folder / "figures")
    assert "n = 30, seeds 0, 1" in printed
    assert "auto chose" in printed
    plain = [float(r["nll"]) for r in found if r["stage"] == "final" and r["method"] == "plain"]
    assert f"{sum(plain) / 2:.3f} ±" in printed
    assert "validation chose" in printed
    assert (folder / "figures" / "comparison.png").read_bytes()[:4] == b"\x89PNG"


def test_a_report_of_an_unfinished_grid_names_what_is_missing(folder, tmp_path):
    results = folder / "results.csv"
    kept = [line for line in results.read_text().splitlines() if ",final,plain,30,1," not in line]
    (tmp_path / "part.csv").write_text("\n".join(kept) + "\n")
    assert "1 final rows are missing (plain fine-tuning, weight decay seed 1, ...)" in run(
        folder, "report.py", tmp_path / "part.csv"
    )


def test_an_unknown_key_is_refused(folder):
    command = [sys.executable, str(GRID / "run.py"), str(folder / "tiny.toml"), "--list", "--only", "colour=red"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=folder)
    assert done.returncode != 0
    assert "the names are stage, method, n, seed, strength" in done.stderr


def test_the_prior_with_decay_is_the_normalised_product_of_the_two(folder, monkeypatch):
    import torch
    from priors_for_tests import random_prior

    monkeypatch.syspath_prepend(str(GRID))
    from with_decay import with_decay

    prior, variance = random_prior(0, 3, scale=4.0), 0.3

    def dense(p):
        flat = torch.cat([t.reshape(3, -1).double() for t in p.deviations.values()], dim=1)
        mean, spread = (torch.cat([t.flatten().double() for t in kind.values()]) for kind in (p.mean, p.variance))
        c = p.config
        diagonal = c.scale * c.diagonal_weight * spread + c.eps
        return mean, diagonal.diag() + c.scale * c.low_rank_weight * flat.T @ flat

    mean, covariance = dense(prior)
    found_mean, found = dense(with_decay(prior, variance))
    wanted = torch.linalg.inv(torch.linalg.inv(covariance) + torch.eye(len(mean)).double() / variance)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found_mean, wanted @ torch.linalg.solve(covariance, mean), rtol=1e-5, atol=1e-6)

    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    printed = run(folder, "with_decay.py", folder / "tiny.toml", "--n", "30", "--scale", "10", "--work", folder / "work")
    assert "NLL " in printed
