"""Reads hostile priors in a process of its own: python worker_hostile.py LIST RESULTS.

LIST is a JSON list of folders. For each, and each way to read it, a line of JSON goes to RESULTS: the error, its text, the
seconds, and how much memory was taken beyond what the process had before, at its highest.
"""

from __future__ import annotations

import contextlib
import io
import json
import signal
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from prior_hub.cli import main
from prior_hub.model import PriorModel

PATIENCE = 20  # seconds; the alarm ends what hangs


def status(key: str) -> int:
    """Bytes of a line of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


def command(*arguments: str) -> None:
    """A command, whose refusal is raised as (kind, text)."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        code = main([*arguments, "--json"])
    if code:
        told = json.loads(out.getvalue())
        raise SystemExit(f"{code} {told['error']} {told['message']}")


def attempt(read: Callable[[], object]) -> dict[str, Any]:
    """What came of it."""
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident size counts from now
    before, start = status("VmRSS"), time.process_time()
    signal.alarm(PATIENCE)
    kind = message = ""
    try:
        read()
    except SystemExit as error:
        _, kind, message = str(error).split(" ", 2)
    except BaseException as error:  # noqa: BLE001 (whatever it is, it is reported)
        kind, message = type(error).__name__, str(error)
    signal.alarm(0)
    seconds = time.process_time() - start  # of work: the machine may be busy with other things
    return {"kind": kind, "message": message, "seconds": seconds, "bytes": max(0, status("VmHWM") - before)}


def hangs(*_: object) -> None:
    raise TimeoutError("it hangs")


if __name__ == "__main__":
    signal.signal(signal.SIGALRM, hangs)
    warnings.simplefilter("ignore")
    with Path(sys.argv[2]).open("w", buffering=1) as results:
        for folder in json.loads(Path(sys.argv[1]).read_text()):
            ways: dict[str, Callable[[], object]] = {
                "verified": partial(PriorModel.from_pretrained, folder),
                "unverified": partial(PriorModel.from_pretrained, folder, verify=False),
                "check": partial(command, "check", folder),
                "info": partial(command, "info", folder),
            }
            for way, read in ways.items():
                print(json.dumps({"folder": folder, "way": way, **attempt(read)}), file=results)
