"""Imported priors are the originals': the penalty is the published formula on the raw files; what cannot be is refused."""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from legacy_originals import (
    Network,
    flat,
    network,
    original_log_prob,
    paper_files,
    swa_checkpoint,
)
from torch import nn

from prior_hub import PriorModel, PriorPenalty
from prior_hub.errors import PriorFormatError, PriorMatchError, PriorNotFoundError, PriorNumericsError, PriorWarning
from prior_hub.priors.legacy import CONVENTIONS, convention_weights, legacy_files, welford_test

PUBLISHED = CONVENTIONS[1:]


def split(vector, prior):
    """The flat vector by the prior's names, in the order of the network's parameters."""
    parts = vector.split([math.prod(shape) for shape in prior.config.parameters.values()])
    return {name: part.view(shape) for (name, shape), part in zip(prior.config.parameters.items(), parts, strict=True)}


def penalty_and_gradient(log_prob, mean, theta):
    theta = theta.clone().requires_grad_()
    value = log_prob(mean) - log_prob(theta)
    (gradient,) = torch.autograd.grad(value, theta)
    return value.detach(), gradient


def point(files, size=0.05, seed=3):
    """A place `size` from the mean in every entry, in float64: far enough for a penalty that its log density can tell."""
    mean = files["mean"].double()
    return mean + size * torch.randn(len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ----------------------------------------------------------------------------------------------- the original formulas


@pytest.mark.parametrize("convention", PUBLISHED)
@pytest.mark.parametrize("divided", [True, False], ids=["divided", "raw"])
@pytest.mark.parametrize(("n", "settings"), [(8, {}), (20, {"rank": 3, "scale": 1e4, "eps": 1e-3})], ids=["n=K", "truncated"])
def test_penalty_and_gradient_are_those_of_the_published_formula_on_the_raw_files(tmp_path, convention, divided, n, settings):
    files, _ = paper_files(tmp_path, n=n, rank=8, divided=divided)
    prior = PriorModel.from_legacy(tmp_path, convention=convention, **settings)
    options = {"k": settings.get("rank", 5)} | {key: settings[key] for key in ("scale", "eps") if key in settings}
    theta = point(files, size=0.01 * math.sqrt(options.get("scale", 1e10)))
    expected, gradient = penalty_and_gradient(
        lambda x: original_log_prob(convention, files, x, **options), files["mean"].double(), theta
    )
    value, found = prior.gaussian.penalty_and_gradient(split(theta, prior))
    assert abs(value / expected - 1) < 1e-10
    found = torch.cat([g.reshape(-1) for g in found.values()])
    assert (found - gradient).norm() / gradient.norm() < 1e-10
    assert prior.rank == options["k"]
    assert prior.config.estimator["convention"] == convention
    assert prior.config.estimator["covmat"] == ("divided by sqrt(K-1)" if divided else "raw")
    assert prior.config.estimator["recentred"] is False


@pytest.mark.parametrize("convention", PUBLISHED)
def test_a_saved_import_has_the_same_penalty_and_log_density(tmp_path, convention):
    files, _ = paper_files(tmp_path / "files")
    PriorModel.from_legacy(tmp_path / "files", convention=convention).save_pretrained(tmp_path / "prior")
    prior = PriorModel.from_pretrained(tmp_path / "prior")
    theta = point(files)
    expected = original_log_prob(convention, files, theta, k=5)
    assert abs(prior.log_prob(split(theta, prior)) / expected - 1) < 1e-10


def test_without_rows_the_diagonal_is_the_published_one(tmp_path):
    files, _ = paper_files(tmp_path, covmat=None)
    prior = PriorModel.from_legacy(tmp_path, convention="paper", rank=0)
    theta = point(files)
    delta = theta - files["mean"].double()
    expected = 0.5 * (delta**2 / (1e10 * files["variance"].double() + 0.1)).sum()
    assert abs(prior.penalty(split(theta, prior)) / expected - 1) < 1e-12


@pytest.mark.parametrize("divided", [True, False], ids=["divided", "raw"])
def test_swag_is_the_gaussian_of_the_snapshots_around_their_mean(tmp_path, divided):
    """The deviations are those of the snapshots that the original saw and did not store."""
    files, snapshots = paper_files(tmp_path, n=8, rank=8, divided=divided)
    prior = PriorModel.from_legacy(tmp_path)
    rows = torch.cat([prior.deviations[name].flatten(1) for name in prior.config.parameters], dim=1)
    true = (snapshots - snapshots.mean(0)).flip(0)  # newest first
    assert (rows - true).abs().max() < 1e-6 * snapshots.abs().max()
    assert prior.config.num_snapshots == 8
    assert prior.config.estimator["recentred"] is True
    theta = point(files)
    diagonal, low_rank = files["variance"].double() / 2, true.T / math.sqrt(2 * 7)
    normal = torch.distributions.LowRankMultivariateNormal(files["mean"].double(), low_rank, diagonal)
    expected = normal.log_prob(files["mean"].double()) - normal.log_prob(theta)
    assert abs(prior.penalty(split(theta, prior)) / expected - 1) < 1e-4  # the running sums of the files are float32


def test_swag_of_lower_rank_has_the_newest_snapshots(tmp_path):
    _, snapshots = paper_files(tmp_path, n=8, rank=8)
    prior = PriorModel.from_legacy(tmp_path, rank=3)
    assert prior.rank == 3
    assert prior.gaussian.low_rank_weight == pytest.approx(1 / 4)
    rows = torch.cat([prior.deviations[name].flatten(1) for name in prior.config.parameters], dim=1)
    assert (rows[0] - (snapshots[7] - snapshots.mean(0))).abs().max() < 1e-6 * snapshots.abs().max()


def test_published_rows_are_re_centred_on_request_only(tmp_path):
    files, snapshots = paper_files(tmp_path, n=8, rank=8)
    as_is = PriorModel.from_legacy(tmp_path, convention="paper", rank=8)
    rows = torch.cat([as_is.deviations[name].flatten(1) for name in as_is.config.parameters], dim=1)
    assert torch.equal(rows, files["covmat"])
    moved = PriorModel.from_legacy(tmp_path, convention="paper", rank=8, recentre=True)
    rows = torch.cat([moved.deviations[name].flatten(1) for name in moved.config.parameters], dim=1)
    true = (snapshots - snapshots.mean(0)) / math.sqrt(7)
    assert (rows - true).abs().max() < 1e-6 * snapshots.abs().max()
    kept = PriorModel.from_legacy(tmp_path, recentre=False)
    rows = torch.cat([kept.deviations[name].flatten(1) for name in kept.config.parameters], dim=1)
    assert torch.allclose(rows, files["covmat"].flip(0) * math.sqrt(7))


def test_rows_that_were_dropped_cannot_be_re_centred(tmp_path):
    paper_files(tmp_path, n=12, rank=8)
    assert PriorModel.from_legacy(tmp_path).config.estimator["recentred"] is False
    with pytest.raises(PriorFormatError, match="old rows were dropped"):
        PriorModel.from_legacy(tmp_path, recentre=True)


def test_rescaling_keeps_a_and_b(tmp_path):
    """What the module's head says of another scale: s' s Q^T Q for "paper"."""
    files, _ = paper_files(tmp_path, n=8, rank=8)
    prior = PriorModel.from_legacy(tmp_path, convention="paper", scale=100.0, rank=4).rescaled(7.0)
    theta = point(files)
    mean, v, q = (files[kind].double() for kind in ("mean", "variance", "covmat"))
    normal = torch.distributions.LowRankMultivariateNormal(mean, math.sqrt(7 * 100) * q[:4].T, 7 * v + 0.1)
    expected = normal.log_prob(mean) - normal.log_prob(theta)
    assert abs(prior.penalty(split(theta, prior)) / expected - 1) < 1e-10


# --------------------------------------------------------------------------------------------------- raw or divided


@settings(max_examples=25, deadline=None)
@given(
    rank=st.integers(5, 14),
    more=st.integers(0, 30),
    divided=st.booleans(),
    drift=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 99),
)
def test_raw_and_divided_rows_are_told_apart(tmp_path_factory, rank, more, divided, drift, seed):
    folder = tmp_path_factory.mktemp("files")
    paper_files(folder, n=rank + more, rank=rank, divided=divided, seed=seed, drift=drift)
    refused = (PriorFormatError,) if drift and more else ()  # a random walk may be refused, never misread
    with contextlib.suppress(*refused):
        estimator = PriorModel.from_legacy(folder).config.estimator
        assert estimator["covmat"] == ("divided by sqrt(K-1)" if divided else "raw")
        assert estimator["covmat_told_by"] == "Welford's relation"
        if not more:
            assert estimator["welford_ratio"] == pytest.approx(rank - 1 if divided else 1, rel=0.02)
            assert estimator["recentred"] is True


