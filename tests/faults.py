"""Faults x operations: what happens to a prior on its way to and from the Hub when something breaks.

    python tests/faults.py --json docs/faults.json --markdown docs/faults.md     (`make faults`)
    python tests/faults.py --every          every request with every kind: thousands, for a release

For every operation the requests of a run without faults are recorded. Then the operation is repeated with every kind of
fault, going round its requests so that each of them suffers some; some faults stay from the n-th request on. After each
the judge asks: was the outcome one that is allowed (done, retried, resumed, taken from the cache, or a PriorHubError
that says what to do)? Do the folder, the cache and every commit of every reference hold a whole prior or none? Does the
same operation succeed when it is simply repeated?

Time-outs of the client are short here, and it does not sleep between its tries. The server is the small one of the tests,
so transfers are plain LFS, not Xet.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Json = dict[str, Any]

REPO = "alice/prior"
NEW_NAME = "alice/new-prior"
OLD, NEW, THEIRS = 1, 2, 3  # seeds
SHARDS = {"max_shard_size": 200}
TIMEOUT = 0.6  # seconds the client waits for an answer
LATE = 0.9  # seconds after which a slow server acts
BOUND = 90.0  # seconds until an operation counts as hanging
ALLOWED = ("done", "retried", "resumed", "from the cache", "clear error", "killed", "interrupted")
# What an error must offer: something to do, or the assurance that nothing is left to do.
ADVICE = re.compile(
    r"[Tt]ry again|log in|[Cc]heck |[Cc]onnect\b|[Ll]ook at|push again|[Cc]hoose|pass subfolder|stand in between|"
    r"[Ll]ook before|[Pp]ush .* again|[Tt]ag it|accept its terms|[Ss]ave the prior again"
)


# -------------------------------------------------------------------------------------------------------------- the kinds
@dataclass(frozen=True)
class Kind:
    """A kind of fault: how the server injects it into one request.

    bodies: only for answers with a body worth breaking; every: also from the n-th request on, for good.
    """

    action: str
    options: Json = field(default_factory=dict)
    bodies: bool = False
    for_good: bool = False
    pushes_only: bool = False


def answered(status: int, **more: Any) -> Kind:
    return Kind("status", {"status": status, **more})


PASSING = (
    "connection closed", "connection reset", "closed in the body", "reset in the body", "truncated body", "flipped byte",
    "stalled body", "slow answer", "lost answer", "429", "429 with Retry-After", "500", "503",
)  # fmt: skip
ALSO_AT_THE_MAIN_REQUEST = (
    "closed in the body", "reset in the body", "truncated body", "flipped byte", "stalled body", "slow answer", "lost answer",
    "concurrent push", "interrupted (SIGINT)", "killed (SIGKILL)", "not JSON",
)  # fmt: skip
KINDS: dict[str, Kind] = {
    "connection closed": Kind("close", for_good=True),
    "connection reset": Kind("reset"),
    "closed in the body": Kind("drop", bodies=True),
    "reset in the body": Kind("reset", {"after_bytes": 10}, bodies=True),
    "truncated body": Kind("truncate", bodies=True),
    "flipped byte": Kind("corrupt", bodies=True),
    "stalled body": Kind("stall", {"seconds": LATE}, bodies=True),
    "slow answer": Kind("delay", {"seconds": LATE}, for_good=True),
    "lost answer": Kind("lost_response"),
    "429": answered(429),
    "429 with Retry-After": answered(429, headers={"Retry-After": "1"}),
    "500": answered(500),
    "503": dataclasses.replace(answered(503), for_good=True),
    "401": answered(401),
    "403": answered(403),
    "redirect to nowhere": answered(302, headers={"Location": "http://127.0.0.1:9/nowhere"}),
    "not JSON": answered(200, body="<html>Please log in to the network</html>"),
    "concurrent push": Kind("call"),
    "interrupted (SIGINT)": Kind("call"),
    "killed (SIGKILL)": Kind("call"),
}


# --------------------------------------------------------------------------------------------------------- the operations
@dataclass(frozen=True)
class Operation:
    """run(world) -> prior, configuration or None. before: the repository it finds; warm: what the cache holds."""

    run: Callable[[World], Any]
    before: str = "one file"
    warm: bool = False
    stale: bool = False
    subfolder: str | None = None
    revision: str | None = None
    target: str | None = None
    tag: str | None = None
    folder: bool = False

    @property
    def is_push(self) -> bool:
        return self.target is not None


def pulling(**options: Any) -> Callable[[World], Any]:
    def run(world: World) -> Any:
        return world.PriorModel.from_pretrained(REPO, cache_dir=world.cache, **options)

    return run


def looking(world: World) -> Any:
    return world.download_config(REPO, cache_dir=world.cache)[0]


def pushing(name: str = REPO, shards: bool = False, **options: Any) -> Callable[[World], Any]:
    def run(world: World) -> Any:
        return world.new.push_to_hub(name, **(SHARDS if shards else {}), **options)

    return run


class CommandFailed(Exception):
    """The command ended with exit code 1 and this message."""


def command(*arguments: str) -> Callable[[World], Any]:
    def run(world: World) -> Any:
        words = [word.format(out=world.out, folder=world.folder, cache=world.cache) for word in arguments]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = world.main(words)
        if code == 130:
            raise KeyboardInterrupt
        if code:
            raise CommandFailed(err.getvalue().strip())
        return world.PriorModel.from_pretrained(world.out) if words[0] == "pull" else None

    return run


OPERATIONS: dict[str, Operation] = {
    "pull, cold": Operation(pulling()),
    "pull, warm": Operation(pulling(), warm=True),
    "pull, warm, newer on the Hub": Operation(pulling(), stale=True),
    "pull, force_download": Operation(pulling(force_download=True), warm=True),
    "pull, shards": Operation(pulling(), before="shards"),
    "pull, revision": Operation(pulling(revision="v1"), revision="v1"),
    "pull, subfolder": Operation(pulling(subfolder="sub"), before="subfolder", subfolder="sub"),
    "configuration only": Operation(looking),
    "prior-hub pull --output": Operation(command("pull", REPO, "--cache-dir", "{cache}", "--output", "{out}"), folder=True),
    "push, new repository": Operation(pushing(NEW_NAME), before="none", target="refs/heads/main"),
    "push, update": Operation(pushing(), target="refs/heads/main"),
    "push, more shards": Operation(pushing(shards=True), target="refs/heads/main"),
    "push, fewer files": Operation(pushing(), before="shards", target="refs/heads/main"),
    "push, tag": Operation(pushing(tag="v2"), target="refs/heads/main", tag="v2"),
    "push, branch": Operation(pushing(revision="exp"), target="refs/heads/exp"),
    "push, pull request": Operation(pushing(create_pr=True), target="refs/pr/1"),
    "push, subfolder": Operation(pushing(subfolder="sub"), before="subfolder", subfolder="sub", target="refs/heads/main"),
    "prior-hub push": Operation(command("push", "{folder}", REPO, "--no-pictures"), target="refs/heads/main"),
}


# --------------------------------------------------------------------------------------------------------------- the world
class Hang(BaseException):
    """The operation did not come back within BOUND."""


class World:
    """A Hub, a client with short time-outs, three priors, and what the repository was like before each operation."""

    def __init__(self, root: Path) -> None:
        from hub_fixtures import client_environment
        from loopback_hub import LoopbackHub

        self.root = root
        self.cache, self.out, self.folder, self.tmp = root / "cache", root / "out", root / "folder", root / "tmp"
        self.tmp.mkdir(parents=True)
        self.hub = LoopbackHub(root / "hub").start()
        os.environ.update(client_environment(self.hub, root / "home"))
        os.environ |= {"HF_HUB_VERBOSITY": "error", "PRIOR_HUB_TIMEOUT": str(TIMEOUT), "TMPDIR": str(self.tmp)}
        tempfile.tempdir = None
        from huggingface_hub import constants
        from priors_for_tests import differences, random_prior

        from prior_hub.cli import main
        from prior_hub.errors import PriorConnectionError, PriorHubError, PriorNotFoundError
        from prior_hub.model import PriorModel
        from prior_hub.registry import hub as registry
        from prior_hub.registry.hub import download_config, push_folder

        constants.HF_HUB_ETAG_TIMEOUT = constants.HF_HUB_DOWNLOAD_TIMEOUT = TIMEOUT  # in the environment: whole seconds only
        import huggingface_hub.utils._http as client_http

        for module in (client_http, registry):
            module.time = Hasty()
        self.differences, self.PriorModel, self.PriorHubError = differences, PriorModel, PriorHubError
        self.PriorNotFoundError, self.download_config, self.main = PriorNotFoundError, download_config, main
        self.PriorConnectionError = PriorConnectionError
        self.random_prior, self.push_folder = random_prior, push_folder
        self.old, self.new, self.theirs = (random_prior(seed) for seed in (OLD, NEW, THEIRS))
        self.new.save_pretrained(self.folder)
        self.snapshots: dict[str, Any] = {"none": None}
        self.trees: dict[tuple, str] = {}
        self._prepare()

    def _prepare(self) -> None:
        hub = self.hub
        self.theirs.push_to_hub(REPO, tag="v1")
        self.their_repo = hub.repos.pop(REPO)
        self.old.push_to_hub(REPO, tag="v1")
        self.snapshots["one file"] = hub.repos.pop(REPO)
        self.old.push_to_hub(REPO, **SHARDS)
        self.snapshots["shards"] = hub.repos.pop(REPO)
        self.old.push_to_hub(REPO, subfolder="sub")
        self.snapshots["subfolder"] = hub.repos.pop(REPO)

    def reset(self, operation: Operation) -> None:
        """Put the repository, the cache and the folders back to what the operation finds."""
        self.hub.clear_faults()
        for folder in (self.cache, self.out, self.root / "home"):
            shutil.rmtree(folder, ignore_errors=True)
        self.hub.repos.clear()
        before = self.snapshots[operation.before]
        if before is not None:
            self.hub.repos[REPO] = copy.deepcopy(before)
        if operation.folder:
            self.old.save_pretrained(self.out)
        if operation.warm or operation.stale:
            self.PriorModel.from_pretrained(REPO, cache_dir=self.cache)
        if operation.stale:
            self.concurrent_push()
        self.hub.clear_log()

    def concurrent_push(self) -> None:
        """Somebody else's push: a commit with another whole prior on the target branch, made in an instant."""
        repo = self.hub.repos.get(REPO)
        if repo is None:
            return
        with self.hub.lock:
            ref = "refs/heads/exp" if "refs/heads/exp" in repo.refs else "refs/heads/main"
            head = repo.commits[repo.refs[ref]]
            theirs = self.their_repo.commits[self.their_repo.refs["refs/heads/main"]].tree
            kept = {p: e for p, e in head.tree.items() if not re.match(r"prior[-.]", p)}
            repo.lfs.update(self.their_repo.lfs)
            fields = {"parent": head.id, "author": "bob", "title": "theirs", "message": ""}
            repo.refs[ref] = self.hub.commit(repo, kept | theirs, **fields).id

    def settle(self) -> None:
        """Wait until the server has finished with every request, also with those nobody waits for any more."""
        end = time.monotonic() + 5
        while time.monotonic() < end and any(entry["ms"] is None for entry in list(self.hub.log)):
            time.sleep(0.01)

    # ---------------------------------------------------------------------------------------------------- what is there
    def name_of(self, prior: Any) -> str:
        for name, known in (("old", self.old), ("new", self.new), ("theirs", self.theirs)):
            if not self.differences(prior, known):
                return name
        return "a mixture"

    def state_of(self, folder: Path) -> str:
        """Which whole prior lies in a folder: "old", "new", "theirs", "none", or what is wrong with it."""
        try:
            return self.name_of(self.PriorModel.from_pretrained(folder))
        except self.PriorNotFoundError:
            return "none"
        except self.PriorHubError as error:
            return f"{type(error).__name__}: {error}"

    def state_of_tree(self, tree: Json, subfolder: str | None) -> str:
        """The same for a commit."""
        below = f"{subfolder}/" if subfolder else ""
        inside = {p.removeprefix(below): e for p, e in tree.items() if p.startswith(below) and "/" not in p.removeprefix(below)}
        key = tuple(sorted((path, entry.sha256 or entry.oid) for path, entry in inside.items()))
        if key not in self.trees:
            folder = self.root / "tree"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            for path, entry in inside.items():
                (folder / path).write_bytes(self.hub.read(entry))
            state = self.state_of(folder)
            stray = [p for p in inside if re.match(r"prior[-.]", p)] if state == "none" else []
            unlisted = [] if state == "none" else self._unlisted(folder)
            self.trees[key] = f"stray files {stray or unlisted}" if stray or unlisted else state
        return self.trees[key]

    def _unlisted(self, folder: Path) -> list[str]:
        listed = json.loads((folder / "prior_config.json").read_text())["weight_files"]
        return [p.name for p in folder.glob("prior*.safetensors") if p.name not in listed]

    def references(self, name: str, subfolder: str | None) -> dict[str, list[str]]:
        """Reference -> the states of its commits, newest first."""
        repo = self.hub.repos.get(name)
        if repo is None:
            return {}
        return {
            ref: [self.state_of_tree(commit.tree, subfolder) for commit in repo.history(repo.commits[at])]
            for ref, at in repo.refs.items()
        }

    def scenarios(self) -> list[Json]:
        """The rows of fault_scenarios.py."""
        from fault_scenarios import SCENARIOS, Impossible

        rows = []
        for name, scenario in SCENARIOS.items():
            self.reset(OPERATIONS["pull, cold"])
            start = time.monotonic()
            try:
                with bounded(2 * BOUND):
                    outcome, wrong = scenario(self)
            except Impossible as reason:
                outcome, wrong = f"not tried: {reason}", []
            except (Exception, Hang) as error:  # noqa: BLE001
                outcome, wrong = type(error).__name__, [f"{type(error).__name__}: {error}"[:600]]
            rows.append({"scenario": name, "outcome": outcome, "seconds": round(time.monotonic() - start, 1), "wrong": wrong})
        return rows


