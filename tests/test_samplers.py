"""SGLD, SGHMC and BAOA against closed forms, torch.optim, dense Gaussians and chi-square bounds.

Most is exact: on a quadratic loss one step is an affine map of (weights, momentum), found here by probing the optimizer with
chosen noise, and the stationary law follows from scipy's discrete Lyapunov equation. No sampling, so 1e-8 and not 5 %.
"""

import io
import math
import warnings

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg, stats

from prior_hub import LowRankGaussian, PriorWarning
from prior_hub.inference import noise as noise_module
from prior_hub.inference.baoa import BAOA, BoundGaussian
from prior_hub.inference.noise import NoiseSource
from prior_hub.inference.schedule import CyclicalSchedule, SamplingScheduler
from prior_hub.inference.sghmc import SGHMC
from prior_hub.inference.sgld import SGLD

torch.set_num_threads(1)

D = 5  # weights, in two tensors
SHAPES = {"w": (2, 1), "b": (3,)}
FRICTIONS = (0.05, 0.3, 0.7, 1.0)


class Chosen:
    """Noise that the test has chosen, in place of a `NoiseSource`; drawn twice in one step it is a KeyError."""

    def __init__(self, white, shared):
        self._white, self._shared = white, shared

    def start(self, step):
        pass

    def like(self, parameter):
        return self._white.pop(id(parameter))

    def shared(self, size, device, dtype):
        assert len(self._shared) == size
        return self._shared.to(device=device, dtype=dtype)


def split(vector):
    """(D,) -> one tensor per parameter."""
    parts, start = [], 0
    for shape in SHAPES.values():
        size = math.prod(shape)
        parts.append(vector[start : start + size].reshape(shape).clone())
        start += size
    return parts


def joined(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])


class Map:
    """z' = A z + b + Q xi + G (noise of the gradient), z = (weights, momentum) by probing; weights = origin + basis z."""

    def __init__(self, make, gradient, *, basis=None, inverse=None, origin=None, rank=0):
        self.parameters = [torch.nn.Parameter(torch.zeros(s, dtype=torch.float64)) for s in SHAPES.values()]
        self.optimizer = make(self.parameters)
        self.gradient = gradient
        self.origin = torch.zeros(D, dtype=torch.float64) if origin is None else origin
        basis, inverse = (torch.eye(D, dtype=torch.float64) if m is None else m for m in (basis, inverse))
        copies = 1 if isinstance(self.optimizer, SGLD) else 2
        into, out = (torch.block_diag(*[m] * copies) for m in (basis, inverse))
        nothing, quiet, exact = torch.zeros(copies * D).double(), torch.zeros(D + rank).double(), torch.zeros(D).double()

        def back(state):
            return out @ state

        self.b = self.step(nothing, quiet, exact)
        probes = [back(self.step(into[:, i], quiet, exact) - self.b) for i in range(copies * D)]
        units = torch.eye(D + rank, dtype=torch.float64)
        self.A = torch.stack(probes, 1).numpy()
        self.Q = torch.stack([back(self.step(nothing, u, exact) - self.b) for u in units], 1).numpy()
        self.G = torch.stack([back(self.step(nothing, quiet, inverse[i]) - self.b) for i in range(D)], 1).numpy()
        self.b = back(self.b).numpy()

    def step(self, state, white, gradient_noise):
        """One step of the optimizer from a given state with given noise."""
        for p, value in zip(self.parameters, split(self.origin + state[:D]), strict=True):
            p.data.copy_(value)
            self.optimizer.state[p] = {"step": torch.zeros(())}
        if len(state) > D:
            for p, value in zip(self.parameters, split(state[D:]), strict=True):
                self.optimizer.state[p]["momentum_buffer"] = value
        for p, g in zip(self.parameters, split(self.gradient(self.origin + state[:D]) + gradient_noise), strict=True):
            p.grad = g
        pairs = zip(self.parameters, split(white[:D]), strict=True)
        self.optimizer._noise = Chosen({id(p): v for p, v in pairs}, white[D:])
        self.optimizer.step()
        momenta = [self.optimizer.state[p]["momentum_buffer"] for p in self.parameters] if len(state) > D else []
        return torch.cat([joined(self.parameters) - self.origin, *(m.reshape(-1) for m in momenta)])

    @property
    def radius(self):
        return np.abs(np.linalg.eigvals(self.A)).max()

    def mean(self):
        return np.linalg.solve(np.eye(len(self.A)) - self.A, self.b)

    def covariance(self, gradient_variance=0.0):
        driven = self.Q @ self.Q.T + gradient_variance * self.G @ self.G.T
        return linalg.solve_discrete_lyapunov(self.A, driven, method="direct")


def positive(low, high, seed=0):
    """(D, D) symmetric with eigenvalues from `low` to `high`, along axes that are no weight's."""
    g = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(D, D, generator=g, dtype=torch.float64)).Q
    return axes @ torch.diag(torch.linspace(low, high, D, dtype=torch.float64)) @ axes.T


HESSIAN = positive(0.3, 5.0)
TARGET = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0], dtype=torch.float64)


def pull(theta):
    return HESSIAN @ (theta - TARGET)


PRECONDITIONERS = {"none": None, "tensor and number": (torch.tensor([[0.5], [3.0]]).double(), 0.2)}


def metric(preconditioner):
    """(diagonal of C as (D,), eigenvalues h and axes of C^1/2 H C^1/2)."""
    if preconditioner is None:
        diagonal = torch.ones(D, dtype=torch.float64)
    else:
        diagonal = joined(
            [torch.as_tensor(c, dtype=torch.float64).expand(s) for c, s in zip(preconditioner, SHAPES.values(), strict=True)]
        )
    root = diagonal.sqrt()
    h, axes = torch.linalg.eigh(root[:, None] * HESSIAN * root)
    return diagonal, h.numpy(), (root[:, None] * axes).numpy()


def maker(cls, lr, preconditioner=None, **arguments):
    def make(parameters):
        given = None if preconditioner is None else dict(zip(parameters, preconditioner, strict=True))
        return cls(parameters, lr, preconditioner=given, **arguments)

    return make


def close(found, expected, relative=1e-8):
    """Elementwise, relative to the largest entry."""
    return np.abs(np.asarray(found) - np.asarray(expected)).max() <= relative * np.abs(np.asarray(expected)).max()


# ------------------------------------------------------------------------------------------- stationary laws, exactly