@pytest.mark.parametrize("rank", [3, 4])
@pytest.mark.parametrize("divided", [True, False])
def test_few_rows_are_told_apart_when_none_was_dropped(tmp_path, rank, divided):
    paper_files(tmp_path, n=rank, rank=rank, divided=divided)
    assert PriorModel.from_legacy(tmp_path).config.estimator["covmat"].startswith("divided" if divided else "raw")


@pytest.mark.parametrize("divided", [True, False])
def test_two_rows_are_the_same_either_way(tmp_path, divided):
    files, _ = paper_files(tmp_path, n=2, rank=2, divided=divided)
    prior = PriorModel.from_legacy(tmp_path)
    assert prior.config.estimator["covmat"] == "the same raw or divided (K = 2)"
    assert torch.equal(prior.deviations["conv1.weight"][0].reshape(-1), files["covmat"][1][:192])


def test_clamped_variances_say_nothing_of_the_rows(tmp_path):
    """97 % of the variances at the original's floor: the test looks at the others."""
    files, _ = paper_files(tmp_path, n=8, rank=8)
    v = files["variance"].clone()
    low = v.argsort()[: int(0.97 * len(v))]
    q = files["covmat"].clone()
    v[low], q[:, low] = 1e-6, q[:, low] * 1e-3
    torch.save(v, tmp_path / "prior_variance.pt")
    torch.save(q, tmp_path / "prior_covmat.pt")
    assert PriorModel.from_legacy(tmp_path).config.estimator["welford_ratio"] == pytest.approx(7, rel=0.02)
    torch.save(torch.full_like(v, 1e-6), tmp_path / "prior_variance.pt")
    with pytest.raises(PriorFormatError, match="no variance lies above the floor"):
        PriorModel.from_legacy(tmp_path)
    assert PriorModel.from_legacy(tmp_path, covmat="divided", recentre=False, convention="paper").rank == 5


def test_what_is_near_neither_is_refused_and_an_argument_decides(tmp_path):
    files, _ = paper_files(tmp_path, n=12, rank=10)
    torch.save(files["covmat"] * 5, tmp_path / "prior_covmat.pt")
    with pytest.raises(PriorFormatError, match=r"is 0\.\d+ over .*neither near 1 .* nor near K-1 = 9 .*covmat='raw'"):
        PriorModel.from_legacy(tmp_path)
    with pytest.warns(PriorWarning, match="does not fit divided rows"):
        prior = PriorModel.from_legacy(tmp_path, covmat="divided")
    assert prior.config.estimator["covmat_told_by"] == "argument"
    assert torch.allclose(prior.deviations["bn1.bias"][0], files["covmat"][-1][256:320] * 5 * 3)


