"""SWAG's estimate against two-pass float64 formulas, and its BatchNorm statistics against torch's."""

import copy
import json
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prior_hub import (
    PriorFormatError,
    PriorHubError,
    PriorMatchError,
    PriorModel,
    PriorNumericsError,
    PriorWarning,
    SwagEstimator,
    isotropic_prior,
    recompute_batch_norm,
)
from prior_hub.learning import moments, swag
from prior_hub.priors.matching import canonical_parameters


class Net(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.temperature = nn.Parameter(torch.tensor(1.0))
        self.fc = nn.Linear(4, classes)

    def forward(self, x):
        return self.fc(self.drop(self.norm(self.conv(x)).relu().mean((2, 3)))) * self.temperature


def walk(model, steps, *, seed=0, size=0.1):
    """A random walk of the weights; yields after every step."""
    g = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(size * torch.randn(p.shape, generator=g))
        yield


def collect(rank, steps, **options):
    torch.manual_seed(0)
    model, estimator, history = Net(), SwagEstimator(rank, **options), []
    for _ in walk(model, steps):
        estimator.update(model)
        history.append({n: p.detach().clone() for n, p in model.named_parameters()})
    return model, estimator, history


@pytest.mark.parametrize(("rank", "steps"), [(0, 5), (1, 4), (4, 3), (5, 5), (4, 11), (20, 30)])
def test_moments_and_deviations_equal_the_two_pass_formulas(rank, steps):
    _, estimator, history = collect(rank, steps)
    prior = estimator.prior()
    kept = min(rank, steps)
    assert (prior.rank, prior.config.num_snapshots) == (kept, steps)
    assert set(prior.mean) == {n for n in history[0] if not n.startswith("fc.")}
    for n in prior.mean:
        all_snapshots = np.stack([h[n].double().numpy() for h in history])
        mean = all_snapshots.mean(0)
        np.testing.assert_allclose(prior.mean[n], mean, rtol=2e-6, atol=1e-7)
        np.testing.assert_allclose(prior.variance[n], all_snapshots.var(0, ddof=1), rtol=1e-4)
        if kept:  # most recent first, about the FINAL mean
            np.testing.assert_allclose(prior.deviations[n], all_snapshots[::-1][:kept] - mean, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"scale": 3.0, "eps": 0.1, "deviations_dtype": torch.bfloat16, "license": "mit", "estimator": {"note": "mine"}},
        {"explained": 0.7, "deviations_dtype": torch.float16},
        {"buffers": {"norm.running_mean": torch.ones(4), "norm.running_var": torch.ones(4)}},
    ],
    ids=str,
)
@pytest.mark.parametrize("rank", [0, 1, 4])
def test_the_prior_is_written_tensor_by_tensor_as_it_is_saved_whole(tmp_path, rank, settings):
    _, estimator, _ = collect(rank, 6, variance_floor=0.005)
    folder = estimator.save_prior(tmp_path / "parts", dataset="synthetic", **settings)
    estimator.prior(dataset="synthetic", **settings).save_pretrained(tmp_path / "whole")
    assert folder == tmp_path / "parts"
    ours, theirs = PriorModel.from_pretrained(folder), PriorModel.from_pretrained(tmp_path / "whole")
    assert ours.config == theirs.config  # the hashes of the files, too
    assert ours.config.estimator["variance_entries_at_floor"] > 0
    assert (folder / "README.md").read_bytes() == (tmp_path / "whole" / "README.md").read_bytes()


def test_what_is_no_prior_is_not_written(tmp_path):
    _, estimator, _ = collect(2, 1)
    with pytest.raises(PriorNumericsError, match="two snapshots"):
        estimator.save_prior(tmp_path / "prior")
    model, moved, _ = collect(2, 4)
    with pytest.raises(TypeError, match="colour"):
        moved.save_prior(tmp_path / "prior", colour="blue")
    estimator = SwagEstimator(2, variance_floor=0.0)
    for _ in range(3):
        estimator.update(model)  # nothing moves
    with pytest.raises(PriorNumericsError, match="entries <= 0"):
        estimator.save_prior(tmp_path / "prior")
    assert not (tmp_path / "prior").exists()


def test_variance_survives_float32_where_the_spread_is_a_ten_thousandth_of_the_weight():
    """E[w^2] - mean^2 gives more than half non-positive entries here."""
    model = nn.ModuleDict({"body": nn.Linear(50, 50)})
    start = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    estimator, history = SwagEstimator(0, head=(), variance_floor=0.0), []
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.copy_(start[n] * (1 + 1e-4 * torch.randn(p.shape, generator=g)))
        estimator.update(model)
        history.append(model["body"].weight.detach().double().clone())
    exact = torch.stack(history).var(0)
    naive = torch.stack(history).float().square().mean(0) - torch.stack(history).float().mean(0).square()
    assert (naive <= 0).double().mean() > 0.05
    relative = (estimator.prior().variance["body.weight"].double() / exact - 1).abs()
    assert relative.median() < 1e-3
    assert (estimator.prior().variance["body.weight"] > 0).all()


