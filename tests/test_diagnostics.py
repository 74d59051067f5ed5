"""Chains whose convergence is known, effective sample sizes in closed form, disagreement against a loop over pairs."""

from __future__ import annotations

import itertools
import math
import sys
import warnings

import pytest
import torch

from prior_hub import PriorNumericsError, PriorWarning
from prior_hub.inference import diagnostics
from prior_hub.inference.diagnostics import chain_diagnostics, disagreement, warn_without_variability


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def autoregressive(rho, chains, draws, functions, seed=0):
    """Stationary x_t = rho x_{t-1} + sqrt(1 - rho^2) e_t: (chains, draws, functions)."""
    e = noise(chains, draws, functions, seed=seed)
    x = e.clone()
    for t in range(1, draws):
        x[:, t] = rho * x[:, t - 1] + math.sqrt(1 - rho**2) * e[:, t]
    return x


# ------------------------------------------------------------------------------------------------------ R-hat and ESS


@pytest.mark.parametrize("chains", [1, 4])
def test_independent_chains_have_r_hat_one_and_as_many_effective_draws_as_draws(chains):
    found = chain_diagnostics(noise(chains, 1000, 20))
    assert found.r_hat_max < 1.01
    assert 0.99 < found.r_hat_median < 1.005
    assert found.share_above == 0
    assert found.ess_median == pytest.approx(1000 * chains, rel=0.1)
    assert found.remarks == ()
    assert str(found).startswith(f"{chains} chain{'s' if chains > 1 else ''} x 1000 draws, 20 functions\nR-hat at most 1.00")
    assert "note" not in str(found)


def test_separated_chains_have_a_large_r_hat_that_names_how_many():
    values = noise(4, 200, 10)
    values[2, :, :3] += 3.0
    found = chain_diagnostics(values)
    assert found.r_hat_max > 1.2
    assert 0.3 <= found.share_above < 0.8
    assert found.ess_min < 40
    separate, few = found.remarks
    assert separate.startswith(
        f"{100 * found.share_above:.0f} % of the functions have an R-hat above 1.01: chains sit in different"
    )
    assert few.startswith(f"an effective sample size of {found.ess_min:.0f} is below 100 a chain")


def test_r_hat_of_normal_chains_is_near_the_classical_formula_and_survives_heavy_tails():
    """For normal draws ranks change little: sqrt((B/n + W (n-1)/n) / W) of the split chains, in float64."""
    values = noise(4, 500, 1) + 0.3 * torch.arange(4.0).view(4, 1, 1)
    halves = torch.cat([values[:, :250, 0], values[:, 250:, 0]])
    within = halves.var(1).mean()
    classical = math.sqrt((halves.mean(1).var() + within * 249 / 250) / within)
    assert chain_diagnostics(values).r_hat_max == pytest.approx(classical, abs=0.02)
    assert classical > 1.03
    monotone = torch.sinh(3 * values)  # ranks do not see it
    assert chain_diagnostics(monotone).ess_min == pytest.approx(chain_diagnostics(values).ess_min, rel=1e-6)


def test_r_hat_sees_chains_of_different_spread():
    values = noise(4, 500, 1)
    values[0] *= 4
    assert chain_diagnostics(values).r_hat_max > 1.1


@pytest.mark.parametrize("rho", [0.5, 0.8])
def test_effective_sample_size_of_an_autoregressive_process_is_its_closed_form(rho):
    """n (1 - rho) / (1 + rho); the bound is five standard errors of the mean over independent functions."""
    chains, draws, functions = 4, 2000, 30
    values = autoregressive(rho, chains, draws, functions)
    sizes = torch.tensor([chain_diagnostics(values[:, :, f]).ess_min for f in range(functions)])
    expected = chains * draws * (1 - rho) / (1 + rho)
    error = float(sizes.std()) / math.sqrt(functions)
    assert error < 0.03 * expected
    assert abs(float(sizes.mean()) - expected) < 5 * error + 0.02 * expected  # Geyer's cut-off is biased by a percent or so
    together = chain_diagnostics(values)
    assert together.ess_min == pytest.approx(float(sizes.min()))
    assert together.ess_median == pytest.approx(float(sizes.double().median()), rel=0.05)


def test_a_single_chain_that_drifts_is_found():
    drift = noise(1, 301, 5) + torch.linspace(0, 3, 301).view(1, -1, 1)
    found = chain_diagnostics(drift)
    assert found.share_above == 1
    assert "the chain still wanders" in found.remarks[0]