def test_three_rows_of_many_snapshots_can_be_both(tmp_path):
    """r lies in the overlap of the two ranges at K = 3."""
    files, _ = paper_files(tmp_path, n=20, rank=3, divided=False)
    ratio = welford_test({"w": files["variance"]}, {"w": files["covmat"]}).ratio
    torch.save(files["covmat"] * math.sqrt(ratio / 1.2), tmp_path / "prior_covmat.pt")
    with pytest.raises(PriorFormatError, match="with so few of them"):
        PriorModel.from_legacy(tmp_path)


def test_welfords_relation_holds_for_a_running_mean_of_any_snapshots():
    """n var = sum i/(i-1) d_i^2, by hand for three numbers: 1, 4, 1 have the mean 2 and the variance 2."""
    rows = torch.tensor([[0.0], [4 - 2.5], [1 - 2.0]])
    test = welford_test({"w": torch.tensor([2.0])}, {"w": rows})
    assert test.ratio == pytest.approx(3 * 2 / (2 / 1 * 1.5**2 + 3 / 2 * 1.0**2))
    assert test.ratio == pytest.approx(1)
    assert test.zero_rows == (0,)


# ------------------------------------------------------------------------------------------------------- what is refused


def spoiled(folder, **changes):
    files, _ = paper_files(folder, n=12, rank=8)
    for kind, change in changes.items():
        torch.save(change(files[kind].clone()), folder / f"prior_{kind}.pt")


SHUFFLE = torch.randperm(856, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("kind", "change", "error", "message"),
    [
        ("mean", lambda t: t[SHUFFLE], PriorFormatError, "unlike those of prior_model.pt .*order of the model's parameters"),
        ("variance", lambda t: t[SHUFFLE], PriorFormatError, "do not go together.*One of them is shuffled"),
        ("covmat", lambda t: t[:, SHUFFLE], PriorFormatError, "do not go together.*One of them is shuffled"),
        ("mean", lambda t: t[:-3], PriorFormatError, "prior_mean.pt has 853 values and prior_variance.pt 856"),
        ("covmat", lambda t: t[:, :-3], PriorFormatError, r"shape \(8, 853\), expected \(K, 856\)"),
        ("covmat", lambda t: t.T.contiguous(), PriorFormatError, "transpose it"),
        ("covmat", lambda t: t[0], PriorFormatError, r"shape \(856,\)"),
        ("covmat", lambda t: t * 0, PriorFormatError, "all zero"),
        ("mean", lambda t: t.view(1, -1), PriorFormatError, "expected one axis"),
        ("mean", lambda t: t.index_fill(0, torch.tensor([5]), math.nan), PriorNumericsError, "prior_mean.pt has 1 of 856"),
        ("variance", lambda t: t.index_fill(0, torch.tensor([5]), math.inf), PriorNumericsError, "prior_variance.pt has 1"),
        ("covmat", lambda t: t.index_fill(1, torch.tensor([5]), math.nan), PriorNumericsError, "prior_covmat.pt has 8"),
        ("variance", lambda t: t.index_fill(0, torch.tensor([5, 9]), -1.0), PriorNumericsError, "2 of 856 entries < 0"),
        ("variance", lambda t: t.index_fill(0, torch.tensor([5]), 0.0), PriorNumericsError, "1 of 856 entries <= 0"),
        ("variance", lambda t: {"variance": t}, PriorFormatError, "holds a dict, expected a tensor"),
        ("mean", lambda t: t.long(), PriorFormatError, "torch.int64"),
    ],
)
def test_a_file_that_cannot_be_right_is_refused_with_what_to_check(tmp_path, kind, change, error, message):
    spoiled(tmp_path, **{kind: change})
    with pytest.raises(error, match=message):
        PriorModel.from_legacy(tmp_path)


@pytest.mark.parametrize(
    ("order", "message"), [([7, 6, 5, 4, 3, 2, 1, 0], "newest first"), ([1, 2, 0, 3, 4, 5, 6, 7], "row 3 is zero")]
)
def test_rows_in_another_order_are_refused(tmp_path, order, message):
    files, _ = paper_files(tmp_path, n=8, rank=8)
    torch.save(files["covmat"][order], tmp_path / "prior_covmat.pt")
    with pytest.raises(PriorFormatError, match=message):
        PriorModel.from_legacy(tmp_path)


def test_a_zero_variance_is_no_harm_where_eps_is_added(tmp_path):
    spoiled(tmp_path, variance=lambda t: t.index_fill(0, torch.tensor([5]), 0.0))
    assert PriorModel.from_legacy(tmp_path, convention="paper").config.eps == 0.1
    prior = PriorModel.from_legacy(tmp_path, variance_floor=1e-6)
    assert prior.config.variance_floor == 1e-6
    assert prior.config.estimator["variance_entries_at_floor"] == 1
    assert float(prior.variance["conv1.weight"].reshape(-1)[5]) == pytest.approx(1e-6)


def test_half_precision_is_read_with_a_warning_and_rows_stay_as_they_are(tmp_path):
    files, _ = paper_files(tmp_path, n=8, rank=8)
    for kind in ("mean", "variance", "covmat"):
        torch.save(files[kind].to(torch.bfloat16), tmp_path / f"prior_{kind}.pt")
    with pytest.warns(PriorWarning, match="stored in bfloat16") as caught:
        prior = PriorModel.from_legacy(tmp_path, convention="paper")
    assert len([w for w in caught if "stored in" in str(w.message)]) == 2
    assert prior.config.dtype == {"mean": "float32", "variance": "float32", "deviations": "bfloat16"}