def test_the_prior_of_weights_drawn_from_a_gaussian_has_that_gaussians_covariance():
    """n = K snapshots: diagonal and low-rank half agree, and together they are unbiased for the marginal variance."""
    model = nn.ModuleDict({"body": nn.Linear(40, 40, bias=False)})
    sd = torch.logspace(-3, 0, 1600).view(40, 40)
    estimator = SwagEstimator(30, head=())
    g = torch.Generator().manual_seed(0)
    for _ in range(30):
        with torch.no_grad():
            model["body"].weight.copy_(sd * torch.randn(40, 40, generator=g))
        estimator.update(model)
    marginal = estimator.prior().gaussian.marginal_variance()["body.weight"]
    torch.testing.assert_close(marginal, estimator.prior().variance["body.weight"], rtol=1e-4, atol=0)
    ratio = (marginal / sd.square()).mean().item()
    assert abs(ratio - 1) < 5 * np.sqrt(2 / 29 / 1600)  # five standard errors of the mean of chi-squares


@pytest.mark.parametrize("k", [0, 1, 2, 5])
def test_truncating_a_prior_is_estimating_with_a_lower_rank(k):
    _, big, _ = collect(8, 12)
    _, small, _ = collect(k, 12)
    ours, theirs = big.prior().truncated(k), small.prior()
    assert (ours.gaussian.diagonal_weight, ours.gaussian.low_rank_weight) == (
        theirs.gaussian.diagonal_weight,
        theirs.gaussian.low_rank_weight,
    )
    for n in theirs.mean:
        assert torch.equal(ours.mean[n], theirs.mean[n])
        if k:
            assert torch.equal(ours.deviations[n], theirs.deviations[n])


def test_snapshots_go_into_a_ring_that_is_never_reallocated():
    model = Net()
    estimator = SwagEstimator(3)
    estimator.update(model)
    places = {n: t.data_ptr() for n, t in estimator.state_dict().items() if not n.startswith("buffer.")}
    for _ in walk(model, 10):
        estimator.update(model)
    assert places == {n: t.data_ptr() for n, t in estimator.state_dict().items() if not n.startswith("buffer.")}


@pytest.mark.parametrize("snapshots_dtype", [None, torch.bfloat16])
def test_saved_state_continues_bit_for_bit(tmp_path, snapshots_dtype):
    _, whole, _ = collect(4, 9, snapshots_dtype=snapshots_dtype)
    torch.manual_seed(0)
    model, first, second = Net(), *(SwagEstimator(4, snapshots_dtype=snapshots_dtype) for _ in range(2))
    for i, _ in enumerate(walk(model, 9)):
        (first if i < 5 else second).update(model)
        if i == 4:
            first.save(tmp_path / "state.safetensors")
            second.load(tmp_path / "state.safetensors")
    a, b = whole.prior(), second.prior()
    for kind in ("mean", "variance", "deviations", "buffers"):
        assert getattr(a, kind).keys() == getattr(b, kind).keys()
        assert all(torch.equal(getattr(a, kind)[n], getattr(b, kind)[n]) for n in getattr(a, kind)), kind
    assert a.config.head_parameters == b.config.head_parameters


def test_a_state_of_another_kind_is_refused(tmp_path):
    _, estimator, _ = collect(4, 3)
    estimator.save(tmp_path / "state.safetensors")
    with pytest.raises(PriorFormatError, match=r"rank=4, this estimator has 5"):
        SwagEstimator(5).load(tmp_path / "state.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(PriorFormatError, match="not the state of a SwagEstimator"):
        SwagEstimator(5).load(tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "state.safetensors").read_bytes()[:100])
    with pytest.raises(PriorFormatError, match="not a valid safetensors file"):
        SwagEstimator(4).load(tmp_path / "cut.safetensors")


def test_too_few_snapshots_and_bad_arguments_say_what_to_do():
    with pytest.raises(PriorNumericsError, match=r"needs two snapshots, there are 0.*every_n_steps"):
        SwagEstimator().prior()
    _, estimator, _ = collect(2, 1)
    with pytest.raises(PriorNumericsError, match="there is 1"):
        estimator.prior()
    with pytest.raises(ValueError, match="rank is -1"):
        SwagEstimator(-1)
    with pytest.raises(ValueError, match=r"use torch.float32 or torch.float64"):
        SwagEstimator(dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="variance_floor"):
        SwagEstimator(variance_floor=float("nan"))


def test_the_variance_floor_is_applied_counted_and_recorded():
    model = Net()
    estimator = SwagEstimator(2, variance_floor=1e-3)
    for _ in range(3):
        with torch.no_grad():
            model.conv.bias.add_(1.0)  # only these four move
        estimator.update(model)
    prior = estimator.prior()
    unmoved = prior.num_parameters - 4
    assert prior.config.estimator["variance_entries_at_floor"] == unmoved
    assert prior.config.variance_floor == 1e-3
    assert prior.variance["conv.weight"].unique().tolist() == [pytest.approx(1e-3)]
    no_floor = SwagEstimator(2, variance_floor=0.0)
    for _ in range(2):
        no_floor.update(model)
    with pytest.raises(PriorNumericsError, match="pass variance_floor"):
        no_floor.prior()


def test_entries_raised_to_the_floor_are_counted_even_if_they_had_moved():
    _, estimator, _ = collect(2, 4, variance_floor=1e9)
    assert estimator.prior().config.estimator["variance_entries_at_floor"] == estimator.prior().num_parameters


