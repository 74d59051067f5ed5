"""The transfer grid: cells in order, resumed where it stopped, chosen on validation rows only, reported as they are."""

import csv
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_examples import EXAMPLES, parquet

slow = pytest.mark.slow  # a minute and a half of interpreters that start

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


@slow
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
    assert "`auto` chose" in printed
    plain = [float(r["nll"]) for r in found if r["stage"] == "final" and r["method"] == "plain"]
    assert f"{sum(plain) / 2:.3f} ±" in printed
    assert "validation chose" in printed
    for name in ("comparison", "scale", "reliability_n30"):
        assert (folder / "figures" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"

    searched = rows(folder / "results_auto.csv")
    for final in (r for r in found if r["method"] == "low rank, auto"):  # so short a training is not checked
        mine = [r for r in searched if r["seed"] == final["seed"]]
        assert [r["part"] for r in mine] == ["path"] * 13
        assert final["scale"] in {r["scale"] for r in mine}

    bins = rows(folder / "results_reliability.csv")
    for final in (r for r in found if r["stage"] == "final"):  # each diagram is of the test images and has the ECE of its row
        mine = [b for b in bins if all(b[k] == final[k] for k in ("method", "n", "seed"))]
        counts = [int(b["count"]) for b in mine]
        assert sum(counts) == 40
        gaps = [c * abs(float(b["accuracy"]) - float(b["confidence"])) for c, b in zip(counts, mine, strict=True)]
        assert sum(gaps) / 40 == pytest.approx(float(final["ece"]), abs=1e-4)
        right = sum(c * float(b["accuracy"]) for c, b in zip(counts, mine, strict=True))
        assert right / 40 == pytest.approx(float(final["accuracy"]), abs=1e-4)


@slow
def test_a_report_of_an_unfinished_grid_names_what_is_missing(folder, tmp_path):
    results = folder / "results.csv"
    kept = [line for line in results.read_text().splitlines() if ",final,plain,30,1," not in line]
    (tmp_path / "part.csv").write_text("\n".join(kept) + "\n")
    assert "1 final rows are missing (plain fine-tuning, weight decay seed 1, ...)" in run(
        folder, "report.py", tmp_path / "part.csv"
    )


@slow
def test_an_unknown_key_is_refused(folder):
    command = [sys.executable, str(GRID / "run.py"), str(folder / "tiny.toml"), "--list", "--only", "colour=red"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=folder)
    assert done.returncode != 0
    assert "the names are stage, method, n, seed, strength" in done.stderr


@slow
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


@slow
def test_the_path_of_auto_is_shown_beside_whole_trainings(folder, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    options = (folder / "tiny.toml", "--n", "30", "--work", folder / "work")
    printed = run(folder, "auto_path.py", *options, "--scales", "1", "1000").splitlines()
    assert [line.split(":")[0] for line in printed] == ["scale 1", "scale 1000"]
    path = run(folder, "auto_path.py", *options, "--longer", "2")
    assert "on 6 held-out examples" in path
    assert len(re.findall(r"\S+: \d\.\d{3}(?:, |$)", path, re.MULTILINE)) == 13


# --------------------------------------------------------------------------------------------------------- the tables
@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(GRID))
    return importlib.import_module("report")


PLACES = [("cifar", "benchmarks/transfer/README.md"), ("cifar", "README.md"), ("cifar", "docs/scale.md")]


@pytest.mark.parametrize(
    ("results", "name"), [*PLACES, *(("cifar_" + s, "benchmarks/transfer/README.md") for s in ("trial", "long"))]
)
def test_the_tables_in_the_texts_are_those_of_the_rows(report, results, name):
    found = report.read(GRID / "results" / f"{results}.csv")
    text = (report.ROOT / name).read_text()
    tables = report.WRITTEN[results][name]
    said = report.written(text, results, tables(found))
    assert said == text, f"run benchmarks/transfer/report.py benchmarks/transfer/results/{results}.csv --write"
    nll = [float(r["nll"]) for r in found if (r["stage"], r["method"], r["n"]) == ("final", "plain", "500")]
    assert len(nll) == 3
    assert f"{sum(nll) / 3:.3f}" in text
    changed = text.replace(f"{sum(nll) / 3:.3f}", "0.999")  # by hand
    assert report.written(changed, results, tables(found)) != changed


def test_a_text_without_a_place_for_the_tables_is_refused(report):
    with pytest.raises(SystemExit, match="not one place"):
        report.written("no marks here", "cifar", "| a table |")


def row(stage, method, seed, nll, *, strength=0.0, scale="", n=10):
    known = {"stage": stage, "method": method, "n": str(n), "seed": str(seed), "nll": str(nll), "strength": str(strength)}
    return known | {"scale": str(scale), "learning_rate": "0.1", "accuracy": "0.5", "ece": "0.1", "source_accuracy": "0.9"}


def test_the_regret_is_the_distance_from_the_best_scale_on_the_test_set(report):
    found = [row("oracle", "low rank", seed, nll, strength=s) for seed in (0, 1) for s, nll in ((1, 2.0), (100, 1.5 + seed))]
    found += [row("oracle", "low rank", 2, 0.1, strength=1)]  # not every scale yet: no best one
    found += [row("final", "low rank", seed, 2.0, strength=1, scale=1) for seed in (0, 1, 2)]
    found += [row("final", "low rank, auto", seed, 1.6, scale=31.6) for seed in (0, 1)]
    assert report.regrets(found, 10, "low rank") == {0: 0.5, 1: 0.0}
    assert report.regrets(found, 10, "low rank, auto") == pytest.approx({0: 0.1, 1: -0.4})
    told = report.regret_table(found)
    assert "| 10 | 0 | 1: 2.000, 100: 1.500 | 1 | +0.500 | 32 | +0.100 |" in told
    assert "validation grid: median +0.250, from +0.000 to +0.500 nats (2 cells)" in told


def test_the_overview_has_the_numbers_that_are_complete_alone(report):
    found = [
        row("final", m, seed, nll + seed, n=n)
        for m, nll in (("plain", 1.0), ("low rank", 2.0))
        for seed in (0, 1)
        for n in (5, 7)
    ]
    assert report.complete(found) == [5, 7]
    assert report.complete(found[:-1]) == [5]
    told = report.overview(found[:-1])
    assert "| 5 | **1.500** ± 0.707 | 2.500 ± 0.707 |" in told
    assert "| 7 |" not in told
    assert "| 5 | **1.000** | 2.000 |" in report.overview([r for r in found if r["seed"] == "0"])


def test_reliability_diagrams_of_several_seeds_are_put_together(report):
    lines = [
        {"method": "plain", "n": "10", "seed": "0", "lower": "0.2", "count": "3", "confidence": "0.25", "accuracy": "0"},
        {"method": "plain", "n": "10", "seed": "1", "lower": "0.2", "count": "1", "confidence": "0.21", "accuracy": "1"},
        {"method": "plain", "n": "10", "seed": "1", "lower": "0.933333", "count": "4", "confidence": "0.95", "accuracy": "0.5"},
    ]
    (drawn,) = report.diagrams(lines, 10).values()
    assert sum(drawn.count) == 8
    assert (drawn.count[3], drawn.confidence[3], drawn.accuracy[3]) == (4, pytest.approx(0.24), 0.25)
    assert drawn.expected_calibration_error == pytest.approx((4 * 0.01 + 4 * 0.45) / 8)


def test_reliability_is_drawn_only_where_every_method_has_its_diagram(report, tmp_path):
    line = "{},10,0,0.200000,0.266667,3,0.250000,0.500000\n"
    found = [row("final", method, 0, 2.0) for method in ("plain", "low rank")]
    names = {}
    for methods in (["plain"], ["plain", "low rank"]):
        text = "method,n,seed,lower,upper,count,confidence,accuracy\n" + "".join(line.format(m) for m in methods)
        (tmp_path / "some_reliability.csv").write_text(text)
        names[len(methods)] = {p.name for p in report.draw(tmp_path / "some.csv", found, tmp_path, "")}
    assert names[1] == {"comparison.png"}
    assert names[2] == {"comparison.png", "reliability_n10.png"}


@pytest.mark.parametrize("name", ["cifar", "cifar_trial", "cifar_long"])
def test_the_scale_of_each_auto_cell_is_the_best_of_its_whole_trainings(name):
    kept, finals = rows(GRID / "results" / f"{name}_auto.csv"), rows(GRID / "results" / f"{name}.csv")
    finals = [r for r in finals if r["stage"] == "final" and r["method"] == "low rank, auto"]
    assert finals
    for final in finals:
        mine = [r for r in kept if all(r[k] == final[k] for k in ("method", "n", "seed"))]
        assert sum(r["part"] == "path" for r in mine) == 13
        whole = {float(r["scale"]): float(r["nll"]) for r in mine if r["part"] == "whole training"}
        assert 1 <= len(whole) <= 4
        assert whole[float(final["scale"])] == min(whole.values())


def test_a_candidate_that_diverged_is_not_chosen(monkeypatch):
    monkeypatch.syspath_prepend(str(GRID))
    grid = importlib.import_module("run")
    found = [row("tune", "plain", 0, nll, strength=s) for s, nll in ((1, "nan"), (2, 1.5), (3, 1.7))]
    assert grid.chosen(found, "plain", 10, [(1.0, 0.1), (2.0, 0.1), (3.0, 0.1)]) == (2.0, 0.1)
    assert grid.chosen(found, "plain", 10, [(1.0, 0.1), (4.0, 0.1)]) is None
