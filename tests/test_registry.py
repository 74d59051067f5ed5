"""Priors on the Hub, through the real client: what is pushed, what comes back, and what is said when it does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_fixtures import ALICE, ALICE_READ_ONLY, BOB, fresh_repo_id
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, constants, hf_hub_download
from priors_for_tests import assert_same, differences, random_prior

import prior_hub
from prior_hub.cli import main
from prior_hub.errors import (
    PriorAccessError,
    PriorConnectionError,
    PriorFormatError,
    PriorHubError,
    PriorNotFoundError,
)
from prior_hub.model import PriorModel, push_prior_to_hub
from prior_hub.registry import client, download
from prior_hub.registry.download import download_config
from prior_hub.registry.upload import upload_prior

pytestmark = pytest.mark.hub

alice = HfApi()
SHARDS = {"max_shard_size": 200}
FILES = {".gitattributes", "README.md", "prior.safetensors", "prior_config.json"}


@pytest.fixture
def cache(tmp_path) -> Path:
    """A cache folder that has seen nothing yet."""
    return tmp_path / "cache"


@pytest.fixture
def lfs_only(hub):
    if hub.xet:
        pytest.skip("about LFS transfers: in Xet mode weights come from the CAS, whose client has rules of its own")


@pytest.fixture
def no_waiting(monkeypatch):
    """Retries follow at once."""
    monkeypatch.setattr(time, "sleep", lambda _: None)


@pytest.fixture
def repo() -> str:
    """A repository with `random_prior()` in it."""
    return random_prior().push_to_hub(fresh_repo_id("prior")).repo_id


def load(repo: str, cache: Path, **options: Any) -> PriorModel:
    return PriorModel.from_pretrained(repo, cache_dir=cache, **options)


def titles(repo: str, revision: str | None = None) -> list[str]:
    return [commit.title for commit in alice.list_repo_commits(repo, revision=revision)]


def files(repo: str, revision: str | None = None) -> set[str]:
    return set(alice.list_repo_files(repo, revision=revision))


def commit(repo: str, message: str = "other", **contents: bytes) -> str:
    """Somebody's own commit; "__" stands for a slash, "_dot_" for a dot."""
    operations = [CommitOperationAdd(k.replace("__", "/").replace("_dot_", "."), v) for k, v in contents.items()]
    return alice.create_commit(repo, operations, commit_message=message).oid


@contextmanager
def refusal(kind: type[Exception], *words: str) -> Iterator[None]:
    """The block raises exactly this kind, in a readable message with these words, and no token in any text of it."""
    with pytest.raises(kind) as caught:
        yield
    assert type(caught.value) is kind
    message = str(caught.value)
    for word in words:
        assert word in message, message
    assert len(message) < 1200
    assert message[-1] in ".)", message
    everything = "".join(traceback.format_exception(caught.value))
    for token in (ALICE, ALICE_READ_ONLY, BOB, "hf_bogus_token"):
        assert token not in everything.replace(f'"{token}"', "")  # the source line of a test may have it
    assert "Bearer" not in everything
    assert "Signature=" not in message


# ---------------------------------------------------------------------------------------------------------- there and back
@pytest.mark.parametrize("shard", ["5GB", 200])
@pytest.mark.parametrize(("rank", "deviations"), [(0, torch.float32), (3, torch.bfloat16), (20, torch.float16)])
def test_a_prior_comes_back_from_the_hub_bit_for_bit(cache, rank, deviations, shard):
    prior = random_prior(rank=rank, deviations=deviations, mean=torch.float64)
    result = prior.push_to_hub(fresh_repo_id(), max_shard_size=shard)
    found = load(result.repo_id, cache)
    assert_same(found, prior)
    assert (found.repo_id, found.commit_hash) == (result.repo_id, result.commit_hash)
    if rank:
        assert_same(load(result.repo_id, cache, rank=1, verify=False), prior.truncated(1))
        assert_same(load(result.repo_id, cache, scale=7.0), prior.rescaled(7.0))


def test_the_files_of_a_large_prior_are_fetched_side_by_side(repo, cache, monkeypatch):
    prior = random_prior(rank=3)
    prior.push_to_hub(repo, **SHARDS)
    plain, two = HfApi.hf_hub_download, threading.Barrier(2, timeout=20)

    def together(self, repo_id, filename, **options):
        if "prior-00001-of" in filename or "prior-00002-of" in filename:
            two.wait()  # broken unless two are under way at a time
        return plain(self, repo_id, filename, **options)

    monkeypatch.setattr(HfApi, "hf_hub_download", together)
    assert_same(load(repo, cache), prior)


def test_when_one_file_fails_those_that_wait_are_not_fetched(repo, cache, monkeypatch, no_waiting):
    random_prior(rank=3).push_to_hub(repo, **SHARDS)
    plain, asked = HfApi.hf_hub_download, []

    def fails(self, repo_id, filename, **options):
        if ".safetensors" not in filename:
            return plain(self, repo_id, filename, **options)
        asked.append(filename)
        if filename == asked[0]:
            raise ConnectionError("the first")
        threading.Event().wait(0.2)  # the others are long under way
        return None

    monkeypatch.setattr(HfApi, "hf_hub_download", fails)
    monkeypatch.setattr(download, "_DOWNLOADS", 1)
    with pytest.raises(PriorConnectionError, match="the first"):
        load(repo, cache)
    assert asked.count(asked[0]) == 3, "it was tried again"
    assert len(set(asked)) <= 2 < len(download_config(repo, cache_dir=cache)[0].weight_files)


