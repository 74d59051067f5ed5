"""Publishing: what is refused, what a dry run tells, what lands; a card's results, pictures and versions over many pushes."""

from __future__ import annotations

import difflib
import json
import logging
import time
import traceback
from pathlib import Path
from typing import Any

import pytest
from hub_fixtures import ALICE, ALICE_READ_ONLY, BOB, fresh_repo_id
from huggingface_hub import CommitOperationAdd, EvalResult, HfApi, ModelCard, hf_hub_download
from hypothesis import given, settings
from hypothesis import strategies as st
from priors_for_tests import SHAPES, assert_same, random_prior

from prior_hub.cli import main
from prior_hub.errors import PriorAccessError, PriorFormatError, PriorHubError, PriorMetadataError, PriorNotFoundError
from prior_hub.learning.isotropic import isotropic_prior
from prior_hub.model import PriorModel, push_prior_to_hub
from prior_hub.priors.storage import read_config
from prior_hub.registry.card import card_problems, card_versions, render_card, split_card, update_card
from prior_hub.registry.collections import add_to_collection
from prior_hub.registry.download import download_config
from prior_hub.registry.evaluation import eval_results
from prior_hub.registry.search import prior_info
from prior_hub.registry.upload import PushPlan
from prior_hub.registry.versions import Version, new_versions, read_versions, versions_table

alice = HfApi()
BARE: dict[str, Any] = {"license": None, "base_model": None, "source": {"objective": "x"}}
GIVEN = {"license": "mit", "base_model": "org/net", "dataset": "org/data"}
RESULTS = {
    "task": "image-classification",
    "dataset": "org/target",
    "split": "test",
    "metrics": {"eval_accuracy": 0.91, "eval_loss": 0.31, "eval_runtime": 2.0, "epoch": 3.0},
}
PNG = b"\x89PNG\r\n\x1a\n\0\0\0picture"


def picture(folder: Path, name: str = "spectrum.png", content: bytes = PNG) -> dict[Path, str]:
    (folder / name).write_bytes(content)
    return {folder / name: f"what {name} shows"}


def tree(repo: str, revision: str | None = None) -> dict[str, str]:
    """Path -> hash of its content."""
    info = alice.model_info(repo, files_metadata=True, revision=revision)
    return {file.rfilename: file.lfs.sha256 if file.lfs else file.blob_id for file in info.siblings}


def card(repo: str, path: str = "README.md", revision: str | None = None) -> str:
    return Path(hf_hub_download(repo, path, revision=revision)).read_text()


def commit(repo: str, path: str, content: bytes) -> str:
    return alice.create_commit(repo, [CommitOperationAdd(path, content)], commit_message="by hand").oid


def writes(hub) -> list[str]:
    """The requests that change something. `paths-info` and `validate-yaml` ask by POST."""
    asked = [f"{entry['method']} {entry['target']}" for entry in hub.requests() if entry["method"] not in ("GET", "HEAD")]
    return [request for request in asked if "/paths-info/" not in request and "/validate-yaml" not in request]


# ---------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.hub
@pytest.mark.parametrize("kind", ["object", "folder", "save_pretrained", "command"])
def test_an_incomplete_prior_is_refused_before_any_request_with_all_that_is_missing(hub, tmp_path, kind, capsys):
    prior = random_prior(**BARE)
    prior.save_pretrained(tmp_path)
    hub.clear_log()
    if kind == "command":
        assert main(["push", str(tmp_path), "alice/x"]) == 1
        said = capsys.readouterr().err
    else:
        attempts = {
            "object": lambda: prior.push_to_hub("alice/x"),
            "folder": lambda: push_prior_to_hub(tmp_path, "alice/x"),
            "save_pretrained": lambda: prior.save_pretrained(tmp_path, push_to_hub=True, repo_id="alice/x"),
        }
        with pytest.raises(PriorMetadataError) as caught:
            attempts[kind]()
        said = str(caught.value)
    for word in ("3 things", "licence", "license=", "--license", "base_model=", "--base-model", "dataset=", "--dataset"):
        assert word in said
    assert "--allow-incomplete" in said
    assert hub.requests() == []


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({}, []),
        ({"license": None}, ["no licence"]),
        ({"license": ""}, ["no licence"]),
        ({"base_model": None}, ["no base_model"]),
        ({"base_model": "/home/me/net"}, ["'/home/me/net', which is no name on the Hub"]),
        ({"source": {}}, ["no source data set"]),
        ({"source": {"dataset": []}}, ["no source data set"]),
        ({"source": {"dataset": "digits 0-4"}}, []),
        ({"license": "unknown"}, []),
        ({"source": {}, "estimator": {"name": "isotropic"}}, []),
        ({"license": None, "source": {}}, ["no licence", "no source data set"]),
    ],
)
def test_what_is_missing_is_named_and_nothing_else(fields, found, monkeypatch):
    monkeypatch.setattr("prior_hub.model.upload_prior", lambda *_, **__: None)
    prior = random_prior(**fields)
    if not found:
        prior.push_to_hub("org/name")
        return
    with pytest.raises(PriorMetadataError) as caught:
        prior.push_to_hub("org/name")
    said = str(caught.value)
    assert f"{len(found)} thing" in said
    for words in found:
        assert words in said
    assert ("no source data set" in said) == ("no source data set" in found)