def test_a_refused_first_snapshot_leaves_nothing_behind():
    """The head of a model that was never learned must not decide what another model's prior leaves out."""
    estimator, bad = SwagEstimator(2), Net()
    with torch.no_grad():
        bad.conv.weight.fill_(float("nan"))
    with pytest.raises(PriorNumericsError):
        estimator.update(bad)
    other = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    for _ in walk(other, 2):
        estimator.update(other)
    assert estimator.prior().config.head_parameters == ("head.weight", "head.bias")


def test_a_diverged_model_is_refused_and_the_estimate_kept():
    model, estimator, _ = collect(3, 4)
    before = {n: t.clone() for n, t in estimator.state_dict().items()}
    with torch.no_grad():
        model.conv.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(PriorNumericsError, match=r"'conv.weight' has 1 of 36 values.*snapshot 5.*diverged"):
        estimator.update(model)
    assert estimator.num_snapshots == 4
    assert all(torch.equal(t, before[n]) for n, t in estimator.state_dict().items())


def test_another_model_is_refused():
    _, estimator, _ = collect(3, 2)
    with pytest.raises(PriorMatchError, match="not the model of the first snapshot"):
        estimator.update(nn.ModuleDict({"fc": nn.Linear(2, 2), "other": nn.Linear(2, 2)}))


def test_frozen_parameters_and_the_head_stay_out():
    model = Net()
    model.conv.weight.requires_grad_(False)
    estimator = SwagEstimator(2)
    for _ in walk(model, 3):
        estimator.update(model)
    prior = estimator.prior()
    assert "conv.weight" not in prior.mean
    assert prior.config.head_parameters == ("fc.weight", "fc.bias")
    assert "fc.weight" not in prior.mean
    with pytest.raises(PriorMatchError, match="no trainable parameters beside its head"):
        SwagEstimator().update(model.requires_grad_(False))


def test_bfloat16_weights_are_accumulated_in_float32():
    torch.manual_seed(0)
    model, history, estimator = nn.ModuleDict({"body": nn.Linear(8, 8)}).bfloat16(), [], SwagEstimator(4, head=())
    for _ in walk(model, 12, size=0.5):
        estimator.update(model)
        history.append(model["body"].weight.detach().double().clone())
    prior = estimator.prior()
    assert prior.mean["body.weight"].dtype == torch.float32
    torch.testing.assert_close(prior.mean["body.weight"].double(), torch.stack(history).mean(0), rtol=1e-5, atol=1e-6)
    assert estimator.prior(deviations_dtype=torch.bfloat16).config.dtype["deviations"] == "bfloat16"


def test_what_is_known_about_the_source_is_recorded():
    _, estimator, _ = collect(2, 3)
    prior = estimator.prior(
        base_model="org/net",
        dataset=["a/b", "c/d"],
        dataset_license="mit",
        objective="SimCLR",
        license="apache-2.0",
        source={"epochs": 3},
    )
    config = prior.config
    assert config.source == {"objective": "SimCLR", "dataset": ["a/b", "c/d"], "dataset_license": "mit", "epochs": 3}
    assert (config.base_model, config.license, config.model_type) == ("org/net", "apache-2.0", "Net")
    assert config.estimator["name"] == "swag"
    stored = estimator.prior(scale=3.0, eps=0.25)
    assert (stored.scale, stored.config.scale, stored.gaussian.eps, stored.config.eps) == (3.0, 3.0, 0.25, 0.25)
    assert config.estimator["batch_norm"] == "last snapshot"
    assert "torch" in config.libraries


# ------------------------------------------------------------------------------------------- the cost of a snapshot


class Operations(TorchDispatchMode):
    """Counts entries that operations write, and the largest tensor that one of them makes anew."""

    def __init__(self):
        super().__init__()
        self.written, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                new = t.untyped_storage().data_ptr() not in given
                self.largest = max(self.largest, t.numel() if new else 0)
                reads_all = "sum" in func.__name__
                self.written += args[0].numel() if reads_all else t.numel() * (new or func._schema.is_mutable)
        return out


def big(dtype=torch.float32, *, channels_last=False):
    model = nn.ModuleDict({"conv": nn.Conv2d(128, 256, 3), "body": nn.Linear(600, 500), "norm": nn.LayerNorm(600)}).to(dtype)
    return model.to(memory_format=torch.channels_last) if channels_last else model


