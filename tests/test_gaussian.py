"""The Gaussian against a dense float64 covariance matrix, autograd and torch.distributions."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pretended_mps import pretended_mps
from scipy import stats

from prior_hub import LowRankGaussian, PriorMatchError, PriorNumericsError
from prior_hub.priors import gaussian as module

SHAPES = {"conv.weight": (3, 2, 2), "conv.bias": (3,), "temperature": (), "head.weight": (2, 5)}


def make(rank, *, seed=0, shapes=SHAPES, low=1e-4, high=1e-1, dtype=torch.float32, deviations_dtype=None, **settings):
    """A Gaussian whose variances spread over [low, high] on a log scale, deviations of matching size."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    mean = {n: draw(*s).to(dtype) for n, s in shapes.items()}
    spread = {n: torch.exp(math.log(low) + (math.log(high) - math.log(low)) * draw(*s).sigmoid()) for n, s in shapes.items()}
    variance = {n: v.to(dtype) for n, v in spread.items()}
    rows = {n: (draw(rank, *s) * spread[n].sqrt()).to(deviations_dtype or dtype) for n, s in shapes.items()}
    return LowRankGaussian(mean, variance, rows if rank else None, **settings)


def flat(tensors, names):
    return torch.cat([tensors[n].detach().double().reshape(-1) for n in names])


def dense(prior):
    """(mean, Sigma) in float64, from the definition in DESIGN.md section 2."""
    mean, variance = flat(prior.mean, prior.names), flat(prior.variance, prior.names)
    sigma = prior.scale * prior.diagonal_weight * torch.diag(variance) + prior.eps * torch.eye(len(mean), dtype=torch.float64)
    if prior.rank:
        rows = torch.stack([flat({n: d[k] for n, d in prior.deviations.items()}, prior.names) for k in range(prior.rank)])
        sigma = sigma + prior.scale * prior.low_rank_weight * rows.T @ rows
    return mean, sigma


def near(prior, *, seed=1, dtype=torch.float32):
    """Weights a few standard deviations from the mean, plus a part along the deviations."""
    g = torch.Generator().manual_seed(seed)
    theta = {}
    for n, m in prior.mean.items():
        step = torch.randn(m.shape, generator=g) * prior.variance[n].sqrt() * math.sqrt(prior.scale)
        theta[n] = (m + step + (0.7 * prior.deviations[n].float().sum(0) if prior.rank else 0)).to(dtype)
    return theta


@pytest.mark.parametrize("rank", [0, 1, 2, 20])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("eps", [0.0, 1e-3])
def test_penalty_gradient_and_log_prob_equal_the_dense_formula(rank, scale, eps):
    prior = make(rank, scale=scale, eps=eps, seed=rank)
    theta = near(prior)
    mean, sigma = dense(prior)
    delta = flat(theta, prior.names) - mean
    precise = torch.linalg.solve(sigma, delta)
    value, gradient = prior.penalty_and_gradient(theta)
    expected = 0.5 * delta @ precise
    assert value.item() == pytest.approx(expected.item(), rel=2e-6)  # float32 elementwise work
    error = (flat(gradient, prior.names) - precise).norm() / precise.norm()
    assert error < 1e-5
    reference = torch.distributions.MultivariateNormal(mean, sigma).log_prob(flat(theta, prior.names))
    assert prior.log_prob(theta).item() == pytest.approx(reference.item(), rel=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    rank=st.integers(0, 6),
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=4),
    log_scale=st.floats(-4, 6),
    seed=st.integers(0, 10_000),
    weights=st.one_of(st.none(), st.tuples(st.floats(0.1, 2), st.floats(0, 3))),
)
def test_float64_values_equal_the_dense_formula_for_any_rank_shape_scale_and_weight(rank, shapes, log_scale, seed, weights):
    named = {f"p{i}.weight": tuple(s) for i, s in enumerate(shapes)}
    extra = {} if weights is None else {"diagonal_weight": weights[0], "low_rank_weight": weights[1]}
    prior = make(rank, seed=seed, shapes=named, dtype=torch.float64, scale=10**log_scale, **extra)
    theta = near(prior, seed=seed + 1, dtype=torch.float64)
    mean, sigma = dense(prior)
    delta = flat(theta, prior.names) - mean
    precise = torch.linalg.solve(sigma, delta) if len(delta) else delta
    value, gradient = prior.penalty_and_gradient(theta)
    assert value.item() == pytest.approx(0.5 * (delta @ precise).item(), rel=1e-9, abs=1e-12)
    torch.testing.assert_close(
        flat(gradient, prior.names), precise, rtol=1e-7, atol=1e-9 * (1 + precise.abs().max().item() if len(delta) else 1)
    )
    if len(delta):
        reference = torch.distributions.MultivariateNormal(mean, sigma).log_prob(flat(theta, prior.names))
        assert prior.log_prob(theta).item() == pytest.approx(reference.item(), rel=1e-9, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    rank=st.sampled_from([0, 1, 2, 5, 20]),
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=4),
    log_scale=st.floats(-4, 6),
    seed=st.integers(0, 10_000),
    deviations_dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_float32_values_equal_the_dense_formula_with_deviations_of_any_type(rank, shapes, log_scale, seed, deviations_dtype):
    """Also with more deviations than entries. The reference is of the stored numbers: rounding them is the storage's."""
    named = {f"p{i}.weight": tuple(s) for i, s in enumerate(shapes)}
    prior = make(rank, seed=seed, shapes=named, scale=10**log_scale, deviations_dtype=deviations_dtype)
    theta = near(prior, seed=seed + 1)
    mean, sigma = dense(prior)
    delta = flat(theta, prior.names) - mean
    precise = torch.linalg.solve(sigma, delta) if len(delta) else delta
    value, gradient = prior.penalty_and_gradient(theta)
    # largest of 600 cases: 2e-7 and 3e-6
    assert value.item() == pytest.approx(0.5 * (delta @ precise).item(), rel=1e-6)
    assert (flat(gradient, prior.names) - precise).norm() <= 1e-5 * precise.norm()


