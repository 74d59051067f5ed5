"""The scale of a prior and the variance of a new head from the training set itself: no validation grid, no training.

The model is taken to first order at the prior's mean, with the head W0 fitted there (multinomial logistic regression on the
features, W ~ N(0, head_variance)). The logits of M training examples are then a Gaussian process under the prior,

    f ~ N(f0, K)      K = scale * J S J^T + head_variance * (h h^T + 1) (x) I_C          (MC, MC)

with S = Sigma at scale 1, J = d logits / d weights at (mean, W0), h the features, f0 = 0 (f0 = the logits at the mean and no
second term where the head itself is under the prior). With the softmax likelihood Laplace's approximation gives, for each
(scale, head_variance), from one fit of M examples

    "loo"       the leave-one-out NLL of each example, its own likelihood term divided out of the posterior
    "evidence"  the log marginal likelihood log p(y | scale, head_variance)

The first asks for what the fine-tuned model is used for, the second for how well the prior explains the labels. Both are
looked up by walking downhill in half-decades. J takes C backward passes per example, so M is
chosen to stay below `max_passes` in all. Rows of J S^(1/2) longer than 65,536 are folded to that length with random signs
(a count sketch: inner products keep their mean, with an error of about |a| |b| / 256); the low-rank part is exact.

This is a study, not a part of prior_hub: see README.md for what it names and why that is not good enough.

Source: Rasmussen and Williams 2006, Gaussian Processes, section 3.5 and algorithm 3.3 (Laplace, several classes); Vehtari et
al. 2016, JMLR 17(103), section 3.2 (leave-one-out from Laplace); Immer et al. 2021, arXiv 2104.04975 (linearised evidence).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from prior_hub.distributed import is_sharded
from prior_hub.errors import PriorMatchError, PriorNumericsError
from prior_hub.model import PriorModel
from prior_hub.priors.gaussian import LowRankGaussian
from prior_hub.priors.matching import canonical_parameters, persistent_buffers

__all__ = ["ScaleChoice", "select_scale"]

METHODS = ("loo", "evidence")
_SKETCH = 1 << 16  # length of a row of J S^(1/2)
_LOWEST, _HIGHEST = -4.0, 8.0  # decades of the variance that the prior gives to a logit


@dataclass(frozen=True)
class ScaleChoice:
    """What `select_scale` found; print it.

    Attributes:
        scale: the prior's scale.
        head_variance: variance of the zero-mean prior over the new head; None where there is no new head.
        method: "loo" or "evidence".
        scores: scale -> score in nats per example, smaller is better (leave-one-out NLL, or minus the log evidence), at the
            chosen head variance.
        head_scores: head variance -> the same at the chosen scale.
        frozen_score: the score without moving the weights under the prior at all.
        num_examples: M, the examples it was found on.
        seconds: wall time.
    """

    scale: float
    head_variance: float | None
    method: str
    scores: Mapping[float, float]
    head_scores: Mapping[float, float] = field(default_factory=dict)
    frozen_score: float = math.nan
    num_examples: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        """A line for logs."""
        head = "" if self.head_variance is None else f", head_variance {self.head_variance:.3g}"
        name = "leave-one-out NLL" if self.method == "loo" else "minus log evidence"
        return (
            f"scale {self.scale:.3g}{head} ({name} {min(self.scores.values()):.3f} nats per example on {self.num_examples}, "
            f"{self.frozen_score:.3f} with the weights held at the mean; {self.seconds:.0f} s)"
        )


def select_scale(
    prior: PriorModel,
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    method: str = "loo",
    head_variance: float | None = None,
    max_passes: int = 1000,
    max_examples: int = 1000,
    progress: bool = True,
    seed: int = 0,
    **matching: Any,
) -> ScaleChoice:
    """The scale (and the head's variance) for this prior, this model and these training examples.

        choice = select_scale(prior, model, train_loader)
        print(choice)
        prior = prior.rescaled(choice.scale)

    Everything happens at the prior's mean; the model is given back as it came. Costs at most `max_passes` backward passes of
    one example, and a few seconds of linear algebra. Nothing of it depends on the model's own weights under the prior, nor
    on the values of its head, so that a resumed run finds the same.

    Args:
        prior: the prior.
        model: a classifier: called with a batch it returns logits (B, C) as `.logits`, `["logits"]` or itself. Its last
            layer is an `nn.Linear`, either new (then its variance is chosen too) or under the prior (`include_head=True`).
        batches: mappings with `labels` (B,) of class indices and the model's inputs, as a Trainer's collator makes them. Only
            as many are read as are needed. Shuffle them if their order means something.
        method: "loo" or "evidence".
        head_variance: take this one for the head instead of choosing.
        max_passes: bound on M x C, the number of backward passes.
        max_examples: bound on M.
        progress: show a progress bar.
        seed: of the sketch's signs.
        **matching: as `PriorModel.match`.

    Returns:
        The choice, with every score that was looked at.

    Raises:
        ValueError: no such method, labels that are not class indices, a head that is no linear layer, a sharded model.
        PriorMatchError: prior and model do not fit.
        PriorNumericsError: logits or gradients are not finite at the prior's mean.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}, expected one of {', '.join(map(repr, METHODS))}.")
    began = time.perf_counter()
    parameters = canonical_parameters(model)
    if any(is_sharded(p) for p in parameters.values()):
        raise ValueError(
            "the scale cannot be chosen on a sharded model: call select_scale(...) before sharding, and pass the number it "
            "finds as prior_scale."
        )
    match = prior.match(model, **matching)
    trained = {n: t for n, t in match.pairs.items() if parameters[t].requires_grad}
    if not trained:
        raise PriorMatchError("every parameter under the prior is frozen: there is no scale to choose.")
    state = _State(model)
    try:
        prior.initialize(model, **matching)
        model.eval()
        with torch.random.fork_rng(devices=_devices(parameters)):
            sample = _examples(model, batches, max_examples)
            head = _last_layer(model, sample)
            names = {id(p): name for name, p in parameters.items()}
            new_head = names.get(id(head.weight)) not in {*match.pairs.values()} and head.weight.requires_grad
            count = min(len(sample.labels), max(2, max_passes // sample.classes))
            if new_head:  # the head that the gradients pass through must not know the labels they are compared with
                count = min(count, len(sample.labels) // 2)
            labels = sample.labels[:count]
            gaussian = prior.gaussian.select(tuple(trained)).rescaled(1.0)
            variance, head_scores, head_kernel = None, {}, None
            mean = sample.logits[:count]
            if new_head:
                design = torch.cat([sample.features, sample.features.new_ones(len(sample.features), 1)], 1)  # (n, F + 1)
                variance = head_variance
                if variance is None:
                    variance, head_scores = _head_variance(design, sample.labels, sample.classes)
                fitted = _regression(design[count:], sample.labels[count:], sample.classes, variance)
                _set_head(head, fitted)
                head_kernel = torch.kron(design[:count] @ design[:count].T, torch.eye(sample.classes, dtype=torch.float64))
                mean = torch.zeros_like(mean)
            kernel, unscaled = _kernels(model, sample.inputs[:count], sample.classes, gaussian, trained, progress, seed)
    finally:
        state.restore()

    process = _Process(mean, labels)
    fixed = unscaled if head_kernel is None or variance is None else head_kernel * variance + unscaled
    frozen = process.score(fixed - unscaled, method)
    spread = float(kernel.diagonal().mean())  # variance that scale 1 gives to a logit
    if not spread > 0:
        raise PriorNumericsError("no logit depends on a weight under the prior: the gradients at its mean are all zero.")

    def scored(decade: float) -> float:
        return process.score(fixed + (10**decade / spread) * kernel, method)

    best, seen = _walk(scored, 1.0, 1.0)
    best, seen = _walk(scored, best, 0.5, seen)
    scale = 10 ** _vertex(best, 0.5, seen) / spread
    scores = {10**d / spread: v for d, v in seen.items()}
    return ScaleChoice(
        scale=scale,
        head_variance=variance,
        method=method,
        scores=dict(sorted(scores.items())),
        head_scores=dict(sorted(head_scores.items())),
        frozen_score=frozen,
        num_examples=len(labels),
        seconds=time.perf_counter() - began,
    )


def _walk(
    score: Callable[[float], float], start: float, step: float, seen: Mapping[float, float] | None = None
) -> tuple[float, dict[float, float]]:
    """Downhill from `start` in steps, past one bump: (the best point, point -> score)."""
    values = dict(seen or {})

    def at(point: float) -> float:
        if point not in values:
            values[point] = score(point)
        return values[point]

    best = start
    at(start)
    for direction in (step, -step):
        point, worse = best, 0
        while worse < (2 if step >= 1 else 1) and _LOWEST <= point + direction <= _HIGHEST:
            point += direction
            if at(point) < at(best):
                best, worse = point, 0
            else:
                worse += 1
    return best, values


def _vertex(best: float, step: float, values: Mapping[float, float]) -> float:
    """The minimum of the parabola through the best point and its neighbours, where they are known."""
    if not {best - step, best + step} <= values.keys():
        return best
    left, middle, right = values[best - step], values[best], values[best + step]
    curvature = left - 2 * middle + right
    return best + 0.5 * step * (left - right) / curvature if 0 < curvature < math.inf else best


# ----------------------------------------------------------------------------------------- Laplace in the space of logits


class _Process:
    """f ~ N(mean, K) over the logits of M examples, y ~ softmax(f).

    Args:
        mean: (M, C) float64.
        labels: (M,).
    """

    def __init__(self, mean: Tensor, labels: Tensor) -> None:
        self.mean, self.labels = mean, labels
        self.target = nn.functional.one_hot(labels, mean.shape[1]).double()
        self._alpha: Tensor | None = None  # of the last kernel: where the next search starts

    def score(self, kernel: Tensor, method: str) -> float:
        """Leave-one-out NLL, or minus the log evidence, in nats per example; infinite where it cannot be computed."""
        count, classes = self.mean.shape
        alpha, f, factor, root = self._mode(kernel)
        if method == "evidence":
            fit = -self._nll(f) - 0.5 * float(alpha @ (f - self.mean).reshape(-1))
            return -(fit - float(factor.diagonal().log().sum())) / count
        crossed = torch.einsum("aibj,bjk->aibk", kernel.view(count, classes, count, classes), root).reshape(len(kernel), -1)
        solved = torch.linalg.solve_triangular(factor, crossed.T, upper=False).view(-1, count, classes)
        prior = torch.stack([kernel[i : i + classes, i : i + classes] for i in range(0, len(kernel), classes)])
        posterior = prior - torch.einsum("kai,kaj->aij", solved, solved)  # (M, C, C), of each example's logits
        p = f.softmax(1)
        curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        # without its own term an example has precision posterior^-1 - curvature, and its mean moves back by that times g
        pull = torch.linalg.solve(torch.eye(classes).double() - curvature @ posterior, (self.target - p)[:, :, None])
        value = self._nll(f - (posterior @ pull).squeeze(2)) / count
        return value if math.isfinite(value) else math.inf

    def _nll(self, f: Tensor) -> float:
        return float(nn.functional.cross_entropy(f, self.labels, reduction="sum"))

    def _mode(self, kernel: Tensor, iterations: int = 30) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Newton's method with halved steps: (alpha with f = mean + K alpha, f, Cholesky of I + R^T K R, R with W = R R^T)."""
        count, classes = self.mean.shape
        blocks = kernel.view(count, classes, count, classes)
        alpha, f = torch.zeros(len(kernel), dtype=torch.float64), self.mean
        value = self._nll(f)
        if self._alpha is not None:
            there = kernel @ self._alpha
            logits = self.mean + there.view(count, classes)
            if (now := self._nll(logits) + 0.5 * float(self._alpha @ there)) < value:
                alpha, f, value = self._alpha, logits, now
        while True:
            p = f.softmax(1)
            q = p.sqrt()
            root = torch.diag_embed(q) @ (torch.eye(classes).double() - q[:, :, None] * q[:, None, :])  # (M, C, C)
            crossed = torch.einsum("aibj,bjk->aibk", blocks, root)
            inner = torch.einsum("aik,aibl->akbl", root, crossed).reshape(len(kernel), -1)
            inner.diagonal().add_(1.0)
            factor = torch.linalg.cholesky(inner)
            if iterations == 0:
                self._alpha = alpha
                return alpha, f, factor, root
            centred = f - self.mean
            pull = p * centred - p * (p * centred).sum(1, keepdim=True) + self.target - p
            moved = torch.einsum("aik,ai->ak", root, (kernel @ pull.reshape(-1)).view(count, classes)).reshape(-1, 1)
            moved = torch.cholesky_solve(moved, factor).view(count, classes)
            wanted = (pull - torch.einsum("aik,ak->ai", root, moved)).reshape(-1)
            step, iterations = 1.0, iterations - 1
            while step > 1e-4:
                trial = alpha + step * (wanted - alpha)
                there = kernel @ trial
                logits = self.mean + there.view(count, classes)
                now = self._nll(logits) + 0.5 * float(trial @ there)
                if now <= value:
                    break
                step /= 2
            else:
                return alpha, f, factor, root
            settled = value - now < 1e-5 * count
            alpha, f, value = trial, logits, now
            if settled:
                iterations = 0


# ------------------------------------------------------------------------------------------------------ what K is made of


def _kernels(
    model: nn.Module,
    inputs: list[dict[str, Any]],
    classes: int,
    gaussian: LowRankGaussian,
    trained: Mapping[str, str],
    progress: bool,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """(J S J^T, eps J J^T), what the scale multiplies and what not, (MC, MC) float64 on the CPU: C backward passes each."""
    parameters = canonical_parameters(model)
    weights = [parameters[target] for target in trained.values()]
    device = weights[0].device
    size = gaussian.num_parameters
    diagonal = torch.cat([(gaussian.variance[n] * gaussian.diagonal_weight).reshape(-1) for n in trained])
    factors = [diagonal.to(device=device, dtype=torch.float32).sqrt()]
    if gaussian.eps:
        factors.append(torch.full_like(factors[0], math.sqrt(gaussian.eps)))
    length = min(size, _SKETCH)
    if size > _SKETCH:
        signs = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(seed), dtype=torch.int8).to(device)
        factors = [f * (2 * signs - 1) for f in factors]
    rows = [gaussian.deviations[n].reshape(gaussian.rank, -1).to(device) for n in trained] if gaussian.deviations else []
    folded = torch.zeros(len(factors), len(inputs) * classes, length)
    projected = torch.zeros(len(inputs) * classes, gaussian.rank if rows else 0)
    bar = tqdm(total=len(inputs) * classes, desc="scale of the prior", unit="pass", disable=not progress, leave=False)
    with bar:
        for i, one in enumerate(inputs):
            logits = _logits(model(**one))[0]
            for c in range(classes):
                found = torch.autograd.grad(logits[c], weights, retain_graph=c + 1 < classes, allow_unused=True)
                pieces = [
                    (w.new_zeros(w.numel()) if g is None else g.reshape(-1)).float()
                    for g, w in zip(found, weights, strict=True)
                ]
                index = i * classes + c
                if rows:
                    projected[index] = sum(r.float() @ g for r, g in zip(rows, pieces, strict=True)).cpu()  # type: ignore[union-attr]
                flat = torch.cat(pieces)
                full = size // length * length
                for kind, factor in enumerate(factors):
                    whole = flat * factor
                    line = whole[:full].view(-1, length).sum(0)
                    line[: size - full] += whole[full:]
                    folded[kind, index] = line.cpu()
                bar.update()
    if not (torch.isfinite(folded).all() and torch.isfinite(projected).all()):
        raise PriorNumericsError("gradients of the logits at the prior's mean are NaN or infinite: the scale cannot be chosen.")
    kernels = torch.zeros(2, folded.shape[1], folded.shape[1], dtype=torch.float64)
    for kind, rows_of_kind in enumerate(folded):
        for start in range(0, length, 8192):
            piece = rows_of_kind[:, start : start + 8192].double()
            kernels[kind] += piece @ piece.T
    projected = projected.double()
    return kernels[0] + gaussian.low_rank_weight * projected @ projected.T, kernels[1]


@dataclass
class _Sample:
    """Training examples: one input each, labels (n,), logits (n, C) and, once known, features (n, F), float64 on the CPU."""

    inputs: list[dict[str, Any]]
    labels: Tensor
    logits: Tensor
    features: Tensor
    classes: int


@torch.no_grad()
def _examples(model: nn.Module, batches: Iterable[Mapping[str, Any]], most: int) -> _Sample:
    """The first `most` examples, on the model's device, and the model's logits."""
    device = next(model.parameters()).device
    inputs: list[dict[str, Any]] = []
    labels: list[Tensor] = []
    logits: list[Tensor] = []
    for batch in batches:
        given = batch.get("labels")
        if not (isinstance(given, Tensor) and given.ndim == 1 and not given.is_floating_point()):
            shape = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise ValueError(
                f"the scale can be chosen for classification with one class index per example; labels are {shape}. Pass "
                "prior_scale as a number."
            )
        given = given[: most - len(inputs)]
        tensors = {k: v[: len(given)].to(device) for k, v in batch.items() if k != "labels" and isinstance(v, Tensor)}
        inputs += [{k: v[i : i + 1] for k, v in tensors.items()} for i in range(len(given))]
        labels.append(given.cpu().long())
        logits.append(_logits(model(**tensors)).double().cpu())
        if len(inputs) >= most:
            break
    if len(inputs) < 4:
        raise ValueError(f"there are {len(inputs)} training examples; choosing the scale takes four or more.")
    together, outputs = torch.cat(labels), torch.cat(logits)
    if outputs.ndim != 2 or not torch.isfinite(outputs).all():
        raise PriorNumericsError(f"logits at the prior's mean have shape {tuple(outputs.shape)} or are not finite.")
    classes = outputs.shape[1]
    if int(together.min()) < 0 or int(together.max()) >= classes:
        raise ValueError(f"labels run from {int(together.min())} to {int(together.max())}, the model has {classes} classes.")
    return _Sample(inputs, together, outputs, outputs.new_empty(0), classes)


@torch.no_grad()
def _last_layer(model: nn.Module, sample: _Sample) -> nn.Linear:
    """The linear layer whose output is the logits; what goes into it becomes the sample's features."""
    seen: list[tuple[nn.Linear, Tensor, Tensor]] = []

    def look(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        assert isinstance(module, nn.Linear)
        seen.append((module, arguments[0], output))

    handles = [m.register_forward_hook(look) for m in model.modules() if isinstance(m, nn.Linear)]
    features: list[Tensor] = []
    head: nn.Linear | None = None
    try:
        for one in sample.inputs:
            seen.clear()
            logits = _logits(model(**one))
            ends = [(m, x) for m, x, y in seen if y.shape == logits.shape and torch.equal(y, logits)]
            if not ends or head not in (None, ends[-1][0]):
                raise ValueError(
                    "the model's logits are not the output of one linear layer, which choosing the scale relies on. Pass "
                    "prior_scale (and prior_head_variance) as numbers."
                )
            head = ends[-1][0]
            features.append(ends[-1][1].double().cpu())
    finally:
        for handle in handles:
            handle.remove()
    assert head is not None
    sample.features = torch.cat(features)
    return head


# --------------------------------------------------------------------------------------------------------------- the head


def _head_variance(design: Tensor, labels: Tensor, classes: int, folds: int = 5) -> tuple[float, dict[float, float]]:
    """The variance of the head's prior with the lowest cross-validated NLL on the features at the mean, and all of them."""
    typical = float(design.square().sum(1).mean())
    part = torch.arange(len(labels)) % min(folds, len(labels))

    def score(decade: float) -> float:
        total = 0.0
        for fold in range(int(part.max()) + 1):
            inside = part != fold
            weights = _regression(design[inside], labels[inside], classes, 10**decade / typical)
            logits = design[~inside] @ weights.T
            total += float(nn.functional.cross_entropy(logits, labels[~inside], reduction="sum"))
        return total / len(labels)

    best, seen = _walk(score, 0.5, 0.5)
    return 10 ** _vertex(best, 0.5, seen) / typical, {10**d / typical: v for d, v in seen.items()}


def _regression(design: Tensor, labels: Tensor, classes: int, variance: float) -> Tensor:
    """Multinomial logistic regression with weights ~ N(0, variance): (C, F + 1)."""
    weights = torch.zeros(classes, design.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimizer.zero_grad()
        nll = nn.functional.cross_entropy(design @ weights.T, labels, reduction="sum")
        loss = nll + weights.square().sum() / (2 * variance)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimizer.step(objective)  # type: ignore[no-untyped-call]
    return weights.detach()


@torch.no_grad()
def _set_head(head: nn.Linear, weights: Tensor) -> None:
    head.weight.copy_(weights[:, :-1])
    if head.bias is not None:
        head.bias.copy_(weights[:, -1])


def _logits(output: Any) -> Tensor:
    """(B, C) from what a classifier returns."""
    if isinstance(output, Tensor):
        return output
    by_name = isinstance(output, Mapping)
    logits = output["logits"] if by_name else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(f"the model's logits are a {type(logits).__name__}, expected a tensor.")
    return logits


def _devices(parameters: Mapping[str, Tensor]) -> list[torch.device]:
    return list({p.device for p in parameters.values() if p.device.type == "cuda"})


class _State:
    """A model's parameters, buffers and mode, to be put back."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modes = [(module, module.training) for module in model.modules()]
        tensors = {**canonical_parameters(model), **persistent_buffers(model)}
        self.kept = [(tensor, tensor.detach().clone()) for tensor in tensors.values()]

    @torch.no_grad()
    def restore(self) -> None:
        """Everything as it was."""
        for tensor, value in self.kept:
            tensor.copy_(value)
        for module, mode in self.modes:
            module.training = mode
