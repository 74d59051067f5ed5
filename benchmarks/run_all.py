"""Run the benchmarks one after the other, keep their figures and write RESULTS.md.

    make bench                                             # all, in turn
    python benchmarks/run_all.py --only penalty growth     # some; RESULTS.md keeps the others' last figures
    python benchmarks/run_all.py --quick                   # do they run? Nothing is kept
    python benchmarks/run_all.py --only none               # RESULTS.md again from the figures that are there
    BENCH_ALL=1 make bench                                 # with those that need half an hour or 40 GB of disk

Figures are kept in results/MACHINE-KIND/NAME.json, so that those of a GPU and of a CPU stand side by side; RESULTS.md is made
of all that are there. A benchmark that fails is shown as failed, the others go on, and the exit code is 1. Why a claim is not
met is said by the benchmark, or in reasons.toml.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


@dataclass
class Benchmark:
    """A file beside this one."""

    name: str
    device: bool = False  # whether it takes --device
    long: bool = False  # only with BENCH_ALL=1, or by name


BENCHMARKS = (
    Benchmark("penalty", device=True),
    Benchmark("bandwidth", device=True),
    Benchmark("growth", device=True),
    Benchmark("trainer_step", device=True),
    Benchmark("swag_snapshot", device=True),
    Benchmark("load"),
    Benchmark("sharded"),
    Benchmark("billion", long=True),
    Benchmark("prior_update", long=True),
    Benchmark("samplers", long=True),
)


def main() -> int:
    """Run, write, and say what failed."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [one.name for one in BENCHMARKS]
    made.add_argument("--only", nargs="+", choices=[*names, "none"], metavar="NAME", help=f"of {', '.join(names)}; none")
    made.add_argument("--quick", action="store_true", help="small sizes; nothing is kept")
    made.add_argument(
        "--device", choices=("cpu", "cuda"), help="for those that can run on both (default: cuda if there is one)"
    )
    made.add_argument("--threads", type=int, help="threads of torch (default: as many as torch takes here)")
    made.add_argument("--timeout", type=float, default=3600, help="seconds for each (default: %(default)s)")
    given = made.parse_args()
    everything = bool(os.environ.get("BENCH_ALL"))
    failed, began = [], time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results" if given.quick else HERE / "results"
        for one in BENCHMARKS:
            if given.only is not None and one.name not in given.only:
                continue
            if not (HERE / f"{one.name}.py").exists():
                print(f"== {one.name}: there is no such file", flush=True)
                continue
            if given.only is None and one.long and not everything:
                print(f"== {one.name}: left out, it is long (BENCH_ALL=1 runs it)", flush=True)
                continue
            if not run(one, given, results):
                failed.append(one.name)
        if not given.quick:
            (HERE / "RESULTS.md").write_text(report(read(results)))
    print(f"\n== {time.monotonic() - began:.0f} s in all" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def run(one: Benchmark, given: argparse.Namespace, results: Path) -> bool:
    """Run one and keep its figures under its machine's kind; whether it worked."""
    options = ["--quick"] if given.quick else []
    for key in ("device", "threads") if one.device else ("threads",):
        if (value := getattr(given, key)) is not None:
            options.append(f"--{key}={value}")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]).rstrip(":")}
    print(f"\n== {one.name}", flush=True)
    began, lines = time.monotonic(), deque[str](maxlen=15)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        command = [sys.executable, str(HERE / f"{one.name}.py"), *options]
        code = watched([*command, "--json", str(file)], environment, lines, given.timeout)
        print(f"== {one.name}: {time.monotonic() - began:.0f} s", flush=True)
        if code == 0 and file.exists():
            found = json.loads(file.read_text())
            kind = found["machine"]["kind"]
        else:
            from common import machine  # here: it imports torch

            here = machine(given.device if one.device else None)
            why = f"exit code {code}" if code else "it wrote no figures"
            shown = shlex.join(["python", f"benchmarks/{one.name}.py", *options])
            found = {"benchmark": one.name, "failed": f"{why}\n{''.join(lines)}", "command": shown, "machine": here}
            kind = here["kind"]
        (results / kind).mkdir(parents=True, exist_ok=True)
        (results / kind / f"{one.name}.json").write_text(json.dumps(found, indent=1) + "\n")
    return "failed" not in found


