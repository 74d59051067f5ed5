"""Principal directions in place of snapshots, against the eigendecomposition of the dense float64 D^T D."""

from __future__ import annotations

import json

import pytest
import torch
from models import dense_penalty, tiny_vit
from models import random_prior as prior_over
from priors_for_tests import assert_same, differences, edit_config, random_prior
from torch import nn

from prior_hub import LowRankGaussian, PriorModel, PriorNumericsError, PriorPenalty, SwagEstimator
from prior_hub.cli import main

torch.set_num_threads(1)

SHAPES = {"a": (6, 4), "b": (), "c": (11,)}
P = 36
EIGENVALUES = (8.0, 4.0, 2.0, 1.0, 0.05, 0.0)  # of D D^T: 93.0 % in three directions, 99.67 % in four
FLOAT32 = 2e-6


def gaussian(eigenvalues=EIGENVALUES, *, seed=0, dtype=torch.float64, **settings) -> LowRankGaussian:
    """K rows, none of them a principal direction, whose D D^T has these eigenvalues."""
    g = torch.Generator().manual_seed(seed)
    k = len(eigenvalues)
    directions = torch.linalg.qr(torch.randn(P, k, generator=g, dtype=torch.float64))[0].T
    mixed = torch.linalg.qr(torch.randn(k, k, generator=g, dtype=torch.float64))[0]
    flat = mixed @ (torch.tensor(eigenvalues, dtype=torch.float64).sqrt()[:, None] * directions)
    parts = dict(zip(SHAPES, flat.split([24, 1, 11], dim=1), strict=True))
    return LowRankGaussian(
        {n: torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for n, s in SHAPES.items()},
        {n: torch.rand(s, generator=g, dtype=torch.float64).add(0.1).to(dtype) for n, s in SHAPES.items()},
        {n: parts[n].reshape(k, *s).to(dtype) for n, s in SHAPES.items()},
        **settings,
    )


def rows(prior: LowRankGaussian) -> torch.Tensor:
    """D, (K, P), float64."""
    return torch.cat([d.double().reshape(prior.rank, -1) for d in prior.deviations.values()], dim=1)


