"""How a stiff prior should enter a step: three forms on a quadratic whose solution is known, and what the implicit step costs.

    python benchmarks/prior_update.py

The NLL is a quadratic of 200 weights with curvatures from 0.01 to 1, the prior is of rank 5 with variances from 1e-8 to 1e-4
and deviations a hundred times as long (condition number of Sigma about 1e10), N = 100. Printed is |theta - MAP| / |MAP - mean|
after 2,000 steps (the last half with a learning rate that falls to a ten-thousandth for Adam, whose steps do not shrink by
themselves), for

    gradient            the prior's gradient / N added to the data's
    linearly implicit   the whole gradient times (I + lr Sigma^-1 / N)^-1, then the optimizer's step
    proximal            the optimizer's step with the data's gradient, then mean + Sigma (Sigma + M/N)^-1 (theta - mean)

and, because a data set is seen through minibatches, how far above the MAP's the objective (NLL + penalty / N, nats per
example) stays on average over the last quarter of the steps at a constant rate, when every data gradient carries noise of
standard deviation 0.1 per weight. prior_hub's implicit step is the third. Then seconds of one step for a ResNet-18's number
of weights, beside the gradient form, with learning rates from a cosine schedule of 400 steps.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import time

import torch

from prior_hub import LowRankGaussian, PriorModel, PriorPenalty

N, SIZE, RANK = 100, 200, 5
OPTIMIZERS = {
    "SGD": lambda p, lr: torch.optim.SGD(p, lr=lr),
    "SGD, momentum 0.9": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9),
    "AdamW": lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.0),
}
RATES = {"SGD": (0.01, 0.1, 1.0), "SGD, momentum 0.9": (0.01, 0.1, 1.0), "AdamW": (1e-3, 1e-2, 1e-1)}


class Problem(torch.nn.Module):
    """A quadratic NLL, float64."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        basis = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=g, dtype=torch.float64))[0]
        self.hessian = (basis * torch.logspace(-2, 0, SIZE, dtype=torch.float64)) @ basis.T
        self.target = torch.randn(SIZE, generator=g, dtype=torch.float64)
        self.w = torch.nn.Parameter(torch.zeros(SIZE, dtype=torch.float64))
        variance = 1e-8 * 10 ** (4 * torch.rand(SIZE, generator=g, dtype=torch.float64))
        rows = torch.randn(RANK, SIZE, generator=g, dtype=torch.float64)
        self.prior = PriorModel.from_tensors({"w": torch.zeros(SIZE, dtype=torch.float64)}, {"w": variance}, {"w": rows})

    def objective(self, w):
        """NLL + penalty / N."""
        delta = w - self.target
        return (0.5 * delta @ self.hessian @ delta + self.prior.gaussian.penalty({"w": w}) / N).item()

    def solution(self):
        """The MAP solution in closed form."""
        c = self.prior.config
        rows = self.prior.deviations["w"]
        sigma = c.diagonal_weight * self.prior.variance["w"].diag() + c.low_rank_weight * rows.T @ rows
        left = torch.eye(SIZE, dtype=torch.float64) / N + sigma @ self.hessian
        return torch.linalg.solve(left, sigma @ self.hessian @ self.target), torch.linalg.cond(sigma).item()


