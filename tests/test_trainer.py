"""PriorTrainer: the prior counts once per optimizer step, everything else is Trainer.

The reference for a gradient is never PriorTrainer itself: the data's part comes from a plain Trainer that is led along the
same weights (`replayed`), or from autograd over the window's rows; the prior's part from a dense float64 solve.
"""

from __future__ import annotations

import dataclasses
import gc
import re
import warnings
import weakref
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from hub_fixtures import fresh_repo_id
from models import (
    Stream,
    dense_covariance,
    dense_penalty,
    image_data,
    quiet_arguments,
    random_prior,
    text_data,
    tiny_bert,
    tiny_llama,
    tiny_resnet,
    tiny_vit,
)
from torch import Tensor, nn
from transformers import (
    HfArgumentParser,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from prior_hub import (
    PriorArgumentsMixin,
    PriorMatchError,
    PriorModel,
    PriorTrainer,
    PriorTrainerMixin,
    PriorTrainingArguments,
    PriorWarning,
    SamplingArgumentsMixin,
    isotropic_prior,
)

torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def _imported_modules_are_no_garbage():
    """Trainer collects garbage whenever it starts; searching all of transformers took four fifths of these tests' time."""
    gc.freeze()
    yield
    gc.unfreeze()


# where a head that ignores num_items_in_batch is used, but is not what the test is about
ignoring_miscaled_heads = pytest.mark.filterwarnings("ignore:.*ignores num_items_in_batch")

ONCE = 1e-6  # on a multiplicity: float32 roundings of both gradients, averaged over a thousand entries
RATE = 0.02  # below 2 N / largest precision of `random_prior`, so that nothing warns, and large enough to move


class Watch(TrainerCallback):
    """Keeps the weights at the start of each window, and weights and gradients right before each step of the optimizer.

    The gradients are seen by a hook of the optimizer itself: accumulated, reduced, unscaled and clipped.
    """

    def __init__(self) -> None:
        self.path: list[dict[str, Tensor]] = []
        self.weights: list[dict[str, Tensor]] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.steps: list[int] = []

    def on_train_begin(self, args, state, control, model, optimizer, **kwargs):
        def look(*_):
            named = dict(model.named_parameters())
            self.weights.append({name: p.detach().clone() for name, p in named.items()})
            self.gradients.append({name: p.grad.clone() for name, p in named.items() if p.grad is not None})
            self.steps.append(state.global_step)

        optimizer.optimizer.register_step_pre_hook(look)

    def on_step_begin(self, args, state, control, model, **kwargs):
        self.path.append({name: p.detach().clone() for name, p in model.named_parameters()})


class Lead(Watch):
    """A `Watch` that sets the weights at the start of each window to those of another run."""

    def __init__(self, path: list[dict[str, Tensor]]) -> None:
        super().__init__()
        self.given = iter(path)

    def on_step_begin(self, args, state, control, model, **kwargs):
        with torch.no_grad():
            for name, value in next(self.given).items():
                model.get_parameter(name).copy_(value)
        super().on_step_begin(args, state, control, model, **kwargs)


def run(trainer_class, model, folder, data, *callbacks, prepare=None, more=None, **settings):
    """Train and return the trainer; `more` goes to the trainer, `settings` to its arguments."""
    arguments_class = TrainingArguments if trainer_class is Trainer else PriorTrainingArguments
    arguments = quiet_arguments(folder, arguments_class, **{"learning_rate": RATE, **settings})
    trainer = trainer_class(model=model, args=arguments, train_dataset=data, callbacks=list(callbacks), **(more or {}))
    if prepare is not None:
        prepare(trainer)
    trainer.train()
    return trainer


def watched(model, prior, folder, data, more=None, **settings) -> tuple[Watch, PriorTrainer]:
    """A run under the prior that starts at the model's own weights, away from the prior's mean."""
    watch = Watch()
    settings = {"prior_initialize": False, **settings}
    return watch, run(PriorTrainer, model, folder, data, watch, more={"prior": prior, **(more or {})}, **settings)


def replayed(model, watch, folder, data, **settings) -> tuple[Lead, Trainer]:
    """A plain Trainer at the weights that `watch` saw."""
    lead = Lead(watch.path)
    plain = {k: v for k, v in settings.items() if not k.startswith("prior_")}
    trainer = run(Trainer, model, folder, data, lead, **plain)
    assert lead.steps == watch.steps
    return lead, trainer


def flat(tensors, names) -> Tensor:
    return torch.cat([tensors[n].detach().double().flatten() for n in names])


def multiplicities(prior: PriorModel, watch: Watch, plain: Watch, num_examples: float, rest: float = 1e-5) -> list[float]:
    """Per optimizer step: how often Sigma^-1 (theta - mean) / N stands in the difference of the two gradients.

    Also checks that nothing else does: what remains is rounding, and gradients outside the prior are the same.
    """
    names = list(prior.mean)
    factor, mean = torch.linalg.cholesky(dense_covariance(prior)), flat(prior.mean, names)
    found = []
    for weights, ours, theirs in zip(watch.weights, watch.gradients, plain.gradients, strict=True):
        delta = (flat(weights, names) - mean).unsqueeze(1)
        expected = torch.cholesky_solve(delta, factor).squeeze(1) / num_examples
        difference = flat(ours, names) - flat(theirs, names)
        times = float(difference @ expected / (expected @ expected))
        assert float((difference - times * expected).norm() / expected.norm()) < rest
        for name in ours.keys() - set(names):
            assert torch.equal(ours[name], theirs[name]), name
        found.append(times)
    return found


def plain_gradient(model, weights, rows, names) -> Tensor:
    """Gradient of the mean loss over `rows` in one batch, by autograd, at other weights."""
    with torch.no_grad():
        for name, value in weights.items():
            model.get_parameter(name).copy_(value)
    model.zero_grad()
    model(**default_data_collator(rows)).loss.backward()
    return flat({name: p.grad for name, p in model.named_parameters()}, names)


# ------------------------------------------------------------------------------------------------- the prior counts once


@pytest.mark.parametrize(
    ("rows", "steps", "settings"),
    [
        pytest.param(26, 13, {"num_train_epochs": 1}, id="no accumulation"),
        pytest.param(26, 8, {"num_train_epochs": 2, "gradient_accumulation_steps": 4}, id="short last window"),
        pytest.param(26, 4, {"num_train_epochs": 1, "gradient_accumulation_steps": 4, "bf16": True}, id="bf16 autocast"),
        pytest.param(20, 5, {"max_steps": 5, "gradient_accumulation_steps": 4, "prior_num_examples": 20}, id="iterable"),
    ],
)
def test_prior_counts_once_per_optimizer_step(tmp_path, rows, steps, settings):
    data = image_data(rows)
    data = Stream(data) if "prior_num_examples" in settings else data
    prior = random_prior(tiny_vit())
    watch, trainer = watched(tiny_vit(), prior, tmp_path, data, **settings)
    lead, _ = replayed(tiny_vit(), watch, tmp_path, data, **settings)
    assert len(watch.steps) == steps
    assert multiplicities(prior, watch, lead, rows) == pytest.approx([1] * steps, abs=ONCE)
    moved = flat(dict(trainer.model.named_parameters()), prior.mean) - flat(dict(tiny_vit().named_parameters()), prior.mean)
    assert moved.norm() > 0.05  # the weights moved: the steps differ


@ignoring_miscaled_heads
@pytest.mark.parametrize(("make", "make_data"), [(tiny_bert, text_data), (tiny_resnet, image_data)])
def test_prior_counts_once_where_the_head_ignores_num_items_in_batch(tmp_path, make, make_data):
    settings = {"num_train_epochs": 1, "gradient_accumulation_steps": 4, "learning_rate": 0.005}
    data, prior, plain = make_data(26), random_prior(make()), make()
    plain.accepts_loss_kwargs = False  # plain Trainer needs to be told
    watch, _ = watched(make(), prior, tmp_path, data, **settings)
    lead, _ = replayed(plain, watch, tmp_path, data, **settings)
    assert multiplicities(prior, watch, lead, 26) == pytest.approx([1] * 4, abs=ONCE)


@pytest.mark.parametrize("max_grad_norm", [0.5, 1e6])
def test_the_sum_of_both_gradients_is_clipped(tmp_path, max_grad_norm):
    data, prior = image_data(), random_prior(tiny_vit())
    settings = {"num_train_epochs": 1, "gradient_accumulation_steps": 4}
    watch, trainer = watched(tiny_vit(), prior, tmp_path, data, max_grad_norm=max_grad_norm, **settings)
    lead, _ = replayed(tiny_vit(), watch, tmp_path, data, **settings)
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    names = list(lead.weights[0])
    for weights, ours, theirs, norm in zip(watch.weights, watch.gradients, lead.gradients, logged, strict=True):
        _, dense = dense_penalty(prior, {n: weights[n] for n in prior.mean})
        both = torch.cat([(theirs[n].double() + dense.get(n, torch.zeros(())) / 26).flatten() for n in names])
        assert norm == pytest.approx(float(both.norm()), rel=1e-5)  # float32 norms
        expected = both * min(1.0, max_grad_norm / (float(both.norm()) + 1e-6))  # clip_grad_norm_'s own 1e-6
        found = flat(ours, names)
        assert float((found - expected).norm() / expected.norm()) < 1e-5
        assert (found.norm() < 0.51) == (max_grad_norm == 0.5)  # clipped where it should be, and only there


@pytest.mark.parametrize("max_grad_norm", [0.0, 1e6])
def test_prior_is_scaled_once_under_a_grad_scaler(tmp_path, monkeypatch, max_grad_norm):
    """fp16 autocast on the CPU with a real GradScaler that overflows at first: skipped steps, then steps that count once."""
    scale = 2.0**22
    scalers = []

    def fp16(trainer):
        accelerator = trainer.accelerator
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6)
        accelerator.native_amp = True
        scalers.append(accelerator.scaler)
        monkeypatch.setattr(accelerator.state, "_mixed_precision", "fp16")

    settings = {"num_train_epochs": 2, "gradient_accumulation_steps": 2, "max_grad_norm": max_grad_norm, "prepare": fp16}
    data, prior = image_data(), random_prior(tiny_vit())
    watch, trainer = watched(tiny_vit(), prior, tmp_path, data, **settings)
    lead, _ = replayed(tiny_vit(), watch, tmp_path, data, **settings)
    assert 1 < scalers[0].get_scale() < scale  # it overflowed, and recovered
    assert scalers[0].get_scale() == scalers[1].get_scale()
    assert 5 < len(watch.steps) < trainer.state.max_steps
    # unscaling by a power of two is exact; the gradients are float32, the forward pass is the same in both
    assert multiplicities(prior, watch, lead, 26) == pytest.approx([1] * len(watch.steps), abs=ONCE)