def test_doubles_stay_doubles_and_rows_can_be_stored_in_half_the_bytes(tmp_path):
    files, _ = paper_files(tmp_path, n=8, rank=8)
    for kind in ("mean", "variance", "covmat"):
        torch.save(files[kind].double(), tmp_path / f"prior_{kind}.pt")
    prior = PriorModel.from_legacy(tmp_path, deviations_dtype=torch.bfloat16)
    assert prior.config.dtype == {"mean": "float64", "variance": "float64", "deviations": "bfloat16"}


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_read_but_never_anything_else(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged")
    paper_files(folder, n=8, rank=8)
    path = folder / f"prior_{data.draw(st.sampled_from(['mean', 'variance', 'covmat', 'model']))}.pt"
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        for _ in range(data.draw(st.integers(1, 20))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(PriorFormatError, PriorMatchError, PriorNumericsError):
            assert PriorModel.from_legacy(folder).num_parameters == 856


def test_a_cut_file_says_so(tmp_path):
    paper_files(tmp_path)
    path = tmp_path / "prior_covmat.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(PriorFormatError, match=r"prior_covmat\.pt cannot be read .*cut, damaged.*fetch it again"):
        PriorModel.from_legacy(tmp_path)


class Touch:
    """Unpickled, it leaves a folder behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", ["mean", "variance", "covmat", "model"])
def test_an_object_is_refused_with_a_way_out_and_never_made(tmp_path, kind, zipped):
    paper_files(tmp_path)
    evidence = tmp_path / "evidence"
    torch.save(
        {"x": torch.zeros(2), "y": Touch(evidence)}, tmp_path / f"prior_{kind}.pt", _use_new_zipfile_serialization=zipped
    )
    with pytest.raises(PriorFormatError, match=r"(?s)holds a pickled object \(\w+\.mkdir\).*never does.*get_space.*state_dict"):
        PriorModel.from_legacy(tmp_path)
    assert not evidence.exists()
    torch.load(tmp_path / f"prior_{kind}.pt", weights_only=False)  # the file does what it threatens
    assert evidence.exists()


def test_a_pickled_network_is_refused_by_its_name(tmp_path):
    torch.save(Network(), tmp_path / "swag.pt")
    with pytest.raises(PriorFormatError, match=r"pickled object \(legacy_originals\.Network\)"):
        PriorModel.from_legacy(tmp_path / "swag.pt")


@pytest.mark.slow
def test_the_way_out_gives_files_that_are_imported(tmp_path):
    """The lines in the message, on an object with the original's names."""
    paper_files(tmp_path / "a", n=8, rank=8)
    code = f"""
        import sys, torch
        sys.path.insert(0, {str(tmp_path)!r})
        from legacy_originals import PaperSwag, network, trajectory
        class SWAG(PaperSwag):
            def get_space(self):
                found = self.export()
                return found["mean"], found["variance"], found["covmat"]
        swag = SWAG(8)
        for net in trajectory(network(0), 8, 0):
            swag.collect(net)
        swag.base_model = net
        torch.save(swag, "swag_model1.pt")
        from prior_hub import PriorModel
        try:
            PriorModel.from_legacy("swag_model1.pt")
        except ValueError as error:
            lines = str(error).split("\\n\\n", 1)[1].split("    # swa_gaussian")[0]
        import textwrap
        exec(textwrap.dedent(lines))
        import os; os.remove("swag_model1.pt")
        print(PriorModel.from_legacy(".").config.estimator["welford_ratio"])
    """
    (tmp_path / "legacy_originals.py").write_text((Path(__file__).parent / "legacy_originals.py").read_text())
    (tmp_path / "b").mkdir()
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120, cwd=tmp_path / "b"
    )
    assert result.returncode == 0, result.stderr
    expected = PriorModel.from_legacy(tmp_path / "a").config.estimator["welford_ratio"]
    assert float(result.stdout) == expected


# -------------------------------------------------------------------------------------------------------------- the names


def test_names_come_from_the_model_file_and_its_buffers_go_with_the_prior(tmp_path):
    files, _ = paper_files(tmp_path)
    prior = PriorModel.from_legacy(tmp_path)
    assert list(prior.config.parameters) == [name for name, _ in network().named_parameters()]
    assert prior.config.parameters["layer.0.weight"] == (8, 64, 1, 1)
    assert torch.equal(prior.buffers["bn1.running_mean"], files["model"]["bn1.running_mean"])
    assert set(prior.buffers) == {name for name, _ in network().named_buffers()}
    assert (
        "its 6 entries named running_mean, running_var, num_batches_tracked taken for buffers"
        in prior.config.estimator["names"]
    )
    model = network(5, classes=4)
    prior.initialize(model)
    assert torch.equal(torch.cat([p.reshape(-1) for n, p in model.named_parameters() if "fc" not in n]).detach(), files["mean"])
    assert torch.equal(model.bn1.running_var, files["model"]["bn1.running_var"])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"state_dict": s},
        lambda s: {"resnet": s, "head": {"w": torch.ones(2)}},
        lambda s: {f"module.{k}": v for k, v in s.items()},
    ],
)
def test_the_model_file_may_be_wrapped(tmp_path, wrap):
    paper_files(tmp_path, model=wrap(network(0).state_dict()))
    assert next(iter(PriorModel.from_legacy(tmp_path, trust_order=True).config.parameters)) == "conv1.weight"


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("classes", [0, 10])
@pytest.mark.parametrize("with_model", [True, False])
def test_names_come_from_a_reference_with_or_without_a_head(tmp_path, device, classes, with_model):
    paper_files(tmp_path, **({} if with_model else {"model": None}))
    with torch.device(device):
        reference = Network(classes)
    prior = PriorModel.from_legacy(tmp_path, reference=reference)
    assert list(prior.config.parameters) == [name for name, _ in network().named_parameters()]
    assert prior.config.head_parameters == (("fc.weight", "fc.bias") if classes else ())
    assert set(prior.buffers) == ({name for name, _ in network().named_buffers()} if with_model else set())
    assert prior.config.model_type == "Network"


