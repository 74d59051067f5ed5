"""Saving survives everything: a process killed or failing at any point, a full disk, readers and other writers meanwhile.

Run as a script this file is the experiment: it imports torch once, then forks one child per point of death and prints
what it found as JSON. The tests judge. Points of death are the audit events of the file system (open, rename, link,
remove, mkdir, listdir, ...): SIGKILL comes before the n-th, for every n until the save completes.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from priors_for_tests import differences, random_prior, tensors_of

from prior_hub.errors import PriorHubError, PriorNotFoundError
from prior_hub.model import PriorModel
from prior_hub.priors import storage

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks one process per point of death")

FOREIGN = {"model.safetensors": b"weights of a model", "config.json": b'{"model_type": "tiny"}', "notes/a.txt": b"notes",
           "checkpoint-10/prior_config.json": b"{}", "checkpoint-10/prior.safetensors": b"x", "priority.txt": b"1"}  # fmt: skip
PERSON = "A person wrote this."
SHARDS = {"max_shard_size": 200}
# name -> (the old prior and how it was saved, how the new one is saved, foreign files beside it)
CASES: dict[str, tuple[tuple[int, dict] | None, int, dict, bool]] = {
    "first save": (None, 3, {}, False),
    "one file over one": ((3, {}), 3, {}, False),
    "one file over shards": ((3, SHARDS), 3, {}, False),
    "shards of another rank over one file": ((3, {}), 2, SHARDS, False),
    "fewer shards over more, beside other files": ((20, SHARDS), 2, SHARDS, True),
}
OLD_SEED, NEW_SEED, NEXT_SEED = 1, 2, 3
EVENTS = ("open", "os.", "shutil.", "fcntl.", "tempfile.", "test.")


# ------------------------------------------------------------------------------------------------------- the experiment
class Hook:
    """An audit hook that acts before the n-th event of the file system once it is armed; it cannot be taken off again."""

    def __init__(self) -> None:
        self.left = -1
        self.action: Callable[[], None] = lambda: None
        sys.addaudithook(self)

    def __call__(self, event: str, _: tuple) -> None:
        if self.left > 0 and event.startswith(EVENTS):
            self.left -= 1
            if self.left == 0:
                self.action()

    def arm(self, count: int, action: Callable[[], None]) -> None:
        self.left, self.action = count, action


HOOK: Hook | None = None


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise OSError(errno.EIO, "injected")


def save_in_halves() -> None:
    """Writing makes no events: make one in the middle of each file."""
    real = storage.write_file

    def halves(path: Path, *args: Any, **kwargs: Any) -> str:
        digest = real(path, *args, **kwargs)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        sys.audit("test.half_written")
        path.write_bytes(content)
        return digest

    storage.write_file = halves


def forked(action: Callable[[], Any]) -> int:
    """Run `action` in a child; its exit code, or minus the signal that killed it."""
    child = os.fork()
    if not child:
        code = 99
        try:
            code = int(action() or 0)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Case:
    """One row of CASES, with what must hold in its folder afterwards."""

    def __init__(self, name: str, root: Path) -> None:
        before, rank, self.options, self.foreign = CASES[name]
        self.base, self.work = root / "base", root / "work"
        shutil.rmtree(root, ignore_errors=True)
        self.base.mkdir(parents=True)
        self.old = None
        if before:
            self.old = random_prior(OLD_SEED, before[0])
            self.old.save_pretrained(self.base, **before[1])
            (self.base / "README.md").write_text((self.base / "README.md").read_text() + PERSON)
        self.new, self.next = random_prior(NEW_SEED, rank), random_prior(NEXT_SEED, 1)
        for path, content in FOREIGN.items() if self.foreign else ():
            (self.base / path).parent.mkdir(exist_ok=True)
            (self.base / path).write_bytes(content)

    def reset(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.base, self.work)

    def save(self, prior: PriorModel | None = None) -> None:
        (prior or self.new).save_pretrained(self.work, **self.options)

    def killed(self, point: int, action: Callable[[], None] = die, prior: PriorModel | None = None) -> int:
        """Save in a child in which `action` happens at `point`; 0 if the save went through, 3 if it raised OSError."""

        def attempt() -> int:
            save_in_halves()
            HOOK.arm(point, action)
            try:
                self.save(prior)
            except OSError:
                return 3
            return 0 if HOOK.left > 0 or action is fail else 4

        return forked(attempt)

    def state(self, *also: PriorModel) -> str:
        """Which prior the folder holds: "old", "new", "none", "also", or what is wrong with it."""
        try:
            found = PriorModel.from_pretrained(self.work)
        except PriorNotFoundError:
            return "none"
        except (PriorHubError, OSError) as error:
            return f"{type(error).__name__}: {error}"
        for name, prior in (("old", self.old), ("new", self.new), *(("also", p) for p in also)):
            if prior is not None and not differences(found, prior):
                return name
        return "a mixture"

    def faults(self) -> Iterator[str]:
        """What is wrong after the next save, which nobody disturbs."""
        if self.foreign:
            yield from (f"{p} changed" for p, c in FOREIGN.items() if (self.work / p).read_bytes() != c)
        self.next.save_pretrained(self.work)
        if differences(PriorModel.from_pretrained(self.work), self.next):
            yield "the next save did not take"
        names = {path.relative_to(self.work).as_posix() for path in self.work.rglob("*") if not path.is_dir()}
        wanted = {"prior_config.json", "prior.safetensors", "README.md", *(FOREIGN if self.foreign else ())}
        if names != wanted:
            yield f"left over or missing after the next save: {sorted(names ^ wanted)}"
        if self.old and not (self.work / "README.md").read_text().endswith(PERSON):
            yield "a person's text is gone from the card"
        if self.foreign:
            yield from (f"{p} changed by the next save" for p, c in FOREIGN.items() if (self.work / p).read_bytes() != c)


def every_point(case: Case, action: Callable[[], None]) -> dict[str, Any]:
    """Let `action` happen at every point of a save in turn."""
    states: Counter[str] = Counter()
    wrong: list[str] = []
    rolling = []
    for point in range(1, 2000):
        case.reset()
        code = case.killed(point, action)
        state = case.state()
        states[state] += 1
        if code == 0 and action is die:
            wrong += [] if state == "new" else [f"point {point}: complete, but {state}"]
            break
        if code not in ((-signal.SIGKILL,) if action is die else (0, 3)):
            wrong.append(f"point {point}: exit code {code}")
        if state not in ("new", "old" if case.old else "none"):
            wrong.append(f"point {point}: {state}")
        if action is fail and code == 0 and state != "new":
            wrong.append(f"point {point}: the save reported success, but {state}")
        if action is fail and state != "new" and [p.name for p in case.work.glob(".prior-*")]:
            wrong.append(f"point {point}: the failed save left {[p.name for p in case.work.glob('.prior-*')]}")
        if (case.work / storage.COMMIT_NAME).exists():
            rolling.append(point)
        wrong += [f"point {point}: {fault}" for fault in case.faults()]
        if action is fail and code == 0 and point > 40 and not undisturbed(case, point):
            break
    else:
        wrong.append("the save never came to its end")
    return {"points": point, "states": dict(states), "wrong": wrong, "rolling": rolling}


def undisturbed(case: Case, point: int) -> bool:
    """Whether a save has a `point`-th event at all."""
    case.reset()
    return case.killed(point, die) != 0


def two_crashes(case: Case, rolling: list[int], pairs: int) -> dict[str, Any]:
    """Kill a save while it moves its files, then kill the save after it anywhere."""
    choose = random.Random(0)
    states: Counter[str] = Counter()
    wrong = []
    second = random_prior(NEXT_SEED + 1, 2)
    for _ in range(pairs):
        points = choose.choice(rolling), choose.randint(1, 90)
        case.reset()
        case.killed(points[0])
        case.killed(points[1], prior=second)
        state = case.state(second)
        states[state] += 1
        if state not in ("new", "also"):  # the first save had become current
            wrong.append(f"points {points}: {state}")
        wrong += [f"points {points}: {fault}" for fault in case.faults()]
    return {"states": dict(states), "wrong": wrong}


def disk_full(case: Case) -> dict[str, Any]:
    """No file may grow beyond a limit, for limits around the sizes of the files a save makes."""
    case.reset()
    case.save()
    sizes = sorted({path.stat().st_size for path in case.work.iterdir() if path.is_file()})
    states: Counter[str] = Counter()
    wrong = []
    for limit in sorted({0, 1, 100, *(size - 1 for size in sizes), *sizes}):

        def attempt(limit: int = limit) -> int:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            try:
                case.save()
            except OSError as error:
                return 3 if error.errno == errno.EFBIG else 5
            return 0

        case.reset()
        code, state = forked(attempt), case.state()
        states[state] += 1
        if (code, state) != ((0, "new") if limit >= sizes[-1] else (3, "old")):
            wrong.append(f"limit {limit}: exit code {code}, {state}")
        if left := [path.name for path in case.work.glob(".prior-*")]:
            wrong.append(f"limit {limit}: left {left}")
        wrong += [f"limit {limit}: {fault}" for fault in case.faults()]
    return {"states": dict(states), "wrong": wrong}


def read_only(case: Case) -> dict[str, Any]:
    """Save into a folder that belongs to somebody else (root, if that is who runs this: a child becomes nobody)."""
    case.reset()
    before = {path.name: path.read_bytes() for path in case.work.iterdir()}

    def attempt() -> int:
        if os.geteuid() == 0:
            os.setegid(65534)
            os.seteuid(65534)
        else:
            case.work.chmod(0o555)
        try:
            case.save()
        except PermissionError:
            return 3 if case.state() == "old" else 5
        return 0

    code = forked(attempt)
    case.work.chmod(0o755)
    same = before == {path.name: path.read_bytes() for path in case.work.iterdir()}
    return {"wrong": [] if code == 3 and same else [f"exit code {code}, files the same: {same}"]}


def reader_meanwhile(case: Case, verify: bool, reads: int) -> dict[str, Any]:
    """Read in a tight loop while another process saves two priors of the same shapes in turn."""
    one, other = random_prior(OLD_SEED, 3), random_prior(NEW_SEED, 3)
    shutil.rmtree(case.work, ignore_errors=True)
    one.save_pretrained(case.work)

    def save_for_ever() -> None:
        saves = 0
        while not (case.work.parent / "stop").exists():
            prior = (other, one)[saves % 2]
            storage.write_prior(case.work, prior.config, tensors_of(prior), max_shard_size=(10**9, 200)[saves // 2 % 2])
            saves += 1
            time.sleep(0.001 * (saves % 3))

    states: Counter[str] = Counter()
    writer = os.fork()
    if not writer:
        with contextlib.suppress(BaseException):
            save_for_ever()
        os._exit(0)
    try:
        case.old, case.new = one, other
        moments = set()
        for _ in range(reads):
            try:
                found = PriorModel.from_pretrained(case.work, verify=verify)
                same = [n for n, prior in (("old", one), ("new", other)) if not differences(found, prior)]
                states[same[0] if same else "a mixture"] += 1
            except (PriorHubError, OSError) as error:
                states[f"{type(error).__name__}: {str(error)[:300]}"] += 1
            with contextlib.suppress(OSError):
                moments.add((case.work / "prior_config.json").stat().st_mtime_ns)
    finally:
        (case.work.parent / "stop").touch()
        os.waitpid(writer, 0)
        (case.work.parent / "stop").unlink()
    return {"states": dict(states), "saves": len(moments)}


def writers_at_once(case: Case) -> dict[str, Any]:
    """Four processes save five times each."""
    case.reset()
    priors = [random_prior(10 + i, i) for i in range(4)]
    children = []
    for prior in priors:
        child = os.fork()
        if not child:
            try:
                for i in range(5):
                    prior.save_pretrained(case.work, max_shard_size=(200, 10**9)[i % 2])
            finally:
                os._exit(1 if sys.exc_info()[0] else 0)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    state = case.state(*priors)
    return {"wrong": [] if codes == [0] * 4 and state == "also" else [f"{codes} {state}"], "left": list(case.faults())}


def experiment(root: Path) -> dict[str, Any]:
    global HOOK
    import torch

    torch.set_num_threads(1)  # the children fork without a pool of threads
    HOOK = Hook()
    result: dict[str, Any] = {}
    for name in CASES:
        result[name] = every_point(Case(name, root), die)
    failing = "fewer shards over more, beside other files"
    result["failing"] = every_point(Case(failing, root), fail)
    result["two crashes"] = two_crashes(Case(failing, root), result[failing]["rolling"], 40)
    one = Case("one file over one", root)
    result["disk full"] = disk_full(one)
    result["read only"] = read_only(one)
    result["writers"] = writers_at_once(one)
    result["readers"] = reader_meanwhile(one, True, 400)
    result["lazy readers"] = reader_meanwhile(one, False, 600)
    return result


# ------------------------------------------------------------------------------------------------------------- the tests
@pytest.fixture(scope="module")
def found() -> Iterator[dict[str, Any]]:
    """The result of the experiment, in a process without other threads."""
    memory = Path("/dev/shm")  # files there cost no wear and no waiting for fsync
    with tempfile.TemporaryDirectory(prefix="prior-crash-", dir=memory if os.access(memory, os.W_OK) else None) as root:
        Path(root).chmod(0o755)
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        command = [sys.executable, __file__, f"{root}/x"]
        run = subprocess.run(command, env=os.environ | threads, capture_output=True, text=True, timeout=400)
        assert run.returncode == 0, run.stderr[-3000:]
        yield json.loads(run.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_save_killed_at_any_point_leaves_the_old_prior_or_the_new_and_the_next_save_tidies_up(found, case):
    result = found[case]
    assert result["wrong"] == []
    before = "old" if CASES[case][0] else "none"
    assert result["states"].keys() == {before, "new"}
    assert min(result["states"].values()) >= 15, "there are points on both sides of the moment it becomes current"
    assert result["points"] >= 35
    assert result["rolling"], "some points lie between the moment the new prior is current and its files being in place"


@pytest.mark.slow
def test_a_save_in_which_any_one_operation_fails_leaves_the_old_prior_or_the_new_and_says_so(found):
    result = found["failing"]
    assert result["wrong"] == []
    assert result["states"].keys() == {"old", "new"}


@pytest.mark.slow
def test_a_crash_during_the_recovery_from_a_crash_loses_nothing_either(found):
    result = found["two crashes"]
    assert result["wrong"] == []
    assert result["states"].keys() == {"new", "also"}


@pytest.mark.slow
def test_a_full_disk_is_an_os_error_with_its_number_and_the_old_prior_stays(found):
    result = found["disk full"]
    assert result["wrong"] == []
    assert result["states"]["old"] >= 5


@pytest.mark.slow
def test_a_folder_one_may_not_write_to_is_a_permission_error_and_the_prior_in_it_stays(found):
    assert found["read only"]["wrong"] == []


@pytest.mark.slow
def test_processes_that_save_into_one_folder_take_turns(found):
    assert found["writers"] == {"wrong": [], "left": []}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["readers", "lazy readers"])
def test_a_reader_never_sees_a_mixture_or_an_error_while_another_process_saves(found, kind):
    result = found[kind]
    assert result["states"].keys() == {"old", "new"}, result
    assert result["saves"] >= 20


def test_everything_is_on_the_disk_before_the_new_prior_becomes_current(tmp_path, monkeypatch):
    """What SIGKILL cannot show, a power cut would: the order of fsync and rename."""
    random_prior(OLD_SEED).save_pretrained(tmp_path)
    log: list[tuple[str, str]] = []
    fsync, rename = os.fsync, Path.rename

    def logged_fsync(handle: int) -> None:
        log.append(("sync", os.path.realpath(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def logged_rename(self: Path, target: Path) -> Path:
        if Path(target).name == storage.COMMIT_NAME:
            log.append(("commit", str(self)))
            log.append(("files", ",".join(sorted(str(path) for path in self.iterdir()))))
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(Path, "rename", logged_rename)
    random_prior(NEW_SEED).save_pretrained(tmp_path, **SHARDS)
    when = [kind for kind, _ in log].index("commit")
    staging, files = log[when][1], log[when + 1][1].split(",")
    before = [path for kind, path in log[:when] if kind == "sync"]
    assert len(files) >= 5
    assert sorted(before) == sorted([*files, staging])
    assert before[-1] == staging
    assert log[when + 2 :] == [("sync", str(tmp_path))] * 2  # the rename itself, then the files in their places


def test_a_full_file_system_is_an_os_error_too(tmp_path):
    (mount := tmp_path / "small").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", mount], capture_output=True).returncode:
        pytest.skip("may not mount a small file system here")
    try:
        old = random_prior(OLD_SEED)
        old.save_pretrained(mount)
        for name, shards in (("one file", {}), ("many", {"max_shard_size": 10_000})):
            large = random_prior(NEW_SEED, 40, {"w": (200,), "v": (50,)})
            with pytest.raises(OSError, match="No space left") as caught:
                large.save_pretrained(mount, **shards)
            assert caught.value.errno == errno.ENOSPC, name
            assert differences(PriorModel.from_pretrained(mount), old) == []
            assert sorted(p.name for p in mount.iterdir()) == ["README.md", "prior.safetensors", "prior_config.json"]
    finally:
        subprocess.run(["umount", mount], check=True)


if __name__ == "__main__":
    print(json.dumps(experiment(Path(sys.argv[1]))))