@pytest.mark.parametrize(("make", "make_data"), [(tiny_bert, text_data), (tiny_vit, image_data)])
def test_four_small_batches_and_one_large_batch_both_give_the_gradient_of_one_batch(tmp_path, make, make_data):
    """Bert ignores num_items_in_batch and must be corrected with a warning, ViT does not and must not warn."""
    data, prior = make_data(16), random_prior(make())
    names = list(prior.mean)
    for batch, accumulation in ((8, 1), (2, 4)):
        settings = {"max_steps": 2, "per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", PriorWarning)
            watch, trainer = watched(make(), prior, tmp_path, data, **settings)
        told = [str(w.message) for w in caught if issubclass(w.category, PriorWarning)]
        wrong = make is tiny_bert and accumulation > 1
        assert len(told) == int(wrong)
        assert all("BertForSequenceClassification ignores num_items_in_batch" in text for text in told)
        logged = [entry["nll"] for entry in trainer.state.log_history if "nll" in entry]
        for step, (weights, ours) in enumerate(zip(watch.weights, watch.gradients, strict=True)):
            rows = data[8 * step : 8 * step + 8]
            model = make()
            _, dense = dense_penalty(prior, {n: weights[n] for n in names})
            expected = plain_gradient(model, weights, rows, names) + flat(dense, names) / 16
            assert float((flat(ours, names) - expected).norm() / expected.norm()) < 1e-5  # other order of summation
            assert logged[step] == pytest.approx(model(**default_data_collator(rows)).loss.item(), rel=1e-5)


def mean_over_the_window(outputs, labels, num_items_in_batch):
    return nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch


has_loss_is_scaled = pytest.mark.skipif(not hasattr(Trainer, "loss_is_scaled_for_ga"), reason="a newer Trainer has it")


class OfOwnMean(PriorTrainer):
    loss_is_scaled_for_ga = False  # each loss is the mean of its batch


