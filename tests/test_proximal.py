"""The prior's implicit step: against the dense float64 formula, closed-form MAP solutions, and the gradient form."""

from __future__ import annotations

import gc
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import dense_covariance, image_data, quiet_arguments, random_prior, tiny_resnet, tiny_vit
from torch import nn
from torch.optim import SGD, Adam, AdamW, RMSprop
from transformers import TrainerCallback

from prior_hub import LowRankGaussian, PriorMatchError, PriorModel, PriorPenalty, PriorTrainer
from prior_hub.finetuning.proximal import chosen_update
from prior_hub.priors import gaussian as gaussian_module

pytestmark = pytest.mark.filterwarnings("ignore:.*ignores num_items_in_batch")


@pytest.fixture(scope="module", autouse=True)
def _imported_modules_are_no_garbage():
    """Trainer collects garbage whenever it starts."""
    gc.freeze()
    yield
    gc.unfreeze()


torch.set_num_threads(1)

ALL = ("a", "b", "c")
SHAPES = {"a": (3, 4), "b": (), "c": (7,)}


def gaussian(rank, scale=1.0, eps=0.0, dtype=torch.float64, seed=0, spread=4.0):
    """Variances over `spread` decades, deviations of the size of the largest."""
    g = torch.Generator().manual_seed(seed)
    mean = {n: torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for n, s in SHAPES.items()}
    variance = {n: (10 ** (-spread * torch.rand(s, generator=g, dtype=torch.float64))).to(dtype) for n, s in SHAPES.items()}
    rows = {n: torch.randn(rank, *s, generator=g, dtype=torch.float64).to(dtype) for n, s in SHAPES.items()} if rank else None
    return LowRankGaussian(mean, variance, rows, scale=scale, eps=eps)


def flat(tensors, names=ALL):
    return torch.cat([tensors[n].detach().double().reshape(-1) for n in names])


def dense(g: LowRankGaussian) -> torch.Tensor:
    """Sigma, from the formula of the README."""
    sigma = g.scale * g.diagonal_weight * flat(g.variance).diag() + g.eps * torch.eye(20, dtype=torch.float64)
    if g.rank:
        rows = torch.stack([flat({n: g.deviations[n][k] for n in ALL}) for k in range(g.rank)])
        sigma = sigma + g.scale * g.low_rank_weight * rows.T @ rows
    return sigma


# ------------------------------------------------------------------------------------------------------------ the formula


