"""Two priors compared, against dense float64, arbitrary precision, torch.distributions, scipy and closed forms."""

import json
import math
import subprocess
import sys
import textwrap

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import dense_covariance
from priors_for_tests import SHAPES, random_prior
from scipy.linalg import subspace_angles
from torch.distributions import MultivariateNormal, kl_divergence

from prior_hub import PriorMatchError, PriorModel, PriorNumericsError, compare_priors
from prior_hub.cli import main

FEW = settings(max_examples=20, deadline=None)
PLAIN = {"head_parameters": (), "diagonal_weight": 0.5, "low_rank_weight": 0.3}  # rank 1 too


def dense(prior):
    mean = torch.cat([t.double().flatten() for t in prior.mean.values()])
    return MultivariateNormal(mean, dense_covariance(prior))


def rows(prior):
    """The deviations, (P, K), float64."""
    return torch.cat([t.double().reshape(prior.rank, -1) for t in prior.deviations.values()], dim=1).T


def pair(seed, ranks=(3, 2), **fields):
    return [random_prior(seed + i, rank, **(PLAIN | {"scale": 0.3 + i} | fields)) for i, rank in enumerate(ranks)]


# ----------------------------------------------------------------------------------------------- numbers and formulas


@FEW
@given(seed=st.integers(0, 10**6), ranks=st.tuples(st.integers(0, 5), st.integers(0, 5)), eps=st.sampled_from([0.0, 1e-6, 0.1]))
def test_distances_and_divergences_are_those_of_the_dense_gaussians(seed, ranks, eps):
    a, b = pair(seed, ranks, eps=eps)
    found, first, second = compare_priors(a, b), dense(a), dense(b)
    assert found.kl_ab == pytest.approx(float(kl_divergence(first, second)), rel=1e-7)
    assert found.kl_ba == pytest.approx(float(kl_divergence(second, first)), rel=1e-7)
    assert found.kl_symmetric == pytest.approx((found.kl_ab + found.kl_ba) / 2)
    delta = first.mean - second.mean
    for distance, gaussian in ((found.distance_under_a, first), (found.distance_under_b, second)):
        assert distance == pytest.approx(float(delta @ torch.linalg.solve(gaussian.covariance_matrix, delta)), rel=1e-7)


@FEW
@given(seed=st.integers(0, 10**6), ranks=st.tuples(st.integers(0, 4), st.integers(0, 4)))
def test_exchanging_the_priors_exchanges_what_is_found(seed, ranks):
    a, b = pair(seed, ranks)
    ab, ba = compare_priors(a, b), compare_priors(b, a)
    assert (ab.kl_ab, ab.kl_ba) == pytest.approx((ba.kl_ba, ba.kl_ab), rel=1e-10)
    assert (ab.distance_under_a, ab.distance_under_b) == pytest.approx((ba.distance_under_b, ba.distance_under_a), rel=1e-10)
    assert ab.angles == pytest.approx(ba.angles, abs=1e-12)
    assert ab.overlap == pytest.approx(ba.overlap and tuple(reversed(ba.overlap)))
    assert [block.variance_ratio * other.variance_ratio for block, other in zip(ab.blocks, ba.blocks, strict=True)] == (
        pytest.approx([1.0] * len(ab.blocks))
    )
    assert min(ab.kl_ab, ab.kl_ba, *ab.angles, 0.0) >= 0


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_prior_is_at_no_distance_from_itself(rank):
    a = random_prior(0, rank, **PLAIN)
    found = compare_priors(a, a)
    assert found.kl_ab == pytest.approx(0, abs=1e-13)
    assert found.kl_ba == pytest.approx(0, abs=1e-13)
    assert found.distance_under_a == found.distance_under_b == 0
    assert found.angles == pytest.approx([0.0] * rank, abs=1e-14)
    assert found.overlap == (pytest.approx((1, 1)) if rank else None)
    assert [block.variance_ratio for block in found.blocks] == [1.0] * len(found.blocks)
    assert found.settings == {}