@pytest.mark.parametrize(
    ("trainer_class", "more"),
    [
        pytest.param(PriorTrainer, {"compute_loss_func": mean_over_the_window}, id="compute_loss_func"),
        pytest.param(OfOwnMean, {}, id="loss_is_scaled_for_ga", marks=has_loss_is_scaled),
    ],
)
def test_who_scales_the_loss_himself_is_neither_warned_nor_corrected(tmp_path, trainer_class, more):
    data, watch = text_data(16), Watch()
    settings = {"max_steps": 2, "gradient_accumulation_steps": 4, "prior_initialize": False}
    more = {"prior": random_prior(tiny_bert()), **more}
    trainer = run(trainer_class, tiny_bert(), tmp_path, data, watch, more=more, **settings)
    for step, nll in enumerate(logs(trainer, "nll")):
        model = tiny_bert()
        model.load_state_dict(watch.weights[step], strict=False)
        expected = model(**default_data_collator(data[8 * step : 8 * step + 8])).loss.item()
        assert nll == pytest.approx(expected, rel=1e-5)  # float32 sums in another order


def test_probe_leaves_batch_statistics_alone(tmp_path):
    """The probing forward passes update no running statistics."""
    prior = random_prior(tiny_resnet(), scale=1e20)
    data, settings = image_data(), {"num_train_epochs": 1, "gradient_accumulation_steps": 4, "prior_initialize": False}
    with pytest.warns(PriorWarning, match="ResNetForImageClassification ignores num_items_in_batch"):
        ours = run(PriorTrainer, tiny_resnet(), tmp_path, data, more={"prior": prior}, **settings)
    plain = tiny_resnet()
    plain.accepts_loss_kwargs = False
    theirs = run(Trainer, plain, tmp_path, data, num_train_epochs=1, gradient_accumulation_steps=4)
    for (name, a), (_, b) in zip(ours.model.named_buffers(), theirs.model.named_buffers(), strict=True):
        # a prior of variance 1e18 adds less than float32 holds; an update too many would show in num_batches_tracked
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=name)


class Noisy(nn.Module):
    """Draws noise in evaluation too, as diffusion and masked models do, and ignores num_items_in_batch."""

    def __init__(self):
        super().__init__()
        self.inner = tiny_vit()

    def forward(self, pixel_values, labels, **kwargs):
        return self.inner(pixel_values=pixel_values + torch.randn_like(pixel_values), labels=labels)


def test_probe_leaves_the_random_numbers_of_training_alone(tmp_path):
    settings, given, ends = {"num_train_epochs": 1, "gradient_accumulation_steps": 4}, [], []

    class Listening(PriorTrainer):
        def compute_loss(self, model, inputs, *args, num_items_in_batch=None, **kwargs):
            if model.training:
                given.append(num_items_in_batch)
            return super().compute_loss(model, inputs, *args, num_items_in_batch=num_items_in_batch, **kwargs)

    more = {"prior": random_prior(Noisy(), head=("inner.classifier",), scale=1e20)}
    with pytest.warns(PriorWarning, match="Noisy ignores num_items_in_batch"):
        ours = run(Listening, Noisy(), tmp_path, image_data(), more=more, prior_initialize=False, **settings)
    plain = Noisy()
    plain.accepts_loss_kwargs = False
    theirs = run(Trainer, plain, tmp_path, image_data(), **settings)
    for trainer in (ours, theirs):
        ends.append(flat(dict(trainer.model.named_parameters()), [n for n, _ in plain.named_parameters()]))
    assert float((ends[0] - ends[1]).norm()) < 1e-6  # a prior of variance 1e18 adds less than float32 holds
    assert given == [None] * 13  # in the first window too, for those who divide by it themselves


