"""SGLD, SGHMC and BAOA beside those of the `posteriors` library: is our stationary error not larger, and what does a step cost?

    pip install posteriors; python benchmarks/samplers.py [--chains 5000] [--steps 200] [--repeats 3]

The target is a Gaussian that is diagonal in no coordinates of the weights, many chains at once, the same number of gradients.
Their update rules are written for log p and a step size; with log p = -L, the mean loss, the settings that mean the same are

    ours                      posteriors
    SGLD   lr, T, N           lr = lr            temperature = T / N
    SGHMC  lr, T, N, friction lr = sqrt(lr)      temperature = T / N     alpha = friction / sqrt(lr)
    BAOA   lr, T, N, friction lr = sqrt(lr)      temperature = T / N     alpha = -log(1 - friction) / sqrt(lr)

With them SGLD and BAOA are the same chains (tests/test_samplers.py compares the maps), so that only statistics differ. SGHMC
differs: posteriors moves the weights with the momentum before the kick, ours with the one after it.

Prints errors of the mean and the covariance, with what chance alone gives, and milliseconds per step (its gradient included,
by backward() here and by their torch.func there), side by side. Then the same three samplers of ours under a stiff low-rank
prior, where only BAOA(prior=...) knows it. Without `posteriors` its columns are empty.
"""

from __future__ import annotations

import math
import statistics
import time
import warnings

import torch
from common import finish, options, parser

from prior_hub import LowRankGaussian
from prior_hub.inference.baoa import BAOA, BoundGaussian
from prior_hub.inference.sghmc import SGHMC
from prior_hub.inference.sgld import SGLD

WIDTH, NUM_DATA = 8, 100


CLAIM = "the samplers' stationary error is not larger than that of the library posteriors, nor is the time of a step"


def main() -> None:
    """Print and write both tables."""
    made = parser(__doc__, repeats=3)
    made.add_argument("--chains", type=int, help="parallel chains (default: 5000)")
    made.add_argument("--steps", type=int, help="gradients per chain (default: 200)")
    given = options(made)
    torch.set_num_threads(given.threads or 1)
    library = posteriors()
    chains, steps = given.chains or (50 if given.quick else 5_000), given.steps or (5 if given.quick else 200)
    rows = gaussian(library, chains, steps, given.repeats) + stiff(steps=40 if given.quick else 4000)
    chance = chance_of_eigenvalues(chains * given.repeats)
    notes = [
        "Covariance: largest |eigenvalue - 1| of (exact^-1 found), of which chance alone gives about "
        f"{chance:.3f}. Mean: root of mean square in standard errors (chance: 1). The library: posteriors "
        f"{'(not installed)' if library is None else installed_version()}."
    ]
    finish("samplers", CLAIM, rows, given.json, notes=notes)


def gaussian(library, chains, steps, repeats):
    """Rows: stationary error on a Gaussian, and the time of a step."""
    hessian, mode = target()
    top = float(torch.linalg.eigvalsh(hessian).max())
    exact = torch.linalg.inv(hessian) / NUM_DATA
    rows = []
    for name, friction, moved in (
        ("SGLD", None, 0.05),
        ("SGLD", None, 0.5),
        ("SGHMC", 0.3, 0.05),
        ("SGHMC", 0.3, 0.2),
        ("SGHMC", 0.3, 1.0),
        ("BAOA", 0.3, 0.05),
        ("BAOA", 0.3, 1.0),
        ("BAOA", 0.3, 3.0),
    ):
        lr = moved / top
        times, draws = {"ours": [], "theirs": []}, {"ours": [], "theirs": []}
        for seed in range(repeats):  # side by side
            weights, seconds = ours(name, lr, friction, hessian, mode, chains, steps, seed)
            draws["ours"].append(weights)
            times["ours"].append(seconds)
            if library is not None:
                weights, seconds = theirs(library, name, lr, friction, hessian, mode, chains, steps, seed)
                draws["theirs"].append(weights)
                times["theirs"].append(seconds)
        title = f"Gaussian, {WIDTH} weights, N = {NUM_DATA}, {repeats} x {chains:,} chains, {steps} gradients each; median time"
        row = {"table": title, "sampler": name, "friction": friction, "lr h": moved}
        found = {who: errors(torch.cat(parts), mode, exact) for who, parts in draws.items() if parts}
        for i, what in enumerate(("covariance", "mean")):
            row |= {f"{what}, {who}": values[i] if values[0] < 100 else None for who, values in found.items()}
        row |= {f"ms, {who}": 1e3 * statistics.median(times[who]) for who in found}
        row["theirs / ours"] = statistics.median(times["theirs"]) / statistics.median(times["ours"]) if library else None
        row["diverges"] = ", ".join(who for who, values in found.items() if not values[0] < 100)
        rows.append(row)
    return rows


