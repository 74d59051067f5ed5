"""DiagonalFisherEstimator: closed forms, an explicit loop, and a model that is left exactly as it was."""

from __future__ import annotations

import math

import numpy as np
import pytest
import timm
import torch
from models import image_data, text_data, tiny_bert, tiny_llama, tiny_resnet, tiny_vit
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from prior_hub import (
    CategoricalLikelihood,
    DiagonalFisherEstimator,
    GaussianLikelihood,
    PriorHubError,
    PriorMatchError,
    PriorNumericsError,
    PriorWarning,
)

torch.set_num_threads(1)


class Linear(nn.Module):
    """Logits or predictions W x + b, and nothing else."""

    def __init__(self, inputs: int = 3, outputs: int = 2, seed: int = 0) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs).double()
        with torch.no_grad():
            for p in self.linear.parameters():
                p.copy_(0.7 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def pairs(rows: int = 40, inputs: int = 3, classes: int = 2) -> list[tuple[Tensor, int]]:
    generator = torch.Generator().manual_seed(1)
    return [(x, i % classes) for i, x in enumerate(torch.randn(rows, inputs, generator=generator, dtype=torch.float64))]


def in_double(rows: list[dict]) -> list[dict]:
    return [{k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in row.items()} for row in rows]


def padded_text(rows: int = 9) -> list[dict]:
    data = text_data(rows)
    for i, row in enumerate(data):
        row["attention_mask"] = torch.tensor([1] * (3 + i % 4) + [0] * (3 - i % 4))
    return data


def by_hand(model: nn.Module, rows: list[dict], labels: str, *, head: tuple[str, ...]) -> dict[str, Tensor]:
    """The definition, one example at a time with autograd.grad, on the model's own loss where labels are the data's."""
    model.eval()
    covered = {n: p for n, p in model.named_parameters() if not n.startswith(head)}
    total = {n: torch.zeros_like(p) for n, p in covered.items()}
    for row in rows:
        inputs = {k: v.unsqueeze(0) for k, v in row.items() if k != "labels"}
        if labels == "data":
            terms = [(1.0, -model(**inputs, labels=torch.tensor([row["labels"]])).loss)]
        else:
            log_p = model(**inputs).logits[0].log_softmax(0)
            terms = [(value.exp().item(), value) for value in log_p]
        for weight, term in terms:
            gradients = torch.autograd.grad(term, list(covered.values()), retain_graph=True, allow_unused=True)
            for name, gradient in zip(covered, gradients, strict=True):
                if gradient is not None:
                    total[name] += weight * gradient**2
    return {n: t / len(rows) for n, t in total.items()}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    """Relative, except where theory says 0 (the bias of attention keys): there 1e-12 of the largest entry."""
    assert found.keys() == expected.keys()
    largest = max(float(t.max()) for t in expected.values())
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=1e-12 * largest, msg=lambda m, n=name: f"{n}: {m}")


# --------------------------------------------------------------------------------------------------------- closed forms


def test_logistic_regression_has_its_closed_form():
    """F of W[c, j] is mean_i p_c (1 - p_c) x_j^2, of b[c] the same with x = 1: scikit-learn's textbook information matrix."""
    model, data = Linear(3, 4), pairs(classes=4)
    found = DiagonalFisherEstimator(labels="expectation", head=()).fit(model, data, batch_size=7).fisher()
    x = np.stack([row.numpy() for row, _ in data])
    logits = x @ model.linear.weight.detach().numpy().T + model.linear.bias.detach().numpy()
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    information = p * (1 - p)
    np.testing.assert_allclose(found["linear.weight"].numpy(), information.T @ x**2 / len(x), rtol=1e-12)
    np.testing.assert_allclose(found["linear.bias"].numpy(), information.mean(0), rtol=1e-12)


def test_drawn_labels_estimate_the_same_within_five_standard_errors():
    model, data = Linear(3, 3), pairs(30, classes=3)
    exact = DiagonalFisherEstimator(labels="expectation", head=()).fit(model, data, batch_size=30).fisher()
    estimator = DiagonalFisherEstimator(labels="model", samples=1, head=(), generator=torch.Generator().manual_seed(3))
    draws = [estimator.fit(model, data, batch_size=30).fisher() for _ in range(200)]
    for name, expected in exact.items():
        values = torch.stack([d[name] for d in draws])
        error = values.std(0) / math.sqrt(len(draws))
        assert ((values.mean(0) - expected).abs() < 5 * error).all()
        assert (error > 0).all()
    many = DiagonalFisherEstimator(labels="model", samples=400, head=()).fit(model, data, batch_size=30).fisher()
    torch.testing.assert_close(many["linear.weight"], exact["linear.weight"], rtol=0.2, atol=0.0)