def test_a_compiled_model_is_trained_the_same(tmp_path):
    prior, ends = random_prior(tiny_vit()), []
    settings = {"max_steps": 3, "gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "prior_initialize": False}
    for compiling in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        trainer = run(PriorTrainer, tiny_vit(), tmp_path, image_data(16), more={"prior": prior}, **settings, **compiling)
        ends.append(flat(dict(trainer.model.named_parameters()), prior.mean))
    assert type(trainer.model_wrapped).__name__ == "OptimizedModule"
    assert float((ends[0] - ends[1]).norm()) < 1e-7  # "eager" runs the same kernels


# -------------------------------------------------------------------------------------------- without a prior: Trainer


def timeless(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    timings = ("_runtime", "_per_second", "_preparation_time")
    return [{k: v for k, v in entry.items() if not k.endswith(timings)} for entry in history]


def test_without_a_prior_it_is_trainer_to_the_last_bit(tmp_path):
    settings = {
        "num_train_epochs": 2,
        "gradient_accumulation_steps": 4,
        "train_sampling_strategy": "random",
        "optim": "adamw_torch",
    }
    settings |= {"weight_decay": 0.1, "max_grad_norm": 0.5, "logging_steps": 3, "eval_strategy": "epoch"}
    runs = []
    for trainer_class in (Trainer, PriorTrainer):
        model = tiny_vit(hidden_dropout_prob=0.2)
        more = {"eval_dataset": image_data(8, seed=1)}
        runs.append(run(trainer_class, model, tmp_path, image_data(), more=more, **settings))
    theirs, ours = runs
    assert timeless(ours.state.log_history) == timeless(theirs.state.log_history)
    for (name, a), (_, b) in zip(ours.model.named_parameters(), theirs.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert ours.prior is None
    assert not any(type(c).__name__ == "_BindPrior" for c in ours.callback_handler.callbacks)


def test_an_infinitely_wide_prior_changes_nothing(tmp_path):
    settings = {"num_train_epochs": 2, "gradient_accumulation_steps": 4, "train_sampling_strategy": "random"}
    model, data = tiny_vit(hidden_dropout_prob=0.2), image_data()
    more = {"prior": random_prior(model)}
    theirs = run(Trainer, tiny_vit(hidden_dropout_prob=0.2), tmp_path, data, **settings)
    ours = run(PriorTrainer, model, tmp_path, data, more=more, prior_scale=1e20, prior_initialize=False, **settings)
    for (name, a), (_, b) in zip(ours.model.named_parameters(), theirs.model.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=name)  # the same operations: 1e-20 is below rounding
    for a, b in zip(ours.state.log_history, theirs.state.log_history, strict=True):
        if "loss" in a:
            assert a["nll"] == pytest.approx(b["loss"], rel=1e-6)
            assert 0 < a["prior_loss"] < 1e-15


# ---------------------------------------------------------------------------------------------------------- weight decay


def decayed(optimizer: torch.optim.Optimizer, model: nn.Module) -> set[str]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}


def test_covered_parameters_are_not_decayed_by_the_optimizer_that_trainer_makes(tmp_path):
    model = tiny_vit()
    prior = random_prior(model)
    settings = {"weight_decay": 0.1, "max_steps": 1}
    plain = run(Trainer, tiny_vit(), tmp_path, image_data(), **settings)
    ours = run(PriorTrainer, model, tmp_path, image_data(), more={"prior": prior}, **settings)
    both = run(PriorTrainer, tiny_vit(), tmp_path, image_data(), more={"prior": prior}, prior_head_variance=0.5, **settings)
    assert decayed(plain.optimizer, plain.model) & set(prior.mean)
    assert decayed(ours.optimizer, ours.model) == {"classifier.weight"}
    assert decayed(both.optimizer, both.model) == set()


def test_prior_head_variance_gives_the_head_a_zero_mean_gaussian(tmp_path):
    data, prior = image_data(), random_prior(tiny_vit())
    settings = {"max_steps": 3, "gradient_accumulation_steps": 2, "prior_head_variance": 0.25}
    watch, trainer = watched(tiny_vit(), prior, tmp_path, data, **settings)
    lead, _ = replayed(tiny_vit(), watch, tmp_path, data, **settings)
    logged = [entry["prior_loss"] for entry in trainer.state.log_history if "prior_loss" in entry]
    head = ["classifier.weight", "classifier.bias"]
    for weights, ours, theirs, prior_loss in zip(watch.weights, watch.gradients, lead.gradients, logged, strict=True):
        expected = flat(weights, head) / 0.25 / 26
        difference = flat(ours, head) - flat(theirs, head)
        assert float((difference - expected).norm() / expected.norm()) < 1e-4  # the head's NLL gradient is 100 times larger
        body, _ = dense_penalty(prior, {n: weights[n] for n in prior.mean})
        nats = body + float(flat(weights, head).square().sum()) / 0.25 / 2
        assert prior_loss == pytest.approx(nats / 26, rel=1e-5)


def refused_or_passed(tmp_path, optimizer, model, prior):
    arguments = quiet_arguments(tmp_path, max_steps=1)
    trainer = PriorTrainer(model=model, prior=prior, args=arguments, train_dataset=image_data(8), optimizers=(optimizer, None))
    return trainer.train()


def test_an_optimizer_that_decays_covered_parameters_is_refused(tmp_path):
    model = tiny_vit()
    prior = random_prior(model)
    head = list(model.classifier.parameters())
    body = [p for n, p in model.named_parameters() if n in prior.mean]
    for optimizer in (
        torch.optim.AdamW(model.parameters(), lr=1e-4),  # decays by 0.01 unless told otherwise
        torch.optim.SGD([{"params": body, "weight_decay": 1e-4}, {"params": head}], lr=1e-4),
        torch.optim.SGD([{"params": body[1:]}, {"params": [*head, body[0]], "weight_decay": 1e-4}], lr=1e-4),
    ):
        with pytest.raises(ValueError, match=r"the optimizer decays \d+ parameters that are under the prior .*AdamW"):
            refused_or_passed(tmp_path, optimizer, model, prior)


def test_an_optimizer_that_decays_the_head_only_is_accepted(tmp_path):
    model = tiny_vit()
    prior = random_prior(model)
    head = list(model.classifier.parameters())
    body = [p for n, p in model.named_parameters() if n in prior.mean]
    for optimizer in (
        torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0),
        torch.optim.AdamW([{"params": body, "weight_decay": 0.0}, {"params": head}], lr=1e-4),
    ):
        assert refused_or_passed(tmp_path, optimizer, model, prior).global_step == 1


# ------------------------------------------------------------------------------------------------------------------ logs


def logs(trainer: Trainer, key: str = "loss") -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def test_loss_is_nll_plus_prior_loss_and_each_is_what_it_says(tmp_path):
    """nll against a plain Trainer at the same weights, prior_loss against the dense formula, over uneven logging windows."""
    data, prior = image_data(), random_prior(tiny_vit())
    settings = {"num_train_epochs": 3, "gradient_accumulation_steps": 2, "logging_steps": 3}
    watch, trainer = watched(tiny_vit(), prior, tmp_path, data, **settings)
    _, plain = replayed(tiny_vit(), watch, tmp_path, data, **settings)
    assert len(logs(trainer)) == 7
    nats = [dense_penalty(prior, {n: w[n] for n in prior.mean})[0] for w in watch.weights]
    for index, (loss, nll, share, reference) in enumerate(
        zip(logs(trainer), logs(trainer, "nll"), logs(trainer, "prior_loss"), logs(plain), strict=True)
    ):
        assert nll == pytest.approx(reference, rel=1e-6)  # the same float32 losses, added in the same order
        assert share == pytest.approx(sum(nats[3 * index : 3 * index + 3]) / 3 / 26, rel=1e-5)
        assert loss == pytest.approx(nll + share, rel=1e-6)


# not with ViT: transformers 5.23 saves its weights under older names and does not find them again on resume
@ignoring_miscaled_heads
def test_nll_and_prior_loss_are_right_after_a_resume(tmp_path):
    data, prior = text_data(), random_prior(tiny_bert())
    settings = {"max_steps": 9, "gradient_accumulation_steps": 2, "prior_initialize": False}
    each = run(PriorTrainer, tiny_bert(), tmp_path, data, more={"prior": prior}, **settings)
    settings |= {"logging_steps": 3, "save_strategy": "steps", "save_steps": 4}
    run(PriorTrainer, tiny_bert(), tmp_path, data, more={"prior": prior}, **settings)
    arguments = quiet_arguments(tmp_path, learning_rate=RATE, **settings)
    resumed = PriorTrainer(model=tiny_bert(), prior=prior, args=arguments, train_dataset=data)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert [e["step"] for e in resumed.state.log_history if "nll" in e] == [3, 6, 9]
    for key in ("loss", "nll", "prior_loss"):
        values = logs(each, key)
        # the first entry after the resume covers the two steps of this run, 5 and 6; float32 sums in another order
        assert logs(resumed, key)[1:] == pytest.approx([sum(values[4:6]) / 2, sum(values[6:9]) / 3], rel=1e-6)


def test_nll_and_prior_loss_are_right_in_a_second_train(tmp_path):
    data, prior = image_data(), random_prior(tiny_vit())
    settings = {"max_steps": 5, "gradient_accumulation_steps": 2, "logging_steps": 3, "prior_initialize": False}
    twice = run(PriorTrainer, tiny_vit(), tmp_path, data, more={"prior": prior}, **settings)
    reached = {n: p.detach().clone() for n, p in twice.model.named_parameters()}
    twice.train()  # steps 4 and 5 of the first run were never logged, and are not to show up here
    fresh = tiny_vit()
    fresh.load_state_dict(reached)
    once = run(PriorTrainer, fresh, tmp_path, data, more={"prior": prior}, **settings)
    for key in ("loss", "nll", "prior_loss"):
        assert len(logs(twice, key)) == 1
        assert logs(twice, key) == logs(once, key)


def test_nan_is_visible_in_nll_where_trainers_filter_hides_it_in_loss(tmp_path):
    data = image_data(8)
    data[-1]["pixel_values"] = data[-1]["pixel_values"] * float("nan")
    more = {"prior": random_prior(tiny_vit())}
    trainer = run(PriorTrainer, tiny_vit(), tmp_path, data, more=more, num_train_epochs=1, prior_initialize=False)
    assert [value == value for value in logs(trainer, "nll")] == [True, True, True, False]
    assert all(value == value for value in logs(trainer))


def test_nll_is_summed_in_float32_where_the_loss_is_bfloat16(tmp_path):
    """A sum of 64 losses of 1 + 1/128 in bfloat16 loses the 1/128 from 32 on, where the spacing is 1/4."""

    class Constant(PriorTrainer):
        def compute_loss(self, model, inputs, **kwargs):
            return 0.0 * model(**inputs).logits.sum().bfloat16() + 1.0078125

    more = {"prior": random_prior(tiny_vit())}
    trainer = run(
        Constant, tiny_vit(), tmp_path, image_data(4), more=more, max_steps=100, logging_steps=100, learning_rate=1e-4
    )
    assert logs(trainer, "nll") == [1.0078125]


def test_evaluation_loss_is_the_plain_nll_and_compute_metrics_sees_the_same(tmp_path):
    seen, data, test = [], image_data(8), image_data(9, seed=3)

    def metrics(prediction):
        seen.append(prediction)
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    more = {"compute_metrics": metrics, "eval_dataset": test}
    prior = random_prior(tiny_vit())
    ours = run(PriorTrainer, tiny_vit(), tmp_path, data, more={"prior": prior, **more}, max_steps=2)
    theirs = Trainer(model=ours.model, args=quiet_arguments(tmp_path, TrainingArguments), **more)
    found, expected = ours.evaluate(), theirs.evaluate()
    assert timeless([found]) == timeless([expected | {"epoch": found["epoch"]}])
    assert (seen[0].predictions == seen[1].predictions).all()
    assert found["eval_loss"] == pytest.approx(ours.model(**default_data_collator(test)).loss.item(), rel=1e-5)


# --------------------------------------------------------------------------------------------------------------------- N


def bound(tmp_path, data, model=None, **settings) -> PriorTrainer:
    model = tiny_vit() if model is None else model
    arguments = quiet_arguments(tmp_path, **settings)
    return PriorTrainer(model=model, prior=random_prior(model), args=arguments, train_dataset=data)


def test_n_is_the_length_of_the_training_set_whatever_the_epochs_and_batches(tmp_path):
    for settings in ({}, {"num_train_epochs": 7}, {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 3}):
        assert bound(tmp_path, image_data(26), **settings).prior_penalty.num_examples == 26
    assert bound(tmp_path, image_data(26), prior_num_examples=1000).prior_penalty.num_examples == 1000
    bound(tmp_path, None).evaluate(image_data(4))  # nothing to train on: no N is asked for


def test_prior_device_says_where_the_prior_is_kept(tmp_path):
    placed = bound(tmp_path, image_data(4), prior_device="meta").prior_penalty.gaussian  # a device that every machine has
    assert {t.device.type for kind in (placed.mean, placed.variance, placed.deviations) for t in kind.values()} == {"meta"}
    beside = bound(tmp_path, image_data(4)).prior_penalty.gaussian
    assert {t.device.type for t in beside.mean.values()} == {"cpu"}


def test_a_stream_without_length_needs_prior_num_examples(tmp_path):
    with pytest.raises(ValueError, match=r"no length.*PriorTrainingArguments\(prior_num_examples=\.\.\.\)"):
        bound(tmp_path, Stream(image_data(4)), max_steps=1)
    assert bound(tmp_path, Stream(image_data(4)), max_steps=1, prior_num_examples=4).prior_penalty.num_examples == 4


def test_labels_per_token_or_pixel_need_prior_num_examples(tmp_path):
    data = text_data(4, token_labels=True)
    with pytest.raises(ValueError, match=r"labels have shape \(2, 6\): the loss is a mean over tokens or pixels"):
        bound(tmp_path, data, tiny_llama(), max_steps=1).train()
    assert bound(tmp_path, data, tiny_llama(), max_steps=1, prior_num_examples=20).train().global_step == 1


def test_arguments_without_prior_num_examples_are_told_of_the_mixin_that_has_it(tmp_path):
    """As SFTConfig, of TRL, would be: another class than PriorTrainingArguments is wanted there."""

    @dataclasses.dataclass
    class SFTConfig(TrainingArguments):
        pass

    @dataclasses.dataclass
    class PriorSFTConfig(PriorArgumentsMixin, SFTConfig):
        pass

    model = tiny_llama()
    tokens = text_data(4, token_labels=True)
    wanted = r"SFTConfig has no prior_num_examples.*class PriorSFTConfig\(PriorArgumentsMixin, SFTConfig\)"
    for data, settings in ((Stream(tokens), {"max_steps": 1}), (tokens, {"max_steps": 1})):
        given = {"model": model, "prior": random_prior(model), "train_dataset": data}
        with pytest.raises(ValueError, match=wanted):
            PriorTrainer(**given, args=quiet_arguments(tmp_path, SFTConfig, **settings)).train()
        with pytest.raises(ValueError, match=r"Pass PriorSFTConfig\(prior_num_examples=\.\.\.\): the"):
            PriorTrainer(**given, args=quiet_arguments(tmp_path, PriorSFTConfig, **settings)).train()
        settings |= {"prior_num_examples": 24}
        assert PriorTrainer(**given, args=quiet_arguments(tmp_path, PriorSFTConfig, **settings)).train().global_step == 1


def test_float_labels_of_several_classes_are_one_observation_per_example(tmp_path):
    data = [row | {"labels": torch.tensor([1.0, 0.0, 1.0])} for row in image_data(4)]
    trainer = bound(tmp_path, data, tiny_vit(problem_type="multi_label_classification"), max_steps=1)
    assert trainer.train().global_step == 1
    assert trainer.prior_penalty.num_examples == 4


# ------------------------------------------------------------------------------------------------ refusals and warnings


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_is_refused_before_training(tmp_path, monkeypatch, stage):
    """As far as it can be seen without deepspeed: accelerate's state holds a plugin, and Trainer draws its own conclusions."""
    plugin = MagicMock(zero_stage=stage, enable_msamp=False)
    monkeypatch.setattr(AcceleratorState, "deepspeed_plugin", property(lambda _: plugin))
    monkeypatch.setattr(transformers.trainer, "propagate_args_to_deepspeed", lambda *_, **__: None)
    model = tiny_vit()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"DeepSpeed .* use FSDP2"):
        bound(tmp_path, image_data(4), model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("optim", ["lomo", "adalomo", "galore_adamw_layerwise", "apollo_adamw_layerwise"])
def test_optimizers_that_step_inside_backward_are_refused(tmp_path, optim):
    with pytest.raises(ValueError, match=f"optim='{optim}' updates the weights inside backward"):
        bound(tmp_path, image_data(4), optim=optim)


@pytest.mark.parametrize("name", ["Lomo", "AdaLomo", "LayerWiseDummyOptimizer"])
def test_optimizers_that_step_inside_backward_are_refused_by_their_class_too(tmp_path, name):
    if name == "LayerWiseDummyOptimizer":
        from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

        optimizer = LayerWiseDummyOptimizer(optimizer_dict={}, lr=1e-3)
    else:
        base = type(name, (torch.optim.Optimizer,), {})  # as lomo_optim's, which need not be installed
        optimizer = type("Mine", (base,), {})([nn.Parameter(torch.zeros(1))], {})
    model = tiny_vit()
    with pytest.raises(ValueError, match=f"the optimizer, {name}, updates the weights inside backward"):
        refused_or_passed(tmp_path, optimizer, model, random_prior(model))


def test_fsdp_version_1_is_refused_by_its_name(tmp_path):
    class FullyShardedDataParallel(nn.Module):
        """Named as FSDP 1's wrapper, and with parameters as it leaves them: flat, and of no known shape."""

        def __init__(self, inner):
            super().__init__()
            self._fsdp_wrapped_module = inner
            for parameter in inner.parameters():
                parameter.data = parameter.data.flatten()

    trainer = bound(tmp_path, image_data(4))
    trainer.model = FullyShardedDataParallel(trainer.model)
    with pytest.raises(PriorMatchError, match="FSDP version 1"):
        trainer._bind()


def test_adapters_over_a_frozen_body_are_refused_where_the_prior_may_not_act_through_them(tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny_vit()
    prior = random_prior(model)
    targets = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "classifier" not in name]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, modules_to_save=["classifier"]))
    arguments = quiet_arguments(tmp_path, prior_through_adapters=False)
    with pytest.raises(PriorMatchError, match=r"all \d+ parameters under the prior are frozen.*LoRA"):
        PriorTrainer(model=adapted, prior=prior, args=arguments, train_dataset=image_data(4))


