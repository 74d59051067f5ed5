"""The Triton kernels against plain torch operations in float64, case by case; writes the errors as JSON.

python worker_fused.py DEVICE OUTPUT        DEVICE is cuda, or cpu with TRITON_INTERPRET=1 in the environment
"""

from __future__ import annotations

import copy
import itertools
import json
import sys
from pathlib import Path

import torch

from prior_hub.priors import fused, gaussian
from prior_hub.priors.gaussian import LowRankGaussian

SHAPES = {"a": (5000,), "b": (3,), "c": (16, 3, 3, 8), "d": (50, 101), "empty": (0, 4), "e": ()}
F, B, H = torch.float32, torch.bfloat16, torch.float16


def problem(device, *, rank=3, types=(F, F, F, F), seed=0, **settings):
    """A Gaussian on `device`, the same one in float64 on the CPU, and theta for each."""
    g = torch.Generator().manual_seed(seed)
    mean = {n: torch.randn(s, generator=g).to(types[1]) for n, s in SHAPES.items()}
    variance = {n: (torch.rand(s, generator=g) + 0.5).to(types[2]) for n, s in SHAPES.items()}
    rows = {n: torch.randn(rank, *s, generator=g).to(types[3]) for n, s in SHAPES.items()} if rank else None
    theta = {n: (m.float() + torch.randn(m.shape, generator=g)).to(types[0]) for n, m in mean.items()}
    exact = LowRankGaussian(*({n: t.double() for n, t in (x or {}).items()} for x in (mean, variance, rows)), **settings)
    there = LowRankGaussian(*({n: t.to(device) for n, t in (x or {}).items()} for x in (mean, variance, rows)), **settings)
    return there, exact, {n: t.to(device) for n, t in theta.items()}, {n: t.double() for n, t in theta.items()}


def error(found, wanted):
    """The largest relative error of a tensor, by norms."""
    return max(float((found[n].double().cpu() - w).norm() / w.norm().clamp(min=1e-30)) for n, w in wanted.items() if w.numel())


