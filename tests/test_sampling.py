"""PriorTrainer(sampler=...): the law of its chain, samples on disk, exact resumption, and averages beside the single model."""

from __future__ import annotations

import dataclasses
import gc
import math
import shutil

import pytest
import torch
from models import (
    dense_covariance,
    image_data,
    quiet_arguments,
    random_prior,
    text_data,
    tiny_bert,
    tiny_llama,
    tiny_resnet,
    tiny_vit,
)
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from prior_hub import (
    BAOA,
    SGHMC,
    SGLD,
    BayesianModelAverage,
    PriorArgumentsMixin,
    PriorModel,
    PriorNumericsError,
    PriorPenalty,
    PriorTrainer,
    PriorTrainingArguments,
    PriorWarning,
    isotropic_prior,
)
from prior_hub.inference.samples import list_samples

torch.set_num_threads(1)

SAMPLERS = ("baoa", "sghmc", "sgld")
RATES = {"baoa": 0.3, "sghmc": 1e-3, "sgld": 1e-3}


@pytest.fixture(scope="module", autouse=True)
def _imported_modules_are_no_garbage():
    gc.freeze()
    yield
    gc.unfreeze()


def arguments(folder, sampler="baoa", **settings):
    defaults = {
        "sampler": sampler,
        "learning_rate": RATES.get(sampler, 1e-3),
        "max_steps": 12,
        "num_cycles": 2,
        "samples_per_cycle": 2,
        "prior_head_variance": 0.5,
        "per_device_train_batch_size": 8,
        "seed": 3,
    }
    return quiet_arguments(folder, **(defaults | settings))


def trainer_of(folder, sampler="baoa", *, make=tiny_vit, model=None, prior=None, callbacks=None, **settings):
    model = make() if model is None else model
    return PriorTrainer(
        model=model,
        prior=prior or random_prior(model, variance=0.01),
        args=arguments(folder, sampler, **settings),
        train_dataset=image_data(),
        eval_dataset=image_data(10, seed=4),
        callbacks=callbacks,
    )


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# -------------------------------------------------------------------------------------------------------------- the law


class Flat(nn.Module):
    """A model whose loss is the same whatever its weights are: under a sampler they follow the prior alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body, self.classifier = nn.Linear(width, 1, bias=False), nn.Linear(500, 1, bias=False)

    def forward(self, pixel_values, labels=None):
        nothing = sum(0.0 * p.sum() for p in self.parameters())
        return {"loss": nothing, "logits": torch.zeros(len(pixel_values), 2) + nothing}


class Squares(TrainerCallback):
    """Sums of theta and theta^2 over the steps after `start`, and the penalty's."""

    def __init__(self, trainer_box, start):
        self.box, self.start = trainer_box, start
        self.penalties, self.head = [], []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step > self.start:
            trainer = self.box[0]
            self.penalties.append(float(trainer.prior_penalty.gaussian.penalty({"body.weight": model.body.weight.detach()})))
            self.head.append(float(model.classifier.weight.detach().square().mean()))