def test_bfloat16_parameters_warn(tmp_path):
    model = tiny_vit().to(torch.bfloat16)
    data = [row | {"pixel_values": row["pixel_values"].bfloat16()} for row in image_data(4)]
    with pytest.warns(PriorWarning, match=r"gradients are bfloat16.*Keep the parameters in float32"):
        bound(tmp_path, data, model, max_steps=1).train()


def test_a_prior_too_stiff_for_the_learning_rate_warns_with_settings_that_do_not(tmp_path):
    model = tiny_vit()
    prior = random_prior(model)
    largest = 1 / float(torch.linalg.eigvalsh(dense_covariance(prior))[0])
    threshold = 2 * 26 / largest  # learning rate x largest precision / N = 2

    def train(**settings) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            settings = {"max_steps": 1, "learning_rate": 1.05 * threshold, "prior_update": "gradient", **settings}
            run(PriorTrainer, tiny_vit(), tmp_path, image_data(), more={"prior": prior}, **settings)
        return [str(w.message) for w in caught]

    assert train(learning_rate=0.95 * threshold) == []  # 5 %: power iteration comes from below
    (message,) = train()
    assert re.search(r"learning rate \S+ x largest precision \S+ / N 26 = 2\.[01]", message)
    assert train(learning_rate=float(re.search(r"learning_rate to (\S+) or less", message)[1])) == []
    scale = float(re.search(r"prior_scale from 1 to (\S+) or more", message)[1])
    assert 1 < scale < 1.2
    assert train(prior_scale=scale) == []
    assert "prior_update='implicit'" in message
    assert train(prior_update="implicit") == train(prior_update="auto") == []
    # the rate that counts is the highest of the schedule, not the one it starts or ends with
    assert len(train(lr_scheduler_type="linear", warmup_steps=1, max_steps=2)) == 1


