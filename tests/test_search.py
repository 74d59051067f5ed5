"""Finding priors on the Hub: what is listed, which fit a model, in how few requests, and what strangers cannot break."""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import dataclass, replace
from typing import Any

import pytest
import timm
import torch
import yaml
from hub_fixtures import ALICE, BOB, fresh_repo_id
from huggingface_hub import CommitOperationAdd, HfApi, constants
from hypothesis import given, settings
from hypothesis import strategies as st
from models import quiet_arguments, tiny_bert, tiny_llama, tiny_resnet, tiny_vit
from priors_for_tests import random_prior
from torch import nn

from prior_hub import (
    PriorConfig,
    PriorInfo,
    PriorModel,
    PriorTrainer,
    PriorWarning,
    list_priors,
    prior_info,
    priors_for,
    search_priors,
)
from prior_hub.cli import main
from prior_hub.errors import PriorAccessError, PriorConnectionError, PriorMatchError, PriorNotFoundError
from prior_hub.priors.architecture import architecture_fingerprint, config_fingerprint, model_fingerprints
from prior_hub.priors.matching import canonical_parameters, head_parameter_names
from prior_hub.registry import search
from prior_hub.registry.card import render_card

alice, bob = HfApi(token=ALICE), HfApi(token=BOB)
WEIGHTS = b"these bytes stand for gigabytes, and nobody may ask for them"


def unique(hint: str) -> str:
    """A name nobody else uses: all tests share one hub."""
    return fresh_repo_id(hint).split("/")[1]


# ------------------------------------------------------------------------------------------------------ published priors


def config_over(model: nn.Module, **fields: Any) -> PriorConfig:
    """The configuration of a prior over the body of a model, as learning one writes it."""
    head = head_parameter_names(model)
    shapes = {name: tuple(p.shape) for name, p in canonical_parameters(model).items() if name not in head}
    known: dict[str, Any] = {"rank": 4, "diagonal_weight": 0.5, "low_rank_weight": 0.25, "license": "mit"}
    known |= {"estimator": {"name": "swag"}, "source": {"objective": "classification", "dataset": "org/data"}}
    return PriorConfig(parameters=shapes, head_parameters=tuple(head), **(known | fields))


def publish(config: PriorConfig, repo_id: str, *, card: str | None = None, api: HfApi = alice, **changes: Any) -> str:
    """A prior's files in one commit, as `push_to_hub` leaves them, but with weights that are none; `changes`: other files."""
    config = config.replace(weight_files={"prior.safetensors": hashlib.sha256(WEIGHTS).hexdigest()})
    files = {"README.md": card or render_card(config, repo_id=repo_id), "prior_config.json": config.to_json()}
    files |= {"prior.safetensors": WEIGHTS} | changes
    contents = {path: text.encode() if isinstance(text, str) else text for path, text in files.items() if text is not None}
    api.create_repo(repo_id, exist_ok=True)
    api.create_commit(repo_id, [CommitOperationAdd(p, data) for p, data in contents.items()], commit_message="prior")
    return repo_id


def on_meta(make: Any, *arguments: Any, **options: Any) -> nn.Module:
    try:
        with torch.device("meta"):
            return make(*arguments, **options)
    except RuntimeError:  # the oldest timm reads numbers from a tensor as it builds some models
        from accelerate import init_empty_weights

        with init_empty_weights():
            return make(*arguments, **options)


TIMM = ["resnet18", "resnet34", "resnet50", "wide_resnet50_2", "vit_tiny_patch16_224", "convnext_atto", "convnext_nano"]
TIMM += ["efficientnet_b0"]
TINY = {
    "resnet-8": lambda: tiny_resnet(),
    "resnet-16": lambda: tiny_resnet(hidden_sizes=[16]),
    "resnet-12": lambda: tiny_resnet(hidden_sizes=[12]),
    "resnet-deep": lambda: tiny_resnet(depths=[2]),
    "vit-8": lambda: tiny_vit(),
    "vit-16": lambda: tiny_vit(hidden_size=16),
    "vit-12": lambda: tiny_vit(hidden_size=12),
    "vit-wide": lambda: tiny_vit(intermediate_size=16),
    "vit-deep": lambda: tiny_vit(num_hidden_layers=2),
    "bert-8": lambda: tiny_bert(),
    "bert-16": lambda: tiny_bert(hidden_size=16),
    "bert-wide": lambda: tiny_bert(intermediate_size=16),
    "bert-deep": lambda: tiny_bert(num_hidden_layers=3),
    "llama-8": lambda: tiny_llama(),
    "llama-16": lambda: tiny_llama(hidden_size=16),
    "llama-deep": lambda: tiny_llama(num_hidden_layers=3),
    "llama-wide": lambda: tiny_llama(intermediate_size=20),
}


@dataclass(frozen=True)
class Library:
    """Priors published by this file: (architecture, objective) -> repository; `mark` is a part of all their names."""

    mark: str
    repos: dict[tuple[str, str], str]

    def mine(self, found: list[Any]) -> list[Any]:
        """Those of a result that are of this library."""
        return [item for item in found if item.repo_id in self.repos.values()]


