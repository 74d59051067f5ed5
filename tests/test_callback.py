"""SwagCallback: the prior of the weights that a Trainer visits, the same whether or not the run was interrupted."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from hub_fixtures import fresh_repo_id
from models import image_data, quiet_arguments, text_data, tiny_bert, tiny_resnet, tiny_vit
from priors_for_tests import differences
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator
from transformers.trainer_callback import ExportableState

from prior_hub import (
    PriorFormatError,
    PriorHubError,
    PriorMatchError,
    PriorModel,
    PriorNumericsError,
    PriorWarning,
    SwagCallback,
    SwagEstimator,
    push_prior_to_hub,
)

torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def _imported_modules_are_no_garbage():
    """Trainer collects garbage whenever it starts; searching all of transformers took four fifths of these tests' time."""
    gc.freeze()
    yield
    gc.unfreeze()


BATCH = 4


class Recorder(TrainerCallback):
    """The weights after each optimizer step, of the run that began last."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, Tensor]] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.weights = {}

    def on_step_end(self, args, state, control, model, **kwargs):
        self.weights[state.global_step] = {n: p.detach().clone() for n, p in model.named_parameters()}


def trainer_with(folder, *callbacks, model=None, data=None, **settings) -> Trainer:
    defaults = {
        "learning_rate": 0.05,
        "optim_args": "momentum=0.9",
        "train_sampling_strategy": "random",
        "per_device_train_batch_size": BATCH,
        "max_steps": 12,
    }
    return Trainer(
        model=tiny_resnet() if model is None else model,
        args=quiet_arguments(folder, TrainingArguments, **(defaults | settings)),
        train_dataset=image_data() if data is None else data,
        callbacks=list(callbacks),
    )


def every_step(**settings) -> SwagCallback:
    return SwagCallback(**{"rank": 3, "start": 2, "every_n_steps": 1, **settings})


def assert_same(found: PriorModel, expected: PriorModel) -> None:
    """Bit for bit: every tensor, every buffer, and the configuration (names are in no particular order)."""
    for kind in ("mean", "variance", "deviations", "buffers"):
        a, b = getattr(found, kind), getattr(expected, kind)
        assert a.keys() == b.keys()
        for name, tensor in a.items():
            assert torch.equal(tensor, b[name]), f"{kind}.{name}"
    a, b = (prior.config.replace(buffers=tuple(sorted(prior.config.buffers))) for prior in (found, expected))
    assert a == b


def snapshot_steps(callback: SwagCallback, folder, **settings) -> list[int]:
    """The optimizer steps after which a snapshot is taken."""
    steps: list[int] = []
    trainer = trainer_with(folder, callback, model=tiny_vit(), **settings)
    original = callback.estimator.update

    def update(model: nn.Module) -> None:
        steps.append(trainer.state.global_step)
        original(model)

    callback.estimator.update = update  # type: ignore[method-assign]
    trainer.train()
    return steps


# ------------------------------------------------------------------------------------------------------ what it learns


def test_prior_is_that_of_the_weights_visited(tmp_path):
    recorder, callback = Recorder(), every_step()
    trainer_with(tmp_path, recorder, callback).train()
    prior = callback.prior()
    steps = range(3, 13)  # after the second step, so from the third on
    assert prior.config.num_snapshots == len(steps)
    for name, mean in prior.mean.items():
        visited = torch.stack([recorder.weights[step][name] for step in steps]).double()
        torch.testing.assert_close(mean.double(), visited.mean(0), rtol=1e-6, atol=1e-7)  # float32 running mean
        torch.testing.assert_close(prior.variance[name].double(), visited.var(0).clamp(min=1e-12), rtol=1e-3, atol=1e-11)
        newest_first = visited.flip(0)[:3] - visited.mean(0)
        torch.testing.assert_close(prior.deviations[name].double(), newest_first, rtol=1e-5, atol=1e-6)
    assert not any(name.startswith("classifier") for name in prior.mean)
    assert prior.config.head_parameters == ("classifier.1.weight", "classifier.1.bias")


def test_batch_norm_statistics_are_those_at_the_mean_and_the_model_keeps_its_own(tmp_path):
    callback = every_step()
    trainer = trainer_with(tmp_path, callback, train_sampling_strategy="sequential")
    seen = {}

    class Before(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            seen.update({n: t.detach().clone() for n, t in model.state_dict().items()})

    trainer.add_callback(Before())
    trainer.train()
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, seen[name]), name  # as after the last step
    prior = callback.prior()
    reference = tiny_resnet()
    reference.load_state_dict({**trainer.model.state_dict(), **prior.mean})
    statistics: dict[str, list[Tensor]] = {}
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = 1.0  # the running statistics are those of the batch
    data = image_data()
    for start in range(0, len(data), BATCH):
        reference.train()
        reference(**default_data_collator(data[start : start + BATCH]))
        for name, buffer in reference.named_buffers():
            statistics.setdefault(name, []).append(buffer.double().clone())
    assert prior.buffers.keys() == statistics.keys()
    for name, buffer in prior.buffers.items():
        if name.endswith("num_batches_tracked"):
            assert int(buffer) == 7
        else:
            expected = torch.stack(statistics[name]).mean(0)
            torch.testing.assert_close(buffer.double(), expected, rtol=1e-5, atol=1e-6, msg=name)  # float32 running mean
    assert prior.config.estimator["batch_norm"] == "recomputed at the mean"


def test_batch_norm_last_keeps_the_statistics_of_the_last_snapshot(tmp_path):
    callback = every_step(batch_norm="last")
    trainer = trainer_with(tmp_path, callback)
    trainer.train()
    own = dict(trainer.model.named_buffers())
    prior = callback.prior()
    assert prior.buffers.keys() == own.keys()
    assert all(torch.equal(buffer, own[name]) for name, buffer in prior.buffers.items())
    assert prior.config.estimator["batch_norm"] == "last snapshot"


def test_batch_norm_batches_limits_the_pass(tmp_path):
    callback = every_step(batch_norm_batches=2)
    trainer_with(tmp_path, callback).train()
    tracked = [int(b) for n, b in callback.prior().buffers.items() if n.endswith("num_batches_tracked")]
    assert tracked
    assert set(tracked) == {2}


class TiedNet(nn.Module):
    """Tied weights and BatchNorm in the body, and in the head BatchNorm too."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.stem = nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.BatchNorm1d(5))
            self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
            self.second.weight = self.first.weight
            self.fc = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3))

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.fc(self.second(self.first(self.stem(pixel_values)).tanh()))
        return {"logits": logits} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.hub