LIMITS = {"SGLD": lambda f: 2.0, "SGHMC": lambda f: 2 * (2 - f), "BAOA": lambda f: 4.0}
SAMPLERS = {"SGLD": SGLD, "SGHMC": SGHMC, "BAOA": BAOA}
# the share of T / (N h) that the discretisation adds, for s = lr h, from each module's head
SHARES = {"SGLD": lambda s, f: 1 / (1 - s / 2), "SGHMC": lambda s, f: 1 / (1 - s / (2 * (2 - f))), "BAOA": lambda s, f: s**0}
CASES = [("SGLD", None), *((name, f) for name in ("SGHMC", "BAOA") for f in FRICTIONS)]


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS.values(), ids=PRECONDITIONERS)
@pytest.mark.parametrize(("name", "friction"), CASES)
def test_mean_and_covariance_on_a_quadratic_are_the_closed_form(name, friction, preconditioner):
    _, h, axes = metric(preconditioner)
    more = {} if friction is None else {"friction": friction}
    limit = LIMITS[name](friction)
    for share, temperature, size in ((0.01, 1.0, 1), (0.3, 0.2, 50), (0.7, 1.0, 1000), (0.99, 7.0, 20)):
        lr = share * limit / h.max()
        found = Map(maker(SAMPLERS[name], lr, preconditioner, num_data=size, temperature=temperature, **more), pull)
        expected = axes @ np.diag(temperature / (size * h) * SHARES[name](lr * h, friction)) @ axes.T
        assert found.radius < 1
        assert close(found.covariance()[:D, :D], expected)
        assert close(found.mean()[:D], TARGET)
        assert np.abs(found.mean()[D:]).sum() < 1e-8


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS.values(), ids=PRECONDITIONERS)
@pytest.mark.parametrize(("name", "friction"), CASES)
def test_beyond_the_stated_limit_the_chain_is_unstable_and_just_below_it_is_not(name, friction, preconditioner):
    _, h, _ = metric(preconditioner)
    more = {} if friction is None else {"friction": friction}
    limit = LIMITS[name](friction) / h.max()
    assert Map(maker(SAMPLERS[name], 0.999 * limit, preconditioner, num_data=10, **more), pull).radius < 1
    assert Map(maker(SAMPLERS[name], 1.001 * limit, preconditioner, num_data=10, **more), pull).radius > 1


@pytest.mark.parametrize("friction", FRICTIONS)
def test_momenta_have_the_stated_variance(friction):
    """BAOA: T / N exactly; SGHMC: T / N times 2 / (2 - friction) and its discretisation."""
    h, axes = np.linalg.eigh(HESSIAN.numpy())
    for lr in (1e-4, 0.1, 0.3):
        found = Map(maker(BAOA, lr, num_data=30, temperature=2.0, friction=friction), pull).covariance()[D:, D:]
        assert close(found, 2 / 30 * np.eye(D))
        found = Map(maker(SGHMC, lr, num_data=30, temperature=2.0, friction=friction), pull).covariance()[D:, D:]
        variance = 2 / 30 * 2 / (2 - friction) / (1 - lr * h / (2 * (2 - friction)))
        assert close(found, axes @ np.diag(variance) @ axes.T)


def test_sghmc_with_friction_1_is_sgld():
    one = Map(maker(SGHMC, 0.2, num_data=10, friction=1.0, temperature=0.5), pull)
    other = Map(maker(SGLD, 0.2, num_data=10, temperature=0.5), pull)
    assert close(one.A[:D, :D], other.A, 1e-12)
    assert np.abs(one.A[:D, D:]).max() == 0  # nothing of the momentum before
    assert close(one.Q[:D], other.Q, 1e-12)
    assert close(one.b[:D], other.b, 1e-12)


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS.values(), ids=PRECONDITIONERS)
@pytest.mark.parametrize(("name", "friction"), CASES)
def test_noise_of_minibatches_gives_the_stated_temperature(name, friction, preconditioner):
    """Variance V in each entry of C^1/2 g: with T = 0 the chain is as warm as N lr V times the stated factor."""
    diagonal, h, axes = metric(preconditioner)
    more = {} if friction is None else {"friction": friction}
    f, size, noise = friction or 1.0, 40, 0.3
    factor = (2 - f) / (4 * f) if name == "BAOA" else 1 / (2 * f)
    for lr in (0.01 / h.max(), 0.5 * LIMITS[name](f) / h.max()):
        found = Map(maker(SAMPLERS[name], lr, preconditioner, num_data=size, temperature=0.0, **more), pull)
        found.G = found.G @ np.diag(diagonal.numpy() ** -0.5)
        warm = size * lr * noise * factor
        share = 1 / (1 - lr * h / 4) if name == "BAOA" else SHARES[name](lr * h, f)
        expected = axes @ np.diag(warm / (size * h) * share) @ axes.T
        assert close(found.covariance(noise)[:D, :D], expected)


# ---------------------------------------------------------------------------------------- BAOA under a prior, exactly

RANK = 2


def stiff_prior(seed=0, low=1e-11):
    """(a low-rank Gaussian over both tensors, L, L^-1) with Sigma = L L^T: condition number above 1e10, means far from zero.

    L is of 40 digits and then rounded: Sigma's smallest eigenvalue is lost where Sigma itself is rounded to float64.
    """
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    mean = dict(zip(SHAPES, split(draw(D)), strict=True))
    order = torch.randperm(D, generator=g)
    # the low-rank part widens two directions, so that three small entries are needed for one that stays narrow
    variance = torch.tensor([low, 2 * low, 5 * low, low**0.5, 1.0], dtype=torch.float64)[order]
    rows = draw(RANK, D)
    deviations = {n: torch.stack([split(r)[i] for r in rows]) for i, n in enumerate(SHAPES)}
    gaussian = LowRankGaussian(mean, dict(zip(SHAPES, split(variance), strict=True)), deviations, scale=1.5)
    # SWAG's weights: half of each; low_rank_weight 1 / (2 (K - 1))
    with mpmath.workdps(40):
        u, half = mpmath.matrix(rows.tolist()), mpmath.mpf(1.5) / 2
        sigma = half * mpmath.diag(variance.tolist()) + half / (RANK - 1) * u.T * u
        root = mpmath.cholesky(sigma)
        inverse = root**-1
        return gaussian, *(torch.tensor(m.tolist(), dtype=torch.float64) for m in (root, inverse))


def under(gaussian, lr, **arguments):
    def make(parameters):
        return BAOA(parameters, lr, prior=[BoundGaussian(gaussian, dict(zip(SHAPES, parameters, strict=True)))], **arguments)

    return make


def around(gaussian, root, inverse):
    """Coordinates in which the prior is standard normal: elsewhere nothing is left of its narrow directions after rounding."""
    return {"basis": root, "inverse": inverse, "origin": joined(gaussian.mean.values())}


def informed(gaussian, root, inverse, low, high):
    """(gradient of the NLL, G) for curvatures `low` to `high` where the prior is standard normal, lowest at mean + L TARGET.

    The Hessian L^-T G L^-1 commutes neither with the prior's precision nor with its diagonal.
    """
    whitened, lowest = positive(low, high, seed=3), joined(gaussian.mean.values()) + root @ TARGET
    return lambda theta: inverse.T @ (whitened @ (inverse @ (theta - lowest))), whitened