def test_a_head_in_the_model_file_or_in_the_vectors_is_told(tmp_path):
    whole = network(0, classes=4)
    paper_files(tmp_path / "with", net=network(0, classes=4))
    prior = PriorModel.from_legacy(tmp_path / "with")
    assert prior.config.head_parameters == ("fc.weight", "fc.bias")
    assert "fc.weight" in prior.config.parameters
    assert "fc.weight" not in prior.match(whole).pairs
    backbone = network(0)
    state = whole.state_dict() | backbone.state_dict()
    paper_files(tmp_path / "without", net=backbone, model=state)
    prior = PriorModel.from_legacy(tmp_path / "without", trust_order=True)
    assert "fc.weight" not in prior.config.parameters
    assert prior.config.head_parameters == ()


def test_another_number_of_values_is_an_error_with_both_numbers(tmp_path):
    paper_files(tmp_path, model=None)
    with pytest.raises(PriorMatchError, match="no names: pass reference="):
        PriorModel.from_legacy(tmp_path)
    with pytest.raises(PriorMatchError, match=r"hold 856 values, Sequential has 72: .*head=\('fc',\)"):
        PriorModel.from_legacy(tmp_path, reference=nn.Sequential(nn.Linear(8, 8)))
    other = Network(10)
    other.layer = nn.Sequential(nn.Conv2d(64, 9, 1), nn.BatchNorm2d(9))
    with pytest.raises(
        PriorMatchError, match=r"hold 856 values, Network has 1,013, 923 without its head \(fc.weight, fc.bias\)"
    ):
        PriorModel.from_legacy(tmp_path, reference=other)


def test_a_reference_that_lacks_the_head_is_told_that_the_model_file_has_it(tmp_path):
    paper_files(tmp_path, net=network(0, classes=4))
    with pytest.raises(PriorMatchError, match=r"hold 892 values, Network has 856: .* just as many, with fc.weight, fc.bias"):
        PriorModel.from_legacy(tmp_path, reference=Network())


def test_a_head_of_an_unusual_name_can_be_named(tmp_path):
    paper_files(tmp_path, model=None)
    reference = Network()
    reference.topping = nn.Linear(8, 3)
    with pytest.raises(PriorMatchError, match="name it"):
        PriorModel.from_legacy(tmp_path, reference=reference)
    assert "topping.weight" not in PriorModel.from_legacy(tmp_path, reference=reference, head=("topping",)).config.parameters


class Reordered(nn.Module):
    """The same parameters, registered in another order under other names."""

    def __init__(self):
        super().__init__()
        self.last = nn.Sequential(nn.Conv2d(64, 8, 1), nn.BatchNorm2d(8))
        self.first = nn.Conv2d(3, 64, 1, bias=False)
        self.norm = nn.BatchNorm2d(64)


def test_a_reference_in_another_order_is_refused_where_the_model_file_tells(tmp_path):
    paper_files(tmp_path)
    with pytest.raises(PriorMatchError, match=r"number 1 of 7 is 'last.0.weight' .* 'conv1.weight'"):
        PriorModel.from_legacy(tmp_path, reference=Reordered())


def test_a_reference_with_the_same_names_in_another_order_takes_the_files_order(tmp_path):
    files, _ = paper_files(tmp_path)
    reference = Network()
    reference.conv1 = reference._modules.pop("conv1")  # registered last
    assert next(iter(dict(reference.named_parameters()))) == "bn1.weight"
    prior = PriorModel.from_legacy(tmp_path, reference=reference)
    assert torch.equal(prior.mean["conv1.weight"].reshape(-1), files["mean"][:192])
    assert "not the reference's" in prior.config.estimator["names"]


def test_names_under_a_prefix_are_paired_in_order_and_buffers_go_along(tmp_path):
    state = {f"encoder.{name}": value for name, value in network(0).state_dict().items()}
    paper_files(tmp_path, model=state)
    prior = PriorModel.from_legacy(tmp_path, reference=Network(), trust_order=True)
    assert set(prior.buffers) == {name for name, _ in network().named_buffers()}


def test_a_swapped_pair_of_tensors_is_noticed(tmp_path):
    """bn1's weight and bias, both of 64 values, in the mean alone."""
    spoiled(tmp_path, mean=lambda t: torch.cat([t[:192], t[256:320], t[192:256], t[320:]]))
    with pytest.raises(PriorFormatError, match=r"2 of 4 tensors .* 'bn1.weight'"):
        PriorModel.from_legacy(tmp_path)
    assert "model_distance" not in PriorModel.from_legacy(tmp_path, trust_order=True).config.estimator


# ------------------------------------------------------------------------------------------------------ files and record


def test_files_are_found_by_folder_prefix_one_of_them_or_one_by_one(tmp_path):
    paper_files(tmp_path, name="resnet50_ssl_prior")
    expected = legacy_files(tmp_path)
    assert sorted(expected) == ["covmat", "mean", "model", "variance"]
    stem = tmp_path / "resnet50_ssl_prior"
    assert (
        legacy_files(stem) == legacy_files(str(stem)) == legacy_files(tmp_path / "resnet50_ssl_prior_variance.pt") == expected
    )
    assert legacy_files({kind: str(path) for kind, path in expected.items()}) == expected
    apart = {}
    for kind, path in expected.items():
        (tmp_path / kind).mkdir()
        apart[kind] = path.rename(tmp_path / kind / "prior.pt")
    assert sorted(PriorModel.from_legacy(apart).config.estimator["files"]) == ["covmat", "mean", "model", "variance"]


