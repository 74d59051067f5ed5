"""prior_scale="auto" and select_scale: what is chosen, and that nothing but the choice is left of the search."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
from pathlib import Path

import pytest
import torch
from models import Stream, image_data, quiet_arguments, random_prior, tiny_resnet, tiny_vit
from torch import nn
from transformers import HfArgumentParser, TrainerCallback

from prior_hub import (
    PriorFormatError,
    PriorModel,
    PriorNumericsError,
    PriorTrainer,
    PriorTrainingArguments,
    PriorWarning,
    ScaleChoice,
    ScaleTrial,
    find_scale,
    scale_ladder,
    select_scale,
)
from prior_hub.finetuning.scale import _decades_below, best, read_choice, write_choice

torch.set_num_threads(1)
SGD = (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9})


class Rows(torch.utils.data.Dataset):
    """Rows of a matrix with labels."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        return {"x": self.x[i], "labels": self.y[i]}


class Logistic(nn.Module):
    """Logistic regression with one output per class; remembers the rows it was trained on and those it was evaluated on."""

    def __init__(self, inputs, classes=2):
        super().__init__()
        self.body = nn.Linear(inputs, classes, bias=False)
        self.seen = {True: set(), False: set()}

    def forward(self, x, labels=None):
        self.seen[self.training].update(x[:, 0].tolist())  # which tell the rows
        logits = self.body(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def problem(distance, inputs=40, rows=80, seed=0):
    """(prior, training rows, test rows): weights drawn `distance` standard deviations of the prior at scale 1 from its mean."""
    g = torch.Generator().manual_seed(seed)
    mean = torch.randn(2, inputs, generator=g) / inputs**0.5
    variance = 0.01 * torch.exp(torch.randn(2, inputs, generator=g))
    truth = mean + distance * variance.sqrt() * torch.randn(2, inputs, generator=g)
    prior = PriorModel.from_tensors({"body.weight": mean}, {"body.weight": variance})

    def draw(n):
        x = torch.randn(n, inputs, generator=g)
        chance = (x @ truth.T).softmax(1)
        return Rows(x, torch.multinomial(chance, 1, generator=g)[:, 0])

    return prior, draw(rows), draw(4000)


def trainer_of(folder, prior, rows, model=None, callbacks=(), optimizer=SGD, **settings):
    model = Logistic(rows.x.shape[1]) if model is None else model
    chosen = {"max_steps": 150, "per_device_train_batch_size": 16, "learning_rate": 0.1, "prior_scale": "auto"}
    chosen |= {"logging_strategy": "no", "per_device_eval_batch_size": 64}
    args = quiet_arguments(folder, PriorTrainingArguments, **(chosen | settings))
    return PriorTrainer(
        model=model, args=args, train_dataset=rows, prior=prior, optimizer_cls_and_kwargs=optimizer, callbacks=[*callbacks]
    )


def map_nll(prior, scale, rows, test):
    """Test NLL at the exact MAP, by L-BFGS in float64."""
    mean, variance = prior.mean["body.weight"].double(), scale * prior.variance["body.weight"].double()
    w = mean.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([w], max_iter=200, line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        nll = nn.functional.cross_entropy(rows.x.double() @ w.T, rows.y, reduction="sum")
        loss = nll + 0.5 * ((w - mean).square() / variance).sum()
        loss.backward()
        return loss

    optimizer.step(objective)
    return nn.functional.cross_entropy(test.x.double() @ w.detach().T, test.y).item()


@pytest.mark.slow
@pytest.mark.parametrize("distance", [0.1, 3.0, 30.0])
def test_auto_finds_a_scale_whose_exact_solution_is_nearly_the_best_on_new_data(tmp_path, distance):
    regrets, worst, scales = [], [], []
    for seed in range(4):
        prior, rows, test = problem(distance, seed=seed)
        trainer = trainer_of(tmp_path, prior, rows, seed=seed)
        trainer.train()
        choice = trainer.prior_scale_choice
        oracle = [map_nll(prior, scale, rows, test) for scale in scale_ladder(prior.gaussian)]
        regrets.append(map_nll(prior, choice.scale, rows, test) - min(oracle))
        worst.append(max(oracle) - min(oracle))
        scales.append(math.log10(choice.scale))
        assert trainer.prior_penalty.gaussian.scale == choice.scale
    assert sum(regrets) / 4 < 0.25 * sum(worst) / 4
    middle = sum(scales) / 4
    assert abs(middle - 2 * math.log10(distance)) < 1.5  # the truth is a draw from the prior at scale distance^2


@pytest.mark.slow
def test_where_a_long_training_overfits_the_checks_find_the_narrower_prior_that_the_path_misses(tmp_path):
    """A low learning rate: what the wide priors overfit in 1,000 steps, they do not yet in the 76 of a rung."""
    regrets = {"path": 0.0, "checked": 0.0}
    for seed in (1, 4):
        prior, rows, test = problem(1.0, rows=60, seed=seed)
        slowly = (torch.optim.SGD, {"lr": 0.001, "momentum": 0.9})
        choice = find_scale(trainer_of(tmp_path, prior, rows, optimizer=slowly, max_steps=1000, seed=seed))
        oracle = min(map_nll(prior, scale, rows, test) for scale in scale_ladder(prior.gaussian))
        regrets["path"] += map_nll(prior, choice.checks[0].scale, rows, test) - oracle
        regrets["checked"] += map_nll(prior, choice.scale, rows, test) - oracle
    assert regrets["checked"] < 0.2 < 1.0 < regrets["path"]  # nats, of the exact solutions on 4,000 new rows


def test_a_check_is_a_whole_training_on_the_four_fifths_and_there_are_at_most_so_many(tmp_path):
    prior, rows, _ = problem(3.0)
    trainer = trainer_of(tmp_path, prior, rows, max_steps=104)
    choice = find_scale(trainer)
    order = torch.randperm(80, generator=torch.Generator().manual_seed(trainer.args.seed))
    held, rest = order[:16].sort().values, order[16:].sort().values
    for check in choice.checks:
        alone = trainer_of(tmp_path / "alone", prior, Rows(rows.x[rest], rows.y[rest]), prior_scale=check.scale, max_steps=104)
        alone.train()
        with torch.no_grad():
            nll = alone.model(rows.x[held], rows.y[held])["loss"].item()
        assert check.nll == pytest.approx(nll, rel=1e-5)
    assert 1 <= len(choice.checks) <= 4
    assert choice.steps == 13 * 8 + 104 * len(choice.checks)
    trainer.args.prior_scale_checks = 0
    path = find_scale(trainer)
    assert path.checks == ()
    assert path.trials == choice.trials
    assert path.scale == choice.checks[0].scale == best(path.trials).scale
    trainer.args.prior_scale_checks = "2"  # text, as a search or a command line may set it
    assert find_scale(trainer).checks == choice.checks[:2]
    for wrong in (-1, 1, 2.5, "two", None, True):
        with pytest.raises(ValueError, match="prior_scale_checks is"):
            quiet_arguments(tmp_path, PriorTrainingArguments, prior_scale_checks=wrong)


def test_a_training_shorter_than_the_path_is_not_checked_nor_is_the_narrowest_prior(tmp_path, monkeypatch):
    prior, rows, _ = problem(30.0)
    assert find_scale(trainer_of(tmp_path, prior, rows, max_steps=20)).checks == ()  # 104 steps of path, and wide is best
    worse_and_worse = itertools.count()
    monkeypatch.setattr("prior_hub.finetuning.scale.held_out_nll", lambda *args: next(worse_and_worse))
    narrowest = find_scale(trainer_of(tmp_path, prior, rows, max_steps=104))
    assert narrowest.scale == narrowest.trials[0].scale
    assert narrowest.checks == ()


@pytest.mark.parametrize(
    ("whole", "checked", "taken", "said"),
    [
        ({4: 1.9}, [4], 4, "lowest NLL 1.9000"),  # no worse than the path, which had 2.0
        ({4: 2.1, 3: 2.2}, [4, 3], 4, "lowest NLL 2.1000"),  # worse, and so is the narrower one
        (
            {4: 2.5, 3: 2.3, 2: 2.2, 1: 2.25},
            [4, 3, 2, 1],
            2,
            "The path chose 1e+04, where a whole training ends worse (NLL 2.5",
        ),
        ({4: 2.5, 3: 2.3, 2: 2.2, 1: 2.1}, [4, 3, 2, 1], 1, "prior_scale_checks trainings are used up"),
        ({4: math.inf, 3: math.inf, 2: 2.2, 1: 2.3}, [4, 3, 2, 1], 2, "where a whole training diverges"),
        ({4: math.inf, 3: 2.2, 2: math.inf}, [4, 3, 2], 3, "where a whole training diverges"),
        (
            {4: 1e12, 3: 4e11, 2: 4e11},
            [4, 3, 2],
            3,
            "worse than the narrowest prior begins (NLL 3.0000): lower the learning rate",
        ),
    ],
)
def test_from_the_paths_choice_it_goes_down_by_decades_while_whole_trainings_improve(
    tmp_path, monkeypatch, whole, checked, taken, said
):
    prior, rows, _ = problem(3.0)
    rungs = tuple(10 ** (k / 2) for k in range(11))  # 1 to 1e5; the path's lowest is at 1e4
    monkeypatch.setattr("prior_hub.finetuning.scale.scale_ladder", lambda gaussian: [*rungs])
    along = iter([3.0 - 0.125 * k for k in range(9)] + [2.2, 2.5])
    monkeypatch.setattr("prior_hub.finetuning.scale.held_out_nll", lambda *args: next(along))
    whole = {10.0**k: nll for k, nll in whole.items()}
    monkeypatch.setattr(
        "prior_hub.finetuning.scale._whole_training",
        lambda trainer, scale, *rest: (next(v for k, v in whole.items() if k == pytest.approx(scale)), 7, 64),
    )
    choice = find_scale(trainer_of(tmp_path, prior, rows, max_steps=88))
    assert [t.scale for t in choice.checks] == pytest.approx([10.0**k for k in checked])
    assert choice.scale == pytest.approx(10.0**taken)
    assert choice.steps == 11 * 8 + 7 * len(checked)
    assert said in choice.report()


def test_a_training_that_diverges_at_every_scale_is_said(tmp_path, monkeypatch):
    prior, rows, _ = problem(3.0)
    monkeypatch.setattr("prior_hub.finetuning.scale._whole_training", lambda *args: (math.inf, 7, 64))
    with pytest.raises(PriorNumericsError, match="a whole training has no finite loss at the scales"):
        find_scale(trainer_of(tmp_path, prior, rows, max_steps=104))


def test_whole_decades_below_a_rung_and_the_lowest_are_what_may_be_checked():
    rungs = [1.0, 3.0, 10.0, 30.0, 100.0]
    assert _decades_below(100.0, rungs) == [100.0, 10.0, 1.0]
    assert _decades_below(30.0, rungs) == [30.0, 3.0, 1.0]
    assert _decades_below(3.0, rungs) == [3.0, 1.0]
    assert _decades_below(1.0, rungs) == [1.0]


@pytest.mark.parametrize("setting", [{"bf16": True}, {"torch_compile": True, "torch_compile_backend": "eager"}])
def test_path_checks_and_training_are_all_in_the_precision_and_the_form_that_were_asked_for(tmp_path, setting):
    prior, rows, _ = problem(3.0)
    seen = []

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(40, 2, bias=False)

        def forward(self, x, labels=None):
            logits = self.body(x)
            return {"loss": nn.functional.cross_entropy(logits.float(), labels), "logits": logits}

    class Watched(PriorTrainer):
        def training_step(self, model, *args, **kwargs):
            seen.append(type(model).__name__)
            return super().training_step(model, *args, **kwargs)

    def trained(scale):
        seen.clear()
        args = {"max_steps": 104, "learning_rate": 0.1, "logging_strategy": "no", "prior_scale": scale, **setting}
        args = quiet_arguments(tmp_path, PriorTrainingArguments, **args)
        model = Plain()
        if "bf16" in setting:
            model.body.register_forward_hook(lambda module, given, result: seen.append(str(result.dtype)))
        trainer = Watched(model=model, args=args, train_dataset=rows, prior=prior, optimizer_cls_and_kwargs=SGD)
        trainer.train()
        return trainer, set(seen)

    found, forms = trained("auto")
    assert found.prior_scale_choice.checks
    assert forms == ({"Plain", "torch.bfloat16"} if "bf16" in setting else {"OptimizedModule"})
    alone, same = trained(found.prior_scale_choice.scale)
    assert same == forms
    assert torch.equal(found.model.body.weight, alone.model.body.weight)


@pytest.mark.parametrize(("steps", "head"), [(12, "auto"), pytest.param(104, 0.1, marks=pytest.mark.slow)])
def test_after_the_search_training_is_to_the_bit_what_it_is_with_the_number(tmp_path, steps, head):
    data, model = image_data(40), tiny_resnet()  # BatchNorm: its statistics must be put back too
    prior = random_prior(model)
    settings = {"per_device_train_batch_size": 8, "max_steps": steps, "learning_rate": 0.02, "logging_strategy": "steps"}
    settings |= {"logging_steps": 4, "seed": 3}

    def run(**more):
        events = []

        class Heard(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                events.append(("step", state.global_step))

            def on_log(self, args, state, control, logs=None, **kwargs):
                events.append(("log", state.global_step, logs.get("loss")))

        torch.manual_seed(5)
        fresh = tiny_resnet()
        args = quiet_arguments(tmp_path / "out", PriorTrainingArguments, **settings, **more)
        trainer = PriorTrainer(
            model=fresh, args=args, train_dataset=data, prior=prior, callbacks=[Heard()], optimizer_cls_and_kwargs=SGD
        )
        trainer.train()
        return trainer, fresh.state_dict(), events, torch.rand(3)

    found, weights, events, number = run(prior_scale="auto", prior_head_variance=head)
    choice = found.prior_scale_choice
    assert bool(choice.checks) == (steps == 104)  # a training as short as 12 steps is not checked
    _, same, told, drawn = run(prior_scale=choice.scale, prior_head_variance=choice.head_variance)
    assert all(torch.equal(weights[k], same[k]) for k in same)
    assert events == told
    assert torch.equal(number, drawn)
    _, other, _, _ = run(prior_scale=choice.scale * 100 if choice.scale < 10 else choice.scale / 1000)
    assert not all(torch.equal(weights[k], other[k]) for k in same)  # so the scale does matter here


def test_held_out_examples_are_measured_and_never_trained_on_while_searching(tmp_path):
    prior, rows, _ = problem(3.0)
    trainer = trainer_of(tmp_path, prior, rows)
    while_searching = {}

    class Watch(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):  # of the training itself: nobody else hears of the search
            while_searching.update({mode: set(found) for mode, found in trainer.model.seen.items()})

    trainer.add_callback(Watch())
    trainer.train()
    choice, everything = trainer.prior_scale_choice, set(rows.x[:, 0].tolist())
    assert len(while_searching[False]) == choice.held_out == 16
    assert choice.num_examples == 64
    assert while_searching[True] == everything - while_searching[False]
    assert trainer.prior_penalty.num_examples == 80
    assert trainer.model.seen[True] == everything  # then all


@pytest.mark.slow
def test_prior_num_examples_shrinks_with_the_training_set_while_searching(tmp_path):
    prior, rows, _ = problem(3.0)
    trainer = trainer_of(tmp_path, prior, rows, prior_num_examples=1000)
    trainer.train()
    assert trainer.prior_scale_choice.num_examples == 800
    assert trainer.prior_penalty.num_examples == 1000


@pytest.mark.slow
def test_a_resumed_run_keeps_the_scale_and_ends_where_the_uninterrupted_one_does(tmp_path):
    prior, rows, _ = problem(3.0)
    settings = {"save_strategy": "steps", "save_steps": 60, "max_steps": 120, "seed": 1}
    whole = trainer_of(tmp_path / "out", prior, rows, **settings)
    whole.train()
    assert read_choice(tmp_path / "out") == whole.prior_scale_choice
    again = trainer_of(tmp_path / "out", prior, rows, **settings)
    checkpoint = tmp_path / "out" / "checkpoint-60"
    again.train(resume_from_checkpoint=str(checkpoint))
    assert again.prior_scale_choice == whole.prior_scale_choice
    assert torch.equal(again.model.body.weight, whole.model.body.weight)
    (checkpoint / "prior_scale.json").unlink()
    with pytest.raises(ValueError, match="does not say which scale"):
        trainer_of(tmp_path / "out", prior, rows, **settings).train(resume_from_checkpoint=str(checkpoint))


def test_head_variance_auto_is_chosen_and_used(tmp_path):
    data = image_data(60)
    prior = random_prior(tiny_vit())
    settings = {"per_device_train_batch_size": 8, "max_steps": 20, "learning_rate": 0.02, "prior_scale": 2.0}
    args = quiet_arguments(tmp_path, PriorTrainingArguments, prior_head_variance="auto", **settings)
    trainer = PriorTrainer(model=tiny_vit(), args=args, train_dataset=data, prior=prior, optimizer_cls_and_kwargs=SGD)
    before = {p for group in trainer.create_optimizer().param_groups if group["weight_decay"] for p in group["params"]}
    assert not before
    trainer.train()
    choice = trainer.prior_scale_choice
    assert choice.scale == 2.0
    tried = [t.head_variance for t in choice.trials]
    assert tried[:8] == pytest.approx([10 ** (k / 2) for k in range(-5, 3)])
    assert choice.head_variance in tried
    assert trainer.prior_penalty.head_variance == choice.head_variance


def test_find_scale_is_what_auto_chooses_and_leaves_the_trainer_as_it_was(tmp_path):
    data, prior = image_data(40), random_prior(tiny_vit())
    chosen = {"per_device_train_batch_size": 8, "max_steps": 4, "learning_rate": 0.02, "prior_head_variance": "auto"}

    def made(**more):
        args = quiet_arguments(tmp_path, PriorTrainingArguments, **chosen, **more)
        return PriorTrainer(model=tiny_vit(), args=args, train_dataset=data, prior=prior, optimizer_cls_and_kwargs=SGD)

    asked, automatic = made(), made(prior_scale="auto")
    before = {k: v.clone() for k, v in asked.model.state_dict().items()}
    choice = find_scale(asked)
    assert all(torch.equal(before[k], v) for k, v in asked.model.state_dict().items())
    assert asked.prior_scale_choice is None
    automatic.train()
    assert choice == automatic.prior_scale_choice
    assert len(choice.trials) == 8 + 13  # head variances, then scales


@pytest.mark.slow
@pytest.mark.parametrize(("schedule", "falls"), [("linear", True), ("cosine", True), ("constant", False)])
def test_the_learning_rate_falls_on_every_rung_where_the_trainings_does(tmp_path, schedule, falls):
    prior, rows, _ = problem(3.0)
    rates = []

    class Spy(PriorTrainer):
        def training_step(self, *args, **kwargs):
            if self._searching:
                rates.append(self.optimizer.param_groups[0]["lr"])
            return super().training_step(*args, **kwargs)

    args = quiet_arguments(
        tmp_path, PriorTrainingArguments, max_steps=130, learning_rate=0.1, prior_scale="auto", lr_scheduler_type=schedule
    )
    Spy(model=Logistic(40), args=args, train_dataset=rows, prior=prior, optimizer_cls_and_kwargs=SGD).train()
    assert len(rates) == 130
    for rung in range(1, 13):
        own = rates[10 * rung : 10 * rung + 10]
        assert own[0] == pytest.approx(0.1)
        assert own[-1] < 0.01 if falls else own[-1] == pytest.approx(0.1)


def test_the_choice_is_by_the_nll_smoothed_over_neighbours():
    nll = [2.0, 1.0, 2.0, 1.2, 1.1, 1.2, 2.0]  # a lucky rung, and a broad minimum
    trials = [ScaleTrial(10.0**k, None, value) for k, value in enumerate(nll)]
    assert best(trials).scale == 1e4
    assert best([*trials[:4], ScaleTrial(1e4, None, math.inf)]).scale == 1e3  # by hand: 1.75, 1.5, 1.55, 1.4


@pytest.mark.slow
def test_select_scale_measures_what_separate_trainings_on_four_fifths_measure(tmp_path):
    prior, rows, _ = problem(3.0)
    trainer = trainer_of(tmp_path, prior, rows, prior_scale=1.0, max_steps=40)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    state = torch.get_rng_state()
    choice = select_scale(trainer, [0.1, 10.0, 1000.0])
    assert all(torch.equal(before[k], v) for k, v in trainer.model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert trainer.args.prior_scale == 1.0
    assert trainer.prior_penalty.gaussian.scale == 1.0
    assert trainer.prior_penalty.num_examples == 80
    order = torch.randperm(80, generator=torch.Generator().manual_seed(trainer.args.seed))
    held, rest = order[:16].sort().values, order[16:].sort().values
    for trial in choice.trials:
        part = Rows(rows.x[rest], rows.y[rest])
        alone = trainer_of(tmp_path / "alone", prior, part, prior_scale=trial.scale, max_steps=40)
        alone.train()
        with torch.no_grad():
            nll = alone.model(rows.x[held], rows.y[held])["loss"].item()
        assert trial.nll == pytest.approx(nll, rel=1e-5)
    assert choice.scale == min(choice.trials, key=lambda t: t.nll).scale
    assert choice.method == "grid"


def test_with_model_init_the_trainers_own_model_is_left_alone(tmp_path):
    prior, rows, _ = problem(3.0)
    args = quiet_arguments(tmp_path, PriorTrainingArguments, max_steps=10, learning_rate=0.1)
    trainer = PriorTrainer(
        model_init=lambda: Logistic(40), args=args, train_dataset=rows, prior=prior, optimizer_cls_and_kwargs=SGD
    )
    model, before = trainer.model, trainer.model.body.weight.detach().clone()
    select_scale(trainer, [1.0, 100.0])
    assert trainer.model is trainer.model_wrapped is model
    assert torch.equal(model.body.weight, before)
    assert trainer.prior_penalty.covered_parameters()["body.weight"] is model.body.weight


def test_a_loader_of_other_examples_than_the_held_out_ones_is_noticed(tmp_path):
    prior, rows, test = problem(3.0)

    class Stubborn(PriorTrainer):
        def get_eval_dataloader(self, eval_dataset=None):
            return super().get_eval_dataloader(test)

    args = quiet_arguments(tmp_path, PriorTrainingArguments, max_steps=5, learning_rate=0.1, prior_scale="auto")
    trainer = Stubborn(model=Logistic(40), args=args, train_dataset=rows, prior=prior, optimizer_cls_and_kwargs=SGD)
    with pytest.raises(ValueError, match="4000 examples were measured in place of the 16"):
        trainer.train()


def test_a_search_that_fails_leaves_the_trainer_as_it_was(tmp_path):
    prior, rows, _ = problem(3.0)
    rows.x[7] = math.nan
    callbacks = [TrainerCallback()]
    trainer = trainer_of(tmp_path, prior, rows, callbacks=callbacks)
    before = trainer.model.body.weight.detach().clone()
    heard = list(trainer.callback_handler.callbacks)
    with pytest.raises(PriorNumericsError, match="not finite"):
        trainer.train()
    assert torch.equal(trainer.model.body.weight, before)
    assert trainer.callback_handler.callbacks == heard
    assert trainer.train_dataset is rows
    assert trainer.args.prior_scale == "auto"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rows": "stream"}, "no length"),
        ({"rows": "few"}, "too few"),
        ({"prior": "zero"}, "mean is zero"),
        ({"settings": {"sampler": "baoa"}}, "without a sampler"),
        ({"settings": {"prior_scale": "wide"}}, "expected a number"),
        ({"settings": {"prior_scale": -1.0}}, "finite number > 0"),
        ({"settings": {"prior_head_variance": "much"}}, "prior_head_variance is 'much'"),
    ],
)
def test_what_has_no_answer_is_refused_with_the_way_out(tmp_path, change, said):
    prior, rows, _ = problem(3.0)
    settings = change.get("settings", {})
    if change.get("rows") == "stream":
        data = Stream([rows[i] for i in range(80)])
        settings = {"prior_num_examples": 80}
    else:
        data = Rows(rows.x[:20], rows.y[:20]) if change.get("rows") == "few" else rows
    if change.get("prior") == "zero":
        prior = PriorModel.from_tensors({"body.weight": torch.zeros(2, 40)}, {"body.weight": torch.ones(2, 40)})
    chosen = {"max_steps": 5, "learning_rate": 0.1, "prior_scale": "auto"} | settings
    other = None if "sampler" in settings else SGD

    def attempt():
        args = quiet_arguments(tmp_path, PriorTrainingArguments, **chosen)
        PriorTrainer(model=Logistic(40), args=args, train_dataset=data, prior=prior, optimizer_cls_and_kwargs=other).train()

    with pytest.raises(ValueError, match=said):
        attempt()


def test_an_optimizer_that_was_given_is_refused(tmp_path):
    prior, rows, _ = problem(3.0)
    model = Logistic(40)
    args = quiet_arguments(tmp_path, PriorTrainingArguments, max_steps=5, prior_scale="auto")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="optimizer_cls_and_kwargs"):
        PriorTrainer(model=model, args=args, train_dataset=rows, prior=prior, optimizers=(optimizer, None))


@pytest.mark.slow
def test_the_evaluation_set_stays_the_evaluation_set_where_its_loader_is_kept(tmp_path):
    prior, rows, test = problem(3.0)
    trainer = trainer_of(tmp_path, prior, rows, dataloader_num_workers=1, dataloader_persistent_workers=True, max_steps=10)
    trainer.eval_dataset = Rows(test.x[:30], test.y[:30])
    kept = trainer.get_eval_dataloader()  # Trainer keeps it
    trainer.train()
    assert trainer.prior_scale_choice.held_out == 16
    assert trainer.model.seen[False].isdisjoint(test.x[:30, 0].tolist())  # the scale was not chosen by it
    assert trainer.get_eval_dataloader() is kept


@pytest.mark.slow
def test_dataloader_drop_last_does_not_drop_held_out_examples(tmp_path):
    prior, rows, _ = problem(3.0)
    settings = {"prior_scale": 1.0, "max_steps": 10, "per_device_eval_batch_size": 10}
    losses = [
        [t.nll for t in select_scale(trainer_of(tmp_path, prior, rows, dataloader_drop_last=drop, **settings), [1.0]).trials]
        for drop in (False, True)  # 64 rows to train on are four whole batches
    ]
    assert losses[0] == losses[1]
    with pytest.raises(ValueError, match="no whole batch"):
        trainer_of(tmp_path, prior, rows, dataloader_drop_last=True, per_device_train_batch_size=70).train()


class Odd(Logistic):
    """With a buffer that is not saved, a part in evaluation mode, a state that is no tensor and other labels."""

    def __init__(self, inputs):
        super().__init__(inputs)
        self.register_buffer("steps", torch.zeros(()), persistent=False)
        self.still = nn.Identity().eval()

    def forward(self, x, labels=None):
        if self.training:
            self.steps = self.steps + 1  # another tensor
        return super().forward(x, labels)

    def get_extra_state(self):
        return {"anything": 1}

    def set_extra_state(self, state):
        pass


def test_buffers_that_are_not_saved_and_modes_are_put_back_too(tmp_path):
    prior, rows, _ = problem(3.0)
    model = Odd(40)
    trainer = trainer_of(tmp_path, prior, rows, model, prior_scale=1.0, max_steps=10)
    steps = model.steps
    select_scale(trainer, [1.0, 10.0])
    assert model.steps is steps
    assert steps.item() == 0
    assert model.training
    assert not model.still.training


@pytest.mark.slow
def test_bfloat16_leaves_the_model_in_float32_and_accelerate_without_memories(tmp_path):
    prior, rows, _ = problem(3.0)
    for mode in ("bf16_full_eval", "bf16"):
        trainer = trainer_of(tmp_path, prior, rows, prior_scale=1.0, max_steps=10, **{mode: True})
        before = trainer.model.body.weight.detach().clone()
        select_scale(trainer, [1.0, 10.0])
        assert trainer.model.body.weight.dtype == torch.float32
        assert torch.equal(trainer.model.body.weight, before)
        assert "forward" not in vars(trainer.model)  # wrapped in autocast once per training
        assert trainer.accelerator._models == trainer.accelerator._optimizers == []


def test_a_subclass_counts_and_logs_the_training_alone(tmp_path):
    prior, rows, _ = problem(3.0)

    class Counting(PriorTrainer):
        def __init__(self, *args, **kwargs):
            self.calls, self.metrics, self.logged = 0, {"train": []}, []
            super().__init__(*args, **kwargs)

        def compute_loss(self, *args, **kwargs):
            self.calls += 1
            self.metrics["train"].append(1)
            return super().compute_loss(*args, **kwargs)

        def log(self, logs, *args, **kwargs):
            self.logged.append(logs)
            super().log(logs, *args, **kwargs)

    args = quiet_arguments(tmp_path, PriorTrainingArguments, max_steps=7, learning_rate=0.1, prior_scale="auto")
    trainer = Counting(model=Logistic(40), args=args, train_dataset=rows, prior=prior, optimizer_cls_and_kwargs=SGD)
    trainer.train()
    assert trainer.calls == len(trainer.metrics["train"]) == 7
    assert len(trainer.logged) == 8  # the summary is one more


def test_an_interrupted_search_leaves_neither_hooks_nor_a_trainer_in_training(tmp_path):
    prior, rows, _ = problem(3.0)

    class Embedding(Logistic):
        def get_input_embeddings(self):
            return self.body

        def forward(self, x, labels=None):
            raise KeyboardInterrupt

    trainer = trainer_of(tmp_path, prior, rows, Embedding(40), neftune_noise_alpha=5.0)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not trainer.is_in_train
    assert not trainer.model.body._forward_hooks
    assert trainer.prior_update is None


@pytest.mark.slow
def test_a_search_that_begins_again_with_smaller_batches_forgets_what_it_measured(tmp_path):
    prior, rows, _ = problem(3.0)
    raised = []

    class Short(PriorTrainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == 20 and not raised:
                raised.append(True)
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(*args, **kwargs)

    chosen = {"max_steps": 10, "learning_rate": 0.1, "prior_scale": "auto", "auto_find_batch_size": True}
    args = quiet_arguments(tmp_path, PriorTrainingArguments, per_device_train_batch_size=16, **chosen)
    trainer = Short(model=Logistic(40), args=args, train_dataset=rows, prior=prior, optimizer_cls_and_kwargs=SGD)
    trainer.train()
    assert raised
    assert [t.scale for t in trainer.prior_scale_choice.trials] == pytest.approx(scale_ladder(prior.gaussian))


@pytest.mark.slow
def test_no_loss_in_evaluation_is_said(tmp_path):
    prior, rows, _ = problem(3.0)

    class Other(Logistic):
        def forward(self, x, target=None):
            return super().forward(x, target)

    data = [{"x": x, "target": y} for x, y in zip(rows.x, rows.y, strict=True)]
    args = {"max_steps": 5, "learning_rate": 0.1, "prior_scale": "auto"}
    for names in (None, ["target"]):
        given = quiet_arguments(tmp_path, PriorTrainingArguments, label_names=names, **args)
        trainer = PriorTrainer(model=Other(40), args=given, train_dataset=data, prior=prior, optimizer_cls_and_kwargs=SGD)
        if names is None:
            with pytest.raises(ValueError, match="label_names"):
                trainer.train()
        else:
            trainer.train()


def test_a_disk_that_cannot_be_written_to_costs_no_training(tmp_path):
    prior, rows, _ = problem(3.0)
    (tmp_path / "prior_scale.json").mkdir()
    trainer = trainer_of(tmp_path, prior, rows, max_steps=10)
    with pytest.warns(PriorWarning, match="as numbers"):
        trainer.train()
    assert trainer.state.global_step == 10


def test_resuming_without_a_checkpoint_says_what_trainer_says(tmp_path):
    prior, rows, _ = problem(3.0)
    with pytest.raises(ValueError, match="No valid checkpoint"):
        trainer_of(tmp_path, prior, rows).train(resume_from_checkpoint=True)


def test_labels_are_counted_once_for_the_training_and_once_for_the_rest(tmp_path, monkeypatch):
    prior, rows, _ = problem(3.0)
    counted = []

    def count(dataset, *args, **kwargs):
        counted.append(len(dataset))
        return 7 * len(dataset)

    monkeypatch.setattr("prior_hub.finetuning.trainer.count_labels", count)
    trainer = trainer_of(tmp_path, prior, rows, max_steps=5, prior_count="labels")
    trainer.train()
    assert counted == [80, 64]
    assert trainer.prior_scale_choice.num_examples == 7 * 64
    assert trainer.prior_penalty.num_examples == 7 * 80
    assert [part for part, _ in trainer._label_counts] == [rows]  # the part is not kept alive


def test_the_steps_of_a_grid_are_those_that_were_taken(tmp_path):
    prior, rows, _ = problem(3.0)
    trainer = trainer_of(tmp_path, prior, rows, prior_scale=1.0, max_steps=-1, num_train_epochs=1)
    assert select_scale(trainer, [1.0, 10.0]).steps == 2 * 64 / 16


@pytest.mark.slow
def test_head_variances_that_overshoot_are_left_out_and_not_the_scales(tmp_path):
    prior = random_prior(tiny_vit())
    chosen = {"max_steps": 5, "per_device_train_batch_size": 8, "prior_scale": "auto", "prior_head_variance": "auto"}
    args = quiet_arguments(tmp_path, PriorTrainingArguments, prior_update="gradient", **chosen)
    rate = (torch.optim.SGD, {"lr": 0.5})
    trainer = PriorTrainer(
        model=tiny_vit(), args=args, train_dataset=image_data(40), prior=prior, optimizer_cls_and_kwargs=rate
    )
    trainer.train()
    narrowest = min(t.head_variance for t in trainer.prior_scale_choice.trials)
    assert 0.5 / narrowest / 32 <= 2
    assert 0.5 / (narrowest / 10**0.5) / 32 > 2


@pytest.mark.slow
def test_an_optimizer_without_an_implicit_step_begins_where_its_steps_are_stable(tmp_path):
    prior, rows, _ = problem(3.0)
    args = quiet_arguments(tmp_path, PriorTrainingArguments, max_steps=60, learning_rate=0.1, prior_scale="auto")
    trainer = PriorTrainer(
        model=Logistic(40),
        args=args,
        train_dataset=rows,
        prior=prior,
        optimizer_cls_and_kwargs=(torch.optim.RMSprop, {"lr": 0.1}),
    )
    trainer.train()
    largest = 1 / float(prior.variance["body.weight"].min())
    narrowest = min(t.scale for t in trainer.prior_scale_choice.trials)
    assert 0.1 * largest / narrowest / 64 <= 2
    assert 0.1 * largest / (narrowest / 10**0.5) / 64 > 2  # and no later than that


def test_the_ladder_is_even_between_the_widths_it_names():
    prior = random_prior(tiny_vit(), rank=3)
    scales = scale_ladder(prior.gaussian)
    ratios = [b / a for a, b in itertools.pairwise(scales)]
    assert ratios == pytest.approx([10**0.5] * 12)
    norm = sum(float(m.square().sum()) for m in prior.mean.values())
    generator = torch.Generator().manual_seed(0)
    for scale, width in ((scales[0], 1e-3), (scales[-1], 1e3)):  # by drawing
        gaussian = prior.rescaled(scale).gaussian
        squares = []
        for _ in range(400):
            draw = gaussian.sample(generator=generator)
            squares.append(sum(float((draw[n] - prior.mean[n]).double().square().sum()) for n in draw))
        measured = torch.tensor(squares) / norm
        assert abs(measured.mean() - width) < 5 * measured.std() / 20


def test_numbers_and_auto_come_from_the_command_line():
    parser = HfArgumentParser(PriorTrainingArguments)
    args = parser.parse_args_into_dataclasses(["--output_dir", "x", "--prior_scale", "auto", "--prior_head_variance", "0.5"])[0]
    assert (args.prior_scale, args.prior_head_variance) == ("auto", 0.5)


def test_text_from_the_command_line_is_the_number_it_says(tmp_path):
    prior, rows, _ = problem(3.0)
    trainer = trainer_of(tmp_path, prior, rows, prior_scale="1e3")
    assert trainer.prior_penalty.gaussian.scale == 1000.0


def test_a_choice_reads_back_exactly_and_another_file_is_refused(tmp_path):
    prior, rows, _ = problem(3.0)
    trainer = trainer_of(tmp_path, prior, rows, max_steps=30)
    trainer.train()
    write_choice(tmp_path / "again", trainer.prior_scale_choice)
    assert read_choice(tmp_path / "again") == trainer.prior_scale_choice
    assert read_choice(tmp_path / "nowhere") is None
    assert json.loads((tmp_path / "again" / "prior_scale.json").read_text())["method"] == "path"
    for text in ("{", "[]", '{"scale": 1}', '{"trials": [{"x": 1}]}', '{"trials": [], "checks": [1]}'):
        with pytest.raises(PriorFormatError, match=r"prior_scale\.json"):
            ScaleChoice.from_json(text)


def test_the_report_compares_a_whole_training_with_the_narrowest_prior_under_its_best_head():
    def told(*trials, check, head=None):
        made = tuple(ScaleTrial(*t) for t in trials)
        return ScaleChoice(10.0, head, made, 20, 80, "path", 1, (ScaleTrial(10.0, head, check),)).report()

    assert "lower the learning rate" in told((1.0, None, 2.0), (10.0, None, 1.5), check=2.3)
    assert "lower the learning rate" not in told((1.0, None, 2.0), (10.0, None, 1.5), check=2.1)
    assert "lower the learning rate" not in told((1.0, None, -2.0), (10.0, None, -2.5), check=-2.15)  # a density may be above 1
    with_heads = ((1.0, 0.003, 3.0), (1.0, 0.1, 2.1), (1.0, 0.1, 2.0), (10.0, 0.1, 1.5))  # head trials, then the rungs
    assert "begins (NLL 2.0000): lower the learning rate" in told(*with_heads, check=2.8, head=0.1)


def test_a_trial_that_diverged_is_written_as_json_that_every_reader_takes():
    trials = (ScaleTrial(1e2, None, 1.5), ScaleTrial(1e4, None, math.inf))
    choice = ScaleChoice(1e2, None, trials, 5, 20, "path", 40, checks=trials[::-1])

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    assert [trial["nll"] for trial in json.loads(choice.to_json(), parse_constant=refuse)["trials"]] == [1.5, None]
    assert ScaleChoice.from_json(choice.to_json()) == choice
    older = choice.to_json().replace('"nll": null', '"nll": Infinity')  # as it was written before
    assert ScaleChoice.from_json(older) == choice
    first = {name: value for name, value in json.loads(choice.to_json()).items() if name != "checks"}  # before there were any
    assert ScaleChoice.from_json(json.dumps(first)) == dataclasses.replace(choice, checks=())


def trainer_to_search(args, kind=PriorTrainer):
    """A trainer that makes its model anew for each trial, and its data."""
    prior, rows, test = problem(3.0)
    return kind(
        model_init=lambda: Logistic(40),
        args=args,
        train_dataset=rows,
        eval_dataset=test,
        prior=prior,
        optimizer_cls_and_kwargs=SGD,
    )


@pytest.mark.slow
def test_hyperparameter_search_sets_the_scale_of_each_trial(tmp_path):
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    bound = []

    class Spy(PriorTrainer):
        def _begin(self):
            super()._begin()
            bound.append(self.prior_penalty.gaussian.scale)

    chosen = {"max_steps": 10, "per_device_train_batch_size": 16, "learning_rate": 0.1, "eval_strategy": "steps"}
    args = quiet_arguments(tmp_path, PriorTrainingArguments, **chosen, eval_steps=10)
    trainer = trainer_to_search(args, Spy)
    found = trainer.hyperparameter_search(
        lambda trial: {"prior_scale": trial.suggest_float("prior_scale", 1e-2, 1e4, log=True)},
        compute_objective=lambda metrics: metrics["eval_loss"],
        n_trials=3,
        backend="optuna",
        sampler=optuna.samplers.RandomSampler(seed=0),
    )
    assert len(bound) == 3
    assert len({round(math.log10(s), 6) for s in bound}) == 3
    assert found.hyperparameters["prior_scale"] in bound

    args.prior_scale = "auto"  # not answered by the search: said, not ignored
    with pytest.raises(ValueError, match="suggest_float"):
        trainer.hyperparameter_search(
            lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 0.01, 0.1)},
            compute_objective=lambda metrics: metrics["eval_loss"],
            n_trials=1,
            backend="optuna",
        )


