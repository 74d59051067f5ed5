"""However a prior was learned, everything downstream is the same: one suite for all makers.

A further maker is one line in MAKERS: a function that makes a prior over the body of tiny_resnet(), and its estimator's name.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable

import pytest
import torch
from legacy_originals import paper_files
from models import dense_covariance, dense_penalty, image_data, quiet_arguments, tiny_resnet
from priors_for_tests import assert_same
from torch import nn
from transformers import Trainer, TrainingArguments

from prior_hub import DiagonalFisherEstimator, PriorModel, PriorTrainer, SwagCallback, SwagEstimator, isotropic_prior
from prior_hub.cli import main
from prior_hub.priors.matching import canonical_parameters, head_parameter_names

torch.set_num_threads(1)
SOURCE_CLASSES, TARGET_CLASSES, SCALE, DRAWS = 3, 5, 2.0, 500
ABOUT = {"base_model": "org/tiny", "license": "mit"}


def walked(rank: int, steps: int = 8) -> PriorModel:
    """SWAG over a random walk of the weights, so that no variance is at the floor."""
    model, estimator = tiny_resnet(classes=SOURCE_CLASSES), SwagEstimator(rank)
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.03 * torch.randn(p.shape, generator=generator))
        estimator.update(model)
    return estimator.prior(dataset="org/images", scale=SCALE, **ABOUT)


def fisher() -> PriorModel:
    estimator = DiagonalFisherEstimator().fit(tiny_resnet(classes=SOURCE_CLASSES), image_data(12), batch_size=6)
    return estimator.prior(prior_precision=50.0, dataset="org/images", scale=SCALE, **ABOUT)


def isotropic() -> PriorModel:
    model = tiny_resnet(classes=SOURCE_CLASSES)
    return isotropic_prior(model, variance=0.02, scale=SCALE, source={"dataset": "org/images"}, **ABOUT)


def imported() -> PriorModel:
    """From the four files of Pre-Train Your Loss, as an independent small implementation writes them."""
    model = tiny_resnet(classes=SOURCE_CLASSES)
    model.classifier = nn.Identity()  # their vectors are the backbone's
    with tempfile.TemporaryDirectory() as folder:
        paper_files(folder, n=8, rank=4, net=model)
        about = {"source": {"dataset": "org/images"}, **ABOUT}
        return PriorModel.from_legacy(folder, reference=model, head=None, scale=SCALE, **about)


MAKERS: dict[str, tuple[Callable[[], PriorModel], str]] = {
    "swag": (lambda: walked(4), "swag"),
    "diagonal swag": (lambda: walked(0), "swag"),
    "fisher": (fisher, "diagonal-fisher"),
    "isotropic": (isotropic, "isotropic"),
    "imported": (imported, "swag"),
}


@pytest.fixture(scope="module", params=MAKERS)
def made(request) -> tuple[PriorModel, str]:
    make, name = MAKERS[request.param]
    return make(), name


@pytest.fixture(scope="module")
def stored(made, tmp_path_factory) -> PriorModel:
    """The prior after it has been through a folder."""
    folder = tmp_path_factory.mktemp("alike") / "prior"
    made[0].save_pretrained(folder)
    return PriorModel.from_pretrained(folder)


def target(seed: int = 9) -> nn.Module:
    return tiny_resnet(seed=seed, classes=TARGET_CLASSES)


def test_a_folder_gives_it_back_bit_for_bit(made, stored):
    assert_same(stored, made[0])
    assert stored.config.estimator["name"] == made[1]


def test_it_covers_the_body_of_a_model_with_another_head_and_never_the_head(stored):
    model = target()
    match = stored.match(model)
    head = set(head_parameter_names(model))
    assert head
    assert set(match.pairs.values()) == set(canonical_parameters(model)) - head
    stored.initialize(model)
    values, buffers = canonical_parameters(model), dict(model.named_buffers())
    assert all(torch.equal(values[there], stored.mean[name]) for name, there in match.pairs.items())
    assert stored.buffers
    assert all(torch.equal(buffers[name], tensor) for name, tensor in stored.buffers.items())


def test_the_penalty_and_its_gradient_are_the_dense_formulas(stored):
    model = target()
    theta = {n: p for n, p in canonical_parameters(model).items() if n in stored.mean}
    value, gradient = dense_penalty(stored, theta)
    found = stored.penalty(model)
    assert found.item() == pytest.approx(value, rel=1e-6)
    found.backward()
    for name, expected in gradient.items():
        tolerance = 1e-5 * float(expected.abs().max())
        torch.testing.assert_close(theta[name].grad.double(), expected, rtol=1e-4, atol=tolerance)


def test_the_density_is_the_dense_gaussians(stored):
    theta = {n: p.detach() for n, p in canonical_parameters(target()).items() if n in stored.mean}
    sigma = dense_covariance(stored)
    flat = torch.cat([(theta[n].double() - stored.mean[n].double()).flatten() for n in stored.mean])
    expected = torch.distributions.MultivariateNormal(torch.zeros_like(flat), sigma).log_prob(flat)
    assert stored.log_prob(theta).item() == pytest.approx(expected.item(), rel=1e-5)


def test_samples_have_the_declared_mean_and_variance(stored):
    """Five standard errors: of a mean sd/sqrt(n), of a variance sqrt(2/n) of it; over every 13th entry, and their average."""
    generator = torch.Generator().manual_seed(1)
    draws = []
    for _ in range(DRAWS):
        sample = stored.sample(generator=generator)
        draws.append(torch.cat([sample[n].flatten() for n in stored.mean])[::13].double())
    values = torch.stack(draws)
    mean = torch.cat([stored.mean[n].flatten() for n in stored.mean])[::13].double()
    variance = dense_covariance(stored).diagonal()[::13]
    z = (values.mean(0) - mean) / (variance / DRAWS).sqrt()
    assert z.abs().max() < 5
    ratio = values.var(0) / variance
    assert (ratio - 1).abs().max() < 5 * math.sqrt(2 / DRAWS)


def test_it_fine_tunes_with_the_prior_counted_and_the_head_free(made, stored, tmp_path):
    model = target()
    stored.initialize(model)
    settings = {"max_steps": 3, "learning_rate": 0.01, "per_device_train_batch_size": 20}
    args = quiet_arguments(tmp_path, **settings)
    trainer = PriorTrainer(model, args, prior=stored, train_dataset=image_data(20, classes=TARGET_CLASSES))
    start = {n: p.detach().clone() for n, p in canonical_parameters(model).items()}
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "nll" in entry]
    assert len(logs) == 3
    assert all(math.isfinite(entry[key]) for entry in logs for key in ("loss", "nll", "prior_loss"))
    assert logs[-1]["loss"] < logs[0]["loss"]
    assert logs[-1]["prior_loss"] > 0  # it has left the mean, and pays for it
    head = set(head_parameter_names(model))
    assert head.isdisjoint(trainer.prior_penalty.covered_names)
    assert all(not torch.equal(p, start[n]) for n, p in canonical_parameters(model).items() if n in head)


def test_the_penalty_falls_quadratically_to_0_on_the_way_back_to_the_mean(stored):
    """Half way back is a quarter of it, and at the mean it is 0."""
    values = [
        stored.penalty({n: m + share * 0.1 * torch.ones_like(m) for n, m in stored.mean.items()}).item()
        for share in (1.0, 0.5, 0.25, 0.0)
    ]
    assert values == sorted(values, reverse=True)
    assert values[1] == pytest.approx(values[0] / 4, rel=1e-3)
    assert values[-1] == 0


def test_its_card_diagnosis_and_pictures_are_made(made, stored, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from prior_hub.plots import plot_prior

    card = stored.card(repo_id="me/prior")
    assert f"| estimator: name | {made[1]} |" in card
    assert 'PriorModel.from_pretrained("me/prior")' in card
    assert f"| rank K (rows of D) | {stored.rank} |" in card
    diagnosis = stored.diagnose()
    assert diagnosis.rank == stored.rank
    assert diagnosis.share_at_floor == 0
    assert plot_prior(stored, tmp_path / "prior.png").read_bytes().startswith(b"\x89PNG")
    stored.save_pretrained(tmp_path / "prior")
    assert main(["check", str(tmp_path / "prior")]) == 0
    assert "are right" in capsys.readouterr().out
    assert main(["info", str(tmp_path / "prior")]) == 0


def test_diagonal_swag_has_the_variance_and_the_mean_of_swag_with_rank_k(tmp_path):
    """The rank decides what is kept beside the variance, never the variance; a = 1 where there is nothing beside it."""

    def learned(rank: int) -> PriorModel:
        callback = SwagCallback(rank=rank, start=2, every_n_steps=1)
        settings = {"max_steps": 10, "learning_rate": 0.05, "per_device_train_batch_size": 4}
        args = quiet_arguments(tmp_path / str(rank), TrainingArguments, **settings)
        Trainer(tiny_resnet(), args, train_dataset=image_data(), callbacks=[callback]).train()
        return callback.prior()

    diagonal, full = learned(0), learned(6)
    assert diagonal.deviations == {}
    assert (diagonal.rank, diagonal.config.diagonal_weight, diagonal.config.low_rank_weight) == (0, 1.0, 0.0)
    assert (full.rank, full.config.diagonal_weight) == (6, 0.5)
    for kind in ("mean", "variance", "buffers"):
        a, b = getattr(diagonal, kind), getattr(full, kind)
        assert all(torch.equal(a[name], b[name]) for name in b)
    truncated = full.truncated(0)
    assert torch.equal(
        torch.cat([v.flatten() for v in truncated.gaussian.marginal_variance().values()]),
        torch.cat([v.flatten() for v in diagonal.gaussian.marginal_variance().values()]),
    )