def test_identical_priors_with_variances_at_the_floor_are_at_no_distance():
    # I + X^T X has the condition 1e15 and more here: formulas with Gram matrices give KL of some nats
    g = torch.Generator().manual_seed(0)
    n = 2000
    deviations = torch.randn(6, n, generator=g) * 10.0 ** torch.arange(0.0, -6, -1).unsqueeze(1)
    variance = 10 ** (-12 + 8 * torch.rand(n, generator=g))
    a = PriorModel.from_tensors({"w": torch.zeros(n)}, {"w": variance}, {"w": deviations})
    b = PriorModel.from_tensors(
        {"w": torch.zeros(n)}, {"w": variance}, {"w": torch.linalg.qr(torch.randn(6, 6))[0] @ deviations}
    )
    assert compare_priors(a, a).kl_ab < 1e-9
    assert compare_priors(a, b).kl_ab < 1.0  # the rotation is rounded to float32, whose relative error is 1e-7 of 1e9 sd


def test_variances_from_1e_12_to_1e_4_cost_no_digits():
    g = torch.Generator().manual_seed(3)
    n, k, l = 7, 2, 3  # noqa: E741
    value = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    spread = lambda: 10 ** (-12 + 8 * torch.rand(n, generator=g, dtype=torch.float64))  # noqa: E731
    numbers = [(1e-3 * value(n), spread(), 0.1 * value(rank, n)) for rank in (k, l)]
    a, b = (
        PriorModel.from_tensors({"w": m}, {"w": v}, {"w": d}, scale=s) for (m, v, d), s in zip(numbers, (1, 3), strict=True)
    )
    found = compare_priors(a, b)
    with mpmath.workdps(60):
        exact = []
        for prior in (a, b):
            v, d, gaussian = prior.variance["w"].tolist(), mpmath.matrix(prior.deviations["w"].tolist()), prior.gaussian
            low_rank = mpmath.mpf(gaussian.low_rank_weight) * (d.T * d)
            exact.append(gaussian.scale * (mpmath.diag([gaussian.diagonal_weight * mpmath.mpf(x) for x in v]) + low_rank))
        delta = mpmath.matrix((a.mean["w"]).tolist()) - mpmath.matrix((b.mean["w"]).tolist())

        def divergence(first, second):
            inverse = second**-1
            product = inverse * first
            trace = sum(product[i, i] for i in range(n))
            quadratic = (delta.T * inverse * delta)[0]
            return (trace - n + quadratic + mpmath.log(mpmath.det(second) / mpmath.det(first))) / 2, quadratic

        kl_ab, under_b = (float(x) for x in divergence(*exact))
        kl_ba, under_a = (float(x) for x in divergence(*reversed(exact)))
    assert found.kl_ab == pytest.approx(kl_ab, rel=1e-8)
    assert found.kl_ba == pytest.approx(kl_ba, rel=1e-8)
    assert (found.distance_under_a, found.distance_under_b) == pytest.approx((under_a, under_b), rel=1e-8)


@FEW
@given(seed=st.integers(0, 10**6), factor=st.floats(1e-3, 1e3))
def test_a_rescaled_prior_is_at_the_known_distance(seed, factor):
    a = random_prior(seed, 3, **PLAIN, scale=1.0, eps=0.0)
    found = compare_priors(a, a.rescaled(factor))
    count = a.num_parameters
    # trace P/c, log-determinants P log c; 1e-12 of P is their rounding where c is near 1
    assert found.kl_ab == pytest.approx(count / 2 * (1 / factor - 1 + math.log(factor)), rel=1e-7, abs=1e-11)
    assert found.kl_ba == pytest.approx(count / 2 * (factor - 1 - math.log(factor)), rel=1e-7, abs=1e-11)
    assert found.angles == pytest.approx([0.0] * 3, abs=1e-14)
    assert [block.variance_ratio for block in found.blocks] == pytest.approx([1 / factor] * len(found.blocks))


def test_a_moved_mean_of_a_diagonal_prior_is_at_the_known_distance():
    variance = torch.tensor([1.0, 4.0, 0.25])
    a = PriorModel.from_tensors({"w": torch.zeros(3)}, {"w": variance})
    b = PriorModel.from_tensors({"w": torch.tensor([2.0, 2.0, 0.5])}, {"w": variance})
    found = compare_priors(a, b)
    assert found.distance_under_a == found.distance_under_b == pytest.approx(4 / 1 + 4 / 4 + 0.25 / 0.25)
    assert found.kl_ab == found.kl_ba == pytest.approx(3.0)
    assert found.angles == ()
    assert found.overlap is None
    assert found.blocks[0].shift == pytest.approx(math.sqrt(8.25 / 5.25))


def test_the_same_scale_may_be_asked_for():
    a = random_prior(0, 3, **PLAIN, scale=1.0)
    found = compare_priors(a, a.rescaled(50.0), scale=2.0)
    assert found.kl_ab == pytest.approx(0, abs=1e-13)
    assert found.settings == {}  # compared at one scale, which is no difference then
    assert compare_priors(a, a.rescaled(50.0)).settings == {"scale": (1.0, 50.0)}