@pytest.mark.slow
def test_ray_trials_each_have_their_own_scale(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="pip install 'ray[tune]': 200 MB, so that CI does without")
    from ray import tune

    chosen = {"max_steps": 10, "per_device_train_batch_size": 16, "learning_rate": 0.1, "eval_strategy": "steps"}
    args = quiet_arguments(tmp_path, PriorTrainingArguments, **chosen, eval_steps=10)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        found = trainer_to_search(args).hyperparameter_search(
            lambda _: {"prior_scale": tune.grid_search([1e-2, 10.0, 1e4])},
            compute_objective=lambda metrics: metrics["eval_loss"],
            n_trials=1,  # of a grid of three
            backend="ray",
            resources_per_trial={"cpu": 1},
            storage_path=str(tmp_path / "ray"),
        )
    finally:
        ray.shutdown()
    alone = {}
    for scale in (1e-2, 10.0, 1e4):
        args.prior_scale = scale
        again = trainer_to_search(args)
        again.train()
        alone[scale] = again.evaluate()["eval_loss"]
    assert len({round(loss, 4) for loss in alone.values()}) == 3
    assert found.hyperparameters == {"prior_scale": min(alone, key=alone.get)}
    assert found.objective == pytest.approx(min(alone.values()), abs=1e-5)