@pytest.mark.parametrize("rank", [0, 3])
def test_gradient_equals_autograd_through_the_dense_formula_and_through_penalty(rank):
    prior = make(rank, dtype=torch.float64)
    theta = {n: t.requires_grad_() for n, t in near(prior, dtype=torch.float64).items()}
    mean, sigma = dense(prior)
    delta = torch.cat([theta[n].reshape(-1) for n in prior.names]) - mean
    reference = torch.autograd.grad(0.5 * delta @ torch.linalg.solve(sigma, delta), list(theta.values()))
    ours = torch.autograd.grad(3.0 * prior.penalty(theta), list(theta.values()))
    for a, b in zip(reference, ours, strict=True):
        torch.testing.assert_close(3 * a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("deviations_dtype", [torch.bfloat16, torch.float16])
def test_half_precision_deviations_are_the_dense_formula_of_the_stored_numbers(deviations_dtype):
    prior = make(8, deviations_dtype=deviations_dtype)
    theta = near(prior)
    mean, sigma = dense(prior)  # of the rounded deviations: rounding is the storage's, not the arithmetic's
    delta = flat(theta, prior.names) - mean
    assert prior.penalty(theta).item() == pytest.approx((0.5 * delta @ torch.linalg.solve(sigma, delta)).item(), rel=5e-6)


def test_blocks_do_not_change_the_result(monkeypatch):
    prior = make(4, dtype=torch.float64)
    theta = near(prior, dtype=torch.float64)
    value, gradient = prior.penalty_and_gradient(theta)
    monkeypatch.setattr(module, "_CPU_BLOCK", 3)
    blocked = make(4, dtype=torch.float64)
    value_blocked, gradient_blocked = blocked.penalty_and_gradient(theta)
    assert value_blocked.item() == pytest.approx(value.item(), rel=1e-12)
    for n in prior.names:
        torch.testing.assert_close(gradient[n], gradient_blocked[n], rtol=1e-12, atol=0)


@pytest.mark.parametrize("variance", [1e-4, 1e-6])
def test_float32_penalty_of_an_exact_draw_keeps_five_digits_where_the_published_form_loses_them(variance):
    """Snapshots that explain the draw: Woodbury's difference cancels, the sum of squares does not."""
    size, rank = 20_000, 10
    g = torch.Generator().manual_seed(0)
    mean = torch.randn(size, generator=g)
    rows = torch.randn(rank, size, generator=g) * 0.03
    diagonal = torch.full((size,), variance)
    prior = LowRankGaussian({"w": mean}, {"w": diagonal}, {"w": rows}, diagonal_weight=1.0, low_rank_weight=1.0)
    draw = prior.sample(generator=g)
    mean64, rows64, diagonal64 = mean.double(), rows.double(), diagonal.double()
    exact = torch.distributions.LowRankMultivariateNormal(mean64, rows64.T, diagonal64)
    constant = 0.5 * (
        size * math.log(2 * math.pi) + torch.logdet(torch.eye(rank) + rows64 / diagonal64 @ rows64.T) + diagonal64.log().sum()
    )
    reference = -(exact.log_prob(draw["w"].double()) + constant).item()
    ours = prior.penalty(draw).item()
    published = torch.distributions.LowRankMultivariateNormal(mean, rows.T, diagonal, validate_args=False)
    constant32 = 0.5 * (size * math.log(2 * math.pi)) + published.variance.new_tensor(0)
    lost = (
        -(published.log_prob(draw["w"])).item()
        - constant32.item()
        - 0.5 * (torch.logdet(torch.eye(rank) + rows / diagonal @ rows.T) + diagonal.log().sum()).item()
    )
    assert abs(ours / reference - 1) < 1e-5  # five digits
    assert abs(lost / reference - 1) > 10 * abs(ours / reference - 1)
    if variance == 1e-6:
        assert abs(lost / reference - 1) > 1e-4  # its terms are 2e4 times their difference: 2e4 x 6e-8 is lost


def test_samples_have_the_declared_covariance_as_a_chi_square_of_quadratic_forms():
    """sum of (x - m)^T Sigma^-1 (x - m) over n draws is chi-square with n P degrees of freedom; five standard errors."""
    prior = make(5, scale=3.0, eps=1e-4)
    mean, sigma = dense(prior)
    g = torch.Generator().manual_seed(3)
    n = 2000
    draws = torch.stack([flat(prior.sample(generator=g), prior.names) for _ in range(n)]) - mean
    forms = (draws * torch.linalg.solve(sigma, draws.T).T).sum(1)
    size = len(mean)
    assert abs(forms.sum() - n * size) < 5 * math.sqrt(2 * n * size)
    assert stats.kstest(forms.numpy(), stats.chi2(size).cdf).pvalue > 1e-6
    assert (draws.mean(0) / (sigma.diagonal() / n).sqrt()).abs().max() < 5


def test_samples_have_the_declared_covariance_between_layers():
    """One off-diagonal block: noise drawn per tensor instead of per sample would make it zero."""
    shapes = {"first": (3,), "second": (3,)}
    g = torch.Generator().manual_seed(0)
    rows = {n: torch.randn(2, 3, generator=g) for n in shapes}
    small = {n: torch.full((3,), 1e-2) for n in shapes}
    prior = LowRankGaussian({n: torch.zeros(3) for n in shapes}, small, rows)
    _, sigma = dense(prior)
    n = 4000
    draws = torch.stack([flat(prior.sample(generator=g), prior.names) for _ in range(n)])
    block = draws[:, :3].T @ draws[:, 3:] / n
    error = ((sigma.diagonal()[:3, None] * sigma.diagonal()[None, 3:] + sigma[:3, 3:] ** 2) / n).sqrt()
    assert ((block - sigma[:3, 3:]).abs() < 5 * error).all()
    assert (sigma[:3, 3:].abs() > 10 * error).any()  # the block is far from zero: the test can fail


def test_the_same_generator_gives_the_same_draw():
    prior = make(3)
    one = prior.sample(generator=torch.Generator().manual_seed(7))
    two = prior.sample(generator=torch.Generator().manual_seed(7))
    assert all(torch.equal(one[n], two[n]) for n in prior.names)


def test_marginal_variance_is_the_diagonal_of_sigma():
    prior = make(4, scale=2.5, eps=1e-3)
    torch.testing.assert_close(flat(prior.marginal_variance(), prior.names), dense(prior)[1].diagonal(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("rank", [0, 2, 6])
def test_largest_precision_is_the_largest_eigenvalue_of_the_inverse_from_below(rank):
    prior = make(rank, low=1e-6, high=1e-2, scale=7.0)
    exact = torch.linalg.eigvalsh(dense(prior)[1].inverse()).max().item()
    assert 0.9 * exact <= prior.largest_precision() <= exact * (1 + 1e-5)


@pytest.mark.parametrize("rank", [0, 2, 20])
@pytest.mark.parametrize(("low", "high"), [(1e-12, 1e-4), (1e-6, 1e-2), (1e-4, 1.1e-4)])
def test_largest_precision_is_within_five_per_cent_over_many_magnitudes_and_where_all_are_alike(rank, low, high):
    for seed in range(3):
        prior = make(rank, seed=seed, low=low, high=high, shapes={"a": (300,), "b": (10, 30)})
        exact = torch.linalg.eigvalsh(dense(prior)[1].inverse()).max().item()
        assert 0.95 * exact <= prior.largest_precision() <= exact * (1 + 1e-5)


def test_largest_precision_does_not_depend_on_where_the_mean_is():
    """Nothing is rounded against it: at 1e6 a float32 holds no number that differs by less than 1/16."""
    near_zero = make(3, low=1e-6, high=1e-4)
    far = LowRankGaussian({n: m + 1e6 for n, m in near_zero.mean.items()}, near_zero.variance, near_zero.deviations)
    assert far.largest_precision() == near_zero.largest_precision()


def test_largest_precision_is_found_once_and_stops_where_it_no_longer_grows(monkeypatch):
    steps, evaluate = [], LowRankGaussian.penalty_and_gradient

    def counted(self, theta):
        steps.append({t.dtype for t in theta.values()})
        return evaluate(self, theta)

    monkeypatch.setattr(LowRankGaussian, "penalty_and_gradient", counted)
    prior = make(2, shapes={"w": (400,)}, low=1e-4, high=1.1e-4)
    first = prior.largest_precision()
    assert 3 < len(steps) < 8  # of at most 20
    assert all(dtypes == {torch.float32} for dtypes in steps)
    assert prior.largest_precision() == first
    assert len(steps) < 8
    wider = prior.rescaled(10.0).largest_precision()  # another Gaussian has its own
    assert wider == pytest.approx(first / 10, rel=0.05)


@pytest.mark.parametrize("rank", [0, 3])
def test_values_and_gradients_may_be_on_another_device_than_the_prior(rank):
    """The other device is pretended (tests/pretended_mps.py), and refuses tensors of this one in one operation."""
    prior = make(rank, eps=1e-3)
    theta = near(prior)
    value, gradient = prior.penalty_and_gradient(theta)
    product = prior.covariance_product(theta)
    stepped = {n: t.clone() for n, t in theta.items()}
    steps = {"conv.weight": 0.1, "head.weight": torch.full((2, 5), 0.3), "conv.bias": torch.tensor(0.2)}
    after = prior.proximal_step_(stepped, steps)
    with pretended_mps():
        there = {n: t.to("mps") for n, t in theta.items()}
        with pytest.raises(AssertionError, match="mixes"):
            there["conv.bias"] - theta["conv.bias"]  # the pretence can fail
        found, there_gradient = prior.penalty_and_gradient(there)
        assert found == value
        assert {t.device.type for t in there_gradient.values()} == {"mps"}
        into = {n: torch.zeros(t.shape, device="mps") for n, t in theta.items()}
        assert prior.add_gradient_(there, into, 2.0) == value
        there_product = prior.covariance_product(there)
        moved = {n: c.to("mps") if isinstance(c, torch.Tensor) else c for n, c in steps.items()}
        assert prior.proximal_step_(there, moved) == after
        for name in theta:
            torch.testing.assert_close(there_gradient[name].cpu(), gradient[name])
            torch.testing.assert_close(into[name].cpu(), 2 * gradient[name])
            torch.testing.assert_close(there_product[name].cpu(), product[name])
            torch.testing.assert_close(there[name].cpu(), stepped[name])


@pytest.mark.parametrize("rank", [0, 3])
def test_no_float64_reaches_a_device_that_has_none(rank):
    """As Apple's MPS; the device is pretended, tests/pretended_mps.py. Numbers are those of the CPU, to float32's digits."""
    prior = make(rank, eps=1e-3)
    theta = near(prior)
    with pretended_mps():
        there = prior.to("mps")
        moved = {n: t.to("mps") for n, t in theta.items()}
        assert {t.device.type for t in there.mean.values()} == {"mps"}
        with pytest.raises(TypeError, match="MPS framework doesn't support float64"):
            moved["conv.bias"].double()  # the pretence can fail
        for name in ("penalty", "log_prob"):
            assert getattr(there, name)(moved).item() == pytest.approx(getattr(prior, name)(theta).item(), rel=1e-5)
        assert there.log_determinant().item() == pytest.approx(prior.log_determinant().item(), rel=1e-5)
        assert there.largest_precision() == pytest.approx(prior.largest_precision(), rel=1e-4)
        generators = [torch.Generator().manual_seed(0) for _ in range(2)]
        shared = torch.ones(rank)
        pairs = [
            (there.sample(generator=generators[0]), prior.sample(generator=generators[1])),
            (there.marginal_variance(), prior.marginal_variance()),
            (there.penalty_and_gradient(moved)[1], prior.penalty_and_gradient(theta)[1]),
            (there.covariance_product(moved), prior.covariance_product(theta)),
            (there.coloured_noise(moved.__getitem__, shared.to("mps")), prior.coloured_noise(theta.__getitem__, shared)),
            (
                there.conditional({"conv.bias": moved["conv.bias"]}).mean,
                prior.conditional({"conv.bias": theta["conv.bias"]}).mean,
            ),
        ]
        for found, expected in pairs:
            for name, tensor in expected.items():
                assert found[name].device.type == "mps"
                torch.testing.assert_close(found[name].cpu(), tensor, rtol=1e-4, atol=1e-4 * float(tensor.abs().max()))
        into = {n: torch.zeros(m.shape, device="mps") for n, m in theta.items()}
        there.add_gradient_(moved, into, 2.0)
        for name, tensor in pairs[2][1].items():
            torch.testing.assert_close(into[name].cpu(), 2 * tensor, rtol=1e-4, atol=2e-4 * float(tensor.abs().max()))
        there.check()


def test_selecting_names_is_the_marginal():
    prior = make(3, dtype=torch.float64)
    names = ["conv.bias", "temperature"]
    mean, sigma = dense(prior)
    index = [i for i, n in enumerate(n for n in prior.names for _ in range(prior.mean[n].numel())) if n in names]
    theta = near(prior, dtype=torch.float64)
    chosen = torch.tensor(index)
    delta = flat(theta, prior.names)[chosen] - mean[chosen]
    expected = 0.5 * delta @ torch.linalg.solve(sigma[chosen][:, chosen], delta)
    assert prior.select(names).penalty(theta).item() == pytest.approx(expected.item(), rel=1e-10)


def test_rescaled_replaces_the_scale_and_leaves_eps_alone():
    prior = make(2, scale=5.0, eps=0.25, dtype=torch.float64)
    theta = near(prior, dtype=torch.float64)
    again = prior.rescaled(50.0)
    mean, sigma = dense(again)
    delta = flat(theta, prior.names) - mean
    assert (again.scale, again.eps, prior.scale) == (50.0, 0.25, 5.0)
    assert again.penalty(theta).item() == pytest.approx((0.5 * delta @ torch.linalg.solve(sigma, delta)).item(), rel=1e-10)
    assert again.mean["conv.bias"].data_ptr() == prior.mean["conv.bias"].data_ptr()


def test_weights_default_to_swags():
    assert (make(5).diagonal_weight, make(5).low_rank_weight) == (0.5, 1 / 8)
    assert (make(1).diagonal_weight, make(1).low_rank_weight) == (1.0, 0.0)
    assert (make(0).diagonal_weight, make(0).low_rank_weight) == (1.0, 0.0)


def test_truncated_keeps_the_first_rows_and_reweights_as_the_estimator_would():
    prior = make(6)
    short = prior.truncated(3)
    assert short.rank == 3
    assert (short.diagonal_weight, short.low_rank_weight) == (0.5, 0.25)
    assert torch.equal(short.deviations["conv.weight"], prior.deviations["conv.weight"][:3])
    assert (prior.truncated(0).diagonal_weight, prior.truncated(0).low_rank_weight) == (1.0, 0.0)
    other = make(6, diagonal_weight=1.0, low_rank_weight=1.0).truncated(3)  # another convention keeps its diagonal
    assert (other.diagonal_weight, other.low_rank_weight) == (1.0, 2.5)
    with pytest.raises(ValueError, match="not between 0 and"):
        prior.truncated(7)


def test_an_exactly_singular_looking_low_rank_part_still_has_a_factor():
    """Equal rows (a converged run) make D^T D rank one; I + U^T A^-1 U stays positive definite."""
    mean = {"w": torch.zeros(50)}
    rows = {"w": torch.ones(4, 50)}
    prior = LowRankGaussian(mean, {"w": torch.full((50,), 1e-6)}, rows)
    theta = {"w": torch.ones(50) * 0.3}
    m, sigma = dense(prior)
    delta = flat(theta, ("w",)) - m
    assert prior.penalty(theta).item() == pytest.approx((0.5 * delta @ torch.linalg.solve(sigma, delta)).item(), rel=1e-4)


def test_bad_numbers_are_named_and_counted():
    mean, variance = {"w": torch.zeros(4)}, {"w": torch.ones(4)}
    bad = {"w": torch.tensor([1.0, 0.0, -1.0, 1.0])}
    with pytest.raises(PriorNumericsError, match=r"'w' has 2 of 4 entries <= 0 \(smallest -1.000e\+00\).*variance_floor"):
        LowRankGaussian(mean, bad).check()
    with pytest.raises(PriorNumericsError, match="'w' has 1 of 4 entries < 0"):
        LowRankGaussian(mean, bad, eps=0.1).check()
    with pytest.raises(PriorNumericsError, match="mean of 'w' has 1 of 4 entries that are NaN"):
        LowRankGaussian({"w": torch.tensor([0.0, float("nan"), 0, 0])}, variance).check()
    with pytest.raises(PriorNumericsError, match="deviations of 'w' has 2 of 8"):
        LowRankGaussian(mean, variance, {"w": torch.tensor([[0.0] * 4, [float("inf")] * 2 + [0.0] * 2])}).check()
    for setting in ({"scale": 0.0}, {"scale": float("inf")}, {"scale": -1.0}, {"eps": -1.0}, {"low_rank_weight": float("nan")}):
        with pytest.raises(PriorNumericsError, match=next(iter(setting))):
            LowRankGaussian(mean, variance, **setting)
    with pytest.raises(PriorNumericsError, match="no Cholesky factor"):
        LowRankGaussian(mean, variance, {"w": torch.full((2, 4), float("nan"))}).penalty(mean)


def test_names_and_shapes_that_disagree_are_named():
    mean, variance = {"w": torch.zeros(4)}, {"w": torch.ones(4)}
    with pytest.raises(PriorMatchError, match="variance name different parameters: v, w"):
        LowRankGaussian(mean, {"v": torch.ones(4)})
    with pytest.raises(PriorMatchError, match=r"deviations of 'w' are \(2, 3\)"):
        LowRankGaussian(mean, variance, {"w": torch.zeros(2, 3)})
    with pytest.raises(PriorMatchError, match="no value given for parameter 'w'"):
        LowRankGaussian(mean, variance).penalty({"v": torch.zeros(4)})
    with pytest.raises(PriorMatchError, match=r"'w' has shape \(5,\)"):
        LowRankGaussian(mean, variance).penalty({"w": torch.zeros(5)})


def test_add_gradient_writes_in_place_for_non_contiguous_outputs_and_skips_missing_names():
    shapes = {"w": (4, 3, 2, 2), "frozen": (5,)}
    prior = make(3, shapes=shapes)
    theta = near(prior)
    theta["w"] = theta["w"].to(memory_format=torch.channels_last)
    start = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    into = {"w": start.clone(memory_format=torch.preserve_format)}
    value, gradient = prior.penalty_and_gradient(theta)
    returned = prior.add_gradient_(theta, into, 0.5)
    assert not into["w"].is_contiguous()
    torch.testing.assert_close(into["w"], start + 0.5 * gradient["w"], rtol=1e-6, atol=1e-6)
    assert returned.item() == value.item()


def test_one_tensor_under_two_names_is_not_written_to():
    prior = LowRankGaussian({n: torch.zeros(5) for n in "ab"}, {n: torch.ones(5) for n in "ab"})
    shared = torch.zeros(5)
    with pytest.raises(PriorMatchError, match="'a' and 'b' are one tensor"):
        prior.add_gradient_({"a": shared + 1, "b": shared + 1}, {"a": shared, "b": shared}, 1.0)
    with pytest.raises(PriorMatchError, match="'a' and 'b' are one tensor"):
        prior.proximal_step_({"a": shared, "b": shared}, {"a": 1.0, "b": 1.0})
    assert not shared.any()
    assert prior.penalty({"a": shared + 1, "b": shared + 1}) == 5  # to read it twice is well defined


def test_another_evaluation_may_come_while_views_are_made(monkeypatch):
    g = torch.Generator().manual_seed(0)
    mean = {n: torch.randn(7, generator=g) for n in "ab"}
    prior = LowRankGaussian(mean, {n: torch.ones(7) for n in mean}, {n: torch.randn(2, 7, generator=g) for n in mean})
    theta = {n: m + 1 for n, m in mean.items()}
    found = []

    class Watched(list):
        def __iter__(self):
            monkeypatch.undo()
            found.append(prior.penalty(theta))
            return super().__iter__()

    plain = module.blocks_of
    monkeypatch.setattr(module, "blocks_of", lambda *a, **k: Watched(plain(*a, **k)))
    value = prior.penalty(theta)
    assert found == [value]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda prior: pickle.loads(pickle.dumps(prior))])
def test_a_gaussian_that_was_used_is_copied_and_pickled_as_a_new_one_is(copied):
    mean = {"w": torch.randn(1 << 20)}
    prior = LowRankGaussian(mean, {"w": torch.ones(1 << 20)}, {"w": torch.randn(2, 1 << 20)})
    size = len(pickle.dumps(prior))
    value = prior.penalty({"w": mean["w"] + 1})
    assert len(pickle.dumps(prior)) < size + 10_000  # the factor is kept
    other = copied(prior)
    prior.mean["w"].zero_()
    assert other.penalty({"w": other.mean["w"] + 1}) == pytest.approx(float(value), rel=1e-12)


def test_bfloat16_weights_are_compared_in_float32():
    prior = make(2)
    theta = near(prior, dtype=torch.bfloat16)
    mean, sigma = dense(prior)
    delta = flat(theta, prior.names) - mean
    assert prior.penalty(theta).item() == pytest.approx((0.5 * delta @ torch.linalg.solve(sigma, delta)).item(), rel=1e-5)


def test_numpy_agrees_on_the_log_density():
    """A second independent implementation: scipy."""
    prior = make(2, dtype=torch.float64)
    theta = near(prior, dtype=torch.float64)
    mean, sigma = (t.numpy() for t in dense(prior))
    expected = stats.multivariate_normal(mean, sigma).logpdf(np.asarray(flat(theta, prior.names)))
    assert prior.log_prob(theta).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("rank", [0, 6])
def test_autocast_around_the_penalty_changes_nothing(rank):
    prior = make(rank, low=1e-6, high=1e-4)
    theta = near(prior)
    value, gradient = prior.penalty_and_gradient(theta)
    leaf = {n: t.clone().requires_grad_() for n, t in theta.items()}
    fresh = make(rank, low=1e-6, high=1e-4)  # its factor is made inside autocast too
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = fresh.penalty(leaf)
        drawn = fresh.sample(generator=torch.Generator().manual_seed(0))
    inside.backward()
    assert inside.item() == pytest.approx(value.item(), rel=1e-12)
    for n in prior.names:
        torch.testing.assert_close(leaf[n].grad, gradient[n], rtol=1e-6, atol=0)
    outside = prior.sample(generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(drawn[n], outside[n]) for n in prior.names)


def test_views_of_a_gaussian_keep_weights_of_their_own():
    prior = make(4, diagonal_weight=0.3, low_rank_weight=2.0, eps=0.5, scale=7.0)
    for view in (prior.select(["conv.bias"]), prior.rescaled(7.0), prior.to("cpu")):
        assert (view.diagonal_weight, view.low_rank_weight, view.eps, view.scale) == (0.3, 2.0, 0.5, 7.0)


def test_a_scale_that_makes_the_diagonal_vanish_in_float32_is_refused():
    prior = LowRankGaussian({"w": torch.zeros(3)}, {"w": torch.full((3,), 1e-12)}, scale=1e-30)
    with pytest.raises(PriorNumericsError, match=r"smallest variance of 'w'.*larger scale or eps"):
        prior.check()


def test_gradients_are_written_for_known_parameters_only():
    prior = make(2)
    with pytest.raises(PriorMatchError, match="cannot write the gradient of 'nothing'"):
        prior.add_gradient_(near(prior), {"nothing": torch.zeros(3)}, 1.0)


def test_a_gaussian_of_a_models_parameters_does_not_track_gradients():
    weight = torch.nn.Parameter(torch.ones(3))
    prior = LowRankGaussian({"w": weight}, {"w": torch.ones(3)})
    assert not prior.mean["w"].requires_grad


def test_sums_are_float64():
    """A million equal terms: float32 accumulation is off in the fourth digit, float64 is not."""
    size = 3_000_000
    prior = LowRankGaussian({"w": torch.zeros(size)}, {"w": torch.ones(size)})
    step = torch.full((size,), 0.1)
    assert prior.penalty({"w": step}).item() == pytest.approx(0.5 * size * float(step[0]) ** 2, rel=1e-7)


def dense_problem(rank, shapes, log_scale, seed, eps, dtype=torch.float64):
    """(names, a Gaussian over tensors of these shapes), some of them without entries."""
    named = {f"p{i}.weight": tuple(s) for i, s in enumerate(shapes)}
    return make(rank, seed=seed, shapes=named, dtype=dtype, scale=10**log_scale, eps=eps)


ANY_GAUSSIAN = {
    "rank": st.integers(0, 6),
    "shapes": st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=4),
    "log_scale": st.floats(-4, 6),
    "seed": st.integers(0, 10_000),
    "eps": st.sampled_from([0.0, 1e-3]),
}