# --------------------------------------------------------------------------------------------------- angles and blocks


@FEW
@given(seed=st.integers(0, 10**6), ranks=st.tuples(st.integers(1, 6), st.integers(1, 6)))
def test_angles_are_scipys(seed, ranks):
    a, b = pair(seed, ranks)
    expected = subspace_angles(rows(a).numpy(), rows(b).numpy())[::-1]  # scipy: largest first
    assert compare_priors(a, b).angles == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("angle", [1e-12, 1e-9, 1e-5, 0.5, math.pi / 2 - 1e-9])
def test_small_angles_have_digits(angle):
    g = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(40, 4, generator=g, dtype=torch.float64))[0].T
    turned = torch.stack([q[0], math.cos(angle) * q[1] + math.sin(angle) * q[2]])
    mean, variance = {"w": torch.zeros(40, dtype=torch.float64)}, {"w": torch.ones(40, dtype=torch.float64)}
    a = PriorModel.from_tensors(mean, variance, {"w": torch.stack([3 * q[0] + q[1], q[1]])})
    b = PriorModel.from_tensors(mean, variance, {"w": 1e-4 * turned})
    found = compare_priors(a, b)
    assert found.angles[0] == pytest.approx(0, abs=1e-15)
    assert found.angles[1] == pytest.approx(angle, rel=1e-3)


def test_overlap_is_the_share_of_the_variance_in_the_others_directions():
    eye = torch.eye(6)
    one = {"w": torch.ones(6)}
    a = PriorModel.from_tensors({"w": torch.zeros(6)}, one, {"w": torch.stack([3 * eye[0], eye[1]])})
    b = PriorModel.from_tensors({"w": torch.zeros(6)}, one, {"w": torch.stack([eye[0], 2 * eye[2], 0 * eye[3]])})
    found = compare_priors(a, b)
    assert found.overlap == pytest.approx((9 / 10, 1 / 5))
    assert found.angles == pytest.approx([0, math.pi / 2], abs=1e-12)  # the row of zeros is no direction


def test_blocks_hold_the_ratio_of_their_variances():
    shapes = {"net.stem.weight": (3,), "net.layer.weight": (2, 2), "net.layer.bias": (2,)}
    mean = {n: torch.zeros(s) for n, s in shapes.items()}
    a = PriorModel.from_tensors(mean, {n: torch.full(s, 8.0 if "stem" in n else 1.0) for n, s in shapes.items()})
    b = PriorModel.from_tensors(
        mean, {n: torch.full(s, 2.0) for n, s in shapes.items()}, {n: torch.ones(2, *s) for n, s in shapes.items()}
    )
    found = compare_priors(a, b)  # b: 1/2 * 2 of the diagonal, 1/2 * 2 of the rows
    assert {block.name: (block.size, block.variance_ratio) for block in found.blocks} == {
        "stem": (3, pytest.approx(8 / 2)),
        "layer": (6, pytest.approx(1 / 2)),
    }
    text = str(found)
    assert "by block: 0.5 to 4" in text


# ------------------------------------------------------------------------------------------------ names and settings


def renamed(prior, rename):
    tensors = [{rename(n): t for n, t in kind.items()} for kind in (prior.mean, prior.variance, prior.deviations)]
    g = prior.gaussian
    weights = {n: getattr(g, n) for n in ("scale", "diagonal_weight", "low_rank_weight", "eps")}
    return PriorModel.from_tensors(*tensors, **weights, head_parameters=tuple(map(rename, prior.config.head_parameters)))


def test_names_may_carry_another_prefix_and_another_order():
    a, b = random_prior(0), random_prior(1, 2)
    moved = renamed(b, lambda name: f"backbone.net.{name}")
    reordered = PriorModel.from_tensors(
        *({n: kind[n] for n in reversed(list(kind))} for kind in (moved.mean, moved.variance, moved.deviations)),
        **{n: getattr(moved.gaussian, n) for n in ("scale", "diagonal_weight", "low_rank_weight", "eps")},
        head_parameters=moved.config.head_parameters,
    )
    found, plain = compare_priors(a, reordered), compare_priors(a, b)
    assert found.match.add == "backbone.net."
    assert found.match.pairs["layer.weight"] == "backbone.net.layer.weight"
    assert (found.kl_ab, found.kl_ba) == pytest.approx((plain.kl_ab, plain.kl_ba), rel=1e-12)
    assert found.angles == pytest.approx(plain.angles)