@pytest.mark.parametrize("max_shard_size", ["5GB", 2000])
@pytest.mark.parametrize("learner", ["callback", "estimator"])
def test_a_learned_prior_goes_through_a_folder_and_the_hub_bit_for_bit(tmp_path, learner, max_shard_size):
    callback = every_step(batch_norm="recompute")
    trainer_with(tmp_path / "run", callback, model=TiedNet()).train()
    facts = {"base_model": "org/tied", "dataset": ["org/images", "org/more"], "license": "mit", "scale": 1e4, "eps": 1e-9}
    if learner == "callback":
        prior = callback.prior(**facts)
        assert prior.config.estimator["learning_rate"] == [0.05, 0.05]
    else:
        prior = callback.estimator.prior(**facts, deviations_dtype=torch.bfloat16, source={"epochs": 3})
    assert prior.config.tied_parameters == {"second.weight": "first.weight"}
    assert prior.buffers["stem.2.num_batches_tracked"].dtype == torch.int64
    assert {name.split(".")[0] for name in prior.buffers} == {"stem"}
    prior.save_pretrained(tmp_path / "folder", max_shard_size=max_shard_size)
    assert (len(list((tmp_path / "folder").glob("*.safetensors"))) > 1) is (max_shard_size != "5GB")
    assert differences(PriorModel.from_pretrained(tmp_path / "folder"), prior) == []
    name = push_prior_to_hub(tmp_path / "folder", fresh_repo_id("learned")).repo_id
    found = PriorModel.from_pretrained(name, cache_dir=tmp_path / "cache")
    assert differences(found, prior) == []
    model = TiedNet()
    assert len(found.initialize(model).pairs) == len(prior.mean)
    assert torch.equal(model.second.weight, prior.mean["first.weight"])
    assert torch.equal(model.stem[2].num_batches_tracked, prior.buffers["stem.2.num_batches_tracked"])


