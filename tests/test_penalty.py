"""PriorPenalty in a plain PyTorch loop, against autograd and the dense float64 formula."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import dense_covariance, dense_penalty, image_data, random_prior, tiny_resnet, tiny_vit
from pretended_mps import pretended_mps
from torch import nn

from prior_hub import PriorMatchError, PriorModel, PriorPenalty, PriorWarning
from prior_hub.finetuning.penalty import _Sum
from prior_hub.priors.matching import canonical_parameters

torch.set_num_threads(1)

N = 37
# float32 elementwise work on a few thousand entries: a few roundings (6e-8 each) per entry, against the gradient's norm
FLOAT32 = 2e-6


def two_layers(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def flat(tensors) -> torch.Tensor:
    return torch.cat([t.detach().double().flatten() for t in tensors])


def error(found, expected) -> float:
    """|found - expected| / |expected| over all tensors together."""
    found, expected = flat(found), flat(expected)
    return float((found - expected).norm() / expected.norm())


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in canonical_parameters(model).items() if p.grad is not None}


# ----------------------------------------------------------------------------------------------------------- the gradient


@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize(("head_variance", "eps", "scale"), [(None, 0.0, None), (0.3, 0.002, 7.0)])
def test_added_gradient_equals_autograd_of_loss_and_the_dense_formula(rank, head_variance, eps, scale):
    model = tiny_vit()
    prior = random_prior(model, rank=rank, eps=eps)
    penalty = PriorPenalty(prior, model, num_examples=N, head_variance=head_variance, scale=scale)

    value = penalty.add_gradient_()
    added = {name: grad.clone() for name, grad in gradients(model).items()}
    model.zero_grad()
    loss = penalty.loss()
    loss.backward()
    by_autograd = gradients(model)

    nats, dense = dense_penalty(prior, dict(model.named_parameters()), scale=scale)
    head = {n: p.detach().double() for n, p in model.named_parameters() if n not in prior.mean}
    if head_variance is not None:
        nats += sum(float(p.square().sum()) for p in head.values()) / head_variance / 2
        dense |= {n: p / head_variance for n, p in head.items()}
    assert added.keys() == by_autograd.keys() == dense.keys()
    assert error(added.values(), [dense[n] / N for n in added]) < FLOAT32
    assert error(by_autograd.values(), [dense[n] / N for n in by_autograd]) < FLOAT32
    for name in added:
        assert error([added[name]], [dense[name] / N]) < 10 * FLOAT32, name  # a small tensor has few roundings to average
    assert float(value) == pytest.approx(nats / N, rel=FLOAT32)
    assert loss.item() == pytest.approx(nats / N, rel=FLOAT32)
    assert float(penalty.penalty()) == pytest.approx(nats, rel=FLOAT32)


def test_gradient_is_added_to_what_is_there_and_scaled_by_the_factor_alone():
    model = two_layers()
    prior = random_prior(model, head=("2",))
    penalty = PriorPenalty(prior, model, num_examples=N, head_variance=0.5)
    _, expected = dense_penalty(prior, {n: model.get_parameter(n) for n in prior.mean})
    expected |= {n: p.detach().double() / 0.5 for n, p in model.named_parameters() if n not in prior.mean}
    for factor in (1024.0, torch.tensor(1024.0)):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        value = penalty.add_gradient_(factor)
        for name, parameter in model.named_parameters():
            assert error([parameter.grad - 1], [1024 * expected[name] / N]) < FLOAT32, name
        assert float(value) == pytest.approx(float(penalty.penalty()) / N, rel=1e-12)  # the same code: rounding only


def test_gradient_none_of_an_unused_parameter_becomes_the_priors_gradient():
    model = two_layers()
    prior = random_prior(model, head=())
    model[0](torch.ones(2, 5)).sum().backward()  # the last layer is not used
    assert model[2].weight.grad is None
    PriorPenalty(prior, model, num_examples=N).add_gradient_()
    _, dense = dense_penalty(prior, dict(model.named_parameters()))
    assert error([model[2].weight.grad], [dense["2.weight"] / N]) < FLOAT32


@pytest.mark.parametrize("rank", [0, 2])
def test_gradient_reaches_channels_last_parameters_in_place(rank):
    model = tiny_resnet()
    prior = random_prior(model, rank=rank)
    batch = torch.stack([row["pixel_values"] for row in image_data(4)])
    model.to(memory_format=torch.channels_last)
    model(pixel_values=batch.to(memory_format=torch.channels_last), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    grads = {name: p.grad for name, p in model.named_parameters()}
    scattered = [name for name, grad in grads.items() if not grad.is_contiguous()]
    assert scattered, "no gradient is channels_last: the test tests nothing"

    PriorPenalty(prior, model, num_examples=N).add_gradient_()

    _, dense = dense_penalty(prior, {n: p for n, p in model.named_parameters() if n in prior.mean})
    for name, parameter in model.named_parameters():
        assert parameter.grad is grads[name]
        expected = before[name].double() + dense.get(name, torch.zeros(())) / N
        assert error([parameter.grad], [expected]) < FLOAT32, name


def test_prior_is_conditioned_on_frozen_parameters():
    """The rows of frozen parameters stay in Sigma: the others' gradient is the full one's part, theirs is not written."""
    model = tiny_vit()
    prior = random_prior(model)
    frozen = [n for n, p in model.named_parameters() if "embeddings" in n and n in prior.mean]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    penalty = PriorPenalty(prior, model, num_examples=N, head_variance=1.0)
    penalty.add_gradient_()
    nats, dense = dense_penalty(prior, dict(model.named_parameters()))
    free = [n for n in prior.mean if n not in frozen]
    assert frozen
    assert error([model.get_parameter(n).grad for n in free], [dense[n] / N for n in free]) < FLOAT32
    assert all(model.get_parameter(n).grad is None for n in frozen)
    assert set(penalty.match.frozen) == set(frozen)
    head = sum(float(p.detach().double().square().sum()) for n, p in model.named_parameters() if n.startswith("classifier")) / 2
    assert float(penalty.penalty()) == pytest.approx(nats + head, rel=FLOAT32)


def test_parameters_the_model_lacks_are_marginalised():
    model = tiny_vit()
    source = nn.ModuleDict({"body": tiny_vit(), "more": nn.Linear(3, 3)})
    prior = random_prior(source, head=())
    penalty = PriorPenalty(prior, model, num_examples=N)
    penalty.add_gradient_()
    theta = {f"body.{n}": p for n, p in model.named_parameters()}
    nats, dense = dense_penalty(prior, theta)
    assert float(penalty.penalty()) == pytest.approx(nats, rel=FLOAT32)
    assert error([p.grad for p in model.parameters()], [dense[n] / N for n in theta]) < FLOAT32


def test_rank_and_scale_arguments_replace_those_of_the_prior():
    model = tiny_vit()
    prior = random_prior(model, rank=4, scale=3.0)
    theta = dict(model.named_parameters())
    given = PriorPenalty(prior, model, num_examples=N, scale=0.5, rank=2)
    assert float(given.penalty()) == pytest.approx(dense_penalty(prior.truncated(2), theta, scale=0.5)[0], rel=FLOAT32)
    stored = PriorPenalty(prior, model, num_examples=N)
    assert float(stored.penalty()) == pytest.approx(dense_penalty(prior, theta, scale=3.0)[0], rel=FLOAT32)


def test_compiled_and_wrapped_models_bind_by_their_plain_names():
    model = two_layers()
    prior = random_prior(model, head=())
    _, dense = dense_penalty(prior, dict(model.named_parameters()))
    for wrapped in (torch.compile(model, backend="eager"), nn.DataParallel(torch.compile(model, backend="eager"))):
        model.zero_grad()
        penalty = PriorPenalty(prior, wrapped, num_examples=N)
        penalty.add_gradient_()
        assert penalty.covered_names == frozenset(prior.mean)
        assert error([p.grad for p in model.parameters()], [dense[n] / N for n in prior.mean]) < FLOAT32


def test_a_plain_loop_ends_where_autograd_of_the_dense_loss_ends():
    model, twin = two_layers(), two_layers().double()
    prior = random_prior(model, head=(), variance=0.1)
    sigma = dense_covariance(prior)
    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(12, 5, generator=generator), torch.randint(3, (12,), generator=generator)
    penalty = PriorPenalty(prior, model, num_examples=12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    reference = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    mean = flat(prior.mean.values())
    for _ in range(10):
        optimizer.zero_grad()
        for part in range(3):  # three micro-batches of four, the prior once
            rows = slice(4 * part, 4 * part + 4)
            (nn.functional.cross_entropy(model(inputs[rows]), labels[rows]) / 3).backward()
        penalty.add_gradient_()
        optimizer.step()

        reference.zero_grad()
        delta = torch.cat([p.flatten() for p in twin.parameters()]) - mean
        nll = nn.functional.cross_entropy(twin(inputs.double()), labels)
        (nll + 0.5 * delta @ torch.linalg.solve(sigma, delta) / 12).backward()
        reference.step()
    start = flat(two_layers().parameters())
    moved = flat(twin.parameters()) - start
    assert moved.norm() > 0.1
    assert error([flat(model.parameters()) - start], [moved]) < 1e-5  # ten steps of float32 rounding


def test_an_accelerate_loop_counts_the_prior_exactly_once_per_optimizer_step():
    """26 rows in batches of 2, accumulation 4: three full windows and one of a single micro-batch, in each of two epochs."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    model, twin = tiny_vit(), tiny_vit().double()
    prior, data = random_prior(model), image_data(26)
    loader = torch.utils.data.DataLoader(data, batch_size=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    penalty = PriorPenalty(prior, model, num_examples=len(data))
    names = list(prior.mean)
    factor, mean = torch.linalg.cholesky(dense_covariance(prior)), flat(prior.mean.values())
    window, windows = [], []
    for _ in range(2):
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                window.append(batch)
                if accelerator.sync_gradients:
                    plain = {n: p.grad.clone() for n, p in model.named_parameters()}
                    penalty.add_gradient_()
                    twin.load_state_dict(model.state_dict())
                    twin.zero_grad()
                    for part in window:
                        (twin(pixel_values=part["pixel_values"].double(), labels=part["labels"]).loss / 4).backward()
                    theta = flat(model.get_parameter(n) for n in names)
                    share = torch.cholesky_solve((theta - mean).unsqueeze(1), factor).squeeze(1) / 26
                    found = flat(model.get_parameter(n).grad for n in names)
                    assert error([found], [flat(twin.get_parameter(n).grad for n in names) + share]) < FLOAT32
                    difference = found - flat(plain[n] for n in names)
                    # rounding of the sum, averaged over a thousand entries
                    assert float(difference @ share / (share @ share)) == pytest.approx(1, abs=1e-6)
                    windows.append(len(window))
                    window = []
                optimizer.step()
                optimizer.zero_grad()
    assert windows == [4, 4, 4, 1] * 2
    assert error([flat(model.parameters())], [flat(tiny_vit().parameters())]) > 0.01  # the weights moved


# ------------------------------------------------------------------------------------------------------- stiff priors


def stiff_prior(smallest: float = 1e-4, **settings) -> tuple[nn.Module, PriorModel]:
    """A diagonal prior over two layers with one variance of `smallest` and the others 1."""
    model = two_layers()
    mean = {n: p.detach() + 0.1 for n, p in model.named_parameters()}
    variance = {n: torch.ones_like(p) for n, p in mean.items()}
    variance["0.weight"][1, 2] = smallest
    return model, PriorModel.from_tensors(mean, variance, **settings)


@pytest.mark.parametrize(("rate", "diverges"), [(0.99, False), (1.01, True)])
def test_gradient_descent_on_the_penalty_diverges_above_the_threshold_and_converges_below(rate, diverges):
    model, prior = stiff_prior(scale=0.5, eps=1e-5)
    penalty = PriorPenalty(prior, model, num_examples=N)
    assert penalty.curvature() == pytest.approx(1 / (0.5e-4 + 1e-5) / N, rel=1e-5)
    learning_rate = rate * 2 / penalty.curvature()
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    start = float(penalty.penalty())
    for _ in range(400):
        optimizer.zero_grad()
        penalty.add_gradient_()
        optimizer.step()
    stiffest = float((model[0].weight.detach() - prior.mean["0.weight"])[1, 2].abs())
    # the stiffest direction is multiplied by 1 - 2 rate = -0.98 or -1.02 each step: 0.98^400 = 3e-4, 1.02^400 = 2.7e3
    assert (stiffest > 100) if diverges else (stiffest < 1e-3)
    assert (float(penalty.penalty()) > start) is diverges
    if diverges:
        with pytest.warns(PriorWarning, match="too stiff"):
            assert penalty.warn_if_unstable(learning_rate)
    else:
        assert not penalty.warn_if_unstable(learning_rate)


@settings(deadline=None, max_examples=40)
@given(
    smallest=st.floats(1e-12, 1e-3),
    scale=st.floats(1e-3, 1e3),
    eps=st.sampled_from([0.0, 1e-9, 1e-5]),
    learning_rate=st.floats(1e-4, 1.0),
    num_examples=st.integers(1, 10**6),
)
def test_the_scale_and_the_learning_rate_that_the_warning_names_silence_it(smallest, scale, eps, learning_rate, num_examples):
    model, prior = stiff_prior(smallest, scale=scale, eps=eps)
    penalty = PriorPenalty(prior, model, num_examples=num_examples)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        too_stiff = penalty.warn_if_unstable(learning_rate)
    precision = 1 / (scale * smallest + eps)
    if abs(learning_rate * precision / num_examples - 2) > 1e-3:  # power iteration and float32 decide nearer than this
        assert too_stiff is (learning_rate * precision / num_examples > 2)
    assert len(caught) == int(too_stiff)
    if not too_stiff:
        return
    message = str(caught[0].message)
    assert caught[0].category is PriorWarning
    rate = float(re.search(r"learning_rate to (\S+) or less", message)[1])
    assert 0.8 * 2 * num_examples / precision < rate < learning_rate  # no smaller than it must be
    assert not penalty.warn_if_unstable(rate)
    found = re.search(r"prior_scale from (\S+) to (\S+) or more", message)
    if found is None:
        assert eps > 0.99 / precision  # the scale does not multiply eps
        return
    wider = float(found[2])
    assert wider < 1.25 * max(scale, (learning_rate / 2 / num_examples - eps) / smallest)
    assert not PriorPenalty(prior, model, num_examples=num_examples, scale=wider).warn_if_unstable(learning_rate)


def test_a_head_prior_that_is_too_stiff_is_named_with_a_variance_that_is_not():
    model = tiny_vit()
    prior = random_prior(model)
    penalty = PriorPenalty(prior, model, num_examples=10, head_variance=1e-6)
    with pytest.warns(PriorWarning, match="prior_head_variance from 1e-06 to") as caught:
        assert penalty.warn_if_unstable(0.01)
    wider = float(re.search(r"prior_head_variance from \S+ to (\S+) or more", str(caught[0].message))[1])
    assert "prior_scale from" not in str(caught[0].message)
    assert not PriorPenalty(prior, model, num_examples=10, head_variance=wider).warn_if_unstable(0.01)


# --------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("head_variance", [None, 0.3])
def test_a_prior_kept_on_the_cpu_acts_on_a_model_elsewhere(head_variance):
    """The model's device is pretended (tests/pretended_mps.py)."""
    model = two_layers()
    prior = random_prior(model, head=("2",))
    here = PriorPenalty(prior, model, num_examples=7, head_variance=head_variance)
    value = here.add_gradient_()
    expected = gradients(model)
    precision = here.total_curvature()
    with pretended_mps():
        there = two_layers()
        for layer in (there[0], there[2]):
            for name, parameter in list(layer.named_parameters()):
                layer.register_parameter(name, nn.Parameter(parameter.detach().to("mps")))
                getattr(layer, name).grad = torch.zeros(parameter.shape, device="mps")
        penalty = PriorPenalty(prior, there, num_examples=7, head_variance=head_variance, device="cpu")
        assert {t.device.type for t in penalty.gaussian.mean.values()} == {"cpu"}
        found = penalty.add_gradient_()
        assert found.device.type == "mps"
        assert float(found) == pytest.approx(float(value), rel=1e-5)
        assert penalty.total_curvature() == pytest.approx(precision, rel=1e-5)
        for name, parameter in there.named_parameters():
            torch.testing.assert_close(parameter.grad.cpu(), expected.get(name, torch.zeros(parameter.shape)))
        assert all(a.device.type == "mps" for a in penalty.preconditioner().values() if isinstance(a, torch.Tensor))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("device", [None, "cpu"])
def test_a_model_on_a_gpu_gets_the_gradient_and_the_implicit_step_of_the_cpu(device):
    model = tiny_resnet()
    prior = random_prior(model)
    here = PriorPenalty(prior, model, num_examples=7, head_variance=0.3)
    there = tiny_resnet().to("cuda")
    there.load_state_dict(model.state_dict())
    penalty = PriorPenalty(prior, there, num_examples=7, head_variance=0.3, device=device)
    assert float(penalty.add_gradient_()) == pytest.approx(float(here.add_gradient_()), rel=1e-6)
    for found, expected in zip(there.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found.grad.cpu(), expected.grad, rtol=1e-5, atol=1e-6)
    for bound, owner in ((here, model), (penalty, there)):
        bound.proximal_step_({id(p): 0.1 for p in owner.parameters()})
    for found, expected in zip(there.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-6)


def test_what_rides_along_with_a_sum_counts_once_and_gets_off_if_the_evaluation_fails():
    model = two_layers()
    penalty = PriorPenalty(random_prior(model, head=("2",)), model, num_examples=N, head_variance=0.5)
    expected = float(penalty.penalty())
    total = penalty._sum = _Sum(torch.device("cpu"))
    assert float(penalty.penalty()) == pytest.approx(expected, rel=1e-9)  # nothing was summed: it is added afterwards
    penalty.gaussian = penalty.gaussian._with(sum_over_ranks=total)
    assert float(penalty.penalty()) == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ZeroDivisionError):
        penalty._with_head(lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    assert float(total(torch.tensor(1.0))) == 1.0


def test_impossible_arguments_are_value_errors():
    model = two_layers()
    prior = random_prior(model, head=())
    for num_examples in (0, -1):
        with pytest.raises(ValueError, match="expected the number of training examples"):
            PriorPenalty(prior, model, num_examples=num_examples)
    for variance in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="head_variance"):
            PriorPenalty(prior, model, num_examples=N, head_variance=variance)