@pytest.mark.hub
def test_what_is_given_with_the_push_is_in_what_is_pushed_and_not_in_the_folder(tmp_path):
    prior = random_prior(license=None, source={"objective": "x"})  # its base model has a commit
    prior.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for source in (prior, tmp_path):
        name = push_prior_to_hub(source, fresh_repo_id(), **GIVEN).repo_id
        config, _ = download_config(name)
        assert (config.license, config.base_model, config.base_model_revision) == ("mit", "org/net", None)
        assert config.source == {"objective": "x", "dataset": "org/data"}
        data = ModelCard.load(name).data
        assert (data.license, data.base_model, data.datasets) == ("mit", "org/net", ["org/data"])
        found = PriorModel.from_pretrained(name, cache_dir=tmp_path / "cache")
        assert_same(found, PriorModel(prior.gaussian, config, prior.buffers))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


@pytest.mark.hub
def test_an_incomplete_prior_is_pushed_if_that_is_said(tmp_path):
    random_prior(**BARE).save_pretrained(tmp_path)
    name = push_prior_to_hub(tmp_path, fresh_repo_id(), allow_incomplete=True).repo_id
    assert download_config(name)[0].license is None
    assert "No licence is recorded" in card(name)


@pytest.mark.hub
def test_an_isotropic_prior_needs_no_data_set():
    prior = isotropic_prior(random_prior(source={}))
    name = prior.push_to_hub(fresh_repo_id()).repo_id
    assert ModelCard.load(name).data.datasets is None


def test_an_argument_that_is_none_of_a_push_is_refused_by_its_name(tmp_path):
    random_prior().save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="licence"):
        push_prior_to_hub(tmp_path, "alice/x", licence="mit")
    with pytest.raises(ValueError, match="gated is 'yes'"):
        push_prior_to_hub(tmp_path, "alice/x", gated="yes")


# ---------------------------------------------------------------------------------------------------------- dry runs
@pytest.mark.hub
def test_a_dry_run_changes_nothing_and_tells_exactly_what_the_push_then_does(hub, tmp_path):
    first, second = random_prior(rank=20), random_prior(seed=1, rank=2)
    name = fresh_repo_id()
    stages = [(first, {"max_shard_size": 200, "tag": "v1.0"}), (second, {"pictures": picture(tmp_path)}), (second, {})]
    for number, (prior, options) in enumerate(stages):
        hub.clear_log()
        plan = push_prior_to_hub(prior, name, dry_run=True, evaluation=RESULTS, **options)
        assert writes(hub) == []
        assert plan.exists == (number > 0)
        before = tree(name) if plan.exists else {}
        old_card = card(name) if plan.exists else ""
        assert (plan.repo_id, plan.branch, plan.tag, plan.missing, plan.problems) == (name, "main", options.get("tag"), (), ())
        assert plan.head == (alice.model_info(name).sha if plan.exists else None)
        push_prior_to_hub(prior, name, evaluation=RESULTS, **options)
        after = tree(name)
        told = {file.path: file.status for file in plan.files}
        was = before.keys() - {".gitattributes"}
        expected = dict.fromkeys(after.keys() - was - {".gitattributes"}, "new")
        expected |= dict.fromkeys(was - after.keys(), "deleted")
        expected |= {path: "unchanged" if before[path] == after[path] else "changed" for path in after.keys() & was}
        told_left_out = {path for path in expected if path.startswith("prior_pictures/")} - told.keys()
        assert told == {path: status for path, status in expected.items() if path not in told_left_out}
        assert all(expected[path] == "unchanged" for path in told_left_out), "a picture that stays is not sent again"
        info = {file.rfilename: file.size for file in alice.model_info(name, files_metadata=True).siblings}
        assert all(file.size == info.get(file.path, 0) for file in plan.files)
        lines = old_card.splitlines(keepends=True), card(name).splitlines(keepends=True)
        assert plan.card_diff == "".join(difflib.unified_diff(*lines, "README.md on the Hub", "README.md of this push"))
    assert {file.status for file in plan.files} == {"unchanged"}
    assert plan.card_diff == ""


@pytest.mark.hub
def test_a_dry_run_tells_what_stands_against_the_push(hub, tmp_path):
    name = random_prior().push_to_hub(fresh_repo_id(), tag="v1.0").repo_id
    bare, good = random_prior(**BARE), random_prior(seed=1)
    cases: list[tuple[PriorModel, dict[str, Any], str]] = [
        (bare, {}, "no licence"),
        (good, {"tag": "v1.0"}, "already has a tag 'v1.0'"),
        (good, {"private": True}, "exists already and is public"),
        (good, {"token": ALICE_READ_ONLY}, "may not write"),
        (random_prior(license="mine-1.0"), {}, '"license"'),
    ]
    before = tree(name)
    for prior, options, words in cases:
        hub.clear_log()
        plan = push_prior_to_hub(prior, name, dry_run=True, **options)
        assert words in " ".join(plan.problems)
        assert writes(hub) == []
        with pytest.raises(PriorHubError):
            prior.push_to_hub(name, **options)
    assert len(push_prior_to_hub(bare, name, dry_run=True).missing) == 3
    assert push_prior_to_hub(bare, name, dry_run=True, allow_incomplete=True).problems == ()
    assert push_prior_to_hub(bare, name, dry_run=True, **GIVEN).problems == ()
    assert tree(name) == before


@pytest.mark.hub
def test_a_dry_run_of_a_new_branch_a_pull_request_and_a_short_name_makes_none_of_them(hub):
    name = random_prior().push_to_hub(fresh_repo_id()).repo_id
    before = alice.list_repo_refs(name, include_pull_requests=True)
    for options in ({"revision": "new"}, {"create_pr": True}, {"revision": "new", "tag": "v2"}):
        plan = push_prior_to_hub(random_prior(seed=1), name, dry_run=True, **options)
        assert (plan.branch, plan.create_pr, plan.exists) == (options.get("revision", "main"), "create_pr" in options, True)
        assert plan.problems == ()
    assert alice.list_repo_refs(name, include_pull_requests=True) == before
    short = fresh_repo_id().split("/")[1]
    plan = push_prior_to_hub(random_prior(), short, dry_run=True, private=True)
    said = str(plan).splitlines()  # docs/publish.md prints it
    where = f"{plan.repo_id}, branch main (not there yet, or not seen by this token: it would be made, private)"
    assert said[0] == f"dry run: nothing is sent; {where}"
    assert all(any(line.split()[:2] == [file.status, file.path] for line in said) for file in plan.files)
    assert "+library_name: prior-hub" in said
    assert all(f"would be refused: {problem}" in said for problem in plan.problems)
    assert (plan.repo_id, plan.exists, plan.private) == (f"alice/{short}", False, True)
    assert not alice.repo_exists(f"alice/{short}")