@pytest.mark.parametrize(
    ("sampler", "metric", "rate", "temperature"),
    [
        ("baoa", "diagonal", 5.0, 0.25),
        pytest.param("baoa", "full", 5.0, 1.0, marks=pytest.mark.slow),
        pytest.param("sghmc", "diagonal", 2.0, 1.0, marks=pytest.mark.slow),
        pytest.param("sgld", "diagonal", 2.0, 0.25, marks=pytest.mark.slow),
    ],
)
def test_without_data_the_chain_of_the_trainer_has_the_priors_law(tmp_path, sampler, metric, rate, temperature):
    """E penalty = T P / 2 and E |head|^2 = T v, whatever the samplers' rates, under accumulation, clipping and N = 26."""
    generator = torch.Generator().manual_seed(0)
    width, n = 1000, 4
    variance = 10 ** (-4 * torch.rand(1, width, generator=generator))
    rows = 0.3 * variance.sqrt() * torch.randn(3, 1, width, generator=generator)
    prior = PriorModel.from_tensors(
        {"body.weight": torch.randn(1, width, generator=generator)}, {"body.weight": variance}, {"body.weight": rows}
    )
    box: list = []
    steps, start = 700, 100
    squares = Squares(box, start)
    trainer = PriorTrainer(
        model=Flat(width),
        prior=prior,
        args=arguments(
            tmp_path,
            sampler,
            sampler_metric=metric,
            learning_rate=rate,
            temperature=temperature,
            friction=0.5,
            max_steps=steps,
            num_cycles=1,
            exploration=0.0,
            sampling_schedule="constant",
            gradient_accumulation_steps=2,
            max_grad_norm=1e-3,  # would starve the prior if it clipped
            prior_num_examples=n,
            logging_strategy="no",
            per_device_train_batch_size=1,
        ),
        train_dataset=image_data(8),
        callbacks=[squares],
    )
    box.append(trainer)
    trainer.train()
    assert isinstance(trainer._sampler(), {"baoa": BAOA, "sghmc": SGHMC, "sgld": SGLD}[sampler])
    # 2 penalty / T is chi^2 with `width` degrees of freedom; SGLD and SGHMC inflate it by their discretisation, at most
    # 1 / (1 - rate / (2 N)): curvatures in the prior's diagonal metric are at most 1/N
    inflation = {"baoa": 0.0, "sghmc": rate / n / 3, "sgld": rate / n / 2}[sampler]
    mean = 2 * sum(squares.penalties) / len(squares.penalties) / temperature / width
    # batch means give the error of an average over a correlated chain
    parts = torch.tensor(squares.penalties).view(-1, 50).mean(1) * 2 / temperature / width
    error = float(parts.std() / math.sqrt(len(parts)))
    assert error < 0.05
    assert 1 - 5 * error < mean < 1 / (1 - inflation) + 5 * error
    head = torch.tensor(squares.head).view(-1, 50).mean(1) / temperature / 0.5
    assert abs(float(head.mean()) - 1) < 5 * float(head.std() / math.sqrt(len(head))) + inflation / (1 - inflation)