@settings(max_examples=40, deadline=None)
@given(
    rank=st.sampled_from([0, 1, 2, 5]),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    eps=st.sampled_from([0.0, 1e-3]),
    step=st.sampled_from(["scalar", "tensors", "some"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 5),
)
def test_proximal_step_equals_the_dense_solve(rank, scale, eps, step, dtype, seed):
    g = gaussian(rank, scale, eps, dtype, seed)
    noise = torch.Generator().manual_seed(seed + 100)
    theta = {n: m + torch.randn(m.shape, generator=noise, dtype=dtype) for n, m in g.mean.items()}
    lengths = {n: 10 ** (4 * torch.rand(m.shape, generator=noise, dtype=dtype) - 2) for n, m in g.mean.items()}
    if step == "scalar":
        lengths = {"a": 0.3, "b": 2.0, "c": torch.tensor(0.01)}
    if step == "some":
        del lengths["c"]  # held fixed: its step is 0
    c = torch.cat([torch.as_tensor(lengths.get(n, 0.0), dtype=torch.float64).expand(SHAPES[n]).reshape(-1) for n in ALL])
    sigma, delta = dense(g), flat(theta) - flat(g.mean)
    held = {n: t.clone() for n, t in theta.items()}
    moved = sigma @ torch.linalg.solve(sigma + c.diag(), delta)

    value = g.proximal_step_(theta, lengths)

    found = flat(theta) - flat(g.mean)
    # every entry is a weighted mean of numbers of delta's size (float32: stored as mean + delta)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-9
    assert (found - moved).abs().max() < tolerance * (delta.abs().max() + flat(g.mean).abs().max())
    if step == "some":
        assert torch.equal(theta["c"], held["c"])
    exact = 0.5 * float(delta @ torch.linalg.solve(sigma + c.diag(), moved))  # 1/2 moved^T Sigma^-1 moved
    assert float(value) == pytest.approx(exact, rel=2e-4 if dtype == torch.float32 else 1e-8)


def test_the_value_of_the_step_is_the_penalty_at_the_new_weights():
    g = gaussian(3)
    theta = {n: m + 0.5 for n, m in g.mean.items()}
    value = g.proximal_step_(theta, dict.fromkeys(ALL, 0.1))
    assert float(value) == pytest.approx(float(g.penalty(theta)), rel=1e-9)


@pytest.fixture
def grams(monkeypatch):
    """One entry for each block over which a K x K matrix is summed; `gaussian` has as many blocks as `ALL`, or one."""
    found, add = [], LowRankGaussian._add_gram
    monkeypatch.setattr(LowRankGaussian, "_add_gram", lambda g, *given: found.append(given[0]) or add(g, *given))
    return found


def test_matrices_are_kept_while_the_step_changes_little_and_change_nothing_themselves(grams):
    """On a grid of half powers of 2: at 0.1 its points -8, -7, -6, which serve 0.101 too, and two new ones at 0.2."""
    g = gaussian(3)
    theta = {n: m + 0.5 for n, m in g.mean.items()}
    made = []
    for length in (0.1, 0.101, 0.1, 0.2, 0.199):
        g.proximal_step_(theta, dict.fromkeys(ALL, length))
        made.append(len(grams) // len(set(grams)))
    assert made == [3, 3, 3, 5, 5]
    other = {n: m + 0.5 for n, m in g.mean.items()}
    for length in (0.1, 0.101, 0.1, 0.2, 0.199):  # the same to the last bit: a resumed run has no matrices from before
        gaussian(3).proximal_step_(other, dict.fromkeys(ALL, length))
    assert torch.equal(flat(theta), flat(other))


def test_matrices_are_kept_where_clipping_makes_the_step_jump_and_their_number_is_bounded(grams, monkeypatch):
    """Clipping by the norm multiplies the step length by another number at every step."""
    g = gaussian(3)
    theta = {n: m + 0.5 for n, m in g.mean.items()}
    for _ in range(5):
        for clip in (1.0, 0.1, 0.4, 0.01):
            g.proximal_step_(theta, dict.fromkeys(ALL, 0.1 * clip))
    assert len(grams) // len(set(grams)) == 3 * 4 - 1  # each point once; 0.1 and 0.04 have one in common
    monkeypatch.setattr(gaussian_module, "_KEPT", 5 * 9)
    h = gaussian(3)
    for exponent in range(40):
        h.proximal_step_(theta, dict.fromkeys(ALL, 2.0**-exponent))
        held = [m for owner in (h, h._pack().gaussian) for m in owner._grams.values()]
        assert sum(m.numel() for m in held) <= 5 * 9


@pytest.mark.parametrize(("rank", "relation"), [(1, 1.0), (4, 8.0), (4, 3.0), (1, 0.1)])
def test_the_matrix_between_grid_points_is_within_1e_3_of_the_true_one_in_every_direction(rank, relation):
    """Against the dense float64 matrix, for variances from far below to far above the step, and rates in a fixed relation."""
    noise = torch.Generator().manual_seed(rank)
    variance = 10 ** (24 * torch.rand(300, generator=noise, dtype=torch.float64) - 12)
    rows = torch.randn(rank, 300, generator=noise, dtype=torch.float64)
    names = {"a": slice(0, 100), "b": slice(100, 300)}
    worst = 0.0
    for exponent in torch.linspace(-9, 9, 61, dtype=torch.float64).tolist():
        lengths = {"a": 10**exponent, "b": relation * 10**exponent}

        def gram(at):
            c = torch.cat([torch.full((s.stop - s.start,), at[n], dtype=torch.float64) for n, s in names.items()])
            return (rows / (variance + c)) @ rows.T

        parts = ({n: t[..., s] for n, s in names.items()} for t in (variance, variance, rows))
        g = LowRankGaussian(*parts)
        ratio = torch.linalg.solve(
            gram(lengths), g._interpolated(lengths, torch.float64, gram)
        )  # similar to a symmetric matrix
        worst = max(worst, float((torch.linalg.eigvals(ratio).real - 1).abs().max()))
    assert 1e-5 < worst < 1e-3  # not exact, which would mean that it was not interpolated


def test_two_products_with_the_matrix_suffice_in_float32_wherever_a_schedule_is(monkeypatch):
    """Beside one pass to project and one to move the weights: what an implicit step costs."""
    products = []
    original = gaussian_module._conjugate_gradients

    def counted(*given):
        solution, taken = original(*given)
        products.append(taken)
        return solution, taken

    monkeypatch.setattr(gaussian_module, "_conjugate_gradients", counted)
    monkeypatch.setattr(gaussian_module, "_SMALL", 0)
    g = gaussian(3, dtype=torch.float32)
    for relation in (1.0, 3.0):
        for step in range(40):
            theta = {n: m + 0.5 for n, m in g.mean.items()}
            rate = 0.1 * (1 + math.cos(math.pi * step / 41))
            g._step(theta, {"a": rate, "b": rate, "c": relation * rate}, torch.device("cpu"))
    assert max(products) == 2


@pytest.mark.parametrize("scale", [1e-22, 1e-26, 1e-30])
def test_a_float32_step_that_overflows_is_taken_again_in_float64(monkeypatch, scale):
    """Frozen weights under variances near 1e-30: delta / A and the K x K matrix are beyond float32, the answer is not."""
    g = torch.Generator().manual_seed(0)
    size, rank = 4_000, 20
    rows = 0.3 * torch.randn(rank, size, generator=g)
    rows -= rows.mean(0)
    variance, mean = 1e-7 * 10 ** (2 * torch.rand(size, generator=g)), torch.randn(size, generator=g)
    start = mean + 0.1 * torch.randn(size, generator=g)
    halves = {"a": slice(0, size // 2), "b": slice(size // 2, size)}
    ends = []
    for bound, dtype in ((1 << 30, torch.float64), (0, torch.float32)):
        monkeypatch.setattr(gaussian_module, "_SMALL", bound)
        parts = ({n: t[..., s].to(dtype) for n, s in halves.items()} for t in (mean, variance, rows))
        theta = {n: start[s].to(dtype, copy=True) for n, s in halves.items()}
        LowRankGaussian(*parts, scale=scale).proximal_step_(theta, {"b": 1e-4})
        ends.append(theta["b"].double())
    assert torch.isfinite(ends[1]).all()
    assert (ends[0] - ends[1]).norm() < 1e-4 * (ends[0] - start[halves["b"]]).norm()


def test_no_weight_moves_where_one_length_is_refused():
    model = tiny_resnet()
    penalty = PriorPenalty(random_prior(model, rank=2), model, num_examples=5, head_variance=1.0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    lengths = {id(p): 0.1 for p in model.parameters()} | {id(next(iter(penalty.trained_parameters().values()))): math.nan}
    with pytest.raises(ValueError, match="expected a length"):
        penalty.proximal_step_(lengths)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("length", [-0.1, math.inf, math.nan, 1e301, 10**400])
def test_a_step_that_is_no_length_is_refused_and_nothing_moves(length):
    g = gaussian(2)
    theta = {n: m + 0.5 for n, m in g.mean.items()}
    with pytest.raises(ValueError, match="expected a length between 0 and 1e300"):
        g.proximal_step_(theta, {"a": 0.1, "b": length})
    assert all(torch.equal(theta[n], m + 0.5) for n, m in g.mean.items())


def test_with_elementwise_steps_that_drift_the_factor_is_kept_until_it_no_longer_helps(grams):
    """Adam's step lengths change a little with every step: one matrix serves several, and every step is still exact."""
    g = gaussian(5, spread=6.0)
    noise = torch.Generator().manual_seed(0)
    lengths = {n: 10 ** (4 * torch.rand(s, generator=noise, dtype=torch.float64) - 3) for n, s in SHAPES.items()}
    sigma = dense(g)
    for _ in range(40):
        lengths = {n: c * (1 + 0.02 * torch.rand(c.shape, generator=noise, dtype=torch.float64)) for n, c in lengths.items()}
        theta = {n: m + torch.randn(m.shape, generator=noise, dtype=torch.float64) for n, m in g.mean.items()}
        delta, c = flat(theta) - flat(g.mean), flat(lengths).diag()
        g.proximal_step_(theta, lengths)
        expected = sigma @ torch.linalg.solve(sigma + c, delta)
        assert (flat(theta) - flat(g.mean) - expected).norm() < 1e-9 * delta.norm()
    assert 1 < len(grams) // len(set(grams)) < 30  # with five rows a new one is cheap
    lengths = {n: 1e4 * c for n, c in lengths.items()}  # far away: it is made anew
    theta = {n: m + 1.0 for n, m in g.mean.items()}
    delta, c = flat(theta) - flat(g.mean), flat(lengths).diag()
    g.proximal_step_(theta, lengths)
    assert (flat(theta) - flat(g.mean) - sigma @ torch.linalg.solve(sigma + c, delta)).norm() < 1e-9 * delta.norm()


@pytest.mark.parametrize("scale", [1.0, 1e6, 1e12])
@pytest.mark.parametrize("length", [0.0, 1e-12, 1e-4, 1.0])
def test_a_large_prior_works_in_float32_to_its_precision(monkeypatch, scale, length):
    """Above a bound on K x P the passes are float32. Rows that sum to zero, as all snapshots about their mean do, and
    variances far smaller than they: the K x K matrix has eigenvalues of 1 beside 1e12, which float32 cannot tell from 0.
    """
    g = torch.Generator().manual_seed(0)
    size, rank = 20_000, 20
    mean, variance = torch.randn(size, generator=g), 1e-12 * 10 ** (8 * torch.rand(size, generator=g))
    rows = 0.01 * torch.randn(rank, size, generator=g)
    rows -= rows.mean(0)
    start = mean + 0.1 * torch.randn(size, generator=g)
    ends = []
    for bound in (1 << 23, 0):
        monkeypatch.setattr("prior_hub.priors.gaussian._SMALL", bound)
        theta = start.clone()
        LowRankGaussian({"w": mean}, {"w": variance}, {"w": rows}, scale=scale).proximal_step_({"w": theta}, {"w": length})
        ends.append(theta.double())
    movement = (ends[0] - start).norm()
    assert (ends[0] - ends[1]).norm() < 1e-4 * movement + 1e-5  # 20,000 weights of size 1, rounded to float32
    if length == 0.0:
        assert torch.equal(ends[0], start.double())


def test_weights_that_are_not_finite_stay_so_and_nothing_is_blamed_on_the_prior():
    for rank in (0, 3):
        g = gaussian(rank)
        theta = {n: m + 0.5 for n, m in g.mean.items()}
        theta["a"][0, 0] = torch.nan
        for length in (0.1, torch.tensor(0.1)):
            assert g.proximal_step_(theta, dict.fromkeys(ALL, length)).isnan()


def test_a_step_with_a_wrong_name_or_shape_is_refused_and_nothing_moves():
    g = gaussian(2)
    theta = {n: m + 0.5 for n, m in g.mean.items()}
    before = flat(theta).clone()
    for wrong in ({"d": 0.1}, {"a": torch.ones(4, 3)}):
        with pytest.raises(PriorMatchError, match="cannot step"):
            g.proximal_step_(theta, wrong)
    assert torch.equal(flat(theta), before)


def test_steps_reach_channels_last_weights_in_place():
    model = tiny_resnet()
    prior = random_prior(model, rank=2)
    expected = tiny_resnet()
    PriorPenalty(prior, expected, num_examples=5).proximal_step_({id(p): 0.3 for p in expected.parameters()})
    model.to(memory_format=torch.channels_last)
    assert any(not p.is_contiguous() for p in model.parameters())
    PriorPenalty(prior, model, num_examples=5).proximal_step_({id(p): 0.3 for p in model.parameters()})
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-6), name


# ---------------------------------------------------------------------------- a stiff quadratic with a closed-form solution


class Quadratic(nn.Module):
    """1/2 (w - target)^T H (w - target) over two tensors: the NLL of a Gaussian likelihood, as a mean over N examples."""

    def __init__(self, dtype=torch.float64, head=False):
        super().__init__()
        g = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.zeros(4, 3, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(8, dtype=dtype))
        self.target = torch.randn(20, generator=g, dtype=torch.float64)
        factor = torch.randn(20, 20, generator=g, dtype=torch.float64)
        self.hessian = factor @ factor.T / 40 + 0.1 * torch.eye(20, dtype=torch.float64)

    def forward(self):
        delta = torch.cat([self.weight.reshape(-1), self.bias]).double() - self.target
        return 0.5 * delta @ self.hessian @ delta


QUADRATIC_N = 50


def stiff_prior(scale=1.0, dtype=torch.float64) -> PriorModel:
    """Rank 3, variances from 1e-8 to 1e-4, deviations of size 10: condition number of Sigma about 1e10."""
    g = torch.Generator().manual_seed(2)
    shapes = {"weight": (4, 3), "bias": (8,)}
    mean = {n: torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for n, s in shapes.items()}
    variance = {n: (1e-8 * 10 ** (4 * torch.rand(s, generator=g, dtype=torch.float64))).to(dtype) for n, s in shapes.items()}
    rows = {n: 5 * torch.randn(3, *s, generator=g, dtype=torch.float64).to(dtype) for n, s in shapes.items()}
    return PriorModel.from_tensors(mean, variance, rows, scale=scale)


def closed_form(model: Quadratic, prior: PriorModel) -> tuple[torch.Tensor, torch.Tensor]:
    """The MAP solution, mean + Sigma^(1/2) (...)... solved without inverting Sigma: (H + P/N) w = H t + P m / N."""
    names = ("weight", "bias")
    mean = flat(prior.mean, names)
    rows = torch.stack([flat({n: prior.deviations[n][k] for n in names}, names) for k in range(3)])
    sigma = prior.scale * (0.5 * flat(prior.variance, names).diag() + 0.25 * rows.T @ rows)
    # delta = Sigma (Sigma H + I/N)^-1 ... : (I/N + Sigma H) delta = Sigma H (t - m)
    left = torch.eye(20, dtype=torch.float64) / QUADRATIC_N + sigma @ model.hessian
    delta = torch.linalg.solve(left, sigma @ model.hessian @ (model.target - mean))
    return mean + delta, torch.linalg.eigvalsh(sigma)


OPTIMIZERS = {
    "sgd": lambda p, lr: SGD(p, lr=lr),
    "momentum": lambda p, lr: SGD(p, lr=lr, momentum=0.9),
    "dampened": lambda p, lr: SGD(p, lr=lr, momentum=0.5, dampening=0.5),
    "nesterov": lambda p, lr: SGD(p, lr=lr, momentum=0.8, nesterov=True),
    "adamw": lambda p, lr: AdamW(p, lr=lr, weight_decay=0.0),
    "amsgrad": lambda p, lr: Adam(p, lr=lr, amsgrad=True),
}


def minimised(model, prior, make, rate, steps, *, max_norm=None, decay=True):
    penalty = PriorPenalty(prior, model, num_examples=QUADRATIC_N)
    prior.initialize(model)
    optimizer = make(model.parameters(), rate)
    step = penalty.attach(optimizer)
    for i in range(steps):
        if decay and i > steps // 2:  # Adam's steps do not shrink by themselves
            for group in optimizer.param_groups:
                group["lr"] = rate * 1e-4 ** (2 * i / steps - 1)
        model().backward()
        if max_norm is not None:
            step.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([model.weight.reshape(-1), model.bias]).detach().double()


@pytest.mark.parametrize(
    "name", [n if n in ("momentum", "adamw") else pytest.param(n, marks=pytest.mark.slow) for n in OPTIMIZERS]
)
@pytest.mark.parametrize("max_norm", [pytest.param(None, marks=pytest.mark.slow), 1.5])
def test_every_optimizer_reaches_the_closed_form_map_of_a_stiff_quadratic(name, max_norm):
    model, prior = Quadratic(), stiff_prior()
    solution, spectrum = closed_form(model, prior)
    assert float(spectrum[-1] / spectrum[0]) > 1e10
    assert (
        max_norm is None or (model.hessian @ (solution - model.target)).norm() > 1.2 * max_norm
    )  # it clips at the solution too
    adaptive = name in ("adamw", "amsgrad")
    rate, steps = (0.05, 1500) if adaptive else (0.3, 800)
    found = minimised(model, prior, OPTIMIZERS[name], rate, steps, max_norm=max_norm, decay=adaptive)
    assert (found - solution).norm() < 1e-5 * solution.norm()
    gradient_form = PriorPenalty(prior, model, num_examples=QUADRATIC_N)
    assert 0.05 * gradient_form.curvature() > 1e5  # learning rate x precision / N: 2 is the limit of a gradient step


@pytest.mark.slow
def test_in_float32_it_reaches_the_map_to_the_precision_of_a_stored_weight():
    model, prior = Quadratic(torch.float32), stiff_prior(dtype=torch.float32)
    solution, _ = closed_form(model, prior)
    found = minimised(model, prior, OPTIMIZERS["momentum"], 0.2, 1000, decay=False)
    assert (found - solution).norm() < 1e-5 * solution.norm()


def test_where_the_implicit_form_converges_the_gradient_form_diverges():
    model, prior = Quadratic(), stiff_prior()
    penalty = PriorPenalty(prior, model, num_examples=QUADRATIC_N)
    prior.initialize(model)
    optimizer = SGD(model.parameters(), lr=0.1)
    for _ in range(20):
        model().backward()
        penalty.add_gradient_()
        optimizer.step()
        optimizer.zero_grad()
    assert not float(penalty.penalty()) < 1e20


@pytest.mark.parametrize("name", ["momentum", pytest.param("adamw", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_at_a_soft_prior_both_forms_end_in_the_same_weights(name):
    ends = []
    for implicit in (True, False):
        model, prior = Quadratic(), stiff_prior(scale=1e9)
        penalty = PriorPenalty(prior, model, num_examples=QUADRATIC_N)
        prior.initialize(model)
        optimizer = OPTIMIZERS[name](model.parameters(), 0.05)
        if implicit:
            penalty.attach(optimizer)
        for i in range(1200):
            for group in optimizer.param_groups:
                group["lr"] = 0.05 * (1e-4 ** max(0, i / 600 - 1) if name == "adamw" else 1)
            model().backward()
            if not implicit:
                penalty.add_gradient_()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(torch.cat([model.weight.reshape(-1), model.bias]).detach())
    assert (ends[0] - ends[1]).norm() < 1e-5 * ends[1].norm()
    assert (ends[0] - flat(prior.mean, ("weight", "bias"))).norm() > 0.1  # the data did move them


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6, 1e12])
def test_no_scale_and_no_learning_rate_sends_it_away(scale):
    for rate in (1e-3, 0.3):
        model, prior = Quadratic(), stiff_prior(scale=scale)
        found = minimised(model, prior, OPTIMIZERS["momentum"], rate, 150, decay=False)
        start = flat(prior.mean, ("weight", "bias"))
        assert (found - model.target).norm() < 2 * (start - model.target).norm()


def test_frozen_parameters_are_conditioned_on():
    """With the bias fixed away from its mean the weights settle where the conditional prior and the data agree."""
    model, prior = Quadratic(), stiff_prior()
    model.bias.requires_grad_(False)
    with torch.no_grad():
        model.bias.copy_(prior.mean["bias"] + 0.01)
    held = model.bias.clone()
    penalty = PriorPenalty(prior, model, num_examples=QUADRATIC_N)
    with torch.no_grad():
        model.weight.copy_(prior.mean["weight"])
    optimizer = SGD([model.weight], lr=0.1, momentum=0.9)
    penalty.attach(optimizer)
    for _ in range(1500):
        model().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(model.bias, held)
    # dense: conditional mean and covariance of the weight given the bias, then its MAP
    _, _, sigma = *closed_form(model, prior), dense_sigma(prior)
    s11, s12, s22 = sigma[:12, :12], sigma[:12, 12:], sigma[12:, 12:]
    gain = torch.linalg.solve(s22, s12.T).T
    mean = prior.mean["weight"].reshape(-1) + gain @ (held - prior.mean["bias"])
    conditional = s11 - gain @ s12.T
    h11, h12 = model.hessian[:12, :12], model.hessian[:12, 12:]
    pull = h11 @ (model.target[:12] - mean) - h12 @ (held - model.target[12:])
    delta = torch.linalg.solve(torch.eye(12, dtype=torch.float64) / QUADRATIC_N + conditional @ h11, conditional @ pull)
    found = model.weight.detach().reshape(-1)
    assert (found - mean - delta).norm() < 1e-4 * found.norm()


def dense_sigma(prior):
    names = ("weight", "bias")
    rows = torch.stack([flat({n: prior.deviations[n][k] for n in names}, names) for k in range(3)])
    return prior.scale * (0.5 * flat(prior.variance, names).diag() + 0.25 * rows.T @ rows)


def test_parameters_that_the_loss_does_not_reach_go_to_their_mean_under_adam_too():
    for make in (lambda p: SGD(p, lr=0.5), lambda p: AdamW(p, lr=0.1, weight_decay=0.0)):
        model = nn.Linear(2, 2)
        mean = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
        prior = PriorModel.from_tensors(mean, {n: torch.ones_like(m) for n, m in mean.items()})
        with torch.no_grad():
            model.bias.fill_(1.0)
        optimizer = make(model.parameters())
        PriorPenalty(prior, model, num_examples=1).attach(optimizer)
        for _ in range(100):
            optimizer.zero_grad()
            model.weight.sum().backward()  # not the bias
            optimizer.step()
        assert model.bias.abs().max() < 1e-3


def test_what_cannot_be_right_is_refused():
    model, prior = Quadratic(), stiff_prior()
    penalty = PriorPenalty(prior, model, num_examples=QUADRATIC_N)

    class Lars(SGD):
        def step(self, closure=None):
            return super().step(closure)

    SGD([nn.Parameter(torch.ones(1))], lr=0.1)  # from now on torch hooks SGD.step, and a subclass's as well
    for optimizer, message in (
        (RMSprop(model.parameters()), "knows the step lengths of torch.optim.SGD, Adam and AdamW, not of RMSprop"),
        (Lars(model.parameters(), lr=0.1), "not of Lars"),
        (SGD(model.parameters(), lr=0.1, maximize=True), "maximize=True"),
        (AdamW(model.parameters(), lr=0.1), r"decays 2 parameters that are under the prior \('weight', weight_decay=0.01\)"),
        (SGD([model.weight], lr=0.1), r"does not train 1 of the parameters under the prior \('bias'\)"),
    ):
        with pytest.raises(ValueError, match=message):
            penalty.attach(optimizer)
        assert not optimizer._optimizer_step_post_hooks
    optimizer = SGD(model.parameters(), lr=0.1)
    step = penalty.attach(optimizer)
    with pytest.raises(ValueError, match="attached to this optimizer already, and would count twice"):
        penalty.attach(optimizer)
    step.remove()
    penalty.attach(optimizer)

    class Mine(SGD):
        """Another name, the same arithmetic."""

    penalty.attach(Mine(model.parameters(), lr=0.1))


@pytest.mark.parametrize(
    ("make", "scale", "expected"),
    [
        (lambda p: SGD(p, lr=0.1), 1.0, "implicit"),
        (lambda p: SGD(p, lr=0.1), 1e9, "gradient"),
        (lambda p: AdamW(p, lr=0.01, weight_decay=0.0), 1.0, "implicit"),
        (lambda p: AdamW(p, lr=0.01, weight_decay=0.0), 1e9, "gradient"),
        (lambda p: RMSprop(p, lr=0.1), 1.0, "gradient"),
    ],
)
def test_auto_takes_the_implicit_form_where_a_gradient_step_would_overshoot_and_says_why(make, scale, expected):
    model, prior = Quadratic(), stiff_prior(scale=scale)
    penalty = PriorPenalty(prior, model, num_examples=QUADRATIC_N)
    optimizer = make(model.parameters())
    update, reason = chosen_update("auto", penalty, optimizer)
    assert update == expected
    if isinstance(optimizer, RMSprop):
        assert "RMSprop are not known" in reason
        with pytest.raises(ValueError, match=r"needs the step length of each weight.*not for RMSprop"):
            chosen_update("implicit", penalty, optimizer)
    else:
        assert ("not above" in reason) == (expected == "gradient")
        assert ("overshoot" in reason) == (expected == "implicit")
    assert chosen_update("gradient", penalty, optimizer) == ("gradient", "as asked for")
    with pytest.raises(ValueError, match="prior_update is 'explicit', expected one of 'auto', 'gradient', 'implicit'"):
        chosen_update("explicit", penalty, optimizer)


def test_auto_looks_at_the_highest_rate_of_a_schedule():
    model, prior = Quadratic(), stiff_prior()
    penalty = PriorPenalty(prior, model, num_examples=QUADRATIC_N)
    rate = 5 / penalty.curvature()
    optimizer = SGD(model.parameters(), lr=rate / 25, momentum=0.9)
    assert chosen_update("auto", penalty, optimizer)[0] == "gradient"
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=10)
    assert chosen_update("auto", penalty, optimizer)[0] == "implicit"


def test_groups_clipped_apart_are_shortened_apart_and_only_for_that_step():
    """One tensor's gradient is clipped to a tenth, the other's not at all; the next step is not clipped."""
    model, prior = Quadratic(), stiff_prior()
    start = {n: (prior.mean[n] + 0.1).clone() for n in ("weight", "bias")}
    penalty = PriorPenalty(prior, model, num_examples=QUADRATIC_N)
    optimizer = SGD(model.parameters(), lr=0.1)
    step = penalty.attach(optimizer)
    sigma, mean = dense_sigma(prior), flat(prior.mean, ("weight", "bias"))
    for clipped in (True, False):
        with torch.no_grad():
            for name, value in start.items():
                model.get_parameter(name).copy_(value)
        optimizer.zero_grad()
        model().backward()
        lengths = torch.full((20,), 0.1, dtype=torch.float64)
        if clipped:
            norm = float(model.weight.grad.norm())
            step.clip_grad_norm_([model.weight], norm / 10)
            step.clip_grad_norm_(model.bias, 1e6)
            lengths[:12] *= norm / 10 / (norm + 1e-6)
        gradient = torch.cat([model.weight.grad.reshape(-1), model.bias.grad])
        delta = flat(start, ("weight", "bias")) - 0.1 * gradient - mean
        optimizer.step()
        found = torch.cat([model.weight.reshape(-1), model.bias]).detach() - mean
        expected = sigma @ torch.linalg.solve(sigma + lengths.diag() / QUADRATIC_N, delta)
        assert (found - expected).norm() < 1e-9 * delta.norm()


def test_a_fused_optimizer_that_skips_its_step_skips_the_priors():
    model = nn.Linear(2, 2)
    prior = PriorModel.from_tensors(
        {n: torch.zeros_like(p) for n, p in model.named_parameters()},
        {n: torch.full_like(p, 1e-4) for n, p in model.named_parameters()},
    )
    optimizer = AdamW(model.parameters(), lr=0.1, weight_decay=0.0, fused=True)
    PriorPenalty(prior, model, num_examples=1).attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = model.weight.detach().clone()
    for factor, moves in ((torch.inf, False), (1.0, True)):
        optimizer.zero_grad()
        scaler.scale(factor * model(torch.ones(1, 2)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(model.weight, before) != moves


# ------------------------------------------------------------------------------------------------------------ the trainer


class Watch(TrainerCallback):
    """The weights and (clipped) gradients right before each step of the optimizer, and the weights at the end."""

    def __init__(self):
        self.weights, self.gradients, self.rates, self.end = [], [], [], None

    def on_train_begin(self, args, state, control, model, optimizer, **kwargs):
        named = dict(model.named_parameters())

        def look(inner, *_):
            self.weights.append({n: p.detach().clone() for n, p in named.items()})
            self.gradients.append({n: p.grad.clone() for n, p in named.items()})
            self.rates.append(inner.param_groups[0]["lr"])

        optimizer.optimizer.register_step_pre_hook(look)

    def on_train_end(self, args, state, control, model, **kwargs):
        self.weights.append({n: p.detach().clone() for n, p in model.named_parameters()})


def trained(model, prior, folder, **arguments):
    watch = Watch()
    settings = {"learning_rate": 0.02, "prior_initialize": False, "prior_update": "implicit", "prior_head_variance": 0.5}
    args = quiet_arguments(folder, **{**settings, **arguments})
    data = {"train_dataset": image_data(26), "eval_dataset": image_data(4, seed=3)}
    trainer = PriorTrainer(model=model, args=args, prior=prior, callbacks=[watch], **data)
    trainer.train()
    return trainer, watch


def assert_steps_are_the_dense_ones(prior, watch, num_examples, clips):
    """weights[i+1] = mean + Sigma (Sigma + c)^-1 (weights[i] - rate * gradient - mean), c = rate * clip / N, for plain SGD."""
    names = list(prior.mean)
    sigma, mean = dense_covariance(prior), flat(prior.mean, names)
    eye = torch.eye(len(mean), dtype=torch.float64)
    for i, clip in enumerate(clips):
        before, gradient, after, rate = watch.weights[i], watch.gradients[i], watch.weights[i + 1], watch.rates[i]
        c = rate * clip / num_examples
        delta = flat(before, names) - rate * flat(gradient, names) - mean
        expected = sigma @ torch.linalg.solve(sigma + c * eye, delta)
        found = flat(after, names) - mean
        assert (found - expected).norm() < 1e-6 * flat(after, names).norm()  # weights are stored in float32
        pulled = (delta - expected).norm()
        assert pulled > 1e3 * (found - expected).norm()  # the prior's part is seen: counted twice it would be off by it
        for name in before.keys() - set(names):
            there = (before[name] - rate * gradient[name]).double() * (0.5 / (0.5 + c))
            torch.testing.assert_close(after[name].double(), there, rtol=0, atol=1e-6)


CASES = [
    pytest.param(26, {"num_train_epochs": 1}, id="no accumulation"),
    pytest.param(26, {"num_train_epochs": 2, "gradient_accumulation_steps": 4}, id="short last window"),
    pytest.param(26, {"num_train_epochs": 1, "lr_scheduler_type": "linear"}, id="schedule"),
    pytest.param(26, {"num_train_epochs": 1, "max_grad_norm": 0.05, "gradient_accumulation_steps": 2}, id="clipping"),
    pytest.param(26, {"num_train_epochs": 1, "bf16": True}, id="bf16 autocast"),
]


@pytest.mark.parametrize("factory", [tiny_vit, tiny_resnet])
@pytest.mark.parametrize(("n", "settings"), CASES)
def test_the_implicit_step_is_taken_once_per_optimizer_step(tmp_path, factory, n, settings):
    model = factory()
    prior = random_prior(model, variance=1e-5, shift=0.01)
    trainer, watch = trained(model, prior, tmp_path, **settings)
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    bound = settings.get("max_grad_norm")
    clips = [min(1.0, bound / (norm + 1e-6)) if bound else 1.0 for norm in norms] or [1.0] * (len(watch.weights) - 1)
    assert len(clips) == len(watch.weights) - 1 == trainer.state.global_step
    assert bound is None or min(clips) < 0.9
    assert_steps_are_the_dense_ones(prior, watch, n, clips)


def test_a_step_that_the_scaler_skips_is_skipped_by_the_prior(tmp_path, monkeypatch):
    """fp16 on the CPU with a GradScaler that overflows at first: the weights stay until the first real step."""
    model = tiny_vit()
    prior = random_prior(model, variance=1e-5, shift=0.01)
    watch, skipped = Watch(), []

    class Skips(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            skipped.append({n: p.detach().clone() for n, p in model.named_parameters()})

    settings = {"learning_rate": 0.02, "prior_initialize": False, "prior_update": "implicit", "prior_head_variance": 0.5}
    args = quiet_arguments(tmp_path, max_steps=30, max_grad_norm=0.05, **settings)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer = PriorTrainer(model=model, args=args, train_dataset=image_data(26), prior=prior, callbacks=[watch, Skips()])
    accelerator = trainer.accelerator
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=10**6)
    accelerator.native_amp = True
    monkeypatch.setattr(accelerator.state, "_mixed_precision", "fp16")
    trainer.train()
    unmoved = [all(torch.equal(a[n], b[n]) for n in start) for a, b in zip([start, *skipped], skipped, strict=False)]
    assert unmoved[0], "the scaler did not overflow: the test tests nothing"
    assert not unmoved[-1]
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    real = [norm for norm, still in zip(norms, unmoved, strict=True) if not still]
    clips = [min(1.0, 0.05 / (norm + 1e-6)) for norm in real]
    assert len(clips) == len(watch.weights) - 1
    assert_steps_are_the_dense_ones(prior, watch, 26, clips)


def hooks(optimizer):
    inner = getattr(optimizer, "optimizer", optimizer)
    return len(inner._optimizer_step_post_hooks) + len(inner._optimizer_step_pre_hooks)


def test_the_prior_leaves_the_optimizer_when_training_ends_or_fails(tmp_path):
    class Fails(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2 and self.armed:
                raise KeyboardInterrupt

    model = tiny_resnet()
    prior = random_prior(model, variance=1e-5, shift=0.01)
    optimizer, fails = SGD(model.parameters(), lr=0.02), Fails()
    args = quiet_arguments(tmp_path, max_steps=3, prior_update="implicit")
    more = {"train_dataset": image_data(8), "optimizers": (optimizer, None), "callbacks": [fails]}
    trainer = PriorTrainer(model=model, args=args, prior=prior, **more)
    for fails.armed in (True, False):
        if fails.armed:
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
        else:
            trainer.train()
        assert hooks(optimizer) == 0
    assert trainer.prior_update == "implicit"


def test_a_resumed_run_equals_the_uninterrupted_one_to_the_bit(tmp_path):
    def trainer(folder, steps, **settings):
        model = tiny_resnet()
        prior = random_prior(model, variance=1e-5, shift=0.01)
        settings |= {"prior_update": "implicit", "prior_initialize": False, "max_grad_norm": 0.05, "learning_rate": 0.02}
        args = quiet_arguments(folder, max_steps=steps, lr_scheduler_type="constant_with_warmup", warmup_steps=2, **settings)
        args.optim = "adamw_torch"
        return PriorTrainer(model=model, args=args, train_dataset=image_data(26), prior=prior)

    whole = trainer(tmp_path / "whole", 8)
    whole.train()
    first = trainer(tmp_path / "part", 4, save_strategy="steps", save_steps=4)
    first.train()
    second = trainer(tmp_path / "part", 8)
    second.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-4"))
    for (name, p), q in zip(whole.model.named_parameters(), second.model.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_the_logged_prior_loss_is_the_penalty_at_the_weights_of_the_step(tmp_path):
    model = tiny_vit()
    prior = random_prior(model, variance=1e-5, shift=0.01)
    trainer, watch = trained(model, prior, tmp_path, max_steps=5, eval_strategy="steps", eval_steps=2)
    logged = [entry["prior_loss"] for entry in trainer.state.log_history if "prior_loss" in entry]
    sigma, names = dense_covariance(prior), list(prior.mean)
    assert len(logged) == 5
    for value, weights in zip(logged, watch.weights, strict=False):
        delta = flat(weights, names) - flat(prior.mean, names)
        nats = 0.5 * float(delta @ torch.linalg.solve(sigma, delta))
        nats += sum(float(p.double().square().sum()) for n, p in weights.items() if n not in prior.mean) / 0.5 / 2
        assert value == pytest.approx(nats / 26, rel=1e-3)  # weights are rounded to float32: 1e-7 of sd's of 3e-3
