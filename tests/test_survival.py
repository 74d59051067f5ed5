"""Whatever breaks between a prior and the Hub: it is survived, or said; never a half prior. See tests/faults.py."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fault_scenarios import SCENARIOS
from faults import ALLOWED, KINDS, OPERATIONS, PASSING, as_json, as_markdown
from hub_fixtures import fresh_repo_id
from huggingface_hub import HfApi, close_session, get_session, hf_hub_download
from priors_for_tests import assert_same, random_prior

from prior_hub.errors import PriorConnectionError, PriorHubError, PriorStorageError
from prior_hub.model import PriorModel
from prior_hub.registry import client, upload

EXPERIMENT = Path(__file__).with_name("faults.py")
DOCS = Path(__file__).parent.parent / "docs"

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes to kill them")


def run(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """The experiment, in a process that may set the client's time-outs."""
    command = [sys.executable, EXPERIMENT, "--json", tmp_path / "faults.json", "--markdown", tmp_path / "faults.md", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads((tmp_path / "faults.json").read_text())


def not_survived(result: dict[str, Any]) -> list[str]:
    rows = result["faults"] + result["scenarios"]
    return [
        f"{row.get('operation', row.get('scenario'))}, {row.get('label')}: {row['outcome']}: {row['wrong']}"
        for row in rows
        if row["wrong"]
    ]


@pytest.mark.slow
def test_a_sample_of_the_faults_is_survived(tmp_path):
    result = run(tmp_path, "--sample", "30", "--parts", "2", "--no-scenarios")
    assert len(result["faults"]) == 30
    assert {row["outcome"] for row in result["faults"]} <= set(ALLOWED)
    assert all(row["hits"] for row in result["faults"])
    assert not_survived(result) == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_kind_of_fault_in_every_operation_is_survived(tmp_path):
    result = run(tmp_path)
    assert not_survived(result) == []
    check(result)


def test_the_table_in_the_docs_is_of_an_experiment_in_which_everything_was_survived():
    result = json.loads((DOCS / "faults.json").read_text())
    assert not_survived(result) == []
    check(result)


def check(result: dict[str, Any]) -> None:
    """At least 250 faults, of every kind, into every request of every operation, each with an outcome that is allowed."""
    faults = result["faults"]
    assert len(faults) >= 250
    assert all(row["hits"] for row in faults)
    assert {row["outcome"] for row in faults} <= set(ALLOWED)
    assert {row["operation"] for row in faults} == set(OPERATIONS) == set(result["requests"])
    assert {row["kind"] for row in faults} == set(KINDS)
    hit = {(row["operation"], row["number"]) for row in faults}
    assert hit == {(name, number) for name, count in result["requests"].items() for number in range(count)}
    failed = [row for row in faults if row["outcome"] == "clear error" and row["label"] in PASSING]
    twice = [
        r
        for r in failed
        if (r["operation"], r["label"]) == ("push, pull request", "slow answer") and "/commit/" in r["request"]
    ]
    assert failed == twice, "a fault that passes costs a retry, not the operation, unless a second pull request might be opened"
    outcomes = Counter(row["outcome"] for row in faults + result["scenarios"])
    assert min(outcomes[name] for name in ("done", "retried", "resumed", "from the cache", "clear error", "killed")) > 0
    assert [row["scenario"] for row in result["scenarios"]] == list(SCENARIOS)


def test_the_table_in_the_docs_is_written_from_the_experiment_and_names_every_operation_and_kind():
    result = json.loads((DOCS / "faults.json").read_text())
    text = (DOCS / "faults.md").read_text(encoding="utf-8")
    assert text == as_markdown(result)
    assert as_json(result) == (DOCS / "faults.json").read_text()
    for name in (*OPERATIONS, *KINDS, *SCENARIOS):
        assert name in text, name


def test_the_judge_sees_what_is_wrong(tmp_path):
    """What was not survived is in the table: here a result with one such row."""
    result = json.loads((DOCS / "faults.json").read_text())
    result["faults"][0]["wrong"] = ["a mixture"]
    assert "1 were not survived" in as_markdown(result)
    assert not_survived(result) != []


# ------------------------------------------------------------------------------------------------------- one by one, quick
@pytest.fixture
def repo() -> str:
    return random_prior().push_to_hub(fresh_repo_id("survives")).repo_id


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """How long it waited between tries; it does not."""
    found: list[float] = []
    monkeypatch.setattr(client, "time", SimpleNamespace(sleep=found.append))
    return found


@pytest.mark.hub
@pytest.mark.usefixtures("real_waits")
def test_what_the_hub_asks_for_with_retry_after_is_waited_up_to_a_minute(hub, repo, waits, tmp_path):
    for asked, waited in (("7", 7), ("900", 60), ("soon", 1)):
        hub.add_fault("status", status=429, headers={"Retry-After": asked}, path=f"/api/models/{repo}")
        assert_same(PriorModel.from_pretrained(repo, cache_dir=tmp_path / asked), random_prior())
        assert waits.pop() == waited


@pytest.mark.hub
def test_a_silent_hub_ends_a_push_and_the_session_gets_its_own_time_out_back(hub, repo, waits, monkeypatch):
    monkeypatch.setenv("PRIOR_HUB_TIMEOUT", "0.3")
    session = get_session()
    assert session.timeout.read is None
    hub.add_fault("delay", seconds=1.5, path="/repos/create", times=-1)
    start = time.monotonic()
    with pytest.raises(PriorConnectionError, match="Timeout"):
        random_prior(seed=1).push_to_hub(repo)
    assert time.monotonic() - start < 5
    assert get_session().timeout.read is None
    monkeypatch.setattr(session, "timeout", 9.0)
    hub.clear_faults()
    with client.bounded():
        assert session.timeout.read == 9


def test_a_session_of_the_user_keeps_the_time_outs_it_has_and_gets_back_those_it_had_not(monkeypatch):
    session = get_session()
    own = type(session.timeout)(None, connect=5.0)
    monkeypatch.setattr(session, "timeout", own)
    monkeypatch.setenv("PRIOR_HUB_TIMEOUT", "7")

    def fail() -> None:
        with client.bounded(), client.bounded():
            assert (session.timeout.connect, session.timeout.read, session.timeout.write) == (5, 7, 7)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert session.timeout == own


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf"])
def test_a_patience_that_is_no_time_is_refused_and_leaves_the_session_as_it_was(text, monkeypatch):
    monkeypatch.setenv("PRIOR_HUB_TIMEOUT", text)
    with pytest.raises(ValueError, match="PRIOR_HUB_TIMEOUT"):
        random_prior().push_to_hub("alice/x")
    monkeypatch.delenv("PRIOR_HUB_TIMEOUT")
    with client.bounded():
        assert get_session().timeout.read == 120
    assert get_session().timeout.read is None


@pytest.mark.hub
@pytest.mark.parametrize("step", ["list_repo_refs", "preupload_lfs_files"])
def test_a_session_that_the_client_makes_anew_during_a_push_is_bounded_too(hub, repo, waits, monkeypatch, step):
    """The client closes its session when a connection is refused, as while a server starts again."""
    monkeypatch.setenv("PRIOR_HUB_TIMEOUT", "0.8")
    asked = getattr(HfApi, step)

    def close(self, *args, **options):
        found = asked(self, *args, **options)
        close_session()
        return found

    monkeypatch.setattr(HfApi, step, close)
    hub.add_fault("delay", seconds=3, path="/commit/", times=-1)
    with pytest.raises(PriorConnectionError, match="Timeout"):  # without one it waits, and the push lands
        random_prior(seed=1).push_to_hub(repo, tag="v9")
    assert get_session().timeout.read is None


@pytest.mark.hub
@pytest.mark.parametrize("name", ["README.md", "prior_config.json"])
def test_a_bit_that_flips_in_a_small_file_on_the_way_is_noticed_although_it_still_reads(hub, repo, tmp_path, name):
    """A digit of the scale, a letter of a person's text: nothing of it would be seen otherwise."""
    text = Path(hf_hub_download(repo, name, cache_dir=tmp_path / "other")).read_bytes()
    word = b'"scale": 0.3' if name == "prior_config.json" else b"A person wrote this"
    if name == "README.md":
        text += word
        HfApi().upload_file(path_or_fileobj=text, path_in_repo=name, repo_id=repo)
    other = text.replace(word, word[:-1] + bytes([word[-1] ^ 1]), 1)
    assert other != text
    assert len(other) == len(text)
    fault = hub.add_fault("status", status=200, body=other.decode(), method="GET", path=f"resolve.*{name}$")
    if name == "README.md":
        second = random_prior(seed=1).push_to_hub(repo)
        shown = Path(hf_hub_download(repo, name, revision=second.commit_hash, cache_dir=tmp_path)).read_text()
        assert "A person wrote this" in shown
    else:
        assert_same(PriorModel.from_pretrained(repo, cache_dir=tmp_path / "cache"), random_prior())
    assert fault["hits"] == 1


@pytest.mark.hub
def test_a_small_file_that_rots_in_the_cache_is_fetched_again(repo, tmp_path):
    prior = PriorModel.from_pretrained(repo, cache_dir=tmp_path)
    config = next(tmp_path.rglob("prior_config.json"))
    config.resolve().write_text(config.read_text().replace('"scale": 0.3', '"scale": 0.7'))
    assert_same(PriorModel.from_pretrained(repo, cache_dir=tmp_path), prior)


@pytest.mark.hub
def test_a_push_with_a_tag_that_is_repeated_is_the_same_push_and_another_prior_does_not_get_the_tag(repo):
    first = random_prior(seed=1).push_to_hub(repo, tag="v1")
    assert random_prior(seed=1).push_to_hub(repo, tag="v1") == first
    with pytest.raises(PriorHubError, match="already has a tag 'v1'; nothing was pushed"):
        random_prior(seed=2).push_to_hub(repo, tag="v1")
    assert HfApi().model_info(repo).sha == first.commit_hash


@pytest.mark.hub
def test_a_pull_request_that_may_still_be_opened_is_not_opened_twice(hub, repo, waits, monkeypatch):
    monkeypatch.setenv("PRIOR_HUB_TIMEOUT", "0.5")
    fault = hub.add_fault("delay", seconds=1.5, path=f"{repo}/commit/", times=-1)
    with pytest.raises(PriorConnectionError, match=f"may still be opened: look at {repo}"):
        random_prior(seed=1).push_to_hub(repo, create_pr=True)
    assert fault["hits"] == 1
    fault["seconds"] = 30
    with pytest.raises(PriorConnectionError, match="may still land"):
        random_prior(seed=2).push_to_hub(repo)
    assert fault["hits"] == 4


@pytest.mark.hub
def test_force_download_of_what_cannot_be_fetched_is_an_error_of_the_connection(hub, repo, waits, tmp_path):
    hub.add_fault("status", status=503, method="HEAD", path="prior_config.json", times=-1)
    with pytest.raises(PriorConnectionError, match="503"):
        PriorModel.from_pretrained(repo, cache_dir=tmp_path, force_download=True)


def test_a_disk_error_is_an_os_error_and_one_of_ours():
    with pytest.raises(PriorStorageError, match="cache_dir") as caught, client.explained("org/name", None, None):
        raise OSError(errno.ENOSPC, "No space left on device", "/cache/blobs/x")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "/cache/blobs/x")
    assert isinstance(caught.value, (OSError, PriorHubError))
    with pytest.raises(OSError, match="too deep") as caught, client.explained("org/name", None, None):
        raise OSError(errno.ELOOP, "too deep")
    assert type(caught.value) is OSError


def test_a_disk_that_is_full_while_a_push_is_prepared_says_that_nothing_was_pushed(tmp_path, monkeypatch):
    monkeypatch.setattr(upload, "scratch_folder", lambda _: tmp_path)
    with pytest.raises(PriorStorageError, match=r"Nothing was pushed.*TMPDIR"), upload.push_folder(10**6):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_a_push_that_was_killed_is_removed_by_the_next_and_one_under_way_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(upload, "scratch_folder", lambda _: tmp_path)
    (tmp_path / "prior-hub-push-dead" / "prior").mkdir(parents=True)
    (tmp_path / "somebody-elses").mkdir()
    with upload.push_folder(1) as first:
        (first / "file").touch()
        with upload.push_folder(1) as second:
            assert (first / "file").exists()
            names = {path.name for path in tmp_path.iterdir()}
            assert names == {first.parent.name, second.parent.name, "somebody-elses"}
    assert [path.name for path in tmp_path.iterdir()] == ["somebody-elses"]