@pytest.mark.slow
def test_at_temperature_0_the_trainer_comes_to_the_map_solution(tmp_path):
    """The gradient of NLL + penalty / N vanishes there: checked by autograd and a dense solve."""
    torch.manual_seed(0)
    data = [{"x": torch.randn(3), "labels": torch.randn(1)} for _ in range(20)]

    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(3, 1, bias=False)

        def forward(self, x, labels=None):
            out = self.body(x)
            return {"loss": 0.5 * (out - labels).square().mean(), "logits": out}

    model = Linear()
    generator = torch.Generator().manual_seed(1)
    shape = (1, 3)
    prior = PriorModel.from_tensors(
        {"body.weight": torch.randn(shape, generator=generator)},
        {"body.weight": torch.tensor([[1e-2, 1e-1, 1.0]])},
        {"body.weight": 0.3 * torch.randn(2, *shape, generator=generator)},
    )
    for metric in ("diagonal", "full"):
        trainer = PriorTrainer(
            model=model,
            prior=prior,
            args=arguments(
                tmp_path / metric,
                "baoa",
                sampler_metric=metric,
                temperature=0.0,
                learning_rate=2.0,
                friction=0.2,
                max_steps=1000,
                num_cycles=1,
                exploration=0.0,
                sampling_schedule="constant",
                per_device_train_batch_size=20,
                logging_strategy="no",
            ),
            train_dataset=data,
        )
        trainer.train()
        x, y = torch.stack([d["x"] for d in data]).double(), torch.stack([d["labels"] for d in data]).double()[:, 0]
        precision = torch.linalg.inv(dense_covariance(prior))
        mean = prior.mean["body.weight"].double().flatten()
        expected = torch.linalg.solve(precision + x.T @ x, precision @ mean + x.T @ y)
        torch.testing.assert_close(model.body.weight.detach().double().flatten(), expected, rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------------------- samples on disk


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samples_are_written_where_the_schedule_takes_them(tmp_path, sampler):
    seen = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen[state.global_step] = weights(model)

    trainer = trainer_of(tmp_path, sampler, callbacks=[Keep()])
    trainer.train()
    found = list_samples(trainer.samples_folder)
    assert [s.step for s in found] == [4, 6, 10, 12]  # two cycles of six steps, the second half of each samples
    assert [s.metadata()["cycle"] for s in found] == ["0", "0", "1", "1"]
    for sample in found:
        tensors = sample.read().parameters
        assert all(torch.equal(tensor, seen[sample.step][name]) for name, tensor in tensors.items())
        assert tensors.keys() == dict(trainer.model.named_parameters()).keys()


def test_each_sample_has_the_batch_norm_statistics_of_its_own_weights(tmp_path):
    from prior_hub import recompute_batch_norm

    trainer = trainer_of(tmp_path, make=tiny_resnet, per_device_train_batch_size=26)
    trainer.train()
    own = weights(trainer.model)
    loader = [trainer.data_collator(image_data())]
    for sample in list_samples(trainer.samples_folder):
        tensors = sample.read()
        assert tensors.buffers
        expected = recompute_batch_norm(trainer.model, loader, parameters=tensors.parameters, progress=False)
        for name, value in expected.items():
            torch.testing.assert_close(tensors.buffers[name], value, rtol=1e-4, atol=1e-6)
    assert same(own, weights(trainer.model))


@pytest.mark.parametrize("make", [tiny_vit, tiny_resnet])
def test_taking_samples_leaves_no_trace_in_the_chain(tmp_path, make):
    one = trainer_of(tmp_path / "a", make=make, samples_per_cycle=1, train_sampling_strategy="random")
    one.train()
    three = trainer_of(tmp_path / "b", make=make, samples_per_cycle=3, train_sampling_strategy="random")
    three.train()
    assert len(list_samples(three.samples_folder)) == 6
    assert same(weights(one.model), weights(three.model))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_resumed_chain_equals_the_uninterrupted_one_exactly(tmp_path, sampler):
    """Weights and samples, bit for bit, from a checkpoint in the middle of a cycle; later samples are removed first."""
    settings = {"save_strategy": "steps", "save_steps": 5, "make": tiny_resnet, "train_sampling_strategy": "random"}
    whole = trainer_of(tmp_path / "whole", sampler, **settings)
    whole.train()
    cut = trainer_of(tmp_path / "cut", sampler, **settings)
    cut.train()
    # as if it had been killed after step 11: its samples of steps 10 and later have to go, and to be made again
    samples = {s.step: s.path.read_bytes() for s in list_samples(cut.samples_folder)}
    (tmp_path / "cut" / "samples" / "chain-0" / "sample-00000011.safetensors").write_bytes(samples[10])
    resumed = trainer_of(tmp_path / "cut", sampler, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-5"))
    assert same(weights(resumed.model), weights(whole.model))
    expected = list_samples(whole.samples_folder)
    found = list_samples(resumed.samples_folder)
    assert [s.step for s in found] == [s.step for s in expected] == [4, 6, 10, 12]
    for a, b in zip(found, expected, strict=True):
        assert same(dict(a.read().parameters), dict(b.read().parameters))
        assert same(dict(a.read().buffers), dict(b.read().buffers))


def test_a_second_run_does_not_overwrite_the_samples_of_a_first(tmp_path):
    first = trainer_of(tmp_path)
    first.train()
    second = trainer_of(tmp_path)
    with pytest.raises(ValueError, match=r"chain-0 has 4 samples of an earlier run\. Pass resume_from_checkpoint .*chain=1"):
        second.train()
    assert len(list_samples(tmp_path / "samples")) == 4
    with pytest.raises(ValueError, match="samples of an earlier run"):
        first.train()  # its own neither
    assert len(list_samples(tmp_path / "samples")) == 4


def test_chains_differ_in_noise_and_in_the_order_of_the_data(tmp_path):
    orders, noises = [], []

    class Recorded(list):
        def __getitem__(self, index):
            orders[-1].append(index)
            return super().__getitem__(index)

    for chain in (0, 1):
        settings = arguments(tmp_path, chain=chain, train_sampling_strategy="random")
        model = tiny_vit()
        trainer = PriorTrainer(model=model, prior=random_prior(model), args=settings, train_dataset=Recorded(image_data()))
        orders.append([])
        trainer.train()
        noises.append(torch.rand(3))  # dropout and augmentation draw from the global generator
        assert settings.seed == 3  # the caller's own
    assert orders[0] != orders[1]
    assert not torch.equal(*noises)
    found = list_samples(tmp_path / "samples")
    assert [(s.chain, s.step) for s in found] == [(c, s) for c in (0, 1) for s in (4, 6, 10, 12)]
    assert not same(dict(found[0].read().parameters), dict(found[4].read().parameters))
    assert len(BayesianModelAverage.from_folder(tmp_path / "samples", tiny_vit())) == 8


# -------------------------------------------------------------------------------------------------------------- averages


def test_evaluate_and_predict_show_single_and_average_side_by_side_and_leave_the_weights(tmp_path):
    seen = []

    def accuracy(prediction):
        seen.append(prediction.predictions)
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    trainer = trainer_of(tmp_path, make=tiny_resnet)
    trainer.compute_metrics = accuracy
    before = trainer.evaluate()
    assert "eval_bma_loss" not in before  # no samples yet
    trainer.train()
    own = weights(trainer.model)
    rows = image_data(10, seed=4)
    images, labels = torch.stack([r["pixel_values"] for r in rows]), torch.tensor([r["labels"] for r in rows])

    def logits(state):
        model = tiny_resnet()
        model.load_state_dict(state)
        model.eval()
        with torch.no_grad():
            return model(images).logits

    members = []
    for sample in list_samples(trainer.samples_folder):
        tensors = sample.read()
        members.append(logits({**own, **tensors.parameters, **tensors.buffers}).softmax(1))
    mean = torch.stack(members).mean(0)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(float(nn.functional.cross_entropy(logits(own), labels)), rel=1e-5)
    assert metrics["eval_bma_loss"] == pytest.approx(float(-mean.gather(1, labels[:, None]).log().mean()), rel=1e-5)
    assert metrics["eval_bma_accuracy"] == pytest.approx(float((mean.argmax(1) == labels).float().mean()))
    torch.testing.assert_close(torch.from_numpy(seen[-1]).exp(), mean, rtol=1e-4, atol=1e-6)
    output = trainer.predict(rows)
    torch.testing.assert_close(torch.from_numpy(output.predictions).exp(), mean, rtol=1e-4, atol=1e-6)
    assert output.metrics["test_loss"] == metrics["eval_loss"]
    assert output.metrics["test_bma_loss"] == metrics["eval_bma_loss"]
    assert same(own, weights(trainer.model))


def test_a_new_trainer_finds_the_samples_of_an_earlier_one(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.train()
    expected = trainer.evaluate()
    again = PriorTrainer(
        model=tiny_vit(7), prior=random_prior(tiny_vit()), args=arguments(tmp_path), eval_dataset=image_data(10, seed=4)
    )
    found = again.evaluate()
    assert found["eval_bma_loss"] == expected["eval_bma_loss"]
    assert found["eval_loss"] != expected["eval_loss"]  # this one's own weights were never trained


def test_evaluations_during_training_are_of_the_single_model_alone(tmp_path):
    trainer = trainer_of(tmp_path, eval_strategy="steps", eval_steps=6)
    trainer.train()
    keys = {key for entry in trainer.state.log_history for key in entry}
    assert "eval_loss" in keys
    assert "eval_bma_loss" not in keys


def test_several_evaluation_sets_get_an_average_each(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.train()
    metrics = trainer.evaluate({"a": image_data(6, seed=4), "b": image_data(6, seed=5)})
    assert {"eval_a_loss", "eval_a_bma_loss", "eval_b_loss", "eval_b_bma_loss"} <= metrics.keys()
    assert not any("bma_bma" in key or "bma_a" in key for key in metrics)


def test_text_classification_is_averaged_too(tmp_path):
    model = tiny_bert()
    trainer = PriorTrainer(
        model=model,
        prior=random_prior(model),
        args=arguments(tmp_path),
        train_dataset=text_data(),
        eval_dataset=text_data(8, seed=2),
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert math.isfinite(metrics["eval_bma_loss"])
    assert metrics["eval_bma_loss"] != metrics["eval_loss"]


def test_samples_that_predict_the_same_are_warned_of(tmp_path):
    trainer = trainer_of(tmp_path, "sghmc", learning_rate=1e-9)
    trainer.train()
    with pytest.warns(PriorWarning, match="the 4 posterior samples predict nearly the same"):
        trainer.evaluate()


def test_chains_are_diagnosed_from_their_samples(tmp_path):
    """Two chains of eight samples of random walks around different places: R-hat sees it; the same chain twice: it does not."""
    for chain in (0, 1):
        trainer_of(tmp_path, chain=chain, max_steps=32, samples_per_cycle=4, num_cycles=2).train()
    model = tiny_vit()
    average = BayesianModelAverage.from_folder(tmp_path / "samples", model)
    batch = {"pixel_values": torch.stack([row["pixel_values"] for row in image_data(8, seed=6)])}
    found = average.diagnose([batch], progress=False)
    assert (found.num_chains, found.num_draws, found.num_functions) == (2, 8, 24)
    assert found.r_hat_max > 1.01
    values = average.function_values([batch], progress=False)
    apart = values.view(2, 8, -1)[:, :, 0]
    assert apart.std() > 0
    few = average.diagnose([batch], functions=5, progress=False)
    assert few.num_functions == 5


# -------------------------------------------------------------------------------------------------- settings and refusals


def test_temperature_and_its_measured_value_are_logged(tmp_path):
    trainer = trainer_of(tmp_path, "sgld", temperature=0.5)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["temperature"] for entry in logs] == ([0.0] * 3 + [0.5] * 3) * 2
    measured = [entry["effective_temperature"] for entry in logs if "effective_temperature" in entry]
    assert measured
    assert all(0.5 < value < 0.6 for value in measured)  # minibatches of 8 of 26 heat a little


@pytest.mark.parametrize(("sampler", "expected"), [("sghmc", ([True] * 3 + [False] * 3) * 2), ("baoa", [False] * 12)])
def test_clipping_acts_in_the_exploration_of_the_identity_metric_only(tmp_path, sampler, expected):
    """At a temperature it would change the law; in the prior's metric it would switch a stiff prior off."""
    clipped = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
            clipped.append(float(norm) <= 1.0001e-3)

    trainer_of(tmp_path, sampler, max_grad_norm=1e-3, callbacks=[Watch()]).train()
    assert clipped == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_decay": 0.1}, r"weight_decay=0.1 beside a sampler would be a second prior"),
        ({"prior_update": "implicit"}, r"prior_update='implicit' is a step for optimizers"),
        ({"warmup_steps": 3}, r"warmup_steps has no effect on a sampler"),
        ({"neftune_noise_alpha": 0.1}, r"neftune_noise_alpha changes the likelihood"),
        ({"metric_for_best_model": "eval_bma_loss"}, r"averages are evaluated after training only"),
        ({"label_smoothing_factor": 0.1}, r"label_smoothing_factor changes the likelihood"),
        ({"sampler": "hmc"}, r"sampler is 'hmc', expected one of 'baoa', 'sghmc', 'sgld', or None"),
        ({"sampler": "sgld", "sampler_metric": "full"}, r"sampler_metric='full' is for"),
        ({"sampler_metric": "fisher"}, r"sampler_metric is 'fisher', expected one of 'auto'"),
        ({"chain": -1}, r"chain is -1"),
        ({"sample_batch_norm_batches": 0}, r"sample_batch_norm_batches is 0"),
    ],
)
def test_what_falsifies_the_law_or_makes_no_sense_is_refused_with_the_reason(tmp_path, settings, message):
    model = tiny_vit()
    own = weights(model)
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, model=model, **settings)
    assert same(own, weights(model))


def test_a_sampler_needs_a_prior_and_no_other_optimizer(tmp_path):
    with pytest.raises(ValueError, match=r"sampler='baoa' samples a posterior, which needs a prior"):
        PriorTrainer(model=tiny_vit(), args=arguments(tmp_path), train_dataset=image_data())
    model = tiny_vit()
    with pytest.raises(ValueError, match="a sampler is an optimizer with a schedule of its own"):
        PriorTrainer(
            model=model, prior=random_prior(model), args=arguments(tmp_path), train_dataset=image_data(),
            optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None),
        )  # fmt: skip