def main(device, output):
    gaussian.is_available = lambda where: True  # the interpreter's kernels run on the CPU
    gaussian._SMALL = 0  # else an implicit step of so small a prior is taken in float64
    calls = []
    for name in ("project", "through", "finish", "move_"):
        plain = getattr(fused.Tables, name)
        setattr(fused.Tables, name, lambda self, *a, name=name, plain=plain: (calls.append(name), plain(self, *a))[1])
    results = {}
    for types, rank in itertools.product([(F, F, F, F), (F, F, F, B), (B, F, F, H), (H, B, B, B)], (0, 3)):
        there, exact, theta, theta64 = problem(device, rank=rank, types=types, scale=0.7, eps=0.01)
        value, gradient = there.penalty_and_gradient(theta)
        value64, gradient64 = exact.penalty_and_gradient(theta64)
        key = ", ".join(str(t).removeprefix("torch.") for t in types) + f", rank {rank}"
        results[f"value {key}"] = abs(float(value) / float(value64) - 1)
        results[f"gradient {key}"] = error(gradient, gradient64)

    there, exact, theta, theta64 = problem(device)
    for name, factor in (("number", 0.3), ("tensor", torch.tensor(0.3, device=device))):
        into = {n: torch.ones_like(theta[n]) for n in ("a", "d", "e")}
        there.add_gradient_(theta, into, factor)
        wanted = {n: 1 + 0.3 * exact.penalty_and_gradient(theta64)[1][n] for n in into}
        results[f"added to some, factor a {name}"] = error(into, wanted)
    into = {"a": torch.ones_like(theta["a"], dtype=B), "c": torch.ones_like(theta["c"])}
    there.add_gradient_(theta, into, 1.0)
    wanted = {n: 1 + exact.penalty_and_gradient(theta64)[1][n] for n in into}
    results["added in bfloat16"] = error({"a": into["a"]}, {"a": wanted["a"]})
    results["added beside it"] = error({"c": into["c"]}, {"c": wanted["c"]})
    swapped = {n: t.to(memory_format=torch.channels_last) if t.ndim == 4 else t for n, t in theta.items()}
    into = {n: torch.zeros_like(t) for n, t in swapped.items()}
    assert not into["c"].is_contiguous()
    there.add_gradient_(swapped, into, 1.0)
    results["channels last"] = error(into, exact.penalty_and_gradient(theta64)[1])

    g = torch.Generator().manual_seed(1)
    steps = {"a": 0.3, "c": torch.rand(SHAPES["c"], generator=g), "d": torch.tensor(2.0), "e": 0.0}
    for name, rank, chosen in (("numbers and tensors", 3, steps), ("diagonal", 0, steps), ("numbers", 3, {"a": 0.1, "d": 5.0})):
        there, exact, theta, theta64 = problem(device, rank=rank, seed=2, scale=0.01)
        own = {n: c.to(device) if isinstance(c, torch.Tensor) else c for n, c in chosen.items()}
        value = there.proximal_step_(theta, own)
        value64 = exact.proximal_step_(
            theta64, {n: c.double() if isinstance(c, torch.Tensor) else c for n, c in chosen.items()}
        )
        results[f"implicit step, {name}"] = error(theta, theta64)
        results[f"its value, {name}"] = abs(float(value) / float(value64) - 1)

    there, exact, theta, theta64 = problem(device, rank=3, seed=2, scale=0.01)
    short = {n: torch.rand(SHAPES[n], generator=g).to(B) for n in ("a", "d")}
    there.proximal_step_(theta, {n: c.to(device) for n, c in short.items()})
    exact.proximal_step_(theta64, {n: c.double() for n, c in short.items()})
    results["implicit step, lengths in bfloat16"] = error(theta, theta64)

    there, exact, theta, theta64 = problem(device)
    strided = dict(theta, a=torch.stack([theta["a"], theta["a"]], 1)[:, 0])
    assert not strided["a"].is_contiguous()
    results["a strided weight"] = error(there.penalty_and_gradient(strided)[1], exact.penalty_and_gradient(theta64)[1])
    half = there._with(contributions=dict.fromkeys(SHAPES, 0.5), sum_over_ranks=lambda t: t.mul_(2))
    results["two ranks that hold the same"] = abs(float(half.penalty(theta)) / float(exact.penalty(theta64)) - 1)
    before = there.penalty_and_gradient(theta)[1]
    moved = {n: t.clone() for n, t in theta.items()}
    moved["a"] += 1
    results["after the weights moved elsewhere"] = error(
        there.penalty_and_gradient(moved)[1], exact.penalty_and_gradient({n: t.double().cpu() for n, t in moved.items()})[1]
    )
    results["and back"] = error(there.penalty_and_gradient(theta)[1], {n: t.double().cpu() for n, t in before.items()})
    there, _, theta, _ = problem(device)
    into, versions = {"a": torch.zeros_like(theta["a"])}, {n: t._version for n, t in theta.items()}
    there.add_gradient_(theta, into, 1.0)
    there.proximal_step_(theta, {"d": 0.1})
    assert into["a"]._version == 1  # else a graph that still needs the old values would not be refused
    assert {n for n, t in theta.items() if t._version != versions[n]} == {"d"}
    with torch.inference_mode():
        there.add_gradient_(theta, {"a": torch.zeros(5000, device=device)}, 1.0)

    there, exact, theta, theta64 = problem(device, seed=3)
    with torch.device("meta"):  # what torch.set_default_device("cuda") does, with one that nothing here may follow
        there.proximal_step_(theta, dict.fromkeys(SHAPES, 0.1))
        gradient = there.penalty_and_gradient(theta)[1]
    exact.proximal_step_(theta64, dict.fromkeys(SHAPES, 0.1))
    results["implicit step, another default device"] = error(theta, theta64)
    wanted = exact.penalty_and_gradient({n: t.double().cpu() for n, t in theta.items()})[1]
    results["gradient, another default device"] = error(gradient, wanted)
    other = copy.deepcopy(there)
    for tensor in (*there.mean.values(), *there.variance.values(), *there.deviations.values()):
        tensor.fill_(7)
    results["gradient of a copy"] = error(other.penalty_and_gradient(theta)[1], wanted)
    results["kernels that ran"] = sorted(set(calls))
    Path(output).write_text(json.dumps(results))


if __name__ == "__main__":
    main(torch.device(sys.argv[1]), sys.argv[2])