def test_a_push_is_one_commit_of_configuration_weights_and_card(hub):
    name = fresh_repo_id()
    result = random_prior().push_to_hub(name, commit_description="why")
    assert titles(name) == ["Upload prior (rank 3) with prior_hub", "initial commit"]
    assert alice.list_repo_commits(name)[0].message.strip().endswith("why")
    assert files(name) == FILES
    assert (result.repo_id, result.commit_hash) == (name, alice.model_info(name).sha)
    assert result.commit_url == f"{hub.endpoint}/{name}/commit/{result.commit_hash}"
    assert (result.pull_request_url, result.tag) == (None, None)
    info = alice.model_info(name, files_metadata=True)
    assert info.library_name == "prior-hub"
    assert {"prior-hub", "swag", "license:apache-2.0", "dataset:org/tiny-images", "base_model:org/tiny-net"} <= set(info.tags)
    sizes = {file.rfilename: file.lfs for file in info.siblings}
    assert sizes["prior.safetensors"].sha256 == download_config(name)[0].weight_files["prior.safetensors"]


def test_a_message_of_ones_own_is_the_title_of_the_commit():
    name = random_prior().push_to_hub(fresh_repo_id(), commit_message="first prior").repo_id
    assert titles(name)[0] == "first prior"


@pytest.mark.parametrize("kind", ["object", "folder", "shards"])
def test_the_same_push_again_makes_no_commit(repo, tmp_path, kind):
    prior = random_prior(seed=1)
    options = SHARDS if kind == "shards" else {}
    prior.save_pretrained(tmp_path, **options)

    def push() -> Any:
        return push_prior_to_hub(tmp_path, repo) if kind == "folder" else prior.push_to_hub(repo, **options)

    first = push()
    assert push() == first
    assert len(titles(repo)) == 3


def test_a_push_of_fewer_files_removes_the_old_ones_in_the_same_commit(cache):
    name = random_prior(rank=20).push_to_hub(fresh_repo_id(), **SHARDS).repo_id
    commit(name, notes_dot_txt=b"theirs", deeper__prior_dot_safetensors=b"theirs")
    assert len(files(name)) > 8
    random_prior(rank=2).push_to_hub(name, **SHARDS)
    fewer = files(name)
    assert len([f for f in fewer if f.startswith("prior-")]) == len(download_config(name)[0].weight_files) > 1
    random_prior(rank=0).push_to_hub(name)
    assert files(name) == FILES | {"notes.txt", "deeper/prior.safetensors"}
    assert len(titles(name)) == 5
    assert_same(load(name, cache), random_prior(rank=0))


def test_more_files_over_one_leave_no_single_file(repo, cache):
    random_prior(seed=1).push_to_hub(repo, **SHARDS)
    assert "prior.safetensors" not in files(repo)
    assert "prior.safetensors.index.json" in files(repo)
    assert_same(load(repo, cache), random_prior(seed=1))


def test_a_folder_is_pushed_as_it_is_and_its_card_names_the_repository(tmp_path, cache):
    prior = random_prior()
    prior.save_pretrained(tmp_path / "prior", **SHARDS)
    (tmp_path / "prior" / "secret.txt").write_text("not part of the prior")
    name = push_prior_to_hub(tmp_path / "prior", fresh_repo_id()).repo_id
    assert "secret.txt" not in files(name)
    assert_same(load(name, cache), prior)
    assert f'from_pretrained("{name}")' in ModelCard.load(name).content
    saved = prior.save_pretrained(tmp_path / "other", push_to_hub=True, repo_id=fresh_repo_id(), private=True)
    assert alice.model_info(saved.repo_id).private
    assert_same(load(saved.repo_id, cache), prior)


def test_a_folder_loaded_from_one_repository_and_pushed_to_another_names_the_other(repo, tmp_path, cache):
    prior = load(repo, cache)
    prior.save_pretrained(tmp_path, repo_id=repo)
    assert f'from_pretrained("{repo}")' in (tmp_path / "README.md").read_text()
    name = push_prior_to_hub(tmp_path, fresh_repo_id()).repo_id
    assert f'from_pretrained("{name}")' in ModelCard.load(name).content
    assert repo not in ModelCard.load(name).content


def test_a_name_without_an_owner_is_the_owners_and_the_card_says_so(cache):
    short = fresh_repo_id().split("/")[1]
    result = random_prior().push_to_hub(short)
    assert result.repo_id == f"alice/{short}"
    card = ModelCard.load(result.repo_id).content
    assert f'from_pretrained("alice/{short}")' in card
    assert f"\n# {short}\n" in card
    assert_same(load(result.repo_id, cache), random_prior())


