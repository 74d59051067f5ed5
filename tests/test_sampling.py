"""PriorTrainer(sampler=...): the law of its chain, samples on disk, exact resumption, and averages beside the single model."""

from __future__ import annotations

import gc
import math

import pytest
import torch
from models import dense_covariance, image_data, quiet_arguments, random_prior, text_data, tiny_bert, tiny_resnet, tiny_vit
from torch import nn
from transformers import TrainerCallback

from prior_hub import (
    BAOA,
    SGHMC,
    SGLD,
    BayesianModelAverage,
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
        ("baoa", "full", 5.0, 1.0),
        ("baoa", "diagonal", 5.0, 0.25),
        ("sghmc", "diagonal", 2.0, 1.0),
        ("sgld", "diagonal", 2.0, 0.25),
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

    trainer = trainer_of(tmp_path, make=tiny_resnet)
    trainer.train()
    own = weights(trainer.model)
    loader = torch.utils.data.DataLoader(image_data(), batch_size=4, collate_fn=trainer.data_collator)
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
    first.train()  # its own may be made again
    assert len(list_samples(tmp_path / "samples")) == 4


def test_chains_differ_in_noise_and_in_the_order_of_the_data(tmp_path):
    orders = []

    class Order(TrainerCallback):
        def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
            orders.append(args.data_seed)

    for chain in (0, 1):
        trainer_of(tmp_path, chain=chain, callbacks=[Order()], train_sampling_strategy="random").train()
    assert orders == [None, 4]
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


def test_clipping_acts_in_exploration_only(tmp_path):
    clipped = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
            clipped.append(float(norm) <= 1.0001e-3)

    trainer_of(tmp_path, max_grad_norm=1e-3, callbacks=[Watch()]).train()
    assert clipped == ([True] * 3 + [False] * 3) * 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_decay": 0.1}, r"weight_decay=0.1 beside a sampler would be a second prior"),
        ({"prior_update": "implicit"}, r"prior_update='implicit' is a step for optimizers"),
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
