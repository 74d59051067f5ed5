"""The loopback Hub, driven by the unmodified client: what other tests may rely on, and what the client does not do.

The same claims hold for the full fakehub in Xet mode (see hub_fixtures.py), unless a test says that it is about LFS.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hub_fixtures import ALICE_READ_ONLY, BOB, HubServer, fresh_repo_id, safetensors_bytes
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_session,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from loopback_hub import LoopbackHub

pytestmark = [
    pytest.mark.hub,
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # huggingface_hub's own LFS upload
]

alice, alice_reads, bob, anonymous = HfApi(), HfApi(token=ALICE_READ_ONLY), HfApi(token=BOB), HfApi(token=False)
# what a broken connection raises: the client does not wrap it (httpx2 from 2.x on, httpx before)
BrokenConnection = importlib.import_module(type(get_session()).__module__.split(".")[0]).TransportError
README = b"""---
library_name: prior-hub
license: apache-2.0
base_model: org/resnet-50
datasets: [cifar10]
tags: [bayesian]
---
# A prior
"""


@pytest.fixture
def lfs_only(hub):
    if hub.xet:
        pytest.skip("about LFS transfers: in Xet mode weights come from the CAS, whose client has rules of its own")


@pytest.fixture
def cache(tmp_path) -> Path:
    """A cache folder that has seen nothing yet."""
    return tmp_path / "cache"


def new_repo(hint: str = "repo", owner: str = "alice", **options) -> str:
    return alice.create_repo(fresh_repo_id(hint, owner), **options).repo_id


def push(repo: str, api: HfApi = alice, message: str = "push", options: dict | None = None, **files: bytes):
    """One commit; names are spelled README_md for README.md."""
    operations = [CommitOperationAdd(name.replace("_", "."), content) for name, content in files.items()]
    return api.create_commit(repo, operations, commit_message=message, **(options or {}))


def titles(repo: str, revision: str | None = None) -> list[str]:
    return [commit.title for commit in alice.list_repo_commits(repo, revision=revision)]


def get(url: str, token: str | None = "hf_alice_write", **headers: str):
    """A plain request that follows redirects as the client does."""
    if token:
        headers["Authorization"] = f"Bearer {token}"
    return get_session().get(url, headers=headers, follow_redirects=True)


# ---------------------------------------------------------------------- accounts and repositories
def test_a_token_leads_to_its_user_role_and_organisations():
    account = alice_reads.whoami()
    assert (account["name"], account["auth"]["accessToken"]["role"]) == ("alice", "read")
    assert "prior-hub" in [organisation["name"] for organisation in account["orgs"]]
    assert bob.whoami()["name"] == "bob"


def test_a_repository_is_created_once_and_exist_ok_accepts_it(hub):
    repo = fresh_repo_id()
    url = alice.create_repo(repo)
    assert (url.repo_id, str(url)) == (repo, f"{hub.endpoint}/{repo}")
    assert alice.create_repo(repo, exist_ok=True).repo_id == repo
    with pytest.raises(HfHubHTTPError) as caught:
        alice.create_repo(repo)
    assert caught.value.response.status_code == 409
    assert alice.list_repo_files(repo) == [".gitattributes"]


def test_members_create_in_an_organisation_and_others_get_403():
    assert alice.model_info(new_repo(owner="prior-hub")).author == "prior-hub"
    for owner in ("prior-hub", "alice"):
        with pytest.raises(HfHubHTTPError) as caught:
            bob.create_repo(fresh_repo_id(owner=owner))
        assert caught.value.response.status_code == 403


def test_a_deleted_repository_is_gone(cache):
    repo = new_repo()
    with pytest.raises(HfHubHTTPError) as caught:
        bob.delete_repo(repo)
    assert caught.value.response.status_code == 403
    alice.delete_repo(repo)
    assert not alice.repo_exists(repo)
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download(repo, "config.json", cache_dir=cache)
    alice.delete_repo(repo, missing_ok=True)


# ---------------------------------------------------------------------- push
def test_a_push_of_card_and_weights_is_one_commit_and_comes_back_unchanged(hub, cache):
    repo, weights = new_repo(), safetensors_bytes(5000)
    first = alice.model_info(repo).sha
    options = {"parent_commit": first}
    commit = push(repo, README_md=README, config_json=b"{}", prior_safetensors=weights, options=options)
    assert titles(repo) == ["push", "initial commit"]
    assert commit.oid == alice.model_info(repo).sha
    assert commit.commit_url == f"{hub.endpoint}/{repo}/commit/{commit.oid}"
    folder = Path(snapshot_download(repo, cache_dir=cache))
    assert folder.name == commit.oid
    assert (folder / "README.md").read_bytes() == README
    assert (folder / "prior.safetensors").read_bytes() == weights


def test_weights_are_lfs_files_and_text_is_not():
    repo, weights = new_repo(), safetensors_bytes(100)
    push(repo, README_md=README, prior_safetensors=weights)
    files = {file.rfilename: file for file in alice.model_info(repo, files_metadata=True).siblings}
    assert files["prior.safetensors"].lfs.sha256 == hashlib.sha256(weights).hexdigest()
    assert files["prior.safetensors"].size == len(weights)
    assert files["README.md"].lfs is None
    blob = b"blob %d\0" % len(README) + README
    assert files["README.md"].blob_id == hashlib.sha1(blob).hexdigest()


def test_a_push_of_unchanged_files_makes_no_commit(tmp_path):
    repo = new_repo()
    folder = tmp_path / "prior"
    folder.mkdir()
    (folder / "README.md").write_bytes(README)
    (folder / "prior.safetensors").write_bytes(safetensors_bytes(100))
    first = alice.upload_folder(repo_id=repo, folder_path=folder, commit_message="push")
    again = alice.upload_folder(repo_id=repo, folder_path=folder, commit_message="again")
    assert again.oid == first.oid
    assert titles(repo) == ["push", "initial commit"]
    (folder / "README.md").write_bytes(README + b"more\n")
    assert alice.upload_folder(repo_id=repo, folder_path=folder, commit_message="third").oid != first.oid


def test_weights_take_the_transfer_of_this_run(hub):
    repo = new_repo()
    hub.clear_log()
    push(repo, prior_safetensors=safetensors_bytes(50))
    used = {name: bool(hub.requests(path)) for name, path in (("xet", "/xet-write-token/"), ("lfs", "/objects/batch$"))}
    assert used == {"xet": hub.xet, "lfs": not hub.xet}


def test_known_weights_are_not_sent_twice(hub, lfs_only):
    repo, weights = new_repo(), safetensors_bytes(100)
    push(repo, prior_safetensors=weights)
    hub.clear_log()
    push(repo, copy_safetensors=weights)
    assert alice.file_exists(repo, "copy.safetensors")
    assert hub.requests("/objects/batch$", method="POST")
    assert not hub.requests("^/upload/")


def test_a_commit_on_an_old_parent_is_a_412():
    repo = new_repo()
    old = alice.model_info(repo).sha
    push(repo, a_txt=b"1", options={"parent_commit": old})
    with pytest.raises(HfHubHTTPError) as caught:
        push(repo, a_txt=b"2", options={"parent_commit": old})
    assert caught.value.response.status_code == 412
    push(repo, a_txt=b"2", options={"parent_commit": alice.model_info(repo).sha})
    assert len(titles(repo)) == 3


def test_a_commit_whose_answer_is_lost_has_landed(hub):
    repo = new_repo()
    fault = hub.add_fault("lost_response", method="POST", path=f"{repo}/commit/main")
    with pytest.raises(BrokenConnection):
        push(repo, a_txt=b"1")
    assert fault["hits"] == 1
    assert titles(repo) == ["push", "initial commit"]


def test_concurrent_pushes_lose_nothing():
    repo = new_repo()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: push(repo, HfApi(), **{f"{i}_txt": b"x"}), range(8)))
    assert len(alice.list_repo_files(repo)) == 9
    assert len(titles(repo)) == 9


def test_files_and_folders_are_deleted_and_deleting_nothing_is_entry_not_found():
    repo = new_repo()
    push(repo, **{"a/b_txt": b"x", "a/c_txt": b"x", "d_txt": b"x"})
    alice.create_commit(repo, [CommitOperationDelete("a/"), CommitOperationDelete("d.txt")], commit_message="y")
    assert alice.list_repo_files(repo) == [".gitattributes"]
    with pytest.raises(EntryNotFoundError):
        alice.delete_file("d.txt", repo)
    with pytest.raises(EntryNotFoundError):
        alice.delete_folder("a", repo)


def test_a_file_cannot_be_a_folder_too():
    repo = new_repo()
    push(repo, a_txt=b"1")
    with pytest.raises(HfHubHTTPError) as caught:
        alice.upload_file(repo_id=repo, path_or_fileobj=b"2", path_in_repo="a.txt/b.txt")
    assert caught.value.response.status_code == 422


@pytest.mark.parametrize(
    ("key", "value", "status"),
    [
        ("file", {"path": "../x", "content": "eA==", "encoding": "base64"}, 422),
        ("lfsFile", {"path": "x", "oid": "0" * 64, "algo": "sha256"}, 400),
    ],
    ids=["path outside", "weights never sent"],
)
def test_a_commit_the_hub_cannot_store_is_refused(hub, key, value, status):
    repo = new_repo()
    lines = [{"key": "header", "value": {"summary": "s"}}, {"key": key, "value": value}]
    body = "\n".join(json.dumps(line) for line in lines).encode()
    headers = {"Authorization": "Bearer hf_alice_write", "Content-Type": "application/x-ndjson"}
    request = urllib.request.Request(f"{hub.endpoint}/api/models/{repo}/commit/main", body, headers)
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request)
    caught.value.close()
    assert caught.value.status == status
    assert titles(repo) == ["initial commit"]


@pytest.mark.parametrize("card", [b"---\nlicense: mine\n---\n", b"---\ntags: nope\n---\n", b"---\na: [\n---\n"])
def test_a_card_with_invalid_metadata_is_refused_before_anything_is_sent(card):
    repo = new_repo()
    with pytest.raises(ValueError, match="Invalid metadata"):
        push(repo, README_md=card)
    assert titles(repo) == ["initial commit"]


# ---------------------------------------------------------------------- revisions and pull requests
def test_branch_tag_and_commit_lead_to_their_own_content(cache):
    repo = new_repo()
    first = push(repo, config_json=b"1").oid
    alice.create_tag(repo, tag="v1.0", tag_message="one")
    alice.create_branch(repo, branch="exp/one")
    push(repo, config_json=b"2", options={"revision": "exp/one"})
    push(repo, config_json=b"3")

    def content(revision: str | None) -> bytes:
        return Path(hf_hub_download(repo, "config.json", revision=revision, cache_dir=cache)).read_bytes()

    assert [content(r) for r in (first, "v1.0", "exp/one", "main", None)] == [b"1", b"1", b"2", b"3", b"3"]
    assert alice.model_info(repo, revision=first[:8]).sha == first
    refs = alice.list_repo_refs(repo)
    assert {branch.name for branch in refs.branches} == {"main", "exp/one"}
    assert [(tag.name, tag.ref, tag.target_commit) for tag in refs.tags] == [("v1.0", "refs/tags/v1.0", first)]
    assert titles(repo, "exp/one") == ["push", "push", "initial commit"]


def test_branches_and_tags_are_made_once_and_deleted_once():
    repo = new_repo()
    for create, delete, name in (
        (alice.create_branch, alice.delete_branch, "branch"),
        (alice.create_tag, alice.delete_tag, "tag"),
    ):
        create(repo, **{name: "x"})
        create(repo, **{name: "x"}, exist_ok=True)
        with pytest.raises(HfHubHTTPError) as caught:
            create(repo, **{name: "x"})
        assert caught.value.response.status_code == 409
        with pytest.raises(HfHubHTTPError) as caught:
            create(repo, **{name: "no..good"})
        assert caught.value.response.status_code == 400
        delete(repo, **{name: "x"})
        with pytest.raises(RevisionNotFoundError):
            delete(repo, **{name: "x"})
    with pytest.raises(HfHubHTTPError) as caught:
        alice.delete_branch(repo, branch="main")
    assert caught.value.response.status_code == 403


def test_commits_go_to_branches_only():
    repo = new_repo()
    alice.create_tag(repo, tag="v1")
    for revision in ("v1", "nope", alice.model_info(repo).sha):
        with pytest.raises(RevisionNotFoundError):
            push(repo, a_txt=b"1", options={"revision": revision})


def test_a_stranger_pushes_as_a_pull_request_only(hub, cache):
    repo = new_repo()
    with pytest.raises(HfHubHTTPError) as caught:
        push(repo, bob, a_txt=b"1")
    assert caught.value.response.status_code == 403
    weights = safetensors_bytes(50)
    commit = push(repo, bob, "from bob", README_md=README, p_safetensors=weights, options={"create_pr": True})
    assert (commit.pr_num, commit.pr_revision) == (1, "refs/pr/1")
    assert commit.pr_url == f"{hub.endpoint}/{repo}/discussions/1"
    assert alice.list_repo_files(repo) == [".gitattributes"]
    assert Path(hf_hub_download(repo, "README.md", revision="refs/pr/1", cache_dir=cache)).read_bytes() == README
    details = alice.get_discussion_details(repo, 1)
    assert (details.title, details.author, details.status, details.is_pull_request) == ("from bob", "bob", "open", True)
    refs = alice.list_repo_refs(repo, include_pull_requests=True)
    assert [request.target_commit for request in refs.pull_requests] == [commit.oid]
    push(repo, alice, "more", a_txt=b"1", options={"revision": "refs/pr/1"})
    assert titles(repo, "refs/pr/1") == ["more", "from bob", "initial commit"]


# ---------------------------------------------------------------------- who may read
def test_a_private_repository_does_not_exist_for_others(cache):
    repo = new_repo("secret", owner="prior-hub", private=True)
    push(repo, config_json=b"{}", p_safetensors=safetensors_bytes(50))
    for api, token, status in ((anonymous, False, 401), (bob, BOB, 404)):
        with pytest.raises(RepositoryNotFoundError) as caught:
            api.model_info(repo)
        assert caught.value.response.status_code == status
        with pytest.raises(RepositoryNotFoundError) as caught:
            hf_hub_download(repo, "config.json", token=token, cache_dir=cache)
        assert caught.value.response.status_code == status
        with pytest.raises(RepositoryNotFoundError):
            api.auth_check(repo)
        assert repo not in [model.id for model in api.list_models(author="prior-hub")]
    assert repo in [model.id for model in alice_reads.list_models(author="prior-hub")]
    for name in ("config.json", "p.safetensors"):
        hf_hub_download(repo, name, token=ALICE_READ_ONLY, cache_dir=cache)
    alice.update_repo_settings(repo, visibility="public")
    assert anonymous.model_info(repo).private is False


def test_a_missing_repository_is_401_to_strangers_and_404_to_users():
    for repo in (fresh_repo_id(), "no-owner"):
        for api, status in ((anonymous, 401), (alice, 404)):
            with pytest.raises(RepositoryNotFoundError) as caught:
                api.model_info(repo)
            assert caught.value.response.status_code == status


def test_a_bad_token_is_refused_everywhere_and_not_taken_for_a_missing_repository(cache):
    repo, nobody = new_repo(), HfApi(token="hf_bogus")
    push(repo, config_json=b"{}")
    for call in (
        nobody.whoami,
        lambda: nobody.model_info(repo),
        lambda: hf_hub_download(repo, "config.json", token="hf_bogus", cache_dir=cache),
    ):
        with pytest.raises(HfHubHTTPError) as caught:
            call()
        assert caught.value.response.status_code == 401
        assert not isinstance(caught.value, RepositoryNotFoundError)
    with pytest.raises(HfHubHTTPError, match="Invalid credentials in Authorization header"):
        nobody.model_info(repo)


def test_a_read_token_reads_and_cannot_write():
    repo = new_repo()
    assert alice_reads.model_info(repo).id == repo
    for call in (
        lambda: push(repo, alice_reads, a_txt=b"1"),
        lambda: alice_reads.create_tag(repo, tag="v1"),
        lambda: alice_reads.create_repo(fresh_repo_id()),
        lambda: alice_reads.delete_repo(repo),
        lambda: alice_reads.auth_check(repo, write=True),
    ):
        with pytest.raises(HfHubHTTPError) as caught:
            call()
        assert caught.value.response.status_code == 403
    alice.auth_check(repo, write=True)


def test_a_gated_repository_shows_its_info_and_keeps_its_files(cache):
    repo = new_repo()
    push(repo, config_json=b"{}")
    alice.update_repo_settings(repo, gated="auto")
    assert bob.model_info(repo).gated == "auto"
    for token, status in ((False, 401), (BOB, 403)):
        with pytest.raises(GatedRepoError) as caught:
            hf_hub_download(repo, "config.json", token=token, cache_dir=cache)
        assert caught.value.response.status_code == status
    with pytest.raises(GatedRepoError):
        bob.auth_check(repo)
    hf_hub_download(repo, "config.json", cache_dir=cache)


# ---------------------------------------------------------------------- look up
def test_the_card_becomes_tags_library_and_card_data():
    repo = new_repo()
    push(repo, README_md=README, prior_safetensors=safetensors_bytes(50))
    info = alice.model_info(repo)
    assert info.library_name == "prior-hub"
    assert info.card_data.to_dict()["base_model"] == "org/resnet-50"
    derived = {"license:apache-2.0", "dataset:cifar10", "base_model:org/resnet-50"}
    assert derived | {"prior-hub", "bayesian", "safetensors"} <= set(info.tags)
    expanded = alice.model_info(repo, expand=["cardData", "tags"])
    assert (expanded.sha, expanded.siblings, expanded.card_data.license) == (None, None, "apache-2.0")


def test_models_are_found_by_tag_name_and_author_newest_first():
    word = fresh_repo_id("word").split("-")[-1]
    repos = []
    for owner in ("alice", "prior-hub", "alice"):
        repos.append(new_repo(f"resnet-{word}", owner))
        time.sleep(0.005)  # creation times have milliseconds
    for repo in repos[:2]:
        push(repo, README_md=README)

    def found(**options) -> list[str]:
        return [model.id for model in alice.list_models(**options)]

    assert found(search=word.upper()) == repos[::-1]
    assert found(search=word, author="prior-hub") == [repos[1]]
    assert found(search=word, filter="prior-hub") == [repos[1], repos[0]]
    assert found(search=word, filter=["prior-hub", "base_model:org/resnet-50"], limit=1) == [repos[1]]
    assert found(search=word, sort="created_at", limit=2) == [repos[2], repos[1]]
    assert found(search=word, filter="nothing-has-this") == []
    full = next(iter(alice.list_models(search=word, filter="prior-hub", full=True, cardData=True)))
    assert (full.author, full.card_data.license, len(full.siblings)) == ("prior-hub", "apache-2.0", 2)


def test_listings_are_paged_through_the_link_header(hub, monkeypatch):
    word = fresh_repo_id("word").split("-")[-1]
    repos = [new_repo(word) for _ in range(5)]
    push(repos[0], **{f"{i}_txt": b"x" for i in range(5)})
    monkeypatch.setattr(hub, "page_size", 2)
    hub.clear_log()
    assert sorted(model.id for model in alice.list_models(search=word)) == sorted(repos)
    assert len(hub.requests(r"^/api/models\?")) == 3
    assert len(list(alice.list_models(search=word, limit=3))) == 3
    assert len(alice.list_repo_files(repos[0])) == 6


def test_tree_and_paths_info_show_files_and_folders():
    repo, weights = new_repo(), safetensors_bytes(50)
    files = {"top.txt": b"1", "a/b.txt": b"22", "a/deep/p.safetensors": weights}
    alice.create_commit(repo, [CommitOperationAdd(*file) for file in files.items()], commit_message="x")
    everything = {item.path: item for item in alice.list_repo_tree(repo, recursive=True)}
    assert set(everything) == {".gitattributes", "a", "a/deep", *files}
    assert {item.path for item in alice.list_repo_tree(repo, "a")} == {"a/b.txt", "a/deep"}
    assert {item.path for item in alice.list_repo_tree(repo, "a/deep")} == {"a/deep/p.safetensors"}
    file, folder = alice.get_paths_info(repo, ["a/deep/p.safetensors", "a", "missing"])
    assert (file.size, file.lfs.sha256) == (len(weights), hashlib.sha256(weights).hexdigest())
    assert folder.tree_id == everything["a"].tree_id
    with pytest.raises(EntryNotFoundError):
        list(alice.list_repo_tree(repo, "missing"))


# ---------------------------------------------------------------------- download
def test_missing_revisions_and_files_have_their_own_exceptions(cache):
    repo = new_repo()
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(repo, ".gitattributes", revision="nope", cache_dir=cache)
    with pytest.raises(RevisionNotFoundError):
        alice.model_info(repo, revision="nope")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(repo, "nope.json", cache_dir=cache)
    remembered = try_to_load_from_cache(repo, "nope.json", cache_dir=cache)
    assert remembered is not None  # "known to be missing", which needs X-Repo-Commit on the 404
    assert not isinstance(remembered, str)
    assert not alice.file_exists(repo, "nope.json")


def test_small_files_come_from_the_hub_and_weights_from_another_host_without_the_token(hub, cache, lfs_only):
    repo = new_repo()
    push(repo, config_json=b"{}", p_safetensors=safetensors_bytes(50))
    hub.clear_log()
    for name in ("config.json", "p.safetensors"):
        hf_hub_download(repo, name, cache_dir=cache)
    heads = [(entry["role"], entry["status"]) for entry in hub.requests(method="HEAD")]
    assert heads == [("hub", 307), ("hub", 200), ("hub", 302)]
    (weights,) = hub.requests(role="cdn")
    assert (weights["method"], weights["status"], weights["auth"]) == ("GET", 200, False)
    assert hub.cdn_endpoint.split(":")[1] != hub.endpoint.split(":")[1]


def test_ranges_are_served_and_impossible_ones_are_416(hub):
    repo, weights = new_repo(), safetensors_bytes(50)
    push(repo, config_json=b"0123456789", p_safetensors=weights)
    for name, content in (("config.json", b"0123456789"), ("p.safetensors", weights)):
        url = f"{hub.endpoint}/{repo}/resolve/main/{name}"
        part = get(url, Range="bytes=2-4")
        assert (part.status_code, part.content) == (206, content[2:5])
        assert part.headers["content-range"] == f"bytes 2-4/{len(content)}"
        assert get(url, Range="bytes=7-").content == content[7:]
        assert get(url, Range="bytes=-3").content == content[-3:]
        beyond = get(url, Range=f"bytes={len(content)}-")
        assert (beyond.status_code, beyond.headers["content-range"]) == (416, f"bytes */{len(content)}")


def test_a_broken_lfs_download_goes_on_where_it_stopped(hub, cache, lfs_only):
    repo, weights = new_repo(), safetensors_bytes(3_000_000)
    push(repo, p_safetensors=weights)
    hub.clear_log()
    hub.add_fault("drop", after_bytes=11_000_000, method="GET", role="cdn")
    assert Path(hf_hub_download(repo, "p.safetensors", cache_dir=cache)).read_bytes() == weights
    gets = [(entry["range"], entry["status"]) for entry in hub.requests(method="GET", role="cdn")]
    assert gets == [(None, 200), ("bytes=10485760-", 206)]  # the client keeps whole pieces of 10 MiB


def test_a_server_that_ignores_the_range_is_coped_with(hub, cache, lfs_only):
    repo, weights = new_repo(), safetensors_bytes(3_000_000)
    push(repo, p_safetensors=weights)
    hub.add_fault("drop", after_bytes=11_000_000, method="GET", role="cdn")
    ignored = hub.add_fault("ignore_range", method="GET", role="cdn")
    assert Path(hf_hub_download(repo, "p.safetensors", cache_dir=cache)).read_bytes() == weights
    assert ignored["hits"] == 1


def test_a_body_of_another_size_is_refused_by_the_client(hub, cache, lfs_only):
    repo = new_repo()
    push(repo, p_safetensors=safetensors_bytes(1000))
    hub.add_fault("truncate", keep_bytes=1000, method="GET", role="cdn")
    with pytest.raises(OSError, match="Consistency check failed"):
        hf_hub_download(repo, "p.safetensors", cache_dir=cache)


@pytest.mark.parametrize("name", ["config.json", "p.safetensors"])
def test_a_flipped_byte_is_accepted_by_the_client(hub, cache, name, request):
    if name.endswith("safetensors"):
        request.getfixturevalue("lfs_only")
    content = {"config.json": b'{"rank": 20}', "p.safetensors": safetensors_bytes(1000)}
    repo = new_repo()
    push(repo, config_json=content["config.json"], p_safetensors=content["p.safetensors"])
    fault = hub.add_fault("corrupt", offset=9, method="GET", path="/resolve-cache/|^/lfs/")
    received = Path(hf_hub_download(repo, name, cache_dir=cache)).read_bytes()
    assert fault["hits"] == 1
    assert [i for i, pair in enumerate(zip(received, content[name], strict=True)) if pair[0] != pair[1]] == [9]


def test_cached_files_need_no_server(hub, cache):
    repo = new_repo()
    push(repo, config_json=b"{}", p_safetensors=safetensors_bytes(50))
    folder = Path(snapshot_download(repo, cache_dir=cache))
    program = (
        "import sys; from huggingface_hub import hf_hub_download as get, snapshot_download as snapshot\n"
        "from huggingface_hub.errors import LocalEntryNotFoundError\n"
        "repo, cache = sys.argv[1:]\n"
        "print(get(repo, 'config.json', cache_dir=cache)); print(snapshot(repo, cache_dir=cache))\n"
        "try: get(repo, 'other.json', cache_dir=cache)\n"
        "except LocalEntryNotFoundError: print('not here')\n"
    )
    hub.clear_log()
    command, environment = [sys.executable, "-c", program, repo, str(cache)], {**os.environ, "HF_HUB_OFFLINE": "1"}
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert output.splitlines() == [str(folder / "config.json"), str(folder), "not here"]
    weights = hf_hub_download(repo, "p.safetensors", cache_dir=cache, local_files_only=True)
    assert Path(weights) == folder / "p.safetensors"
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download(repo, "other.json", cache_dir=cache, local_files_only=True)
    assert not hub.requests(repo)


# ---------------------------------------------------------------------- faults and the log
def test_busy_answers_are_retried_for_files_and_raised_for_calls(hub, cache):
    repo = new_repo()
    push(repo, config_json=b"{}")
    limit = hub.add_fault("status", status=429, headers={"Retry-After": "1"}, method="HEAD", path=repo, times=2)
    start = time.monotonic()
    hf_hub_download(repo, "config.json", cache_dir=cache)
    assert limit["hits"] == 2  # the first try is repeated at once, the second after what Retry-After says
    assert time.monotonic() - start >= 1
    for status in (500, 503):
        hub.add_fault("status", status=status, path=f"/api/models/{repo}$")
        with pytest.raises(HfHubHTTPError) as caught:
            alice.model_info(repo)
        assert caught.value.response.status_code == status
    assert alice.model_info(repo).id == repo


@pytest.mark.parametrize("action", ["close", "reset"])
def test_closed_connections_raise_even_when_the_file_is_cached(hub, cache, action):
    repo = new_repo()
    push(repo, config_json=b"{}")
    hf_hub_download(repo, "config.json", cache_dir=cache)
    fault = hub.add_fault(action, method="HEAD", path=repo, times=-1)
    with pytest.raises(BrokenConnection):
        hf_hub_download(repo, "config.json", cache_dir=cache)
    assert fault["hits"] >= 1
    hub.clear_faults()
    hf_hub_download(repo, "config.json", cache_dir=cache)


def test_a_slow_or_broken_hub_is_replaced_by_the_cached_copy(hub, cache):
    repo = new_repo()
    push(repo, config_json=b"{}")
    path = hf_hub_download(repo, "config.json", cache_dir=cache)
    slow = hub.add_fault("delay", seconds=0.6, method="HEAD", path=repo)
    assert hf_hub_download(repo, "config.json", cache_dir=cache, etag_timeout=0.2) == path
    broken = hub.add_fault("status", status=500, method="HEAD", path=repo, times=-1)
    assert hf_hub_download(repo, "config.json", cache_dir=cache) == path
    assert (slow["hits"], broken["hits"]) == (1, 1)


def test_a_fault_counts_its_hits_and_may_skip_requests_or_stop(hub):
    repo = new_repo()
    url = f"{hub.endpoint}/api/models/{repo}"
    second = hub.add_fault("status", status=418, method="GET|HEAD", path=repo, skip=1, times=2)
    assert [get(url).status_code for _ in range(4)] == [200, 418, 418, 200]
    assert second["hits"] == 2
    hub.add_fault("header", path=repo, set={"X-Extra": "1"}, remove=["content-type"])
    changed = get(url).headers
    assert (changed["x-extra"], "content-type" in changed) == ("1", False)
    hub.add_fault("stall", path=repo, after_bytes=5, seconds=0.2)
    assert json.loads(get(url).content)["id"] == repo
    hub.add_fault("status", status=500, path=repo, role="cdn", times=-1)
    assert get(url).status_code == 200
    with pytest.raises(ValueError, match="unknown fault action 'explode'"):
        hub.add_fault("explode")


def test_the_log_tells_who_asked_what_and_how_it_was_answered(hub):
    repo = new_repo()
    hub.clear_log()
    alice_reads.model_info(repo)
    with pytest.raises(RepositoryNotFoundError):
        HfApi(library_name="prior-hub", library_version="1.0", token=False).model_info(f"{repo}x")
    first, second = hub.requests(repo)
    assert (first["method"], first["target"], first["status"]) == ("GET", f"/api/models/{repo}", 200)
    assert (first["user"], first["auth"], first["role"], first["fault"]) == ("alice", True, "hub", None)
    assert (second["status"], second["user"], second["auth"]) == (401, None, False)
    assert second["ua"].startswith("prior-hub/1.0")
    assert hub.requests(repo, method="POST") == []


def test_a_stopped_server_is_gone_and_two_can_run_at_once(tmp_path, hub):
    other: HubServer = LoopbackHub(tmp_path).start()
    endpoint = other.endpoint
    assert endpoint != hub.endpoint
    get_session().get(f"{endpoint}/api/models").raise_for_status()  # leaves a connection open
    other.stop()
    with pytest.raises(BrokenConnection):
        get_session().get(f"{endpoint}/api/models")


# ---------------------------------------------------------------------- collections, last commits
def test_a_path_knows_the_commit_that_last_changed_it():
    repo = new_repo()
    first = push(repo, a_md=b"1").oid
    second = push(repo, b_md=b"1").oid
    third = push(repo, a_md=b"2").oid

    def last(revision: str) -> dict[str, str]:
        items = alice.get_paths_info(repo, ["a.md", "b.md"], revision=revision, expand=True)
        return {item.path: item.last_commit.oid for item in items}

    assert last("main") == {"a.md": third, "b.md": second}
    assert last(second) == {"a.md": first, "b.md": second}
    assert all(item.last_commit is None for item in alice.get_paths_info(repo, ["a.md"]))


def test_a_collection_has_one_owner_title_and_each_item_once(hub):
    if not hasattr(hub, "collections"):
        pytest.skip("this server has no collections")
    title, repo = fresh_repo_id("Title").split("/")[1], new_repo()
    made = alice.create_collection(title)
    assert made.slug.startswith(f"alice/{title.lower()}-")
    assert made.url == f"{hub.endpoint}/collections/{made.slug}"
    assert alice.create_collection(title, exists_ok=True).slug == made.slug
    with pytest.raises(HfHubHTTPError, match="409"):
        alice.create_collection(title)
    alice.add_collection_item(made.slug, repo, "model", note="why")
    with pytest.raises(HfHubHTTPError, match="409"):
        alice.add_collection_item(made.slug, repo, "model")
    (item,) = bob.get_collection(made.slug).items
    assert (item.item_id, item.item_type, item.note) == (repo, "model", "why")
    for attempt in (
        lambda: bob.add_collection_item(made.slug, repo, "model"),
        lambda: alice_reads.create_collection("Another"),
        lambda: alice.add_collection_item(made.slug, "alice/never-was", "model"),
        lambda: bob.get_collection(alice.create_collection(f"{title} secret", private=True).slug),
    ):
        with pytest.raises(HfHubHTTPError, match=r"40[34]"):
            attempt()