@pytest.mark.parametrize("friction", FRICTIONS)
def test_baoa_under_a_stiff_prior_has_the_exact_posterior(friction):
    gaussian, root, inverse = stiff_prior()
    assert torch.linalg.cond(root) ** 2 > 1e10
    for share, high, size, temperature in ((0.02, 0.5, 1, 1.0), (0.3, 40.0, 100, 0.25), (0.98, 0.01, 5000, 3.0)):
        gradient, whitened = informed(gaussian, root, inverse, 1e-4 * high, high)
        lr = share * 4 / high
        make = under(gaussian, lr, num_data=size, temperature=temperature, friction=friction)
        found = Map(make, gradient, rank=RANK, **around(gaussian, root, inverse))
        shrunk = torch.linalg.inv(torch.eye(D).double() + size * whitened)  # in coordinates in which the prior is I
        assert found.radius < 1
        assert close(found.covariance()[:D, :D], temperature * shrunk, 1e-7)
        assert close(found.mean()[:D], shrunk @ (size * whitened @ TARGET), 1e-7)
        over = under(gaussian, 1.001 * 4 / high, num_data=size, friction=friction)
        assert Map(over, gradient, rank=RANK, **around(gaussian, root, inverse)).radius > 1


@pytest.mark.parametrize("friction", FRICTIONS)
def test_baoa_with_the_flow_of_the_priors_diagonal_has_the_exact_posterior_too(friction):
    """The rest of the prior is in the gradient; lr is limited where N(mean, diagonal) is standard normal."""
    gaussian, root, inverse = stiff_prior(7, low=1e-6)
    precision, centre = inverse.T @ inverse, joined(gaussian.mean.values())
    diagonal = joined(gaussian.diagonal_part().marginal_variance().values())
    rest = diagonal.sqrt()[:, None] * (precision - torch.diag(1 / diagonal)) * diagonal.sqrt()
    curvatures = torch.linalg.eigvalsh(rest)
    assert curvatures.min() > -1
    assert curvatures.max() < 1e-9
    for share, high, size, temperature in ((0.1, 0.5, 1, 1.0), (0.5, 4.0, 100, 0.25)):
        data, whitened = informed(gaussian, root, inverse, 0.1 * high, high)
        hessian = inverse.T @ whitened @ inverse
        largest = torch.linalg.eigvalsh(diagonal.sqrt()[:, None] * hessian * diagonal.sqrt() + rest / size).max()

        def gradient(theta, data=data, size=size):
            return data(theta) + precision @ (theta - centre) / size

        def make(parameters, share=share, largest=largest, size=size, temperature=temperature):
            named = dict(zip(SHAPES, parameters, strict=True))
            prior = [BoundGaussian(gaussian.diagonal_part(), named, in_gradient=True)]
            lr = float(4 * share / largest)
            return BAOA(parameters, lr, num_data=size, temperature=temperature, friction=friction, prior=prior)

        found = Map(make, gradient, rank=0, **around(gaussian, root, inverse))
        shrunk = torch.linalg.inv(torch.eye(D).double() + size * whitened)
        assert found.radius < 1
        assert close(found.covariance()[:D, :D], temperature * shrunk, 1e-6)  # the two priors differ by a factor 1e6
        assert close(found.mean()[:D], shrunk @ (size * whitened @ TARGET), 1e-6)
        assert Map(lambda ps, make=make: make(ps, share=1.001), gradient, **around(gaussian, root, inverse)).radius > 1


def test_the_step_on_lists_of_tensors_is_the_step_tensor_by_tensor(monkeypatch):
    gaussian, *_ = stiff_prior(8, low=1e-3)
    runs = []
    for plainly in (True, False):
        parameters = [torch.nn.Parameter(value.clone()) for value in gaussian.mean.values()]
        bound = BoundGaussian(gaussian.diagonal_part(), dict(zip(SHAPES, parameters, strict=True)), in_gradient=True)
        optimizer = BAOA(parameters, 0.7, num_data=9, friction=0.3, prior=[bound])
        assert optimizer._is_plain(bound)
        for step in range(5):
            for i, parameter in enumerate(parameters):
                parameter.grad = torch.full_like(parameter, 0.1 * (step + i))
            if not plainly:
                monkeypatch.setattr(optimizer, "_is_plain", lambda bound: False)
            optimizer.step()
        runs.append(joined(parameters))
    torch.testing.assert_close(*runs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("friction", FRICTIONS)
def test_baoa_without_data_has_the_priors_law_at_every_learning_rate(friction):
    gaussian, root, inverse = stiff_prior(1)
    for lr in (1e-3, 1.0, 1e3, 1e6):
        make = under(gaussian, lr, num_data=10, temperature=0.5, friction=friction)
        found = Map(make, torch.zeros_like, rank=RANK, **around(gaussian, root, inverse))
        # U = N L = the prior's penalty, so that the temperature counts for the prior too
        assert close(
            found.covariance(), 0.5 * torch.block_diag(torch.eye(D), torch.eye(D) / 10), 1e-6
        )  # lr 1e-3 gathers 1e5 steps' rounding
        assert found.radius < 1


def test_baoa_with_part_of_the_weights_under_a_prior_has_the_exact_posterior():
    """A new head has a flat prior: Gaussian times likelihood over both tensors, noise shared by none of the head's."""
    whole, *_ = stiff_prior(2, low=1e-4)
    gaussian = whole.select(["b"])
    variance, rows = gaussian.variance["b"], gaussian.deviations["b"]
    sigma = 1.5 * (0.5 * torch.diag(variance) + 0.5 * rows.T @ rows)
    size, scale = 20, 0.01
    precision = size * scale * HESSIAN
    precision[2:, 2:] += torch.linalg.inv(sigma)

    def make(parameters):
        return BAOA(parameters, 0.5, num_data=size, friction=0.2, prior=[BoundGaussian(gaussian, {"b": parameters[1]})])

    found = Map(make, lambda theta: scale * pull(theta), rank=RANK)
    assert found.radius < 1
    expected = torch.linalg.inv(precision)
    assert close(found.covariance()[:D, :D], expected, 1e-8)
    right = size * scale * HESSIAN @ TARGET
    right[2:] += torch.linalg.solve(sigma, gaussian.mean["b"])
    assert close(found.mean()[:D], expected @ right, 1e-8)


@pytest.mark.parametrize(("friction", "share"), [(0.1, 0.1), (0.5, 0.5), (1.0, 0.9)])
def test_at_temperature_0_baoa_comes_to_rest_at_the_map_solution(friction, share):
    gaussian, root, inverse = stiff_prior(4, low=1e-8)
    gradient, whitened = informed(gaussian, root, inverse, 0.2, 0.5)
    size = 10
    parameters = [torch.nn.Parameter(m.clone()) for m in gaussian.mean.values()]
    optimizer = under(gaussian, share * 4 / 0.5, num_data=size, temperature=0.0, friction=friction)(parameters)
    for _ in range(500):
        for p, g in zip(parameters, split(gradient(joined(parameters))), strict=True):
            p.grad = g
        optimizer.step()
    shrunk = torch.linalg.inv(torch.eye(D).double() + size * whitened)
    expected = joined(gaussian.mean.values()) + root @ (shrunk @ (size * whitened @ TARGET))
    away = inverse @ (joined(parameters) - expected)  # in standard deviations of the prior
    assert away.abs().max() < 1e-6


# --------------------------------------------------------------------------------- the real noise, in many chains at once

CHAINS, WIDTH = 10_000, 3
CURVATURE = torch.tensor([[2.0, 0.8, -0.3], [0.8, 1.0, 0.2], [-0.3, 0.2, 0.5]], dtype=torch.float64)
MODE = torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64)