def test_too_few_steps_for_the_samples_are_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match=r"6 steps in 2 cycles .* too few for 2 samples"):
        trainer_of(tmp_path, max_steps=6).train()


def test_a_new_head_without_a_variance_gets_1(tmp_path):
    trainer = trainer_of(tmp_path, prior_head_variance=None)
    assert trainer.prior_penalty.head_variance == 1.0


def test_a_stiff_prior_warns_in_the_identity_metric_and_not_in_its_own(tmp_path):
    model = tiny_vit()
    stiff = random_prior(model, variance=1e-7, shift=0.0)
    trainer = trainer_of(tmp_path / "a", "sghmc", model=model, prior=stiff)
    with (
        pytest.warns(PriorWarning, match="too stiff for this learning rate"),
        pytest.raises(PriorNumericsError, match="diverged"),
    ):
        trainer.train()
    for sampler in SAMPLERS:
        trainer_of(tmp_path / sampler, sampler, prior=stiff, sampler_metric="diagonal", learning_rate=0.3).train()


def test_frozen_parameters_are_conditioned_on_in_the_full_metric(tmp_path):
    """The flow of the other parameters is that of the prior given the frozen ones: dense conditional mean and covariance."""
    model = tiny_vit()
    prior = random_prior(model, rank=3, variance=0.01)
    frozen = [n for n, _ in model.named_parameters() if "embeddings" in n]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    penalty = PriorPenalty(prior, model, num_examples=10)
    (bound,) = penalty.bound_gaussians("full")
    rest = list(bound.parameters)
    assert not set(rest) & set(frozen)
    order = [n for n in prior.mean if n in frozen], [n for n in prior.mean if n not in frozen]
    values = dict(model.named_parameters())
    sigma = dense_covariance(prior, [*order[0], *order[1]])
    count = sum(prior.mean[n].numel() for n in order[0])
    delta = torch.cat([(values[n].detach() - prior.mean[n]).double().flatten() for n in order[0]])
    gain = torch.linalg.solve(sigma[:count, :count], sigma[:count, count:]).T
    mean = torch.cat([prior.mean[n].double().flatten() for n in order[1]]) + gain @ delta
    found = torch.cat([bound.gaussian.mean[n].double().flatten() for n in order[1]])
    torch.testing.assert_close(found, mean, rtol=0, atol=1e-6)
    vector = torch.randn(len(mean), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parts = vector.float().split([prior.mean[n].numel() for n in order[1]])
    product = bound.gaussian.covariance_product({n: v.view(prior.mean[n].shape) for n, v in zip(order[1], parts, strict=True)})
    expected = (sigma[count:, count:] - gain @ sigma[:count, count:]) @ vector
    torch.testing.assert_close(torch.cat([product[n].double().flatten() for n in order[1]]), expected, rtol=0, atol=1e-5)


def test_isotropic_priors_have_one_metric(tmp_path):
    """Without deviations the diagonal is the whole prior: both metrics are one chain."""
    runs = []
    for metric in ("diagonal", "full"):
        model = tiny_vit()
        trainer = trainer_of(
            tmp_path / metric, model=model, prior=isotropic_prior(tiny_vit(5), variance=0.01), sampler_metric=metric
        )
        trainer.train()
        runs.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*runs, rtol=0, atol=1e-5)
    assert isinstance(trainer.args, PriorTrainingArguments)


