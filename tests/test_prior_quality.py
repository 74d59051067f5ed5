"""The study of priors: what each change does to a prior, what is chosen on which images, and that it resumes and reports."""

import csv
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import pytest
import torch
from priors_for_tests import random_prior
from scipy import stats

PROGRAM = Path(__file__).parent.parent / "benchmarks" / "transfer" / "prior_quality.py"


@pytest.fixture(scope="module")
def study():
    sys.path.insert(0, str(PROGRAM.parent))
    import prior_quality

    sys.path.remove(str(PROGRAM.parent))
    return prior_quality


# --------------------------------------------------------------------------------------------- what the changes do
def marginal(prior):
    """name -> diagonal of Sigma, from the definition."""
    config = prior.config
    found = {}
    for name, variance in prior.variance.items():
        low_rank = prior.deviations[name].double().square().sum(0) if prior.rank else 0.0
        found[name] = (
            config.scale * (config.diagonal_weight * variance.double() + config.low_rank_weight * low_rank) + config.eps
        )
    return found


def everything(tensors):
    return torch.cat([t.flatten() for t in tensors.values()])


def test_levelled_tensors_have_one_mean_variance_or_one_in_proportion_to_their_weights(study):
    prior = random_prior(rank=4, scale=1.0, eps=0.0)
    for variance in marginal(study.levelled(prior, relative=False)).values():
        assert float(variance.mean()) == pytest.approx(1e-4, rel=1e-4)
    relative = marginal(study.levelled(prior, relative=True))
    for name, mean in prior.mean.items():
        assert float(relative[name].mean()) == pytest.approx(1e-4 * float(mean.double().square().mean()), rel=1e-4)
    shape = {n: v / v.mean() for n, v in marginal(prior).items()}  # within a tensor nothing changes
    for name, variance in relative.items():
        torch.testing.assert_close(variance / variance.mean(), shape[name], rtol=1e-4, atol=0)


def test_the_isotropic_prior_has_the_same_total_variance_and_the_shuffled_one_the_same_variances_elsewhere(study):
    prior = random_prior(rank=4, scale=1.0, eps=0.0)
    flat = study.isotropic(prior)
    (value,) = everything(flat.variance).unique()
    assert flat.rank == 0
    assert float(value) == pytest.approx(float(everything(marginal(prior)).mean()), rel=1e-6)
    mixed = study.shuffled(prior)
    for name, variance in prior.variance.items():
        assert torch.equal(mixed.variance[name].flatten().sort().values, variance.flatten().sort().values)
    assert not torch.equal(everything(mixed.variance), everything(prior.variance))


def test_floor_and_weights_are_what_they_say_and_the_rest_stays(study):
    prior = random_prior(rank=4)
    high = study.floored(prior, 1e-3)
    assert torch.equal(everything(high.variance), everything(prior.variance).clamp(min=1e-3))
    assert high.config.variance_floor == 1e-3
    heavy = study.weighted(prior, 0.5, 10.0)
    assert heavy.config.diagonal_weight == 0.5 * prior.config.diagonal_weight
    assert heavy.config.low_rank_weight == 10 * prior.config.low_rank_weight
    for changed in (high, heavy):
        assert changed.config.head_parameters == prior.config.head_parameters
        assert torch.equal(everything(changed.mean), everything(prior.mean))
        assert torch.equal(everything(changed.deviations), everything(prior.deviations))
        assert (changed.scale, changed.config.eps) == (prior.scale, prior.config.eps)
    expected = everything(marginal(random_prior(rank=4, scale=1.0, eps=0.0))).median()
    assert study.typical_variance(prior) == pytest.approx(float(expected), rel=1e-5)


# ------------------------------------------------------------------------------------------------ what is compared how
@pytest.mark.parametrize("shift", [0.0, 0.5, 1.2, 3.0])
def test_a_difference_is_bold_where_a_paired_t_test_tells_it_from_zero(study, shift):
    values = np.random.default_rng(0).normal(shift, 1.0, size=6)
    text = study.difference(values.tolist(), 6)
    assert text.startswith("**") == (stats.ttest_1samp(values, 0.0).pvalue < 0.05)
    mean, error = (float(x) for x in text.strip("*").split(" ± "))
    assert mean == pytest.approx(values.mean(), abs=1e-6)
    assert error == pytest.approx(stats.sem(values), abs=1e-6)