def chains(make, steps, *, gradient_noise=0.0, after=None, start=None):
    """(CHAINS, WIDTH) weights after `steps`, each row a chain."""
    weights = torch.nn.Parameter(torch.zeros(CHAINS, WIDTH, dtype=torch.float64) if start is None else start.clone())
    optimizer = make([weights])
    generator = torch.Generator().manual_seed(99)
    for step in range(steps):
        weights.grad = (weights.detach() - MODE) @ CURVATURE
        if gradient_noise:
            noise = torch.randn(weights.shape, generator=generator, dtype=torch.float64)
            weights.grad += math.sqrt(gradient_noise) * noise
        optimizer.step()
        if after is not None:
            after(step, optimizer, weights)
    return weights.detach()


def assert_law(draws, mean, covariance):
    """Means, variances and covariances of independent draws (n, d), each within five standard errors."""
    n, variance = len(draws), covariance.diagonal()
    assert ((draws.mean(0) - mean).abs() < 5 * (variance / n).sqrt()).all()
    away = draws - mean
    found = away.T @ away / n
    errors = ((variance[:, None] * variance + covariance.square()) / n).sqrt()  # chi-square on the diagonal
    assert ((found - covariance).abs() < 5 * errors).all(), (found, covariance)


@pytest.mark.parametrize(("name", "friction"), [("SGLD", None), ("SGHMC", 0.3), ("BAOA", 0.3)])
def test_ten_thousand_chains_have_the_closed_forms_mean_and_covariance(name, friction):
    h, axes = torch.linalg.eigh(CURVATURE)
    size, temperature, lr = 25, 2.0, 0.4
    more = {} if friction is None else {"friction": friction}
    draws = chains(maker(SAMPLERS[name], lr, num_data=size, temperature=temperature, **more), 120)
    variance = temperature / (size * h) * SHARES[name](lr * h, friction)
    assert_law(draws, MODE, axes @ torch.diag(variance) @ axes.T)


@pytest.mark.parametrize(("name", "friction"), [("SGLD", None), ("SGHMC", 0.3), ("BAOA", 0.3), ("BAOA", 1.0)])
def test_noise_of_minibatches_warms_the_chains_as_predicted_and_as_measured(name, friction):
    h, axes = torch.linalg.eigh(CURVATURE)
    size, temperature, lr, noise, f = 25, 1.0, 0.2, 0.5, friction or 1.0
    more = {} if friction is None else {"friction": friction}
    factor = (2 - f) / (4 * f) if name == "BAOA" else 1 / (2 * f)
    warm = size * lr * noise * factor
    make = maker(SAMPLERS[name], lr, num_data=size, temperature=temperature, **more)
    share = 1 / (1 - lr * h / 4) if name == "BAOA" else SHARES[name](lr * h, friction)
    variance = (temperature * SHARES[name](lr * h, friction) + warm * share) / (size * h)
    seen, gradients = [], []

    def measure(step, optimizer, weights):
        if step == 100:
            assert optimizer.effective_temperature() is None
            optimizer.measure()
        if step in (101, 102):
            gradients.append(weights.grad.clone())
        if step == 103:
            seen.append(optimizer.effective_temperature())

    draws = chains(make, 400, gradient_noise=noise, after=measure)
    assert_law(draws, MODE, axes @ torch.diag(variance) @ axes.T)
    half_square = 0.5 * float((gradients[1] - gradients[0]).square().mean())
    assert seen[0] == pytest.approx(temperature + size * lr * factor * half_square, rel=1e-12)
    # from below up to statistics (V's estimate: a variance of 2 / n); above by what the head of sampler.py says, lr h and so on
    error, moved = 5 * warm * math.sqrt(2 / (CHAINS * WIDTH)), lr * float(h.max())
    assert temperature + warm - error < seen[0] < temperature + warm * (1 + moved) + error + moved**2 / f * (temperature + warm)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_measured_temperature_without_noise_of_minibatches_is_a_little_above_the_chains_own(name):
    """By the share that the head of sampler.py states."""
    lr, temperature, f = 0.02, 1.5, 0.2
    more = {} if name == "SGLD" else {"friction": f}
    found = []

    def measure(step, optimizer, weights):
        if step == 300:
            optimizer.measure()
        if step == 302:
            found.append(optimizer.effective_temperature())

    variance = temperature / 25 * torch.linalg.inv(CURVATURE)
    start = MODE + torch.randn(CHAINS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) @ (
        torch.linalg.cholesky(variance).T
    )
    chains(maker(SAMPLERS[name], lr, num_data=25, temperature=temperature, **more), 303, after=measure, start=start)
    share = lr**2 * float((CURVATURE @ CURVATURE).trace()) / WIDTH  # the mean of (lr h)^2
    share *= {"SGLD": 1 / 2, "SGHMC": 1 / (2 * f * (2 - f)), "BAOA": (2 - f) ** 2 / (16 * f)}[name]
    assert found[0] - temperature == pytest.approx(temperature * share, rel=0.1)


def test_the_measured_temperature_counts_in_the_priors_metric():
    """Gradient noise that is white where the prior is standard normal: N lr V (2 - friction) / (4 friction) on top."""
    size, g = 800, torch.Generator().manual_seed(5)
    rows = torch.randn(2, size, generator=g, dtype=torch.float64)
    gaussian = LowRankGaussian(
        {"w": torch.zeros(size).double()}, {"w": torch.full((size,), 1e-6).double()}, {"w": rows}, low_rank_weight=0.5
    )
    p = torch.nn.Parameter(torch.zeros(size, dtype=torch.float64))
    optimizer = BAOA([p], 0.3, num_data=7, temperature=0.25, friction=0.4, prior=[BoundGaussian(gaussian, {"w": p})])
    optimizer.measure()
    sigma = torch.diag(torch.full((size,), 0.5e-6).double()) + 0.5 * rows.T @ rows
    precision_root = torch.linalg.cholesky(torch.linalg.inv(sigma))
    for _ in range(2):
        p.grad = 3.0 * precision_root @ torch.randn(size, generator=g, dtype=torch.float64)  # V = 9
        optimizer.step()
    warm = 7 * 0.3 * 9 * (2 - 0.4) / (4 * 0.4)
    assert abs(optimizer.effective_temperature() - 0.25 - warm) < 5 * warm * math.sqrt(2 / size)