# ------------------------------------------------------------------------------------------------------ the arguments


def test_settings_parse_from_the_command_line():
    parser = HfArgumentParser(PriorTrainingArguments)
    words = "--output_dir out --prior org/name --prior_scale 0.5 --prior_rank 3 --prior_head_variance 0.1"
    words += " --prior_num_examples 100 --prior_initialize False --prior_include_head --prior_on_mismatch drop"
    words += (
        " --prior_count labels --prior_min_coverage 0.25 --prior_update implicit --prior_revision v1.0 --prior_subfolder prior"
    )
    words += " --prior_scale_checks 2 --weight_decay 0.01 --prior_through_adapters False --prior_device cpu"
    (given,) = parser.parse_args_into_dataclasses(words.split())
    words_of_the_sampler = " --sampler sghmc --temperature 0.5 --friction 0.2 --num_cycles 2 --samples_per_cycle 5"
    words_of_the_sampler += " --exploration 0.25 --sampling_schedule constant --sampler_metric diagonal --chain 3"
    words_of_the_sampler += " --sample_batch_norm_batches 7"
    (sampling,) = parser.parse_args_into_dataclasses((words + words_of_the_sampler).split())
    names = [f.name for f in dataclasses.fields(SamplingArgumentsMixin)]
    assert [getattr(sampling, name) for name in names] == ["sghmc", 0.5, 0.2, 2, 5, 0.25, "constant", "diagonal", 3, 7]
    found = {k: v for k, v in vars(given).items() if k.startswith("prior")}
    assert found == {
        "prior": "org/name",
        "prior_scale": 0.5,
        "prior_scale_checks": 2,
        "prior_rank": 3,
        "prior_head_variance": 0.1,
        "prior_update": "implicit",
        "prior_num_examples": 100,
        "prior_count": "labels",
        "prior_initialize": False,
        "prior_include_head": True,
        "prior_on_mismatch": "drop",
        "prior_min_coverage": 0.25,
        "prior_through_adapters": False,
        "prior_device": "cpu",
        "prior_revision": "v1.0",
        "prior_subfolder": "prior",
    }
    assert given.weight_decay == 0.01
    (default,) = parser.parse_args_into_dataclasses(["--output_dir", "out"])
    expected = {f.name: f.default for f in dataclasses.fields(PriorArgumentsMixin) if f.name.startswith("prior")}
    assert {k: v for k, v in vars(default).items() if k.startswith("prior")} == expected
    assert expected.keys() == found.keys()
    (off,) = parser.parse_args_into_dataclasses(["--output_dir", "out", "--no_prior_initialize"])
    assert off.prior_initialize is False
    text = parser.format_help()  # a bare % in a help text would raise here
    assert all(f"--{name}" in text for name in expected)