@pytest.mark.hub
def test_a_dry_run_from_the_command_line(hub, tmp_path, capsys):
    folder = tmp_path / "prior"
    random_prior(**BARE).save_pretrained(folder)
    name = fresh_repo_id()
    command = ["push", str(folder), name, "--dry-run", "--no-pictures", "--tag", "v1.0"]
    assert main(command) == 1
    said = capsys.readouterr().out
    for words in (
        "nothing is sent",
        name,
        "not there yet",
        "3 missing",
        "prior.safetensors",
        "new",
        "+library_name: prior-hub",
    ):
        assert words in said
    assert said.count("would be refused:") == 3
    full = ["--license", "mit", "--base-model", "org/net", "--dataset", "org/data", "--json"]
    hub.clear_log()
    assert main([*command, *full]) == 0
    assert writes(hub) == []
    found = json.loads(capsys.readouterr().out)
    assert (found["ok"], found["dry_run"], found["exists"], found["problems"]) == (True, True, False, [])
    assert {file["path"] for file in found["files"]} == {"README.md", "prior.safetensors", "prior_config.json"}
    assert not alice.repo_exists(name)


# ---------------------------------------------------------------------------------------------------------- evaluation
def test_all_results_json_of_a_training_script_gives_the_evaluation_and_nothing_of_the_training():
    """As `trainer.save_metrics("train", ...)` and `save_metrics("eval", ...)` write it."""
    training = {"total_flos": 1e15, "train_loss": 0.1, "train_runtime": 3.0, "train_samples": 50, "train_steps_per_second": 1.0}
    written = {"epoch": 3.0, "eval_accuracy": 0.9, "eval_loss": 0.3, "eval_samples": 10, **training}
    for entry in (written, {"metrics": written}):
        found = eval_results(entry, dataset="org/data", task="image-classification")
        assert [(result.metric_type, result.metric_value) for result in found] == [("accuracy", 0.9), ("loss", 0.3)]
    found = eval_results({"metrics": {"train_accuracy": 0.9}}, dataset="org/data", task="x")  # a person's own
    assert [result.metric_type for result in found] == ["train_accuracy"]


def test_a_metric_of_two_splits_is_refused_and_none_of_them_is_lost():
    with pytest.raises(PriorMetadataError, match="gives accuracy twice"):
        eval_results({"eval_accuracy": 0.9, "test_accuracy": 0.8}, dataset="org/data", task="x")


def test_results_of_trainer_evaluate_become_the_hubs_and_say_nothing_of_run_times():
    expected = [
        EvalResult(
            task_type="image-classification", dataset_type="org/target", dataset_name="org/target", dataset_split="test",
            metric_type=metric, metric_value=value,
        )
        for metric, value in (("accuracy", 0.91), ("loss", 0.31))
    ]  # fmt: skip
    assert eval_results(RESULTS) == expected
    assert eval_results([RESULTS]) == eval_results(expected) == expected
    flat = RESULTS["metrics"] | {"task": RESULTS["task"], "dataset": RESULTS["dataset"], "split": "test"}
    assert eval_results(flat) == expected
    assert [r.dataset_type for r in eval_results(RESULTS["metrics"], dataset="org/x", task="y")] == ["org/x", "org/x"]
    index = ModelCard(render_card(random_prior().config, evaluation=expected)).data.to_dict()["model-index"]
    assert eval_results(index) == expected