def test_prior_records_where_it_comes_from(tmp_path):
    callback = every_step(rank=4, every_n_steps=2)
    settings = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 0.01}}
    trainer_with(tmp_path, callback, **settings).train()
    config = callback.prior(base_model="org/model", dataset="cifar10", estimator={"note": "mine"}).config
    assert config.base_model == "org/model"
    assert config.source == {"dataset": "cifar10"}
    recorded = dict(config.estimator)
    first, last = recorded.pop("learning_rate")
    assert first > last
    assert last == pytest.approx(0.01)
    expected = {"name": "swag", "rank": 4, "snapshots": 5, "start_step": 2, "every_n_steps": 2, "note": "mine"}
    assert expected.items() <= recorded.items()


# -------------------------------------------------------------------------------------------------------------- when


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        pytest.param({"start": 0.5}, [7, 8, 9, 10, 11, 12], id="share of training"),
        pytest.param({"start": 4}, [5, 6, 7, 8, 9, 10, 11, 12], id="number of steps"),
        pytest.param({"start": 0}, list(range(1, 13)), id="from the beginning"),
        pytest.param({"start": 0.0}, list(range(1, 13)), id="share of nothing"),
        pytest.param({"start": 1}, list(range(2, 13)), id="the integer one is a step, not all of training"),
        pytest.param({"start": 3, "every_n_steps": 3}, [6, 9, 12], id="every third"),
        pytest.param({"start": 0.3, "every_n_steps": 4}, [7, 11], id="rounded down, last step left out"),
    ],
)
def test_snapshots_are_taken_after_start_every_n_steps(tmp_path, settings, expected):
    assert snapshot_steps(every_step(rank=2, **settings), tmp_path) == expected


def test_without_every_n_steps_about_twice_the_rank_snapshots_are_spread_over_what_is_left(tmp_path):
    few = snapshot_steps(every_step(start=20, every_n_steps=None), tmp_path, max_steps=140)
    assert few == list(range(24, 141, 4))  # 30 at least: 120 steps / 30
    many = snapshot_steps(every_step(start=0.0, every_n_steps=None, rank=20), tmp_path, max_steps=80)
    assert many == list(range(2, 81, 2))  # 2 x rank = 40


def test_accumulation_counts_optimizer_steps(tmp_path):
    callback = every_step(rank=2)
    assert snapshot_steps(callback, tmp_path, max_steps=4, gradient_accumulation_steps=3, per_device_train_batch_size=2) == [
        3,
        4,
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": 1.0}, "0 <= start < 1; give steps as an int"),
        ({"start": -0.1}, "share of training"),
        ({"start": -1}, "0 or more steps"),
        ({"every_n_steps": 0}, "1 or more"),
        ({"batch_norm": "none"}, "'recompute' or 'last'"),
        ({"rank": -1}, "0 .diagonal only. or more"),
        ({"swa_lr": 0.0}, "swa_lr is 0.0, expected a number > 0"),
        ({"schedule": "cosine"}, "'constant' or 'cyclic'"),
        ({"schedule": "cyclic"}, "pass swa_lr, the learning rate after start"),
        ({"swa_lr": 0.1, "swa_lr_min": 0.01}, "pass schedule='cyclic' too"),
        ({"swa_lr": 0.1, "schedule": "cyclic"}, "needs swa_lr_min, the low end"),
        ({"swa_lr": 0.1, "schedule": "cyclic", "swa_lr_min": 0.2}, "0 < swa_lr_min <= swa_lr=0.1; it is 0.2"),
    ],
)
def test_impossible_settings_are_value_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        every_step(**settings)