def test_a_prior_whose_parameters_are_all_frozen_is_refused():
    model = tiny_vit()
    prior = random_prior(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("classifier"))
    with pytest.raises(PriorMatchError, match=f"all {len(prior.mean)} parameters under the prior are frozen"):
        PriorPenalty(prior, model, num_examples=N)


def test_a_model_of_deepspeed_is_refused_by_its_engine_or_by_its_partitioned_parameters():
    class DeepSpeedEngine(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    prior = random_prior(model, head=())
    with pytest.raises(PriorMatchError, match=r"DeepSpeed.* Use FSDP2"):
        PriorPenalty(prior, DeepSpeedEngine(model), num_examples=1)
    PriorPenalty(prior, model, num_examples=1)
    for number, parameter in enumerate(model.parameters()):  # as zero.Init leaves them: empty, with an id of its own
        parameter.ds_id = number
        parameter.data = torch.empty(0)
    with pytest.raises(PriorMatchError, match=r"DeepSpeed.* Use FSDP2"):
        PriorPenalty(prior, model, num_examples=1)


def test_low_precision_gradients_warn_once():
    model = two_layers().to(torch.bfloat16)
    penalty = PriorPenalty(random_prior(model, head=()), model, num_examples=N)
    with pytest.warns(PriorWarning, match="gradients are bfloat16") as caught:
        penalty.add_gradient_()
    assert caught[0].filename == __file__
    penalty.add_gradient_()  # warnings are errors here


def test_report_names_coverage_rank_scale_and_n():
    model = tiny_vit()
    prior = random_prior(model, rank=3, scale=2.0)
    report = PriorPenalty(prior, model, num_examples=N, head_variance=0.25).report()
    assert f"{len(prior.mean)} of {len(prior.mean) + 2} parameters under the prior" in report
    assert "rank 3, scale 2, N = 37, head variance 0.25 over 2 parameters" in report