# ------------------------------------------------------------------------------------------- what a reviewer broke, mended


@pytest.mark.slow
def test_a_stiff_prior_holds_in_every_exploration_with_trainers_default_clipping(tmp_path):
    """Clipping would leave the second exploration at the prior penalty of the samples, P T / 2."""
    seen = {}

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen[state.global_step] = float(trainer.prior_penalty.penalty())

    stiff = random_prior(tiny_vit(), variance=1e-6, shift=0.0)
    settings = {"max_grad_norm": 1.0, "max_steps": 400, "logging_strategy": "no", "learning_rate": 1.0}
    trainer = trainer_of(tmp_path, prior=stiff, callbacks=[Watch()], **settings)
    trainer.train()
    count = stiff.num_parameters
    assert seen[200] > 0.2 * count  # a sample of the first cycle
    assert seen[300] < 0.05 * count  # the end of the second exploration


def test_batch_norm_statistics_come_from_random_batches_and_the_same_each_time(tmp_path):
    trainer = trainer_of(tmp_path, make=tiny_resnet, sample_batch_norm_batches=2)
    drawn = [torch.cat([batch["pixel_values"] for batch in trainer._batch_norm_batches()]) for _ in range(2)]
    assert torch.equal(*drawn)
    assert len(drawn[0]) == 16
    first = torch.stack([row["pixel_values"] for row in image_data()[:16]])
    assert not torch.equal(drawn[0].sort(0).values, first.sort(0).values)