@pytest.mark.parametrize(
    ("evaluation", "words"),
    [
        ({"metrics": {"a": 1}}, "lacks task and dataset"),
        ({"task": "x", "dataset": "y"}, "lacks metrics"),
        ({"task": "x", "dataset": "y", "metrics": {"eval_runtime": 1.0}}, "no metric"),
        ({"task": "x", "dataset": "y", "metrics": {"a": float("nan")}}, "a the value nan"),
        ({"task": "x", "dataset": "y", "metrics": {"a": [1]}}, r"a the value \[1\]"),
        ({"task": "x", "dataset": "y", "metrics": {"a": True}}, "a the value True"),
        ({"accuracy": 0.9}, "the keys"),
        ([0.9], "is a float"),
        ({"name": "x", "results": [{}]}, "no model-index"),
    ],
)
def test_results_that_are_none_are_refused_with_an_example(evaluation, words):
    with pytest.raises(PriorMetadataError, match=words):
        eval_results(evaluation)


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1, max_size=12)
VALUE = st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.integers(-(10**9), 10**9), TEXT.filter(str.strip))
RESULT = st.builds(
    EvalResult, task_type=TEXT, dataset_type=TEXT, dataset_name=TEXT, metric_type=TEXT, metric_value=VALUE,
    dataset_split=st.none() | TEXT, dataset_config=st.none() | TEXT,
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(results=st.lists(RESULT, min_size=1, max_size=4))
def test_results_come_back_from_the_card_through_the_clients_own_parser(results):
    text = render_card(random_prior().config, repo_id="org/name", evaluation=results)
    parsed = ModelCard(text).data
    # the client puts results of one task and data set together, under the name of the first
    key = [(r.task_type, r.dataset_type, r.dataset_config, r.dataset_split, r.metric_type, r.metric_value) for r in results]
    back = [
        (r.task_type, r.dataset_type, r.dataset_config, r.dataset_split, r.metric_type, r.metric_value)
        for r in parsed.eval_results
    ]
    assert sorted(map(repr, back)) == sorted(map(repr, key))
    assert parsed.model_name == "name"
    assert card_problems(text) == []
    assert text.count("prior_hub: end") == 1


@pytest.mark.hub
def test_results_and_compute_are_in_the_hubs_metadata_and_in_the_text():
    compute = {"emissions": 12.5, "source": "codecarbon", "hardware_used": "1 x H100", "hours": 3.5}
    name = random_prior().push_to_hub(fresh_repo_id(), evaluation=RESULTS, compute=compute).repo_id
    info = alice.model_info(name)
    assert info.card_data.eval_results == eval_results(RESULTS)
    assert info.card_data.co2_eq_emissions == {"emissions": 12.5, "source": "codecarbon", "hardware_used": "1 x H100"}
    text = card(name)
    for row in ("| image-classification | org/target (test) | accuracy | 0.91 |", "| duration (hours) | 3.5 |"):
        assert row in text
    without = random_prior().push_to_hub(fresh_repo_id(), compute={"hours": 3.5}).repo_id
    assert "co2_eq_emissions" not in split_card(card(without))[0], "emissions are never made up"
    assert "## Evaluation" not in card(without)


@pytest.mark.parametrize("compute", [{"watts": 3}, {"hours": "3"}, {"hours": -1}, {"emissions": float("inf")}, {"source": 3}])
def test_compute_of_another_form_is_refused(compute):
    with pytest.raises(PriorMetadataError, match="compute"):
        render_card(random_prior().config, compute=compute)


@pytest.mark.hub
def test_results_pictures_and_compute_stay_with_their_prior_and_go_with_it(tmp_path):
    extras = {"evaluation": RESULTS, "compute": {"hours": 3.5, "emissions": 2.0}, "pictures": picture(tmp_path)}
    name = random_prior().push_to_hub(fresh_repo_id(), **extras).repo_id
    theirs = {"task": {"type": "t"}, "dataset": {"name": "d", "type": "d"}, "metrics": [{"type": "m", "value": 1}]}
    data, body = split_card(card(name))
    data["model-index"][0]["results"].append(theirs)
    commit(name, "README.md", f"---\n{json.dumps(data)}\n---\n\n{body}\nMine.\n".encode())
    commit(name, "prior_pictures/mine.png", PNG)

    random_prior().push_to_hub(name, commit_message="the same", tag="v2", license="mit")
    same, data = card(name), split_card(card(name))[0]
    assert len(data["model-index"][0]["results"]) == 2
    assert data["co2_eq_emissions"] == {"emissions": 2.0}
    assert "prior_pictures/spectrum.png" in tree(name)
    for part in ("## Evaluation", "## Compute", "![what spectrum.png shows](prior_pictures/spectrum.png)", "\nMine.\n"):
        assert part in same

    again = {"evaluation": RESULTS | {"metrics": {"accuracy": 0.95}}}
    random_prior().push_to_hub(name, **again)
    results = ModelCard.load(name).data.eval_results
    assert sorted((r.metric_type, r.metric_value) for r in results) == [("accuracy", 0.95), ("m", 1)]

    random_prior(seed=1).push_to_hub(name)
    other, data = card(name), split_card(card(name))[0]
    assert data["model-index"][0]["results"] == [theirs], "the results of a person's own hand stay"
    assert "co2_eq_emissions" not in data
    for part in ("## Evaluation", "## Compute", "## Pictures"):
        assert part not in other
    assert other.endswith("\nMine.\n")
    assert {path for path in tree(name) if "pictures" in path} == {"prior_pictures/mine.png"}


def test_a_folder_keeps_results_and_versions_when_its_prior_is_saved_again(tmp_path):
    prior = random_prior()
    prior.save_pretrained(tmp_path)
    path = tmp_path / "README.md"
    row = Version("v1.0", "2026-01-31", "3", "0.3", "org/d, swag", "first version")
    config = read_config(tmp_path)
    path.write_text(render_card(config, evaluation=eval_results(RESULTS), versions=[row]))
    loaded = PriorModel.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path)
    assert (card_versions(path.read_text()), "## Evaluation" in path.read_text()) == ([row], True)
    loaded.rescaled(7.0).save_pretrained(tmp_path)
    assert (card_versions(path.read_text()), "## Evaluation" in path.read_text()) == ([row], False)
    assert "model-index" not in split_card(path.read_text())[0]


@pytest.mark.hub
def test_a_dry_run_says_where_this_token_may_make_no_repository():
    def problems(name: str, **arguments: Any) -> str:
        return " ".join(push_prior_to_hub(random_prior(), name, dry_run=True, **arguments).problems)

    assert problems(fresh_repo_id()) == problems("prior-hub/new") == problems("new") == ""
    assert "is no member of 'bob'" in problems("bob/new")
    assert "may only read" in problems(fresh_repo_id(), token=ALICE_READ_ONLY)
    assert "nobody is logged in" in problems(fresh_repo_id(), token=False)
    name = fresh_repo_id()
    random_prior().push_to_hub(name)
    assert "may only read" in problems(name, token=ALICE_READ_ONLY, create_pr=True)
    assert problems(name, token=BOB, create_pr=True) == ""


