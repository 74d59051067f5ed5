"""Penalty and gradient of one step against torch.distributions with autograd: time, peak memory, error.

    python benchmarks/penalty.py --threads 2
    python benchmarks/penalty.py --models resnet50 --ranks 20 --repeats 15

The other side is what the code of the paper (hsouri/BayesianTransferLearning, priorBox/sghmc/losses.py) and of its
re-examination (tufts-ml/bdl-transfer-learning, src/losses.py) does in every step: the parameters concatenated,
LowRankMultivariateNormal(mean, deviations.t(), variance).log_prob, divided by N, and backward into `p.grad`. Ours is
LowRankGaussian.add_gradient_ into the same gradients, with fp32 and with bf16 deviations.

Time: median, all methods in turns, after the first step. Memory: the first two steps with all that is made for them, over the
prior's own tensors, the weights and the gradients; on a CPU the kernel's high-water mark in a new process. Error: relative,
of the value and (2-norm) of the gradient, against float64 on the same rows; "for bf16" also against the unrounded rows. What
does not fit into the memory that is there is left out, with a line that says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from common import Row, available_memory, finish, median_times, number, options, parser, peak_device_memory, peak_memory
from problems import TYPES, Exact, Problem, Shapes, count, exact, gradient_errors, problem, shapes_of

CLAIM = (
    "a step of the penalty is at least 4 times faster than concatenation, LowRankMultivariateNormal.log_prob and backward, "
    "takes a third of its extra memory, and is right to 1e-5"
)
THEIRS = "torch.distributions + autograd"
N = 1000


def main() -> None:
    """Print and write the tables."""
    made = parser(__doc__, devices=True)
    made.add_argument("--models", nargs="+", help="resnet18, resnet50, bert, or a number P (default: 1e6 resnet50 bert)")
    made.add_argument("--ranks", nargs="+", type=int, help="K (default: 5 20)")
    made.add_argument("--no-memory", action="store_true", help="leave out peak memory, which needs new processes")
    given = options(made)
    models = given.models or (["1e4"] if given.quick else ["1e6", "resnet50", "bert"])
    rows, notes = [], []
    for model in models:
        for rank in given.ranks or ([3] if given.quick else [5, 20]):
            found, left_out = measure(model, rank, given)
            rows += found
            notes += left_out
    judged = claims(rows, given.device, (given.ranks or [5, 20]) if "resnet50" in models else [])
    rows += accuracy(1_000 if given.quick else 100_000, 5, given.device)
    finish("penalty", CLAIM, rows, given.json, claims=judged, notes=notes, device=given.device)


# ------------------------------------------------------------------------------------------------- the two ways to do it


def our_step(of: Problem, dtype: torch.dtype = torch.float32) -> Callable[[], torch.Tensor]:
    """One step as PriorPenalty takes it; returns the penalty."""
    gaussian, theta, into = of.gaussian(dtype), of.split(of.theta), of.split(of.gradient)
    return lambda: gaussian.add_gradient_(theta, into, 1 / N)


class TheirStep:
    """One step as the published code takes it; `rows` is (K, P)."""

    def __init__(self, of: Problem, rows: torch.Tensor) -> None:
        self.prior = torch.distributions.LowRankMultivariateNormal(of.mean, rows.t(), of.diagonal)
        self.of = of
        self.leaves = [tensor.detach().requires_grad_() for tensor in of.split(of.theta).values()]
        for leaf, gradient in zip(self.leaves, of.split(of.gradient).values(), strict=True):
            leaf.grad = gradient

    def __call__(self) -> torch.Tensor:
        """The loss's part, its gradient into `p.grad`."""
        loss = -self.prior.log_prob(torch.cat([leaf.flatten() for leaf in self.leaves])).sum() / N
        loss.backward()
        return loss.detach()

    def value(self) -> float:
        """The quadratic form: the log density at the mean minus that here, without the normaliser that no gradient has."""
        return float(self.prior.log_prob(self.of.mean).double() - self.prior.log_prob(self.of.theta).double())


# -------------------------------------------------------------------------------------------------------------- tables


def measure(model: str, rank: int, given: Any) -> tuple[list[Row], list[str]]:
    """Rows of one model and K, and what was left out."""
    shapes, notes, where = shapes_of(model), [], f"{model}, K = {rank}"
    size = count(shapes)
    base = 4 * size * (5 + rank)
    room = free_memory(given.device)
    if room < 1.1 * base + 2 * size * rank:
        return [], [f"{where}: left out, it needs {number(1.1e-9 * base)} GB and {number(1e-9 * room)} are free"]
    of = problem(shapes, rank, device=given.device)
    wanted = {f"prior_hub, {name}": dtype for name, dtype in TYPES.items()}
    steps = {name: our_step(of, dtype) for name, dtype in wanted.items()}
    # another copy of the rows, flat, W^T / D of the same size, and ten vectors or so
    theirs = 4 * size * (2 * rank + 10)
    room = free_memory(given.device)
    if room > theirs:
        steps[THEIRS] = TheirStep(of, of.flat_rows())
    else:
        notes.append(
            f"{where}: {THEIRS} left out, it needs {number(1e-9 * theirs)} GB beside the prior (2 K + 10 vectors of P) and "
            f"{number(1e-9 * room)} are free"
        )
    wrong = errors(of, steps, wanted)
    seconds = median_times(steps, given.repeats)
    del steps, of
    memory = dict.fromkeys(seconds) if given.no_memory else peaks(shapes, rank, seconds, wanted, given, notes)
    rows: list[Row] = []
    for name, value in seconds.items():
        row: Row = {"table": "One step", "model": model, "P": size, "K": rank, "method": name, "ms": 1e3 * value}
        row["times faster"] = seconds[THEIRS] / value if THEIRS in seconds else None
        row["extra MB"] = None if memory[name] is None else 1e-6 * memory[name]
        rows.append(row | wrong[name])
    return rows, notes