@pytest.fixture
def one_thread():
    """Operations of other threads are not seen."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("snapshots_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "channels_last"])
@pytest.mark.parametrize("rank", [0, 3, 12])
def test_a_snapshot_makes_no_temporary_above_a_block_and_passes_over_memory_as_often_at_every_rank(
    one_thread, monkeypatch, rank, kind, snapshots_dtype
):
    monkeypatch.setattr(moments, "_CPU_BLOCK", 1 << 14)
    model = big(torch.bfloat16 if kind == "bfloat16" else torch.float32, channels_last=kind == "channels_last")
    size = sum(p.numel() for p in model.parameters())
    estimator = SwagEstimator(rank, head=(), snapshots_dtype=snapshots_dtype)
    for _ in range(2):
        estimator.update(model)
    with Operations() as seen:
        estimator.update(model)
    assert seen.largest <= 1 << 14  # the largest tensor has 295 thousand entries, the ring 12 times 596 thousand
    passes = 4 if rank and snapshots_dtype is None else 5 - (rank == 0)  # finite?, difference, (row,) mean, squares
    assert seen.written == pytest.approx(passes * size, rel=0.02)  # and scratch


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_prior_that_takes_the_estimate_over_is_the_same_and_lies_in_its_memory(one_thread, dtype):
    model = big()
    kept, given = (SwagEstimator(4, head=(), snapshots_dtype=dtype) for _ in range(2))
    for _ in walk(model, 7):
        kept.update(model)
        given.update(model)
    places = {n: given.state_dict()[f"ring.{n}"].data_ptr() for n in given.mean()}
    with Operations() as copying:
        expected = kept.prior()
    largest = max(t.numel() for t in expected.mean.values())
    assert copying.largest <= 4 * largest  # the deviations of one tensor
    with Operations() as taking:
        prior = given.prior(release=True)
    assert taking.largest <= max(largest, moments._CPU_BLOCK) * 4
    for kind in ("mean", "variance", "deviations"):
        a, b = getattr(expected, kind), getattr(prior, kind)
        assert all(torch.equal(a[n], b[n]) for n in a), kind
    assert {n: t.data_ptr() for n, t in prior.deviations.items()} == places
    assert prior.config == expected.config
    assert (given.num_snapshots, given.state_dict()) == (0, {})
    assert kept.num_snapshots == 7
    given.update(model)  # begins anew, elsewhere
    assert given.state_dict()["ring.body.weight"].data_ptr() != places["body.weight"]
    again = kept.prior(release=True, deviations_dtype=torch.bfloat16)
    assert again.deviations["body.weight"].dtype == torch.bfloat16


def test_an_estimator_that_is_given_away_begins_anew_even_if_the_prior_cannot_be_made():
    model = big()
    estimator, fresh = SwagEstimator(2, head=()), SwagEstimator(2, head=())
    for _ in walk(model, 3):
        estimator.update(model)
    with pytest.raises(ValueError, match="explained is 2"):
        estimator.prior(release=True, explained=2.0)
    assert estimator.num_snapshots == 3  # refused before anything is given up
    assert estimator.prior().config.num_snapshots == 3
    with pytest.raises(TypeError):
        estimator.prior(release=True, dataset=3.5)  # type: ignore[arg-type]
    assert estimator.num_snapshots == 0
    for _ in walk(model, 3):
        estimator.update(model)
        fresh.update(model)
    for kind in ("mean", "variance", "deviations"):
        a, b = getattr(fresh.prior(), kind), getattr(estimator.prior(), kind)
        assert all(torch.equal(a[n], b[n]) for n in a), kind


def odd_shapes():
    """A model with an empty, a zero-dimensional, a transposed and a channels-last parameter."""
    model = nn.Module()
    for name, value in {
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(1.0),
        "transposed": torch.randn(70, 90).T,
        "conv": torch.randn(8, 6, 3, 3).to(memory_format=torch.channels_last),
        "strided": torch.randn(500)[::2],
    }.items():
        model.register_parameter(name, nn.Parameter(value))
    return model


@pytest.mark.parametrize("snapshots_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", ["blocks", "threads", "groups"])
def test_bits_do_not_depend_on_blocks_threads_layout_or_the_path_of_accelerators(monkeypatch, path, snapshots_dtype):
    torch.manual_seed(0)
    model, before = odd_shapes(), torch.get_num_threads()
    plain, other = (SwagEstimator(3, head=(), snapshots_dtype=snapshots_dtype) for _ in range(2))
    for i, _ in enumerate(walk(model, 6)):
        plain.update(model)
        with monkeypatch.context() as patch:
            patch.setattr(moments, "_CPU_BLOCK", 100)
            patch.setattr(moments, "_DEVICE_BLOCK", 3000)
            if path == "threads":
                patch.setattr(moments, "_WORTH_THREADS", 0)
                torch.set_num_threads(3)
            if path == "groups":
                patch.setattr(moments, "_add_in_blocks", moments._add_in_groups)
            other.update(model)
            torch.set_num_threads(before)
        assert plain.num_snapshots == i + 1
        assert all(torch.equal(t, other.state_dict()[n]) for n, t in plain.state_dict().items())
    assert plain.prior().mean["empty"].shape == (0, 3)


def test_weights_whose_sum_overflows_are_finite():
    model = nn.ModuleDict({"body": nn.Linear(2, 2, bias=False)})
    estimator = SwagEstimator(2, head=())
    with torch.no_grad():
        model["body"].weight.fill_(3e38)
    estimator.update(model)
    with torch.no_grad():
        model["body"].weight.copy_(torch.tensor([[float("inf"), -float("inf")], [1.0, float("nan")]]))
    with pytest.raises(PriorNumericsError, match=r"has 3 of 4 values"):
        estimator.update(model)
    assert estimator.num_snapshots == 1


# ----------------------------------------------------------------------------------------------- snapshots in bfloat16


def paths(kind, n, entries, g):
    """(n, entries) float64: weights of size one that move by a thousandth, in different ways."""
    noise = torch.randn(n, entries, generator=g, dtype=torch.float64)
    moved = {
        "stationary": noise,
        "random walk": noise.cumsum(0),
        "drift": noise + torch.arange(n, dtype=torch.float64)[:, None],
        "arrives": noise + 100 * 0.5 ** torch.arange(n, dtype=torch.float64)[:, None],
    }[kind]
    return 1 + 1e-3 * moved


@pytest.mark.parametrize(("rank", "n"), [(20, 20), (8, 60)])
@pytest.mark.parametrize("kind", ["stationary", "random walk", "drift", "arrives"])
def test_bfloat16_snapshots_keep_deviations_within_its_roundoff_of_the_standard_deviation(kind, rank, n):
    """Root sum of squares over the snapshots, for every entry: <= 2^-8 sqrt((n-1) variance)."""
    history = paths(kind, n, 400, torch.Generator().manual_seed(0)).float()  # the weights that float32 holds
    model = nn.ModuleDict({"body": nn.Linear(20, 20, bias=False)})
    half, full = SwagEstimator(rank, head=(), snapshots_dtype=torch.bfloat16), SwagEstimator(rank, head=())
    for w in history:
        with torch.no_grad():
            model["body"].weight.copy_(w.view(20, 20))
        half.update(model)
        full.update(model)
    prior = half.prior(deviations_dtype=torch.float32)
    exact = history.double()
    deviations = (exact - exact.mean(0)).flip(0)[:rank].view(rank, 20, 20)
    spread = (exact - exact.mean(0)).square().sum(0).view(20, 20)  # (n-1) variance
    error = (prior.deviations["body.weight"].double() - deviations).square().sum(0)
    floor = 2.0**-23 * 1.2  # of the float32 mean, of weights of size one, at most: adds to the error at every snapshot
    assert (error.sqrt() <= 2.0**-8 * spread.sqrt() + floor * rank**0.5).all()
    assert error.sum().sqrt() < 2.0**-9 * spread.sum().sqrt() + floor * (400 * rank) ** 0.5  # in root mean square
    raw = history.bfloat16().double()  # what would become of weights in bfloat16
    lost = ((raw - exact.mean(0)).flip(0)[:rank].view(rank, 20, 20) - deviations).square().sum(0)
    assert lost.sum() > 30 * error.sum()
    whole = full.prior()
    for kind_ in ("mean", "variance"):  # are not touched
        assert torch.equal(getattr(prior, kind_)["body.weight"], getattr(whole, kind_)["body.weight"])
    assert half.prior().config.dtype["deviations"] == "bfloat16"


def test_the_rank_copies_of_bfloat16_snapshots_take_half():
    _, half, _ = collect(6, 8, snapshots_dtype=torch.bfloat16)
    _, full, _ = collect(6, 8)

    def ring(estimator):
        return sum(t.nbytes for n, t in estimator.state_dict().items() if n.startswith("ring."))

    assert ring(half) * 2 == ring(full)


def test_snapshots_of_types_that_cannot_hold_differences_are_refused(tmp_path):
    with pytest.raises(ValueError, match="underflow"):
        SwagEstimator(snapshots_dtype=torch.float16)
    _, half, _ = collect(4, 3, snapshots_dtype=torch.bfloat16)
    half.save(tmp_path / "state.safetensors")
    with pytest.raises(PriorFormatError, match=r"snapshots_dtype='bfloat16', this estimator has 'float32'"):
        SwagEstimator(4).load(tmp_path / "state.safetensors")


# ----------------------------------------------------------------------------------------------------------- the state


def test_a_state_holds_the_rows_that_were_filled(tmp_path):
    _, few, _ = collect(8, 2)
    _, many, _ = collect(8, 11)
    few.save(tmp_path / "few.safetensors")
    many.save(tmp_path / "many.safetensors")
    with safe_open(tmp_path / "few.safetensors", "pt") as a, safe_open(tmp_path / "many.safetensors", "pt") as b:
        assert a.get_slice("ring.conv.weight").get_shape() == [2, 4, 1, 3, 3]
        assert b.get_slice("ring.conv.weight").get_shape() == [8, 4, 1, 3, 3]


def test_a_state_of_a_later_version_is_refused(tmp_path):
    _, estimator, _ = collect(4, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(swag, "_STATE_VERSION", "3")
        estimator.save(tmp_path / "state.safetensors")
    with pytest.raises(PriorFormatError, match=r"version 3, this prior_hub reads 1 and 2"):
        SwagEstimator(4).load(tmp_path / "state.safetensors")


@pytest.mark.parametrize("steps", [1, 3, 9])
def test_a_state_of_version_1_with_weights_in_its_ring_goes_on(tmp_path, steps):
    """Version 1 wrote all K rows, snapshot i in row (i - 1) % K."""
    model, estimator, history = collect(4, steps)
    estimator.save(tmp_path / "new.safetensors")
    with safe_open(tmp_path / "new.safetensors", "pt") as handle:
        header = json.loads(handle.metadata()["swag"])
        tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    header["version"] = "1"
    del header["snapshots_dtype"]
    for name in estimator.mean():
        ring = torch.zeros(4, *history[0][name].shape)
        for i, weights in enumerate(history):
            ring[i % 4] = weights[name]
        tensors[f"ring.{name}"] = ring
    save_file(tensors, tmp_path / "old.safetensors", metadata={"swag": json.dumps(header)})
    resumed = SwagEstimator(4)
    resumed.load(tmp_path / "old.safetensors")
    for _ in walk(model, 2, seed=1):
        estimator.update(model)
        resumed.update(model)
    a, b = estimator.prior(), resumed.prior()
    for n in a.mean:
        assert torch.equal(a.mean[n], b.mean[n])
        torch.testing.assert_close(a.deviations[n], b.deviations[n], rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------------- from an accelerator to the CPU


class PretendedStreams:
    """Streams whose copies happen as late as they may: when the current stream waits for them."""

    def __init__(self):
        self.copies, self.waited, self.entered = [], [], False

    def __call__(self, device):
        return self

    def Stream(self, device):
        return self

    def current_stream(self, device):
        return self

    def wait_stream(self, other):
        self.waited.append("weights")

    @contextmanager
    def stream(self, side):
        self.entered = True
        yield
        self.entered = False

    def copy(self, landing, value):
        assert self.entered
        assert self.waited[-1] == "weights"  # else the side stream could read before the last step has written
        self.copies.append((landing, value))

    def record_event(self):
        copies, done = self.copies, threading.Event()
        self.copies = []

        class Event:
            def run(self):
                for landing, value in copies:
                    landing.copy_(value)
                copies.clear()
                done.set()

            def synchronize(self):
                if not done.wait(5):  # nothing ever waited: the copies come after whatever was done to the weights
                    self.run()

        return Event()

    def wait_event(self, event):
        event.run()


@pytest.fixture
def accelerator(monkeypatch):
    streams = PretendedStreams()
    monkeypatch.setattr(swag, "_has_streams", lambda device: True)
    monkeypatch.setattr(swag, "_streams", streams)
    monkeypatch.setattr(moments, "copy_across", streams.copy)
    return streams


@pytest.mark.parametrize("given", [None, "the optimizer", "accelerate's wrapper"])
@pytest.mark.parametrize("options", [{}, {"snapshots_dtype": torch.bfloat16}, {"rank": 0}])
def test_snapshots_that_go_to_the_cpu_beside_training_are_those_of_the_moment(accelerator, given, options):
    options = {"rank": 3, "head": ()} | options
    model, away, plain = big(), SwagEstimator(**options, device="cpu"), SwagEstimator(**options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Accelerator(cpu=True)  # the wrapper asks its state
    wrapper = AcceleratedOptimizer(optimizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(swag, "_has_streams", lambda device: False)
        for i in range(6):
            plain.update(model)
            patch.setattr(swag, "_has_streams", lambda device: True)
            away.update(model, optimizer={None: None, "the optimizer": optimizer}.get(given, wrapper))
            patch.setattr(swag, "_has_streams", lambda device: False)
            for p in model.parameters():
                p.grad = torch.full_like(p, i + 1.0)
            (wrapper if given == "accelerate's wrapper" else optimizer).step()
    assert away.num_snapshots == 6
    assert plain.state_dict().keys() == away.state_dict().keys()
    assert all(torch.equal(t, away.state_dict()[n]) for n, t in plain.state_dict().items())
    assert not optimizer._optimizer_step_pre_hooks


def test_snapshots_lie_where_they_shall_whatever_the_default_device_is(accelerator):
    model, estimator = big(), SwagEstimator(2, head=(), device="cpu")
    with torch.device("meta"):
        for _ in range(2):
            estimator.update(model)
        mean = estimator.mean()
    assert torch.equal(mean["body.weight"], model["body"].weight)


def test_what_fails_beside_training_is_raised_by_the_next_call(accelerator, monkeypatch):
    model, estimator = big(), SwagEstimator(2, head=(), device="cpu")
    monkeypatch.setattr(swag, "add_snapshot", lambda *_: 1 / 0)
    estimator.update(model)
    for call in (estimator.mean, estimator.state_dict, lambda: estimator.update(model)):
        with pytest.raises(ZeroDivisionError):
            call()
    estimator.reset()
    assert estimator.state_dict() == {}


def test_weights_that_are_not_finite_are_refused_before_anything_is_copied(accelerator):
    model, estimator = big(), SwagEstimator(2, head=(), device="cpu")
    with torch.no_grad():
        model["body"].bias[3] = float("inf")
    with pytest.raises(PriorNumericsError, match=r"'body.bias' has 1 of 500"):
        estimator.update(model)
    assert accelerator.waited == []


@pytest.mark.gpu
@pytest.mark.parametrize("snapshots_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", [None, "cpu"])
def test_on_an_accelerator_the_estimate_is_that_of_the_cpu(device, weights, snapshots_dtype):
    torch.manual_seed(0)
    model = big(weights, channels_last=True)
    there, optimizer = copy.deepcopy(model).cuda(), None
    options = {"head": (), "snapshots_dtype": snapshots_dtype}
    here, away = SwagEstimator(3, **options), SwagEstimator(3, **options, device=device)
    for i, _ in enumerate(walk(model, 7)):
        there.load_state_dict(model.state_dict())
        optimizer = torch.optim.SGD(there.parameters(), lr=1.0)
        here.update(model)
        away.update(there, optimizer=optimizer if i % 2 else None)
        for p in there.parameters():
            p.grad = torch.full_like(p, 1e3)
        optimizer.step()  # at once: a copy that is not fenced would see it
    a, b = here.prior(), away.prior()
    assert {t.device.type for t in b.mean.values()} == {"cpu"}
    assert {t.device.type for t in away.mean().values()} == {"cpu" if device else "cuda"}
    for n in a.mean:
        torch.testing.assert_close(a.mean[n], b.mean[n], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(a.variance[n], b.variance[n], rtol=1e-5, atol=1e-7)
        rounding = 1e-5 if snapshots_dtype is None else 2.0**-7  # one in the last place, where two roundings fall apart
        torch.testing.assert_close(a.deviations[n].float(), b.deviations[n].float(), rtol=rounding, atol=2e-3 * rounding)
    bad = next(iter(there.parameters()))
    for value in (float("nan"), float("inf"), -float("inf")):
        with torch.no_grad():
            bad[0] = value
        with pytest.raises(PriorNumericsError, match="NaN or infinite"):
            away.update(there)
    assert away.num_snapshots == 7


@pytest.mark.gpu
def test_a_snapshot_that_goes_to_the_cpu_takes_no_memory_of_the_accelerator():
    model = nn.ModuleDict({"body": nn.Linear(2000, 2000)}).cuda()
    estimator = SwagEstimator(3, head=(), device="cpu")
    estimator.update(model)
    estimator.state_dict()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    estimator.update(model)
    estimator.state_dict()
    assert torch.cuda.max_memory_allocated() - before < 1 << 20


# ------------------------------------------------------------------------------------------------- BatchNorm statistics


def images(n=40):
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(5)) * 3 + 1


def test_recomputed_batch_norm_equals_torchs_update_bn_at_the_mean_and_leaves_the_model_alone():
    model, estimator, _ = collect(3, 6)
    model(images())  # moves the running statistics
    before = copy.deepcopy(model.state_dict())
    batches = list(images().split(10))
    found = recompute_batch_norm(model, batches, parameters=estimator.mean(), progress=False)
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for n, value in estimator.mean().items():
            canonical_parameters(reference)[n].copy_(value)
    update_bn(batches, reference)
    assert set(found) == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    for n, value in found.items():
        torch.testing.assert_close(value, reference.state_dict()[n], rtol=1e-6, atol=1e-6)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert model.training
    assert model.norm.momentum == 0.1
    prior = estimator.prior(buffers=found)
    assert prior.config.estimator["batch_norm"] == "recomputed at the mean"
    assert torch.equal(prior.buffers["norm.running_var"], found["norm.running_var"])


def test_dropout_stays_off_while_statistics_are_recomputed():
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3))
    x = torch.ones(8, 3) + torch.arange(8.0)[:, None]
    found = recompute_batch_norm(model, [x], progress=False)
    torch.testing.assert_close(found["1.running_mean"], x.mean(0))
    assert found["1.running_mean"].data_ptr() != model[1].running_mean.data_ptr()


def test_iterable_data_and_frozen_batch_norm_are_understood():
    from torchvision.ops import FrozenBatchNorm2d

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from images()

    loader = torch.utils.data.DataLoader(Stream(), batch_size=10)
    whole = recompute_batch_norm(Net().eval(), loader, progress=False)
    assert whole["norm.num_batches_tracked"].item() == 4
    frozen = nn.Sequential(nn.Conv2d(1, 2, 3), FrozenBatchNorm2d(2))
    assert recompute_batch_norm(frozen, loader, progress=False) == {}
    assert "1.running_mean" in isotropic_prior(frozen, head=()).buffers


def test_an_error_in_the_middle_leaves_the_model_alone():
    model = Net().eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError):
        recompute_batch_norm(
            model, [images(), torch.zeros(2, 9, 8, 8)], parameters={"temperature": torch.tensor(5.0)}, progress=False
        )
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not model.norm.training
    with pytest.raises(PriorHubError, match="gave no batch"):
        recompute_batch_norm(model, [], progress=False)


def test_dictionaries_tuples_and_limits_are_understood():
    model = Net()
    batches = [(b, torch.zeros(10)) for b in images().split(10)]
    whole = recompute_batch_norm(model, batches, progress=False)
    named = recompute_batch_norm(model, [{"x": b} for b, _ in batches], progress=False)
    assert torch.equal(whole["norm.running_mean"], named["norm.running_mean"])
    assert recompute_batch_norm(model, batches, max_batches=2, progress=False)["norm.num_batches_tracked"].item() == 2
    assert recompute_batch_norm(nn.Linear(2, 2), batches) == {}


# ------------------------------------------------------------------------------------------------------- the isotropic


def test_the_isotropic_prior_is_l2_sp():
    """penalty = |w - w0|^2 / (2 scale variance), the head left out."""
    torch.manual_seed(0)
    model = Net()
    prior = isotropic_prior(model, variance=0.5, base_model="org/net").rescaled(3.0)
    other = Net()
    distance = sum(
        (a - b).double().square().sum()
        for (n, a), b in zip(other.named_parameters(), model.parameters(), strict=True)
        if "fc" not in n
    )
    assert prior.penalty(other).item() == pytest.approx(distance.item() / (2 * 3.0 * 0.5), rel=1e-6)
    assert prior.config.head_parameters == ("fc.weight", "fc.bias")
    assert prior.config.estimator == {"name": "isotropic", "variance": 0.5}
    assert set(prior.buffers) == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    with pytest.raises(ValueError, match="variance is 0"):
        isotropic_prior(model, variance=0)


def test_a_path_of_this_machine_is_not_recorded_as_the_base_model(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    tiny = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    BertForSequenceClassification(tiny).save_pretrained(tmp_path / "model")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "model")
    assert isotropic_prior(model).config.base_model is None
    model.config._name_or_path = "org/bert"
    prior = isotropic_prior(torch.compile(model, backend="eager"))
    assert (prior.config.base_model, prior.config.model_type) == ("org/bert", "bert")


def test_a_model_from_the_hub_brings_its_name_and_commit_into_its_isotropic_prior():
    """As `from_pretrained` leaves them in the model's configuration."""
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))
    model.config._name_or_path, model.config._commit_hash = "org/bert", "0123abc"
    config = isotropic_prior(model, source={"dataset": "org/books"}, license="mit").config
    assert (config.base_model, config.base_model_revision, config.license) == ("org/bert", "0123abc", "mit")
    assert config.source == {"dataset": "org/books"}
    assert config.head_parameters == ()


