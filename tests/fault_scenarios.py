"""What breaks besides a request: the disk, the cache, the connection as a whole, other processes. Part of tests/faults.py.

A scenario is a function (world) -> (outcome, what is wrong); it raises `Impossible` where it cannot be tried.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from faults import World

REPO = "alice/prior"
Finding = tuple[str, list[str]]
LARGE = {"w": (100, 100), "v": (50,)}


class Impossible(Exception):
    """Why a scenario cannot be tried here."""


@contextlib.contextmanager
def mounted(folder: Path, *words: str) -> Iterator[None]:
    """A mount for the duration of the block."""
    folder.mkdir(parents=True, exist_ok=True)
    if not sys.platform.startswith("linux") or subprocess.run(["mount", *words, folder], capture_output=True).returncode:
        raise Impossible("may not mount here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def small_disk(folder: Path, size: str) -> contextlib.AbstractContextManager[None]:
    return mounted(folder, "-t", "tmpfs", "-o", f"size={size}", "tmpfs")


def grow(folder: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)


def error_of(world: World, action: Callable[[], object]) -> BaseException | None:
    try:
        action()
    except (world.PriorHubError, OSError) as error:
        return error
    return None


def judge_disk_error(world: World, error: BaseException | None, number: int, *words: str) -> list[str]:
    """An OSError with its number that is one of ours and names the place."""
    if error is None:
        return ["no error"]
    wrong = [] if getattr(error, "errno", None) == number else [f"errno {getattr(error, 'errno', None)} of {error!r}"]
    wrong += [] if isinstance(error, world.PriorHubError) else [f"raw {type(error).__name__}: {error}"]
    return wrong + [f"the error does not say {word!r}: {error}" for word in words if word not in str(error)]


def publish(world: World, prior: object, name: str = REPO) -> None:
    world.hub.repos.clear()
    prior.push_to_hub(name)


def fork_all(actions: list[Callable[[], int]]) -> list[int]:
    """Run each in a process of its own, at once; their exit codes."""
    children = []
    for action in actions:
        child = os.fork()
        if not child:
            code = 99
            try:
                code = action()
            finally:
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


# ------------------------------------------------------------------------------------------------------------------ disk
def full_disk_pull(world: World) -> Finding:
    large = world.random_prior(4, 3, LARGE)
    publish(world, large)
    cache = world.root / "small-cache"
    with small_disk(cache, "96k"):
        error = error_of(world, lambda: world.PriorModel.from_pretrained(REPO, cache_dir=cache))
        wrong = judge_disk_error(world, error, errno.ENOSPC, "cache_dir", REPO)
        left = [p for p in cache.rglob("*") if p.is_file() and not p.is_symlink() and p.stat().st_size > 20_000]
        wrong += [f"a part of a file was left: {left}"] if left else []
        grow(cache)
        found = world.PriorModel.from_pretrained(REPO, cache_dir=cache)
        wrong += [f"after making room: {d}" for d in world.differences(found, large)]
    return "clear error", wrong


def full_disk_save(world: World) -> Finding:
    large = world.random_prior(4, 3, LARGE)
    publish(world, large)
    out = world.root / "small-out"
    with small_disk(out, "96k"):
        world.old.save_pretrained(out)
        prior = world.PriorModel.from_pretrained(REPO, cache_dir=world.cache)
        error = error_of(world, lambda: prior.save_pretrained(out))
        wrong = [] if getattr(error, "errno", None) == errno.ENOSPC else [f"{error!r}"]
        wrong += [] if world.state_of(out) == "old" else [f"the folder holds {world.state_of(out)}"]
        grow(out)
        prior.save_pretrained(out)
        wrong += [f"after making room: {d}" for d in world.differences(world.PriorModel.from_pretrained(out), large)]
    return "clear error", wrong


def full_disk_push(world: World) -> Finding:
    publish(world, world.old)
    large = world.random_prior(4, 3, LARGE)
    before = world.references(REPO, None)
    with small_disk(world.tmp, "96k"):
        error = error_of(world, lambda: large.push_to_hub(REPO))
        wrong = judge_disk_error(world, error, errno.ENOSPC, "TMPDIR", "othing was pushed")
        left = [p.name for p in world.tmp.iterdir()]
        wrong += [f"left behind: {left}"] if left else []
        wrong += [] if world.references(REPO, None) == before else ["something was pushed"]
        grow(world.tmp)
        large.push_to_hub(REPO)
    found = world.PriorModel.from_pretrained(REPO, cache_dir=world.cache)
    return "clear error", wrong + [f"after making room: {d}" for d in world.differences(found, large)]


def read_only(world: World, cached: bool) -> Finding:
    publish(world, world.old)
    cache = world.root / "read-only-cache"
    shutil.rmtree(cache, ignore_errors=True)
    cache.mkdir()
    if cached:
        world.PriorModel.from_pretrained(REPO, cache_dir=cache)
    with mounted(cache, "--bind", str(cache)):
        if subprocess.run(["mount", "-o", "remount,bind,ro", cache], capture_output=True).returncode:
            raise Impossible("may not mount read-only here")
        if cached:
            found = world.PriorModel.from_pretrained(REPO, cache_dir=cache)
            return "from the cache", list(world.differences(found, world.old))
        error = error_of(world, lambda: world.PriorModel.from_pretrained(REPO, cache_dir=cache))
        wrong = judge_disk_error(world, error, errno.EROFS, "cache_dir", REPO)
    return "clear error", wrong


# ------------------------------------------------------------------------------------------------------ the whole connection
def breaks_off(world: World) -> Finding:
    """A large file goes on where it broke off (small ones are fetched anew: the client keeps parts from 10 MiB on)."""
    large = world.random_prior(4, 4, {"w": (1_200_000,)})
    publish(world, large)
    world.hub.clear_log()
    world.hub.add_fault("drop", after_bytes=22 * 2**20, method="GET", path="^/lfs/")
    found = world.PriorModel.from_pretrained(REPO, cache_dir=world.cache)
    ranges = [entry["range"] for entry in world.hub.requests("^/lfs/", method="GET")]
    resumed = len(ranges) == 2 and ranges[1] and ranges[1] != "bytes=0-"
    return "resumed" if resumed else "retried", [f"requests {ranges}"] * (not resumed) + world.differences(found, large)


@contextlib.contextmanager
def offline() -> Iterator[None]:
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False


def is_offline(world: World, cached: bool) -> Finding:
    publish(world, world.old)
    if cached:
        world.PriorModel.from_pretrained(REPO, cache_dir=world.cache)
    world.hub.clear_log()
    with offline():
        if cached:
            found = world.PriorModel.from_pretrained(REPO, cache_dir=world.cache)
            outcome, wrong = "from the cache", list(world.differences(found, world.old))
        else:
            error = error_of(world, lambda: world.PriorModel.from_pretrained(REPO, cache_dir=world.cache))
            outcome, wrong = "clear error", [] if "offline" in str(error).lower() else [f"{error!r}"]
        pushed = error_of(world, lambda: world.new.push_to_hub(REPO))
        wrong += [] if isinstance(pushed, world.PriorHubError) and "offline" in str(pushed).lower() else [f"push: {pushed!r}"]
    wrong += ["there were requests"] if world.hub.requests() else []
    found = world.PriorModel.from_pretrained(REPO, cache_dir=world.cache)
    return outcome, wrong + list(world.differences(found, world.old))


def deleted(world: World) -> Finding:
    """A repository that is gone is said to be gone, and not quietly taken from the cache."""
    publish(world, world.old)
    world.PriorModel.from_pretrained(REPO, cache_dir=world.cache)
    world.hub.repos.clear()
    error = error_of(world, lambda: world.PriorModel.from_pretrained(REPO, cache_dir=world.cache))
    wrong = [] if isinstance(error, world.PriorNotFoundError) and "local_files_only" in str(error) else [f"{error!r}"]
    found = world.PriorModel.from_pretrained(REPO, cache_dir=world.cache, local_files_only=True)
    return "clear error", wrong + list(world.differences(found, world.old))


def silent(world: World) -> Finding:
    """A Hub that takes requests and never answers: nothing hangs, nothing lands, at whatever request it falls silent."""
    from loopback_hub import HungUp

    publish(world, world.old)
    wrong = []
    pull, push = (lambda: world.PriorModel.from_pretrained(REPO, cache_dir=world.cache)), (lambda: world.new.push_to_hub(REPO))
    for action, path in (
        (pull, "/api/models/"),
        (pull, "^/lfs/"),
        (push, "/repos/create"),
        (push, "/preupload/"),
        (push, "/upload/"),
        (push, "/commit/"),
    ):
        gone = threading.Event()

        def nothing(gone: threading.Event = gone) -> None:
            gone.wait(60)
            raise HungUp

        before = world.references(REPO, None)
        world.hub.add_fault("call", function=nothing, path=path, times=-1)
        start = time.monotonic()
        error = error_of(world, action)
        seconds = time.monotonic() - start
        world.hub.clear_faults()
        gone.set()
        world.settle()
        wrong += [] if isinstance(error, world.PriorConnectionError) else [f"{path}: {error!r}"]
        wrong += [] if seconds < 30 else [f"{path}: back after {seconds:.0f} s"]
        wrong += [] if world.references(REPO, None) == before else [f"{path}: something landed"]
        shutil.rmtree(world.cache, ignore_errors=True)
    return "clear error", wrong


# ------------------------------------------------------------------------------------------------------------- processes
def pulled_at_once(world: World, processes: int) -> Finding:
    publish(world, world.old)
    world.hub.clear_log()

    def pull() -> int:
        return len(world.differences(world.PriorModel.from_pretrained(REPO, cache_dir=world.cache), world.old))

    codes = fork_all([pull] * processes)
    wrong = [f"exit codes {codes}"] if any(codes) else []
    found = world.PriorModel.from_pretrained(REPO, cache_dir=world.cache, local_files_only=True)
    left = [p.name for p in world.cache.rglob("*.incomplete")]
    wrong += [f"left: {left}"] if left else []
    return "done", wrong + list(world.differences(found, world.old))


def pushed_at_once(world: World) -> Finding:
    """Two different priors: whoever comes second is told, or lands after the first; ten times."""
    wrong, told = [], 0
    for _ in range(10):
        publish(world, world.old)

        def push(prior: object) -> int:
            try:
                prior.push_to_hub(REPO)
            except world.PriorHubError as error:
                return 3 if "somebody else pushed" in str(error) and "push again" in str(error) else 4
            return 0

        codes = fork_all([lambda: push(world.new), lambda: push(world.theirs)])
        told += codes.count(3)
        states = world.references(REPO, None)["refs/heads/main"]
        wrong += [] if set(codes) <= {0, 3} and 0 in codes else [f"exit codes {codes}"]
        wrong += [f"the history has {s}" for s in states if s not in ("old", "new", "theirs", "none")]
        landed = {name for name, code in (("new", codes[0]), ("theirs", codes[1])) if code == 0}
        wrong += [] if landed == set(states) - {"old", "none"} else [f"{landed} reported success, the history has {states}"]
    return "clear error" if told else "done", wrong


def folders_of_pushes(world: World) -> Finding:
    """The folder of a push that is under way stays, that of one whose process is gone goes."""
    publish(world, world.old)
    ready = world.root / "ready"
    ready.unlink(missing_ok=True)

    def wait() -> int:
        with world.push_folder(1000) as folder:
            (folder / "file").write_text("x")
            ready.touch()
            time.sleep(60)
        return 0

    child = os.fork()
    if not child:
        os._exit(wait())
    while not ready.exists():
        time.sleep(0.01)
    world.new.push_to_hub(REPO)
    alive = [p.read_text() for p in world.tmp.glob("prior-hub-push-*/prior/file")]
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    world.old.push_to_hub(REPO)
    left = [p.name for p in world.tmp.glob("prior-hub-*")]
    wrong = [] if alive == ["x"] else ["the folder of a push under way was removed"]
    return "done", wrong + ([f"left: {left}"] if left else [])


SCENARIOS: dict[str, Callable[[World], Finding]] = {
    "pull, disk full": full_disk_pull,
    "save, disk full": full_disk_save,
    "push, disk full": full_disk_push,
    "pull, read-only cache, cached copy": lambda world: read_only(world, True),
    "pull, read-only cache, no copy": lambda world: read_only(world, False),
    "pull and push, offline, cached copy": lambda world: is_offline(world, True),
    "pull and push, offline, no copy": lambda world: is_offline(world, False),
    "pull, a large file that breaks off": breaks_off,
    "pull, repository deleted, cached copy": deleted,
    "pull and push, the Hub never answers": silent,
    "pull, two processes at once": lambda world: pulled_at_once(world, 2),
    "pull, four processes at once": lambda world: pulled_at_once(world, 4),
    "push, two different priors at once": pushed_at_once,
    "push, folders of other pushes": folders_of_pushes,
}