def watched(command: Sequence[str], environment: dict[str, str], lines: deque[str], limit: float) -> int | str:
    """Run a command, show what it prints and keep its last lines; its exit code, or what stopped it."""
    with subprocess.Popen(
        command,
        cwd=HERE.parent,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as process:

        def stop() -> None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with the processes it has started, which hold its output open

        timer = threading.Timer(limit, stop)
        timer.start()
        assert process.stdout is not None
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                lines.append(line)
            code = process.wait()
        except BaseException:  # Ctrl-C goes to our own processes only
            stop()
            raise
        finally:
            late = not timer.is_alive()
            timer.cancel()
    return f"none, stopped after {limit:.0f} s" if late else code


# ---------------------------------------------------------------------------------------------------------- RESULTS.md


def read(results: Path) -> list[dict[str, Any]]:
    """All figures there are, in the order of the benchmarks and then of the machines."""
    order = {one.name: i for i, one in enumerate(BENCHMARKS)}
    found = [json.loads(file.read_text()) for file in sorted(results.glob("*/*.json"))]
    return sorted(found, key=lambda one: (order.get(one["benchmark"], len(order)), one["machine"]["kind"]))


def report(found: list[dict[str, Any]], reasons: Path = HERE / "reasons.toml") -> str:
    """The text of RESULTS.md."""
    from common import table

    why = tomllib.loads(reasons.read_text()).get("reason", []) if reasons.exists() else []
    parts = [
        "# Results",
        "Written by `make bench` (benchmarks/run_all.py) from benchmarks/results/: change those, not this. Ratios are of "
        "medians of methods taken in turns in one run. What a benchmark does and what its columns mean: "
        "`python benchmarks/NAME.py --help`.",
        "## What was claimed, and what was measured",
    ]
    rows = [line for one in found for line in claim_rows(one, why)]
    parts.append(table(rows) if rows else "Nothing was measured yet.")
    shown = None
    for one in found:
        if one["benchmark"] != shown:
            shown = one["benchmark"]
            parts.append(f"## {shown}")
            if "claim" in one:
                parts.append(one["claim"][0].upper() + one["claim"][1:] + ".")
        parts.append(f"### {place(one['machine'])}\n\n{settings(one)}")
        if "failed" in one:
            parts.append(f"**Failed**: {one['failed'].strip().splitlines()[0]}\n\n```\n{one['failed'].strip()}\n```")
            continue
        parts.append(table(one["rows"]))
        parts += one.get("notes", [])
    return "\n\n".join(parts) + "\n"


def claim_rows(one: dict[str, Any], why: list[dict[str, str]]) -> list[dict[str, Any]]:
    """A row for each claim of one benchmark on one machine."""
    kind, name = one["machine"]["kind"], one["benchmark"]
    if "failed" in one:
        return [{"benchmark": name, "claim": "all", "machine": kind, "measured": "", "verdict": "the benchmark failed"}]
    rows = []
    for claim in one.get("claims", []):
        verdict = {True: "met", False: "**not met**", None: "not measured here"}[claim["met"]]
        reason = claim.get("why") or "; ".join(
            known["why"]
            for known in why
            if known["benchmark"] == name and known.get("machine", kind) == kind and known["claim"] in claim["claim"]
        )
        if claim["met"] is not True and reason:
            verdict += f": {reason}"
        row = {"benchmark": name, "claim": claim["claim"], "machine": kind, "measured": claim["measured"], "verdict": verdict}
        rows.append({key: str(value).replace("|", "\\|") for key, value in row.items()})
    return rows


def place(machine: dict[str, Any]) -> str:
    """The machine in words."""
    return machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores"


def settings(one: dict[str, Any]) -> str:
    """What a reader needs to do it again."""
    machine = one["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"`{one['command']}`, {machine['date']}, {machine['threads']} threads, {machine['memory_gb']:.0f} GB, "
        f"{machine['system']}, Python {machine['python']}, {versions}"
    )


if __name__ == "__main__":
    sys.exit(main())
