"""Samples as files and their average: hand-computed, read back, at constant memory, and nothing of the model's own changed."""

import math
import weakref

import pytest
import torch
from models import image_data, tiny_resnet, tiny_vit
from torch import nn
from torch.distributions import Categorical

from prior_hub import BayesianModelAverage, isotropic_prior, write_sample
from prior_hub.errors import PriorFormatError, PriorHubError, PriorMatchError, PriorNotFoundError, PriorNumericsError
from prior_hub.inference import average as module
from prior_hub.inference.average import AveragedPrediction, averaged, default_logits, nll_of
from prior_hub.inference.samples import Sample, list_samples, remove_samples
from prior_hub.priors.batch_norm import batch_norm_buffers

torch.set_num_threads(1)


class Net(nn.Module):
    """Linear, BatchNorm, linear: (B, 3) -> {"logits": (B, 2)}."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, x, labels=None):
        return {"logits": self.head(self.norm(self.body(x)))}


@pytest.fixture
def model():
    torch.manual_seed(0)
    net = Net()
    net(torch.randn(50, 3))  # statistics that are not 0 and 1
    return net


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(n, 3, generator=generator)} for n in (5, 5, 2)]


def scramble(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator))
        for b in batch_norm_buffers(model).values():
            if b.is_floating_point():
                b.copy_(torch.rand(b.shape, generator=generator) + 0.5)


def stored(model, folder, seeds=(1, 2, 3), **more):
    """Samples of random weights in `folder`; their probabilities on batches, computed here."""
    own = {k: v.clone() for k, v in model.state_dict().items()}
    states = []
    for seed in seeds:
        scramble(model, seed)
        write_sample(folder, model, step=10 * seed, **more)
        states.append({k: v.clone() for k, v in model.state_dict().items()})
    model.load_state_dict(own)
    return states


def by_hand(states, batches):
    """(S, B, C) probabilities in float64, by a model made anew for each member."""
    members = []
    for state in states:
        net = Net()
        net.load_state_dict(state)
        net.double().eval()
        with torch.no_grad():
            members.append(torch.cat([net(b["x"].double())["logits"].softmax(1) for b in batches]))
    return torch.stack(members)


def test_the_average_is_the_mean_of_the_members_probabilities(model, batches, tmp_path):
    expected = by_hand(stored(model, tmp_path), batches)
    found = BayesianModelAverage.from_folder(tmp_path, model).predict(batches, progress=False)
    assert found.num_members == 3
    torch.testing.assert_close(found.probabilities.double(), expected.mean(0), rtol=0, atol=1e-6)  # float32 forward passes
    law = Categorical(expected.mean(0))
    torch.testing.assert_close(found.entropy.double(), law.entropy(), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.expected_entropy.double(), Categorical(expected).entropy().mean(0), rtol=0, atol=1e-5)
    information = law.entropy() - Categorical(expected).entropy().mean(0)
    torch.testing.assert_close(found.mutual_information.double(), information, rtol=0, atol=1e-5)
    assert information.max() > 0.05  # members that disagree


def test_function_values_are_each_members_log_probabilities(model, batches, tmp_path):
    expected = by_hand(stored(model, tmp_path), batches)
    found = BayesianModelAverage.from_folder(tmp_path, model).function_values(batches, progress=False)
    torch.testing.assert_close(found.exp().double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("block", [1, 2, 16])
def test_a_stream_gives_every_batch_in_order_whatever_its_block(model, batches, tmp_path, block):
    expected = by_hand(stored(model, tmp_path), batches).mean(0)
    stream = BayesianModelAverage.from_folder(tmp_path, model).stream(iter(batches), block=block, progress=False)
    pairs = list(stream)
    assert [b is own for (b, _), own in zip(pairs, batches, strict=True)] == [True] * 3
    torch.testing.assert_close(torch.cat([p.probabilities for _, p in pairs]).double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("how", ["predict", "abandoned stream", "failing batch"])
def test_the_model_has_its_own_weights_statistics_and_modes_again(model, batches, tmp_path, how):
    stored(model, tmp_path)
    model.train()
    model.norm.eval()
    own = {k: v.clone() for k, v in model.state_dict().items()}
    average = BayesianModelAverage.from_folder(tmp_path, model)
    if how == "predict":
        average.predict(batches, progress=False)
    elif how == "abandoned stream":
        stream = average.stream(batches, block=1, progress=False)
        next(stream)
        assert any(not torch.equal(v, own[k]) for k, v in model.state_dict().items())  # a member is loaded
        stream.close()
    else:
        with pytest.raises(RuntimeError, match="shape"):
            average.predict([{"x": torch.randn(2, 7)}], progress=False)
    assert all(torch.equal(v, own[k]) for k, v in model.state_dict().items())
    assert model.training
    assert model.body.training
    assert not model.norm.training


def test_one_member_at_a_time_is_in_memory(model, batches, tmp_path, monkeypatch):
    """However many there are: when one is read, the one before is gone."""
    stored(model, tmp_path, seeds=range(1, 9))
    alive, seen = [], []
    real = module.StoredSample.read

    def watched(self):
        alive.append(sum(one() is not None for one in seen))
        sample = real(self)
        seen.append(weakref.ref(sample))
        return sample

    monkeypatch.setattr(module.StoredSample, "read", watched)
    BayesianModelAverage.from_folder(tmp_path, model).predict(batches, progress=False)
    assert len(alive) == 8
    assert max(alive) == 0


def test_log_probabilities_keep_their_digits_where_probabilities_underflow():
    logits = [torch.tensor([[0.0, 200.0]]), torch.tensor([[0.0, 210.0]])]
    found = averaged(iter(logits))
    expected = math.log((math.exp(-200.0) + math.exp(-210.0)) / 2)
    assert found.log_probabilities[0, 0].item() == pytest.approx(expected, rel=1e-6)
    with pytest.raises(PriorNotFoundError, match="no member"):
        averaged(iter([]))


def test_predictions_after_reload_are_identical(model, batches, tmp_path):
    stored(model, tmp_path)
    once = BayesianModelAverage.from_folder(tmp_path, model).predict(batches, progress=False)
    torch.manual_seed(9)
    again = BayesianModelAverage.from_folder(tmp_path, Net()).predict(batches, progress=False)
    assert torch.equal(once.log_probabilities, again.log_probabilities)


def test_samples_are_listed_by_chain_and_step_and_chains_may_be_chosen(model, batches, tmp_path):
    stored(model, tmp_path, seeds=(12, 3), chain=1)
    stored(model, tmp_path, seeds=(5,), chain=0, cycle=2)
    (tmp_path / "chain-1" / "notes.txt").write_text("not a sample")
    (tmp_path / "chain-x").mkdir()
    assert [(s.chain, s.step) for s in list_samples(tmp_path)] == [(0, 50), (1, 30), (1, 120)]
    assert list_samples(tmp_path)[0].metadata()["cycle"] == "2"
    assert len(BayesianModelAverage.from_folder(tmp_path, model, chain=1)) == 2
    (tmp_path / "chain-1" / ".sample-00000200.safetensors-abcd").write_text("half")
    assert remove_samples(tmp_path, chain=1, after=30) == 1
    assert [(s.chain, s.step) for s in list_samples(tmp_path)] == [(0, 50), (1, 30)]
    assert not list((tmp_path / "chain-1").glob(".sample*"))


def test_only_what_is_trained_is_stored_and_other_frozen_weights_are_refused(model, batches, tmp_path):
    whole = stored(model, tmp_path / "whole", seeds=(1,))
    model.body.requires_grad_(requires_grad=False)
    stored(model, tmp_path / "part", seeds=(1,))
    del whole
    names = set(list_samples(tmp_path / "part")[0].read().parameters)
    assert names == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    assert set(list_samples(tmp_path / "whole")[0].read().parameters) == {n for n, _ in model.named_parameters()}
    BayesianModelAverage.from_folder(tmp_path / "part", model).predict(batches, progress=False)
    with torch.no_grad():
        model.body.weight[0, 0] += 1e-3
    with pytest.raises(PriorMatchError, match="beside other frozen weights"):
        BayesianModelAverage.from_folder(tmp_path / "part", model).predict(batches, progress=False)
    model.body.requires_grad_(requires_grad=True)
    with pytest.raises(PriorMatchError, match=r"nothing for 2 trained parameters of the model \('body.weight'\)"):
        BayesianModelAverage.from_folder(tmp_path / "part", model).predict(batches, progress=False)


def test_a_sample_of_another_model_is_refused_and_the_model_kept(model, batches, tmp_path):
    stored(model, tmp_path)
    other = Net()
    other.head = nn.Linear(4, 3)
    own = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(PriorMatchError, match=r"'head.bias' with shape \(2,\), the model shape \(3,\)"):
        BayesianModelAverage.from_folder(tmp_path, other).predict(batches, progress=False)
    assert all(torch.equal(v, own[k]) for k, v in other.state_dict().items())
    other.head = nn.Identity()
    with pytest.raises(PriorMatchError, match=r"'head.bias' with shape \(2,\), the model no such parameter"):
        BayesianModelAverage.from_folder(tmp_path, other).predict(batches, progress=False)


def test_damaged_files_are_refused(model, batches, tmp_path):
    stored(model, tmp_path, seeds=(1,))
    path = list_samples(tmp_path)[0].path
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    with pytest.raises(PriorFormatError, match="truncated or damaged"):
        BayesianModelAverage.from_folder(tmp_path, model).predict(batches, progress=False)
    path.write_bytes(whole.replace(b"parameter.head.bias", b"pickle___.head.bias"))
    with pytest.raises(PriorFormatError, match="is no key of a sample"):
        BayesianModelAverage.from_folder(tmp_path, model).predict(batches, progress=False)
    nan = torch.tensor(float("nan")).numpy().tobytes()
    path.write_bytes(whole[:-4] + nan)
    with pytest.raises(PriorNumericsError, match=r"1 of .* entries that are NaN or infinite"):
        BayesianModelAverage.from_folder(tmp_path, model).predict(batches, progress=False)


def test_a_diverged_chain_writes_nothing(model, tmp_path):
    with torch.no_grad():
        model.head.bias[0] = float("inf")
    with pytest.raises(PriorNumericsError, match=r"the chain at step 7: 'parameter.head.bias' has 1 of 2 entries"):
        write_sample(tmp_path, model, step=7)
    assert list_samples(tmp_path) == []


def test_a_write_that_fails_leaves_no_half_sample(model, tmp_path, monkeypatch):
    monkeypatch.setattr("prior_hub.inference.samples.sync", lambda path: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_sample(tmp_path, model, step=7)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_an_empty_folder_or_loader_is_said(model, tmp_path):
    with pytest.raises(PriorNotFoundError, match="holds no sample"):
        BayesianModelAverage.from_folder(tmp_path, model)
    with pytest.raises(PriorNotFoundError, match="no sample to average"):
        BayesianModelAverage(model, [])
    stored(model, tmp_path, seeds=(1,))
    with pytest.raises(PriorHubError, match="gave no batch"):
        BayesianModelAverage.from_folder(tmp_path, model).predict([], progress=False)


def test_the_priors_own_draws_can_be_averaged(tmp_path):
    model = tiny_vit()
    prior = isotropic_prior(model, variance=1e-4)
    images = torch.stack([row["pixel_values"] for row in image_data(4)])
    average = BayesianModelAverage.from_prior(prior, model, num_samples=3, seed=5)
    found = average.predict([{"pixel_values": images}], progress=False)
    generator = torch.Generator().manual_seed(5)
    probabilities = []
    for _ in range(3):
        drawn = tiny_vit()
        drawn.load_state_dict({**drawn.state_dict(), **prior.sample(generator=generator)})
        drawn.eval()
        with torch.no_grad():
            probabilities.append(drawn(images).logits.softmax(1))
    torch.testing.assert_close(found.probabilities, torch.stack(probabilities).mean(0), rtol=0, atol=1e-6)
    assert found.mutual_information.max() > 0


def test_draws_of_a_prior_over_a_model_with_batch_norm_get_statistics_of_their_own():
    model = tiny_resnet()
    prior = isotropic_prior(model, variance=1e-3)
    images = torch.stack([row["pixel_values"] for row in image_data(12)])
    with pytest.raises(ValueError, match="pass dataloader="):
        BayesianModelAverage.from_prior(prior, model, num_samples=2)
    average = BayesianModelAverage.from_prior(prior, model, num_samples=2, dataloader=[{"pixel_values": images}])
    with average.own_weights_kept():
        average.put(average.members[1])
        name, norm = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d))
        inputs = []
        handle = norm.register_forward_hook(lambda _m, given, _o: inputs.append(given[0]))
        model(images)
        handle.remove()
    mean = average.members[1].buffers[f"{name}.running_mean"]
    torch.testing.assert_close(mean, inputs[0].mean((0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_logits_are_found_in_every_kind_of_output():
    logits = torch.randn(2, 3)

    class Output:
        pass

    output = Output()
    output.logits = logits
    for given in (logits, {"loss": 1, "logits": logits}, (logits, 1), output):
        assert default_logits(given, {}) is logits
    with pytest.raises(PriorFormatError, match="no logits in the model's output, a dict"):
        default_logits({"embedding": logits}, {})


def test_segmentation_logits_are_enlarged_to_the_labels_before_they_are_averaged():
    logits = [torch.randn(2, 5, 4, 6), torch.randn(2, 5, 4, 6)]
    labels = torch.randint(0, 5, (2, 8, 12))
    labels[0, 0] = 255
    large = [default_logits({"logits": one}, {"labels": labels}) for one in logits]
    found = averaged(iter(large))
    expected = torch.stack(
        [nn.functional.interpolate(one, size=(8, 12), mode="bilinear", align_corners=False).softmax(1) for one in logits]
    ).mean(0)
    torch.testing.assert_close(found.probabilities, expected)
    assert found.entropy.shape == (2, 8, 12)
    picked = expected.gather(1, labels.where(labels != 255, 0)[:, None])[:, 0]
    manual = -picked[labels != 255].log().mean()
    torch.testing.assert_close(nll_of(found.log_probabilities, labels, 255), manual)
    assert default_logits({"logits": logits[0]}, {}) is logits[0]


def test_nll_of_tokens_and_classes_is_cross_entropys():
    tokens, labels = torch.randn(2, 7, 5), torch.randint(0, 5, (2, 7))
    labels[0, 3:] = -100
    expected = nn.functional.cross_entropy(tokens.reshape(-1, 5), labels.reshape(-1))
    torch.testing.assert_close(nll_of(tokens.log_softmax(-1), labels), expected)
    with pytest.raises(PriorMatchError, match=r"predictions \(2, 7, 5\) do not fit labels \(2, 6\)"):
        nll_of(tokens, labels[:, :6])


def test_mutual_information_is_never_negative():
    one = torch.tensor([[0.2, 0.8]]).log()
    rounded = AveragedPrediction(one, torch.tensor([0.6]), 2)
    assert rounded.entropy.item() < 0.6
    assert rounded.mutual_information.item() == 0


def test_a_wrapped_model_writes_the_same_names(tmp_path, model):
    write_sample(tmp_path / "a", model, step=1)
    write_sample(tmp_path / "b", nn.DataParallel(model), step=1)
    a, b = (list_samples(tmp_path / x)[0].read() for x in "ab")
    assert a.parameters.keys() == b.parameters.keys()
    assert a.buffers.keys() == b.buffers.keys() == batch_norm_buffers(model).keys()


def test_names_that_would_count_a_sample_twice_and_what_is_no_file_are_passed_over(model, tmp_path):
    stored(model, tmp_path, seeds=(1,))
    path = list_samples(tmp_path)[0].path
    for name in ("sample-000000010.safetensors", "sample-٠٠٠٠٠٠١٠.safetensors"):
        (path.parent / name).write_bytes(path.read_bytes())
    (tmp_path / "chain-00").mkdir()
    (tmp_path / "chain-00" / path.name).write_bytes(path.read_bytes())
    (path.parent / "sample-00000020.safetensors").mkdir()
    (path.parent / "sample-00000030.safetensors").symlink_to(tmp_path / "nowhere")
    (path.parent / ".sample-x").mkdir()
    (tmp_path / "chain-1").write_text("a file")
    assert [s.path for s in list_samples(tmp_path)] == [path]
    assert remove_samples(tmp_path, chain=0, after=5) == 1


def test_members_with_other_tensors_are_refused_instead_of_mixed(model, batches):
    whole = dict(model.named_parameters())
    members = [Sample(whole, dict(batch_norm_buffers(model))), Sample(whole, {})]
    with pytest.raises(PriorMatchError, match="has other tensors than the members before it"):
        BayesianModelAverage(model, members).predict(batches, progress=False)


def test_batches_of_different_length_are_named_as_such(tmp_path):
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Linear(1, 3)

        def forward(self, x):
            return self.w(x)

    model = Tagger()
    write_sample(tmp_path, model, step=1)
    average = BayesianModelAverage.from_folder(tmp_path, model)
    with pytest.raises(PriorHubError, match="pad all batches to one length, or use stream"):
        average.predict([torch.randn(2, 4, 1), torch.randn(2, 5, 1)], progress=False)
    assert [p.log_probabilities.shape[1] for _, p in average.stream([torch.randn(2, 4, 1)], progress=False)] == [4]