@pytest.fixture(scope="module")
def library(hub) -> Library:
    """50 priors: 25 architectures, two source tasks each."""
    mark, repos = unique("lib"), {}
    models = {name: on_meta(timm.create_model, name) for name in TIMM} | {name: make() for name, make in TINY.items()}
    for name, model in models.items():
        for rank, objective in ((5, "image classification"), (20, "SimCLR")):
            source = {"objective": objective, "dataset": "org/cifar10" if rank == 5 else "org/photos"}
            base = f"timm/{name}.{mark}" if name in TIMM else f"{mark}/{name}"
            config = config_over(model, base_model=base, source=source, rank=rank, license="mit" if rank == 5 else "apache-2.0")
            repo = f"alice/{name.replace('_', '-')}-{objective.split()[-1].lower()}-{mark}"
            repos[name, objective] = publish(config, repo)
    assert len(repos) == 50
    return Library(mark, repos)


def weight_requests(hub) -> list[dict[str, Any]]:
    """Everything that asked for weights, or for where they are: LFS, the CDN, Xet."""
    return hub.requests(r"safetensors|/lfs/|xet|xorb|reconstruction") + hub.requests(role="cdn")


class Wrapped(nn.Module):
    """A model of one's own around a network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.decode_head = nn.Linear(5, 2)


def timm_wrapper(name: str) -> nn.Module:
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    return TimmWrapperForImageClassification(TimmWrapperConfig(architecture=name))


def segmenter() -> nn.Module:
    """A transformers model of which the network is a part, `backbone`."""
    from transformers import ResNetConfig, UperNetConfig, UperNetForSemanticSegmentation

    inner = ResNetConfig(embedding_size=4, hidden_sizes=[16], depths=[1], layer_type="basic", out_features=["stage1"])
    more = {"use_auxiliary_head": False, "pool_scales": [1], "hidden_size": 4}
    return UperNetForSemanticSegmentation(UperNetConfig(backbone_config=inner, **more))


def with_lora(model: nn.Module, target: str) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=2, target_modules=[target]))


MODELS = {
    "timm": ("resnet50", lambda: on_meta(timm.create_model, "resnet50", num_classes=7)),
    "timm, with weights": ("convnext_atto", lambda: timm.create_model("convnext_atto", num_classes=3)),
    "timm features": ("resnet18", lambda: on_meta(timm.create_model, "resnet18", features_only=True)),
    "timm in transformers": ("resnet34", lambda: on_meta(timm_wrapper, "resnet34")),
    "transformers": ("bert-deep", lambda: tiny_bert(num_hidden_layers=3, classes=9)),
    "transformers without head": ("vit-16", lambda: tiny_vit(hidden_size=16).vit),
    "language model": ("llama-wide", lambda: tiny_llama(intermediate_size=20)),
    "segmentation": ("resnet-16", segmenter),
    "data parallel": ("vit-deep", lambda: nn.DataParallel(tiny_vit(num_hidden_layers=2))),
    "compiled": ("resnet-deep", lambda: torch.compile(tiny_resnet(depths=[2]))),
    "LoRA": ("bert-16", lambda: with_lora(tiny_bert(hidden_size=16), "query")),
    "one's own": ("efficientnet_b0", lambda: Wrapped(on_meta(timm.create_model, "efficientnet_b0", num_classes=0))),
}
KINDS = [pytest.param(kind, marks=pytest.mark.slow) if kind == "compiled" else kind for kind in MODELS]


@pytest.mark.hub
@pytest.mark.parametrize("kind", KINDS)
def test_priors_for_picks_the_right_prior_among_50_and_asks_for_no_weights(kind, library, hub):
    name, make = MODELS[kind]
    model = make()
    hub.clear_log()
    fits = priors_for(model)
    mine = library.mine(fits)
    assert {fit.repo_id for fit in mine} == {library.repos[name, "image classification"], library.repos[name, "SimCLR"]}
    assert fits[0].exact
    assert all(fit.exact and fit.coverage == pytest.approx(1) and "same architecture" in fit.why for fit in mine)
    assert set(fits[0].match.pairs.values()) <= set(canonical_parameters(model))
    assert weight_requests(hub) == []
    sizes = [entry["sent"] for entry in hub.requests("prior_config.json", "GET")]
    assert sum(sizes) < 200_000  # bytes, of configurations


@pytest.mark.hub
def test_the_fits_of_a_model_take_one_request_and_the_configurations_of_those_that_fit(library, hub, tmp_path):
    model = tiny_resnet(hidden_sizes=[16])
    hub.clear_log()
    first = library.mine(priors_for(model, cache_dir=tmp_path))
    listings, configs = hub.requests("/api/models\\?"), hub.requests("prior_config.json")
    assert len(listings) == 1, "tiny models name no base model"
    assert len([c for c in configs if c["method"] == "GET" and c["status"] == 200]) == len(first) == 2
    assert len(hub.requests()) <= 1 + 4 * 2
    for i in range(5):  # however many others there are
        publish(config_over(tiny_vit(hidden_size=24 + 8 * i)), fresh_repo_id("more"))
    hub.clear_log()
    again = library.mine(priors_for(model, cache_dir=tmp_path))
    assert [fit.to_dict() for fit in again] == [fit.to_dict() for fit in first]
    assert len(hub.requests()) == 1, "configurations are cached by commit"


@pytest.mark.hub
def test_a_base_model_that_the_model_names_is_asked_for(library, hub):
    model = tiny_bert(num_hidden_layers=2)  # not published: bert-deep has three layers
    model.config._name_or_path = f"{library.mark}/bert-deep"
    hub.clear_log()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PriorWarning)
        fits = priors_for(model, others=False)
    assert {fit.repo_id for fit in fits} == {library.repos["bert-deep", t] for t in ("image classification", "SimCLR")}
    assert not any(fit.exact for fit in fits)
    assert f"same base model ({library.mark}/bert-deep)" in fits[0].why
    assert len(hub.requests("/api/models\\?")) == 2
    timm_model = on_meta(timm.create_model, "resnet18", pretrained_cfg_overlay={"hf_hub_id": f"timm/resnet34.{library.mark}"})
    hub.clear_log()
    priors_for(timm_model)
    assert len(hub.requests(f"base_model%3Atimm%2Fresnet34.{library.mark}")) == 1


@pytest.mark.hub
def test_where_nothing_fits_exactly_the_others_are_read_one_of_each_architecture(library, hub):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PriorWarning)  # of what other tests have published
        hub.clear_log()
        model = on_meta(timm.create_model, "convnext_nano", features_only=True)  # without the last norm
        fits = library.mine(priors_for(model, cache_dir=None))
    assert {fit.repo_id for fit in fits} == {library.repos["convnext_nano", t] for t in ("image classification", "SimCLR")}
    assert not fits[0].exact
    assert 0.9 < fits[0].coverage <= 1
    assert "of its" in fits[0].why
    assert weight_requests(hub) == []


@pytest.mark.hub
def test_of_the_priors_over_one_architecture_that_does_not_fit_one_configuration_is_read(hub, tmp_path):
    mark = unique("one")
    for i in range(12):
        publish(config_over(tiny_vit(hidden_size=18), base_model=f"{mark}/base"), f"alice/{mark}-{i}")
    model = tiny_bert(hidden_size=12)
    model.config._name_or_path = f"{mark}/base"
    hub.clear_log()
    assert priors_for(model, others=False, cache_dir=tmp_path) == []
    assert len(hub.requests(f"{mark}-.*prior_config.json", "GET")) <= search._AT_ONCE


@pytest.mark.hub
def test_exact_fits_come_first_then_coverage_then_downloads(library, hub, monkeypatch):
    model = tiny_vit(num_hidden_layers=2)
    found = library.mine(priors_for(model, others=True))
    assert [fit.exact for fit in found] == [True, True, False, False]
    assert {fit.info.base_model for fit in found[2:]} == {f"{library.mark}/vit-8"}
    assert len(priors_for(model, limit=1)) == 1
    fits = search._Fitting(model, 0.5, 1, None, None)
    names = "exact plain-more plain-less remark same-coverage-base same-coverage-downloads same-coverage"
    made = {name: replace(found[2], info=PriorInfo(repo_id=f"a/{name}"), exact=False, coverage=0.5) for name in names.split()}
    made["exact"] = replace(made["exact"], exact=True, coverage=0.1)
    fits.bases = ["org/base"]
    plain = replace(found[2].match, remarks=())
    for name in set(made) - {"remark"}:
        made[name] = replace(made[name], match=plain)
    made["remark"] = replace(made["remark"], coverage=1.0)
    made["plain-more"] = replace(made["plain-more"], coverage=0.9)
    made["plain-less"] = replace(made["plain-less"], coverage=0.7)
    made["same-coverage-base"] = replace(
        made["same-coverage-base"], info=PriorInfo(repo_id="a/same-coverage-base", base_model="org/base")
    )
    many = PriorInfo(repo_id="a/same-coverage-downloads", downloads=3)
    made["same-coverage-downloads"] = replace(made["same-coverage-downloads"], info=many)
    ordered = [fit.repo_id.removeprefix("a/") for fit in sorted(made.values(), key=fits.order)]
    assert ordered == [name for name in names.split() if name != "remark"] + ["remark"]


@pytest.mark.hub
def test_a_prior_of_a_smaller_model_of_the_family_is_a_fit_with_a_remark(library, hub):
    model = tiny_vit(num_hidden_layers=4, hidden_size=16)
    fit = next(fit for fit in library.mine(priors_for(model, others=True)) if fit.repo_id == library.repos["vit-16", "SimCLR"])
    assert not fit.exact
    assert "smaller model of the same family" in fit.why


@pytest.mark.hub
def test_too_few_configurations_are_said(library, hub, tmp_path):
    with pytest.warns(PriorWarning, match=r"\d+ more priors could fit and were not looked at: 3 configurations were read"):
        priors_for(tiny_bert(hidden_size=10), max_configs=3, cache_dir=tmp_path, others=True)


@pytest.mark.hub
def test_a_prior_far_larger_than_the_model_is_not_read(library, hub, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PriorWarning)
        hub.clear_log()
        priors_for(nn.Linear(3, 3), cache_dir=tmp_path)
    assert not hub.requests(f"{library.mark}.*prior_config.json"), "the smallest of them has hundreds of values"


def test_what_is_no_model_is_refused_with_advice():
    with pytest.raises(TypeError, match="prior-hub fits"):
        priors_for("microsoft/resnet-50")  # type: ignore[arg-type]
    for wrong in ({"min_coverage": 2}, {"limit": 0}, {"max_configs": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            priors_for(nn.Linear(2, 2), **wrong)


# ------------------------------------------------------------------------------------------------------------ fingerprints

PARTS = st.sampled_from(["a", "b", "layer", "0", "weight", "module"])
NAMES = st.lists(PARTS, min_size=1, max_size=4).map(".".join)
SHAPES = st.dictionaries(NAMES, st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=6)
PREFIX = st.lists(st.sampled_from(["timm_model", "a", "backbone", "0"]), max_size=3).map(lambda p: "".join(f"{x}." for x in p))


@settings(max_examples=60, deadline=None)
@given(shapes=SHAPES, prefix=PREFIX, seed=st.randoms(use_true_random=False), head=SHAPES)
def test_a_fingerprint_does_not_see_prefix_order_or_head(shapes, prefix, seed, head):
    found = architecture_fingerprint(shapes)
    names = list(shapes)
    seed.shuffle(names)
    assert architecture_fingerprint({prefix + name: tuple(shapes[name]) for name in names}) == found
    other = {f"head!.{name}": shape for name, shape in head.items()}
    assert architecture_fingerprint(shapes | other, other) == found


@settings(max_examples=60, deadline=None)
@given(shapes=SHAPES, pick=st.integers(0, 5), more=st.sampled_from(["x", "bias"]))
def test_a_fingerprint_sees_every_shape_and_every_name(shapes, pick, more):
    found = architecture_fingerprint(shapes)
    name = list(shapes)[pick % len(shapes)]
    rest = {n: s for n, s in shapes.items() if n != name}
    assert architecture_fingerprint(rest | {name: [*shapes[name], 1]}) != found
    assert architecture_fingerprint(rest | {name: [n + 1 for n in shapes[name]] or [2]}) != found
    assert architecture_fingerprint(rest | {f"{name}{more}": shapes[name]}) != found
    assert architecture_fingerprint(shapes | {f"{name}.{more}!": []}) != found
    if rest:
        assert architecture_fingerprint(rest) != found


def test_a_fingerprint_is_the_documented_hash():
    text = b'[["0.bias",[]],["0.weight",[2,3]]]'
    expected = hashlib.sha256(text).hexdigest()[:16]
    assert architecture_fingerprint({"net.layer.0.weight": (2, 3), "net.layer.0.bias": ()}) != expected, "layer.0 is shared"
    shapes = {"net.0.weight": (2, 3), "net.0.bias": (), "fc.weight": (9,)}
    assert architecture_fingerprint(shapes, ["fc.weight"]) == hashlib.sha256(b'[["bias",[]],["weight",[2,3]]]').hexdigest()[:16]
    assert (
        architecture_fingerprint({"net.0.weight": (2, 3), "net.0.bias": (), "net.1": (1,)})
        == (hashlib.sha256(b'[["0.bias",[]],["0.weight",[2,3]],["1",[1]]]').hexdigest()[:16])
    )
    assert architecture_fingerprint({"fc.weight": (9,)}, ["fc.weight"]) is None


def test_a_prior_over_an_adapter_has_a_fingerprint_of_its_own():
    model = with_lora(tiny_bert(), "query")
    adapter = {n: tuple(p.shape) for n, p in canonical_parameters(model).items() if "lora_" in n}
    assert adapter
    assert model_fingerprints(model) == (model_fingerprints(tiny_bert())[0], architecture_fingerprint(adapter))


# ---------------------------------------------------------------------------------------------------------------- listing


@pytest.mark.hub
@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({}, 50),
        ({"base_model": "{mark}/vit-8"}, 2),
        ({"base_model": "vit-8"}, 2),
        ({"base_model": "{mark}/no-such"}, 0),
        ({"author": "alice"}, 50),
        ({"author": "bob"}, 0),
        ({"estimator": "SWAG"}, 50),
        ({"estimator": "fisher"}, 0),
        ({"estimator": "bayesian"}, 0),  # a tag of all of them
        ({"estimator": "no tag at all"}, 0),
        ({"task": "simclr"}, 25),
        ({"task": "classification, image"}, 25),
        ({"dataset": "org/cifar10"}, 25),
        ({"dataset": "CIFAR10"}, 25),
        ({"dataset": "other/cifar10"}, 0),
        ({"license": "apache-2.0"}, 25),
        ({"min_rank": 5}, 50),
        ({"min_rank": 6}, 25),
        ({"min_rank": 21}, 0),
        ({"search": "vit-deep-simclr"}, 1),
        ({"base_model": "{mark}/vit-8", "min_rank": 6, "task": "simclr", "license": "apache-2.0"}, 1),
        ({"base_model": "{mark}/vit-8", "min_rank": 6, "license": "mit"}, 0),
    ],
)
def test_each_filter_holds_and_all_of_them_together(filters, expected, library):
    given_ = {key: value.format(mark=library.mark) if isinstance(value, str) else value for key, value in filters.items()}
    found = library.mine(list(list_priors(**given_)))
    assert len(found) == len({info.repo_id for info in found}) == expected


@pytest.mark.hub
def test_a_listing_knows_a_prior_and_takes_one_request(library, hub):
    hub.clear_log()
    repo = library.repos["vit-8", "SimCLR"]
    (info,) = list_priors(search=repo.split("/")[1])
    assert len(hub.requests()) == 1
    config = config_over(tiny_vit())
    values = config.num_parameters
    assert (info.repo_id, info.base_model, info.estimator, info.task) == (repo, f"{library.mark}/vit-8", "swag", "SimCLR")
    assert (info.rank, info.num_parameters, info.scale, info.datasets) == (20, values, 1.0, ("org/photos",))
    assert info.stored_bytes == 4 * values * (1 + 1 + 20)
    assert (info.license, info.private, info.gated, info.downloads, info.likes) == ("apache-2.0", False, False, 0, 0)
    assert info.commit_hash == alice.model_info(repo).sha
    assert info.architecture == config_fingerprint(config)
    assert info.last_modified == alice.model_info(repo).last_modified
    assert info.config is None
    assert info.subfolder is None
    assert json.loads(json.dumps(info.to_dict()))["last_modified"] == info.last_modified.isoformat()
    assert len(repr(info)) < 200
    assert repo in repr(info)


@pytest.mark.hub
def test_pages_are_fetched_as_they_are_needed_and_none_twice(library, hub, monkeypatch):
    every = [info.repo_id for info in library.mine(list(list_priors(search=library.mark)))]
    monkeypatch.setattr(hub, "page_size", 7)
    hub.clear_log()
    assert [info.repo_id for info in list_priors(search=library.mark)] == every
    assert len(hub.requests()) == 8  # of 50 priors
    hub.clear_log()
    assert [info.repo_id for info in list_priors(search=library.mark, limit=10)] == every[:10]
    assert len(hub.requests()) == 2
    hub.clear_log()
    found = list_priors(search=library.mark)
    assert hub.requests() == [], "nothing is asked before the first is wanted"
    next(found)
    assert len(hub.requests()) == 1
    assert list(list_priors(search=library.mark, limit=0)) == []


@pytest.mark.hub
def test_listings_are_sorted_by_the_hub(library, hub):
    hub.clear_log()
    list(list_priors(search=library.mark, sort="last_modified"))
    assert "sort=lastModified" in hub.requests()[0]["target"]


def test_arguments_that_mean_nothing_are_refused():
    for wrong in ({"sort": "rank"}, {"limit": -1}, {"min_rank": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            list_priors(**wrong)


@pytest.mark.hub
def test_private_priors_are_listed_to_those_who_may_see_them(hub):
    mark = unique("private")
    config = config_over(tiny_vit(hidden_size=6), base_model=f"{mark}/base")
    publish(config, f"alice/{mark}")
    alice.update_repo_settings(f"alice/{mark}", private=True)
    (mine,) = list_priors(search=mark)
    assert mine.private
    assert mine.repo_id in {fit.repo_id for fit in priors_for(tiny_vit(hidden_size=6))}
    for token in (BOB, False):
        assert list(list_priors(search=mark, token=token)) == []
        assert mine.repo_id not in {fit.repo_id for fit in priors_for(tiny_vit(hidden_size=6), token=token, others=False)}
        with pytest.raises(PriorNotFoundError):
            prior_info(mine.repo_id, token=token)


@pytest.mark.hub
def test_gated_priors_are_listed_and_said_where_they_would_fit(hub, tmp_path):
    mark = unique("gated")
    publish(config_over(tiny_vit(hidden_size=14)), f"alice/{mark}")
    alice.update_repo_settings(f"alice/{mark}", gated="manual")
    (info,) = list_priors(search=mark, token=BOB)
    assert info.gated == "manual"
    with pytest.warns(PriorWarning, match=rf"{mark} was not looked at \(its card says .*gated: accept its terms"):
        assert priors_for(tiny_vit(hidden_size=14), token=BOB, others=False, cache_dir=tmp_path) == []
    with pytest.raises(PriorAccessError, match="accept its terms"):
        prior_info(f"alice/{mark}", token=BOB, cache_dir=tmp_path)
    assert priors_for(tiny_vit(hidden_size=14), others=False)[0].repo_id == f"alice/{mark}"


@pytest.mark.hub
def test_every_prior_of_a_repository_is_listed_with_its_folder_and_what_is_none_is_not(hub):
    mark = unique("folders")
    config = config_over(tiny_vit(hidden_size=22))
    text = config.replace(weight_files={"prior.safetensors": "0" * 64}).to_json()
    repo = publish(config, f"alice/{mark}-many", **{"deep/er/prior_config.json": text, "not_prior_config.json": "{}"})
    publish(config, f"alice/{mark}-none", **{"prior_config.json": None, "config.json": "{}"})
    found = list(list_priors(search=mark))
    assert {(info.repo_id, info.subfolder) for info in found} == {(repo, None), (repo, "deep/er")}
    assert {info.subfolder: info.rank for info in found} == {None: 4, "deep/er": None}, "the card is that of the top"
    fits = priors_for(tiny_vit(hidden_size=22))
    assert {fit.info.subfolder for fit in fits} == {None, "deep/er"}
    assert prior_info(repo, subfolder="deep/er").subfolder == "deep/er"


@pytest.mark.hub
def test_a_prior_beside_a_model_is_listed_with_its_rank(hub):
    repo = f"alice/{unique('beside')}"
    alice.create_repo(repo)
    card = b"---\nlibrary_name: transformers\nlicense: mit\ntags:\n- vision\n---\n\n# A model\n"
    alice.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id=repo)
    random_prior(license="cc-by-4.0").push_to_hub(repo)
    (info,) = list_priors(search=repo.split("/")[1])
    assert (info.rank, info.estimator, info.license) == (3, "swag", "mit")


# ---------------------------------------------------------------------------------------------------------------- hostile

CARDS: dict[str, Any] = {
    "self": {"self": 1, "ignore_metadata_errors": 2},  # ends the client's own list_models
    "no key": {},
    "text": {"prior_hub": "yes"},
    "list": {"prior_hub": [1]},
    "null": {"prior_hub": None},
    "types": {"prior_hub": {"rank": "many", "scale": [], "num_parameters": -1, "estimator": 5, "architecture": "../x"}},
    "huge": {"prior_hub": {"rank": True, "scale": 10**400, "stored_bytes": 1e9, "objective": "x" * 5000}},
    "escape": {"prior_hub": {"estimator": "\x1b[2J\x07swag", "objective": "a\nb\u202ec"}},
    "bases": {"base_model": [{"a": 1}, 3, "../../etc", "org/good"], "datasets": {"a": 1}, "license": ["mit", "x"]},
    "tags": {
        "tags": ["prior-hub", "prior-arch-zz", "prior-arch-" + "0" * 16, "prior-arch-" + "1" * 16, "base_model:finetune:a/b"]
    },
}


@pytest.fixture
def hostile(hub, monkeypatch):
    """Cards of bob's, in private repositories that nobody else's tests list; name -> repository."""
    mark, repos = unique("hostile"), {}
    config = config_over(tiny_vit(hidden_size=26))
    for name, keys in CARDS.items():
        data = {"library_name": "prior-hub", "tags": ["prior-hub"]} | keys
        repo = f"bob/{mark}-{name.replace(' ', '-')}"
        monkeypatch.setattr(HfApi, "_validate_yaml", lambda *_, **__: None, raising=False)  # who is hostile does not ask
        bob.create_repo(repo, private=True)
        publish(config, repo, api=bob, card=f"---\n{yaml.safe_dump(data)}---\n\n# A card\n")
        repos[name] = repo
    yield repos
    for repo in repos.values():
        bob.delete_repo(repo)


@pytest.mark.hub
def test_no_card_breaks_a_listing_and_what_it_says_wrongly_is_unknown(hostile, hub):
    with pytest.raises(TypeError):
        list(bob.list_models(filter="prior-hub", author="bob", cardData=True))
    with pytest.warns(PriorWarning) as caught:
        found = {info.repo_id: info for info in list_priors(author="bob", token=BOB)}
    assert set(found) >= set(hostile.values())
    infos = {name: found[repo] for name, repo in hostile.items()}
    warned = {name for name, repo in hostile.items() if any(f"{repo} " in str(w.message) for w in caught)}
    assert warned == {"text", "list", "null", "types", "huge"}
    for name in warned:
        assert (infos[name].rank, infos[name].scale, infos[name].architecture, infos[name].estimator) == (None,) * 4
    assert (infos["escape"].estimator, infos["escape"].task) == ("[2J swag", "a b c")
    assert infos["bases"].base_model == "org/good"
    assert infos["tags"].architecture is None, "one prior has one architecture"
    for info in infos.values():
        json.dumps(info.to_dict())
        repr(info)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PriorWarning)
        assert {info.repo_id for info in search_priors("hostile prior", token=BOB, limit=100)} >= set(hostile.values())
        assert list(list_priors(author="bob", min_rank=1, token=BOB, search="hostile")) == []


@pytest.mark.hub
def test_rows_of_no_form_are_skipped_with_a_warning(monkeypatch):
    good = {"id": "a/good", "siblings": [{"rfilename": "prior_config.json"}, {"rfilename": 5}, 3]}
    rows = [
        None_,
        "text",
        {},
        {"id": 5},
        {"id": "a/odd", "siblings": "x", "cardData": "y", "tags": 7, "gated": [], "likes": "many"},
    ]
    odd = {"id": "a/dates", "lastModified": "yesterday", "siblings": None, "tags": [None, 3, "license:mit"], "downloads": -1}
    monkeypatch.setattr(search, "paginate", lambda *_, **__: iter([*rows, odd, good]))
    with pytest.warns(PriorWarning, match="without a name"):
        found = list(list_priors())
    assert [info.repo_id for info in found] == ["a/odd", "a/dates", "a/good"]
    assert (found[1].license, found[1].last_modified, found[1].downloads) == ("mit", None, None)


None_ = 0  # the listing ends at None, which JSON's null would be


@pytest.mark.hub
def test_a_configuration_that_is_none_does_not_break_the_search_for_fits(hub, tmp_path, monkeypatch):
    mark = unique("broken")
    config = config_over(tiny_vit(hidden_size=30))
    fine = publish(config, f"alice/{mark}-fine")
    publish(config, f"alice/{mark}-truncated", **{"prior_config.json": config.to_json()[:100]})
    publish(config, f"alice/{mark}-large", **{"prior_config.json": config.to_json() + " " * 20_000})
    liar = config_over(tiny_bert(hidden_size=30))
    card = render_card(config).replace("# ", "# Not ")
    publish(liar, f"alice/{mark}-liar", card=card)
    hub.clear_log()
    monkeypatch.setattr(search, "MAX_CONFIG_BYTES", 20_000)
    with pytest.warns(PriorWarning) as caught:
        fits = priors_for(tiny_vit(hidden_size=30), cache_dir=tmp_path)
    assert [fit.repo_id for fit in fits] == [fine]
    said = {
        name: next((str(w.message) for w in caught if f"{mark}-{name}" in str(w.message)), "")
        for name in ("truncated", "large")
    }
    assert "not valid JSON" in said["truncated"]
    assert "more than the 20000 one may have" in said["large"]
    assert not hub.requests(f"{mark}-large/.*prior_config.json"), "nothing of it was downloaded"
    assert len(caught) == 2
    for name in ("truncated", "large"):
        alice.delete_repo(f"alice/{mark}-{name}")


@pytest.mark.hub
def test_a_configuration_that_cannot_be_fetched_is_skipped_and_a_hub_that_is_gone_is_an_error(hub, tmp_path):
    mark = unique("lost")
    config = config_over(tiny_vit(hidden_size=34))
    repos = [publish(config, f"alice/{mark}-{i}") for i in range(2)]
    hub.add_fault("status", status=500, path=f"{repos[0]}/paths-info", times=-1)
    with pytest.warns(PriorWarning, match="was not looked at"):
        assert [fit.repo_id for fit in priors_for(tiny_vit(hidden_size=34), cache_dir=tmp_path / "a")] == [repos[1]]
    hub.add_fault("status", status=500, path="/paths-info", times=-1)
    with pytest.raises(PriorConnectionError, match="failed"):
        priors_for(tiny_vit(hidden_size=34), cache_dir=tmp_path / "b")


@pytest.mark.hub
def test_a_hub_that_fails_or_a_bad_token_is_said_clearly(hub, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.add_fault("status", status=503, path="/api/models", times=-1)
    with pytest.raises(PriorConnectionError, match=r"the Hub failed on 'the list of priors' \(503\)"):
        list(list_priors())
    hub.clear_faults()
    with pytest.raises(PriorAccessError, match="Check the token"):
        list(list_priors(token="hf_bogus_token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for ask in (lambda: list(list_priors()), lambda: search_priors("x"), lambda: priors_for(nn.Linear(2, 2))):
        with pytest.raises(PriorConnectionError, match="cannot be listed offline"):
            ask()


# --------------------------------------------------------------------------------------------------------- one, and words


@pytest.mark.hub
def test_prior_info_is_the_configuration_and_what_the_hub_knows_without_weights(library, hub):
    repo = library.repos["vit-8", "SimCLR"]
    hub.clear_log()
    info = prior_info(repo)
    (listed,) = list_priors(search=repo.split("/")[1])
    assert info == listed
    assert info.config == PriorConfig.from_json(hub_text(repo, "prior_config.json"))
    assert weight_requests(hub) == []


def hub_text(repo: str, path: str) -> str:
    with open(alice.hf_hub_download(repo, path)) as file:  # noqa: PTH123
        return file.read()


@pytest.mark.hub
def test_prior_info_of_a_revision_and_of_what_is_not_there(hub):
    repo = publish(config_over(tiny_vit()), fresh_repo_id("info"))
    first = alice.model_info(repo).sha
    publish(config_over(tiny_vit(), rank=9), repo)
    assert prior_info(repo).rank == 9
    assert (prior_info(repo, revision=first).rank, prior_info(repo, revision=first).commit_hash) == (4, first)
    for wrong in ({"repo_id": "alice/nothing"}, {"revision": "v9"}, {"subfolder": "nowhere"}):
        with pytest.raises(PriorNotFoundError):
            prior_info(**({"repo_id": repo} | wrong))


@pytest.mark.hub
def test_offline_a_cached_configuration_is_told_and_another_is_an_error(hub, monkeypatch, tmp_path):
    repo = publish(config_over(tiny_vit()), fresh_repo_id("info"))
    online = prior_info(repo, cache_dir=tmp_path)
    cached = prior_info(repo, cache_dir=tmp_path, local_files_only=True)
    assert (cached.rank, cached.commit_hash, cached.downloads) == (online.rank, online.commit_hash, None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert prior_info(repo, revision=online.commit_hash, cache_dir=tmp_path).config == online.config
    with pytest.raises(PriorConnectionError, match="offline"):
        prior_info("alice/other", cache_dir=tmp_path)


@pytest.mark.hub
def test_every_word_must_be_found_and_the_best_match_is_first(library):
    def found(query: str) -> list[str]:
        return [info.repo_id for info in library.mine(search_priors(query, limit=1000))]

    assert found("resnet50 simclr") == [library.repos["resnet50", "SimCLR"], library.repos["wide_resnet50_2", "SimCLR"]]
    assert found("SIMCLR Resnet-50") == found("resnet50 simclr")
    assert found("resnet50 simclr resnet101") == []
    assert len(found("swag cifar10")) == 25
    assert set(found("vit tiny")) == {library.repos["vit_tiny_patch16_224", t] for t in ("image classification", "SimCLR")}
    assert found("no-such-word-anywhere") == []
    for empty in ("", "  ", "-- !"):
        with pytest.raises(ValueError, match="give a word"):
            search_priors(empty)
    assert len(search_priors(library.mark, limit=3)) == 3


def test_a_word_scores_by_place_and_by_how_much_of_a_word_it_is():
    name, base, task = (PriorInfo(repo_id="a/resnet50"), PriorInfo(repo_id="a/b", base_model="m/resnet-50"), None)
    task = PriorInfo(repo_id="a/b", task="after resnet50d")
    inside = PriorInfo(repo_id="a/xresnet50")
    scores = [search._score("resnet50", info) for info in (name, base, task, inside, PriorInfo(repo_id="a/b"))]
    assert scores == [12, 9, 6, 4, 0]


# ---------------------------------------------------------------------------------------------------------------- trainer


@pytest.mark.hub
def test_a_wrong_prior_fails_in_the_trainer_before_any_weight_is_asked_for(hub, tmp_path):
    repo = publish(config_over(tiny_bert(hidden_size=16)), fresh_repo_id("wrong"))
    model = tiny_vit()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    hub.clear_log()
    with pytest.raises(PriorMatchError) as early:
        PriorTrainer(model=model, prior=repo, args=quiet_arguments(tmp_path), train_dataset=[{}])
    assert hub.requests("prior_config.json")
    assert weight_requests(hub) == []
    with pytest.raises(PriorMatchError) as usual:
        PriorModel.from_tensors(
            {n: torch.zeros(p.shape) for n, p in tiny_bert(hidden_size=16).bert.named_parameters(prefix="bert")},
            {n: torch.ones(p.shape) for n, p in tiny_bert(hidden_size=16).bert.named_parameters(prefix="bert")},
        ).match(model)
    assert str(early.value) == str(usual.value)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


@pytest.mark.hub
def test_a_prior_that_fits_is_downloaded_by_the_trainer_as_before(hub, tmp_path):
    from models import random_prior as prior_over

    model = tiny_vit()
    known = {"license": "mit", "base_model": "org/vit", "source": {"dataset": "org/data"}}
    repo = prior_over(model, **known).push_to_hub(fresh_repo_id("right")).repo_id
    trainer = PriorTrainer(model=model, prior=repo, args=quiet_arguments(tmp_path), train_dataset=[{}])
    assert trainer.prior.repo_id == repo
    trainer.prior.save_pretrained(tmp_path / "prior")
    (tmp_path / "prior" / "prior.safetensors").write_bytes(b"")
    with pytest.raises(PriorMatchError):  # a folder's configuration is checked first too
        PriorTrainer(model=tiny_bert(), prior=tmp_path / "prior", args=quiet_arguments(tmp_path), train_dataset=[{}])


# ----------------------------------------------------------------------------------------------------------- command line


def run(capsys: Any, *words: str) -> str:
    assert main(list(words)) == 0
    return capsys.readouterr().out


@pytest.mark.hub
def test_list_and_search_print_a_table_or_json(library, capsys):
    repo = library.repos["vit-8", "SimCLR"]
    text = run(capsys, "list", "--base-model", f"{library.mark}/vit-8", "--min-rank", "6")
    header, row = text.splitlines()
    assert header.split() == ["PRIOR", "BASE", "MODEL", "ESTIMATOR", "TASK", "RANK", "SIZE", "LICENCE", "DOWNLOADS", "UPDATED"]
    assert row.split()[:5] == [repo, f"{library.mark}/vit-8", "swag", "SimCLR", "20"]
    found = json.loads(run(capsys, "list", "--base-model", f"{library.mark}/vit-8", "--limit", "1", "--json"))
    assert found["ok"]
    assert len(found["priors"]) == 1
    assert "the first 2" in run(capsys, "search", library.mark, "--limit", "2")
    assert [i["repo_id"] for i in json.loads(run(capsys, "search", library.mark, "vit-8", "simclr", "--json"))["priors"]] == [
        repo
    ]
    empty = run(capsys, "list", "--base-model", f"{library.mark}/none", "--min-rank", "3")
    assert "no prior found" in empty
    assert f"--base-model {library.mark}/none --min-rank 3" in empty
    assert "fewer or shorter" in run(capsys, "search", "no-such-word-anywhere")


@pytest.mark.hub
def test_fits_makes_the_model_without_weights_and_says_which_priors_fit(library, hub, capsys, tmp_path):
    hub.clear_log()
    text = run(capsys, "fits", "timm:resnet50")
    assert library.repos["resnet50", "SimCLR"] in text
    assert "exact" in text
    assert "same architecture" in text
    tiny_vit(hidden_size=16).config.save_pretrained(tmp_path / "model")
    found = json.loads(run(capsys, "fits", str(tmp_path / "model"), "--json"))
    mine = {fit["repo_id"]: fit for fit in found["fits"] if library.mark in fit["repo_id"]}
    assert set(mine) == {library.repos["vit-16", t] for t in ("image classification", "SimCLR")}
    assert mine[library.repos["vit-16", "SimCLR"]]["exact"]
    assert weight_requests(hub) == []
    tiny_bert(hidden_size=38).config.save_pretrained(tmp_path / "other")
    assert "no prior found that fits" in run(capsys, "fits", str(tmp_path / "other"), "--min-coverage", "1")


@pytest.mark.hub
def test_fits_of_no_such_model_exits_1_with_advice(hub, capsys):
    assert main(["fits", "timm:resnet5000"]) == 1
    assert "Did you mean" in capsys.readouterr().err
    assert main(["fits", "alice/there-is-no-such-model"]) == 1
    assert "there-is-no-such-model" in capsys.readouterr().err