@pytest.mark.parametrize("name", ["org/bert", Path("folder")])
def test_the_isotropic_prior_of_a_bare_name_says_how_to_load_it(name):
    with pytest.raises(
        ValueError, match=r"isotropic_prior\(AutoModel.from_pretrained\('(org/bert|folder)'\)\), or use learn_prior"
    ):
        isotropic_prior(name)


class WithNormedHead(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.head = nn.Sequential(nn.Linear(4, classes), nn.BatchNorm1d(classes))

    def forward(self, x):
        return self.head(self.body(x))


BODY_STATISTICS = {f"body.1.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")}


def test_recomputed_statistics_of_the_head_are_not_in_the_prior():
    model, estimator = WithNormedHead(3), SwagEstimator(2)
    for _ in walk(model, 3):
        estimator.update(model)
    batches = [torch.randn(8, 3, generator=torch.Generator().manual_seed(0))]
    found = recompute_batch_norm(model, batches, parameters=estimator.mean(), progress=False)
    assert "head.1.running_mean" in found
    for buffers in (found, None):
        assert set(estimator.prior(buffers=buffers).buffers) == BODY_STATISTICS
    only_the_heads = {name: tensor for name, tensor in found.items() if name.startswith("head.")}
    prior = estimator.prior(buffers=only_the_heads)
    assert (prior.buffers, prior.config.estimator["batch_norm"]) == ({}, "none")


