"""The diagonal Fisher information at a trained model's weights, as a prior: Laplace's approximation with a diagonal.

Over the data's inputs x_1, ..., x_M, with one gradient per example:

    F = 1/M sum_n E_y [ (d/dw log p(y | x_n, w))^2 ]              (*shape), elementwise square, per example
        y ~ p(y | x_n, w)     labels="model": drawn; labels="expectation": the exact sum over classes. The true Fisher.
        y = y_n               labels="data": the empirical Fisher, another matrix (not the curvature away from the optimum, and
                              small wherever the model fits its data)
    Sigma = diag(1 / (N F + tau)),   mean = w                    N = num_examples, tau = prior_precision

This is the posterior of the source task under a Gaussian of precision tau on each weight: with the loss
"mean NLL + weight_decay/2 |w|^2" that is tau = N * weight_decay. `scale` then divides both: Sigma * scale is the posterior of
N/scale examples under precision tau/scale, so that scale = N means "one example's worth of the source task". tau is also the
ceiling: an entry without any Fisher (a dead unit, a word that never occurs) has the variance 1/tau and is counted in the
configuration. The prior is diagonal: K = 0, a = 1 (see gaussian.py).

An example is what one row of a batch is. Where a model predicts several tokens of a row, log p is their sum, as independent
given the input (masked language models): labels are drawn at the positions whose label is not -100, and N counts rows.

Sources: MacKay 1992, "A Practical Bayesian Framework for Backpropagation Networks" (the approximation); Kirkpatrick et al.
2017 (arXiv 1612.00796, the diagonal Fisher as a prior for the next task; there without tau and with N left to the strength);
Kunstner, Balles and Hennig 2019 (arXiv 1905.12558, why the empirical Fisher is another matrix). Of a Gaussian likelihood's
expectation one point per output is enough: y = f + sqrt(K) sigma e_k, k = 1..K, gives sum_k (d f_k / dw)^2 / sigma^2 exactly.

No low-rank Laplace. The posterior from the K largest eigenpairs (V, l) of the curvature is (N V diag(l) V^T + tau I)^-1 =
I/tau - V diag(N l / (tau (N l + tau))) V^T: the data take variance *away* along K directions. The format's Gaussian only adds
D^T D, with a positive weight, and cannot hold that: for K = 1, off the diagonal -m v_i v_j would have to equal d_i d_j, and the
product over the three pairs of any three weights is negative on the left and not negative on the right. (`laplace-torch` and
`curvlinops` compute those eigenpairs; no D makes them this Gaussian.)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset
from tqdm.auto import tqdm

from prior_hub.distributed import is_sharded
from prior_hub.errors import PriorHubError, PriorMatchError, PriorNumericsError, PriorWarning
from prior_hub.learning.swag import provenance, renaming, source_facts
from prior_hub.model import PriorModel
from prior_hub.priors.batch_norm import batch_norm_buffers
from prior_hub.priors.matching import canonical_parameters, unwrapped, without_head

__all__ = ["CategoricalLikelihood", "DiagonalFisherEstimator", "GaussianLikelihood", "Likelihood"]

_LABELS = ("model", "expectation", "data")
_METHODS = ("auto", "vmap", "loop")
_LABEL_KEYS = ("labels", "label")
_MOST_CLASSES = 10_000  # classes that "expectation" sums over


class Likelihood(Protocol):
    """What a model's output says about a target; make your own for another one."""

    @property
    def name(self) -> str:
        """A word for the configuration."""

    def log_prob(self, output: Tensor, targets: Tensor) -> Tensor:
        """log p(targets | output) in nats up to a constant: output (1, *out), targets (1, *target) -> 0-d, for one example."""

    def targets(
        self, output: Tensor, labels: Tensor | None, *, kind: str, samples: int, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs (targets (B, *target), weights (B,)); the weights of a row sum to 1.

        Args:
            output: (B, *out).
            labels: those of the data, or None.
            kind: "model" (draws of p(y | output)) or "expectation" (every y, or points that give its second moment).
            samples: number of draws.
            generator: source of the draws, on the CPU.
        """


@dataclass(frozen=True)
class CategoricalLikelihood:
    """One of C classes per example, output (B, C); or per token, output (B, T, C), where labels (B, T) say which count.

    Attributes:
        ignore_index: label of a token that does not count.
    """

    ignore_index: int = -100

    @property
    def name(self) -> str:
        """The word "categorical"."""
        return "categorical"

    def log_prob(self, output: Tensor, targets: Tensor) -> Tensor:
        """As `Likelihood`, summed over the tokens that count."""
        _check_logits(output)
        if targets.is_floating_point():
            raise ValueError(
                f"the labels are {targets.dtype}, not classes: for regression pass likelihood=GaussianLikelihood(variance)."
            )
        logits = (output.float() if output.dtype.itemsize < 4 else output).reshape(-1, output.shape[-1])
        flat = targets.reshape(-1).long()
        return -nn.functional.cross_entropy(logits, flat, reduction="sum", ignore_index=self.ignore_index)

    def targets(
        self, output: Tensor, labels: Tensor | None, *, kind: str, samples: int, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As `Likelihood`; "expectation" sums over the classes, for one label per example."""
        _check_logits(output)
        probabilities = output.detach().cpu().double().softmax(-1)
        rows, classes = len(output), output.shape[-1]
        if kind == "expectation":
            if output.ndim == 3 or classes > _MOST_CLASSES:
                raise ValueError(
                    f"labels='expectation' sums over classes, one label each; {tuple(output.shape)} needs 'model'."
                )
            dtype = output.dtype if output.dtype.itemsize >= 4 else torch.float32
            for c in range(classes):
                yield torch.full((rows,), c, device=output.device), probabilities[:, c].to(output.device, dtype)
            return
        weights = torch.full((rows,), 1.0 / samples, device=output.device)
        counted = None
        if output.ndim == 3:
            if labels is None or labels.shape != output.shape[:2]:
                raise ValueError(
                    f"logits of shape {tuple(output.shape)} are one prediction per token: the batch must hold 'labels' of "
                    f"shape {tuple(output.shape[:2])} with {self.ignore_index} where nothing is predicted, as "
                    "transformers.DataCollatorForLanguageModeling makes them."
                )
            counted = labels.cpu() != self.ignore_index
        for _ in range(samples):
            if counted is None:
                drawn = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
            else:
                drawn = torch.full(counted.shape, self.ignore_index)
                if counted.any():
                    drawn[counted] = torch.multinomial(probabilities[counted], 1, generator=generator)[:, 0]
            yield drawn.to(output.device), weights


@dataclass(frozen=True)
class GaussianLikelihood:
    """Regression: targets are normal around the output, with one known variance.

    Attributes:
        variance: that of a target around the output, in the targets' unit squared.
    """

    variance: float = 1.0

    def __post_init__(self) -> None:
        if not self.variance > 0:
            raise ValueError(f"variance is {self.variance}, expected a number > 0.")

    @property
    def name(self) -> str:
        """The word "gaussian", with the variance."""
        return f"gaussian (variance {self.variance:g})"

    def log_prob(self, output: Tensor, targets: Tensor) -> Tensor:
        """As `Likelihood`."""
        return -(targets.reshape(output.shape) - output).square().sum() / (2 * self.variance)

    def targets(
        self, output: Tensor, labels: Tensor | None, *, kind: str, samples: int, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As `Likelihood`; "expectation" takes one sigma point per output."""
        del labels
        output = output.detach()
        rows, outputs = len(output), output[0].numel()
        count = outputs if kind == "expectation" else samples
        weights = torch.full((rows,), 1.0 / count, device=output.device)
        for k in range(count):
            if kind == "expectation":
                step = torch.zeros(outputs, dtype=output.dtype, device=output.device)
                step[k] = (outputs * self.variance) ** 0.5
                yield output + step.view(output.shape[1:]), weights
            else:
                noise = torch.randn(output.shape, generator=generator, dtype=torch.float32).to(output)
                yield output + self.variance**0.5 * noise, weights


class DiagonalFisherEstimator:
    """The diagonal Fisher information of a trained model; `prior()` makes the Gaussian.

        estimator = DiagonalFisherEstimator(labels="model")
        estimator.fit(model, train_dataset, collator=collator, max_examples=10_000)
        prior = estimator.prior(prior_precision=1.0, num_examples=len(train_dataset), dataset="cifar10")

    No training: one backward pass per example and label. The model is in eval mode meanwhile (BatchNorm uses its running
    statistics, and does not move them; no dropout) and is left exactly as it was.

    Args:
        labels: "model" (drawn from the model's own predictions), "expectation" (exact, one backward per class) or "data" (the
            data set's: the empirical Fisher). The first two are the true Fisher.
        samples: draws per example, for labels="model".
        likelihood: `CategoricalLikelihood` (classes, or tokens) when None; `GaussianLikelihood(variance)`; or your own.
        method: "vmap" (torch.func, `chunk_size` examples at once), "loop" (one by one; works with every model), or "auto":
            vmap, and the loop with a warning where the model's code cannot be vectorised.
        chunk_size: examples whose gradients are held at once: memory is chunk_size copies of the weights under the prior.
        head: as in `SwagEstimator`; it stays out of the prior, at its trained values.
        generator: of the drawn labels, on the CPU; seeded with 0 when None.

    Attributes:
        num_examples: M, examples the Fisher was averaged over.

    Raises:
        ValueError: an argument is none of those.
    """

    def __init__(
        self,
        *,
        labels: str = "model",
        samples: int = 1,
        likelihood: Likelihood | None = None,
        method: str = "auto",
        chunk_size: int = 32,
        head: str | Sequence[str] | None = "auto",
        generator: torch.Generator | None = None,
    ) -> None:
        if labels not in _LABELS:
            raise ValueError(f"labels is {labels!r}, expected one of {', '.join(map(repr, _LABELS))}.")
        if method not in _METHODS:
            raise ValueError(f"method is {method!r}, expected one of {', '.join(map(repr, _METHODS))}.")
        for name, value in (("samples", samples), ("chunk_size", chunk_size)):
            if value < 1:
                raise ValueError(f"{name} is {value}, expected 1 or more.")
        self.labels = labels
        self.samples = samples
        self.likelihood: Likelihood = likelihood or CategoricalLikelihood()
        self.method = method
        self.chunk_size = chunk_size
        self.head = head
        self.generator = generator if generator is not None else torch.Generator().manual_seed(0)
        self.num_examples = 0
        self._size = 0  # of the data set, where it is known
        self._used = method
        self._mean: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}  # over examples, of squared gradients
        self._buffers: dict[str, Tensor] = {}
        self._facts: dict[str, Any] = {}

    # ------------------------------------------------------------------------------------------------------------- fitting

    def fit(
        self,
        model: nn.Module,
        data: Iterable[Any] | Dataset[Any],
        *,
        batch_size: int | None = None,
        collator: Callable[[list[Any]], Any] | None = None,
        max_examples: int | None = None,
        progress: bool | None = None,
    ) -> DiagonalFisherEstimator:
        """Average the squared gradients over the data, from nothing; returns itself.

        Args:
            model: a trained classifier: a transformers model (output with `.logits`), a timm or torch model (a tensor).
            data: batches, as a DataLoader gives them: dictionaries (passed as keywords, "labels" or "label" aside) or tuples
                (input, labels); or a data set of examples.
            batch_size: makes batches of a data set's examples (32 when None); given, `data` is always taken as one.
            collator: from a list of examples to a batch, torch's own when None.
            max_examples: at most so many: a random draw from a data set that can be indexed, the first ones otherwise.
            progress: a progress bar; where standard error is a terminal when None.

        Raises:
            PriorNumericsError: a gradient is NaN or infinite; says whose.
            PriorMatchError: the head cannot be told, or nothing is trainable beside it.
            PriorHubError: the data gave no example.
            ValueError: labels that the likelihood needs are missing, or the output is none it knows.
        """
        if max_examples is not None and max_examples < 1:
            raise ValueError(f"max_examples is {max_examples}, expected 1 or more.")
        inner = unwrapped(model)
        covered = self._covered(model)
        kind = type(inner).__name__
        if isinstance(self.likelihood, CategoricalLikelihood) and kind.endswith(("ForCausalLM", "LMHeadModel")):
            raise NotImplementedError(
                f"{kind} predicts the next token: its labels are shifted inside it, which CategoricalLikelihood does not know. "
                "Pass a likelihood of your own (see Likelihood), or use SwagEstimator."
            )
        mixed = [
            n for n, m in inner.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is None
        ]
        if mixed:
            raise PriorHubError(
                f"{mixed[0]!r} is a BatchNorm without running statistics: it mixes the examples of a batch, so that no example "
                "has a gradient of its own."
            )
        half = next((n for n, p in covered.items() if p.dtype.itemsize < 4), None)
        if half is not None:
            warnings.warn(
                f"{half!r} is {covered[half].dtype}: its gradients are rounded, and small ones may vanish, so that the "
                "variance there is too large. Load the model in float32 (dtype=torch.float32) to estimate the Fisher.",
                PriorWarning,
                stacklevel=2,
            )
        batches, total, self._size = self._batches(data, batch_size, collator, max_examples)
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in covered.values()) else torch.float32
        self._mean = {n: p.detach().to("cpu", dtype, copy=True).contiguous() for n, p in covered.items()}
        self._sums = {n: torch.zeros(p.shape, dtype=dtype, device=p.device) for n, p in covered.items()}
        self.num_examples = 0
        self._used = self.method
        buffers = batch_norm_buffers(model)
        self._buffers = {
            n: buffers[n].detach().cpu().clone() for n in without_head(buffers, self._facts["head_parameters"], covered)
        }
        modes = {module: module.training for module in model.modules()}
        device = next(iter(covered.values())).device
        bar = tqdm(total=total, desc="Fisher", unit="example", disable=None if progress is None else not progress)
        try:
            inner.eval()
            with bar:
                for batch in batches:
                    left = None if max_examples is None else max_examples - self.num_examples
                    if left == 0:
                        break
                    inputs, labels, rows = _split(batch, device, left)
                    self._accumulate(inner, covered, inputs, labels, rows)
                    self.num_examples += rows
                    bar.update(rows)
        except BaseException:
            self.num_examples = 0  # half a Fisher is none
            raise
        finally:
            for module, training in modes.items():
                module.training = training
        if not self.num_examples:
            raise PriorHubError("the data gave no example: is the data set empty, or the iterator used up?")
        return self

    def fisher(self) -> dict[str, Tensor]:
        """F, name -> (*shape): mean over examples of the expected squared gradient, per example, in 1/(unit of the weight)^2.

        Raises:
            PriorHubError: `fit` was not called.
        """
        self._fitted()
        return {name: total / self.num_examples for name, total in self._sums.items()}

    def prior(
        self,
        *,
        prior_precision: float = 1.0,
        num_examples: int | None = None,
        variance_floor: float = 1e-12,
        scale: float = 1.0,
        eps: float = 0.0,
        license: str | None = None,  # noqa: A002 (the Hub's word)
        estimator: Mapping[str, Any] | None = None,
        **about: Any,
    ) -> PriorModel:
        """The Gaussian N(w, scale / (N F + tau)); can be made with several arguments from one `fit`.

        Args:
            prior_precision: tau > 0, of the source task's own prior on each weight (N * weight_decay); 1/tau is the variance of
                entries without Fisher, and the largest there is.
            num_examples: N, examples of the source task; the data set's length when None (those seen, if it has none).
            variance_floor: variances below it are raised to it, and counted in the configuration.
            scale: stored scale.
            eps: stored eps.
            license: licence of the prior, a Hub identifier.
            estimator: anything else to record about the estimate.
            **about: base_model, base_model_revision, objective, dataset, dataset_license, source, as in `SwagEstimator.prior`.

        Raises:
            PriorHubError: `fit` was not called.
            ValueError: prior_precision or num_examples is not positive.
        """
        self._fitted()
        count = num_examples if num_examples is not None else self._size or self.num_examples
        if not prior_precision > 0:
            raise ValueError(
                f"prior_precision is {prior_precision}, expected a number > 0: entries without Fisher have the variance "
                "1/prior_precision. With weight decay w it is num_examples * w."
            )
        if count < 1:
            raise ValueError(f"num_examples is {count}, expected 1 or more.")
        variance, without, floored = {}, 0, 0
        for name, total in self._sums.items():
            information = total.cpu().double() * (count / self.num_examples)
            raw = 1.0 / (information + prior_precision)
            without += int((information == 0).sum())
            floored += int((raw < variance_floor).sum())
            variance[name] = raw.clamp_(min=variance_floor).to(self._mean[name].dtype)
        own = {
            "name": "diagonal-fisher",
            "labels": self.labels,
            "samples": self.samples if self.labels == "model" else None,
            "likelihood": self.likelihood.name,
            "num_examples": count,
            "examples_used": self.num_examples,
            "prior_precision": float(prior_precision),
            "entries_without_fisher": without,
            "variance_entries_at_floor": floored,
            "method": self._used,
            "seed": self.generator.initial_seed() if self.labels == "model" else None,
            "batch_norm": "the model's own" if self._buffers else "none",
        }
        own_name = renaming(self._mean, self._facts.get("prefix", ""))
        return PriorModel.from_tensors(
            {own_name(name): tensor for name, tensor in self._mean.items()},
            {own_name(name): tensor for name, tensor in variance.items()},
            buffers={own_name(name): tensor for name, tensor in self._buffers.items()},
            scale=scale,
            eps=eps,
            variance_floor=variance_floor,
            estimator={key: value for key, value in {**own, **(estimator or {})}.items() if value is not None},
            license=license,
            **provenance(self._facts, self._mean, own_name=own_name, **about),
        )

    # ----------------------------------------------------------------------------------------------------------- internals

    def _fitted(self) -> None:
        if not self.num_examples:
            raise PriorHubError("there is no Fisher yet: call fit(model, data) first.")

    def _covered(self, model: nn.Module) -> dict[str, Tensor]:
        parameters = canonical_parameters(model)
        if any(is_sharded(p) for p in parameters.values()):
            raise NotImplementedError("estimate the Fisher before the model is sharded, in one process.")
        self._facts = source_facts(model, self.head)
        outside = set(self._facts["head_parameters"])
        covered = {n: p for n, p in parameters.items() if n not in outside and p.requires_grad}
        if not covered:
            raise PriorMatchError("the model has no trainable parameters beside its head: there is nothing to learn.")
        return covered

    def _batches(
        self, data: Any, batch_size: int | None, collator: Callable[[list[Any]], Any] | None, max_examples: int | None
    ) -> tuple[Iterable[Any], int | None, int]:
        """(batches, examples to come if known, size of the data set or 0)."""
        rows = batch_size is not None or isinstance(data, Dataset) or hasattr(data, "column_names")
        if not rows:
            source = getattr(data, "dataset", None)
            size = _length(source) if source is not None else None
            known = size if max_examples is None or size is None else min(size, max_examples)
            return data, known, size or 0
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected 1 or more.")
        if not isinstance(data, IterableDataset) and not hasattr(data, "__getitem__"):
            raise ValueError("batch_size makes batches of a data set that can be indexed; this is a stream of something else.")
        size = None if isinstance(data, IterableDataset) else _length(data)
        if max_examples is not None and size is not None and max_examples < size:
            chosen = torch.randperm(size, generator=torch.Generator().manual_seed(self.generator.initial_seed()))
            data = Subset(data, chosen[:max_examples].tolist())
        loader: DataLoader[Any] = DataLoader(data, batch_size=batch_size or 32, collate_fn=collator)
        known = size if max_examples is None or size is None else min(size, max_examples)
        return loader, known, size or 0

    def _accumulate(
        self, model: nn.Module, covered: dict[str, Tensor], inputs: _Inputs, labels: Tensor | None, rows: int
    ) -> None:
        """Add the squared gradients of one batch."""
        if self.labels == "data":
            if labels is None:
                raise ValueError(
                    "labels='data' needs 'labels' in every batch, a tensor with one row for each example: dictionaries with "
                    "that key, or (input, labels). A list of single examples needs batch_size."
                )
            points = [(labels, torch.ones(rows, device=labels.device))]
        else:
            with torch.no_grad():
                output = _logits(model(*inputs.args, **inputs.kwargs))
            bad = ~torch.isfinite(output).reshape(rows, -1).all(1)
            if bool(bad.any()):
                first = self.num_examples + int(bad.nonzero()[0])
                raise PriorNumericsError(
                    f"the model's output for example {first} (counted from 0 in the order of the data) is NaN or infinite, and "
                    f"for {int(bad.sum()) - 1} more of its batch. Is the input finite, and are the weights?"
                )
            points = list(
                self.likelihood.targets(output, labels, kind=self.labels, samples=self.samples, generator=self.generator)
            )
        groups = [torch.arange(rows)] if self._used == "loop" else inputs.groups(rows)
        for part in [part for group in groups for part in torch.split(group, self.chunk_size)]:
            if self._used != "loop":
                try:
                    sums = self._vectorised(model, covered, inputs, points, part)
                except torch.OutOfMemoryError:
                    raise
                except (RuntimeError, NotImplementedError) as error:
                    if self.method == "vmap":
                        raise
                    self._fall_back(model, error)  # an error of another kind comes again below
                else:
                    self._add(sums, part)
                    self._used = "vmap"
                    continue
            self._loop(model, covered, inputs, points, part)

    def _fall_back(self, model: nn.Module, error: Exception) -> None:
        reason = str(error).strip().splitlines()[0][:160]
        warnings.warn(
            f"the code of {type(model).__name__} cannot be vectorised over examples by torch.func.vmap ({reason}): taking the "
            "gradients one by one, which gives the same numbers slower. method='loop' says so from the start.",
            PriorWarning,
            stacklevel=4,
        )
        self._used = "loop"

    def _vectorised(
        self, model: nn.Module, covered: dict[str, Tensor], inputs: _Inputs, points: list[tuple[Tensor, Tensor]], part: Tensor
    ) -> dict[str, Tensor]:
        """The sums over the examples `part`, all of which share what is not batched."""
        raw = {id(p): n for n, p in model.named_parameters()}
        places = {raw[id(p)]: name for name, p in covered.items()}
        values = {place: covered[name].detach() for place, name in places.items()}
        args, kwargs, args_dims, kwargs_dims = inputs.rows(part)

        def log_prob(values: dict[str, Tensor], args: list[Any], kwargs: dict[str, Any], target: Tensor) -> Tensor:
            own_args = [a.unsqueeze(0) if d == 0 else a for a, d in zip(args, args_dims, strict=True)]
            own_kwargs = {k: v.unsqueeze(0) if kwargs_dims[k] == 0 else v for k, v in kwargs.items()}
            with sdpa_kernel(SDPBackend.MATH):  # the fused kernels are taken one example at a time by vmap
                output = torch.func.functional_call(model, values, tuple(own_args), own_kwargs)
            return self.likelihood.log_prob(_logits(output), target.unsqueeze(0))

        gradients = torch.func.vmap(torch.func.grad(log_prob), in_dims=(None, args_dims, kwargs_dims, 0), randomness="error")
        sums = {name: torch.zeros_like(total) for name, total in self._sums.items()}
        for targets, weights in points:
            for place, gradient in gradients(values, args, kwargs, targets[part]).items():
                squares = gradient.detach().to(sums[places[place]].dtype).square()  # (b, *shape)
                sums[places[place]] += torch.einsum("b,b...->...", weights[part].to(squares), squares)
        return sums

    def _loop(
        self,
        model: nn.Module,
        covered: dict[str, Tensor],
        inputs: _Inputs,
        points: list[tuple[Tensor, Tensor]],
        part: Tensor,
    ) -> None:
        names, tensors = list(covered), list(covered.values())
        for one in torch.split(part, 1):
            row = int(one)
            args, kwargs = inputs.examples(one)
            sums = {name: torch.zeros_like(total) for name, total in self._sums.items()}
            with torch.enable_grad():
                output = _logits(model(*args, **kwargs))
                for last, (targets, weights) in enumerate(points, start=1 - len(points)):
                    value = self.likelihood.log_prob(output, targets[row : row + 1])
                    found = torch.autograd.grad(value, tensors, retain_graph=last < 0, allow_unused=True)
                    for name, gradient in zip(names, found, strict=True):
                        if gradient is not None:
                            sums[name] += weights[row].to(sums[name]) * gradient.to(sums[name].dtype).square()
            self._add(sums, one)

    def _add(self, sums: dict[str, Tensor], part: Tensor) -> None:
        finite = torch.stack([torch.isfinite(total).all() for total in sums.values()])
        if not bool(finite.all()):
            name = list(sums)[int((~finite).nonzero()[0])]
            first, last = self.num_examples + int(part.min()), self.num_examples + int(part.max())
            where = f"example {first}" if first == last else f"one of the examples {first} to {last}"
            raise PriorNumericsError(
                f"the gradient of {name!r} at {where} (counted from 0 in the order of the data) is NaN, infinite or too large "
                f"to square. {'' if first == last else 'chunk_size=1 names the one. '}Is the input finite?"
            )
        for name, total in sums.items():
            self._sums[name] += total


@dataclass(frozen=True)
class _Inputs:
    """What goes into the model: tensors with the batch in front, and values that all examples share."""

    args: list[Any]
    kwargs: dict[str, Any]
    size: int

    def _is_batched(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.ndim > 0 and len(value) == self.size

    def examples(self, index: Tensor) -> tuple[list[Any], dict[str, Any]]:
        """The arguments for the examples at `index`, as one smaller batch."""

        def chosen(value: Any) -> Any:
            return value[index.to(value.device)] if self._is_batched(value) else value

        return [chosen(a) for a in self.args], {key: chosen(value) for key, value in self.kwargs.items()}

    @property
    def _masked(self) -> bool:
        mask = self.kwargs.get("attention_mask")
        return self._is_batched(mask) and mask is not None and mask.ndim == 2

    def groups(self, rows: int) -> list[Tensor]:
        """Indices of examples with equal attention masks: models look at a mask's values, which vmap cannot follow."""
        if not self._masked:
            return [torch.arange(rows)]
        _, group = self.kwargs["attention_mask"].cpu().unique(dim=0, return_inverse=True)
        return [(group == g).nonzero()[:, 0] for g in range(int(group.max()) + 1)]

    def rows(self, index: Tensor) -> tuple[list[Any], dict[str, Any], list[Any], dict[str, Any]]:
        """(args, kwargs, and for vmap the batch dimension of each: 0, or None where all examples of one group share it)."""
        args, kwargs = self.examples(index)
        dims = {key: 0 if self._is_batched(value) else None for key, value in self.kwargs.items()}
        if self._masked:
            kwargs["attention_mask"], dims["attention_mask"] = kwargs["attention_mask"][:1], None
        return args, kwargs, [0 if self._is_batched(value) else None for value in self.args], dims


def _split(batch: Any, device: torch.device, most: int | None) -> tuple[_Inputs, Tensor | None, int]:
    """(inputs, labels or None, number of examples) of one batch, cut to `most` examples."""
    labels: Any = None
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    if isinstance(batch, Mapping):
        kwargs = {key: _moved(value, device) for key, value in batch.items() if key not in _LABEL_KEYS}
        labels = next((batch[key] for key in _LABEL_KEYS if batch.get(key) is not None), None)
    elif isinstance(batch, (tuple, list)):
        args = [_moved(batch[0], device)]
        labels = batch[1] if len(batch) > 1 else None
    else:
        args = [_moved(batch, device)]
    tensors = [v for v in [*args, *kwargs.values()] if isinstance(v, Tensor) and v.ndim]
    if not tensors:
        raise ValueError(
            f"a batch of type {type(batch).__name__} holds no tensor: expected a dictionary of tensors, (input, labels) or a "
            "tensor. For a data set of single examples pass batch_size (and collator)."
        )
    rows = len(tensors[0])
    usable = isinstance(labels, Tensor) and labels.ndim > 0 and len(labels) == rows
    labels = _moved(labels, device) if usable else None
    inputs = _Inputs(args, kwargs, rows)
    if most is not None and most < rows:
        index = torch.arange(most)
        inputs = _Inputs(*inputs.examples(index), most)
        labels, rows = None if labels is None else labels[:most], most
    return inputs, labels, rows


def _logits(output: Any) -> Tensor:
    found = output
    if isinstance(output, Mapping):
        found = output.get("logits")
    elif not isinstance(output, Tensor):
        found = getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        raise ValueError(
            f"the model's output is a {type(output).__name__} without logits: the Fisher needs a model with a head that "
            "predicts (AutoModelForImageClassification, not AutoModel)."
        )
    return found


def _check_logits(output: Tensor) -> None:
    if output.ndim not in (2, 3) or output.shape[-1] < 2:
        raise ValueError(
            f"logits of shape {tuple(output.shape)} are not (examples, classes) or (examples, tokens, classes): pass "
            "likelihood=GaussianLikelihood(variance) for regression, or an object of your own (see Likelihood)."
        )


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _length(data: Any) -> int | None:
    try:
        return len(data) if isinstance(data, Sized) or hasattr(data, "__len__") else None
    except TypeError:
        return None