def test_a_stream_is_not_eaten_for_batch_norm_statistics(tmp_path):
    """The samples then have the statistics of training's own moving average."""
    rows = iter([row for i in range(4) for row in image_data(seed=i)])

    class Once(torch.utils.data.IterableDataset):
        def __iter__(self):
            return rows

    seen = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen[state.global_step] = {n: b.clone() for n, b in model.named_buffers()}

    model = tiny_resnet()
    settings = arguments(tmp_path, prior_num_examples=104)
    PriorTrainer(model=model, prior=random_prior(model), args=settings, train_dataset=Once(), callbacks=[Keep()]).train()
    found = list_samples(tmp_path / "samples")
    assert [s.step for s in found] == [4, 6, 10, 12]
    assert all(torch.equal(value, seen[s.step][name]) for s in found for name, value in s.read().buffers.items())


def test_batch_norm_that_its_user_keeps_in_eval_mode_keeps_its_statistics(tmp_path):
    model = tiny_resnet()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    frozen = norms[0]
    frozen.eval()
    frozen.train = lambda mode=True: frozen
    before = frozen.running_mean.clone()
    name = next(n for n, m in model.named_modules() if m is frozen)
    trainer = trainer_of(tmp_path, model=model, prior_initialize=False)
    trainer.train()
    for sample in list_samples(trainer.samples_folder):
        buffers = sample.read().buffers
        assert torch.equal(buffers[f"{name}.running_mean"], before)
        assert sum(key.endswith("running_mean") for key in buffers) == len(norms)