@pytest.mark.hub
def test_a_repository_that_was_renamed_is_named_and_none_is_made_under_its_old_name(hub, monkeypatch):
    new, old = fresh_repo_id(), fresh_repo_id()
    random_prior().push_to_hub(new)
    asked = HfApi.model_info  # the server of these tests sends nobody on
    monkeypatch.setattr(HfApi, "model_info", lambda self, name, **options: asked(self, new if name == old else name, **options))
    hub.clear_log()
    with pytest.raises(PriorHubError, match=f"{old} was renamed, it is {new} now; nothing was pushed"):
        random_prior(seed=1).push_to_hub(old)
    assert writes(hub) == []


@pytest.mark.hub
def test_a_prior_whose_card_the_client_cannot_read_is_loaded_all_the_same_and_a_push_says_what_to_correct(monkeypatch):
    """`ModelCardData(**metadata)` is a TypeError for a key that is called self."""
    name = fresh_repo_id()
    random_prior().push_to_hub(name)
    with monkeypatch.context() as patch:
        patch.setattr(HfApi, "_validate_yaml", lambda *_, **__: None)  # as a commit by git, which the client does not check
        commit(name, "README.md", card(name).replace("---\n", "---\nself: me\n", 1).encode())
    assert_same(PriorModel.from_pretrained(name), random_prior())
    assert prior_info(name).rank == 3
    assert main(["check", name, "--strict"]) == 1
    with pytest.raises(PriorFormatError, match="Correct the metadata"):
        random_prior(seed=1).push_to_hub(name)


@pytest.mark.hub
def test_a_dry_run_of_what_is_no_folder_says_so_and_looks_for_no_prior_of_that_name_on_the_hub(hub, capsys):
    hub.clear_log()
    for more in ([], ["--dry-run"]):
        assert main(["push", "alice/not-there", "alice/x", *more]) == 1
        assert "alice/not-there is not a folder" in capsys.readouterr().err
    assert hub.requests() == []