def target():
    """(Hessian of the loss with curvatures 0.2 to 2 along axes that are no weight's, mode)."""
    g = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=g, dtype=torch.float64)).Q
    hessian = axes @ torch.diag(torch.linspace(0.2, 2.0, WIDTH, dtype=torch.float64)) @ axes.T
    return hessian, torch.randn(WIDTH, generator=g, dtype=torch.float64)


def start(chains, mode, hessian, seed):
    """Chains begin with the exact law: what remains is what the sampler makes of it, not how far it has come."""
    root = torch.linalg.cholesky(torch.linalg.inv(hessian) / NUM_DATA)
    g = torch.Generator().manual_seed(1 + seed)
    return (mode + torch.randn(chains, WIDTH, generator=g, dtype=torch.float64) @ root.T).float()


def ours(name, lr, friction, hessian, mode, chains, steps, seed):
    """(weights after the steps, seconds per step)."""
    weights = torch.nn.Parameter(start(chains, mode, hessian, seed))
    more = {} if friction is None else {"friction": friction}
    optimizer = {"SGLD": SGLD, "SGHMC": SGHMC, "BAOA": BAOA}[name]([weights], lr, num_data=NUM_DATA, seed=seed, **more)
    matrix, lowest = hessian.float(), mode.float()

    def loss():
        away = weights - lowest
        return 0.5 * (away @ matrix * away).sum()  # summed: each chain has its own gradient

    begin = time.perf_counter()
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return weights.detach().double(), (time.perf_counter() - begin) / steps


def theirs(library, name, lr, friction, hessian, mode, chains, steps, seed):
    """The same with posteriors."""
    matrix, lowest = hessian.float(), mode.float()

    def log_posterior(weights, _):
        away = weights - lowest
        return -0.5 * (away @ matrix * away).sum(), torch.zeros(())

    settings = {"lr": lr, "temperature": 1 / NUM_DATA}
    if name != "SGLD":
        root = math.sqrt(lr)
        alpha = friction / root if name == "SGHMC" else -math.log(1 - friction) / root
        settings |= {"lr": root, "alpha": alpha}
    transform = getattr(library.sgmcmc, name.lower()).build(log_posterior, **settings)
    torch.manual_seed(100 + seed)
    weights = start(chains, mode, hessian, seed)
    more = {} if name == "SGLD" else {"momenta": torch.randn_like(weights) / math.sqrt(NUM_DATA)}
    state = getattr(library.sgmcmc, name.lower()).init(weights, **more)
    begin = time.perf_counter()
    for _ in range(steps):
        state, _ = transform.update(state, None)
    return state.params.detach().double(), (time.perf_counter() - begin) / steps


def errors(draws, mode, exact):
    """(largest |eigenvalue - 1| of exact^-1 found, root mean square of the mean's error in standard errors)."""
    if not bool(torch.isfinite(draws).all()) or float(draws.abs().max()) > 1e6:
        return math.inf, math.inf
    away = draws - mode
    root = torch.linalg.cholesky(exact)
    whitened = torch.linalg.solve_triangular(root, away.T, upper=False)
    values = torch.linalg.eigvalsh(whitened @ whitened.T / len(draws))
    return float((values - 1).abs().max()), float((whitened.mean(1) * math.sqrt(len(draws))).square().mean().sqrt())


def chance_of_eigenvalues(chains):
    """The error of exact draws, the mean of ten."""
    g, mode, exact = torch.Generator().manual_seed(3), torch.zeros(WIDTH).double(), torch.eye(WIDTH).double()
    return statistics.mean(
        errors(torch.randn(chains, WIDTH, generator=g, dtype=torch.float64), mode, exact)[0] for _ in range(10)
    )