def test_files_that_are_missing_or_too_many_are_named(tmp_path):
    with pytest.raises(PriorNotFoundError, match="holds no such file"):
        PriorModel.from_legacy(tmp_path)
    with pytest.raises(PriorNotFoundError, match="no folder, no file"):
        PriorModel.from_legacy(tmp_path / "nothing" / "here")
    paper_files(tmp_path, variance=None)
    with pytest.raises(PriorFormatError, match=r"no \*_variance.pt"):
        PriorModel.from_legacy(tmp_path)
    paper_files(tmp_path, name="other", covmat=None)
    with pytest.raises(PriorFormatError, match="holds 2 priors"):
        PriorModel.from_legacy(tmp_path)
    with pytest.raises(PriorNotFoundError, match=r"rank=0"):
        PriorModel.from_legacy(tmp_path / "other")
    with pytest.raises(PriorNotFoundError, match="is no file"):
        PriorModel.from_legacy({"mean": tmp_path / "x"})
    with pytest.raises(ValueError, match="unknown kind"):
        PriorModel.from_legacy({"average": tmp_path / "x"})
    (tmp_path / "checkpoints").mkdir()
    for name in ("a.pt", "b.pt"):
        torch.save({}, tmp_path / "checkpoints" / name)
    with pytest.raises(PriorNotFoundError, match="holds 2 checkpoints: name one"):
        PriorModel.from_legacy(tmp_path / "checkpoints")
    with pytest.raises(PriorFormatError, match="no name in it ends in '_sq_mean'"):
        PriorModel.from_legacy(tmp_path / "checkpoints" / "a.pt")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"convention": "mine"}, ValueError, "expected one of 'swag', 'paper'"),
        ({"scale": 0}, ValueError, "scale > 0"),
        ({"eps": -1}, ValueError, "eps >= 0"),
        ({"covmat": "whole"}, ValueError, "'auto', 'raw' or 'divided'"),
        ({"rank": -1}, ValueError, "0 or more"),
        ({"rank": 9}, PriorFormatError, "rank 9 was asked for, the files hold 8 rows"),
        ({"rank": 1, "convention": "tufts"}, ValueError, "divides by k-1"),
        ({"variance_floor": 0.0}, ValueError, "variance_floor"),
    ],
)
def test_settings_that_no_prior_has_are_refused(tmp_path, options, error, message):
    paper_files(tmp_path)
    with pytest.raises(error, match=message):
        PriorModel.from_legacy(tmp_path, **options)


def test_what_was_decided_is_recorded_and_in_the_card(tmp_path):
    import hashlib

    paper_files(tmp_path, n=8, rank=8)
    prior = PriorModel.from_legacy(
        tmp_path,
        convention="tufts",
        base_model="org/net",
        source={"dataset": "org/data"},
        license="mit",
        estimator={"epochs": 3},
    )
    recorded = prior.config.estimator
    for kind in ("mean", "variance", "covmat", "model"):
        path = tmp_path / f"prior_{kind}.pt"
        assert recorded["files"][path.name] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert recorded["rows"] == "5 of 8, oldest first"
    assert recorded["imported_scale"] == 1e10
    assert recorded["epochs"] == 3
    assert 0 < recorded["model_distance"] < 0.2
    assert prior.config.num_snapshots == 8
    assert (prior.config.base_model, prior.config.license) == ("org/net", "mit")
    prior.save_pretrained(tmp_path / "prior")
    card = (tmp_path / "prior" / "README.md").read_text()
    assert "(snapshot minus the running mean of its time, divided by sqrt(number of rows in the file - 1))" in card
    assert "(snapshot minus final mean)" in PriorModel.from_legacy(tmp_path).card()
    assert "(snapshot minus the running mean of its time)" in PriorModel.from_legacy(tmp_path, recentre=False).card()
    assert "| estimator: convention | tufts |" in card
    assert recorded["files"]["prior_mean.pt"] in card


def test_an_imported_prior_trains_like_any_other(tmp_path):
    paper_files(tmp_path)
    model = network(7, classes=3)
    prior = PriorModel.from_legacy(tmp_path)
    penalty = PriorPenalty(prior, model, num_examples=10, scale=1e4, head_variance=1.0)
    before = prior.rescaled(1e4).penalty(model).item()
    for _ in range(3):
        model.zero_grad()
        (0 * model(torch.randn(4, 3, 4, 4))).sum().backward()
        penalty.add_gradient_()
        with torch.no_grad():
            for p in model.parameters():
                p -= 1e-2 * p.grad
    assert prior.rescaled(1e4).penalty(model).item() < before
    sample = prior.sample(generator=torch.Generator().manual_seed(0))
    assert sample["conv1.weight"].shape == (64, 3, 1, 1)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_conventions_give_finite_weights_for_any_number_of_rows(convention):
    for rows in (0, 2, 7):
        weights = convention_weights(convention, 1e10, 0.1, rows)
        assert all(math.isfinite(w) and w >= 0 for w in weights.values())
        assert (weights["low_rank_weight"] == 0) == (rows == 0)


# ----------------------------------------------------------------------------------------------------------- swa_gaussian


def named(state, suffix):
    return {k.removeprefix("base.").removesuffix(suffix): v.double() for k, v in state.items() if k.endswith(suffix)}


