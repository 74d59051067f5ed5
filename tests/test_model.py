"""PriorModel: what users make, load, change, put into a model, and save."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hub_fixtures import fresh_repo_id
from huggingface_hub import HfApi
from priors_for_tests import METADATA, SHAPES, TinyNet, assert_same, bits, random_prior, tensors_of
from safetensors.torch import load_file, save_file

import prior_hub
from prior_hub.errors import PriorFormatError, PriorHubError, PriorMatchError, PriorNotFoundError, PriorNumericsError
from prior_hub.model import PriorModel, library_versions, push_prior_to_hub
from prior_hub.priors.config import FORMAT_VERSION
from prior_hub.priors.storage import read_config
from prior_hub.registry.upload import scratch_folder

ONE = {"w": torch.ones(3)}


# ---------------------------------------------------------------------------------------------------------- from numbers
def test_a_prior_from_tensors_describes_itself():
    prior = random_prior(rank=4, deviations=torch.bfloat16)
    config = prior.config
    assert config.parameters == SHAPES
    assert (config.rank, config.num_parameters, prior.num_parameters) == (4, 25, 25)
    assert (config.diagonal_weight, config.low_rank_weight) == (0.5, 1 / 6)
    assert config.dtype == {"mean": "float32", "variance": "float32", "deviations": "bfloat16"}
    assert config.buffers == ("bn.running_mean", "bn.running_var", "bn.num_batches_tracked")
    assert (config.format_version, config.prior_hub_version) == (FORMAT_VERSION, prior_hub.__version__)
    assert config.libraries == library_versions()
    assert config.libraries["torch"].split("+")[0] == torch.__version__.split("+")[0]
    for key, value in METADATA.items():
        assert getattr(config, key) == value


@pytest.mark.parametrize(("rank", "weights"), [(0, (1.0, 0.0)), (1, (1.0, 0.0)), (2, (0.5, 0.5)), (20, (0.5, 1 / 38))])
def test_the_weights_are_swags_unless_others_are_given(rank, weights):
    prior = random_prior(rank=rank)
    assert (prior.config.diagonal_weight, prior.config.low_rank_weight) == weights
    other = random_prior(rank=rank, diagonal_weight=0.7, low_rank_weight=0.1)
    assert (other.gaussian.diagonal_weight, other.config.low_rank_weight) == (0.7, 0.1)


def test_numbers_that_are_no_gaussian_are_refused():
    nan = {"w": torch.tensor([1.0, float("nan"), 1.0])}
    for mean, variance, deviations in ((nan, ONE, None), (ONE, nan, None), (ONE, ONE, {"w": torch.stack([nan["w"]])})):
        with pytest.raises(PriorNumericsError, match=r"'w' has 1 of 3 entries that are NaN"):
            PriorModel.from_tensors(mean, variance, deviations)
    with pytest.raises(PriorNumericsError, match=r"'w' has 2 of 3 entries <= 0.*variance_floor"):
        PriorModel.from_tensors(ONE, {"w": torch.tensor([1.0, 0.0, -1.0])})


def test_names_shapes_and_types_must_agree():
    for variance, deviations in (({"v": ONE["w"]}, None), ({"w": torch.ones(2)}, None), (ONE, {"w": torch.ones(2, 2)})):
        with pytest.raises(PriorMatchError):
            PriorModel.from_tensors(ONE, variance, deviations)
    two = {"a": torch.ones(2), "b": torch.ones(2).double()}
    with pytest.raises(PriorFormatError, match="mean is stored in one type for all parameters, found float32, float64"):
        PriorModel.from_tensors(two, two)
    for dtype, kind in ((torch.float16, PriorFormatError), (torch.int64, PriorMatchError)):
        with pytest.raises(kind, match="mean"):
            PriorModel.from_tensors({"w": torch.ones(2, dtype=dtype)}, {"w": torch.ones(2, dtype=dtype)})


def test_a_field_that_is_none_of_the_format_is_refused():
    with pytest.raises(TypeError, match="objective"):
        PriorModel.from_tensors(ONE, ONE, objective="x")
    with pytest.raises(PriorFormatError, match="tied_parameters"):
        PriorModel.from_tensors(ONE, ONE, tied_parameters={"a": "b"})


# ---------------------------------------------------------------------------------------------------------- variants
def test_rescaling_and_truncating_share_the_tensors_and_leave_the_prior_alone():
    prior = random_prior(rank=5)
    before = {key: bits(tensor) for key, tensor in tensors_of(prior).items()}
    scaled, cut = prior.rescaled(7.0), prior.truncated(2)
    assert (scaled.scale, scaled.config.scale, prior.scale) == (7.0, 7.0, 0.3)
    assert (cut.rank, cut.config.rank, prior.rank) == (2, 2, 5)
    for name in SHAPES:
        assert scaled.mean[name].data_ptr() == prior.mean[name].data_ptr()
        assert scaled.deviations[name].data_ptr() == prior.deviations[name].data_ptr()
        assert cut.deviations[name].data_ptr() == prior.deviations[name].data_ptr()
    assert scaled.buffers == prior.buffers
    assert {key: bits(tensor) for key, tensor in tensors_of(prior).items()} == before


def test_variants_can_be_saved_and_come_back(tmp_path):
    prior = random_prior(rank=5)
    variants = [prior.rescaled(7.0), prior.truncated(2), prior.truncated(0), prior.astype(deviations=torch.bfloat16)]
    for i, variant in enumerate([*variants, variants[3].truncated(2).rescaled(1e-3)]):
        variant.save_pretrained(tmp_path / str(i))
        assert_same(PriorModel.from_pretrained(tmp_path / str(i)), variant)


def test_half_precision_deviations_take_half_the_bytes(tmp_path):
    prior = random_prior(rank=20, buffers=False)
    for name, variant in (("full", prior), ("half", prior.astype(deviations=torch.bfloat16))):
        variant.save_pretrained(tmp_path / name)
    sizes = {name: (tmp_path / name / "prior.safetensors").stat().st_size for name in ("full", "half")}
    assert abs(sizes["full"] - sizes["half"] - 20 * 25 * 2) < 64  # the headers differ by a few bytes


def test_it_shows_what_it_is():
    assert repr(random_prior()) == "PriorModel(25 values in 4 tensors, rank=3, scale=0.3, base_model='org/tiny-net')"
    assert "base_model" not in repr(random_prior(base_model=None))


# ---------------------------------------------------------------------------------------------------------- loading
def test_a_scale_given_when_loading_replaces_the_stored_one(tmp_path):
    prior = random_prior()
    prior.save_pretrained(tmp_path)
    assert_same(PriorModel.from_pretrained(tmp_path, scale=7.0), prior.rescaled(7.0))
    assert_same(PriorModel.from_pretrained(tmp_path, rank=2, scale=7.0), prior.truncated(2).rescaled(7.0))
    for scale in (0.0, -1.0, float("nan")):
        with pytest.raises(PriorHubError, match="scale"):
            PriorModel.from_pretrained(tmp_path, scale=scale)


def test_a_local_folder_wins_over_the_hub_and_names_may_be_paths_or_text(hub, tmp_path, monkeypatch):
    random_prior().save_pretrained(tmp_path / "org" / "prior")
    monkeypatch.chdir(tmp_path)
    hub.clear_log()
    for name in ("org/prior", Path("org/prior"), "./org/prior", str(tmp_path / "org/prior"), "org/prior/"):
        found = PriorModel.from_pretrained(name)
        assert_same(found, random_prior())
        assert (found.repo_id, found.commit_hash) == (None, None)
    assert not hub.requests()


def test_a_home_folder_is_the_same_for_saving_loading_and_pushing(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    random_prior().save_pretrained("~/priors/a")
    assert (tmp_path / "priors" / "a" / "prior_config.json").is_file()
    assert_same(PriorModel.from_pretrained("~/priors/a"), random_prior())
    with pytest.raises(PriorNotFoundError, match="not a folder"):
        PriorModel.from_pretrained("~/priors/b")


@pytest.mark.hub
def test_a_folder_and_an_object_are_pushed_by_the_same_function(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    prior = random_prior()
    prior.save_pretrained("~/a")
    for source in (prior, "~/a", Path("~/a"), tmp_path / "home" / "a"):
        result = push_prior_to_hub(source, fresh_repo_id(), private=True)
        found = PriorModel.from_pretrained(result.repo_id, cache_dir=tmp_path / "cache")
        assert_same(found, prior)
        assert f'from_pretrained("{result.repo_id}")' in found.card()


def test_without_verification_values_are_not_looked_at_and_names_and_shapes_are(tmp_path):
    random_prior(eps=0.0).save_pretrained(tmp_path)
    path = tmp_path / "prior.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    tensors["variance.layer.bias"][0] = -1
    save_file(tensors, path)
    assert PriorModel.from_pretrained(tmp_path, verify=False).variance["layer.bias"][0] == -1
    del tensors["mean.layer.bias"]
    save_file(tensors, path)
    with pytest.raises(PriorFormatError, match=r"lacks mean\.layer\.bias"):
        PriorModel.from_pretrained(tmp_path, verify=False)


# ---------------------------------------------------------------------------------------------------------- saving
def test_saving_twice_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        random_prior().save_pretrained(tmp_path / name, max_shard_size=200)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_saving_returns_nothing_and_records_the_hashes_in_the_folder_only(tmp_path):
    prior = random_prior()
    assert prior.save_pretrained(tmp_path) is None
    assert prior.config.weight_files == {}
    assert list(read_config(tmp_path).weight_files) == ["prior.safetensors"]


def test_files_are_readable_by_whom_the_umask_says(tmp_path):
    random_prior().save_pretrained(tmp_path, max_shard_size=200)
    (tmp_path / "any").touch()
    assert {path.stat().st_mode for path in tmp_path.iterdir()} == {(tmp_path / "any").stat().st_mode}


def test_a_file_in_the_place_of_the_folder_is_an_os_error(tmp_path):
    (tmp_path / "file").write_text("words")
    with pytest.raises(FileExistsError):
        random_prior().save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "words"


@pytest.mark.hub
def test_what_cannot_be_saved_cannot_be_pushed(tmp_path):
    for value, words in ((-1.0, "1 of 4 entries < 0"), (float("nan"), "1 of 4 entries that are NaN")):
        prior, name = random_prior(), fresh_repo_id()
        prior.variance["layer.bias"][2] = value
        for attempt in (lambda p=prior: p.save_pretrained(tmp_path / "a"), lambda p=prior, n=name: p.push_to_hub(n)):
            with pytest.raises(PriorNumericsError, match=f"variance of 'layer.bias' has {words}"):
                attempt()
        assert not HfApi().repo_exists(name)
        assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------- with a model
def test_a_model_starts_at_the_mean_with_the_buffers_and_keeps_its_head():
    prior, model = random_prior(), TinyNet()
    head = model.head.weight.detach().clone()
    match = prior.initialize(model)
    for name in ("layer.weight", "layer.bias", "temperature"):
        assert torch.equal(model.get_parameter(name), prior.mean[name])
    assert torch.equal(model.head.weight, head)
    for name, tensor in prior.buffers.items():
        assert torch.equal(model.get_buffer(name), tensor)
    assert set(match.pairs) == {"layer.weight", "layer.bias", "temperature"}


def test_a_model_whose_buffers_do_not_fit_is_left_as_it_was():
    model = TinyNet()
    model.bn = torch.nn.BatchNorm1d(5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(PriorMatchError, match=r"buffer 'bn\.running_mean' has shape \(5,\) in the model, \(4,\) in the prior"):
        random_prior().initialize(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_penalty_of_a_model_is_that_of_its_matched_parameters():
    prior, model = random_prior(), TinyNet()
    matched = ("layer.weight", "layer.bias", "temperature")
    marginal = prior.gaussian.select(matched)
    theta = {name: model.get_parameter(name) for name in matched}
    assert prior.penalty(model).item() == marginal.penalty(theta).item()
    assert prior.log_prob(model).item() == marginal.log_prob(theta).item()
    prior.penalty(model).backward()
    assert model.layer.weight.grad is not None
    assert model.head.weight.grad is None
    everything = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    assert prior.penalty(everything).item() == prior.gaussian.penalty(everything).item()


def test_samples_are_reproducible_and_have_the_shapes_of_the_parameters():
    prior = random_prior()
    draws = [prior.sample(generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert {name: tuple(tensor.shape) for name, tensor in draws[0].items()} == SHAPES
    assert all(torch.equal(draws[0][name], draws[1][name]) for name in SHAPES)
    assert not torch.equal(draws[0]["layer.weight"], draws[2]["layer.weight"])


# ---------------------------------------------------------------------------------------------------------- pushes
def test_large_pushes_are_made_beside_the_clients_cache_unless_tmpdir_says_where(tmp_path, monkeypatch):
    home = tmp_path / "hf" / "home"
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(home))
    for name in ("TMPDIR", "TEMP", "TMP"):
        monkeypatch.delenv(name, raising=False)
    assert scratch_folder(10**6) is None
    assert not home.exists()
    assert scratch_folder(10**9) == home
    assert scratch_folder(10**18) is None, "there is no room"
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert scratch_folder(10**9) is None
    monkeypatch.delenv("TMPDIR")
    home.rmdir()
    home.touch()
    assert scratch_folder(10**9) is None, "it is no folder"


def test_a_push_writes_where_it_is_told_to_and_leaves_nothing_there(tmp_path, monkeypatch):
    asked, found = [], []
    prior = random_prior(deviations=torch.bfloat16)
    monkeypatch.setattr("prior_hub.registry.upload.scratch_folder", lambda size: (asked.append(size), tmp_path)[1])
    monkeypatch.setattr(
        "prior_hub.model.upload_prior", lambda folder, *_, **__: found.append((Path(folder).parent.parent, read_config(folder)))
    )
    prior.push_to_hub("org/name")
    assert asked == [sum(t.numel() * t.element_size() for t in tensors_of(prior).values())]
    assert [(parent, config.rank) for parent, config in found] == [(tmp_path, prior.rank)]
    assert list(tmp_path.iterdir()) == []