def test_samples_follow_the_schedules_clock_where_a_scaler_skips_steps(tmp_path, monkeypatch):
    """Three steps overflow: the schedule is three steps behind Trainer, and so are the samples, all at temperature 1."""
    temperatures = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            temperatures.append(float(trainer._sampler().param_groups[0]["temperature"]))

    trainer = trainer_of(tmp_path, callbacks=[Watch()])
    skipped = iter([True] * 3 + [False] * 100)
    monkeypatch.setattr(type(trainer.accelerator), "optimizer_step_was_skipped", property(lambda self: next(skipped)))
    trainer.train()
    assert temperatures == [0.0] * 6 + [1.0] * 3 + [0.0] * 3
    found = list_samples(trainer.samples_folder)
    assert [s.step for s in found] == [4, 6]
    logs = [entry["temperature"] for entry in trainer.state.log_history if "temperature" in entry]
    assert logs[6:9] == [1.0] * 3


def test_a_checkpoint_without_the_chains_state_is_refused(tmp_path):
    trainer_of(tmp_path, save_strategy="steps", save_steps=5, save_only_model=True).train()
    with pytest.raises(ValueError, match=r"from a checkpoint without optimizer and scheduler \(save_only_model\)"):
        trainer_of(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


@pytest.mark.parametrize("changed", [{"temperature": 0.5}, {"friction": 0.3}, {"learning_rate": 0.1}])
def test_a_chain_is_not_resumed_with_other_settings(tmp_path, changed):
    trainer_of(tmp_path, save_strategy="steps", save_steps=5).train()
    with pytest.raises(ValueError, match=f"the checkpoint's chain has {next(iter(changed))} .* resume with the same"):
        trainer_of(tmp_path, **changed).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


def test_a_second_training_takes_the_settings_as_they_are_then(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.train()
    shutil.rmtree(trainer.samples_folder)
    trainer.args.temperature, trainer.args.friction, trainer.args.prior_num_examples = 0.25, 0.5, 1000
    trainer.train()
    sampler = trainer._sampler()
    assert (sampler.num_data, sampler.param_groups[0]["friction"]) == (1000, 0.5)
    metadata = list_samples(trainer.samples_folder)[-1].metadata()
    assert (metadata["temperature"], metadata["num_data"], metadata["sampler"]) == ("0.25", "1000", "baoa")


def test_evaluations_within_averaging_are_all_of_the_average(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.train()
    expected = trainer.evaluate()
    with trainer.averaging():
        losses = [trainer.evaluate()["eval_loss"] for _ in range(2)]
    assert losses == [expected["eval_bma_loss"]] * 2
    assert trainer.evaluate()["eval_loss"] == expected["eval_loss"]


def test_without_class_probabilities_there_is_a_warning_and_the_single_model(tmp_path):
    """A language model's labels are shifted; several classes at once are no distribution over classes."""
    model = tiny_llama()
    rows = text_data(token_labels=True)
    trainer = PriorTrainer(
        model=model, prior=random_prior(model), args=arguments(tmp_path / "a", prior_num_examples=100), train_dataset=rows
    )
    trainer.train()
    with pytest.warns(PriorWarning, match="no average over the samples here.*shifts its labels"):
        assert "eval_bma_loss" not in trainer.evaluate(rows[:4])
    model = tiny_vit()
    model.config.problem_type = "multi_label_classification"
    several = [{**row, "labels": torch.tensor([1.0, 0.0, 1.0])} for row in image_data()]
    trainer = PriorTrainer(model=model, prior=random_prior(model), args=arguments(tmp_path / "b"), train_dataset=several)
    trainer.train()
    with pytest.warns(PriorWarning, match="labels are not one class each"):
        metrics = trainer.evaluate(several[:4])
    assert math.isfinite(metrics["eval_loss"])
    with pytest.warns(PriorWarning, match="labels are not one class each"):
        assert trainer.predict(several[:4]).predictions.shape == (4, 3)


def test_evaluation_in_bfloat16_knows_the_frozen_weights(tmp_path):
    model = tiny_vit()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("embeddings" not in name)
    trainer = trainer_of(tmp_path, model=model, bf16_full_eval=True)
    trainer.train()
    assert math.isfinite(trainer.evaluate()["eval_bma_loss"])


def test_dropout_and_a_learning_rate_that_is_too_small_are_warned_of(tmp_path):
    model = tiny_vit(hidden_dropout_prob=0.1)
    trainer = trainer_of(tmp_path / "a", model=model)
    with pytest.warns(PriorWarning, match=r"dropout \(up to 0.1\)"):
        trainer.train()
    with pytest.warns(PriorWarning, match="learning_rate is transformers' default, 5e-5"):
        trainer_of(tmp_path / "b", learning_rate=5e-5)


def test_samples_of_different_posteriors_are_warned_of(tmp_path):
    trainer_of(tmp_path).train()
    trainer_of(tmp_path, chain=1, temperature=0.5).train()
    with pytest.warns(PriorWarning, match=r"of different posteriors: \{'temperature': \['0.5', '1.0'\]\}"):
        BayesianModelAverage.from_folder(tmp_path / "samples", tiny_vit())


def test_a_class_of_arguments_with_a_temperature_of_its_own_keeps_it(tmp_path):
    @dataclasses.dataclass
    class Other(TrainingArguments):
        temperature: float = 0.9
        sampler: str = "ddim"

    @dataclasses.dataclass
    class Both(PriorArgumentsMixin, Other):
        pass

    args = quiet_arguments(tmp_path, Both)
    assert args.temperature == 0.9
    model = tiny_vit()
    assert PriorTrainer(model=model, prior=random_prior(model), args=args, train_dataset=image_data()).sampling is None


def test_many_samples_are_read_one_by_one(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path)
    trainer.train()
    expected = trainer.evaluate()["eval_bma_loss"]
    monkeypatch.setattr("prior_hub.finetuning.trainer._KEPT_BYTES", 0)
    assert trainer.evaluate()["eval_bma_loss"] == expected
    with trainer.averaging() as average:
        assert all(hasattr(member, "path") for member in average.members)