@pytest.mark.parametrize("n", [8, 20])
def test_a_swa_gaussian_checkpoint_is_swags_gaussian(tmp_path, n):
    """Its sample() at scale 1/2: variance / 2 and rows / sqrt(2 (K - 1)), on the checkpoint's numbers."""
    state, snapshots, _ = swa_checkpoint(tmp_path / "c.pt", n=n, rank=8)
    prior = PriorModel.from_legacy(tmp_path / "c.pt", recentre=False)
    means, squares, rows = (named(state, s) for s in ("_sq_mean", "_sq_mean", "_cov_mat_sqrt"))
    means = {name: state[f"base.{name}_mean"].double() for name in squares}
    mean = torch.cat([m.reshape(-1) for m in means.values()])
    variance = torch.cat([(squares[name] - means[name] ** 2).float().double().reshape(-1) for name in means])
    q = torch.cat(list(rows.values()), dim=1)
    theta = point({"mean": mean})
    expected, gradient = penalty_and_gradient(
        torch.distributions.LowRankMultivariateNormal(mean, (q / math.sqrt(14)).T, variance / 2).log_prob, mean, theta
    )
    value, found = prior.gaussian.penalty_and_gradient(split(theta, prior))
    assert abs(value / expected - 1) < 1e-10
    assert (torch.cat([g.reshape(-1) for g in found.values()]) - gradient).norm() / gradient.norm() < 1e-10
    assert prior.config.num_snapshots == n
    assert prior.config.estimator["covmat"] == "raw"
    assert prior.config.estimator["covmat_told_by"] == "the format"
    again = PriorModel.from_legacy(tmp_path)  # the only checkpoint in the folder
    assert again.config.estimator["recentred"] is (n == 8)
    if n == 8:
        true = torch.stack([s["bn1.weight"] for s in snapshots])
        assert (again.deviations["bn1.weight"] - (true - true.mean(0)).flip(0)).abs().max() < 1e-6
    assert torch.equal(again.buffers["bn1.running_mean"], state["base.bn1.running_mean"])


@pytest.mark.parametrize("convention", PUBLISHED)
def test_a_swa_gaussian_checkpoint_under_a_published_convention(tmp_path, convention):
    state, _, _ = swa_checkpoint(tmp_path / "c.pt")
    prior = PriorModel.from_legacy(tmp_path / "c.pt", convention=convention)
    files = {
        kind: torch.cat(
            [
                named(state, s)[n].reshape(named(state, s)[n].shape[0] if kind == "covmat" else 1, -1)
                for n in named(state, "_sq_mean")
            ],
            dim=1,
        )
        for kind, s in (("sq", "_sq_mean"), ("covmat", "_cov_mat_sqrt"))
    }
    files["mean"] = torch.cat([state[f"base.{n}_mean"].double().reshape(-1) for n in named(state, "_sq_mean")])
    files["variance"] = (files["sq"][0] - files["mean"] ** 2).float()
    theta = point(files)
    expected = original_log_prob(convention, files, theta, k=5)
    assert abs(prior.log_prob(split(theta, prior)) / expected - 1) < 1e-10


def test_the_head_of_a_checkpoint_is_told_by_name_or_reference(tmp_path):
    swa_checkpoint(tmp_path / "c.pt", make=lambda seed: network(seed, classes=4))
    for options in ({}, {"reference": Network(4)}, {"head": ("fc",)}):
        assert PriorModel.from_legacy(tmp_path / "c.pt", **options).config.head_parameters == ("fc.weight", "fc.bias")
    assert PriorModel.from_legacy(tmp_path / "c.pt", head=()).config.head_parameters == ()


def test_variances_lost_in_rounding_are_counted_warned_of_and_raised(tmp_path):
    state, _, _ = swa_checkpoint(tmp_path / "c.pt", spread=1e-5)
    squares = named(state, "_sq_mean")
    variance = torch.cat([(squares[n] - state[f"base.{n}_mean"].double() ** 2).reshape(-1) for n in squares])
    bad = int((variance <= 0).sum())
    assert bad > 50  # what the fixture is for
    with pytest.warns(PriorWarning, match=f"{bad:,} of {len(variance):,} variances are <= 0.*rounding"):
        prior = PriorModel.from_legacy(tmp_path / "c.pt")
    floor = prior.config.variance_floor
    assert 1e-10 < floor < 1e-7  # float32's step at squares of about 0.1
    assert prior.config.estimator["variance_entries_not_positive"] == bad
    assert prior.config.estimator["variance_entries_at_floor"] == int((variance < floor).sum())
    assert min(float(v.min()) for v in prior.variance.values()) == pytest.approx(floor)
    with pytest.warns(PriorWarning, match="variance_floor=1e-06"):
        assert PriorModel.from_legacy(tmp_path / "c.pt", variance_floor=1e-6).config.variance_floor == 1e-6


def test_batch_norm_statistics_that_were_never_computed_are_left_out(tmp_path):
    swa_checkpoint(tmp_path / "c.pt", update_bn=False)
    with pytest.warns(PriorWarning, match="bn_update was not run"):
        prior = PriorModel.from_legacy(tmp_path / "c.pt")
    assert prior.buffers == {}
    assert "bn1.running" not in prior.config.parameters  # "bn1.running_mean" ends in _mean too