def test_functions_that_never_change_are_left_out_and_said():
    values = noise(4, 500, 6)
    values[:, :, :2] = 1.5
    found = chain_diagnostics(values)
    assert (found.num_functions, found.num_constant) == (6, 2)
    rest = chain_diagnostics(values[:, :, 2:])
    assert (found.r_hat_max, found.ess_min, found.share_above) == (rest.r_hat_max, rest.ess_min, rest.share_above)
    assert found.remarks[0].startswith("2 of 6 functions never change")
    assert "6 functions (2 of them constant)" in str(found)
    still = chain_diagnostics(torch.zeros(2, 10, 3))
    assert still.num_constant == 3
    assert all(math.isnan(v) for v in (still.r_hat_max, still.r_hat_median, still.ess_min, still.ess_median))
    assert still.share_above == 0
    assert len(still.remarks) == 1


def test_chains_that_stand_still_at_different_values_have_an_infinite_r_hat():
    found = chain_diagnostics(torch.arange(3.0).view(3, 1, 1).expand(3, 20, 2))
    assert found.r_hat_max == math.inf
    assert found.share_above == 1
    assert found.ess_min < 20


def test_bad_values_and_shapes_are_refused():
    values = noise(2, 10, 3)
    values[0, 1, 2], values[1, 1, 1] = math.nan, math.inf
    with pytest.raises(PriorNumericsError, match="2 of 60 function values are NaN or infinite"):
        chain_diagnostics(values)
    with pytest.raises(ValueError, match=r"shape \(2, 2, 2, 2\), expected \(chains, draws, functions\)"):
        chain_diagnostics(torch.zeros(2, 2, 2, 2))
    with pytest.raises(ValueError, match="3 draws a chain are too few: 4"):
        chain_diagnostics(torch.zeros(2, 3, 1))
    with pytest.raises(ValueError, match="7 draws a chain are too few: 8"):
        chain_diagnostics(torch.zeros(1, 7, 1))
    assert chain_diagnostics(noise(1, 8, 1)).num_draws == 8
    assert chain_diagnostics(noise(2, 4, 1)).num_chains == 2


def test_without_arviz_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "arviz_stats.base", None)
    with pytest.raises(ImportError, match=r'needs arviz-stats: pip install "prior-hub\[metrics\]"'):
        chain_diagnostics(noise(2, 10, 1))


# -------------------------------------------------------------------------------------------------------- disagreement


@pytest.mark.parametrize("most", [1, 2**22])
@pytest.mark.parametrize("shape", [(2, 6, 3), (5, 7, 4), (4, 2, 3, 5, 6)])
def test_disagreement_is_that_of_a_loop_over_pairs(shape, most, monkeypatch):
    monkeypatch.setattr(diagnostics, "_MOST_VALUES", most)
    p = (2 * noise(*shape)).softmax(2)
    pairs = list(itertools.combinations(p, 2))
    distance = torch.stack([0.5 * (a - b).abs().sum(1).mean() for a, b in pairs]).mean()
    differ = torch.stack([(a.argmax(1) != b.argmax(1)).double().mean() for a, b in pairs]).mean()
    found = disagreement(p)
    assert found.total_variation == pytest.approx(float(distance), rel=1e-12)
    assert found.argmax == pytest.approx(float(differ), rel=1e-12)


def test_disagreement_of_equal_and_of_opposite_samples():
    same = disagreement(noise(1, 50, 10).softmax(2).float().expand(8, 50, 10))
    assert (same.total_variation, same.argmax) == (0.0, 0.0)
    opposite = disagreement(torch.eye(3).unsqueeze(1).expand(3, 4, 3))
    assert opposite.total_variation == pytest.approx(1.0)
    assert opposite.argmax == pytest.approx(1.0)


def test_tiny_differences_are_not_rounded_away():
    p = torch.tensor([[[0.5, 0.5]], [[0.5 + 1e-12, 0.5 - 1e-12]]], dtype=torch.float64)
    assert disagreement(p).total_variation == pytest.approx(1e-12, rel=1e-3)


def test_disagreement_refuses_one_sample_and_nan():
    with pytest.raises(ValueError, match=r"shape \(1, 5, 3\), expected \(S, B, C, ...\) with S >= 2"):
        disagreement(torch.zeros(1, 5, 3))
    p = noise(3, 5, 4).softmax(2)
    p[1, 2, 0] = math.nan
    with pytest.raises(PriorNumericsError, match="at least 1 of 15 predictions have NaN"):
        disagreement(p)


def test_samples_that_hardly_differ_give_a_warning_with_reasons_and_others_none():
    base = noise(1, 100, 5)
    close = (base + 1e-4 * noise(6, 100, 5, seed=1)).softmax(2)
    with pytest.warns(PriorWarning, match="the 6 posterior samples predict nearly the same") as caught:
        found = warn_without_variability(close)
    text = str(caught[0].message)
    assert f"total variation of {found.total_variation:.2g} on average" in text
    for reason in ("temperature is 0", "learning rate has decayed", "too close together", "scale is too small"):
        assert reason in text
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        varied = warn_without_variability((base + 0.1 * noise(6, 100, 5, seed=1)).softmax(2))
        warn_without_variability(close, least=0.0)
    assert varied.total_variation > 1e-2