def eigen(prior: LowRankGaussian) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues, largest first, and eigenvectors (columns) of the dense D^T D, (P, P)."""
    values, vectors = torch.linalg.eigh(rows(prior).T @ rows(prior))
    return values.flip(0), vectors.flip(1)


def weights_of(prior):
    return prior.diagonal_weight, prior.low_rank_weight, prior.scale, prior.eps


@pytest.mark.parametrize("settings", [{}, {"scale": 7.0, "eps": 0.3, "diagonal_weight": 1.0, "low_rank_weight": 0.2}])
def test_keeping_all_of_it_changes_no_covariance(settings):
    before = gaussian(**settings)
    after = before.principal(1.0)
    torch.testing.assert_close(rows(after).T @ rows(after), rows(before).T @ rows(before), rtol=0, atol=1e-13)
    assert weights_of(after) == weights_of(before)
    theta = {n: m + 0.3 for n, m in before.mean.items()}
    assert after.penalty(theta).item() == pytest.approx(before.penalty(theta).item(), rel=1e-12)
    assert after.log_prob(theta).item() == pytest.approx(before.log_prob(theta).item(), rel=1e-12)


@pytest.mark.parametrize(("explained", "kept"), [(0.5, 1), (0.6, 2), (0.93, 3), (0.931, 4), (0.99, 4), (0.999, 5), (1.0, 5)])
def test_the_fewest_directions_that_hold_the_share_are_kept(explained, kept):
    """Shares together: 8 / 15.05 = 0.532, 0.797, 0.930, 0.997, 1, 1."""
    found = gaussian().principal(explained)
    assert found.rank in ((kept,) if explained < 1 else (5, 6))  # the sixth eigenvalue is zero but for rounding


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_is_kept_is_the_leading_part_of_the_dense_eigendecomposition(dtype):
    before = gaussian(dtype=dtype)
    after = before.principal(0.9)
    values, vectors = eigen(before)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5  # rows of size 3, rounded to float32
    leading = vectors[:, :3] @ torch.diag(values[:3]) @ vectors[:, :3].T
    torch.testing.assert_close(rows(after).T @ rows(after), leading, rtol=0, atol=tolerance)
    torch.testing.assert_close(rows(after) @ rows(after).T, torch.diag(values[:3]), rtol=0, atol=tolerance)
    assert {d.dtype for d in after.deviations.values()} == {dtype}
    assert after.spectrum() == pytest.approx(before.spectrum()[:3], rel=1e-6)
    for j in range(3):  # the covariance along a kept direction is what it was, along a dropped one the diagonal's
        own = vectors[:, j] @ rows(after).T @ rows(after) @ vectors[:, j]
        assert float(own) == pytest.approx(float(values[j]), rel=max(tolerance, 1e-12))
    assert float((rows(after) @ vectors[:, 3]).norm()) < tolerance
    assert before.rank == 6  # and the one it was made of is as it was


def test_a_number_of_directions_may_be_asked_for():
    before = gaussian()
    for rank in (1, 4, 6):
        assert before.principal(rank=rank).rank == rank
        torch.testing.assert_close(rows(before.principal(rank=rank)), rows(before.principal(rank=6))[:rank], rtol=0, atol=1e-12)
    for rank in (0, 7):
        with pytest.raises(ValueError, match=f"rank {rank} is not between 1 and the prior's own rank 6"):
            before.principal(rank=rank)
    for explained in (0.0, -0.1, 1.01, float("nan")):
        with pytest.raises(ValueError, match="expected a share of the low-rank variance"):
            before.principal(explained)


@pytest.mark.parametrize("odd", ["no rows", "zero rows", "no weight"])
def test_without_low_rank_variance_nothing_is_kept_and_nothing_changes(odd):
    before = gaussian((0.0, 0.0) if odd == "zero rows" else (2.0, 1.0), low_rank_weight=0.0 if odd == "no weight" else 1.0)
    before = before.truncated(0, weights=(0.5, 0.0)) if odd == "no rows" else before
    after = before.principal()
    assert (after.rank, after.deviations) == (0, {})
    assert after.marginal_variance().keys() == before.marginal_variance().keys()
    for name, variance in before.marginal_variance().items():
        assert torch.equal(after.marginal_variance()[name], variance)


def test_rows_that_are_not_finite_are_refused():
    before = gaussian()
    before.deviations["c"][2, 3] = float("nan")
    with pytest.raises(PriorNumericsError, match="deviations hold NaN or infinities"):
        before.principal()


def test_shards_are_turned_like_the_whole():
    """Two ranks: "a" is cut in two, "c" is replicated and counts half on each; the sum over ranks is that of both."""
    whole = gaussian()

    def part(which, sum_over_ranks):
        cut = slice(0, 2) if which == 0 else slice(2, 6)
        tensors = [{"a": t["a"][cut], "b": t["b"], "c": t["c"]} for t in (whole.mean, whole.variance)]
        deviations = {n: d[:, cut] if n == "a" else d for n, d in whole.deviations.items()}
        contributions = {"a": 1.0, "b": 0.5, "c": 0.5}
        return LowRankGaussian(*tensors, deviations, contributions=contributions, sum_over_ranks=sum_over_ranks)

    local: list[torch.Tensor] = []
    for which in (0, 1):
        part(which, lambda t: (local.append(t.clone()), t)[1]).spectrum()  # what each would put into the sum
    shards = [part(which, lambda t: t.copy_(local[0] + local[1])).principal(0.9) for which in (0, 1)]
    expected = whole.principal(0.9)
    signs = torch.sign((shards[0].deviations["c"] * expected.deviations["c"]).sum(1))
    found = {"a": torch.cat([s.deviations["a"] for s in shards], dim=1), "c": shards[1].deviations["c"]}
    for name, turned in found.items():
        aligned = turned * signs.view(-1, *[1] * (turned.ndim - 1))
        torch.testing.assert_close(aligned, expected.deviations[name], rtol=0, atol=1e-12)
    assert torch.equal(shards[0].deviations["c"], shards[1].deviations["c"])


# ----------------------------------------------------------------------------------------------------------- PriorModel


def drifting(rank=12, steps=24) -> SwagEstimator:
    """SWAG over weights that wander: a few directions hold nearly everything."""
    g = torch.Generator().manual_seed(0)
    model = nn.Linear(20, 10, bias=False)
    estimator = SwagEstimator(rank, head=())
    for _ in range(steps):
        with torch.no_grad():
            model.weight.add_(0.1 * torch.randn(10, 20, generator=g))
        estimator.update(model)
    return estimator


def test_the_configuration_says_what_was_dropped_and_why():
    prior = drifting().prior(scale=30.0)
    small = prior.compressed(0.9)
    recorded = small.config.estimator
    spectrum = torch.tensor(prior.gaussian.spectrum()) / 30.0
    assert recorded["deviations"] == "principal directions"
    assert recorded["spectrum"] == pytest.approx(spectrum.tolist(), rel=1e-3, abs=1e-9)
    assert recorded["explained"] == pytest.approx(float(spectrum[: small.rank].sum() / spectrum.sum()), rel=1e-3)
    assert recorded["explained"] >= 0.9 > float(spectrum[: small.rank - 1].sum() / spectrum.sum())
    assert (recorded["name"], recorded["snapshots"]) == ("swag", 24)  # what was there stays
    assert 1 < small.rank < 12
    assert (small.config.rank, small.config.low_rank_weight) == (small.rank, prior.config.low_rank_weight)
    assert "spectrum" not in prior.config.estimator
    again = small.compressed(rank=1)  # of what is left; the record goes on counting from the start
    assert again.config.estimator["spectrum"] == recorded["spectrum"]
    assert again.config.estimator["explained"] == pytest.approx(float(spectrum[0] / spectrum.sum()), rel=1e-3)


def test_a_compressed_prior_is_stored_and_loaded_with_every_word(tmp_path):
    small = drifting().prior().compressed(0.9)
    small.save_pretrained(tmp_path)
    assert_same(PriorModel.from_pretrained(tmp_path), small)
    for rank in range(small.rank + 1):
        assert_same(PriorModel.from_pretrained(tmp_path, rank=rank), small.truncated(rank))
    assert "principal directions" in (tmp_path / "README.md").read_text()


def test_principal_directions_keep_their_weight_when_some_are_cut_off():
    prior = drifting().prior()
    small = prior.compressed(0.99)
    for rank in range(1, small.rank):
        cut = small.truncated(rank)
        assert differences(cut, prior.compressed(rank=rank)) == []
        assert cut.gaussian.spectrum() == pytest.approx(prior.gaussian.spectrum()[:rank], rel=1e-5)
    snapshots = prior.truncated(3)  # while these are re-weighted
    assert snapshots.gaussian.low_rank_weight == pytest.approx(0.5 / 2)


def test_rank_0_is_the_same_diagonal_prior_before_and_after():
    prior = drifting().prior()
    assert differences(prior.compressed(0.8).truncated(0), prior.truncated(0)) == [
        f"config estimator: {dict(prior.compressed(0.8).truncated(0).config.estimator)} != {dict(prior.config.estimator)}"
    ]


def test_fine_tuning_with_prior_rank_cuts_directions_without_changing_their_weight():
    model = tiny_vit()
    small = prior_over(model, rank=5, scale=3.0).compressed(1.0)
    penalty = PriorPenalty(small, model, num_examples=37, rank=2)
    cut = small.gaussian._with(deviations={n: d[:2] for n, d in small.deviations.items()})
    assert penalty.gaussian.low_rank_weight == small.gaussian.low_rank_weight
    by_hand = PriorModel(cut, small.config.replace(rank=2))
    expected, _ = dense_penalty(by_hand, dict(model.named_parameters()))
    assert float(penalty.penalty()) == pytest.approx(expected, rel=FLOAT32)


def test_somebodys_own_words_in_the_record_do_no_harm(tmp_path):
    prior = random_prior(rank=4).compressed(1.0)
    prior.save_pretrained(tmp_path)
    for spectrum in ("flat", [1.0, "x", 2.0], None, [], [0.0] * 4):
        edit_config(tmp_path, estimator={"deviations": "principal directions", "spectrum": spectrum})
        found = PriorModel.from_pretrained(tmp_path, rank=2)
        assert (found.rank, found.gaussian.low_rank_weight) == (2, prior.gaussian.low_rank_weight)
        assert found.truncated(0).rank == 0


def test_swag_gives_a_compressed_prior_when_asked_to_and_rounds_it_last():
    estimator = drifting()
    assert_same(estimator.prior(explained=0.9), estimator.prior().compressed(0.9))
    half = estimator.prior(explained=0.9, deviations_dtype=torch.bfloat16)
    assert_same(half, estimator.prior().compressed(0.9).astype(deviations=torch.bfloat16))
    with pytest.raises(ValueError, match="expected a share"):
        estimator.prior(explained=99)
    assert estimator.prior().rank == 12


# ------------------------------------------------------------------------------------------------------ the command line


def test_the_command_prints_the_spectrum_and_writes_what_is_kept(tmp_path, capsys):
    prior = drifting().prior(scale=2.0)
    prior.save_pretrained(tmp_path / "prior")
    small = prior.compressed(0.95)
    assert main(["compress", str(tmp_path / "prior"), "--explained", "0.95", "--output", str(tmp_path / "small")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["direction", "variance", "share", "together"]
    table = [line.split() for line in lines[1:13]]
    assert [float(row[1]) for row in table] == pytest.approx(prior.gaussian.spectrum(), rel=5e-3, abs=1e-6)
    assert [row[-1] for row in table] == ["kept"] * small.rank + ["dropped"] * (12 - small.rank)
    assert lines[13].startswith(f"{small.rank} of 12 directions hold ")
    assert f"deviations 9.6 kB -> {0.8 * small.rank:.3g} kB, written to" in lines[13]  # 200 values of 4 bytes each
    assert_same(PriorModel.from_pretrained(tmp_path / "small"), PriorModel.from_pretrained(tmp_path / "prior").compressed(0.95))

    assert main(["compress", str(tmp_path / "prior"), "--rank", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rank"], found["rank_before"], found["folder"]) == (2, 12, "")
    assert found["explained"] == pytest.approx(sum(found["spectrum"][:2]) / sum(found["spectrum"]))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["prior", "small"]  # nothing else was written


def test_the_command_refuses_a_share_that_is_none_and_a_diagonal_prior(tmp_path, capsys):
    drifting().prior().save_pretrained(tmp_path / "prior")
    assert main(["compress", str(tmp_path / "prior"), "--explained", "99"]) == 1
    assert "expected a share of the low-rank variance" in capsys.readouterr().err
    drifting().prior().truncated(0).save_pretrained(tmp_path / "flat")
    assert main(["compress", str(tmp_path / "flat")]) == 1
    assert "has no deviations" in capsys.readouterr().err