def errors(of: Problem, steps: dict[str, Callable[[], torch.Tensor]], types: dict[str, torch.dtype]) -> dict[str, Row]:
    """Columns of errors for each method."""
    found: dict[torch.dtype, Exact] = {dtype: exact(of, dtype) for dtype in set(types.values())}
    columns: dict[str, Row] = {}
    for name, step in steps.items():
        dtype = types.get(name, torch.float32)
        of.gradient.zero_()
        value = float(step())
        if isinstance(step, TheirStep):
            value = step.value()
        gradient = {name: of.gradient * N}
        right = found[dtype]
        columns[name] = {
            "error of value": abs(value / right.value - 1),
            "of gradient": gradient_errors(of, right, gradient, dtype)[name],
        }
        if dtype != torch.float32:
            unrounded = found[torch.float32]
            columns[name]["value, for bf16"] = abs(value / unrounded.value - 1)
            columns[name]["gradient, for bf16"] = gradient_errors(of, unrounded, gradient, torch.float32)[name]
    return columns


def peaks(
    shapes: Shapes, rank: int, methods: Any, types: dict[str, torch.dtype], given: Any, notes: list[str]
) -> dict[str, int | None]:
    """Extra bytes of each method."""
    found: dict[str, int | None] = dict.fromkeys(methods)
    for name in list(methods)[:1] if given.quick else methods:
        first = partial(two_steps, types.get(name))
        before = partial(prepared, shapes, rank, types.get(name), given.device)
        if given.device == "cuda":
            state = before()
            found[name] = peak_device_memory(partial(first, state))
            del state
        else:
            try:
                found[name] = peak_memory(first, before)
            except Exception as error:  # noqa: BLE001  a process killed for want of memory is a result
                notes.append(f"{name}, P = {count(shapes):,}, K = {rank}: no peak memory, {type(error).__name__}: {error}")
                found[name] = None
    return found


def prepared(shapes: Shapes, rank: int, dtype: torch.dtype | None, device: str) -> tuple[Problem, torch.Tensor | None]:
    """What is there before a step: tensors of the prior in the form that the method takes, weights, gradients."""
    of = problem(shapes, rank, device=device)
    if dtype is None:
        rows = of.flat_rows()
        of.rows.clear()
        return of, rows
    of.rows = {name: of.rows.pop(name).to(dtype) for name in shapes}
    return of, None


def two_steps(dtype: torch.dtype | None, state: tuple[Problem, torch.Tensor | None]) -> Any:
    """The first two steps; returns what lasts."""
    of, rows = state
    step = our_step(of, dtype or torch.float32) if rows is None else TheirStep(of, rows)
    step()
    step()
    return step


def free_memory(device: str) -> float:
    """Bytes, a tenth kept."""
    return 0.9 * (torch.cuda.mem_get_info()[0] if device == "cuda" else available_memory())


def accuracy(size: int, rank: int, device: str) -> list[Row]:
    """Errors at an exact draw as variances fall and the deviations stay: where Woodbury's difference loses its digits."""
    rows: list[Row] = []
    for variance in (1e-2, 1e-4, 1e-6):
        of = problem({"w": (size,)}, rank, device=device, variance=variance)
        steps = {"prior_hub, fp32": our_step(of), THEIRS: TheirStep(of, of.flat_rows())}
        for name, columns in errors(of, steps, {"prior_hub, fp32": torch.float32}).items():
            title = f"As variances fall (P = {size:,}, K = {rank}, deviations of 0.03, the weights an exact draw)"
            rows.append({"table": title, "variance": f"{variance:.0e}", "method": name} | columns)
    return rows


def claims(rows: list[Row], device: str, asked: Sequence[int]) -> list[dict[str, Any]]:
    """The issue's, which are about ResNet-50's tensors, for the K asked for; what was left out is not measured."""
    found: list[dict[str, Any]] = []
    by = {(row["K"], row["method"]): row for row in rows if row["model"] == "resnet50"}

    def add(claim: str, value: float | None, unit: str, met: bool | None) -> None:
        measured = "not measured" if value is None else f"{number(value)}{unit}"
        found.append({"claim": f"P = 23.5e6, {claim}", "measured": measured, "met": met})

    for rank, method, least in ((5, "fp32", 4), (20, "fp32", 4), (20, "bf16", 6)):
        if rank not in asked:
            continue
        row, what = by.get((rank, f"prior_hub, {method}")), f"K = {rank}, {method} deviations"
        times = None if row is None else row["times faster"]
        if device == "cpu":
            add(f"{what}: at least {least} times faster", times, " times", None if times is None else times >= least)
        other, share = by.get((rank, THEIRS)), None
        if row and other and row["extra MB"] is not None and other["extra MB"]:
            share = row["extra MB"] / other["extra MB"]
        add(f"{what}: at most a third of the extra peak memory", share, " of it", None if share is None else share <= 1 / 3)
        worst = max(row["error of value"], row["of gradient"]) if row else None
        met = None if worst is None else worst < 1e-5
        add(f"{what}: relative error of value and gradient below 1e-5", worst, "", met)
    return found


if __name__ == "__main__":
    main()