def stiff(size=12, rank=3, steps=4000):
    """Rows: a prior with standard deviations over five magnitudes and a likelihood that sees combinations of weights.

    SGLD, SGHMC and BAOA take the penalty's gradient, at half of the largest stable learning rate, which the prior's
    narrowest direction sets; BAOA(prior=...) is at half of its own, which only the likelihood sets.
    """
    g = torch.Generator().manual_seed(4)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    variance = torch.logspace(-8, 0, size, dtype=torch.float64)[torch.randperm(size, generator=g)]
    rows = draw(rank, size) * variance.sqrt() * 3
    gaussian = LowRankGaussian({"w": draw(size)}, {"w": variance}, {"w": rows})
    sigma = 0.5 * torch.diag(variance) + 0.5 / (rank - 1) * rows.T @ rows
    root = torch.linalg.cholesky(sigma)
    inverse = torch.linalg.inv(root)
    axes = torch.linalg.qr(draw(size, size)).Q
    whitened = axes @ torch.diag(torch.linspace(0.01, 1, size, dtype=torch.float64)) @ axes.T  # of the mean NLL
    posterior = torch.linalg.inv(torch.eye(size) + NUM_DATA * whitened)  # in coordinates in which the prior is standard normal
    mode = gaussian.mean["w"] + root @ draw(size)
    mean = posterior @ (NUM_DATA * whitened @ (inverse @ (mode - gaussian.mean["w"])))
    full = inverse.T @ (torch.eye(size) / NUM_DATA + whitened) @ inverse
    top = float(torch.linalg.eigvalsh(full).max())
    condition = float(torch.linalg.cond(sigma))
    title = (
        f"Stiff low-rank prior: {size} weights, K = {rank}, condition number {condition:.0e}, N = {NUM_DATA}, {steps:,} "
        "gradients from the prior's mean, the first quarter left out; time averages of one chain, median over 3 seeds; errors "
        "in coordinates in which the posterior is standard normal"
    )
    rows = []
    scale = torch.linalg.inv(torch.linalg.cholesky(posterior))
    for name in ("SGLD", "SGHMC", "BAOA", "BAOA(prior)"):
        lr = {"SGLD": 1.0, "SGHMC": 1.9, "BAOA": 2.0, "BAOA(prior)": 2.0}[name] / (1.0 if name == "BAOA(prior)" else top)
        found = [one_chain(name, lr, gaussian, inverse, whitened, mode, steps, seed) for seed in range(3)]
        errors_of = []
        for path in found:
            there = (inverse @ (path - gaussian.mean["w"]).T).T - mean
            standard = there @ scale.T
            errors_of.append((float((standard.var(0) - 1).abs().mean()), float(standard.mean(0).square().mean().sqrt())))
        variance_error, mean_error = (statistics.median(e[i] for e in errors_of) for i in (0, 1))
        row = {"table": title, "sampler": name, "lr": f"{lr:.1e}", "error of the variances (mean)": variance_error}
        rows.append(row | {"error of the mean (root of mean square, in standard deviations)": mean_error})
    return rows


def one_chain(name, lr, gaussian, inverse, whitened, mode, steps, seed):
    """(steps * 3 / 4, size) weights of one chain."""
    weights = torch.nn.Parameter(gaussian.mean["w"].clone())
    if name == "BAOA(prior)":
        bound = [BoundGaussian(gaussian, {"w": weights})]
        optimizer = BAOA([weights], lr, num_data=NUM_DATA, friction=0.2, prior=bound, seed=seed)
    elif name == "SGLD":
        optimizer = SGLD([weights], lr, num_data=NUM_DATA, seed=seed)
    else:
        optimizer = {"SGHMC": SGHMC, "BAOA": BAOA}[name]([weights], lr, num_data=NUM_DATA, friction=0.1, seed=seed)
    path = []
    for step in range(steps):
        weights.grad = inverse.T @ (whitened @ (inverse @ (weights.detach() - mode)))
        if name != "BAOA(prior)":
            gaussian.add_gradient_({"w": weights.detach()}, {"w": weights.grad}, 1 / NUM_DATA)
        optimizer.step()
        if step >= steps // 4:
            path.append(weights.detach().clone())
    return torch.stack(path)


def posteriors():
    """The library, or None."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import posteriors
    except ImportError:
        return None
    return posteriors


def installed_version():
    """Of posteriors."""
    from importlib.metadata import version

    return version("posteriors")


if __name__ == "__main__":
    main()
