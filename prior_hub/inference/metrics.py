"""How good predicted probabilities are: accuracy, NLL, Brier score, calibration, uncertainty, mean IoU.

probabilities p or logits z: (B, C, ...), class dimension 1, as `torch.nn.functional.cross_entropy` has it: (B, C) for images,
(B, C, T) for tokens, (B, C, H, W) for pixels. labels y: (B, ...) of integers; `ignore_index` marks those that do not count,
and -100 (torch's and transformers' mark, and transformers' padding) always does. An example is one label: an image, a token
or a pixel. n examples count.

    NLL      = -1/n sum_i log p_i[y_i]                                        [nats per example]
    Brier    = 1/n sum_i sum_c (p_i[c] - 1[y_i = c])^2                        0 (best) to 2
    ECE      = sum_b n_b/n |accuracy_b - confidence_b|                        bins b of the confidence max_c p_i[c]
    entropy  = -sum_c p[c] log p[c]                                           [nats]
    mutual information = entropy of the average - average of the entropies    [nats]; the disagreement of posterior samples
    mean IoU = mean over classes of |predicted and true| / |predicted or true|, counted over the whole set

Elementwise work is in float32 (float64 where that comes in), sums are in float64. The functions that take logits never form
log(softmax): with `from_logits=True` even a probability that underflows has its finite NLL. Log-probabilities are logits too.

Calibration bins are counted here and not by torchmetrics, which keeps every confidence until the end, gives a confidence of
exactly 1 a bin of its own, and counts in the confidences' type: in float32 it loses examples beyond 2^24 a bin, as many as
64 pictures of 512 x 512 pixels have. Mean IoU is torchmetrics', AUROC scikit-learn's: `pip install prior-hub[metrics]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from prior_hub.errors import PriorNumericsError

__all__ = [
    "ReliabilityBins",
    "SegmentationMetrics",
    "TemperatureScaling",
    "accuracy",
    "brier_score",
    "classification_metrics",
    "expected_calibration_error",
    "mean_iou",
    "mutual_information",
    "negative_log_likelihood",
    "ood_auroc",
    "predictive_entropy",
    "reliability_bins",
    "segmentation_metrics",
]

_IGNORE = -100  # torch's and transformers' label for "does not count"; transformers also pads labels with it
_MOST_VALUES = 2**24  # logits that are upsampled at once
_OFF = 0.02  # by how much probabilities in bfloat16 may miss a sum of 1, and entropies of them each other


class EvalPrediction(Protocol):
    """What transformers' Trainer hands to `compute_metrics`: numpy arrays, or tensors with `batch_eval_metrics=True`."""

    @property
    def predictions(self) -> Any:
        """Logits, or a tuple whose first element they are."""

    @property
    def label_ids(self) -> Any:
        """Labels."""


@dataclass(frozen=True)
class ReliabilityBins:
    """Confidence and accuracy, bin by bin.

    Attributes:
        edges: of the bins, one more than there are bins; bin b holds edges[b] <= confidence < edges[b + 1], the
            last one its upper edge too.
        confidence: mean confidence of the examples in each bin; NaN where there are none.
        accuracy: share of them that is right; NaN where there are none.
        count: number of them.
    """

    edges: tuple[float, ...]
    confidence: tuple[float, ...]
    accuracy: tuple[float, ...]
    count: tuple[int, ...]

    @property
    def expected_calibration_error(self) -> float:
        """Sum over bins of count / n * |accuracy - confidence|; NaN without examples."""
        total = sum(self.count)
        bins = zip(self.accuracy, self.confidence, self.count, strict=True)
        return math.fsum(n * abs(a - c) for a, c, n in bins if n) / total if total else math.nan


# ---------------------------------------------------------------------------------------------------- metrics of a set