def test_a_damaged_folder_is_refused_before_a_repository_is_made(tmp_path):
    random_prior().save_pretrained(tmp_path)
    path = tmp_path / "prior.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    name = fresh_repo_id()
    with refusal(PriorFormatError, "sha256"):
        push_prior_to_hub(tmp_path, name)
    assert not alice.repo_exists(name)
    with refusal(PriorNotFoundError, "no prior_config.json"):
        push_prior_to_hub(tmp_path.parent, name)
    with refusal(PriorFormatError, "prior.safetensors is not the file", "Nothing was pushed"):
        upload_prior(tmp_path, name)
    assert titles(name) == ["initial commit"]


# ---------------------------------------------------------------------------------------------------------- tags, branches
def test_a_tag_is_set_on_the_commit_of_the_push(cache):
    prior = random_prior()
    result = prior.push_to_hub(fresh_repo_id(), tag="v1.0")
    assert result.tag == "v1.0"
    (tag,) = alice.list_repo_refs(result.repo_id).tags
    assert (tag.name, tag.target_commit) == ("v1.0", result.commit_hash)
    random_prior(seed=1).push_to_hub(result.repo_id)
    assert_same(load(result.repo_id, cache, revision="v1.0"), prior)


def test_a_tag_that_exists_is_refused_before_anything_is_pushed(repo):
    alice.create_tag(repo, tag="v1.0")
    with refusal(PriorHubError, "already has a tag 'v1.0'", "nothing was pushed"):
        random_prior(seed=1).push_to_hub(repo, tag="v1.0", revision="new-branch")
    assert len(titles(repo)) == 2
    assert [branch.name for branch in alice.list_repo_refs(repo).branches] == ["main"]


def test_a_tag_that_cannot_be_set_says_that_the_prior_was_pushed(repo):
    with refusal(PriorHubError, "was pushed to", "not tagged 'no..good'"):
        random_prior(seed=1).push_to_hub(repo, tag="no..good")
    assert len(titles(repo)) == 3


def test_a_tag_whose_answer_is_lost_is_set(hub, repo):
    fault = hub.add_fault("lost_response", method="POST", path=f"{repo}/tag/")
    result = random_prior(seed=1).push_to_hub(repo, tag="v2")
    assert (fault["hits"], result.tag) == (1, "v2")


def test_a_pull_request_cannot_be_tagged(repo):
    with pytest.raises(ValueError, match="pull request cannot be tagged"):
        random_prior(seed=1).push_to_hub(repo, tag="v1", create_pr=True)


def test_a_pull_request_leaves_main_as_it_is_and_can_be_loaded(hub, repo, cache):
    before = alice.model_info(repo).sha
    theirs = random_prior(seed=1)
    result = theirs.push_to_hub(repo, create_pr=True, token=BOB, commit_message="better")
    assert result.pull_request_url == f"{hub.endpoint}/{repo}/discussions/1"
    assert alice.model_info(repo).sha == before
    assert_same(load(repo, cache), random_prior())
    assert_same(load(repo, cache, revision="refs/pr/1"), theirs)
    third = random_prior(seed=2).push_to_hub(repo, revision="refs/pr/1")
    assert_same(load(repo, cache, revision=third.commit_hash), random_prior(seed=2))
    assert alice.model_info(repo).sha == before


def test_a_branch_is_made_pushed_to_and_loaded(repo, cache):
    before = alice.model_info(repo).sha
    for seed in (1, 2):
        random_prior(seed).push_to_hub(repo, revision="exp/one")
    assert_same(load(repo, cache, revision="exp/one"), random_prior(seed=2))
    assert_same(load(repo, cache), random_prior())
    assert alice.model_info(repo).sha == before
    assert len(titles(repo, "exp/one")) == 4


def test_branch_tag_commit_and_short_commit_lead_to_their_priors(repo, cache):
    first = alice.model_info(repo).sha
    alice.create_tag(repo, tag="v1")
    second = random_prior(seed=1).push_to_hub(repo).commit_hash
    for revision, seed, at in (
        (None, 1, second), ("main", 1, second), ("v1", 0, first), (first, 0, first), (second, 1, second), (first[:8], 0, first)
    ):  # fmt: skip
        found = load(repo, cache, revision=revision)
        assert_same(found, random_prior(seed))
        assert found.commit_hash == at


# ---------------------------------------------------------------------------------------------------------- subfolders
def test_a_prior_beside_a_model_leaves_the_files_of_the_model_alone(cache):
    name = alice.create_repo(fresh_repo_id("model")).repo_id
    readme, config = b"---\nlibrary_name: transformers\n---\n# A model\n", b'{"model_type": "bert"}'
    commit(name, README_dot_md=readme, config_dot_json=config, model_dot_safetensors=b"weights")
    prior = random_prior()
    result = prior.push_to_hub(name, subfolder="/priors/swag/", **SHARDS)
    assert_same(load(name, cache, subfolder="priors/swag"), prior)
    assert_same(load(name, cache, subfolder="priors/swag/"), prior)
    for path, content in (("README.md", readme), ("config.json", config), ("model.safetensors", b"weights")):
        assert Path(hf_hub_download(name, path, revision=result.commit_hash, cache_dir=cache)).read_bytes() == content
    card = Path(hf_hub_download(name, "priors/swag/README.md", cache_dir=cache)).read_text()
    assert f'from_pretrained("{name}", subfolder=' in card
    random_prior(rank=0).push_to_hub(name, subfolder="priors/swag")
    assert {f for f in files(name) if f.startswith("priors/")} == {f"priors/swag/{f}" for f in FILES - {".gitattributes"}}
    with refusal(PriorNotFoundError, "no prior_config.json", "pass subfolder="):
        load(name, cache)
    with refusal(PriorNotFoundError, "folder 'priors'", "no prior_config.json"):
        load(name, cache, subfolder="priors")