def error(form: str, optimizer_name: str, rate: float, steps: int, noise: float = 0.0) -> float:
    """|theta - MAP| / |MAP - mean| after so many steps, or with noise the mean excess objective; infinite if it diverged."""
    problem = Problem()
    gaussian, w = problem.prior.gaussian, problem.w
    optimizer = OPTIMIZERS[optimizer_name]([w], rate)
    penalty = PriorPenalty(problem.prior, problem, num_examples=N)
    if form == "proximal":
        penalty.attach(optimizer)
    solution, _ = problem.solution()
    best, excess, generator = problem.objective(solution), [], torch.Generator().manual_seed(1)
    for i in range(steps):
        if optimizer_name == "AdamW" and i > steps // 2 and not noise:
            optimizer.param_groups[0]["lr"] = rate * 1e-4 ** (2 * i / steps - 1)
        w.grad = problem.hessian @ (w.detach() - problem.target)
        if noise:
            w.grad += noise * torch.randn(SIZE, generator=generator, dtype=torch.float64)
        if form != "proximal":
            penalty.add_gradient_()
        if form == "linearly implicit":
            step = optimizer.param_groups[0]["lr"] / N
            gaussian.proximal_step_({"w": w.grad}, {"w": step})  # the mean is zero: (I + step Sigma^-1)^-1 applied to it
        optimizer.step()
        if not torch.isfinite(w).all():
            return math.inf
        if noise and i >= 3 * steps // 4 and i % 10 == 0:
            excess.append(problem.objective(w.detach()) - best)
    if noise:
        return statistics.fmean(excess)
    return ((w.detach() - solution).norm() / solution.norm()).item()


def cost(size: int, rank: int, repeats: int) -> None:
    """Seconds of one step of each form."""
    g = torch.Generator().manual_seed(0)
    mean, variance = torch.randn(size, generator=g), 1e-8 * 10 ** (4 * torch.rand(size, generator=g))
    gaussian = LowRankGaussian({"w": mean}, {"w": variance}, {"w": 0.01 * torch.randn(rank, size, generator=g)})
    theta, gradient = mean + 0.01, torch.zeros(size)
    turn = iter(range(10**9))
    lengths = 1e-6 * 10 ** (3 * torch.rand(size, generator=g))

    def at(step: int) -> float:
        return 2e-5 * (1 + math.cos(math.pi * step / 400))

    forms = {
        "gradient": lambda: gaussian.add_gradient_({"w": theta}, {"w": gradient}, 1e-3),
        "implicit, constant rate": lambda: gaussian.proximal_step_({"w": theta}, {"w": at(200)}),
        "implicit, cosine schedule": lambda: gaussian.proximal_step_({"w": theta}, {"w": at(150 + next(turn))}),
        "implicit, elementwise (Adam)": lambda: gaussian.proximal_step_({"w": theta}, {"w": lengths * 0.99 ** next(turn)}),
    }
    print(f"\none step, P = {size:,}, K = {rank}, float32, median and mean of {repeats}:")
    base = None
    for name, step in forms.items():
        step()
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        middle, mean_time = statistics.median(times), statistics.fmean(times)
        base = base or middle
        print(f"  {name:<30} {middle * 1e3:8.1f} ms {mean_time * 1e3:8.1f} ms   {middle / base:5.2f} x gradient")


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="steps on the quadratic (default: %(default)s)")
    parser.add_argument("--parameters", type=int, default=11_000_000, help="P of the timing (default: a ResNet-18's)")
    parser.add_argument("--rank", type=int, default=20, help="K of the timing (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=20, help="the median of so many is printed (default: %(default)s)")
    options = parser.parse_args()
    print(f"machine: {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"condition number of Sigma {Problem().solution()[1]:.0e}")
    for noise, what in ((0.0, "|theta - MAP| / |MAP - mean|"), (0.1, "excess objective with gradient noise, nats per example")):
        print(f"\n{what}, {options.steps} steps:")
        print(f"{'':<20}{'rate':>8}{'gradient':>12}{'linearly implicit':>20}{'proximal':>12}")
        for name, rates in RATES.items():
            for rate in rates:
                forms = ("gradient", "linearly implicit", "proximal")
                found = [error(form, name, rate, options.steps, noise) for form in forms]
                told = ["diverged" if not e < 1e9 else f"{e:.1e}" for e in found]
                print(f"{name:<20}{rate:>8g}{told[0]:>12}{told[1]:>20}{told[2]:>12}")
    cost(options.parameters, options.rank, options.repeats)


if __name__ == "__main__":
    main()