# ----------------------------------------------------------------------------------------------------------- warnings


def test_fewer_snapshots_than_rank_warn_before_training(tmp_path):
    callback = every_step(rank=5, start=8)
    with pytest.warns(PriorWarning, match=r"12 steps with start=8 and every 1 steps give 4 snapshots, fewer than rank=5"):
        trainer_with(tmp_path, callback).train()
    assert callback.prior().rank == 4  # those there are


def test_start_after_the_end_warns_and_has_no_prior(tmp_path):
    callback = every_step(start=100)
    with pytest.warns(PriorWarning, match="give 0 snapshots"):
        trainer_with(tmp_path, callback).train()
    with pytest.raises(PriorNumericsError, match="two snapshots, there are 0"):
        callback.prior()


def test_a_learning_rate_that_decays_to_nothing_warns_also_across_a_resume(tmp_path):
    settings = {"lr_scheduler_type": "linear", "save_strategy": "steps", "save_steps": 11}
    with pytest.warns(PriorWarning, match=r"the learning rate fell from 0\.0375 to 0"):
        trainer_with(tmp_path, every_step(), **settings).train()
    with pytest.warns(PriorWarning, match=r"the learning rate fell from 0\.0375 to 0"):  # one snapshot is left after step 11
        trainer_with(tmp_path, every_step(), **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-11"))


# ------------------------------------------------------------------------------------------------------ source models


def wrapped_timm() -> nn.Module:
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    return TimmWrapperForImageClassification(TimmWrapperConfig(architecture="test_byobnet", num_labels=3))


@pytest.mark.parametrize(
    ("make", "head"),
    [
        pytest.param(tiny_resnet, "classifier.", id="ResNetForImageClassification"),
        pytest.param(tiny_vit, "classifier.", id="ViTForImageClassification"),
        pytest.param(tiny_bert, "classifier.", id="BertForSequenceClassification"),
        pytest.param(wrapped_timm, "timm_model.head.fc.", id="timm in transformers"),
        pytest.param(lambda: timm.create_model("test_byobnet", num_classes=3), "head.fc.", id="timm"),
    ],
)
def test_a_supervised_source_of_any_kind_gives_a_prior_over_all_but_its_head(tmp_path, make, head):
    model, callback = make(), every_step(swa_lr=0.01)
    plain = type(model).__module__.startswith("timm.")
    data = text_data() if "Bert" in type(model).__name__ else image_data()
    if plain:
        data = [{"x": row["pixel_values"], "labels": row["labels"]} for row in data]
    settings = {"max_steps": 6, "per_device_train_batch_size": 4, "lr_scheduler_type": "linear"}
    args = quiet_arguments(tmp_path, TrainingArguments, **settings, remove_unused_columns=not plain)
    loss = (lambda logits, labels, **_: nn.functional.cross_entropy(logits, labels)) if plain else None
    Trainer(model, args, train_dataset=data, callbacks=[callback], compute_loss_func=loss).train()
    prior = callback.prior()
    names = [n for n, _ in model.named_parameters()]
    assert list(prior.mean) == [n for n in names if not n.startswith(head)]
    assert prior.config.head_parameters == tuple(n for n in names if n.startswith(head)) != ()
    assert any(v.max() > 1e-9 for v in prior.variance.values())


# ------------------------------------------------------------------------------------------------------- learning rate


class Rates(TrainerCallback):
    """The learning rates that the optimizer had when it took each step, from a hook in the optimizer itself."""

    def __init__(self) -> None:
        self.used: list[list[float]] = []

    def on_train_begin(self, args, state, control, optimizer, **kwargs):
        own = optimizer.optimizer  # inside accelerate's wrapper
        own.register_step_pre_hook(lambda *_: self.used.append([float(g["lr"]) for g in own.param_groups]))


CYCLIC = {"schedule": "cyclic", "swa_lr": 0.05, "swa_lr_min": 0.01}


def rates_of(folder, callback, *, make_scheduler=None, factors=(1.0,), **settings) -> tuple[list[list[float]], Trainer]:
    """(rates of each step and group, trainer) of 12 steps from 0.02 with SGD; the parameters are dealt out to the groups."""
    model, rates = tiny_resnet(), Rates()  # tiny_vit: transformers 5.24 does not find the weights of its own checkpoint
    dealt = [list(model.parameters())[i :: len(factors)] for i in range(len(factors))]
    groups = [{"params": p, "lr": 0.02 * f} for p, f in zip(dealt, factors, strict=True)]
    optimizer = torch.optim.SGD(groups, lr=0.02)
    scheduler = None if make_scheduler is None else make_scheduler(optimizer)
    if settings.get("lr_scheduler_type") == "reduce_lr_on_plateau":
        settings |= {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss", "greater_is_better": True}
        settings |= {"lr_scheduler_kwargs": {"patience": 0, "mode": "max", "threshold": 1e3}}
    args = quiet_arguments(folder, TrainingArguments, **({"max_steps": 12, "learning_rate": 0.02} | settings))
    data, callbacks = image_data(), [c for c in (callback, rates) if c is not None]
    trainer = Trainer(
        model, args, train_dataset=data, eval_dataset=data[:2], callbacks=callbacks, optimizers=(optimizer, scheduler)
    )
    trainer.train(resume_from_checkpoint=settings.get("resume_from_checkpoint"))
    return rates.used, trainer


SCHEDULERS = [
    pytest.param({"lr_scheduler_type": "linear"}, None, id="linear"),
    pytest.param({"lr_scheduler_type": "cosine", "warmup_steps": 3}, None, id="cosine with warmup"),
    pytest.param({"lr_scheduler_type": "reduce_lr_on_plateau"}, None, id="plateau"),
    pytest.param({}, lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7), id="a chained one"),
]


@pytest.mark.parametrize(("settings", "make_scheduler"), SCHEDULERS)
def test_after_start_our_rate_is_the_one_that_is_used_and_logged(tmp_path, settings, make_scheduler):
    """Whatever the scheduler says, before start it is the scheduler's; groups keep their ratio, the first is logged."""
    callback = every_step(start=4, swa_lr=0.03)
    used, trainer = rates_of(tmp_path, callback, make_scheduler=make_scheduler, factors=(0.1, 1.0), **settings)
    plain, _ = rates_of(tmp_path, None, make_scheduler=make_scheduler, factors=(0.1, 1.0), **settings)
    assert used[:4] == plain[:4]
    assert used[4:] == [[pytest.approx(0.003), 0.03]] * 8
    assert plain[-1][1] < 0.02  # the scheduler's own had fallen
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert logged == [first for first, _ in used]
    assert callback.prior().config.estimator["learning_rate"] == [0.03, 0.03]


def test_a_cycle_falls_linearly_and_snapshots_are_taken_at_its_low_end(tmp_path):
    """Izmailov et al. 2018, section 3.1, by hand: 4 steps from 0.05 to 0.01, so 0.04, 0.03, 0.02, 0.01."""
    callback = every_step(start=3, every_n_steps=4, rank=2, **CYCLIC)
    used, trainer = rates_of(tmp_path, callback, lr_scheduler_type="linear")
    fall = [0.04, 0.03, 0.02, 0.01]
    assert [rate for (rate,) in used[3:]] == pytest.approx([*fall, *fall, 0.04])
    assert [entry["learning_rate"] for entry in trainer.state.log_history[:-1]] == [rate for (rate,) in used]
    recorded = callback.prior().config.estimator
    expected = {"schedule": "cyclic", "swa_lr": 0.05, "swa_lr_min": 0.01, "learning_rate": [0.01, 0.01], "snapshots": 2}
    assert expected.items() <= recorded.items()


def test_the_rate_is_ours_from_the_first_step_where_start_is_0(tmp_path):
    used, _ = rates_of(tmp_path, every_step(start=0, swa_lr=0.4), lr_scheduler_type="linear", gradient_accumulation_steps=2)
    assert used == [[0.4]] * 12


def test_a_cycle_of_one_step_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 2 steps"):
        rates_of(tmp_path, every_step(every_n_steps=1, **CYCLIC))


@pytest.mark.parametrize(("settings", "make_scheduler"), SCHEDULERS)
def test_a_resumed_run_has_the_same_rates_and_weights(tmp_path, settings, make_scheduler):
    """Two groups, under schedulers that record an initial rate and one that does not."""
    callback = {"start": 2, "every_n_steps": 5, "rank": 1, **CYCLIC}
    arguments = {"make_scheduler": make_scheduler, "factors": (0.3, 1.0), "save_strategy": "steps", "save_steps": 6, **settings}
    used, whole = rates_of(tmp_path, every_step(**callback), **arguments)
    again, resumed = rates_of(
        tmp_path, every_step(**callback), **arguments, resume_from_checkpoint=str(tmp_path / "checkpoint-6")
    )
    assert again == used[6:]
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_without_swa_lr_trainers_schedule_is_left_alone(tmp_path):
    with pytest.warns(PriorWarning, match=r"SwagCallback\(swa_lr=...\), which takes over after start"):
        used, _ = rates_of(tmp_path, every_step(), lr_scheduler_type="linear")
    assert used == rates_of(tmp_path, None, lr_scheduler_type="linear")[0]


# -------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize(
    ("settings", "saved"),
    [
        pytest.param({}, 8, id="the ring has wrapped"),
        pytest.param({"rank": 8}, 4, id="the ring is not full"),
        pytest.param({"start": 0.5}, 5, id="before the first snapshot"),
        pytest.param({"every_n_steps": 4}, 9, id="between two snapshots"),
        pytest.param({"batch_norm": "last", "rank": 0}, 7, id="epoch boundary, last statistics, diagonal"),
        pytest.param({"device": "cpu", "snapshots_dtype": torch.bfloat16}, 12, id="after the last step, bfloat16"),
        pytest.param({"swa_lr": 0.03}, 8, id="constant rate of our own"),
        pytest.param(
            {"swa_lr": 0.04, "swa_lr_min": 0.01, "schedule": "cyclic", "every_n_steps": 3}, 7, id="in the middle of a cycle"
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*fewer than rank")  # few steps, so that the test is quick
def test_a_resumed_run_gives_the_same_prior_bit_for_bit(tmp_path, settings, saved):
    """A model with BatchNorm, momentum, shuffled data, and a checkpoint in the middle of the snapshots."""
    whole = every_step(**settings)
    trainer_with(
        tmp_path / "whole", whole, lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr": 0.01}
    ).train()

    arguments = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 0.01}}
    arguments |= {"save_strategy": "steps", "save_steps": saved}
    first = trainer_with(tmp_path / "parts", every_step(**settings), **arguments)
    first.add_callback(Stop(saved))
    first.train()
    resumed = every_step(**settings)
    trainer_with(tmp_path / "parts", resumed, model=tiny_resnet(seed=9), **arguments).train(
        resume_from_checkpoint=str(tmp_path / "parts" / f"checkpoint-{saved}")
    )
    assert_same(resumed.prior(), whole.prior())


class Augmented(Dataset):
    """Images with fresh noise each time they are read, from torch's global random numbers."""

    def __init__(self):
        self.rows = image_data()

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        return row | {"pixel_values": row["pixel_values"] + torch.randn_like(row["pixel_values"])}


class Draws(TrainerCallback):
    """Somebody else who draws random numbers before the pass."""

    def on_train_end(self, args, state, control, **kwargs):
        torch.rand(3)


def test_augmentation_in_the_pass_for_batch_norm_does_not_depend_on_what_was_drawn_before(tmp_path):
    quiet, drawn = every_step(), every_step()
    trainer_with(tmp_path, quiet, data=Augmented()).train()
    trainer_with(tmp_path, Draws(), drawn, data=Augmented()).train()
    assert_same(drawn.prior(), quiet.prior())


class Stop(TrainerCallback):
    """Ends training after a step, as an interruption does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def checkpointed(folder, *callbacks, step: int = 6, **settings) -> str:
    trainer_with(folder, *callbacks, save_strategy="steps", save_steps=step, max_steps=12, **settings).train()
    return str(folder / f"checkpoint-{step}")


def test_state_in_a_checkpoint_is_safetensors_and_json_and_not_in_trainers_own_state(tmp_path):
    plain, ours = tmp_path / "plain", tmp_path / "ours"
    checkpointed(plain)
    checkpoint = checkpointed(ours, every_step())
    new = {p.name for p in (ours / "checkpoint-6").iterdir()} - {p.name for p in (plain / "checkpoint-6").iterdir()}
    assert new == {"swag_state.safetensors", "swag_learning_rates.json"}
    assert not isinstance(every_step(), ExportableState)
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text())
    assert "SwagCallback" not in state["stateful_callbacks"]


def test_resuming_without_the_state_says_what_is_missing_and_what_to_pass(tmp_path):
    checkpoint = checkpointed(tmp_path)
    with pytest.raises(
        PriorHubError, match=r"after the first snapshot, but .*swag_state.safetensors is not there.*resume_from"
    ):
        trainer_with(tmp_path, every_step()).train(resume_from_checkpoint=checkpoint)


def test_resuming_on_another_number_of_processes_says_on_how_many(tmp_path):
    checkpoint = Path(checkpointed(tmp_path, every_step()))
    (checkpoint / "swag_state.safetensors").rename(checkpoint / "swag_state-00000-of-00002.safetensors")
    with pytest.raises(PriorHubError, match=r"other processes .*swag_state-00000-of-00002.safetensors.* as many processes"):
        trainer_with(tmp_path, every_step()).train(resume_from_checkpoint=str(checkpoint))


def test_resuming_before_the_first_snapshot_needs_no_state_and_saves_its_own(tmp_path):
    """A callback unknown to the checkpoint must not break the next save either."""
    checkpoint = checkpointed(tmp_path)
    callback = every_step(start=6)
    trainer_with(tmp_path, callback, save_strategy="steps", save_steps=6).train(resume_from_checkpoint=checkpoint)
    assert callback.estimator.num_snapshots == 6
    assert (tmp_path / "checkpoint-12" / "swag_state.safetensors").is_file()


def test_resume_from_names_a_checkpoint_elsewhere(tmp_path):
    whole = every_step()
    checkpoint = checkpointed(tmp_path / "old", whole)
    moved = tmp_path / "new place"
    shutil.copytree(checkpoint, moved)
    resumed = every_step(resume_from=moved)
    trainer_with(tmp_path / "out", resumed).train(resume_from_checkpoint=str(moved))
    assert_same(resumed.prior(), whole.prior())


def test_the_state_of_another_run_or_step_is_refused_though_the_model_fits(tmp_path):
    """Resumed from a checkpoint elsewhere, while `output_dir` holds a checkpoint of the same step of another run."""
    checkpoint = checkpointed(tmp_path / "A", whole := every_step())
    checkpointed(tmp_path / "B", every_step(), model=tiny_resnet(seed=1))
    message = (
        r"B.checkpoint-6.swag_state.safetensors is the state of another run.*: \d+ of the model's \d+ trained .*resume_from"
    )
    with pytest.raises(PriorMatchError, match=message):
        trainer_with(tmp_path / "B", every_step()).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(PriorMatchError, match="another step"):
        trainer_with(tmp_path / "A", every_step(resume_from=tmp_path / "A" / "checkpoint-12")).train(
            resume_from_checkpoint=checkpoint
        )
    resumed = every_step(resume_from=checkpoint)
    trainer_with(tmp_path / "B", resumed).train(resume_from_checkpoint=checkpoint)
    assert_same(resumed.prior(), whole.prior())


def test_one_bit_of_one_weight_is_noticed_and_frozen_ones_do_not_count(tmp_path):
    model = tiny_resnet()
    frozen = next(p for n, p in model.named_parameters() if "embedder" in n)
    frozen.requires_grad_(False)
    estimator = SwagEstimator(rank=1, head=("classifier",))
    estimator.update(model)
    estimator.save(tmp_path / "state", model=model)

    def attached() -> None:
        other = SwagEstimator(rank=1, head=("classifier",))
        other.load(tmp_path / "state")
        other.attach(model)

    with torch.no_grad():
        frozen.add_(1.0)  # adapters are saved without the frozen weights beneath them
    attached()
    weight = model.classifier[1].weight
    with torch.no_grad():
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    with pytest.raises(PriorMatchError, match=r": 1 of the model's \d+ trained tensors \('classifier.1.weight'\)"):
        attached()


def test_a_state_without_digests_of_weights_still_resumes(tmp_path):
    """As earlier versions wrote it."""
    whole = every_step()
    checkpoint = checkpointed(tmp_path, whole)
    path = Path(checkpoint) / "swag_state.safetensors"
    with safe_open(path, framework="pt") as handle:
        header = json.loads(handle.metadata()["swag"])
    del header["weights"]
    save_file(load_file(path), path, metadata={"format": "pt", "swag": json.dumps(header)})
    resumed = every_step()
    trainer_with(tmp_path, resumed, model=tiny_resnet(seed=9)).train(resume_from_checkpoint=checkpoint)
    assert_same(resumed.prior(), whole.prior())


def test_a_state_taken_otherwise_or_of_another_model_is_refused(tmp_path):
    checkpoint = checkpointed(tmp_path, every_step())
    with pytest.raises(PriorFormatError, match="taken with rank=3, this estimator has 4"):
        trainer_with(tmp_path, every_step(rank=4)).train(resume_from_checkpoint=checkpoint)
    other = every_step(resume_from=checkpoint)
    trainer = trainer_with(tmp_path, other, model=tiny_bert())
    trainer.state.global_step, trainer.state.max_steps = 6, 12
    with pytest.raises(PriorMatchError, match="not the model of the first snapshot"):
        other.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)


# ------------------------------------------------------------------------------------------------------ starting again


def test_a_second_train_forgets_the_first(tmp_path):
    """The estimate is of the second run alone."""
    recorder, callback = Recorder(), every_step()
    trainer = trainer_with(tmp_path, recorder, callback)
    trainer.train()
    first = callback.prior()
    trainer.train()
    second = callback.prior()
    assert second.config.num_snapshots == first.config.num_snapshots == 10
    for name, mean in second.mean.items():
        visited = torch.stack([recorder.weights[step][name] for step in range(3, 13)]).double()
        torch.testing.assert_close(mean.double(), visited.mean(0), rtol=1e-6, atol=1e-7)  # float32 running mean


def test_a_restart_with_a_smaller_batch_forgets_the_failed_attempt(tmp_path):
    """auto_find_batch_size starts the loop again with the same callbacks."""

    class OutOfMemory(TrainerCallback):
        failed = 0

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 7 and not self.failed:
                self.failed += 1
                raise RuntimeError("CUDA out of memory.")

    recorder, failing, callback = Recorder(), OutOfMemory(), every_step()
    trainer_with(tmp_path, recorder, callback, failing, auto_find_batch_size=True).train()
    assert failing.failed == 1
    prior = callback.prior()
    assert prior.config.num_snapshots == 10
    for name, mean in prior.mean.items():
        visited = torch.stack([recorder.weights[step][name] for step in range(3, 13)]).double()
        torch.testing.assert_close(mean.double(), visited.mean(0), rtol=1e-6, atol=1e-7)  # float32 running mean
