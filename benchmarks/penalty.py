"""One step of the penalty (value and gradient) against torch.distributions with autograd, side by side in one run.

    python benchmarks/penalty.py [--parameters 11000000] [--rank 5] [--repeats 7]

Prints the machine, median seconds and the ratio, and how many digits of the value each keeps in float32 (against float64).
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import time

import torch

from prior_hub import LowRankGaussian


def main() -> None:
    """Print both comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=11_000_000, help="P; a ResNet-18 has 11 million (default)")
    parser.add_argument("--rank", type=int, default=5, help="K, 5 in the published code (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="the median of so many is printed (default: %(default)s)")
    arguments = parser.parse_args()
    print(
        f"machine: {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    speed(arguments.parameters, arguments.rank, arguments.repeats)
    accuracy(arguments.rank)


def speed(size, rank, repeats):
    """Seconds of one step, side by side."""
    mean, diagonal, rows, theta = problem(size, rank, variance=1e-4)
    prior = LowRankGaussian({"w": mean}, {"w": diagonal}, {"w": rows}, diagonal_weight=1.0, low_rank_weight=1.0)
    theirs = torch.distributions.LowRankMultivariateNormal(mean, rows.T.contiguous(), diagonal, validate_args=False)
    gradient = torch.zeros_like(theta)
    leaf = theta.clone().requires_grad_()

    def ours_step():
        prior.add_gradient_({"w": theta}, {"w": gradient}, 1e-3)

    def theirs_step():
        leaf.grad = None
        (-theirs.log_prob(leaf) * 1e-3).backward()

    def read_everything():  # what memory alone costs: each number of the prior and the weights once
        (rows.sum() + mean.sum() + diagonal.sum() + theta.sum()).item()

    seconds = {}
    for name, step in (
        ("prior_hub", ours_step),
        ("torch.distributions + autograd", theirs_step),
        ("one read", read_everything),
    ):
        step()
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        seconds[name] = statistics.median(times)
    print(f"\none step, P = {size:,}, K = {rank}, float32, median of {repeats}:")
    for name, value in seconds.items():
        print(f"  {name:<32} {value * 1e3:8.1f} ms   {value / seconds['prior_hub']:5.2f} x prior_hub")


def accuracy(rank):
    """Digits of the float32 penalty at an exact draw of the prior."""
    print("\nrelative error of the float32 penalty of an exact draw (P = 100,000), against float64:")
    print("  variance   prior_hub    torch.distributions")
    for variance in (1e-2, 1e-4, 1e-6):
        mean, diagonal, rows, _ = problem(100_000, rank, variance=variance)
        prior = LowRankGaussian({"w": mean}, {"w": diagonal}, {"w": rows}, diagonal_weight=1.0, low_rank_weight=1.0)
        draw = prior.sample(generator=torch.Generator().manual_seed(1))["w"]
        values = []
        for dtype in (torch.float64, torch.float32):
            m, d, r, x = (t.to(dtype) for t in (mean, diagonal, rows, draw))
            there = torch.distributions.LowRankMultivariateNormal(m, r.T, d, validate_args=False)
            # the quadratic form alone: the density at the draw against the density at the mean
            values.append(2 * (there.log_prob(m) - there.log_prob(x)).double().item() / 2)
        exact = values[0]
        ours = prior.penalty({"w": draw}).item()
        print(f"  {variance:8.0e}   {abs(ours / exact - 1):9.1e}    {abs(values[1] / exact - 1):9.1e}")


def problem(size, rank, *, variance):
    """(mean, diagonal, rows, theta) of a given size; theta is a few standard deviations from the mean."""
    g = torch.Generator().manual_seed(0)
    mean = torch.randn(size, generator=g)
    diagonal = variance * torch.rand(size, generator=g).add_(0.5)
    rows = torch.randn(rank, size, generator=g) * math.sqrt(1e-3)
    theta = mean + torch.randn(size, generator=g) * math.sqrt(variance)
    return mean, diagonal, rows, theta


if __name__ == "__main__":
    main()