def test_baoa_alone_draws_the_priors_mean_and_its_covariance_between_tensors():
    """lr = 4 N and friction 1: a quarter turn with fresh momentum, so that every second step is an independent draw."""
    g = torch.Generator().manual_seed(0)
    rows = {n: torch.randn(3, *s, generator=g, dtype=torch.float64) for n, s in SHAPES.items()}
    mean = {n: torch.randn(s, generator=g, dtype=torch.float64) for n, s in SHAPES.items()}
    variance = {n: torch.full(s, 1e-2, dtype=torch.float64) for n, s in SHAPES.items()}
    gaussian = LowRankGaussian(mean, variance, rows, scale=2.0)
    parameters = [torch.nn.Parameter(m.clone()) for m in mean.values()]
    optimizer = under(gaussian, 4 * 12.0, num_data=12, friction=1.0)(parameters)
    draws = []
    for step in range(2 * 1200 + 2):
        optimizer.step()
        if step % 2 and step > 1:
            draws.append(joined(parameters))
    flat = torch.cat([r.reshape(3, -1) for r in rows.values()], 1)
    sigma = 2.0 * (0.5 * 1e-2 * torch.eye(D).double() + 0.25 * flat.T @ flat)
    assert_law(torch.stack(draws), joined(mean.values()), sigma)
    block, n = sigma[:2, 2:], len(draws)
    assert (block.abs() > 10 * (sigma.diagonal()[:2, None] * sigma.diagonal()[2:] / n).sqrt()).any()  # far from zero


@pytest.mark.parametrize("friction", [0.1, 0.5])
def test_a_learning_rate_schedule_leaves_the_temperature_of_the_momentum_alone(friction):
    """From lr_0 to lr_0 / 100 in 60 steps: velocities would need a rescaling by 10. From the first step on."""
    size, temperature = 10, 0.5
    weights = torch.nn.Parameter(torch.zeros(CHAINS, WIDTH, dtype=torch.float64))
    optimizer = SGHMC([weights], 1.0, num_data=size, temperature=temperature, friction=friction)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60, eta_min=0.01)
    expected, n = temperature / size * 2 / (2 - friction), CHAINS * WIDTH
    for _ in range(60):
        weights.grad = torch.zeros_like(weights)
        optimizer.step()
        scheduler.step()
        momentum = optimizer.state[weights]["momentum_buffer"]
        assert abs(float(momentum.square().mean()) / expected - 1) < 5 * math.sqrt(2 / n)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


@pytest.mark.parametrize("name", ["SGHMC", "BAOA"])
def test_after_a_cycle_weights_are_at_the_temperature_of_the_samples(name):
    """The rate falls to its lowest within the cycle; before, the chain explored at temperature 0."""
    size, temperature = 25, 2.0
    schedule = CyclicalSchedule(160, num_cycles=1, samples_per_cycle=1, exploration=0.2)
    weights = torch.nn.Parameter(torch.zeros(CHAINS, WIDTH, dtype=torch.float64))
    optimizer = SAMPLERS[name]([weights], 0.2, num_data=size, temperature=temperature, friction=0.3)
    scheduler, temperatures = SamplingScheduler(optimizer, schedule), []
    for step in range(schedule.num_steps):
        temperatures.append(optimizer.param_groups[0]["temperature"])
        weights.grad = (weights.detach() - MODE) @ CURVATURE
        optimizer.step()
        scheduler.step()
        if step == 31:
            before = weights.detach().std(0)
    assert temperatures == [0.0] * 32 + [temperature] * 128
    assert (before < 1e-3).all()  # exploration adds no noise
    ratio = (weights.detach() - MODE).square().mean(0) / (temperature / size * torch.linalg.inv(CURVATURE).diagonal())
    # five standard errors and what is left of SGHMC's own discretisation at rates up to 0.19
    slack = 0.03 if name == "SGHMC" else 0.005
    assert ((ratio - 1).abs() < 5 * math.sqrt(2 / CHAINS) + slack).all()


# -------------------------------------------------------------------------------------------------- as an optimizer


def quadratic_run(optimizer, parameters, steps=30, *, rates=None):
    for step in range(steps):
        if rates is not None:
            for group in optimizer.param_groups:
                group["lr"] = rates[step]
        for p, g in zip(parameters, split(pull(joined(parameters)).to(parameters[0].dtype)), strict=True):
            p.grad = g
        optimizer.step()
    return joined(parameters)


def fresh(dtype=torch.float64):
    return [torch.nn.Parameter(t.to(dtype)) for t in split(torch.linspace(-1, 1, D, dtype=torch.float64))]


def test_at_temperature_0_sgld_is_torchs_sgd():
    ours, theirs = fresh(), fresh()
    rates = [0.1 / (1 + k) for k in range(30)]
    a = quadratic_run(SGLD(ours, 0.1, num_data=10, temperature=0.0), ours, rates=rates)
    b = quadratic_run(torch.optim.SGD(theirs, 0.1), theirs, rates=rates)
    assert torch.equal(a, b)


@pytest.mark.parametrize("friction", FRICTIONS)
def test_at_temperature_0_sghmc_is_torchs_sgd_with_momentum(friction):
    ours, theirs = fresh(), fresh()
    a = quadratic_run(SGHMC(ours, 0.07, num_data=10, temperature=0.0, friction=friction), ours)
    b = quadratic_run(torch.optim.SGD(theirs, 0.07, momentum=1 - friction), theirs)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_closure_is_called_with_gradients_and_its_loss_comes_back():
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = SGLD([p], 0.5, num_data=10, temperature=0.0)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0
    assert torch.equal(p.detach(), torch.zeros(3, dtype=torch.float64))


KINDS = ("SGLD", "SGHMC", "BAOA", "BAOA with a prior")