def test_a_checkpoint_without_rows_is_diagonal(tmp_path):
    state, _, _ = swa_checkpoint(tmp_path / "c.pt")
    torch.save({k: v for k, v in state.items() if not k.endswith("cov_mat_sqrt")}, tmp_path / "c.pt")
    prior = PriorModel.from_legacy(tmp_path / "c.pt")
    assert prior.rank == 0
    assert prior.config.num_snapshots == 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("base.conv1.weight_mean"), "no 'base.conv1.weight_mean'"),
        (lambda s: s.pop("base.conv1.weight_cov_mat_sqrt"), "rows for 6 of 7 parameters"),
        (lambda s: s.update({"base.conv1.weight_cov_mat_sqrt": s["base.conv1.weight_cov_mat_sqrt"][1:]}), r"\[7, 8\] rows"),
        (lambda s: s.update({"base.conv1.weight_cov_mat_sqrt": torch.zeros(8, 5)}), r"\(8, 5\), expected \(K, 192\)"),
        (lambda s: s.update({"base.conv1.weight_mean": torch.zeros(3)}), "different shapes"),
        (lambda s: s.update({"n_models": torch.tensor([3])}), "counts 3 snapshots and holds 8 rows"),
    ],
)
def test_a_checkpoint_that_is_cut_or_altered_is_refused(tmp_path, change, message):
    state, _, _ = swa_checkpoint(tmp_path / "c.pt")
    change(state)
    torch.save({"state_dict": state}, tmp_path / "c.pt")
    with pytest.raises(PriorFormatError, match=message):
        PriorModel.from_legacy(tmp_path / "c.pt")


class Nested(nn.Module):
    """Parameters beside children: what swa_gaussian mixes up where, as here, their shapes are one."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(8, 8))
        self.first = nn.Linear(8, 8, bias=False)
        self.second = nn.Linear(8, 8, bias=False)
        self.tail = nn.Linear(8, 4)


def nested(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Nested()
        with torch.no_grad():
            for p in net.parameters():
                p.normal_()
    return net


def misplaced(tmp_path):
    """A checkpoint whose first three tensors changed places; `tail` comes after them in both orders but for the token."""

    def make(seed):
        net = nested(seed)
        del net.tail
        return net

    return swa_checkpoint(tmp_path / "c.pt", make=make)


def test_parameters_under_wrong_names_are_left_out_without_a_reference(tmp_path):
    swa_checkpoint(tmp_path / "c.pt", make=lambda seed: nn.Sequential(network(seed), nested_without_tail(seed)))
    with pytest.warns(
        PriorWarning, match=r"3 of 10 parameters \(1.token, 1.first.weight, 1.second.weight, \.\.\.\) .*left out"
    ):
        prior = PriorModel.from_legacy(tmp_path / "c.pt")
    assert list(prior.config.parameters) == [f"0.{name}" for name, _ in network().named_parameters()]
    assert prior.config.estimator["names"] == "3 left out: under wrong names"


def nested_without_tail(seed):
    net = nested(seed)
    del net.tail
    return net


def test_parameters_under_wrong_names_are_put_right_by_a_reference_with_weights(tmp_path):
    _, snapshots, net = misplaced(tmp_path)
    with pytest.warns(PriorWarning, match="put right by the reference"):
        prior = PriorModel.from_legacy(tmp_path / "c.pt", reference=net, head=())
    for name in snapshots[0]:
        true = torch.stack([s[name] for s in snapshots])
        assert torch.allclose(prior.mean[name].double(), true.mean(0), atol=1e-5), name
        last = true[-1] - true.mean(0)
        assert torch.allclose(prior.deviations[name][0].double(), last, atol=1e-5), name
        assert torch.allclose(prior.variance[name].double(), true.var(0, correction=0), rtol=0.05, atol=1e-6), name
    with pytest.raises(PriorMatchError, match="Nothing is left"):
        PriorModel.from_legacy(tmp_path / "c.pt", reference=nested_without_tail(9), head=())  # of another training


def test_a_checkpoint_in_right_order_is_taken_as_it_is_when_the_reference_says_so(tmp_path):
    """As a fork that mended the order would write it."""
    state, snapshots, net = misplaced(tmp_path)
    right = dict(state)
    for suffix in ("_mean", "_sq_mean", "_cov_mat_sqrt"):
        for name, held in (("token", "first.weight"), ("first.weight", "second.weight"), ("second.weight", "token")):
            right[f"base.{name}{suffix}"] = state[f"base.{held}{suffix}"]
    torch.save({"state_dict": {k: right[k] for k in state}}, tmp_path / "c.pt")
    prior = PriorModel.from_legacy(tmp_path / "c.pt", reference=net, head=())
    true = torch.stack([s["token"] for s in snapshots]).mean(0)
    assert torch.allclose(prior.mean["token"].double(), true, atol=1e-5)
    assert "in order" in prior.config.estimator["names"]


def test_files_of_the_format_before_torch_1_6_are_read(tmp_path):
    files, _ = paper_files(tmp_path, n=8, rank=8)
    expected = PriorModel.from_legacy(tmp_path)
    for kind, value in files.items():
        torch.save(value, tmp_path / f"prior_{kind}.pt", _use_new_zipfile_serialization=False)
    found = PriorModel.from_legacy(tmp_path)
    assert all(torch.equal(found.deviations[n], expected.deviations[n]) for n in expected.mean)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux")
def test_a_large_covmat_stays_on_the_disk_until_it_is_used(tmp_path):
    """128 MB of rows, a prior of them and its copy on disk: what they take of memory that is not the file's own pages."""
    net = nn.Sequential(*(nn.Linear(25_000, 10, bias=False) for _ in range(16)))
    for p in net.parameters():
        nn.init.normal_(p)
    files, _ = paper_files(tmp_path / "files", n=8, rank=8, net=net)
    code = textwrap.dedent("""
        import sys
        from prior_hub import PriorModel
        def anonymous():
            return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024
        before = anonymous()
        prior = PriorModel.from_legacy(sys.argv[1], convention="paper", rank=8)
        prior.save_pretrained(sys.argv[2], max_shard_size="20MB")
        print(anonymous() - before)
    """)
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "files"), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 0.6 * 4 * files["covmat"].numel()


def test_flat_order_is_that_of_parameters():
    """What the fixtures rest on."""
    net = network(3)
    assert torch.equal(flat(net)[:192], net.conv1.weight.detach().reshape(-1))