def test_a_push_to_the_root_keeps_priors_in_subfolders(repo, cache):
    inner = random_prior(seed=1)
    inner.push_to_hub(repo, subfolder="b", **SHARDS)
    random_prior(seed=2).push_to_hub(repo)
    assert_same(load(repo, cache, subfolder="b"), inner)
    assert_same(load(repo, cache), random_prior(seed=2))


# ---------------------------------------------------------------------------------------------------------- one commit
def test_every_file_is_of_the_commit_the_revision_was_resolved_to_even_if_somebody_pushes_meanwhile(repo, cache, monkeypatch):
    first = alice.model_info(repo).sha
    real, pushed = HfApi.hf_hub_download, []

    def download_while_somebody_pushes(self: HfApi, name: str, path: str, **options: Any) -> str:
        result = real(self, name, path, **options)
        if not pushed:  # the configuration has arrived, the weights have not
            pushed.append(path)
            random_prior(seed=1).push_to_hub(repo)
        return result

    monkeypatch.setattr(HfApi, "hf_hub_download", download_while_somebody_pushes)
    found = load(repo, cache)
    assert pushed == ["prior_config.json"]
    assert_same(found, random_prior())
    assert found.commit_hash == first != alice.model_info(repo).sha


def test_the_revision_is_looked_up_once_and_the_configuration_touched_once(hub, repo, cache):
    hub.clear_log()
    load(repo, cache)
    assert len(hub.requests(rf"/api/models/{repo}(/revision/|\?|$)")) == 1
    config = [entry["method"] for entry in hub.requests("prior_config.json")]
    assert sorted(config) == ["GET", "HEAD", "HEAD"]  # HEAD: the redirect and its goal
    assert len(hub.requests(f"^/{repo}/resolve/.*prior_config.json", method="HEAD")) == 1
    assert not hub.requests("README.md")
    hub.clear_log()
    load(repo, cache)
    assert [entry["method"] for entry in hub.requests(repo)] == ["GET"], "warm: one request, for the commit"


def test_every_request_says_which_library_it_is_from(hub, cache):
    hub.clear_log()
    result = random_prior().push_to_hub(fresh_repo_id(), tag="v1", revision="b")
    load(result.repo_id, cache, revision="v1")
    agents = {entry["target"]: entry["ua"] for entry in hub.requests(result.repo_id, role="hub")}
    assert len(agents) > 8
    library = f"prior-hub/{prior_hub.__version__}"
    # hf_xet and the LFS batch call have headers of their own
    assert [t for t, ua in agents.items() if library not in (ua or "") and "/info/lfs/" not in t and "xet" not in t] == []


# ---------------------------------------------------------------------------------------------------------- cache
def test_downloads_go_to_the_cache_folder_that_was_named(repo, cache):
    load(repo, cache)
    assert len(list(cache.rglob("prior.safetensors"))) == 1
    assert not list(Path(constants.HF_HUB_CACHE).glob(f"*{repo.split('/')[1]}/snapshots/*/prior.safetensors"))


def test_force_download_fetches_again(hub, repo, cache):
    load(repo, cache)
    hub.clear_log()
    assert_same(load(repo, cache, force_download=True), random_prior())
    assert hub.requests("prior_config.json", method="GET")
    assert hub.requests(r"prior\.safetensors|^/lfs/|/xorb/|reconstructions")


def test_local_files_only_needs_no_server_and_says_what_is_missing(hub, repo, cache):
    hub.clear_log()
    with refusal(PriorConnectionError, repo, "local_files_only"):
        load(repo, cache, local_files_only=True)
    assert not hub.requests(repo)
    load(repo, cache)
    hub.clear_log()
    assert_same(load(repo, cache, local_files_only=True), random_prior())
    assert not hub.requests(repo)
    next(cache.rglob("prior.safetensors")).unlink()
    with refusal(PriorConnectionError, "not in the local cache"):
        load(repo, cache, local_files_only=True)


OFFLINE = """
import json, sys
from prior_hub import PriorModel
repo, missing, cache = sys.argv[1:]
result = {"scale": PriorModel.from_pretrained(repo, cache_dir=cache).scale}
for name, revision in ((missing, None), (repo, "nope")):
    try:
        PriorModel.from_pretrained(name, cache_dir=cache, revision=revision)
    except Exception as error:
        result[f"{name} {revision}"] = f"{type(error).__name__}: {error}"
print(json.dumps(result))
"""