def test_the_heads_are_left_out_and_what_only_one_has_is_marginalised():
    a, b = random_prior(0), random_prior(1)
    found = compare_priors(a, b)
    assert found.num_parameters == 17  # layer.weight, layer.bias, temperature
    assert "head.weight" not in found.match.pairs
    names = list(found.match.pairs)
    first, second = (
        MultivariateNormal(torch.cat([p.mean[n].double().flatten() for n in names]), dense_covariance(p, names)) for p in (a, b)
    )
    assert found.kl_ab == pytest.approx(float(kl_divergence(first, second)), rel=1e-9)
    assert compare_priors(a, b, include_head=True).num_parameters == 25
    assert found.shares == (17 / 25, 17 / 25)


def test_priors_of_different_networks_are_refused_with_their_coverage():
    a = random_prior(0)
    other = random_prior(1, shapes={"conv.weight": (3, 3), "conv.bias": (3,)})
    with pytest.raises(PriorMatchError, match=r"not priors of the same network.*none of the 3 parameters"):
        compare_priors(a, other)
    wider = random_prior(1, shapes={**SHAPES, "deep.weight": (30, 30)})
    with pytest.raises(PriorMatchError, match=r"only 3 of 4 parameters of the second \(17 of 917 values"):
        compare_priors(a, wider.__class__(wider.gaussian, wider.config.replace(head_parameters=("head.weight",))))
    assert compare_priors(a, wider, min_coverage=0.01, include_head=True).num_parameters == 25
    with pytest.raises(PriorMatchError, match=r"only 2 of 3 parameters of the prior \(5 of 17 values"):
        compare_priors(a, random_prior(0, shapes=SHAPES | {"layer.weight": (5, 3)}))


def test_what_has_another_shape_is_left_out_and_named():
    a, b = random_prior(0), random_prior(1, shapes=SHAPES | {"layer.bias": (5,)})
    found = compare_priors(a, b)
    assert found.match.dropped == {"layer.bias": "layer.bias"}
    assert found.num_parameters == 13
    assert "left out, of another shape: layer.bias" in str(found)
    assert (found.to_dict()["other_shape"], found.to_dict()["only_in_b"]) == ({"layer.bias": "layer.bias"}, [])


def test_settings_that_differ_are_named_by_their_place():
    a = random_prior(0, base_model="org/a", estimator={"name": "swag", "learning_rate": 0.1}, license="mit")
    b = random_prior(0, 2, base_model="org/b", estimator={"name": "swag", "batch_norm": "kept"}, scale=a.scale, license="mit")
    found = compare_priors(a, b).settings
    assert found["base_model"] == ("org/a", "org/b")
    assert found["rank"] == (3, 2)
    assert found["estimator.learning_rate"] == (0.1, None)
    assert found["estimator.batch_norm"] == (None, "kept")
    assert found["low_rank_weight"] == (0.25, 0.5)
    assert not {"license", "scale", "source.dataset", "estimator.name"} & set(found)


def test_a_variance_of_zero_is_refused():
    a = random_prior(0, **PLAIN)
    zero = PriorModel(a.gaussian._with(variance={n: 0 * t for n, t in a.variance.items()}, eps=0.0), a.config)
    with pytest.raises(PriorNumericsError, match=r"'layer\.weight' times scale 0\.3 is not positive"):
        compare_priors(a, zero)
    nan = PriorModel(a.gaussian._with(mean={n: t * math.nan for n, t in a.mean.items()}), a.config)
    with pytest.raises(PriorNumericsError, match="NaN or infinities"):
        compare_priors(nan, a)


def test_long_tensors_and_stored_types_give_the_same_in_pieces(monkeypatch):
    shapes = {"a.weight": (300, 70), "b.weight": (50,), "empty.weight": (0,)}
    a, b = (random_prior(s, 4, shapes=shapes, deviations=t, scale=1.0) for s, t in ((0, torch.bfloat16), (1, torch.float64)))
    whole = compare_priors(a, b).to_dict()
    monkeypatch.setattr(
        "prior_hub.priors.comparison.pieces", lambda size, rows: ((i, min(i + 999, size)) for i in range(0, size, 999))
    )
    cut = compare_priors(a, b).to_dict()
    for key in ("kl_ab", "kl_ba", "distance_under_a", "distance_under_b", "angles", "overlap"):
        assert cut[key] == pytest.approx(whole[key], rel=1e-9), key
    assert cut["blocks"][0]["variance_ratio"] == pytest.approx(whole["blocks"][0]["variance_ratio"])