@pytest.mark.parametrize("method", ["vmap", "loop"])
def test_linear_regression_has_its_closed_form(method):
    """F of W[k, j] is mean_i x_j^2 / variance, whatever the weights and the targets."""
    model, data = Linear(3, 2), [(x, torch.ones(2)) for x, _ in pairs()]
    estimator = DiagonalFisherEstimator(labels="expectation", likelihood=GaussianLikelihood(0.25), method=method, head=())
    found = estimator.fit(model, data, batch_size=16).fisher()
    x = torch.stack([row for row, _ in data])
    torch.testing.assert_close(found["linear.weight"], (x.square().mean(0) / 0.25).expand(2, 3), rtol=1e-12, atol=0.0)
    torch.testing.assert_close(found["linear.bias"], torch.full((2,), 4.0, dtype=torch.float64), rtol=1e-12, atol=0.0)
    drawn = DiagonalFisherEstimator(samples=500, likelihood=GaussianLikelihood(0.25), head=()).fit(model, data, batch_size=40)
    torch.testing.assert_close(drawn.fisher()["linear.bias"], found["linear.bias"], rtol=5 * math.sqrt(2 / 20_000), atol=0.0)
    assert drawn.prior().config.estimator["likelihood"] == "gaussian (variance 0.25)"


def test_the_variance_is_laplaces():
    """1 / (N F + tau): the precision matrix of ridge regression, which Laplace's approximation gives exactly."""
    model, data = Linear(3, 1), [(x, torch.ones(1)) for x, _ in pairs()]
    estimator = DiagonalFisherEstimator(labels="expectation", likelihood=GaussianLikelihood(0.5), head=())
    prior = estimator.fit(model, data, batch_size=8).prior(prior_precision=2.0)
    x = torch.stack([row for row, _ in data])
    precision = x.T @ x / 0.5 + 2.0 * torch.eye(3)
    torch.testing.assert_close(prior.variance["linear.weight"][0], 1 / precision.diagonal(), rtol=1e-12, atol=0.0)
    assert (prior.rank, prior.config.diagonal_weight, prior.config.low_rank_weight) == (0, 1.0, 0.0)
    assert torch.equal(prior.mean["linear.weight"], model.linear.weight.detach())
    larger = estimator.prior(prior_precision=2.0, num_examples=400)  # ten times the data, from the same Fisher
    torch.testing.assert_close(
        1 / larger.variance["linear.weight"] - 2.0, 10 * (1 / prior.variance["linear.weight"] - 2.0), rtol=1e-9, atol=0.0
    )


# --------------------------------------------------------------------------------------------------- the explicit loop


@pytest.mark.parametrize("labels", ["data", "expectation"])
@pytest.mark.parametrize("method", ["vmap", "loop"])
@pytest.mark.parametrize(
    ("make", "rows", "head"),
    [
        pytest.param(tiny_resnet, image_data, ("classifier",), id="resnet"),
        pytest.param(tiny_vit, image_data, ("classifier",), id="vit"),
        pytest.param(tiny_bert, padded_text, ("classifier",), id="bert with padding"),
    ],
)
def test_equals_an_explicit_loop_over_examples(make, rows, head, method, labels):
    model, data = make().double(), in_double(rows(9))
    found = DiagonalFisherEstimator(labels=labels, method=method, chunk_size=2).fit(model, data, batch_size=4).fisher()
    assert_close(found, by_hand(model, data, labels, head=head))


def test_both_methods_draw_the_same_labels():
    model, data = tiny_resnet().double(), in_double(image_data(9))
    a, b = (DiagonalFisherEstimator(method=m).fit(model, data, batch_size=4).fisher() for m in ("vmap", "loop"))
    assert_close(a, b)


