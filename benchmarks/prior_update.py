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

import math
import statistics

import torch
from common import finish, options, parser, times

from prior_hub import LowRankGaussian, PriorModel, PriorPenalty

CLAIM = "a proximal step of the prior reaches the MAP solution at every learning rate at which the data's part is stable"
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


def cost(size: int, rank: int, repeats: int) -> list[dict]:
    """Rows: seconds of one step of each form."""
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
    found = times(forms, repeats)
    base = statistics.median(found["gradient"])
    return [
        {
            "table": f"One step, P = {size:,}, K = {rank}, float32",
            "form": name,
            "ms (median)": 1e3 * statistics.median(values),
            "ms (mean)": 1e3 * statistics.fmean(values),
            "times the gradient's": statistics.median(values) / base,
        }
        for name, values in found.items()
    ]


def accuracy(steps: int) -> list[dict]:
    """Rows: how far each form is from the solution."""
    rows = []
    for noise, what in ((0.0, "|theta - MAP| / |MAP - mean|"), (0.1, "Excess objective with gradient noise, nats per example")):
        for name, rates in RATES.items():
            for rate in rates:
                row: dict = {"table": f"{what}, {steps} steps", "optimizer": name, "learning rate": rate}
                for form in ("gradient", "linearly implicit", "proximal"):
                    found = error(form, name, rate, steps, noise)
                    row[form] = f"{found:.1e}" if found < 1e9 else "diverged"
                rows.append(row)
    return rows


def main() -> None:
    """Print and write the tables."""
    made = parser(__doc__, repeats=20)
    made.add_argument("--steps", type=int, help="steps on the quadratic (default: 2000)")
    made.add_argument("--parameters", type=int, help="P of the timing (default: a ResNet-18's, 11 million)")
    made.add_argument("--rank", type=int, default=20, help="K of the timing (default: %(default)s)")
    given = options(made)
    rows = accuracy(given.steps or (40 if given.quick else 2000))
    rows += cost(given.parameters or (10_000 if given.quick else 11_000_000), given.rank, given.repeats)
    notes = [f"Condition number of Sigma on the quadratic: {Problem().solution()[1]:.0e}."]
    finish("prior_update", CLAIM, rows, given.json, notes=notes)


if __name__ == "__main__":
    main()