def sampler(kind, parameters, lr=0.02, **arguments):
    if kind == "BAOA with a prior":
        gaussian, *_ = stiff_prior(low=1e-2)
        dtype = parameters[0].dtype
        gaussian = LowRankGaussian(
            {n: t.to(dtype) for n, t in gaussian.mean.items()},
            {n: t.to(dtype) for n, t in gaussian.variance.items()},
            {n: t.to(dtype) for n, t in gaussian.deviations.items()},
        )
        return under(gaussian, lr, num_data=10, **arguments)(parameters)
    return SAMPLERS[kind](parameters, lr, num_data=10, **arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_chain_goes_on_bit_for_bit_in_the_middle_of_a_cycle(kind):
    schedule = CyclicalSchedule(40, num_cycles=2, samples_per_cycle=1, exploration=0.4)

    def go(parameters, optimizer, scheduler, steps):
        for _ in range(steps):
            for p, g in zip(parameters, split(pull(joined(parameters))), strict=True):
                p.grad = g.to(p.dtype)
            optimizer.step()
            scheduler.step()

    whole = fresh(torch.float32)
    optimizer = sampler(kind, whole)
    scheduler = SamplingScheduler(optimizer, schedule)
    go(whole, optimizer, scheduler, 13)
    file = io.BytesIO()
    torch.save({"weights": whole, "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, file)
    go(whole, optimizer, scheduler, 15)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    parts = [torch.nn.Parameter(w.detach().clone()) for w in saved["weights"]]
    again = sampler(kind, parts)
    follower = SamplingScheduler(again, schedule)
    again.load_state_dict(saved["optimizer"])
    follower.load_state_dict(saved["scheduler"])
    assert again.steps_taken() == 13
    go(parts, again, follower, 15)
    assert torch.equal(joined(whole), joined(parts))
    assert again.param_groups[0]["temperature"] == optimizer.param_groups[0]["temperature"]
    assert again.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    for p, q in zip(whole, parts, strict=True):
        assert all(torch.equal(v, again.state[q][k]) for k, v in optimizer.state[p].items())


@pytest.mark.parametrize("kind", KINDS)
def test_chains_and_seeds_differ_and_the_same_ones_agree(kind):
    runs = {}
    for seed, chain in ((0, 0), (0, 1), (1, 0), (1, 1)):
        first, second = fresh(), fresh()
        runs[seed, chain] = quadratic_run(sampler(kind, first, seed=seed, chain=chain), first)
        assert torch.equal(runs[seed, chain], quadratic_run(sampler(kind, second, seed=seed, chain=chain), second))
    values = list(runs.values())
    for i, one in enumerate(values):
        for other in values[:i]:
            assert ((one - other).abs() > 1e-6).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_global_generator_is_neither_read_nor_advanced(kind):
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        parameters = fresh()
        results.append(quadratic_run(sampler(kind, parameters), parameters, 5))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*results)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_without_a_gradient_are_left_alone_except_under_a_prior(kind):
    parameters = fresh()
    start = parameters[1].detach().clone()
    optimizer = sampler(kind, parameters)
    for _ in range(5):
        parameters[0].grad = torch.ones_like(parameters[0])
        parameters[1].grad = None
        optimizer.step()
    if kind == "BAOA with a prior":
        assert (parameters[1] != start).all()
    else:
        assert torch.equal(parameters[1], start)
        assert not optimizer.state.get(parameters[1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_without_any_gradient_and_a_frozen_group_are_no_error(kind):
    parameters, frozen = fresh(), torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = sampler(kind, parameters)
    optimizer.add_param_group({"params": [frozen]})
    optimizer.step()
    parameters[0].grad = torch.ones_like(parameters[0])
    optimizer.step()
    assert torch.equal(frozen.detach(), torch.ones(2, dtype=torch.float64))


def test_a_parameter_of_the_prior_that_the_loss_does_not_use_has_the_conditional_law():
    """Exactly: weights of the Gaussian without a likelihood of their own follow those that have one."""
    gaussian, root, inverse = stiff_prior(6, low=1e-3)
    only = torch.zeros(D, D, dtype=torch.float64)
    only[:2, :2] = torch.tensor([[0.3, 0.1], [0.1, 0.2]])

    def gradient(theta):
        return only @ (theta - TARGET)

    found = Map(under(gaussian, 0.1, num_data=10, friction=0.3), gradient, rank=RANK, **around(gaussian, root, inverse))
    whitened = torch.linalg.inv(torch.eye(D).double() + 10 * root.T @ only @ root)
    assert close(found.covariance()[:D, :D], whitened)


def loss_of(weights, rows):
    """Mean over rows of a quadratic."""
    return 0.5 * ((rows @ weights[0] - weights[1].sum()).square()).mean()


@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_gradients_leave_the_chain_alone(kind):
    rows = torch.randn(8, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    results = []
    for pieces in (1, 4):
        parameters = fresh()
        optimizer = sampler(kind, parameters)
        for _ in range(10):
            optimizer.zero_grad()
            for part in rows.chunk(pieces):
                (loss_of(parameters, part) / pieces).backward()
            optimizer.step()
        results.append(joined(parameters))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_scaler_leaves_the_chain_alone_and_a_step_it_skips_takes_no_noise(kind):
    """Scales are powers of two, so bit for bit."""
    rows = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    results = []
    for scaled in (False, True):
        parameters = fresh(torch.float32)
        optimizer = sampler(kind, parameters)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
        for step in range(12):
            optimizer.zero_grad()
            overflows = step in (0, 5)
            if overflows and not scaled:
                continue
            loss = loss_of(parameters, rows)
            scaler.scale(loss * torch.inf if overflows else loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert optimizer.steps_taken() == 10
        results.append(joined(parameters))
    assert torch.equal(*results)


def test_groups_have_their_own_settings():
    slow, fast = torch.nn.Parameter(torch.ones(4).double()), torch.nn.Parameter(torch.ones(4).double())
    optimizer = SGLD([{"params": [slow], "lr": 0.0}, {"params": [fast], "temperature": 0.0}], 0.1, num_data=10)
    slow.grad, fast.grad = torch.ones(4).double(), torch.ones(4).double()
    optimizer.step()
    assert torch.equal(slow.detach(), torch.ones(4).double())
    assert torch.equal(fast.detach(), 1 - 0.1 * torch.ones(4).double())


def test_a_group_added_later_takes_part():
    gaussian, *_ = stiff_prior(low=1e-2)
    parameters, head = fresh(), torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = under(gaussian, 0.1, num_data=10)(parameters)
    optimizer.add_param_group({"params": [head], "lr": 0.05})
    head.grad = torch.ones_like(head)
    optimizer.step()
    assert (head != 0).all()


# ---------------------------------------------------------------------------------------------------------- noise


def pretend_shards(monkeypatch, shards):
    monkeypatch.setattr(noise_module, "shard_index", lambda tensor: shards[id(tensor)])


def test_replicas_draw_the_same_noise_and_shards_different(monkeypatch):
    tensors = [torch.zeros(50) for _ in range(3)]
    pretend_shards(monkeypatch, {id(t): i for t, i in zip(tensors, (0, 0, 1), strict=True)})
    sources = [NoiseSource(seed=3, chain=2) for _ in tensors]  # one rank each
    for s in sources:
        s.start(7)
    a, b, c = (s.like(t) for s, t in zip(sources, tensors, strict=True))
    assert torch.equal(a, b)
    assert ((a - c).abs() > 0).all()
    shared = [s.shared(4, torch.device("cpu"), torch.float64) for s in sources]
    assert torch.equal(shared[0], shared[1])
    assert torch.equal(shared[0], shared[2])  # one vector for all shards


@pytest.mark.parametrize("placements", ["replicate", "shard", "both", "two shards"])
def test_ranks_of_a_mesh_draw_the_same_noise_exactly_where_they_hold_the_same_entries(placements):
    """Real DTensors on a 2 x 2 mesh; the process group is torch's pretended one, rank after rank in this process."""
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    placed = {
        "replicate": [Replicate(), Replicate()],
        "shard": [Replicate(), Shard(0)],
        "both": [Shard(0), Replicate()],
        "two shards": [Shard(0), Shard(1)],
    }[placements]
    draws, same = [], []
    for rank in range(4):
        torch.distributed.init_process_group("fake", rank=rank, world_size=4, store=FakeStore())
        try:
            mesh = torch.distributed.init_device_mesh("cpu", (2, 2))
            parameter = DTensor.from_local(torch.zeros(6, 6), mesh, placed, run_check=False)
            source = NoiseSource(1)
            source.start(0)
            draws.append(source.like(parameter))
            place = divmod(rank, 2)
            same.append(tuple(place[i] for i in (0, 1) if isinstance(placed[i], Shard)))
        finally:
            torch.distributed.destroy_process_group()
    for i in range(4):
        for j in range(i):
            assert torch.equal(draws[i], draws[j]) == (same[i] == same[j])


def test_steps_restart_anywhere_and_tensors_of_one_step_differ():
    one, other = NoiseSource(5), NoiseSource(5)
    p = torch.zeros(20)
    one.start(0)
    one.like(p)
    one.start(41)
    other.start(41)
    a, b = one.like(p), one.like(p)
    assert torch.equal(a, other.like(p))
    assert ((a - b).abs() > 0).all()


def test_no_two_steps_seed_the_generator_alike_in_the_32_bits_it_keeps(monkeypatch):
    """A counter hashed to 32 bits would meet itself some ten times in so many steps (birthdays)."""
    seeds, n = set(), 300_000

    class Recorder:
        def __init__(self, device):
            pass

        def manual_seed(self, seed):
            seeds.add(seed & 0xFFFFFFFF)

    monkeypatch.setattr(torch, "Generator", Recorder)
    source, device = NoiseSource(), torch.device("cpu")
    for step in range(n):
        source.start(step)
        source._stream(0, device)
    assert len(seeds) == n


def test_the_first_number_never_repeats_and_is_independent_standard_normal_over_steps_shards_and_chains(monkeypatch):
    n, number = 100_000, torch.zeros(1, dtype=torch.float64)
    source = NoiseSource()
    firsts = np.empty(n)
    for step in range(n):
        source.start(step)
        firsts[step] = source.like(number).item()
    assert len(np.unique(firsts)) == n
    assert stats.kstest(firsts, "norm").pvalue > 6e-7
    for lag in (1, 2, 3, 624):  # neighbouring seeds of one Mersenne twister; 624 words are its state
        assert abs((firsts[lag:] * firsts[:-lag]).mean()) < 5 / math.sqrt(n - lag)
    few, others = 5000, []
    for chain, shard in ((0, 1), (1, 0), (0, -1)):
        pretend_shards(monkeypatch, {id(number): shard})
        source = NoiseSource(0, chain)
        draws = np.empty(few)
        for step in range(few):
            source.start(step)
            draws[step] = source.like(number).item()
        others.append(draws)
    streams = np.stack([firsts[:few], *others])
    products = np.corrcoef(streams)[np.triu_indices(4, 1)]
    assert np.abs(products).max() < 5 / math.sqrt(few)


# ---------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_data": 0}, "num_data is 0, expected the number of training examples"),
        ({"num_data": float("nan")}, "num_data is nan"),
        ({"lr": -0.1}, "lr is -0.1, expected a finite number >= 0"),
        ({"lr": math.inf}, "lr is inf, expected a finite number >= 0"),
        ({"temperature": -1.0}, "temperature is -1.0, expected a finite number >= 0"),
        ({"temperature": math.nan}, "temperature is nan, expected a finite number >= 0"),
        ({"friction": 0.0}, "friction is 0.0, expected above 0 and at most 1"),
        ({"friction": 1.1}, "friction is 1.1, expected above 0 and at most 1"),
    ],
)
@pytest.mark.parametrize("cls", [SGLD, SGHMC, BAOA])
def test_arguments_out_of_their_range_are_named(cls, arguments, message):
    if cls is SGLD and "friction" in arguments:
        pytest.skip("has none")
    with pytest.raises(ValueError, match=message):
        cls(fresh(), **({"lr": 0.1, "num_data": 10} | arguments))


@pytest.mark.parametrize("cls", [SGLD, SGHMC, BAOA])
def test_an_argument_that_a_sampler_does_not_have_is_refused(cls):
    """weight_decay would be taken and forgotten."""
    with pytest.raises(TypeError, match="weight_decay"):
        cls(fresh(), 0.1, num_data=10, weight_decay=1e-4)
    if cls is SGLD:
        with pytest.raises(TypeError, match="friction"):
            cls(fresh(), 0.1, num_data=10, friction=0.5)


def test_wrong_preconditioners_are_named():
    p = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match=r"an entry of 0\.0, expected positive ones"):
        SGLD([p], 0.1, num_data=10, preconditioner={p: torch.tensor([1.0, 0.0, 2.0])})
    with pytest.raises(ValueError, match=r"an entry of -1\.0, expected positive ones"):
        SGLD([p], 0.1, num_data=10, preconditioner={p: -1.0})
    with pytest.raises(ValueError, match=r"shape \(2,\), its parameter \(3,\)"):
        SGLD([p], 0.1, num_data=10, preconditioner={p: torch.ones(2)})


def test_a_preconditioner_of_a_shard_without_entries_is_taken():
    p = torch.nn.Parameter(torch.zeros(0, 3))
    optimizer = SGLD([p], 0.1, num_data=10, preconditioner={p: torch.ones(0, 3)})
    p.grad = torch.zeros(0, 3)
    optimizer.step()


def test_wrong_priors_of_baoa_are_named():
    gaussian, *_ = stiff_prior()
    w, b = fresh()
    whole = BoundGaussian(gaussian, {"w": w, "b": b})
    with pytest.raises(ValueError, match="other names than its Gaussian"):
        BAOA([w, b], 0.1, num_data=10, prior=[BoundGaussian(gaussian, {"w": w})])
    with pytest.raises(ValueError, match="'b' is under the prior but not among the sampler's parameters"):
        BAOA([w], 0.1, num_data=10, prior=[whole])
    with pytest.raises(ValueError, match="'w' has two priors"):
        BAOA([w, b], 0.1, num_data=10, prior=[whole, BoundGaussian(gaussian.select(["w"]), {"w": w})])
    with pytest.raises(ValueError, match=r"'b' has two priors, or a prior .* and a preconditioner"):
        BAOA([w, b], 0.1, num_data=10, prior=[whole], preconditioner={b: 2.0})
    for name, value in (("lr", 0.2), ("temperature", 0.5), ("friction", 0.3)):
        optimizer = BAOA([{"params": [w]}, {"params": [b], name: value}], 0.1, num_data=10, prior=[whole])
        with pytest.raises(ValueError, match=f"need one {name}, found"):
            optimizer.step()


@pytest.mark.parametrize("cls", [SGLD, SGHMC, BAOA])
def test_coarse_parameters_warn_and_float32_ones_do_not(cls):
    with pytest.warns(PriorWarning, match="parameters are bfloat16: .*rounded away.*float32 and use autocast"):
        cls([torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))], 0.1, num_data=10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cls([torch.nn.Parameter(torch.zeros(3))], 0.1, num_data=10)


# -------------------------------------------------------------------------------------------------------- schedule


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": 0}, "num_steps is 0, expected 1 or more"),
        ({"num_cycles": 0}, "num_cycles is 0, expected 1 or more"),
        ({"samples_per_cycle": -1}, "samples_per_cycle is -1, expected 1 or more"),
        ({"exploration": 1.0}, r"exploration is 1\.0, expected a share of a cycle"),
        ({"exploration": math.nan}, "exploration is nan, expected a share of a cycle"),
        ({"kind": "linear"}, "schedule is 'linear', expected one of 'cyclical', 'constant'"),
        (
            {"num_steps": 20},
            "20 steps in 4 cycles leave the cycle that begins at step 0 only 3 steps that sample, too few for 4",
        ),
        ({"num_steps": 30, "kind": "constant"}, "only 15 steps that sample, too few for 16 samples: train longer"),
    ],
)
def test_schedules_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        CyclicalSchedule(**({"num_steps": 100, "samples_per_cycle": 4} | arguments))