def test_initialize_brings_the_bodys_statistics_under_a_name_map_and_never_the_heads():
    source = WithNormedHead(3)
    with torch.no_grad():
        source.body[1].running_mean.fill_(7.0)
        source.head[1].running_mean.fill_(9.0)
    prior = isotropic_prior(source)
    assert set(prior.buffers) == BODY_STATISTICS
    everything = dict(source.named_buffers())  # a prior that another program wrote may hold the head's too
    config = prior.config.replace(buffers=tuple(everything))
    holds_the_heads, same = PriorModel(prior.gaussian, config, everything), WithNormedHead(3)
    holds_the_heads.initialize(same)
    assert same.body[1].running_mean.tolist() == [7.0] * 4
    assert same.head[1].running_mean.tolist() == [0.0] * 3
    same = WithNormedHead(3)
    prior.initialize(same)
    assert same.body[1].running_mean.tolist() == [7.0] * 4
    assert same.head[1].running_mean.tolist() == [0.0] * 3
    towers = nn.ModuleDict({"student": WithNormedHead(2), "teacher": WithNormedHead(2)})
    prior.initialize(towers, name_map={"^": "student."})
    assert towers["student"].body[1].running_mean.tolist() == [7.0] * 4
    assert towers["teacher"].body[1].running_mean.tolist() == [0.0] * 4
    with pytest.warns(PriorWarning, match="none of the prior's 3 BatchNorm statistics"):
        prior.initialize(towers, name_map=lambda n: f"student.{n}" if n.endswith(("weight", "bias")) else None)


def test_a_prior_made_of_parameters_does_not_follow_the_model():
    model = Net()
    body = {n: p for n, p in model.named_parameters() if not n.startswith("fc")}
    prior = PriorModel.from_tensors(body, {n: torch.ones_like(p) for n, p in body.items()})
    with torch.no_grad():
        model.conv.weight.add_(1.0)
    assert prior.penalty(model).item() == pytest.approx(18.0, rel=1e-6)  # 36 weights moved by one


def test_the_isotropic_prior_of_a_prior_keeps_its_mean_names_and_buffers():
    _, estimator, _ = collect(3, 6)
    learned = estimator.prior(base_model="org/net", license="mit")
    flat = isotropic_prior(learned, variance=0.1)
    assert flat.rank == 0
    assert flat.config.base_model == "org/net"
    assert all(torch.equal(flat.mean[n], learned.mean[n]) for n in learned.mean)
    assert flat.buffers.keys() == learned.buffers.keys()