def accuracy(probabilities: Tensor, labels: Tensor, *, ignore_index: int = _IGNORE) -> float:
    """Share of examples whose most probable class is the right one (pixel accuracy for segmentation).

    Args:
        probabilities: (B, C, ...); logits will do.
        labels: (B, ...) integers.
        ignore_index: label of the examples that do not count.

    Raises:
        ValueError: shapes do not fit, a label is no class, or nothing counts.
        PriorNumericsError: NaN.
    """
    valid = _check(probabilities, labels, ignore_index, are_probabilities=False)
    return float((probabilities.argmax(1) == labels)[valid].cpu().double().mean())


def negative_log_likelihood(
    probabilities: Tensor, labels: Tensor, *, ignore_index: int = _IGNORE, from_logits: bool = False
) -> float:
    """Mean negative log-probability of the true class, in nats per example.

    A probability of exactly 0 for the true class gives infinity, which is what it says; probabilities below 1e-38 (1e-45
    at most) are 0 in float32. Where you have logits or log-probabilities, pass them with `from_logits=True`.

    Args:
        probabilities: (B, C, ...), or logits.
        labels: (B, ...) integers.
        ignore_index: label of the examples that do not count.
        from_logits: `probabilities` are logits (or log-probabilities).

    Raises:
        ValueError: shapes do not fit, a label is no class, nothing counts, or values are no probabilities.
        PriorNumericsError: NaN.
    """
    return float(_examples(probabilities, labels, ignore_index, from_logits).nll.mean())


def brier_score(probabilities: Tensor, labels: Tensor, *, ignore_index: int = _IGNORE, from_logits: bool = False) -> float:
    """Mean squared distance of the probabilities from the one-hot label, summed over classes: 0 (best) to 2.

    Brier 1950, eq. 2. (For two classes some define half of it.)

    Args and Raises: as `negative_log_likelihood`.
    """
    return float(_examples(probabilities, labels, ignore_index, from_logits).brier.mean())


def expected_calibration_error(
    probabilities: Tensor,
    labels: Tensor,
    *,
    bins: int = 15,
    adaptive: bool = False,
    ignore_index: int = _IGNORE,
    from_logits: bool = False,
) -> float:
    """Mean distance between confidence and accuracy, 0 (best) to 1.

    Guo et al. 2017, eq. 3 (arXiv 1706.04599). An estimate from few examples is too large: of a perfectly calibrated model
    it is about the sum over bins of sqrt(2/pi n_b a_b (1 - a_b)) / n, not 0. So compare models on the same set only.

    Args:
        probabilities: (B, C, ...), or logits.
        labels: (B, ...) integers.
        bins: number of bins.
        adaptive: bins of equal mass (as many examples in each, Nguyen and O'Connor 2015) in place of equal width.
        ignore_index: label of the examples that do not count.
        from_logits: `probabilities` are logits (or log-probabilities).

    Raises:
        ValueError: as `negative_log_likelihood`; `bins` < 1.
        PriorNumericsError: NaN.
    """
    return reliability_bins(
        probabilities, labels, bins=bins, adaptive=adaptive, ignore_index=ignore_index, from_logits=from_logits
    ).expected_calibration_error


