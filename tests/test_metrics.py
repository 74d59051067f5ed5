"""Metrics against hand-made cases, other libraries, closed forms and simulated laws; compute_metrics at once and by batch."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import mannwhitneyu
from torch.distributions import Categorical

from prior_hub import PriorNumericsError
from prior_hub.inference import metrics
from prior_hub.inference.metrics import (
    TemperatureScaling,
    accuracy,
    brier_score,
    classification_metrics,
    expected_calibration_error,
    mean_iou,
    mutual_information,
    negative_log_likelihood,
    ood_auroc,
    predictive_entropy,
    reliability_bins,
    segmentation_metrics,
)


def example(*shape, classes=4, spread=2.0, seed=0):
    """Logits (B, C, ...) and labels (B, ...), a third of them -100."""
    g = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(shape[0], classes, *shape[1:], generator=g)
    labels = torch.randint(0, classes, shape, generator=g)
    return logits, labels.masked_fill(torch.rand(shape, generator=g) < 1 / 3, -100)


def prediction(predictions, labels):
    as_array = [p.numpy() for p in predictions] if isinstance(predictions, tuple) else predictions.numpy()
    return SimpleNamespace(
        predictions=tuple(as_array) if isinstance(predictions, tuple) else as_array, label_ids=labels.numpy()
    )


# ------------------------------------------------------------------------------------------- accuracy, NLL, Brier, ECE


@pytest.mark.parametrize("shape", [(50,), (10, 7), (3, 5, 6)], ids=["images", "tokens", "pixels"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_scores_equal_those_of_torch_and_of_a_loop_in_float64(shape, dtype):
    logits, labels = example(*shape)
    logits = logits.to(dtype)
    rows, truth = logits.double().movedim(1, -1).reshape(-1, 4), labels.flatten()
    nll, brier, right = [], [], []
    for z, y in zip(rows, truth.tolist(), strict=True):
        if y != -100:
            p = torch.exp(z - z.logsumexp(0))
            nll.append(-math.log(p[y]))
            brier.append(sum((float(p[c]) - (c == y)) ** 2 for c in range(4)))
            right.append(float(z.argmax() == y))
    close = {"rel": 1e-6} if dtype != torch.float64 else {"rel": 1e-12}
    assert negative_log_likelihood(logits, labels, from_logits=True) == pytest.approx(np.mean(nll), **close)
    assert np.mean(nll) == pytest.approx(float(F.cross_entropy(logits.double(), labels)))
    assert brier_score(logits, labels, from_logits=True) == pytest.approx(np.mean(brier), **close)
    assert accuracy(logits, labels) == pytest.approx(np.mean(right))
    p = logits.double().softmax(1)
    assert negative_log_likelihood(p, labels) == pytest.approx(np.mean(nll), rel=1e-12)
    assert brier_score(p, labels) == pytest.approx(np.mean(brier), rel=1e-12)


def test_logits_keep_what_probabilities_lose():
    """A true class at logit -200 has probability 0 in float32; one at +25 has 1, and its Brier score is not rounding."""
    labels = torch.tensor([1])
    far = torch.tensor([[200.0, 0.0]])
    assert negative_log_likelihood(far.softmax(1), labels) == math.inf
    assert negative_log_likelihood(far, labels, from_logits=True) == 200.0
    assert negative_log_likelihood(far.log_softmax(1), labels, from_logits=True) == 200.0
    sure = torch.tensor([[0.0, 25.0]])
    expected = 2 * (1 / (1 + math.exp(25.0))) ** 2
    assert brier_score(sure, labels, from_logits=True) == pytest.approx(expected, rel=1e-5)


def test_a_hand_made_reliability_diagram():
    p = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.45, 0.55], [0.0, 1.0], [0.6, 0.4]], dtype=torch.float64)
    labels = torch.tensor([0, 1, 1, 0, 1, -100])
    found = reliability_bins(p, labels, bins=4)
    assert found.edges == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert found.count == (0, 0, 2, 3)  # a confidence of 1 lies in the last bin
    assert found.accuracy[2:] == pytest.approx((1 / 2, 2 / 3))
    assert found.confidence[2:] == pytest.approx(((0.7 + 0.55) / 2, 2.7 / 3))
    assert all(math.isnan(v) for v in (*found.accuracy[:2], *found.confidence[:2]))
    by_hand = 2 / 5 * abs(0.5 - 0.625) + 3 / 5 * abs(2 / 3 - 0.9)
    assert found.expected_calibration_error == pytest.approx(by_hand)
    assert expected_calibration_error(p, labels, bins=4) == pytest.approx(by_hand)


@pytest.mark.parametrize("bins", [1, 10, 15])
@pytest.mark.parametrize("shape", [(500,), (20, 6, 5)])
def test_calibration_error_is_torchmetrics(bins, shape):
    from torchmetrics.functional.classification import multiclass_calibration_error

    logits, labels = example(*shape)
    p = logits.double().softmax(1)
    reference = multiclass_calibration_error(p, labels, num_classes=4, n_bins=bins, norm="l1", ignore_index=-100)
    assert expected_calibration_error(p, labels, bins=bins) == pytest.approx(float(reference), abs=1e-6)  # theirs is in float32


def test_adaptive_bins_hold_as_many_examples_each():
    logits, labels = example(600)
    p, y = logits[labels >= 0].double().softmax(1), labels[labels >= 0]
    found = reliability_bins(p, y, bins=7, adaptive=True)
    assert max(found.count) - min(found.count) <= 1
    confidence, predicted = (t.numpy() for t in p.max(1))
    parts = [np.sort(confidence)[len(y) * b // 7 : len(y) * (b + 1) // 7] for b in range(7)]
    right = (predicted == y.numpy())[np.argsort(confidence)]
    wrong = [right[len(y) * b // 7 : len(y) * (b + 1) // 7].mean() - part.mean() for b, part in enumerate(parts)]
    by_numpy = sum(abs(w) * len(part) for w, part in zip(wrong, parts, strict=True)) / len(y)
    assert expected_calibration_error(p, y, bins=7, adaptive=True) == pytest.approx(by_numpy, rel=1e-12)


def test_equal_confidences_share_an_adaptive_bin_whatever_their_order():
    confidence = torch.tensor([0.6] * 30 + [1.0] * 50, dtype=torch.float64)
    p = torch.stack([confidence, 1 - confidence], 1)
    labels = (torch.arange(80) % 3 == 0).long()
    found = reliability_bins(p, labels, bins=15, adaptive=True)
    assert found.count == (30, 50)
    assert found.edges == pytest.approx((0.6, 1.0, 1.0))
    order = torch.randperm(80, generator=torch.Generator().manual_seed(0))
    assert reliability_bins(p[order], labels[order], bins=15, adaptive=True).count == found.count
    one = reliability_bins(p[:30], labels[:30], adaptive=True)
    assert one.count == (30,)


def calibrated(n, seed=0, classes=3):
    """Logits, and labels drawn from their own softmax."""
    g = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn(n, classes, generator=g, dtype=torch.float64)
    return logits, torch.multinomial(logits.softmax(1), 1, generator=g).squeeze(1)


@pytest.mark.parametrize("adaptive", [False, True])
def test_calibration_error_of_a_calibrated_law_is_what_sampling_gives(adaptive):
    """Per bin |accuracy - confidence| has a half-normal law: mean sqrt(2/pi) and variance (1 - 2/pi) of its variance."""
    n = 20_000
    logits, labels = calibrated(n)
    found = reliability_bins(logits.softmax(1), labels, adaptive=adaptive)
    variance = [k * c * (1 - c) for k, c in zip(found.count, found.confidence, strict=True) if k]  # of a bin's number right
    mean = sum(math.sqrt(2 / math.pi * v) for v in variance) / n
    error = math.sqrt(sum((1 - 2 / math.pi) * v for v in variance)) / n
    assert abs(found.expected_calibration_error - mean) < 5 * error
    overconfident = expected_calibration_error((3 * logits).softmax(1), labels, adaptive=adaptive)
    assert overconfident > 5 * (mean + 5 * error)


def test_counts_do_not_saturate_in_float32():
    """2^24 equal ones summed one by one in float32 stay at 2^24 (torchmetrics 1.9 finds 0 here instead of 0.1)."""
    n = 2**24 + 2**22
    found = metrics._Examples(
        *[torch.empty(0, dtype=torch.float64)] * 2, torch.full((n,), 0.6).double(), (torch.arange(n) % 2).double()
    )
    edges = torch.linspace(0, 1, 16, dtype=torch.float64)
    bins = metrics._bins(edges, metrics._bin_sums(found, edges))
    assert sum(bins.count) == n
    assert bins.expected_calibration_error == pytest.approx(0.1, rel=1e-6)


# ------------------------------------------------------------------------------------------------------------ mean IoU


def confusion(predicted, labels, classes, ignored):
    table = np.zeros((classes, classes), dtype=int)
    for p, y in zip(predicted.flatten().tolist(), labels.flatten().tolist(), strict=True):
        if y not in ignored:
            table[y, p] += 1
    return table


@pytest.mark.parametrize("ignore_index", [255, -100, 0])
def test_mean_iou_is_that_of_a_confusion_matrix_over_the_set(ignore_index):
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(5, 6, 8, 9, generator=g)
    logits[:, 4] = -9.0  # predicted nowhere
    labels = torch.randint(0, 4, (5, 8, 9), generator=g)  # classes 4 and 5 nowhere: 4 is left out, 5 has an IoU of 0
    labels[torch.rand(labels.shape, generator=g) < 0.2] = ignore_index
    labels[0, 0] = -100
    table = confusion(logits.argmax(1), labels, 6, {ignore_index, -100})
    inside = np.diag(table)
    union = table.sum(0) + table.sum(1) - inside
    counted = [c for c in range(6) if union[c] and c != ignore_index]
    expected = np.mean([inside[c] / union[c] for c in counted])
    assert 4 not in counted
    assert 5 in counted
    assert mean_iou(logits, labels, ignore_index=ignore_index) == pytest.approx(expected, rel=1e-6)
    assert mean_iou(logits.argmax(1), labels, num_classes=6, ignore_index=ignore_index) == pytest.approx(expected, rel=1e-6)


def test_mean_iou_counts_pixels_of_the_set_not_means_of_pictures():
    predicted = torch.tensor([[[0, 0, 0, 1]], [[1, 1, 1, 1]]])
    labels = torch.tensor([[[0, 0, 0, 0]], [[0, 1, 1, 1]]])
    assert mean_iou(predicted, labels, num_classes=2) == pytest.approx((3 / 5 + 3 / 5) / 2)


def test_mean_iou_says_what_is_missing(monkeypatch):
    labels = torch.zeros(1, 2, 2, dtype=torch.long)
    with pytest.raises(ValueError, match="needs num_classes"):
        mean_iou(labels, labels)
    with pytest.raises(ValueError, match="4 of 4 predictions are none of the 3 classes"):
        mean_iou(labels + 3, labels, num_classes=3)
    with pytest.raises(ValueError, match=r"shape \(1, 2, 3\), labels \(1, 2, 2\)"):
        mean_iou(torch.zeros(1, 2, 3, dtype=torch.long), labels, num_classes=3)
    monkeypatch.setitem(sys.modules, "torchmetrics.classification", None)
    with pytest.raises(ImportError, match=r'mean IoU needs torchmetrics: pip install "prior-hub\[metrics\]"'):
        segmentation_metrics(3)


# --------------------------------------------------------------------------------------------------------- uncertainty


@pytest.mark.parametrize("shape", [(40,), (4, 3, 5)])
def test_entropy_and_mutual_information_are_those_of_torch_distributions(shape):
    g = torch.Generator().manual_seed(2)
    samples = (2 * torch.randn(7, shape[0], 5, *shape[1:], generator=g, dtype=torch.float64)).softmax(2)
    mixture = samples.mean(0)
    law = Categorical(probs=mixture.movedim(1, -1))
    assert torch.allclose(predictive_entropy(mixture), law.entropy())
    of_samples = torch.stack([predictive_entropy(s) for s in samples]).mean(0)
    # independent: the mean divergence of the samples from their average
    divergence = torch.distributions.kl_divergence(Categorical(probs=samples.movedim(2, -1)), law).mean(0)
    assert torch.allclose(mutual_information(mixture, of_samples), divergence)
    assert float(divergence.min()) > 0.01


def test_certain_predictions_have_no_entropy_and_agreeing_ones_no_negative_information():
    assert predictive_entropy(torch.eye(3)).tolist() == [0.0, 0.0, 0.0]
    p = torch.randn(1000, 10, generator=torch.Generator().manual_seed(0)).softmax(1)
    in_another_order = torch.special.entr(p.flip(1)).sum(1)
    information = mutual_information(p, in_another_order)
    assert 0 <= float(information.min()) <= float(information.max()) < 1e-5
    with pytest.raises(ValueError, match="exceeds the entropy of the average at 1000 of 1000 examples"):
        mutual_information(p, in_another_order / math.log(2) + 0.1)  # in bits
    with pytest.raises(ValueError, match=r"shape \(10,\), expected \(1000,\)"):
        mutual_information(p, torch.zeros(10))


def test_auroc_is_the_mann_whitney_statistic_with_ties():
    g = torch.Generator().manual_seed(3)
    inside, outside = torch.randint(0, 20, (300,), generator=g), torch.randint(5, 30, (20, 10), generator=g)
    statistic = mannwhitneyu(outside.flatten().numpy(), inside.numpy()).statistic
    assert ood_auroc(inside, outside) == pytest.approx(statistic / (300 * 200), rel=1e-12)
    assert ood_auroc(torch.zeros(3), torch.ones(3)) == 1.0
    with pytest.raises(ValueError, match="score_out is empty"):
        ood_auroc(inside, torch.zeros(0))
    with pytest.raises(PriorNumericsError, match="score_in has 1 of 2 entries"):
        ood_auroc(torch.tensor([0.0, math.nan]), torch.ones(1))


def test_auroc_without_scikit_learn_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(ImportError, match=r'needs scikit-learn: pip install "prior-hub\[metrics\]"'):
        ood_auroc(torch.zeros(1), torch.ones(1))


# ------------------------------------------------------------------------------------------------- temperature scaling


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_temperature_scaling_recovers_a_known_temperature_and_its_gradient_is_zero_there(temperature):
    logits, labels = calibrated(20_000, seed=4)
    scaling = TemperatureScaling().fit((temperature * logits).float(), labels)
    z = (temperature * logits).float().double()
    t = torch.tensor(scaling.temperature, dtype=torch.float64, requires_grad=True)

    def loss(t):
        return F.cross_entropy(z / t, labels)

    (gradient,) = torch.autograd.grad(loss(t), t, create_graph=True)
    (curvature,) = torch.autograd.grad(gradient, t)
    curvature = float(curvature.detach())
    assert abs(float(gradient.detach())) < 1e-6 * curvature * temperature
    error = 1 / math.sqrt(curvature * len(labels))  # of a maximum-likelihood estimate
    assert error < 0.02 * temperature
    assert abs(scaling.temperature - temperature) < 5 * error
    assert torch.allclose(scaling(z), (z / scaling.temperature).softmax(1))
    assert torch.equal(scaling(z).argmax(1), z.argmax(1))


def test_temperature_scaling_takes_pixels_ignores_labels_and_works_without_gradients():
    logits, labels = example(3, 8, 7, spread=0.5)
    logits = logits + 0.5 * F.one_hot(labels.clamp_min(0), 4).movedim(-1, 1)
    flat, truth = logits.movedim(1, -1)[labels >= 0], labels[labels >= 0]
    with torch.no_grad():
        found = TemperatureScaling().fit(logits, labels).temperature
    assert found == pytest.approx(TemperatureScaling().fit(flat, truth).temperature, rel=1e-9)
    assert TemperatureScaling().fit(logits.log_softmax(1), labels).temperature == pytest.approx(found, rel=1e-5)
    assert TemperatureScaling()(logits).shape == logits.shape


def test_temperature_scaling_refuses_what_has_no_best_temperature():
    logits = torch.eye(3)
    with pytest.raises(PriorNumericsError, match="all 3 examples are classified rightly"):
        TemperatureScaling().fit(logits, torch.arange(3))
    with pytest.raises(PriorNumericsError, match="no larger logit than the others"):
        TemperatureScaling().fit(logits, (torch.arange(3) + 1) % 3)
    with pytest.raises(PriorNumericsError, match="no larger logit than the others"):
        TemperatureScaling().fit(torch.zeros(4, 3), torch.tensor([0, 1, 2, 0]))
    with pytest.raises(PriorNumericsError, match="1 of 9 logits are infinite"):
        TemperatureScaling().fit(
            torch.tensor([[0.0, -math.inf, 1.0], [0.0, 1.0, 2.0], [1.0, 0.0, 2.0]]), torch.tensor([2, 1, 2])
        )


# ----------------------------------------------------------------------------------------------------- compute_metrics


def test_classification_metrics_are_the_metrics_of_the_logits():
    logits, labels = example(200)
    labels = labels.clamp_min(0)
    found = classification_metrics(prediction((logits, torch.zeros(3)), labels))
    p = logits.double().softmax(1)
    assert found == pytest.approx(
        {
            "accuracy": accuracy(p, labels),
            "nll": negative_log_likelihood(p, labels),
            "brier": brier_score(p, labels),
            "ece": expected_calibration_error(p, labels),
        },
        rel=1e-6,
    )
    assert classification_metrics(prediction(logits.log_softmax(1), labels)) == pytest.approx(found, rel=1e-5)
    assert all(type(v) is float for v in found.values())


def test_classification_metrics_know_transformers_token_logits():
    logits, labels = example(6, 9)  # (B, C, T)
    found = classification_metrics(prediction(logits.movedim(1, -1).contiguous(), labels))
    assert found["nll"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-6)
    assert found["accuracy"] == accuracy(logits, labels)


def pictures(size=(12, 16), smaller=4, n=6, classes=5):
    g = torch.Generator().manual_seed(5)
    logits = 3 * torch.randn(n, classes, size[0] // smaller, size[1] // smaller, generator=g)
    labels = torch.randint(0, classes, (n, *size), generator=g)
    labels[torch.rand(labels.shape, generator=g) < 0.3] = 255
    labels[-1, 6:] = -100  # Trainer's padding
    labels[2] = 255  # a picture without any
    return logits, labels


@pytest.mark.parametrize("smaller", [1, 4])
def test_segmentation_metrics_are_the_metrics_of_upsampled_logits(smaller, monkeypatch):
    logits, labels = pictures(smaller=smaller)
    full = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False).double()
    truth = torch.where(labels == 255, -100, labels)
    expected = {
        "mean_iou": mean_iou(full, truth),
        "pixel_accuracy": accuracy(full, truth),
        "nll": float(F.cross_entropy(full, truth)),
        "ece": expected_calibration_error(full, truth, from_logits=True),
    }
    at_once = segmentation_metrics(5, 255)
    assert at_once(prediction((logits, torch.zeros(1)), labels)) == pytest.approx(expected, rel=1e-5)
    monkeypatch.setattr(metrics, "_MOST_VALUES", 2 * 5 * 12 * 16)  # two pictures at once
    assert at_once(prediction(logits, labels)) == pytest.approx(expected, rel=1e-5)  # and nothing is left of the first time


def test_segmentation_metrics_by_batch_equal_those_at_once():
    logits, labels = pictures()
    expected = segmentation_metrics(5)(prediction(logits, labels))
    by_batch = segmentation_metrics(5)
    for _ in range(2):  # the second evaluation starts anew
        for start in (0, 2, 4):
            batch = SimpleNamespace(predictions=logits[start : start + 2], label_ids=labels[start : start + 2])  # tensors
            found = by_batch(batch, compute_result=start == 4)
            assert found == {} or start == 4
        assert found == pytest.approx(expected, rel=1e-12)
    by_batch(prediction(logits[:1], labels[:1]), compute_result=False)
    by_batch.reset()
    assert by_batch(prediction(logits, labels)) == pytest.approx(expected, rel=1e-12)


def test_segmentation_metrics_refuse_what_does_not_fit():
    logits, labels = pictures()
    metric = segmentation_metrics(5)
    with pytest.raises(ValueError, match=r"expected \(B, 5, h, w\) and \(B, H, W\)"):
        metric(prediction(logits[:, :4], labels))
    with pytest.raises(ValueError, match="larger than labels"):
        metric(prediction(logits, labels[:, ::8, ::8]))
    with pytest.raises(ValueError, match="no pixel counts: all are labelled 255"):
        metric(prediction(logits, torch.full_like(labels, 255)))
    with pytest.raises(ValueError, match="expected one: set label_names"):
        metric(SimpleNamespace(predictions=logits, label_ids=(labels, labels)))
    with pytest.raises(ValueError, match="num_classes is 1"):
        segmentation_metrics(1)
    with pytest.raises(ValueError, match="none of the 5 classes") as error:
        segmentation_metrics(5, ignore_index=-1)(prediction(logits, labels))
    assert "255. If that marks what does not count, pass it as ignore_index (now -1)" in str(error.value)


@pytest.mark.parametrize("by_batch", [False, True])
def test_trainer_takes_them_at_once_and_by_batch(tmp_path, by_batch):
    from transformers import SegformerConfig, SegformerForSemanticSegmentation, Trainer, TrainingArguments

    torch.manual_seed(0)
    config = SegformerConfig(
        num_labels=3,
        depths=[1, 1],
        num_encoder_blocks=2,
        hidden_sizes=[8, 8],
        sr_ratios=[1, 1],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 1],
        mlp_ratios=[1, 1],
        decoder_hidden_size=8,
    )
    model = SegformerForSemanticSegmentation(config).eval()
    labels = torch.randint(0, 3, (5, 32, 32)).masked_fill(torch.rand(5, 32, 32) < 0.1, 255)
    data = [{"pixel_values": torch.randn(3, 32, 32), "labels": y} for y in labels]
    arguments = TrainingArguments(
        str(tmp_path), per_device_eval_batch_size=2, batch_eval_metrics=by_batch, use_cpu=True, report_to=[]
    )
    trainer = Trainer(model, arguments, eval_dataset=data, compute_metrics=segmentation_metrics(3, 255))
    found = trainer.evaluate()
    with torch.no_grad():
        logits = model(torch.stack([d["pixel_values"] for d in data])).logits
    assert logits.shape[-1] == 8
    full = F.interpolate(logits, size=(32, 32), mode="bilinear", align_corners=False)
    assert found["eval_nll"] == pytest.approx(float(F.cross_entropy(full, labels, ignore_index=255)), rel=1e-5)
    assert found["eval_mean_iou"] == pytest.approx(mean_iou(full, labels, ignore_index=255), rel=1e-5)


# -------------------------------------------------------------------------------------------------------------- errors


ALL = [accuracy, negative_log_likelihood, brier_score, expected_calibration_error, reliability_bins]


@pytest.mark.parametrize("metric", ALL)
def test_nan_is_counted_and_refused_but_not_where_nothing_counts(metric):
    logits, labels = example(30)
    p = logits.softmax(1)
    p[labels == -100] = math.nan
    metric(p, labels)
    p[(labels >= 0).nonzero()[:3, 0], 1] = math.nan
    with pytest.raises(PriorNumericsError, match="predictions of 3 of 30 examples have NaN"):
        metric(p, labels)


@pytest.mark.parametrize("metric", ALL)
def test_wrong_shapes_and_labels_are_refused_with_what_was_found(metric):
    logits, labels = example(30)
    p = logits.softmax(1)
    with pytest.raises(ValueError, match=r"shape \(30, 4\) and labels \(29,\)"):
        metric(p, labels[1:])
    with pytest.raises(ValueError, match=r"labels have the type torch\.float32, expected integers"):
        metric(p, labels.float())
    with pytest.raises(ValueError, match=r"2 of 30 labels are none of the 4 classes \(0 to 3\): 7"):
        metric(p, labels.index_fill(0, torch.tensor([0, 5]), 7))
    with pytest.raises(ValueError, match="none of the 30 labels counts"):
        metric(p, torch.full_like(labels, -100))
    if metric is not accuracy:
        with pytest.raises(ValueError, match="examples are no probabilities"):
            metric(logits, labels)


def test_infinite_logits_of_impossible_classes_are_fine_and_others_refused():
    labels = torch.tensor([0, 1])
    masked = torch.tensor([[0.0, 0.0, -math.inf], [0.0, 0.0, -math.inf]])
    assert negative_log_likelihood(masked, labels, from_logits=True) == pytest.approx(math.log(2))
    assert negative_log_likelihood(masked, labels + 1, from_logits=True) == math.inf
    with pytest.raises(PriorNumericsError, match="predictions of 1 of 2 examples give NaN"):
        negative_log_likelihood(torch.tensor([[math.inf, 0.0], [0.0, 0.0]]), labels, from_logits=True)
    with pytest.raises(ValueError, match="bins is 0"):
        reliability_bins(torch.eye(2), labels, bins=0)


def test_metrics_leave_their_inputs_alone():
    logits, labels = example(30)
    p = logits.softmax(1).requires_grad_()
    before = [t.detach().clone() for t in (logits, p, labels)]
    for metric in ALL[1:]:
        metric(p, labels)
        metric(logits, labels, from_logits=True)
    assert all(torch.equal(a, b) for a, b in zip(before, (logits, p, labels), strict=True))