@settings(max_examples=100, deadline=None)
@given(
    num_steps=st.integers(1, 400),
    num_cycles=st.integers(1, 7),
    samples=st.integers(1, 6),
    exploration=st.floats(0, 0.95),
    kind=st.sampled_from(["cyclical", "constant"]),
)
def test_every_step_is_in_one_cycle_and_every_cycle_ends_with_its_last_sample(
    num_steps, num_cycles, samples, exploration, kind
):
    try:
        schedule = CyclicalSchedule(num_steps, num_cycles, samples, exploration, kind)
    except ValueError as error:
        assert "too few for" in str(error)  # noqa: PT017
        return
    count = num_cycles if kind == "cyclical" else 1
    assert len(schedule.cycles) == count
    assert [s for a, _, b in schedule.cycles for s in range(a, b)] == list(range(num_steps))
    assert max(b - a for a, _, b in schedule.cycles) - min(b - a for a, _, b in schedule.cycles) <= 1
    factors = [schedule.factor(s) for s in range(num_steps + 5)]
    assert all(0 <= f <= 1 for f in factors)
    assert len(schedule.sample_after) == num_cycles * samples
    for index, (start, first, stop) in enumerate(schedule.cycles):
        inside = [done for done, cycle in schedule.sample_after.items() if cycle == index]
        assert len(inside) == samples * (1 if kind == "cyclical" else num_cycles)
        assert max(inside) == stop
        assert min(inside) > first  # after at least one step at the temperature of the samples
        assert max(np.diff([first, *sorted(inside)]), default=0) - min(np.diff([first, *sorted(inside)])) <= 1
        for step in range(start, stop):
            assert schedule.cycle(step) == index
            assert schedule.is_sampling(step) == (step >= first)
            if kind == "constant":
                assert schedule.factor(step) == 1
            else:  # Zhang et al. 2020, eq. 1
                assert schedule.factor(step) == pytest.approx(0.5 * (math.cos(math.pi * (step - start) / (stop - start)) + 1))
        assert abs((first - start) - exploration * (stop - start)) <= 0.5
        assert schedule.factor(start) == 1