def test_offline_a_cached_prior_loads_and_another_says_why_not(hub, repo, cache):
    load(repo, cache)
    hub.clear_log()
    command = [sys.executable, "-c", OFFLINE, repo, "alice/other", str(cache)]
    run = subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result.pop("scale") == random_prior().scale
    assert len(result) == 2
    for message in result.values():
        assert message.startswith("PriorConnectionError")
        assert "offline" in message.lower()
    assert not hub.requests(repo)


def test_without_a_connection_a_cached_prior_loads_and_another_says_why_not(repo, cache, monkeypatch, no_waiting):
    load(repo, cache)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert_same(load(repo, cache), random_prior())
    with refusal(PriorConnectionError, "alice/other", "could not be reached"):
        load("alice/other", cache)
    with refusal(PriorConnectionError, "alice/other"):
        random_prior().push_to_hub("alice/other")


@pytest.mark.parametrize("kind", ["object", "folder", "pull request", "branch", "subfolder", "command"])
def test_private_onto_a_public_repository_is_refused_before_anything_is_uploaded(repo, tmp_path, hub, kind, capsys):
    secret = random_prior(seed=7)
    secret.save_pretrained(tmp_path)
    options = {"pull request": {"create_pr": True}, "branch": {"revision": "new"}, "subfolder": {"subfolder": "x"}}.get(
        kind, {}
    )
    before = alice.list_repo_refs(repo, include_pull_requests=True)
    hub.clear_log()
    if kind == "command":
        assert main(["push", str(tmp_path), repo, "--private", "--no-pictures"]) == 1
        assert f"{repo} exists already and is public: nothing was pushed" in capsys.readouterr().err
    else:
        with refusal(PriorHubError, repo, "public", "nothing was pushed", "update_repo_settings"):
            push_prior_to_hub(tmp_path if kind == "folder" else secret, repo, private=True, **options)
    assert {r["method"] for r in hub.requests() if "/repos/create" not in r["target"]} == {"GET"}
    assert alice.list_repo_refs(repo, include_pull_requests=True) == before
    alice.update_repo_settings(repo, private=True)  # what the message says
    assert secret.push_to_hub(repo, private=True, **options).repo_id == repo
    assert alice.model_info(repo).private


# ---------------------------------------------------------------------------------------------------------- access
@pytest.mark.parametrize("token", [BOB, False], ids=["another user", "nobody"])
def test_a_private_prior_does_not_exist_for_others_and_the_error_mentions_it(cache, token):
    name = random_prior().push_to_hub(fresh_repo_id("secret"), private=True).repo_id
    assert alice.model_info(name).private
    with refusal(PriorNotFoundError, name, "private", "hf auth login"):
        load(name, cache, token=token)
    assert_same(load(name, cache, token=ALICE_READ_ONLY), random_prior())


def test_a_wrong_token_is_a_matter_of_access_for_loading_and_for_pushing(repo, cache):
    with refusal(PriorAccessError, repo, "401", "token"):
        load(repo, cache, token="hf_bogus_token")
    with refusal(PriorAccessError, "401"):
        random_prior().push_to_hub(repo, token="hf_bogus_token")
    assert len(titles(repo)) == 2


def test_a_read_only_token_or_anothers_repository_cannot_be_pushed_to(repo):
    for token in (ALICE_READ_ONLY, BOB):
        with refusal(PriorAccessError, repo, "403"):
            random_prior(seed=1).push_to_hub(repo, token=token)
        with refusal(PriorAccessError, "403"):
            random_prior(seed=1).push_to_hub(fresh_repo_id(), token=token)
    assert len(titles(repo)) == 2


def test_to_push_one_must_be_somebody(repo):
    with pytest.raises((PriorAccessError, PriorNotFoundError), match=r"log in|token"):
        random_prior(seed=1).push_to_hub(repo, token=False)
    assert len(titles(repo)) == 2