@settings(max_examples=60, deadline=None)
@given(**ANY_GAUSSIAN)
def test_covariance_product_is_the_dense_product(rank, shapes, log_scale, seed, eps):
    prior = dense_problem(rank, shapes, log_scale, seed, eps)
    g = torch.Generator().manual_seed(seed)
    vectors = {n: torch.randn(m.shape, generator=g, dtype=torch.float64) for n, m in prior.mean.items()}
    kept = {n: v.clone() for n, v in vectors.items()}
    product = prior.covariance_product(vectors)
    expected = dense(prior)[1] @ flat(vectors, prior.names)
    assert {n: p.shape for n, p in product.items()} == {n: m.shape for n, m in prior.mean.items()}
    torch.testing.assert_close(
        flat(product, prior.names), expected, rtol=1e-11, atol=1e-12 * (expected.abs().max().item() if len(expected) else 1)
    )
    assert all(torch.equal(vectors[n], kept[n]) for n in vectors)


@settings(max_examples=30, deadline=None)
@given(**ANY_GAUSSIAN)
def test_coloured_noise_is_a_linear_map_whose_square_is_sigma(rank, shapes, log_scale, seed, eps):
    """Unit vectors in, columns of Sigma^1/2 out, (P, P + K): no sampling."""
    prior = dense_problem(rank, shapes, log_scale, seed, eps)
    size = prior.num_parameters
    columns = []
    for unit in torch.eye(size + prior.rank, dtype=torch.float64):
        white, start = {}, 0
        for name, mean in prior.mean.items():
            white[name] = unit[start : start + mean.numel()].reshape(mean.shape)
            start += mean.numel()
        columns.append(flat(prior.coloured_noise(white.__getitem__, unit[size:]), prior.names))
    root = torch.stack(columns, 1) if columns else torch.zeros(size, 0, dtype=torch.float64)
    sigma = dense(prior)[1]
    torch.testing.assert_close(root @ root.T, sigma, rtol=1e-11, atol=1e-12 * (sigma.abs().max().item() if size else 1))