def test_settings_survive_trainings_own_serialization(tmp_path):
    given = quiet_arguments(tmp_path, prior="org/name", prior_scale=0.5)
    assert given.to_dict()["prior_scale"] == 0.5
    assert (
        PriorTrainingArguments(**{k: v for k, v in vars(given).items() if k.startswith("prior")}, output_dir="x").prior_scale
        == 0.5
    )


def test_a_setting_changed_between_two_runs_counts_as_in_a_hyperparameter_search(tmp_path):
    trainer = bound(tmp_path, image_data(4), max_steps=1, learning_rate=1e-6)
    trainer.args.prior_scale, trainer.args.prior_head_variance = 0.125, 2.0  # as Trainer._hp_search_setup does
    trainer.train()
    assert trainer.prior_penalty.gaussian.scale == 0.125
    assert trainer.prior_penalty.head_variance == 2.0


def test_binding_anew_frees_the_old_copy_of_the_prior_first(tmp_path, monkeypatch):
    from prior_hub.finetuning import trainer as module

    trainer = bound(tmp_path, image_data(4), max_steps=1, learning_rate=1e-6)
    old, alive = weakref.ref(trainer.prior_penalty.gaussian), []

    class Watching(module.PriorPenalty):
        def __init__(self, *args, **kwargs):
            alive.append(old() is not None)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(module, "PriorPenalty", Watching)
    trainer.train()
    assert alive == [False]


def test_after_a_binding_that_failed_covered_parameters_are_still_not_decayed(tmp_path):
    trainer = bound(tmp_path, image_data(4), max_steps=1, learning_rate=1e-6, weight_decay=0.1)
    expected = trainer.get_decay_parameter_names(trainer.model)
    trainer.args.prior_num_examples = -1
    with pytest.raises(ValueError, match="num_examples is -1"):
        trainer.train()
    assert trainer.get_decay_parameter_names(trainer.model) == expected == ["classifier.weight"]
    trainer.optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=1e-6)
    with pytest.raises(ValueError, match="decays"):
        trainer.create_optimizer()
    trainer.optimizer, trainer.args.prior_num_examples = None, 4
    assert trainer.train().global_step == 1
    assert trainer.prior_penalty.num_examples == 4


def test_prior_may_be_an_object_or_a_folder_given_as_argument_or_setting(tmp_path):
    model = tiny_vit()
    prior = random_prior(model)
    prior.save_pretrained(tmp_path / "prior")
    folder, other = str(tmp_path / "prior"), random_prior(model, seed=7)
    for given, settings, expected in (
        (prior, {}, prior),
        (folder, {}, prior),
        (tmp_path / "prior", {}, prior),
        (None, {"prior": folder}, prior),
        (other, {"prior": folder}, other),  # the argument wins
    ):
        trainer = PriorTrainer(
            model=tiny_vit(), prior=given, args=quiet_arguments(tmp_path, **settings), train_dataset=image_data(4)
        )
        for name, mean in expected.mean.items():
            assert torch.equal(trainer.model.get_parameter(name), mean)


@pytest.mark.hub
def test_prior_may_be_a_name_on_the_hub_with_a_revision_and_a_subfolder(tmp_path, hub):
    model = tiny_vit()
    repo_id, old, new = fresh_repo_id("prior"), random_prior(model, seed=1), random_prior(model, seed=2)
    old.push_to_hub(repo_id, tag="v1.0", subfolder="inside")
    new.push_to_hub(repo_id, subfolder="inside")
    for revision, expected in ((None, new), ("v1.0", old)):
        settings = {"prior": repo_id, "prior_revision": revision, "prior_subfolder": "inside"}
        trainer = PriorTrainer(model=tiny_vit(), args=quiet_arguments(tmp_path, **settings), train_dataset=image_data(4))
        assert trainer.prior.repo_id == repo_id
        for name, mean in expected.mean.items():
            assert torch.equal(trainer.model.get_parameter(name), mean)


@pytest.mark.parametrize("initialize", [True, False])
def test_prior_initialize_decides_where_training_starts(tmp_path, initialize):
    source = tiny_resnet(seed=5)
    with torch.no_grad():
        for name, buffer in source.named_buffers():
            if name.endswith("running_mean"):
                buffer += 3
    prior = isotropic_prior(source, variance=0.1)
    start = {n: t.clone() for n, t in tiny_resnet().state_dict().items()}
    arguments = quiet_arguments(tmp_path, prior_initialize=initialize)
    trainer = PriorTrainer(model=tiny_resnet(), prior=prior, args=arguments, train_dataset=image_data(4))
    assert prior.buffers
    for name, tensor in trainer.model.state_dict().items():
        known = {**prior.mean, **prior.buffers}
        assert torch.equal(tensor, known[name] if initialize and name in known else start[name]), name


@pytest.mark.parametrize("from_model_init", [False, True])
def test_a_trainer_that_only_evaluates_keeps_the_models_weights_and_says_so(tmp_path, monkeypatch, from_model_init):
    from prior_hub.finetuning import trainer as module

    said: list[str] = []
    monkeypatch.setattr(module.logger, "info", said.append)
    finetuned, data = tiny_resnet(seed=9), image_data(8)
    given = {"model_init": lambda: finetuned} if from_model_init else {"model": finetuned}
    before = {n: t.clone() for n, t in finetuned.state_dict().items()}
    prior = isotropic_prior(tiny_resnet(), variance=0.1)
    evaluating = PriorTrainer(**given, prior=prior, args=quiet_arguments(tmp_path), eval_dataset=data)
    evaluating.evaluate()
    evaluating.predict(data)
    assert all(torch.equal(tensor, before[n]) for n, tensor in finetuned.state_dict().items())
    assert any("no train_dataset, so the model keeps its own weights" in line for line in said)
    said.clear()
    PriorTrainer(**given, prior=prior, args=quiet_arguments(tmp_path), train_dataset=data)
    assert all(torch.equal(finetuned.get_parameter(n), mean) for n, mean in prior.mean.items())  # with one it trains
    assert not any("keeps its own weights" in line for line in said)


