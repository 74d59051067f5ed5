"""What `diagnose` says of priors whose spectrum is known, of degenerate ones, and of one learned by drifting weights."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from prior_hub import PriorModel, SwagEstimator
from prior_hub.cli import main
from prior_hub.priors.diagnosis import diagnose, effective_rank

SHAPES = {"a": (30, 4), "b": (50,)}


def prior(eigenvalues=(), variance=1e-3, floor=0.0, scale=1.0, dtype=torch.float32) -> PriorModel:
    """A low-rank part whose D D^T has these eigenvalues, in a random basis of rows."""
    g = torch.Generator().manual_seed(0)
    rank = len(eigenvalues)
    rows = None
    if rank:
        directions = torch.linalg.qr(torch.randn(170, rank, generator=g, dtype=torch.float64))[0].T  # (K, P) orthonormal
        mixed = torch.linalg.qr(torch.randn(rank, rank, generator=g, dtype=torch.float64))[0]
        flat = mixed @ (torch.tensor(eigenvalues, dtype=torch.float64).sqrt().unsqueeze(1) * directions)
        rows = {"a": flat[:, :120].view(rank, 30, 4).to(dtype), "b": flat[:, 120:].to(dtype)}
    return PriorModel.from_tensors(
        {n: torch.zeros(s) for n, s in SHAPES.items()},
        {n: torch.full(s, variance) for n, s in SHAPES.items()},
        rows,
        scale=scale,
        variance_floor=floor,
    )


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_spectrum_shares_and_ranks_are_those_it_was_built_with(scale):
    eigenvalues = (4.0, 2.0, 1.0, 1.0, 1e-4)
    found = prior(eigenvalues, scale=scale).diagnose()
    weight = scale * 0.5 / 4  # low_rank_weight of K = 5
    assert found.spectrum == pytest.approx([weight * e for e in eigenvalues], rel=1e-4)
    assert found.effective_rank == pytest.approx(sum(eigenvalues) ** 2 / sum(e**2 for e in eigenvalues), rel=1e-4)
    assert found.useful_rank == 4
    low_rank, diagonal = weight * sum(eigenvalues), scale * 0.5 * 1e-3 * 170
    assert found.low_rank_share == pytest.approx(low_rank / (low_rank + diagonal), rel=1e-4)
    assert found.variance_range == pytest.approx((1e-3, 1e-3, 1e-3))
    assert found.remarks == ()
    assert "99 % of it in 4 directions" in str(found)


def test_a_diagonal_prior_has_no_spectrum_and_no_remark():
    found = prior().diagnose()
    assert (found.spectrum, found.effective_rank, found.useful_rank, found.low_rank_share) == ((), 0.0, 0, 0.0)
    assert found.remarks == ()
    assert "low-rank" not in str(found)


def test_variances_at_the_floor_are_counted_and_remarked_on_above_one_half():
    healthy = prior(variance=1e-3, floor=1e-4).diagnose()
    assert (healthy.share_at_floor, healthy.remarks) == (0.0, ())
    flat = prior(variance=1e-4, floor=1e-4).diagnose()
    assert flat.share_at_floor == 1.0
    (remark,) = flat.remarks
    assert "100 % of the variances are at the floor (0.0001)" in remark
    assert "larger, constant learning rate" in remark
    unknown = prior(variance=1e-4, floor=0.0).diagnose()
    assert unknown.remarks == ()


def learned(path, rank=8, steps=16) -> PriorModel:
    """SWAG over a model whose weights go along `path(step)`, (P,)."""
    model = nn.Linear(20, 10, bias=False)
    estimator = SwagEstimator(rank=rank, head=(), variance_floor=1e-12)
    for step in range(steps):
        with torch.no_grad():
            model.weight.copy_(path(step).view(10, 20))
        estimator.update(model)
    return estimator.prior()


def test_weights_that_drift_along_a_line_are_told_from_weights_that_fluctuate():
    g = torch.Generator().manual_seed(0)
    start, direction = torch.randn(200, generator=g), torch.randn(200, generator=g)
    drift = learned(lambda step: start + 0.1 * step * direction + 1e-3 * torch.randn(200, generator=g))
    (remark,) = drift.diagnose().remarks
    assert "8 deviations span little more than one direction (effective rank 1.0)" in remark
    noise = learned(lambda step: start + 0.1 * torch.randn(200, generator=g)).diagnose()
    assert noise.effective_rank > 6
    assert noise.remarks == ()


def test_a_random_walk_is_told_from_a_stationary_distribution_with_memory():
    """Snapshots of a walk have an effective rank near 2.5; those of a chain that forgets within a few snapshots more."""
    g = torch.Generator().manual_seed(0)
    state = torch.zeros(200)

    def chain(memory):
        def step(_):
            state.mul_(memory).add_(0.1 * torch.randn(200, generator=g))
            return state

        return step

    wandered = learned(chain(1.0), rank=20, steps=20)
    walk = wandered.diagnose()
    assert walk.effective_rank == pytest.approx(2.5, abs=0.7)
    (note,) = walk.notes
    assert walk.remarks == ()  # there is nothing to put right
    assert "of 20, that of a random walk (2.5)" in note
    assert f"note: {note}" in str(walk)
    few = wandered.compressed(rank=4)
    assert diagnose(few.gaussian).notes == ()  # so few directions alone would earn no note
    assert few.diagnose().notes == (note,)
    assert few.truncated(2).diagnose().notes == (note,)
    assert few.diagnose().effective_rank == pytest.approx(effective_rank(walk.spectrum[:4]), rel=1e-4)  # of what is left
    state.zero_()
    for _ in range(50):
        chain(0.5)(0)
    settled = learned(chain(0.5), rank=20, steps=20).diagnose()
    assert settled.effective_rank > 6
    assert settled.remarks == ()


def test_check_prints_it_and_gives_it_as_json(tmp_path, capsys):
    prior((1.0, 1e-6, 1e-6, 1e-6), floor=1e-4).save_pretrained(tmp_path)
    assert main(["check", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "effective rank 1.0 of 4" in text
    assert "note: the 4 deviations span little more than one direction" in text
    assert text.count("span little more") == 1
    assert main(["check", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["diagnosis"]["effective_rank"] == pytest.approx(1.0, abs=1e-4)
    assert any("span little more" in remark for remark in found["remarks"])


@pytest.mark.parametrize(
    "recorded",
    ["1000000000", [1.0, *["1e-9"] * 9], [1.0, *[-1e-9] * 9], [float("nan"), *[1e-9] * 9], [10**400, *[1] * 9], {"a": 1}, None],
)
def test_a_recorded_spectrum_that_is_not_one_is_not_used(recorded):
    few = prior((4.0, 2.0, 1.0, 1.0, 1e-4)).compressed(0.9)
    few.config.estimator["spectrum"] = recorded
    assert few.diagnose().remarks == ()
    assert few.diagnose().effective_rank == pytest.approx(effective_rank([4.0, 2.0, 1.0, 1.0]), abs=0.6)


def test_effective_rank_of_numbers_whose_squares_overflow_or_vanish():
    for unit in (1e-200, 1.0, 1e200):
        assert effective_rank([3 * unit, unit]) == pytest.approx(1.6)
    assert effective_rank([0.0, 0.0]) == effective_rank([]) == 0.0