def reliability_bins(
    probabilities: Tensor,
    labels: Tensor,
    *,
    bins: int = 15,
    adaptive: bool = False,
    ignore_index: int = _IGNORE,
    from_logits: bool = False,
) -> ReliabilityBins:
    """Confidence and accuracy in bins of the confidence: what a reliability diagram shows.

    Equal confidences share a bin. So there may be fewer adaptive bins than asked for, where many are equal.

    Args and Raises: as `expected_calibration_error`.
    """
    if bins < 1:
        raise ValueError(f"bins is {bins}, expected 1 or more.")
    found = _examples(probabilities, labels, ignore_index, from_logits)
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    if adaptive:
        ordered = found.confidence.sort().values
        starts = [len(ordered) * b // bins for b in range(bins)]
        edges = torch.cat([torch.unique_consecutive(ordered[starts]), ordered[-1:]])
    return _bins(edges, _bin_sums(found, edges))


def mean_iou(predictions: Tensor, labels: Tensor, *, num_classes: int | None = None, ignore_index: int = _IGNORE) -> float:
    """Mean intersection over union: semantic segmentation's measure, counted over the whole set, not picture by picture.

    Classes that neither occur nor are predicted are left out of the mean. An `ignore_index` that is a class (0 for a
    background, say) is left out too: its pixels do not count, whatever is predicted there. Pixels labelled -100, with
    which transformers pads, never count.

    Args:
        predictions: probabilities or logits (B, C, H, W), or predicted classes (B, H, W).
        labels: (B, H, W) integers.
        num_classes: C; needed for predicted classes.
        ignore_index: label of the pixels that do not count.

    Raises:
        ImportError: torchmetrics is missing.
        ValueError: shapes do not fit, a label is no class, or nothing counts.
        PriorNumericsError: NaN.
    """
    if predictions.ndim == labels.ndim + 1:
        _check(predictions, labels, ignore_index, are_probabilities=False)
        num_classes = predictions.shape[1]
        predictions = predictions.argmax(1)
    if num_classes is None:
        raise ValueError("mean_iou needs num_classes where predictions are classes; or pass probabilities (B, C, H, W).")
    if predictions.shape != labels.shape:
        raise ValueError(f"predictions have shape {tuple(predictions.shape)}, labels {tuple(labels.shape)}.")
    valid = _valid(labels, ignore_index, num_classes)
    wrong = int((valid & ((predictions < 0) | (predictions >= num_classes))).sum())
    if wrong:
        raise ValueError(f"{wrong} of {valid.numel()} predictions are none of the {num_classes} classes.")
    metric = _jaccard(num_classes, ignore_index)
    metric.update(predictions[valid].cpu(), labels[valid].cpu())
    return float(metric.compute())


# ------------------------------------------------------------------------------------------------------- uncertainty


def predictive_entropy(probabilities: Tensor) -> Tensor:
    """Entropy of the predicted class in nats, (B, ...): all the uncertainty there is, 0 to log C.

    Args:
        probabilities: (B, C, ...).

    Raises:
        ValueError: values are no probabilities.
        PriorNumericsError: NaN.
    """
    _check_values(probabilities, are_probabilities=True)
    entropy: Tensor = torch.special.entr(_float(probabilities)).sum(1)
    return entropy


def mutual_information(probabilities: Tensor, expected_entropy: Tensor) -> Tensor:
    """What the posterior samples disagree about, in nats, (B, ...): of the predicted class and the weights.

    Entropy of the average minus average of the entropies: high where the samples contradict each other (what more training
    data would settle), 0 where they agree, however uncertain they are (Houlsby et al. 2011, arXiv 1112.5745). Never
    negative: rounding is cut off at 0.

    Args:
        probabilities: the average of the samples' probabilities, (B, C, ...).
        expected_entropy: the average of the samples' entropies, (B, ...).

    Raises:
        ValueError: shapes do not fit, values are no probabilities, or the entropies exceed that of the average, so that
            they belong to something else.
        PriorNumericsError: NaN.
    """
    total = predictive_entropy(probabilities)
    if total.shape != expected_entropy.shape:
        raise ValueError(f"expected_entropy has shape {tuple(expected_entropy.shape)}, expected {tuple(total.shape)}.")
    _refuse_nan(expected_entropy, "expected_entropy")
    information = total - expected_entropy
    if information.numel() and float(information.min()) < -_OFF:
        bad = int((information < -_OFF).sum())
        raise ValueError(
            f"expected_entropy exceeds the entropy of the average at {bad} of {information.numel()} examples (by up to "
            f"{-float(information.min()):.3g} nats), which averages cannot: are both of the same samples and in nats?"
        )
    return information.clamp_min(0)


def ood_auroc(score_in: Tensor, score_out: Tensor) -> float:
    """Area under the ROC curve of telling unfamiliar inputs from familiar ones by a score that should be higher there.

    The probability that a random unfamiliar input scores higher than a random familiar one, ties counting half: 0.5 is
    guessing, 1 perfect.

    Args:
        score_in: of inputs from the training distribution, any shape; `predictive_entropy`, say.
        score_out: of inputs from elsewhere, any shape.

    Raises:
        ImportError: scikit-learn is missing.
        ValueError: a set is empty.
        PriorNumericsError: NaN.
    """
    for scores, name in ((score_in, "score_in"), (score_out, "score_out")):
        if not scores.numel():
            raise ValueError(f"{name} is empty.")
        _refuse_nan(scores, name)
    try:
        from sklearn.metrics import roc_auc_score
    except ImportError as error:
        raise _missing("ood_auroc", "scikit-learn") from error
    scores = torch.cat([score_in.detach().flatten().cpu(), score_out.detach().flatten().cpu()]).double()
    is_out = torch.cat([torch.zeros(score_in.numel(), dtype=torch.int64), torch.ones(score_out.numel(), dtype=torch.int64)])
    return float(roc_auc_score(is_out.numpy(), scores.numpy()))


class TemperatureScaling:
    """One number that makes a model calibrated: softmax(logits / temperature), the temperature fitted on validation data.

    Guo et al. 2017, section 4.2 (arXiv 1706.04599). Predicted classes stay as they are. Fit it on data that the model was
    not trained on, and not on the data you report.

        scaling = TemperatureScaling().fit(validation_logits, validation_labels)
        probabilities = scaling(test_logits)

    Attributes:
        temperature: above 1 for an overconfident model, below 1 for a diffident one; 1 before `fit`.
    """

    def __init__(self) -> None:
        self.temperature = 1.0

    def fit(self, logits: Tensor, labels: Tensor, *, ignore_index: int = _IGNORE) -> Self:
        """Find the temperature of the smallest mean NLL, by LBFGS over its logarithm.

        Args:
            logits: (B, C, ...), or log-probabilities.
            labels: (B, ...) integers.
            ignore_index: label of the examples that do not count.

        Returns:
            itself.

        Raises:
            ValueError: shapes do not fit, a label is no class, or nothing counts.
            PriorNumericsError: NaN or infinities; every example is right, or the logits say nothing of the labels, so that
                no temperature is best.
        """
        valid = _check(logits, labels, ignore_index, are_probabilities=False)
        z = logits.detach().movedim(1, -1)[valid].cpu().double()  # (n, C)
        y = labels[valid].cpu().long()
        infinite = int((~z.isfinite()).sum())
        if infinite:
            raise PriorNumericsError(f"{infinite} of {z.numel()} logits are infinite: no temperature scales them.")
        true = z.gather(1, y.unsqueeze(1)).squeeze(1)
        if not float((true - z.mean(1)).mean()) > 0:  # the NLL is convex in 1 / temperature; this is its slope at 0
            raise PriorNumericsError(
                f"the true class of the {len(y)} examples has no larger logit than the others on average: NLL falls for "
                "ever as the temperature grows. Are these the logits of these labels, in this order?"
            )
        if bool((true >= z.amax(1)).all()):
            raise PriorNumericsError(
                f"all {len(y)} examples are classified rightly: NLL falls for ever as the temperature goes to 0. "
                "Use validation data with some errors, that is more of it, and none that the model was trained on."
            )
        scale = float(z.std())
        log_temperature = torch.tensor(math.log(scale), dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [log_temperature],
            max_iter=100,
            tolerance_grad=1e-10,
            tolerance_change=1e-14,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(z * (-log_temperature).exp(), y)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        with torch.enable_grad():
            optimizer.step(closure)  # type: ignore[no-untyped-call]
        self.temperature = math.exp(log_temperature.item())
        return self

    def __call__(self, logits: Tensor) -> Tensor:
        """Calibrated probabilities, (B, C, ...), of logits (B, C, ...)."""
        return (_float(logits) / self.temperature).softmax(1)


# --------------------------------------------------------------------------------------------- compute_metrics of Trainer


def classification_metrics(eval_prediction: EvalPrediction) -> dict[str, float]:
    """`compute_metrics` of transformers' Trainer for classes of images, texts or tokens.

        trainer = PriorTrainer(..., compute_metrics=classification_metrics)

    Tokens labelled -100 do not count; transformers' token logits have the class last, (B, T, C), which is known by the
    labels' shape.

    Args:
        eval_prediction: its `predictions` are logits or log-probabilities (B, C) or (B, T, C), or a tuple whose first
            element they are; its `label_ids` are (B,) or (B, T).

    Returns:
        "accuracy", "nll" (nats per example), "brier", "ece" (15 bins of equal width).

    Raises:
        ValueError: shapes do not fit, a label is no class, or nothing counts.
        PriorNumericsError: NaN.
    """
    logits, labels = _logits_and_labels(eval_prediction)
    if logits.ndim > 2 and logits.shape[:-1] == labels.shape:
        logits = logits.movedim(-1, 1)
    found = _examples(logits, labels, _IGNORE, from_logits=True)
    edges = torch.linspace(0, 1, 16, dtype=torch.float64)
    return {
        "accuracy": float(found.correct.mean()),
        "nll": float(found.nll.mean()),
        "brier": float(found.brier.mean()),
        "ece": _bins(edges, _bin_sums(found, edges)).expected_calibration_error,
    }


def segmentation_metrics(num_classes: int, ignore_index: int = 255) -> SegmentationMetrics:
    """`compute_metrics` of transformers' Trainer for semantic segmentation.

        trainer = PriorTrainer(..., compute_metrics=segmentation_metrics(num_classes=150))

    With `batch_eval_metrics=True` in the training arguments it is called batch by batch and keeps counts only, so that the
    set's logits never have to fit in memory (150 classes of 512 x 512 pixels are 157 MB a picture). Without, Trainer keeps
    them all first.

    Args:
        num_classes: C.
        ignore_index: label of the pixels that do not count, as in the model's configuration (`semantic_loss_ignore_index`).
            Those labelled -100, with which Trainer pads pictures of unequal size, never count.

    Raises:
        ImportError: torchmetrics is missing.
        ValueError: `num_classes` is less than 2.
    """
    return SegmentationMetrics(num_classes, ignore_index)


class SegmentationMetrics:
    """Counts of a segmentation set, batch by batch; made by `segmentation_metrics`.

    Args:
        num_classes: C.
        ignore_index: label of the pixels that do not count.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255) -> None:
        if num_classes < 2:
            raise ValueError(f"num_classes is {num_classes}, expected 2 or more.")
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self._edges = torch.linspace(0, 1, 16, dtype=torch.float64)
        self._confusion = _jaccard(num_classes, ignore_index)
        self.reset()

    def reset(self) -> None:
        """Forget every batch; done by itself when a result is computed, needed after an evaluation that broke off."""
        self._confusion.reset()
        self._nll = 0.0
        self._sums = torch.zeros(3, len(self._edges) - 1, dtype=torch.float64)

    def __call__(self, eval_prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        """Add a batch (or the whole set), and give the result of all since the last one if `compute_result`.

        Args:
            eval_prediction: its `predictions` are logits or log-probabilities (B, C, h, w), or a tuple whose first element
                they are; its `label_ids` are (B, H, W). Logits smaller than the labels (SegFormer's) are upsampled
                bilinearly, as transformers' losses do.
            compute_result: this is the last batch.

        Returns:
            "mean_iou", "pixel_accuracy", "nll" (nats per pixel), "ece" (15 bins of equal width); empty before the last batch.

        Raises:
            ValueError: shapes do not fit, a label is no class, or nothing counts.
            PriorNumericsError: NaN.
        """
        logits, labels = _logits_and_labels(eval_prediction)
        if logits.ndim != 4 or labels.ndim != 3 or len(logits) != len(labels) or logits.shape[1] != self.num_classes:
            raise ValueError(
                f"logits have shape {tuple(logits.shape)} and labels {tuple(labels.shape)}, expected "
                f"(B, {self.num_classes}, h, w) and (B, H, W)."
            )
        for z, y in self._chunks(logits, labels):
            self._add(z, y)
        return self._result() if compute_result else {}

    def _chunks(self, logits: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Pictures of one size, as many at once as memory likes: logits (b, C, H, W), labels (b, H, W)."""
        height, width = labels.shape[-2:]
        if logits.shape[-2] > height or logits.shape[-1] > width:
            raise ValueError(f"logits of {tuple(logits.shape[-2:])} pixels are larger than labels of {(height, width)}.")
        many = max(1, _MOST_VALUES // max(1, self.num_classes * height * width))
        for z, y in zip(torch.split(logits, many), torch.split(labels, many), strict=True):
            if z.shape[-2:] == y.shape[-2:]:
                yield z, y
            else:
                yield F.interpolate(_float(z), size=(height, width), mode="bilinear", align_corners=False), y

    def _add(self, logits: Tensor, labels: Tensor) -> None:
        valid = _valid(labels, self.ignore_index, self.num_classes, some=False)
        if not bool(valid.any()):
            return
        z, y = logits.movedim(1, -1)[valid], labels[valid]  # (n, C), (n,)
        found = _examples(z, y, _IGNORE, from_logits=True, brier=False)
        self._nll += float(found.nll.sum())
        self._sums += _bin_sums(found, self._edges)
        self._confusion.update(z.argmax(1).cpu(), y.cpu())

    def _result(self) -> dict[str, float]:
        counted = int(self._sums[0].sum())
        if not counted:
            self.reset()
            raise ValueError(f"no pixel counts: all are labelled {self.ignore_index} (or {_IGNORE}, Trainer's padding).")
        result = {
            "mean_iou": float(self._confusion.compute()),
            "pixel_accuracy": float(self._sums[2].sum()) / counted,
            "nll": self._nll / counted,
            "ece": _bins(self._edges, self._sums).expected_calibration_error,
        }
        self.reset()
        return result


# --------------------------------------------------------------------------------------------------------- internals


@dataclass(frozen=True)
class _Examples:
    """Of the n examples that count: (n,) each, float64 on the CPU."""

    nll: Tensor
    brier: Tensor
    confidence: Tensor
    correct: Tensor


def _examples(values: Tensor, labels: Tensor, ignore_index: int, from_logits: bool, *, brier: bool = True) -> _Examples:
    """Look at each example once."""
    valid = _check(values, labels, ignore_index, are_probabilities=not from_logits)
    values = _float(values.detach())
    true = torch.where(valid, labels, 0).long().unsqueeze(1)  # (B, 1, ...)
    if from_logits:
        log_probabilities = values.log_softmax(1)
        log_true = log_probabilities.gather(1, true).squeeze(1)
        probabilities, rest = log_probabilities.exp_(), -log_true.expm1()
    else:
        probabilities, rest = values, 1 - values.gather(1, true).squeeze(1)
        log_true = values.gather(1, true).squeeze(1).log()
    confidence, predicted = probabilities.max(1)
    distance = rest.square()
    if brier:
        distance += probabilities.scatter(1, true, 0).square().sum(1)
    bad = int(((log_true.isnan() | confidence.isnan()) & valid).sum())
    if bad:
        raise PriorNumericsError(
            f"the predictions of {bad} of {valid.numel()} examples give NaN: infinite logits or negative probabilities."
        )
    found = (-log_true, distance, confidence.clamp(0, 1), predicted == labels)
    return _Examples(*(t[valid].cpu().double() for t in found))


def _bin_sums(found: _Examples, edges: Tensor) -> Tensor:
    """(3, bins): number, sum of confidences and number right, by bin."""
    place = (torch.bucketize(found.confidence, edges, right=True) - 1).clamp(0, len(edges) - 2)
    weights = (None, found.confidence, found.correct)
    return torch.stack([torch.bincount(place, w, minlength=len(edges) - 1).double() for w in weights])


def _bins(edges: Tensor, sums: Tensor) -> ReliabilityBins:
    count, confidence, right = sums
    return ReliabilityBins(
        edges=tuple(edges.tolist()),
        confidence=tuple((confidence / count).tolist()),  # 0 / 0 = NaN
        accuracy=tuple((right / count).tolist()),
        count=tuple(int(n) for n in count.tolist()),
    )


def _check(values: Tensor, labels: Tensor, ignore_index: int, *, are_probabilities: bool) -> Tensor:
    """Where labels count, after a look at shapes and values."""
    if values.ndim < 2 or values.shape[:1] + values.shape[2:] != labels.shape:
        raise ValueError(
            f"predictions have shape {tuple(values.shape)} and labels {tuple(labels.shape)}, expected (B, C, ...) and "
            "(B, ...): classes in dimension 1, and one label where there is one prediction."
        )
    valid = _valid(labels, ignore_index, values.shape[1])
    _check_values(values, are_probabilities=are_probabilities, valid=valid)
    return valid


def _check_values(values: Tensor, *, are_probabilities: bool, valid: Tensor | None = None) -> None:
    """NaN where it counts; probabilities that are none."""
    wrong = values.isnan().any(1) if valid is None else values.isnan().any(1) & valid
    if bool(wrong.any()):
        raise PriorNumericsError(
            f"the predictions of {int(wrong.sum())} of {wrong.numel()} examples have NaN: training diverged, or a sample's "
            "step was too large. Lower the learning rate, and look at the loss."
        )
    if are_probabilities:
        off = (_float(values).sum(1) - 1).abs() > _OFF
        off |= (values < -_OFF).any(1)
        off = off if valid is None else off & valid
        if bool(off.any()):
            raise ValueError(
                f"the predictions of {int(off.sum())} of {off.numel()} examples are no probabilities (negative, or a sum over "
                "dimension 1 that is not 1). Of logits take softmax(1), or pass from_logits=True where that exists."
            )


def _refuse_nan(values: Tensor, name: str) -> None:
    bad = int(values.isnan().sum())
    if bad:
        raise PriorNumericsError(f"{name} has {bad} of {values.numel()} entries that are NaN.")


def _valid(labels: Tensor, ignore_index: int, num_classes: int, *, some: bool = True) -> Tensor:
    """Where labels count, after a look that they are classes."""
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels have the type {labels.dtype}, expected integers.")
    valid = (labels != ignore_index) & (labels != _IGNORE)
    wrong = valid & ((labels < 0) | (labels >= num_classes))
    if bool(wrong.any()):
        found = sorted(set(labels[wrong][:1000].tolist()))[:5]
        raise ValueError(
            f"{int(wrong.sum())} of {labels.numel()} labels are none of the {num_classes} classes (0 to {num_classes - 1}): "
            f"{', '.join(map(str, found))}. If that marks what does not count, pass it as ignore_index (now {ignore_index})."
        )
    if some and not bool(valid.any()):
        raise ValueError(
            f"none of the {labels.numel()} labels counts: all are ignore_index ({ignore_index}), or there are none."
        )
    return valid


def _float(values: Tensor) -> Tensor:
    """At least float32."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _logits_and_labels(eval_prediction: EvalPrediction) -> tuple[Tensor, Tensor]:
    predictions, labels = eval_prediction.predictions, eval_prediction.label_ids
    if isinstance(predictions, tuple | list):
        predictions = predictions[0]
    if isinstance(labels, tuple | list):
        raise ValueError(f"label_ids holds {len(labels)} kinds of labels, expected one: set label_names=['labels'].")
    logits, labels = torch.as_tensor(predictions), torch.as_tensor(labels)
    return logits, labels.to(logits.device)


def _jaccard(num_classes: int, ignore_index: int) -> Any:
    """torchmetrics' JaccardIndex: a confusion matrix over everything it is given.

    Not torchmetrics.segmentation.MeanIoU, which averages over pictures, and knows no ignored label. Never synchronised:
    Trainer has gathered the predictions already, and a single rank may evaluate alone.
    """
    try:
        from torchmetrics.classification import MulticlassJaccardIndex
    except ImportError as error:
        raise _missing("mean IoU", "torchmetrics") from error
    make: Callable[..., Any] = MulticlassJaccardIndex
    return make(num_classes, average="macro", ignore_index=ignore_index, validate_args=False, sync_on_compute=False)


def _missing(what: str, library: str) -> ImportError:
    return ImportError(f'{what} needs {library}: pip install "prior-hub[metrics]"')