def test_token_true_without_a_login_is_said(repo, cache, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with refusal(PriorAccessError, "hf auth login"):
        load(repo, cache, token=True)


@pytest.mark.parametrize("token", [BOB, False], ids=["another user", "nobody"])
def test_a_gated_prior_says_how_to_get_in(repo, cache, token):
    alice.update_repo_settings(repo, gated="auto")
    with refusal(PriorAccessError, repo, "gated", "accept its terms"):
        load(repo, cache, token=token)
    assert_same(load(repo, cache), random_prior())


def test_no_token_is_in_what_is_pushed(tmp_path, cache):
    folder = tmp_path / "prior"
    random_prior().save_pretrained(folder)
    name = push_prior_to_hub(folder, fresh_repo_id(), token=ALICE).repo_id
    for path in FILES:
        assert b"hf_alice" not in Path(hf_hub_download(name, path, cache_dir=cache)).read_bytes()
    assert not any(b"hf_alice" in path.read_bytes() for path in folder.iterdir())


# ---------------------------------------------------------------------------------------------------------- not found
def test_a_missing_repository_and_a_missing_revision_are_told_apart(repo, cache):
    with refusal(PriorNotFoundError, "'alice/never-was'", "does not exist"):
        load("alice/never-was", cache)
    with refusal(PriorNotFoundError, repo, "'v9'", "no such branch, tag or commit"):
        load(repo, cache, revision="v9")
    with refusal(PriorNotFoundError, "no-owner"):
        load("no-owner-at-all", cache)


def test_a_repository_that_is_no_prior_says_which_file_is_missing(cache):
    name = alice.create_repo(fresh_repo_id("model")).repo_id
    commit(name, config_dot_json=b"{}")
    with refusal(PriorNotFoundError, name, "no prior_config.json"):
        load(name, cache)


@pytest.mark.parametrize(
    "name", ["a b/c", "-x/y", "a/b/c", "org/", "/abs/olute", "./here", "~/home", "a--b/c", "a/..b", "x\0y"]
)
def test_a_name_that_is_neither_folder_nor_repository_is_refused_without_a_request(hub, cache, name):
    hub.clear_log()
    with refusal(PriorNotFoundError, "organisation/name"):
        load(name, cache)
    assert not hub.requests()


@pytest.mark.parametrize("name", ["a b/c", "a/b/c", "-x/y", "x--y"])
def test_a_name_no_repository_can_have_is_not_pushed_to(name):
    with refusal(PriorNotFoundError, "organisation/name"):
        random_prior().push_to_hub(name)


def test_a_weight_file_missing_from_the_repository_is_said(repo, cache):
    alice.delete_file("prior.safetensors", repo)
    with refusal(PriorNotFoundError, repo, "weight file"):
        load(repo, cache)


# ---------------------------------------------------------------------------------------------------------- damaged transfers
def test_a_flipped_byte_in_transfer_is_found_and_healed_by_one_more_download(hub, repo, cache, lfs_only):
    fault = hub.add_fault("corrupt", method="GET", path="^/lfs/")
    hub.clear_log()
    assert_same(load(repo, cache), random_prior())
    assert fault["hits"] == 1
    assert len(hub.requests("^/lfs/", method="GET")) == 2


@pytest.mark.parametrize("name", ["prior.safetensors", "prior_config.json"])
def test_a_cached_file_that_went_bad_is_found_and_healed(hub, repo, cache, name):
    load(repo, cache)
    path = next(cache.rglob(name))
    good = path.read_bytes()
    bad = bytearray(good)
    bad[3] ^= 0xFF  # not UTF-8 in the configuration
    path.resolve().write_bytes(bad)
    with refusal(PriorFormatError, name):
        load(repo, cache, local_files_only=True)
    assert_same(load(repo, cache), random_prior())
    assert next(cache.rglob(name)).read_bytes() == good
    assert_same(load(repo, cache, local_files_only=True), random_prior())


def test_only_the_damaged_one_of_many_files_is_fetched_again(hub, cache):
    name = random_prior().push_to_hub(fresh_repo_id(), **SHARDS).repo_id
    load(name, cache)
    untouched = {path: path.stat().st_ino for path in cache.rglob("prior-0000[2-9]*")}
    assert untouched
    next(cache.rglob("prior-00001-*")).resolve().write_bytes(b"truncated")
    assert_same(load(name, cache), random_prior())
    assert {path: path.stat().st_ino for path in untouched} == untouched


def test_a_damaged_cache_without_a_connection_is_called_damaged(hub, repo, cache):
    load(repo, cache)
    next(cache.rglob("prior.safetensors")).resolve().write_bytes(b"truncated")
    hub.add_fault("close", times=-1)
    with refusal(PriorFormatError, "prior.safetensors", "sha256"):
        load(repo, cache)


def test_a_file_that_is_wrong_on_the_hub_itself_is_refused_after_one_more_try(hub, repo, cache):
    weights = Path(hf_hub_download(repo, "prior.safetensors", cache_dir=cache)).read_bytes()
    commit(repo, prior_dot_safetensors=weights[:-1] + bytes([weights[-1] ^ 1]))
    with refusal(PriorFormatError, "prior.safetensors", "sha256", "altered"):
        load(repo, cache)
    hub.clear_log()
    with refusal(PriorFormatError, "sha256"):
        load(repo, cache)
    assert len(hub.requests(r"/resolve/[^/]*/prior\.safetensors", method="HEAD")) == 1


def test_a_configuration_that_is_none_is_refused(repo, cache):
    for content, words in ((b"{", "not valid JSON"), (b'{"format_version": "2.0"}', "Upgrade prior_hub")):
        commit(repo, prior_config_dot_json=content)
        with refusal(PriorFormatError, f"prior_config.json of {repo}", words):
            load(repo, cache)


def test_a_file_name_in_the_configuration_cannot_lead_anywhere_else(hub, repo, cache):
    text = Path(hf_hub_download(repo, "prior_config.json", cache_dir=cache)).read_text()
    commit(repo, prior_config_dot_json=text.replace('"prior.safetensors":', '"../../prior.safetensors":').encode())
    hub.clear_log()
    with refusal(PriorFormatError, "no name for a prior's weights"):
        load(repo, cache)
    assert not hub.requests(r"\.safetensors")


def test_a_download_that_breaks_off_is_repeated_and_in_the_end_an_error_of_the_connection(
    hub, repo, cache, lfs_only, no_waiting
):
    hub.add_fault("truncate", keep_bytes=100, method="GET", path="^/lfs/", times=-1)
    with refusal(PriorConnectionError, repo, "broke off"):
        load(repo, cache)
    hub.clear_faults()
    hub.add_fault("reset", after_bytes=100, method="GET", path="^/lfs/", times=-1)
    with refusal(PriorConnectionError, repo, "connection", "try again"):
        load(repo, cache)
    hub.clear_faults()
    hub.add_fault("reset", after_bytes=100, method="GET", path="^/lfs/", times=2)
    assert_same(load(repo, cache), random_prior())
    hub.add_fault("drop", after_bytes=100, method="GET", path="^/lfs/")
    assert_same(load(repo, cache), random_prior())


def test_weights_that_cannot_be_fetched_are_an_error_of_the_connection(hub, repo, cache, no_waiting):
    """In both transfers: what hf_xet raises is no error of an HTTP library."""
    hub.add_fault("status", status=500, path="^/lfs/|^/xorb/|^/v[12]/", times=-1)
    with refusal(PriorConnectionError, repo):
        load(repo, cache)
    hub.clear_faults()
    assert_same(load(repo, cache), random_prior())


# ---------------------------------------------------------------------------------------------------------- a failing Hub
@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_failing_hub_is_an_error_of_the_connection_and_a_cached_prior_loads_if_it_is_down(
    hub, repo, cache, status, no_waiting
):
    hub.add_fault("status", status=status, path=f"/api/models/{repo}", times=-1)
    with refusal(PriorConnectionError, repo):
        load(repo, cache)
    hub.clear_faults()
    load(repo, cache)
    hub.add_fault("status", status=status, path=f"/api/models/{repo}", times=-1)
    if status == 429:  # the Hub is there and asks for patience
        with refusal(PriorConnectionError, "429"):
            load(repo, cache)
    else:
        assert_same(load(repo, cache), random_prior())


@pytest.mark.parametrize("action", ["close", "reset"])
def test_a_broken_connection_is_an_error_of_the_connection_or_a_cached_prior(hub, repo, cache, action, no_waiting):
    hub.add_fault(action, path=repo, times=-1)
    with refusal(PriorConnectionError, repo):
        load(repo, cache)
    with refusal(PriorConnectionError, repo):
        random_prior(seed=1).push_to_hub(repo)
    hub.clear_faults()
    load(repo, cache)
    hub.add_fault(action, path=repo, times=-1)
    assert_same(load(repo, cache), random_prior())


def test_a_file_that_fails_for_good_is_an_error_of_the_connection(hub, repo, cache, no_waiting):
    fault = hub.add_fault("status", status=503, method="HEAD", path="prior_config.json", times=-1)
    with refusal(PriorConnectionError, repo):
        load(repo, cache)
    assert fault["hits"] > 1
    hub.clear_faults()
    hub.add_fault("status", status=503, method="HEAD", path="prior_config.json", times=2)
    assert_same(load(repo, cache), random_prior())


def test_something_else_that_answers_is_called_that(hub, repo, cache, no_waiting):
    page = "<html>Please log in to the network</html>"
    hub.add_fault("status", status=200, body=page, path=f"/api/models/{repo}", times=-1)
    with refusal(PriorConnectionError, "not the Hub", "proxy"):
        load(repo, cache)


# ---------------------------------------------------------------------------------------------------------- failing pushes
def test_a_commit_whose_answer_is_lost_is_a_success_and_is_made_once(hub, repo, cache):
    fault = hub.add_fault("lost_response", method="POST", path=f"{repo}/commit/")
    prior = random_prior(seed=1)
    result = prior.push_to_hub(repo, **SHARDS)
    assert fault["hits"] == 1
    assert len(titles(repo)) == 3
    assert (result.commit_hash, result.repo_id) == (alice.model_info(repo).sha, repo)
    assert result.commit_url == f"{hub.endpoint}/{repo}/commit/{result.commit_hash}"
    assert_same(load(repo, cache), prior)


def test_a_lost_answer_and_then_silence_says_that_nobody_knows(hub, repo, no_waiting):
    hub.add_fault("lost_response", method="POST", path=f"{repo}/commit/")
    look = f"/api/models/{repo}/revision/"
    hub.add_fault("close", method="GET", path=look, skip=1, times=-1)  # the first one precedes the commit
    with refusal(PriorConnectionError, "could not be found out", "look at"):
        random_prior(seed=1).push_to_hub(repo)
    hub.clear_faults()
    assert len(titles(repo)) == 3


def test_a_pull_request_whose_answer_is_lost_is_found_and_opened_once(hub, repo, cache):
    hub.add_fault("lost_response", method="POST", path=f"{repo}/commit/")
    result = random_prior(seed=1).push_to_hub(repo, create_pr=True)
    (ref,) = alice.list_repo_refs(repo, include_pull_requests=True).pull_requests
    assert (ref.ref, ref.target_commit) == ("refs/pr/1", result.commit_hash)
    assert result.pull_request_url == f"{hub.endpoint}/{repo}/discussions/1"
    assert_same(load(repo, cache, revision="refs/pr/1"), random_prior(seed=1))


@pytest.mark.parametrize("status", [500, 503, 429])
@pytest.mark.usefixtures("real_waits")
def test_a_commit_that_fails_is_tried_again_and_made_once(hub, repo, cache, status, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(client.time, "sleep", waits.append)
    fault = hub.add_fault("status", status=status, method="POST", path=f"{repo}/commit/", times=2)
    random_prior(seed=1).push_to_hub(repo)
    assert fault["hits"] == 2
    assert len(titles(repo)) == 3
    assert [w for w in waits if w >= 1] == [1, 2]
    assert_same(load(repo, cache), random_prior(seed=1))


def test_a_commit_that_goes_on_failing_lands_nothing_and_says_so(hub, repo, no_waiting):
    hub.add_fault("status", status=503, method="POST", path=f"{repo}/commit/", times=-1)
    with refusal(PriorConnectionError, repo, "503", "Nothing of this push landed after 3 tries"):
        random_prior(seed=1).push_to_hub(repo)
    assert len(titles(repo)) == 2


def test_a_commit_the_hub_does_not_accept_is_not_tried_again(hub, repo):
    fault = hub.add_fault("status", status=400, method="POST", path=f"{repo}/commit/", body={"error": "too many files"})
    with refusal(PriorHubError, repo, "400", "too many files"):
        random_prior(seed=1).push_to_hub(repo)
    assert fault["hits"] == 1
    assert len(titles(repo)) == 2


@pytest.mark.parametrize("action", ["status", "close"])
@pytest.mark.parametrize("path", ["/api/repos/create", "/api/validate-yaml", "/preupload/", "/refs"])
def test_a_push_that_fails_before_the_commit_lands_nothing(hub, repo, action, path, no_waiting):
    hub.add_fault(action, status=503, path=path, times=-1)
    with refusal(PriorConnectionError):
        random_prior(seed=1).push_to_hub(repo, tag="v1")
    hub.clear_faults()
    assert len(titles(repo)) == 2
    assert alice.list_repo_refs(repo).tags == []
    random_prior(seed=1).push_to_hub(repo, tag="v1")


def test_a_push_between_looking_and_committing_is_a_conflict_and_nothing_of_ours_lands(hub, repo, cache, monkeypatch):
    real, theirs = HfApi.create_commit, []

    def commit_after_somebody_else(self: HfApi, *args: Any, **options: Any) -> Any:
        if not theirs:
            theirs.append(0)  # their own commit passes here too
            theirs[0] = commit(repo, "theirs", notes_dot_txt=b"theirs")
        return real(self, *args, **options)

    monkeypatch.setattr(HfApi, "create_commit", commit_after_somebody_else)
    with refusal(PriorHubError, "somebody else pushed", repo, "Nothing of this push landed", "push again"):
        random_prior(seed=1).push_to_hub(repo, tag="v1")
    assert titles(repo)[0] == "theirs"
    assert alice.model_info(repo).sha == theirs[0]
    assert alice.list_repo_refs(repo).tags == []
    assert_same(load(repo, cache), random_prior())
    random_prior(seed=1).push_to_hub(repo)
    assert "notes.txt" in files(repo)


def test_two_pushes_of_the_same_prior_at_once_both_succeed(repo, monkeypatch):
    prior, real, first = random_prior(seed=1), HfApi.create_commit, []

    def commit_after_the_twin(self: HfApi, *args: Any, **options: Any) -> Any:
        if not first:
            first.append(None)
            first[0] = prior.push_to_hub(repo)
        return real(self, *args, **options)

    monkeypatch.setattr(HfApi, "create_commit", commit_after_the_twin)
    assert prior.push_to_hub(repo).commit_hash == first[0].commit_hash
    assert len(titles(repo)) == 3


def test_a_licence_the_hub_does_not_know_is_refused_with_the_hubs_own_words(repo):
    with refusal(PriorFormatError, "refuses the model card", "nothing was pushed", '"license" must be one of'):
        random_prior(seed=1, license="mine-1.0").push_to_hub(repo)
    assert len(titles(repo)) == 2


def test_a_card_on_the_hub_that_is_not_text_is_not_overwritten(repo):
    commit(repo, b__README_dot_md="# Überblick".encode("latin-1"))
    with refusal(PriorFormatError, "README.md is not UTF-8"):
        random_prior(seed=1).push_to_hub(repo, subfolder="b")
    assert len(titles(repo)) == 3


# ---------------------------------------------------------------------------------------------------------- configuration only
def test_the_configuration_can_be_read_without_the_weights(hub, repo, cache):
    hub.clear_log()
    config, at = download_config(repo, cache_dir=cache)
    assert (config.rank, at) == (3, alice.model_info(repo).sha)
    assert not hub.requests(r"prior\.safetensors")
    assert differences(load(repo, cache), random_prior()) == []
