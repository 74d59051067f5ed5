"""No access token and no signed address in an error, in what caused it, in a log, a warning, or what a command prints."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub_fixtures import ALICE, HubServer, fresh_repo_id
from priors_for_tests import random_prior

from prior_hub.cli import main
from prior_hub.errors import PriorHubError
from prior_hub.model import PriorModel, push_prior_to_hub
from prior_hub.registry import client
from prior_hub.registry.tokens import scrubbed

pytestmark = pytest.mark.hub
GIVEN = "hf_givenTokenOfAStranger"  # as an argument
REAL = "hf_" + "aB3" * 11 + "x"  # of the form of the Hub's own, from nobody knows where
SIGNATURE = "X-Amz-Signature=5f3c9a"
SECRETS = (ALICE, GIVEN, REAL, SIGNATURE, "Bearer hf")
SAID = f"token {GIVEN} or {ALICE} (Authorization: Bearer {REAL}) refused for https://cdn.example/x?{SIGNATURE}&token={GIVEN}"


@pytest.fixture(scope="module")
def repo() -> str:
    return str(random_prior().push_to_hub(fresh_repo_id("tokens")).repo_id)


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and all that led to it."""
    seen: list[BaseException] = []
    waiting = [error]
    while waiting:
        one = waiting.pop()
        if one is not None and one not in seen:
            seen.append(one)
            waiting += [one.__cause__, one.__context__]
            yield one


def fails_discreetly(act: Callable[[], object], caplog) -> None:
    """The act is refused by us, and no text that comes of it has a secret."""
    caplog.set_level(logging.DEBUG, logger="prior_hub")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(PriorHubError) as refused:
            act()
    texts = [text for error in chain(refused.value) for text in (str(error), repr(error), *getattr(error, "__notes__", ()))]
    texts += [str(item.message) for item in caught]
    texts += [record.getMessage() for record in caplog.records if record.name.startswith("prior_hub")]
    for text in texts:
        for secret in SECRETS:
            assert secret not in text, text


ANSWERS = {
    "401": {"status": 401, "headers": {"X-Error-Message": SAID}},
    "403": {"status": 403, "headers": {"X-Error-Message": SAID}},
    "400": {"status": 400, "headers": {"X-Error-Message": SAID}},
    "500 in a header": {"status": 500, "headers": {"X-Error-Message": SAID}},
    "500 as JSON": {"status": 500, "headers": {"Content-Type": "application/json"}, "body": json.dumps({"error": SAID})},
    "a redirect to a signed address": {"status": 302, "headers": {"Location": f"/no/such/place?{SIGNATURE}&token={GIVEN}"}},
    "a web page": {"status": 200, "headers": {"Content-Type": "text/html"}, "body": f"<html>{SAID}</html>"},
}


def of_others(answer: dict[str, object]) -> dict[str, object]:
    """The same where that token was not given: of somebody else's, only what has the Hub's form can be told."""
    return dict(json.loads(json.dumps(answer).replace(GIVEN, REAL)))


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS.keys())
@pytest.mark.parametrize("token", [None, GIVEN], ids=["logged in", "given"])
def test_loading_says_no_token_whatever_the_server_says(hub: HubServer, repo, tmp_path, caplog, answer, token):
    hub.add_fault("status", path="/api/|/resolve/", times=-1, **(answer if token else of_others(answer)))
    fails_discreetly(lambda: PriorModel.from_pretrained(repo, cache_dir=tmp_path, token=token), caplog)


# the client itself waits 23 s over its five tries of a 500
@pytest.mark.parametrize(
    "answer",
    [pytest.param(ANSWERS["403"], id="403"), pytest.param(ANSWERS["500 as JSON"], id="500", marks=pytest.mark.slow)],
)
def test_a_signed_address_that_refuses_is_not_shown_with_its_signature(hub: HubServer, repo, tmp_path, caplog, answer):
    hub.add_fault("status", path="safetensors", times=-1, **of_others(answer))
    fails_discreetly(lambda: PriorModel.from_pretrained(repo, cache_dir=tmp_path), caplog)


@pytest.mark.parametrize("answer", [ANSWERS["401"], ANSWERS["403"], ANSWERS["400"]], ids=["401", "403", "400"])
@pytest.mark.parametrize("path", ["/preupload/", "/commit/"])
def test_pushing_says_no_token_whatever_the_server_says(hub: HubServer, repo, caplog, monkeypatch, answer, path):
    monkeypatch.setattr(client.time, "sleep", lambda seconds: None)
    hub.add_fault("status", path=path, times=-1, **of_others(answer))
    fails_discreetly(lambda: random_prior(seed=1).push_to_hub(repo), caplog)


def test_a_dry_run_tells_no_token_of_what_stands_against_the_push(hub: HubServer, repo):
    hub.add_fault("status", path="/auth-check", times=-1, **of_others(ANSWERS["403"]))
    plan = push_prior_to_hub(random_prior(seed=1), repo, dry_run=True)
    assert any("may not write" in problem for problem in plan.problems)
    for secret in SECRETS:
        assert secret not in str(plan)


def test_a_command_prints_no_token(hub: HubServer, repo, tmp_path, capsys):
    hub.add_fault("status", path="/api/|/resolve/", times=-1, **of_others(ANSWERS["403"]))
    for arguments in (["info", repo], ["check", repo], ["pull", repo, "--cache-dir", str(tmp_path)], ["check", repo, "--json"]):
        assert main(arguments) == 1
        said = "".join(capsys.readouterr())
        assert "refused" in said
        assert not any(secret in said for secret in SECRETS)


def test_what_is_scrubbed_and_what_is_left():
    assert scrubbed(f"a {REAL} b") == "a hf_*** b"
    assert scrubbed("https://x/y?Signature=1&b=2 c") == "https://x/y c"
    assert scrubbed("Authorization: Bearer abc, Bearer def") == "Authorization: Bearer *** Bearer ***"
    for text in ("hf_hub_download", "hf_xet failed", "is there a token? no", "https://huggingface.co/settings/tokens"):
        assert scrubbed(text) == text


def test_no_token_is_kept_in_a_file_of_a_push(repo, tmp_path):
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(repo, cache_dir=tmp_path))
    for path in folder.rglob("*"):
        assert path.is_dir() or not any(secret.encode() in path.read_bytes() for secret in SECRETS)