def test_the_scheduler_writes_rate_and_temperature_of_every_group():
    a, b = fresh()
    groups = [{"params": [a]}, {"params": [b], "lr": 0.5, "temperature": 0.1}]
    optimizer = SGHMC(groups, 0.1, num_data=10, temperature=2.0)
    schedule = CyclicalSchedule(20, num_cycles=2, samples_per_cycle=2, exploration=0.5)
    scheduler = SamplingScheduler(optimizer, schedule)
    for step in range(20):
        for group, lr, temperature in zip(optimizer.param_groups, (0.1, 0.5), (2.0, 0.1), strict=True):
            assert group["lr"] == pytest.approx(lr * schedule.factor(step))
            assert group["temperature"] == (temperature if step % 10 >= 5 else 0.0)
        for p in (a, b):
            p.grad = torch.zeros_like(p)
        optimizer.step()
        scheduler.step()


# ----------------------------------------------------------------------------------------- against the posteriors library


def their_map(name, lr, friction, size, monkeypatch):
    """(A, Q, C) of a step of posteriors' sampler, by probing; how its settings are ours is in benchmarks/samplers.py."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside
        library = pytest.importorskip("posteriors")
    sampler = getattr(library.sgmcmc, name.lower())
    white = torch.zeros(D, dtype=torch.float64)
    monkeypatch.setattr(torch, "randn_like", lambda tensor, **_: white.clone())

    def log_posterior(theta, batch):
        return -0.5 * (theta - TARGET) @ HESSIAN @ (theta - TARGET), torch.zeros(())

    settings = {"lr": lr, "temperature": 1 / size}
    if name != "SGLD":
        root = math.sqrt(lr)
        settings = {"lr": root, "temperature": 1 / size, "alpha": friction / root}
        if name == "BAOA":
            settings["alpha"] = -math.log(1 - friction) / root
    transform = sampler.build(log_posterior, **settings)

    def step(state, noise):
        white.copy_(noise)
        before = transform.init(state[:D]) if name == "SGLD" else transform.init(state[:D], momenta=state[D:])
        after, _ = transform.update(before, None)
        return torch.cat([after.params] if name == "SGLD" else [after.params, after.momenta]).detach()

    count = D if name == "SGLD" else 2 * D
    nothing, quiet = torch.zeros(count).double(), torch.zeros(D).double()
    b = step(nothing, quiet)
    A = torch.stack([step(e, quiet) - b for e in torch.eye(count).double()], 1).numpy()
    Q = torch.stack([step(nothing, e) - b for e in torch.eye(D).double()], 1).numpy()
    stable = np.abs(np.linalg.eigvals(A)).max() < 1
    return A, Q, linalg.solve_discrete_lyapunov(A, Q @ Q.T, method="direct")[:D, :D] if stable else None


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_stationary_error_is_not_larger_than_that_of_the_posteriors_library(name, monkeypatch):
    """Exactly, at the same learning rate, friction and number of gradients; SGLD and BAOA are the same chains."""
    size, h = 30, float(torch.linalg.eigvalsh(HESSIAN).max())
    exact = torch.linalg.inv(HESSIAN).numpy() / size
    for friction in (0.1, 0.5) if name != "SGLD" else (1.0,):
        for moved in (0.02, 0.08, 1.0):
            A, Q, theirs = their_map(name, moved / h, friction, size, monkeypatch)
            more = {} if name == "SGLD" else {"friction": friction}
            found = Map(maker(SAMPLERS[name], moved / h, num_data=size, **more), pull)
            if name != "SGHMC":
                assert close(found.A, A, 1e-6)  # BAOA's friction is a float32 there
                assert close(found.Q, Q, 1e-6)
            ours = np.abs(found.covariance()[:D, :D] - exact).max()
            if theirs is None:  # moves the weights with the momentum before
                assert name == "SGHMC"
                assert moved > friction
            else:
                assert ours <= np.abs(theirs - exact).max() + 1e-12