def test_timm_models_take_tensors_and_tuples():
    model = timm.create_model("test_vit", num_classes=3, img_size=16).double().eval()
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    estimator = DiagonalFisherEstimator(labels="data").fit(model, [(images, torch.tensor([0, 1, 2, 0]))])
    body = [n for n, _ in model.named_parameters() if not n.startswith("head.")]
    assert list(estimator.fisher()) == body
    name = "blocks.0.mlp.fc1.weight"
    expected = torch.zeros(())
    for image, label in zip(images, [0, 1, 2, 0], strict=True):
        loss = nn.functional.cross_entropy(model(image.unsqueeze(0)), torch.tensor([label]))
        expected = expected + torch.autograd.grad(loss, model.get_parameter(name))[0] ** 2 / 4
    torch.testing.assert_close(estimator.fisher()[name], expected, rtol=1e-6, atol=1e-15)
    alone = DiagonalFisherEstimator(labels="expectation").fit(model, [images])  # no labels are needed
    assert alone.num_examples == 4


def test_padding_does_not_count():
    model, rows = tiny_bert().double(), padded_text(6)
    longer = [
        {"input_ids": torch.cat([r["input_ids"][:n], torch.full((6 - n,), 7)]), "attention_mask": r["attention_mask"]}
        for r, n in ((r, int(r["attention_mask"].sum())) for r in rows)
    ]
    found = DiagonalFisherEstimator(labels="expectation").fit(model, rows, batch_size=3).fisher()
    assert_close(DiagonalFisherEstimator(labels="expectation").fit(model, longer, batch_size=6).fisher(), found)


def test_masked_language_models_sum_over_the_masked_tokens():
    from transformers import BertConfig, BertForMaskedLM

    settings = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 24}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.3}
    model = BertForMaskedLM(BertConfig(**settings, **still, max_position_embeddings=6)).double().eval()
    rows = [
        {**r, "labels": torch.where(torch.arange(6) % 3 == i % 3, r["input_ids"], -100)} for i, r in enumerate(text_data(4))
    ]
    found = DiagonalFisherEstimator(labels="data").fit(model, rows, batch_size=2).fisher()
    for name in ("bert.encoder.layer.0.output.dense.weight", "bert.embeddings.word_embeddings.weight"):  # the second is tied
        expected = torch.zeros(())
        for row in rows:
            loss = 2 * model(**{k: v.unsqueeze(0) for k, v in row.items()}).loss  # two tokens, and the loss is their mean
            expected = expected + torch.autograd.grad(loss, model.get_parameter(name))[0] ** 2 / 4
        torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-15)
    drawn = DiagonalFisherEstimator(labels="model").fit(model, rows, batch_size=2)
    prior = drawn.prior()
    assert "bert.embeddings.word_embeddings.weight" in prior.mean  # tied to the decoder, and not the head's
    assert all(not n.startswith("cls.") for n in prior.mean)
    with pytest.raises(ValueError, match="one prediction per token: the batch must hold 'labels'"):
        DiagonalFisherEstimator().fit(model, [{k: v for k, v in r.items() if k != "labels"} for r in rows], batch_size=2)


# ------------------------------------------------------------------------------------------------- what it leaves alone


def test_batch_norm_does_not_move_and_modes_come_back_also_after_an_error():
    model = tiny_resnet().train()
    model.resnet.embedder.eval()
    before = {n: b.clone() for n, b in model.named_buffers()} | {n: p.detach().clone() for n, p in model.named_parameters()}
    modes = [m.training for m in model.modules()]
    fitted = DiagonalFisherEstimator().fit(model, image_data(8), batch_size=4)
    for bad, message in (
        ([], "no example"),
        ([{"pixel_values": torch.full((1, 3, 8, 8), math.nan)}], "for example 0 .*is NaN"),
    ):
        with pytest.raises(PriorHubError, match=message):
            fitted.fit(model, bad)
    assert [m.training for m in model.modules()] == modes
    now = dict(model.named_buffers()) | dict(model.named_parameters())
    assert all(torch.equal(now[n], t) for n, t in before.items())
    assert all(p.grad is None for p in model.parameters())


def test_dropout_stays_off_and_statistics_travel_with_the_mean():
    model = tiny_resnet()
    prior = DiagonalFisherEstimator(labels="data").fit(model, image_data(8), batch_size=4).prior()
    buffers = {n: b for n, b in model.named_buffers() if "classifier" not in n}
    assert prior.buffers.keys() == buffers.keys()
    dropping = tiny_bert(hidden_dropout_prob=0.5).train()
    a, b = (DiagonalFisherEstimator(labels="expectation").fit(dropping, text_data(4), batch_size=2).fisher() for _ in "ab")
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_frozen_parameters_and_the_head_stay_out():
    model = tiny_vit()
    model.vit.embeddings.requires_grad_(False)
    found = DiagonalFisherEstimator().fit(model, image_data(4), batch_size=2).fisher()
    assert not any(n.startswith(("vit.embeddings", "classifier")) for n in found)
    assert found
    model.vit.requires_grad_(False)
    with pytest.raises(PriorMatchError, match="no trainable parameters beside its head"):
        DiagonalFisherEstimator().fit(model, image_data(4), batch_size=2)