@settings(max_examples=60, deadline=None)
@given(**ANY_GAUSSIAN, data=st.data())
def test_conditional_is_the_dense_conditional(rank, shapes, log_scale, seed, eps, data):
    """N(mean_a + S_ab S_bb^-1 (x_b - mean_b), S_aa - S_ab S_bb^-1 S_ba)."""
    prior = dense_problem(rank, shapes, log_scale, seed, eps)
    given_names = data.draw(st.lists(st.sampled_from(prior.names), unique=True, max_size=len(prior.names) - 1))
    theta = near(prior, seed=seed + 1, dtype=torch.float64)
    rest = prior.conditional({n: theta[n] for n in given_names})
    mean, sigma = dense(prior)
    owner = [n for n in prior.names for _ in range(prior.mean[n].numel())]
    b = torch.tensor([i for i, n in enumerate(owner) if n in given_names], dtype=torch.long)
    a = torch.tensor([i for i, n in enumerate(owner) if n not in given_names], dtype=torch.long)
    gain = torch.linalg.solve(sigma[b][:, b], sigma[b][:, a]).T
    expected_mean = mean[a] + gain @ (flat(theta, prior.names)[b] - mean[b])
    expected = sigma[a][:, a] - gain @ sigma[b][:, a]
    assert rest.names == tuple(n for n in prior.names if n not in given_names)
    found_mean, found = dense(rest)
    # the dense formula is a difference of terms up to Sigma's size: it has lost as many digits as they are larger
    size = (sigma.abs().max().item(), expected_mean.abs().max().item()) if len(a) else (1.0, 1.0)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10 * size[0])
    torch.testing.assert_close(found_mean, expected_mean, rtol=1e-8, atol=1e-9 * size[1])