def test_the_number_of_threads_does_not_matter_to_the_bit(monkeypatch):
    monkeypatch.setattr("prior_hub.priors.comparison._SMALL_CHUNK", 100)
    shapes = {f"layers.{i}.weight": (40 + i, 9) for i in range(12)}
    a, b = (random_prior(seed, 4, shapes, scale=1.0) for seed in range(2))
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(compare_priors(a, b).to_dict())
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]
    monkeypatch.setattr("prior_hub.priors.comparison._SMALL_CHUNK", 10**9)
    assert compare_priors(a, b).kl_ab == pytest.approx(found[0]["kl_ab"], rel=1e-12)  # in one chunk


def test_an_error_in_a_thread_is_raised(monkeypatch):
    monkeypatch.setattr("prior_hub.priors.comparison._SMALL_CHUNK", 1)
    a = random_prior(0, **PLAIN)
    zero = PriorModel(a.gaussian._with(variance={n: 0 * t for n, t in a.variance.items()}, eps=0.0), a.config)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(PriorNumericsError, match="is not positive"):
            compare_priors(a, zero)
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_a_large_prior_stays_on_the_disk_while_it_is_compared(tmp_path):
    """Two priors of 128 MB of rows each, as they lie on the disk: what is taken of memory that is not the file's own pages.

    That is 25 to 55 MB whatever the priors' size, most of it the allocator's.
    """
    n, rank = 4_000_000, 8
    for i in range(2):
        g = torch.Generator().manual_seed(i)
        draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: B023, E731
        one = {f"layers.{j}.weight": draw(n // 2) for j in range(2)}
        deviations = {name: draw(rank, n // 2) for name in one}
        PriorModel.from_tensors(one, {m: t.square() + 0.1 for m, t in one.items()}, deviations).save_pretrained(
            tmp_path / str(i)
        )
    code = textwrap.dedent("""
        import sys
        import torch
        from prior_hub import PriorModel, compare_priors
        torch.set_num_threads(1)
        from prior_hub.priors.profile import profile
        a, b = (PriorModel.from_pretrained(path, verify=False) for path in sys.argv[1:])
        compare_priors(a.truncated(1), a.truncated(1), scale=2.0)  # what libraries take once
        def resident(key):
            return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024
        import threading, time
        peak, before, done = 0, resident("RssAnon"), threading.Event()
        def watch():
            global peak
            while not done.is_set():
                peak = max(peak, resident("RssAnon"))
                time.sleep(0.002)
        watcher = threading.Thread(target=watch)
        watcher.start()
        compare_priors(a, b)
        profile(a.gaussian)
        done.set()
        watcher.join()
        print(peak - before)
    """)
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "0"), str(tmp_path / "1")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 100e6, result.stdout  # one tensor of both priors' rows: 128 MB, in float64 256 MB, all 512 MB


# --------------------------------------------------------------------------------------------------------- the command


def test_diff_prints_the_comparison_and_as_json_all_of_it(tmp_path, capsys):
    a, b = random_prior(0), random_prior(1, 2)
    a.save_pretrained(tmp_path / "a")
    b.save_pretrained(tmp_path / "b")
    found = compare_priors(a, b)
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    text = capsys.readouterr().out
    assert str(found) in text
    assert f"KL(A||B) {found.kl_ab:.4g} nats" in text
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "b"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["comparison"] == json.loads(json.dumps(found.to_dict()))
    assert printed["a"] == str(tmp_path / "a")
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "b"), "--scale", "5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["comparison"]["kl_ab"] == compare_priors(a, b, scale=5.0).kl_ab
    random_prior(1, shapes={"conv.weight": (3, 3)}).save_pretrained(tmp_path / "c")
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "c")]) == 1
    assert "not priors of the same network" in capsys.readouterr().err


def test_the_median_of_two_blocks_is_between_them():
    def prior(first, second):
        mean = {"one.weight": torch.zeros(2), "two.weight": torch.zeros(2)}
        return PriorModel.from_tensors(mean, {"one.weight": torch.full((2,), first), "two.weight": torch.full((2,), second)})

    assert "by block: 1 to 3, median 2" in str(compare_priors(prior(1.0, 3.0), prior(1.0, 1.0)))