@pytest.mark.parametrize("refused", ["no N", "all frozen", "optimizer", "head variance", "auto"])
def test_a_refused_setup_leaves_the_model_as_it_came(tmp_path, refused):
    model, data, settings, more = tiny_vit(), image_data(4), {}, {}
    prior = random_prior(model)
    if refused == "no N":
        data, settings = Stream(data), {"max_steps": 1}
    elif refused == "all frozen":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("classifier"))
    elif refused == "optimizer":
        settings = {"optim": "lomo"}
    elif refused == "auto":  # with an optimizer that was given
        settings, more = {"prior_scale": "auto"}, {"optimizers": (torch.optim.SGD(model.parameters(), lr=0.1), None)}
    args = quiet_arguments(tmp_path, **settings)
    if refused == "head variance":
        args.prior_head_variance = -1.0  # as a hyperparameter search may set it
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises((ValueError, PriorMatchError)):
        PriorTrainer(model=model, prior=prior, args=args, train_dataset=data, **more)
    assert all(torch.equal(tensor, before[n]) for n, tensor in model.state_dict().items())


def test_model_init_starts_every_run_from_the_mean(tmp_path):
    prior = random_prior(tiny_vit())
    starts = []

    class Start(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kwargs):
            starts.append({n: p.detach().clone() for n, p in model.named_parameters()})

    arguments = quiet_arguments(tmp_path, max_steps=2, learning_rate=RATE)
    trainer = PriorTrainer(
        model_init=lambda: tiny_vit(), prior=prior, args=arguments, train_dataset=image_data(8), callbacks=[Start()]
    )
    models = []
    for _ in range(2):
        trainer.train()
        models.append(trainer.model)
    assert models[0] is not models[1]
    for start in starts:
        for name, mean in prior.mean.items():
            assert torch.equal(start[name], mean)
    assert logs(trainer, "prior_loss")[0] == 0.0
    assert logs(trainer, "prior_loss")[1] > 0.0
    # the prior is bound to the new model's parameters
    assert float(trainer.prior_penalty.penalty()) == pytest.approx(
        dense_penalty(prior, {n: trainer.model.get_parameter(n) for n in prior.mean})[0], rel=1e-5
    )


def test_prior_rank_keeps_the_most_recent_deviations(tmp_path):
    prior = random_prior(tiny_vit(), rank=4)
    for rank in (0, 2):
        watch, trainer = watched(tiny_vit(), prior, tmp_path, image_data(), max_steps=1, prior_rank=rank)
        nats, _ = dense_penalty(prior.truncated(rank), {n: watch.weights[0][n] for n in prior.mean})
        assert logs(trainer, "prior_loss") == [pytest.approx(nats / 26, rel=1e-5)]
        assert trainer.prior_penalty.gaussian.rank == rank


def test_prior_name_map_on_mismatch_and_coverage_reach_the_matching(tmp_path):
    source = tiny_vit()
    parts = random_prior(source)

    def renamed(name: str) -> str:
        return name.replace("vit.", "trunk.", 1)

    prior = PriorModel.from_tensors(
        {renamed(n): t for n, t in parts.mean.items()}, {renamed(n): t for n, t in parts.variance.items()}
    )
    given = {"args": quiet_arguments(tmp_path), "train_dataset": image_data(4)}
    trainer = PriorTrainer(model=tiny_vit(), prior=prior, prior_name_map={r"^trunk\.": "vit."}, **given)
    assert set(trainer.prior_penalty.match.pairs.values()) == set(parts.mean)
    for name, mean in parts.mean.items():
        assert torch.equal(trainer.model.get_parameter(name), mean)
    wider = tiny_vit(intermediate_size=20)
    with pytest.raises(PriorMatchError, match="differ in shape"):
        PriorTrainer(model=wider, prior=parts, **given)
    dropping = given | {"args": quiet_arguments(tmp_path, prior_on_mismatch="drop", prior_min_coverage=0.2)}
    assert PriorTrainer(model=wider, prior=parts, **dropping).prior_penalty.match.dropped
    with pytest.raises(PriorMatchError, match="min_coverage"):
        PriorTrainer(
            model=wider,
            prior=parts,
            **(given | {"args": quiet_arguments(tmp_path, prior_on_mismatch="drop", prior_min_coverage=0.99)}),
        )


def test_prior_include_head_binds_the_head_too(tmp_path):
    source = tiny_vit()
    whole = random_prior(source, head=())
    prior = PriorModel.from_tensors(
        whole.mean, whole.variance, whole.deviations, head_parameters=("classifier.weight", "classifier.bias")
    )
    for include in (False, True):
        arguments = quiet_arguments(tmp_path, prior_include_head=include)
        trainer = PriorTrainer(model=tiny_vit(), prior=prior, args=arguments, train_dataset=image_data(4))
        assert ("classifier.weight" in trainer.prior_penalty.covered_names) is include
        assert torch.equal(trainer.model.classifier.weight, prior.mean["classifier.weight"]) is include


def test_plain_training_arguments_take_the_defaults(tmp_path):
    prior = random_prior(tiny_vit(), scale=3.0)
    trainer = PriorTrainer(
        model=tiny_vit(), prior=prior, args=quiet_arguments(tmp_path, TrainingArguments), train_dataset=image_data(4)
    )
    assert trainer.prior_penalty.gaussian.scale == 3.0
    positional = PriorTrainer(tiny_vit(), quiet_arguments(tmp_path, prior_scale=2.0), None, image_data(4), prior=prior)
    assert positional.prior_penalty.gaussian.scale == 2.0


@ignoring_miscaled_heads
def test_the_mixin_gives_a_seq2seq_trainer_a_prior(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    class PriorSeq2SeqTrainer(PriorTrainerMixin, Seq2SeqTrainer):
        pass

    @dataclasses.dataclass
    class Arguments(PriorArgumentsMixin, Seq2SeqTrainingArguments):
        pass

    def tiny_t5():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            settings = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
            return T5ForConditionalGeneration(T5Config(vocab_size=24, decoder_start_token_id=0, **settings))

    data = text_data(8, token_labels=True)
    prior = random_prior(tiny_t5(), head=())
    settings = {"max_steps": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-4}
    watch = Watch()
    arguments = quiet_arguments(tmp_path, Arguments, prior_num_examples=48, prior_initialize=False, **settings)
    trainer = PriorSeq2SeqTrainer(model=tiny_t5(), prior=prior, args=arguments, train_dataset=data, callbacks=[watch])
    trainer.train()
    plain = tiny_t5()
    plain.accepts_loss_kwargs = False  # T5's loss ignores num_items_in_batch
    lead, _ = replayed(plain, watch, tmp_path, data, **settings)
    assert multiplicities(prior, watch, lead, 48) == pytest.approx([1, 1], abs=ONCE)