def test_conditional_keeps_what_the_joint_density_says():
    """log p(all) - log p(given) = log p(rest | given), at any point, also with float32 tensors and bfloat16 deviations."""
    for extra in ({"dtype": torch.float64}, {"deviations_dtype": torch.bfloat16}):
        prior = make(4, scale=3.0, eps=1e-4, **extra)
        theta = near(prior, dtype=extra.get("dtype", torch.float32))
        given_names = ["conv.bias", "head.weight"]
        rest = prior.conditional({n: theta[n] for n in given_names})
        joint = prior.log_prob(theta).item() - prior.select(given_names).log_prob(theta).item()
        # bfloat16 deviations are rounded anew, which moves a penalty by a share of 2^-9 or so
        assert rest.log_prob(theta).item() == pytest.approx(joint, rel=1e-9 if "dtype" in extra else 1e-2)
        assert {t.dtype for t in rest.deviations.values()} == {t.dtype for t in prior.deviations.values()}


def test_conditioning_on_what_is_not_there_or_on_everything_is_named():
    prior = make(2)
    with pytest.raises(PriorMatchError, match="cannot condition on 'other': no such parameter"):
        prior.conditional({"other": torch.zeros(3)})
    with pytest.raises(PriorMatchError, match=r"cannot condition on 'conv\.bias'"):
        prior.conditional({"conv.bias": torch.zeros(4)})
    with pytest.raises(PriorMatchError, match="all parameters of the prior are given"):
        prior.conditional(dict(prior.mean))
    assert prior.conditional({}) is prior
    with pytest.raises(PriorMatchError, match=r"no value given for parameter 'conv\.weight'"):
        prior.covariance_product({})