class Hasty:
    """The module `time` for those who would sleep between tries."""

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    @staticmethod
    def sleep(seconds: float) -> None:
        time.sleep(min(seconds, 0.005))


def normalised(target: str) -> str:
    """A request's target without what differs from run to run."""
    target = re.sub(r"\?.*", "", target)
    target = re.sub(r"\b[0-9a-f]{64}\b|\b[0-9a-f]{40}\b|\b[0-9a-f]{24}\b", "*", target)
    target = re.sub(r"prior-\d{5}-of-\d{5}", "prior-*-of-*", target)
    return target.replace(NEW_NAME, "{repo}").replace(REPO, "{repo}")


# ----------------------------------------------------------------------------------------------------------- one injection
@dataclass
class Injection:
    """A fault: which kind, at which request of the operation, once or from there on for good."""

    operation: str
    kind: str
    number: int
    request: str
    for_good: bool

    @property
    def label(self) -> str:
        return self.kind + (", for good" if self.for_good else "")


@contextlib.contextmanager
def bounded(seconds: float) -> Iterator[None]:
    def late(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def attempt(world: World, operation: Operation, kind: str) -> tuple[str, str, Any]:
    """Run it: (outcome, message, result). Outcomes besides those of ALLOWED are findings."""
    if kind.startswith("killed"):
        return in_a_child(world, operation)
    try:
        with bounded(BOUND):
            return "done", "", operation.run(world)
    except Hang:
        return "hang", f"not back after {BOUND:g} s", None
    except KeyboardInterrupt:
        return "interrupted" if kind.startswith("interrupted") else "KeyboardInterrupt", "", None
    except world.PriorHubError as error:
        return "clear error", str(error), None
    except CommandFailed as error:
        return "clear error", str(error), None
    except BaseException as error:  # noqa: BLE001
        return f"raw {type(error).__name__}", str(error), None


def in_a_child(world: World, operation: Operation) -> tuple[str, str, Any]:
    """Run it in a process of its own, which the server kills."""
    child = os.fork()
    if not child:
        try:
            operation.run(world)
        finally:
            os._exit(0)
    world.victim = child
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return ("killed", "", None) if code == -signal.SIGKILL else ("done", f"exit code {code}", None)


def inject(world: World, operation: Operation, injection: Injection) -> Json:
    """One row of the experiment."""
    world.reset(operation)
    kind = KINDS[injection.kind]
    options = dict(kind.options)
    if injection.kind == "concurrent push":
        options["function"] = world.concurrent_push
    elif injection.kind.startswith("interrupted"):
        options["function"] = lambda: (os.kill(os.getpid(), signal.SIGINT), time.sleep(0.05))
    elif injection.kind.startswith("killed"):
        options["function"] = lambda: (os.kill(world.victim, signal.SIGKILL), time.sleep(0.02))
    rule = world.hub.add_fault(kind.action, skip=injection.number, times=-1 if injection.for_good else 1, **options)
    before = world.references(target_of(operation), operation.subfolder)
    start = time.monotonic()
    outcome, message, result = attempt(world, operation, injection.kind)
    seconds = time.monotonic() - start
    world.hub.clear_faults()
    world.settle()
    log = world.hub.requests()
    wrong = []
    if outcome == "done":
        outcome = how_it_was_done(world, operation, injection, log)
        wrong += judge_success(world, operation, injection, result)
    elif outcome == "clear error":
        wrong += judge_message(world, operation, message, before)
    elif outcome not in ALLOWED:
        wrong.append(f"{outcome}: {message[:300]}")
    if rule["hits"] == 0:
        wrong.append("the fault was never met")
    wrong += judge_state(world, operation, before, outcome)
    wrong += judge_repetition(world, operation, outcome)
    return {
        **dataclasses.asdict(injection), "label": injection.label, "hits": rule["hits"], "outcome": outcome,
        "message": message, "seconds": round(seconds, 2), "wrong": wrong,
    }  # fmt: skip


def target_of(operation: Operation) -> str:
    return NEW_NAME if operation.before == "none" else REPO


def how_it_was_done(world: World, operation: Operation, injection: Injection, log: list[Json]) -> str:
    """done, retried, resumed or from the cache, by the requests that were made."""
    if any(entry["range"] for entry in log):
        return "resumed"
    usual = Counter(world.usual[injection.operation])
    made = Counter((entry["method"], normalised(entry["target"])) for entry in log)
    if made - usual:
        return "retried"
    faulty = [entry for entry in log if entry["fault"]]
    slow = injection.kind == "slow answer"
    return "from the cache" if (operation.warm or operation.stale) and (faulty or slow) else "done"


def judge_success(world: World, operation: Operation, injection: Injection, result: Any) -> list[str]:
    """What was loaded is whole, what was pushed is there."""
    name = target_of(operation)
    if not operation.is_push:
        if result is None or type(result).__name__ == "PriorConfig":
            return []
        found = world.name_of(result)
        fine = {"old"} | ({"theirs"} if operation.stale or injection.kind == "concurrent push" else set())
        return [] if found in fine else [f"success, but what was loaded is {found}"]
    repo = world.hub.repos[name]
    states = world.references(name, operation.subfolder).get(operation.target or "", ["missing"])
    wrong = [] if states[0] == "new" or injection.kind == "concurrent push" else [f"success, but there is {states[0]}"]
    if "new" not in states:
        wrong.append("success, but this push is nowhere in the history")
    if operation.tag and "refs/tags/" + operation.tag not in repo.refs:
        wrong.append("success, but not tagged")
    if result is not None and result.commit_hash not in [c.id for c in repo.history(repo.commits[repo.refs[operation.target]])]:
        wrong.append("the commit that was returned is not of this branch")
    return wrong


def judge_message(world: World, operation: Operation, message: str, before: dict[str, list[str]]) -> list[str]:
    """An error names the repository, says what to do, keeps secrets and does not lie."""
    wrong = []
    if target_of(operation) not in message:
        wrong.append(f"the error does not name the repository: {message}")
    if not ADVICE.search(message):
        wrong.append(f"the error does not say what to do: {message}")
    if re.search(r"hf_alice|Bearer|Signature=", message) or len(message) > 1200:
        wrong.append(f"too long, or a secret: {message}")
    if operation.is_push and re.search(r"[Nn]othing (was pushed|of this push landed)", message):
        states = world.references(target_of(operation), operation.subfolder)
        if any("new" in s for s in states.values()):
            wrong.append(f"the error says that nothing landed, but something did: {message}")
    return wrong


def judge_state(world: World, operation: Operation, before: dict[str, list[str]], outcome: str) -> list[str]:
    """Whole priors everywhere, or none; nothing left behind."""
    wrong = []
    fine = {"old", "new", "theirs", "none"}
    after = world.references(target_of(operation), operation.subfolder)
    for ref, states in after.items():
        wrong += [f"{ref} has a commit with {state}" for state in states if state not in fine]
        kept = before.get(ref, [])
        if kept and states[-len(kept) :] != kept:
            wrong.append(f"{ref} lost history: {kept} -> {states}")
        if states[: len(states) - len(kept)].count("new") > 1:
            wrong.append(f"{ref} has the same push twice: {states}")
    if operation.folder and world.state_of(world.out) not in ("old", "theirs"):
        wrong.append(f"the folder holds {world.state_of(world.out)}")
    if not operation.is_push:
        try:
            found = world.name_of(
                world.PriorModel.from_pretrained(
                    REPO,
                    cache_dir=world.cache,
                    revision=operation.revision,
                    subfolder=operation.subfolder,
                    local_files_only=True,
                )
            )
            wrong += [] if found in ("old", "theirs") else [f"the cache holds {found}"]
        except world.PriorHubError as error:
            if operation.warm:
                wrong.append(f"the cached copy is lost: {error}")
    left = [path.name for path in world.tmp.iterdir()]
    left += [path.name for path in world.cache.rglob("*.incomplete")]
    if left and outcome != "killed":
        wrong.append(f"left behind: {left}")
    return wrong


def judge_repetition(world: World, operation: Operation, outcome: str) -> list[str]:
    """The same again without a fault succeeds, and a client that has seen nothing reads a whole prior."""
    name = target_of(operation)
    again, message, result = attempt(world, operation, "")
    if "already has a tag" in message and outcome in ("done", "retried"):
        return []  # it was pushed and tagged the first time, and somebody else pushed since
    if again != "done":
        return [f"repeated: {again}: {message[:400]}"]
    wrong = []
    if operation.is_push:
        repo = world.hub.repos[name]
        targets = [ref for ref in repo.refs if ref.startswith("refs/pr/")] if "/pr/" in operation.target else [operation.target]
        for ref in targets:
            states = world.references(name, operation.subfolder)[ref]
            wrong += [] if states[0] == "new" else [f"after the repetition {ref} is {states[0]}"]
            if [s for s in states if s != "theirs"].count("new") > 1 and "theirs" not in states:
                wrong.append(f"after the repetition {ref} has the same push twice: {states}")
        if operation.tag and repo.refs["refs/tags/" + operation.tag] != repo.refs[operation.target]:
            wrong.append("after the repetition the tag is elsewhere")
        shutil.rmtree(world.cache, ignore_errors=True)
        revision = targets[-1].removeprefix("refs/heads/")
        options = {"revision": revision, "subfolder": operation.subfolder}
        found = world.name_of(world.PriorModel.from_pretrained(name, cache_dir=world.cache, **options))
        wrong += [] if found == "new" else [f"a clean client reads {found}"]
    elif type(result).__name__ != "PriorConfig" and world.name_of(result) not in ("old", "theirs"):
        wrong.append(f"the repetition loads {world.name_of(result)}")
    left = [path.name for path in world.tmp.iterdir()]
    if left:
        wrong.append(f"left behind after the repetition: {left}")
        for path in world.tmp.iterdir():
            shutil.rmtree(path, ignore_errors=True)
    return wrong


# ------------------------------------------------------------------------------------------------------------ the experiment
def injections(world: World, name: str) -> list[Injection]:
    """Every request of the operation with every kind of fault."""
    operation = OPERATIONS[name]
    world.reset(operation)
    outcome, message, _ = attempt(world, operation, "")
    if outcome != "done":
        raise AssertionError(f"{name} without a fault: {outcome}: {message}")
    world.settle()
    log = world.hub.requests()
    world.usual[name] = [(entry["method"], normalised(entry["target"])) for entry in log]
    found = []
    for number, entry in enumerate(log):
        request = f"{entry['method']} {normalised(entry['target'])}"
        for label, kind in KINDS.items():
            if kind.bodies and not entry["sent"]:
                continue
            found.append(Injection(name, label, number, request, False))
            if kind.for_good and not (label == "slow answer" and number % 4):  # these take many time-outs
                found.append(Injection(name, label, number, request, True))
    return found


def covering(plan: list[Injection]) -> list[Injection]:
    """Every operation with every kind, each time at the next of its requests, so that every request meets some kinds.

    What alters answers or falls between two requests also hits the request that matters most: the weights, the commit.
    """
    eligible: dict[tuple[str, str], list[Injection]] = {}
    for injection in plan:
        eligible.setdefault((injection.operation, injection.label), []).append(injection)
    kept = []
    met: Counter[tuple[str, int]] = Counter()
    for possible in eligible.values():
        chosen = [min(possible, key=lambda injection: (met[injection.operation, injection.number], injection.number))]
        main = [i for i in possible if re.search(r"GET /lfs/|POST .*/commit/", i.request)][-1:]
        if possible[0].kind in ALSO_AT_THE_MAIN_REQUEST and main != chosen:
            chosen += main
        for injection in chosen:
            met[injection.operation, injection.number] += 1
        kept += chosen
    return kept


def experiment(root: Path, only: Sequence[str], sample: int | None, every: bool, scenarios: bool, say: Callable) -> Json:
    """All of it, or a sample of so many injections."""
    import torch

    torch.set_num_threads(1)
    world = World(root)
    world.usual = {}
    plan = [injection for name in only for injection in injections(world, name)]
    if not every:
        plan = covering(plan)
    if sample:
        plan = random.Random(0).sample(plan, min(sample, len(plan)))
    rows = []
    begun = time.monotonic()
    others = world.scenarios() if scenarios else []
    for row in others:
        if row["wrong"]:
            say(f"{row['scenario']} | {row['outcome']} | {row['wrong']}")
    for injection in plan:
        row = inject(world, OPERATIONS[injection.operation], injection)
        rows.append(row)
        if row["wrong"]:
            say(f"{row['operation']} | {row['label']} | {row['request']} | {row['outcome']} | {row['wrong']}")
    say(f"{len(rows)} faults in {time.monotonic() - begun:.0f} s, {sum(bool(row['wrong']) for row in rows)} not survived")
    world.hub.stop()
    requests = {name: len(usual) for name, usual in world.usual.items()}
    return {"faults": rows, "requests": requests, "scenarios": others}


def in_parts(parts: int, only: Sequence[str], sample: int | None, every: bool, scenarios: bool) -> Json:
    """The experiment in processes of their own, side by side: most of the time is waiting for time-outs."""
    shares = [[name for i, name in enumerate(only) if i % parts == part] for part in range(parts)]
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="prior-faults-", dir=memory if os.access(memory, os.W_OK) else None) as root:
        running = []
        for part, names in enumerate(shares):
            words = [sys.executable, __file__, "--parts", "1", "--root", f"{root}/{part}", "--json", f"{root}/{part}.json"]
            words += [word for name in names for word in ("--only", name)]
            words += ["--sample", str(-(-sample // parts))] if sample else []
            words += ["--every"] if every else []
            words += [] if scenarios and part == 0 else ["--no-scenarios"]
            running.append(subprocess.Popen(words, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdin=subprocess.DEVNULL))
        codes = [process.wait() for process in running]
        if any(codes):
            raise RuntimeError(f"a part of the experiment failed: exit codes {codes}")
        results = [json.loads(Path(f"{root}/{part}.json").read_text()) for part in range(parts)]
    order = {name: i for i, name in enumerate(OPERATIONS)}
    rows = sorted((row for result in results for row in result["faults"]), key=lambda row: order[row["operation"]])
    requests = {name: n for result in results for name, n in result["requests"].items()}
    return {"faults": rows, "requests": requests, "scenarios": [row for result in results for row in result["scenarios"]]}


SHORT = {"from the cache": "cached", "clear error": "error"}
ABOUT = """# Faults and what becomes of them

Written by `python tests/faults.py --json docs/faults.json --markdown docs/faults.md` (`make faults`); do not edit.

Every operation runs against a loopback Hub once for each kind of fault, which hits one of its requests (each request in
turn), or that request and all after it ("for good"). {count} faults were injected into {operations} operations of
{requests} requests in all; {wrong}. After each, the local folder, the cache and every commit of every branch, tag and
pull request held a whole prior or none, and the same operation, repeated without the fault, succeeded.

Outcomes: **done** (the fault did not matter), **retried** (requests were repeated, by the Hub client or by prior_hub),
**resumed** (the download of a large file went on where it broke off), **cached** (the copy in the cache was used), **error** (a
`PriorHubError` that names the repository and says what to do), **interrupted** and **killed** (that was the fault).
Transfers are plain LFS here; over Xet the client has retries of its own.

{totals}
"""


def as_json(result: Json) -> str:
    """The result, a fault a line, without what differs from run to run."""
    varying = ("seconds", "message") if not any(row["wrong"] for row in result["faults"]) else ()
    lines = [json.dumps({k: v for k, v in row.items() if k not in varying}) for row in result["faults"]]
    others = {key: value for key, value in result.items() if key != "faults"}
    for row in others["scenarios"]:
        row.pop("seconds", None)
    return json.dumps(others)[:-1] + ', "faults": [\n' + ",\n".join(lines) + "\n]}\n"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def as_markdown(result: Json) -> str:
    """docs/faults.md."""
    rows = result["faults"]
    operations = [name for name in OPERATIONS if name in result["requests"]]
    labels = list(dict.fromkeys(row["label"] for row in rows))
    labels.sort(key=lambda label: list(KINDS).index(label.removesuffix(", for good")))
    totals = Counter(SHORT.get(row["outcome"], row["outcome"]) for row in rows)
    bad = sum(bool(row["wrong"]) for row in rows)
    text = ABOUT.format(
        count=len(rows), operations=len(operations), requests=sum(result["requests"].values()),
        wrong=f"{bad} were not survived" if bad else "all were survived",
        totals=table(["outcome", "faults"], [[name, str(n)] for name, n in totals.most_common()]),
    )  # fmt: skip
    for title, is_push in (("Pull", False), ("Push", True)):
        columns = [name for name in operations if OPERATIONS[name].is_push == is_push]
        lines = []
        for label in labels:
            cells = []
            for name in columns:
                found = Counter(
                    "**not survived**" if row["wrong"] else SHORT.get(row["outcome"], row["outcome"])
                    for row in rows
                    if (row["operation"], row["label"]) == (name, label)
                )
                cells.append(", ".join(word if n == 1 else f"{word} ×{n}" for word, n in sorted(found.items())) or "–")
            lines.append([label, *cells])
        text += f"\n## {title}\n\n" + table(["fault", *columns], lines)
    if result["scenarios"]:
        lines = [
            [row["scenario"], "**not survived**" if row["wrong"] else SHORT.get(row["outcome"], row["outcome"])]
            for row in result["scenarios"]
        ]
        text += "\n## Disk, connection, other processes\n\n" + table(["what", "outcome"], lines)
    return text


def joined(before: Json, now: Json) -> Json:
    """An earlier result in which some operations were tried again."""
    again = {row["operation"] for row in now["faults"]}
    rows = [row for row in before["faults"] if row["operation"] not in again] + now["faults"]
    return {
        "faults": sorted(rows, key=lambda row: list(OPERATIONS).index(row["operation"])),
        "requests": before["requests"] | now["requests"],
        "scenarios": now["scenarios"] or before["scenarios"],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--only", action="append", choices=list(OPERATIONS), help="these operations; the file of --json keeps the others"
    )
    parser.add_argument("--sample", type=int, help="so many faults, drawn at random but always the same")
    parser.add_argument("--every", action="store_true", help="every request with every kind")
    parser.add_argument(
        "--no-scenarios", dest="scenarios", action="store_false", help="leave out the rows of fault_scenarios.py"
    )
    parser.add_argument("--parts", type=int, default=3, help="processes")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    only = arguments.only or list(OPERATIONS)

    def say(text: str) -> None:
        print(text, flush=True)

    if arguments.root:
        result = experiment(arguments.root, only, arguments.sample, arguments.every, arguments.scenarios, say)
    else:
        result = in_parts(arguments.parts, only, arguments.sample, arguments.every, arguments.scenarios)
        if arguments.only and arguments.json and arguments.json.exists():
            result = joined(json.loads(arguments.json.read_text()), result)
    if arguments.json:
        arguments.json.write_text(as_json(result))
    if arguments.markdown:
        arguments.markdown.write_text(as_markdown(result), encoding="utf-8")


if __name__ == "__main__":
    main()