def test_two_pictures_of_one_name_are_refused_and_none_is_lost(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    with pytest.raises(PriorMetadataError, match="two files of the name spectrum"):
        random_prior().push_to_hub("alice/x", pictures=picture(tmp_path / "a") | picture(tmp_path / "b"))


# ------------------------------------------------------------------------------------- a folder's text and the Hub's
@pytest.mark.hub
def test_what_was_edited_on_the_hub_stays_edited_when_the_same_folder_is_pushed_again(tmp_path):
    name, path = fresh_repo_id(), tmp_path / "README.md"
    random_prior().save_pretrained(tmp_path)
    text = (
        path.read_text()
        .replace("\n---\n", "\nlanguage: en\npipeline_tag: x\n---\n", 1)
        .replace("- prior\n", "- prior\n- mine\n")
    )
    path.write_text(text + "\n## Notes\n\nOf teh first run.\n\nTo be removed.\n")
    push_prior_to_hub(tmp_path, name)
    edited = card(name).replace("teh", "the").replace("To be removed.\n", "").replace("language: en", "language: de")
    commit(name, "README.md", edited.replace("pipeline_tag: x\n", "").replace("- mine\n", "").encode())
    there = card(name)
    push_prior_to_hub(tmp_path, name)
    assert card(name) == there
    push_prior_to_hub(tmp_path, name, license="mit")
    data, body = split_card(card(name))
    assert (data["license"], data["language"], "pipeline_tag" in data, "mine" in data["tags"]) == ("mit", "de", False, False)
    assert body.count("Notes") == body.count("of the first run".capitalize()) == 1
    assert "teh" not in body
    assert "removed" not in body


@pytest.mark.hub
def test_a_paragraph_added_in_the_folder_is_added_once_and_where_it_stands(tmp_path):
    name, path = fresh_repo_id(), tmp_path / "README.md"
    random_prior().save_pretrained(tmp_path)
    path.write_text(path.read_text() + "\n## Notes\n\nOne.\n\n## More\n\nThree.\n")
    push_prior_to_hub(tmp_path, name)
    commit(name, "README.md", card(name).replace("Three.", "Three, of the Hub.").encode())
    path.write_text(path.read_text().replace("One.\n", "One.\n\nTwo.\n"))
    for _ in range(2):
        push_prior_to_hub(tmp_path, name)
        assert card(name).endswith("\n## Notes\n\nOne.\n\nTwo.\n\n## More\n\nThree, of the Hub.\n")


# ---------------------------------------------------------------------------------------------------------- versions
@pytest.mark.hub
def test_the_list_of_versions_and_the_pictures_are_known_in_a_card_that_was_saved_on_windows(tmp_path):
    name = fresh_repo_id()
    random_prior(seed=0).push_to_hub(name, tag="v1")
    random_prior(seed=1).push_to_hub(name, tag="v2", pictures=picture(tmp_path))
    commit(name, "README.md", card(name).replace("\n", "\r\n").encode())
    random_prior(seed=2).push_to_hub(name, tag="v3")
    assert [row.version for row in card_versions(card(name))] == ["v3", "v2", "v1"]
    assert "prior_pictures/spectrum.png" not in tree(name)  # it was of the other prior


@pytest.mark.hub
def test_the_list_of_versions_grows_with_each_push_and_names_the_commits():
    name = random_prior().push_to_hub(fresh_repo_id(), tag="v1.0").repo_id
    second = random_prior(seed=1, rank=5).push_to_hub(name, commit_message="twice | the snapshots").commit_hash
    commit(name, "notes.txt", b"not a version")
    random_prior(seed=1, rank=5, scale=9.0).push_to_hub(name, tag="v1.1")
    rows = card_versions(card(name))
    assert [(row.version, row.rank, row.scale) for row in rows] == [
        ("v1.1", "5", "9"),
        (second[:8], "5", "1.3"),
        ("v1.0", "3", "0.3"),
    ]
    assert [row.change for row in rows] == ["scale 1.3 -> 9", r"twice \| the snapshots", "first version"]
    assert {row.date for row in rows} == {f"{alice.list_repo_commits(name)[0].created_at:%Y-%m-%d}"}
    assert {row.source for row in rows} == {"org/tiny-images, swag"}
    before = alice.model_info(name).sha
    random_prior(seed=1, rank=5, scale=9.0).push_to_hub(name)
    assert alice.model_info(name).sha == before, "the same push again is no version and no commit"
    random_prior(seed=1, rank=5, scale=9.0).push_to_hub(name, tag="v1.2")
    assert [row.version for row in card_versions(card(name))] == ["v1.2", "v1.1", second[:8], "v1.0"]


@pytest.mark.hub
def test_a_tag_given_later_names_the_newest_version():
    name = random_prior().push_to_hub(fresh_repo_id()).repo_id
    assert [row.version for row in card_versions(card(name))] == ["newest"]
    random_prior().push_to_hub(name, tag="v1.0")
    assert [row.version for row in card_versions(card(name))] == ["v1.0"]
    assert "| v1.0 |" in card(name, revision="v1.0")


@pytest.mark.hub
def test_a_prior_that_was_published_before_there_was_a_list_is_its_first_row():
    name = random_prior().push_to_hub(fresh_repo_id()).repo_id
    first = alice.model_info(name).sha
    commit(name, "README.md", render_card(download_config(name)[0]).encode())
    random_prior(seed=1).push_to_hub(name, subfolder="other")  # of another place, with a list of its own
    random_prior(seed=1).push_to_hub(name)
    assert [row.version for row in card_versions(card(name))] == ["newest", first[:8]]
    assert [row.version for row in card_versions(card(name, "other/README.md"))] == ["newest"]


@pytest.mark.hub
def test_a_card_edited_by_hand_keeps_the_edit_after_the_next_pushes(tmp_path):
    name = random_prior().push_to_hub(fresh_repo_id(), tag="v1", evaluation=RESULTS, pictures=picture(tmp_path)).repo_id
    text = card(name)
    edited = text.replace("library_name:", "language: en\nthumbnail: x.png\nlibrary_name:").replace(
        "\n<!-- prior_hub: ren", "\nAbove.\n\n<!-- prior_hub: ren"
    )
    commit(name, "README.md", f"{edited}\nBelow.\n".encode())
    for seed, options in ((1, {"evaluation": RESULTS}), (2, {"create_pr": True}), (3, {"pictures": picture(tmp_path)})):
        result = random_prior(seed).push_to_hub(name, **options)
        found = card(name, revision=result.commit_hash)
        for words in ("language: en\nthumbnail: x.png\n", "\nAbove.\n\n<!-- prior_hub: rendered", "end -->\n\nBelow.\n"):
            assert words in found
        assert card_problems(found) == []
    assert [row.version for row in card_versions(found)][-1] == "v1"


CELL = st.text(st.sampled_from("ab|\\-: <!>`#\n"), max_size=8)


@settings(max_examples=60, deadline=None)
@given(cells=st.lists(st.tuples(CELL, CELL), min_size=1, max_size=4))
def test_the_list_of_versions_is_read_back_as_it_was_written_whatever_people_write(cells):
    config, rows = random_prior().config, []
    for number, (tag, message) in enumerate(cells):
        changed = config.replace(scale=number + 1.0)
        rows = new_versions(rows, changed, None, last=("0123456789", "d"), date="2026-01-31", tag=tag, message=message)
    assert len(rows) == len(cells)
    assert read_versions(versions_table(rows)) == rows
    text = render_card(config, versions=rows)
    assert card_versions(text) == rows
    assert card_versions(update_card(text, render_card(config.replace(scale=9.5)))) == rows, (
        "and stays when it is rendered anew"
    )


# ---------------------------------------------------------------------------------------------------------- pictures
@pytest.mark.hub
@pytest.mark.parametrize("subfolder", [None, "deeper"])
def test_pictures_are_of_the_same_commit_and_beside_the_card(tmp_path, subfolder):
    pictures = picture(tmp_path) | picture(tmp_path, "a-b_2.png", PNG + b"2")
    result = random_prior().push_to_hub(fresh_repo_id(), pictures=pictures, subfolder=subfolder)
    place = f"{subfolder}/" if subfolder else ""
    text = card(result.repo_id, f"{place}README.md", result.commit_hash)
    for path, told in pictures.items():
        assert f"![{told}](prior_pictures/{path.name})" in text
        found = hf_hub_download(result.repo_id, f"{place}prior_pictures/{path.name}", revision=result.commit_hash)
        assert Path(found).read_bytes() == path.read_bytes()
    assert len(alice.list_repo_commits(result.repo_id)) == 2


@pytest.mark.hub
def test_a_picture_that_is_not_there_or_has_no_name_of_one_is_refused_before_any_request(hub, tmp_path):
    hub.clear_log()
    with pytest.raises(PriorNotFoundError, match=r"missing\.png"):
        random_prior().push_to_hub("alice/x", pictures={tmp_path / "missing.png": "x"})
    for name in ("a b.png", "x.html", ".png", "a].png"):
        with pytest.raises(PriorMetadataError, match="no name for a picture"):
            random_prior().push_to_hub("alice/x", pictures=picture(tmp_path, name))
    assert hub.requests() == []


def pushed_pictures(folder: Path) -> list[bytes]:
    """The pictures that the command puts into a card, each shown by it."""
    random_prior(buffers=False).save_pretrained(folder)
    name = fresh_repo_id()
    assert main(["push", str(folder), name, "--json"]) == 0
    paths = [path for path in tree(name) if path.startswith("prior_pictures/")]
    assert all(f"]({path})" in card(name) for path in paths)
    return [Path(hf_hub_download(name, path)).read_bytes() for path in paths]


@pytest.mark.hub
@pytest.mark.slow
def test_the_command_draws_the_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    pictures = pushed_pictures(tmp_path)
    assert len(pictures) == 3
    assert all(content.startswith(PNG[:8]) for content in pictures)


@pytest.mark.hub
def test_the_command_pushes_the_pictures_that_are_drawn_and_says_why_there_are_none(tmp_path, capsys, monkeypatch):
    def draw(prior: PriorModel, folder: Path) -> dict[str, str]:
        return {path.name: text for path, text in picture(folder, "rank.png", PNG + bytes([prior.rank])).items()}

    monkeypatch.setattr("prior_hub.plots.card_pictures", draw)
    assert pushed_pictures(tmp_path) == [PNG + b"\3"]
    capsys.readouterr()

    def missing(*_: object) -> None:
        raise ImportError("no matplotlib")

    monkeypatch.setattr("prior_hub.plots.card_pictures", missing)
    other = fresh_repo_id()
    assert main(["push", str(tmp_path), other]) == 0
    assert "pip install 'prior-hub[plots]'" in capsys.readouterr().err
    assert not [path for path in tree(other) if path.startswith("prior_pictures/")]


# ---------------------------------------------------------------------------------------------------------- who may have it
@pytest.mark.hub
@pytest.mark.parametrize("gated", ["auto", "manual"])
def test_a_gate_is_there_before_the_files_are(hub, gated):
    hub.clear_log()
    name = random_prior().push_to_hub(fresh_repo_id(), gated=gated, private=True).repo_id
    assert alice.model_info(name).gated == gated
    asked = [entry["target"] for entry in hub.requests()]
    settings_at = next(i for i, target in enumerate(asked) if target.endswith("/settings"))
    assert settings_at < next(i for i, target in enumerate(asked) if "/preupload/" in target or "/commit/" in target)
    random_prior(seed=1).push_to_hub(name, gated=gated)
    assert alice.model_info(name).gated == gated
    random_prior(seed=2).push_to_hub(name)
    assert alice.model_info(name).gated == gated, "without the argument it stays as it is"


@pytest.mark.hub
def test_a_new_repository_is_made_in_the_resource_group(hub, monkeypatch):
    real, sent = HfApi.create_repo, []

    def create(self: HfApi, *args: Any, **options: Any) -> Any:
        sent.append(options.get("resource_group_id"))
        return real(self, *args, **options)

    monkeypatch.setattr(HfApi, "create_repo", create)
    name = random_prior().push_to_hub(fresh_repo_id(), resource_group_id="66670e5163145ca562cb1988").repo_id
    assert sent == ["66670e5163145ca562cb1988"]
    if hasattr(hub, "collections"):
        assert hub.repos[name].resource_group == "66670e5163145ca562cb1988"


@pytest.fixture
def collections(hub):
    if not hasattr(hub, "collections"):
        pytest.skip("this server has no collections")


@pytest.mark.hub
def test_a_prior_is_put_into_a_collection_by_title_and_by_slug(collections, tmp_path):
    title = fresh_repo_id().split("/")[1]
    first = random_prior().push_to_hub(fresh_repo_id(), collection=title)
    slug = first.collection_url.split("/collections/")[1]
    assert slug.startswith(f"alice/{title}-")
    second = random_prior(seed=1).push_to_hub(fresh_repo_id(), collection=slug)
    for _ in range(2):
        assert add_to_collection(second.repo_id, title, note="the second") == first.collection_url
    random_prior().save_pretrained(tmp_path)
    assert push_prior_to_hub(tmp_path, first.repo_id, collection=title).collection_url == first.collection_url
    found = alice.get_collection(slug)
    assert (found.title, [item.item_id for item in found.items]) == (title, [first.repo_id, second.repo_id])
    third = random_prior().push_to_hub(fresh_repo_id()).repo_id
    add_to_collection(third, slug, note="told")
    assert alice.get_collection(slug).items[-1].note == "told"


@pytest.mark.hub
def test_a_collection_that_cannot_be_changed_says_that_the_prior_was_pushed(collections):
    name = fresh_repo_id()
    with pytest.raises(PriorHubError, match=rf"was pushed to {name} as \w+, but not put into 'alice/none-0'"):
        random_prior().push_to_hub(name, collection="alice/none-0")
    assert alice.repo_exists(name)
    with pytest.raises(PriorAccessError):
        add_to_collection(name, "Mine", token=ALICE_READ_ONLY)


# ---------------------------------------------------------------------------------------------------------- tokens
SECRET = "hf_" + "AbCdEfGhIj" * 3 + "KLMN"  # the form of one
PLACES = ["message", "description", "config", "card", "of another"]


@pytest.mark.hub
@pytest.mark.parametrize("place", PLACES)
def test_a_token_is_never_published(hub, tmp_path, place):
    token = ALICE if place != "of another" else SECRET
    fields: dict[str, Any] = {
        "config": {"head_parameters": ("a", "b", "c", "d", token)},  # the card shows the first four
        "of another": {"estimator": {"name": "swag", "hub_token": token}},
    }.get(place, {})
    prior = random_prior(**fields)
    prior.save_pretrained(tmp_path)
    if place == "card":
        (tmp_path / "README.md").write_text((tmp_path / "README.md").read_text() + f"\nlogin({token!r})\n")
    options = {"message": {"commit_message": f"with {token}"}, "description": {"commit_description": token}}.get(place, {})
    hub.clear_log()
    for dry in (False, True):
        with pytest.raises(PriorMetadataError, match="contains an access token") as caught:
            push_prior_to_hub(tmp_path, "alice/x", dry_run=dry, **options)
        assert token not in str(caught.value)
    assert hub.requests() == []


@pytest.mark.hub
def test_no_token_is_in_a_result_a_plan_a_log_or_an_error_of_a_push(hub, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    name = fresh_repo_id()
    random_prior().save_pretrained(tmp_path)
    caplog.set_level(logging.DEBUG)
    told = [
        str(push_prior_to_hub(tmp_path, name, dry_run=True, token=ALICE)),
        str(push_prior_to_hub(tmp_path, name, token=ALICE)),
    ]
    for path in ("/api/repos/create", "/preupload/", "/api/validate-yaml", "/paths-info/"):
        for action in ("status", "close"):
            hub.add_fault(action, status=400, path=path, times=-1, body={"error": "no"})
            with pytest.raises(PriorHubError) as caught:
                push_prior_to_hub(random_prior(seed=1), name, token=ALICE)
            told.append("".join(traceback.format_exception(caught.value)))
            hub.clear_faults()
    assert len(told) == 10
    assert ALICE not in "".join(told) + caplog.text
    assert "Bearer" not in caplog.text


# ---------------------------------------------------------------------------------------------------------- cards
@pytest.mark.hub
def test_a_card_the_client_could_not_read_is_not_pushed_and_a_dry_run_says_so():
    name = alice.create_repo(fresh_repo_id("model")).repo_id
    block = "library_name: transformers\nmodel-index:\n- name: x\n  results:\n  - task: {}\n"
    commit(name, "sub/README.md", f"---\n{block}---\n\n# A model\n".encode())  # the Hub looks at the card at the top only
    plan = push_prior_to_hub(random_prior(), name, subfolder="sub", dry_run=True)
    assert "cannot read it" in plan.problems[0]
    with pytest.raises(PriorFormatError, match=r"model card .* is not valid, nothing was pushed: .*model_index"):
        random_prior().push_to_hub(name, subfolder="sub")
    assert len(alice.list_repo_commits(name)) == 2


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ("tags: [1]", "'tags'"),
        ("base_model: ./x", "no name on the Hub"),
        ("datasets: [a/b/c]", "no name on the Hub"),
        ("license_name: [x]", "'license_name'"),
        ("model-index: 3", "cannot read it"),
        ("model-index: [{name: x}]", "cannot read it"),
        ("a: [", "not valid YAML"),
    ],
)
def test_what_is_wrong_with_metadata_is_said_without_a_request(block, words):
    assert words in " ".join(card_problems(f"---\n{block}\n---\n\nText.\n"))
    assert card_problems("# Text\n") == card_problems(render_card(random_prior().config)) == []