def test_blocks_do_not_change_covariance_products_noise_or_conditionals(monkeypatch):
    prior = make(4, dtype=torch.float64)
    theta = near(prior, dtype=torch.float64)
    shared = torch.ones(4, dtype=torch.float64)

    def results():
        rest = prior.conditional({"conv.weight": theta["conv.weight"]})
        found = [prior.covariance_product(theta), prior.coloured_noise(theta.__getitem__, shared), rest.mean, rest.deviations]
        return [t for part in found for t in part.values()]

    whole = results()
    monkeypatch.setattr(module, "_CPU_BLOCK", 3)
    for one, other in zip(whole, results(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_tensors_joined_give_what_each_gives_by_itself(rank, dtype, monkeypatch):
    shapes = {"a": (50, 10), "b": (300,), "scalar": (), "large": (20_000,), "empty": (0, 4), "c": (7, 2)}  # 300: rounding shows
    prior = make(rank, shapes=shapes, deviations_dtype=dtype, eps=1e-3)
    weighted = prior._with(contributions=dict.fromkeys(shapes, 1.0) | {"b": 0.5, "c": 0.5}, sum_over_ranks=lambda t: t)
    theta = near(prior)
    for one in (prior, weighted):
        apart = one._with()
        monkeypatch.setattr(apart, "_pack", lambda: None)
        assert len(one._pack().groups) == (1 if one is prior else 2)
        value, gradient = one.penalty_and_gradient(theta)
        expected, expected_gradient = apart.penalty_and_gradient(theta)
        assert value.item() == pytest.approx(expected.item(), rel=1e-6)
        into = {n: torch.ones(theta[n].shape, dtype=torch.float64 if n == "a" else None) for n in ("a", "c", "large")}
        one.add_gradient_(theta, into, 0.3)
        for name in shapes:
            torch.testing.assert_close(gradient[name], expected_gradient[name], rtol=1e-5, atol=1e-4)
        for name, found in into.items():
            wanted = 1 + 0.3 * expected_gradient[name].double()
            torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-4)
        for steps in (
            dict.fromkeys(shapes, 0.1),
            {"a": 0.1, "c": torch.full((7, 2), 0.3), "large": 1.0, "scalar": torch.tensor(0.2)},
            {"large": 0.5},
        ):
            moved, wanted = ({n: t.clone() for n, t in theta.items()} for _ in range(2))
            assert one.proximal_step_(moved, steps).item() == pytest.approx(
                apart.proximal_step_(wanted, steps).item(), rel=1e-5
            )
            for name in shapes:
                torch.testing.assert_close(moved[name], wanted[name], rtol=1e-5, atol=1e-5)
                assert name in steps or torch.equal(moved[name], theta[name])