def test_the_candidate_is_chosen_by_development_rows_alone(study):
    plan = study.Plan(strengths=(0.1, 1.0), tuned=2)
    which = study.Prior("rank", "2")

    def row(stage, strength, source, nll, factor="rank"):
        return {
            "stage": stage,
            "factor": factor,
            "value": "2",
            "strength": f"{strength}",
            "source": f"{source}",
            "nll": f"{nll}",
        }

    rows = [row("tune", 0.1, 0, 0.5), row("tune", 0.1, 1, 0.5), row("tune", 1.0, 0, 0.3)]
    assert study.chosen(rows, which, plan) is None  # one is missing
    rows += [row("tune", 1.0, 1, 0.6), row("final", 0.1, 0, 0.0), row("tune", 0.1, 0, 0.0, factor="eps")]
    assert study.chosen(rows, which, plan) == 1.0


def test_tuning_sees_development_images_only_and_finals_learn_from_none_that_is_tested(study, monkeypatch, tmp_path):
    one = study.Study(study.QUICK, tmp_path)
    seen = {}
    monkeypatch.setattr(one, "fine_tune", lambda *args: seen.setdefault(len(seen), args) and (0.0, 0.0))
    one.tune(study.Prior("rank", "2"), 0, 0.1)
    one.final(study.Prior("rank", "2"), 0, 3, 0.1)
    tuned, final = ((set(seen[i][3]), set(seen[i][4])) for i in (0, 1))
    assert tuned[0] <= set(one.target.development)
    assert tuned[1] == set(one.target.validation)
    assert final[0] <= set(one.target.training)
    assert final[1] == set(one.target.test)
    assert not (tuned[0] | tuned[1] | final[0]) & final[1]


# ------------------------------------------------------------------------------------------------------ the whole program
def run(folder, *arguments):
    options = ("--quick", "--workers", "1", "--results", folder / "rows.csv", "--work", folder / "work")
    command = [sys.executable, str(PROGRAM), *map(str, (*options, *arguments))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def rows(folder):
    with (folder / "rows.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_it_runs_resumes_and_reports(tmp_path):
    """Two priors, two source runs; a row that is lost comes back with the same numbers."""
    run(tmp_path, "--only", "factor=default")
    found = rows(tmp_path)
    finals = 2 * len({r["strength"] for r in found if r["stage"] == "final"} | {"0.1"})  # at the chosen one and at 0.1
    assert sorted(r["stage"] for r in found) == ["final"] * finals + ["prior"] * 2 + ["tune"] * 2
    before = (tmp_path / "rows.csv").read_text()
    lost = next(line for line in before.splitlines() if line.startswith("final"))
    (tmp_path / "rows.csv").write_text("".join(line + "\n" for line in before.splitlines() if line != lost))
    assert run(tmp_path, "--list", "--only", "factor=default").count("missing") == 1
    run(tmp_path, "--only", "factor=default")
    again = (tmp_path / "rows.csv").read_text().splitlines()
    assert len(again) == len(before.splitlines())
    assert again[-1].split(",")[:8] == lost.split(",")[:8]  # key, accuracy, NLL

    run(tmp_path, "--only", "factor=variance floor", "value=1e-4")
    into = tmp_path / "TEXT.md"
    marks = ("<!-- tables: written by prior_quality.py --report -->", "<!-- tables: end -->")
    into.write_text(f"before\n{marks[0]}\nwhat stood here\n{marks[1]}\nafter\n")
    run(tmp_path, "--report", "--into", into)
    text = into.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "what stood here" not in text
    finals = [r for r in rows(tmp_path) if r["stage"] == "final" and float(r["strength"]) == 0.1]
    nll = {(r["factor"], r["source"]): float(r["nll"]) for r in finals}
    gaps = [nll["variance floor", s] - nll["default", s] for s in ("0", "1")]
    assert f"{fmean(gaps):+.4f} ± {stdev(gaps) / 2**0.5:.4f}" in text