# ---------------------------------------------------------------------------------------------------------- what it says


class Branching(nn.Module):
    """Looks at a value, which torch.func.vmap cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).tanh() if x.sum() > 0 else self.body(x))


def test_a_model_that_cannot_be_vectorised_falls_back_once_and_says_so():
    model, data = Branching(), [(x.float(), y) for x, y in pairs(10)]
    estimator = DiagonalFisherEstimator(labels="data", chunk_size=2)
    with pytest.warns(PriorWarning, match="Branching cannot be vectorised") as caught:
        estimator.fit(model, data, batch_size=5)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert estimator.prior().config.estimator["method"] == "loop"
    loop = DiagonalFisherEstimator(labels="data", method="loop").fit(model, data, batch_size=5)
    assert all(torch.equal(a, b) for a, b in zip(estimator.fisher().values(), loop.fisher().values(), strict=True))
    with pytest.raises(RuntimeError, match="vmap"):
        DiagonalFisherEstimator(labels="data", method="vmap").fit(model, data, batch_size=5)


@pytest.mark.parametrize("method", ["vmap", "loop"])
def test_a_gradient_that_is_not_finite_is_named_with_its_example(method):
    model, data = Linear(3, 2), pairs(10)
    data[7][0][1] = math.inf
    estimator = DiagonalFisherEstimator(labels="data", method=method, head=(), chunk_size=3)
    with pytest.raises(PriorNumericsError, match=r"the gradient of 'linear.weight' at .*examples? (6|7)"):
        estimator.fit(model, data, batch_size=4)
    with pytest.raises(PriorHubError, match="call fit"):  # half a Fisher is none
        estimator.prior()
    estimator = DiagonalFisherEstimator(labels="data", method=method, head=(), chunk_size=1)
    with pytest.raises(PriorNumericsError, match=r"at example 7 "):
        estimator.fit(model, data, batch_size=4)


def test_what_is_recorded_and_how_entries_without_fisher_are_treated():
    model = tiny_bert()
    estimator = DiagonalFisherEstimator(labels="model", samples=2, generator=torch.Generator().manual_seed(11))
    estimator.fit(model, text_data(20), batch_size=8, max_examples=12)
    prior = estimator.prior(
        prior_precision=4.0, dataset="org/words", objective="supervised", license="mit", variance_floor=1e-9
    )
    recorded = prior.config.estimator
    expected = {"name": "diagonal-fisher", "labels": "model", "samples": 2, "likelihood": "categorical", "seed": 11}
    expected |= {"num_examples": 20, "examples_used": 12, "prior_precision": 4.0, "variance_entries_at_floor": 0}
    assert expected.items() <= recorded.items()
    zeros = {n: f == 0 for n, f in estimator.fisher().items()}
    assert recorded["entries_without_fisher"] == sum(int(z.sum()) for z in zeros.values()) > 0  # words that never occur
    assert all((prior.variance[n][z] == 0.25).all() for n, z in zeros.items())
    assert max(v.max().item() for v in prior.variance.values()) == 0.25
    assert min(v.min().item() for v in prior.variance.values()) < 0.24
    assert prior.config.source == {"dataset": "org/words", "objective": "supervised"}
    assert (prior.config.license, prior.config.num_snapshots, prior.config.variance_floor) == ("mit", None, 1e-9)
    floored = estimator.prior(prior_precision=1e12, variance_floor=1e-6)
    assert floored.config.estimator["variance_entries_at_floor"] == floored.num_parameters
    assert (
        "samples" not in DiagonalFisherEstimator(labels="data").fit(model, text_data(4), batch_size=2).prior().config.estimator
    )


def test_max_examples_is_a_random_part_of_a_data_set_and_the_first_of_a_stream():
    model, data = Linear(3, 2), pairs(40)
    part = DiagonalFisherEstimator(labels="data", head=()).fit(model, data, batch_size=4, max_examples=6)
    again = DiagonalFisherEstimator(labels="data", head=()).fit(model, data, batch_size=4, max_examples=6)
    first = DiagonalFisherEstimator(labels="data", head=()).fit(model, data[:6], batch_size=4)
    assert part.num_examples == 6
    assert torch.equal(part.fisher()["linear.weight"], again.fisher()["linear.weight"])
    assert not torch.allclose(part.fisher()["linear.weight"], first.fisher()["linear.weight"])

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(data)

    for stream in (DataLoader(Stream(), batch_size=4), Stream()):
        cut = DiagonalFisherEstimator(labels="data", head=()).fit(model, stream, max_examples=6)
        torch.testing.assert_close(cut.fisher()["linear.weight"], first.fisher()["linear.weight"])
        assert cut.prior().config.estimator["num_examples"] == 6
    whole = DiagonalFisherEstimator(labels="data", head=()).fit(model, DataLoader(data, batch_size=4), max_examples=6)
    assert whole.prior().config.estimator["num_examples"] == 40


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": "true"}, "'model', 'expectation', 'data'"),
        ({"method": "jit"}, "'auto', 'vmap', 'loop'"),
        ({"samples": 0}, "samples is 0"),
        ({"chunk_size": 0}, "chunk_size is 0"),
    ],
)
def test_impossible_arguments_are_value_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        DiagonalFisherEstimator(**arguments)


def test_what_a_wrong_model_or_data_set_is_told():
    estimator, model = DiagonalFisherEstimator(labels="data"), tiny_vit()
    with pytest.raises(PriorHubError, match="call fit"):
        estimator.prior()
    with pytest.raises(PriorHubError, match="gave no example"):
        estimator.fit(model, [], batch_size=4)
    with pytest.raises(ValueError, match="labels='data' needs 'labels' in every batch"):
        estimator.fit(model, [{"pixel_values": torch.zeros(2, 3, 8, 8)}])
    with pytest.raises(ValueError, match="A list of single examples needs batch_size"):
        estimator.fit(model, image_data(4))
    with pytest.raises(ValueError, match=r"a model with a head that predicts"):
        DiagonalFisherEstimator(head=()).fit(model.vit, image_data(4), batch_size=2)
    with pytest.raises(ValueError, match="GaussianLikelihood"):
        DiagonalFisherEstimator().fit(tiny_vit(classes=1), image_data(4, classes=1), batch_size=2)
    regression = [(x, torch.ones(())) for x, _ in pairs(4)]
    with pytest.raises(ValueError, match="not classes: for regression pass"):
        DiagonalFisherEstimator(labels="data", head=()).fit(Linear(3, 2), regression, batch_size=2)
    with pytest.raises(ValueError, match="holds no tensor"):
        estimator.fit(model, [["a picture"]])
    with pytest.raises(NotImplementedError, match="predicts the next token"):
        DiagonalFisherEstimator().fit(tiny_llama(), text_data(4, token_labels=True), batch_size=2)
    mixing = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), nn.Linear(3, 2))
    with pytest.raises(PriorHubError, match="BatchNorm without running statistics"):
        DiagonalFisherEstimator(head=()).fit(mixing, [torch.zeros(4, 3)])
    fitted = estimator.fit(model, image_data(4), batch_size=2)
    with pytest.raises(ValueError, match="prior_precision is 0"):
        fitted.prior(prior_precision=0)
    with pytest.raises(ValueError, match="num_examples is 0"):
        fitted.prior(num_examples=0)
    per_token = CategoricalLikelihood().targets(
        torch.zeros(2, 3, 4), None, kind="expectation", samples=1, generator=torch.Generator()
    )
    with pytest.raises(ValueError, match="sums over classes"):
        next(per_token)


def test_half_precision_is_warned_of():
    with pytest.warns(PriorWarning, match=r"'conv|'resnet.* is torch.bfloat16: its gradients are rounded"):
        prior = (
            DiagonalFisherEstimator(labels="data")
            .fit(
                tiny_resnet().bfloat16(),
                [{**r, "pixel_values": r["pixel_values"].bfloat16()} for r in image_data(4)],
                batch_size=2,
            )
            .prior()
        )
    assert prior.config.dtype["mean"] == "float32"


def test_wrappers_and_tied_weights_keep_their_canonical_names():
    model = tiny_resnet()
    plain = DiagonalFisherEstimator(labels="data").fit(model, image_data(6), batch_size=3).fisher()
    wrapped = (
        DiagonalFisherEstimator(labels="data").fit(torch.compile(model, backend="eager"), image_data(6), batch_size=3).fisher()
    )
    assert_close(wrapped, plain)