def test_the_card_command_prints_and_writes_and_keeps_a_persons_text(tmp_path, capsys):
    random_prior().save_pretrained(tmp_path)
    path = tmp_path / "README.md"
    path.write_text(path.read_text() + "\nMine.\n")
    before = path.read_text()
    assert main(["card", str(tmp_path)]) == 0
    assert capsys.readouterr().out == before
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    assert main(["card", str(tmp_path), "--write", "--evaluation", str(tmp_path / "results.json"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"ok": True, "card": path.read_text(), "problems": [], "written": True}
    assert ModelCard(found["card"]).data.eval_results == eval_results(RESULTS)
    assert path.read_text().endswith("\nMine.\n")
    path.write_text(before.replace("base_model: org/tiny-net", "base_model: org/tiny-net\nlicense_name: [x]"))
    assert main(["card", str(tmp_path)]) == 1
    assert "would not accept" in capsys.readouterr().err


@pytest.mark.hub
def test_every_flag_of_push_reaches_the_hub(hub, tmp_path, capsys):
    folder, name = tmp_path / "prior", fresh_repo_id()
    random_prior(**BARE).save_pretrained(folder)
    (tmp_path / "results.json").write_text(json.dumps(RESULTS["metrics"]))
    command = ["push", str(folder), name, "--license", "mit", "--base-model", "org/net", "--dataset", "org/data", "--private"]
    command += ["--gated", "manual", "--tag", "v1.0", "--message", "the first", "--no-pictures", "--compute", "hours=3.5"]
    command += ["--evaluation", str(tmp_path / "results.json"), "--evaluation-dataset", "org/t", "--evaluation-task", "x"]
    command += ["--compute", "emissions=2", "--compute", "hardware_used=a=b", "--json"]
    command += ["--dataset-license", "cc-by-4.0"]
    command += ["--collection", "CLI"] if hasattr(hub, "collections") else []
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    info = alice.model_info(name)
    assert (info.private, info.gated, found["tag"], found["ok"]) == (True, "manual", "v1.0", True)
    source = download_config(name)[0].source
    assert (source["dataset"], source["dataset_license"]) == ("org/data", "cc-by-4.0")
    assert info.card_data.co2_eq_emissions == {"emissions": 2.0, "hardware_used": "a=b"}
    assert [r.metric_type for r in info.card_data.eval_results] == ["accuracy", "loss"]
    assert [(row.version, row.change) for row in card_versions(card(name))] == [("v1.0", "the first")]
    assert alice.list_repo_commits(name)[0].title == "the first"
    assert ("/collections/alice/cli-" in (found["collection_url"] or "")) == hasattr(hub, "collections")
    (tmp_path / "results.json").write_text("{")
    assert main(command) == 1
    assert json.loads(capsys.readouterr().out)["error"] == "PriorFormatError"


def test_a_plan_is_what_a_dry_run_returns_and_shapes_are_not_touched(monkeypatch):
    monkeypatch.setattr("prior_hub.model.plan_push", lambda folder, *_, **__: read_config(folder))
    assert push_prior_to_hub(random_prior(), "a/b", dry_run=True, collection="x").parameters.keys() == SHAPES.keys()
    assert PushPlan.__dataclass_fields__.keys() >= {"files", "card_diff", "missing", "problems"}
