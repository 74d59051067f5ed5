"""What the benchmarks share: the machine, times taken in turns, peak memory of a new process, a table, a JSON file.

A benchmark is one file with one claim:

    from common import finish, median_times, options, parser

    def main() -> None:
        given = options(parser(__doc__))                       # --quick, --json, --threads, --repeats
        seconds = median_times({"ours": ours, "theirs": theirs}, given.repeats)
        rows = [{"method": name, "ms": 1e3 * value} for name, value in seconds.items()]
        finish("name", "ours is at least twice as fast", rows, given.json,
               claims=[{"claim": "ours is twice as fast", "measured": f"{ratio:.2f} x", "met": ratio >= 2}])

Rows are dictionaries from column (with its unit) to a number, a text or None; a row with "table": "title" belongs to the
table of that title. A claim holds "claim", "measured" (texts), "met" (True, False, or None where this machine cannot tell)
and, where it is not met, "why".
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import math
import multiprocessing
import os
import platform
import re
import shlex
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import timer  # seconds, after the accelerator has finished

Row = dict[str, Any]
PACKAGES = ("prior-hub", "torch", "transformers", "accelerate", "safetensors", "timm", "numpy")

# ------------------------------------------------------------------------------------------------------- command line


def parser(doc: str | None, *, repeats: int = 7, devices: bool = False) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has (`devices`: and --device); `doc` is shown by --help as it stands."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="small sizes, a few seconds: shows that it runs, no figures to keep")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    made.add_argument("--threads", type=int, help="threads of torch (default: as many as torch takes here)")
    if devices:
        best = "cuda" if torch.cuda.is_available() else "cpu"
        made.add_argument("--device", choices=("cpu", "cuda"), default=best, help="default: %(default)s")
    made.add_argument("--repeats", type=int, default=repeats, help="medians are of so many (default: %(default)s)")
    return made


def options(made: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The parsed command line, with the threads set; --quick lowers the repeats to 2 unless they are given."""
    found = made.parse_args(argv)
    if found.threads is not None:
        if found.threads < 1:
            made.error(f"--threads is {found.threads}, expected 1 or more")
        torch.set_num_threads(found.threads)
    if found.repeats < 1:
        made.error(f"--repeats is {found.repeats}, expected 1 or more")
    if found.quick and found.repeats == made.get_default("repeats"):
        found.repeats = min(2, found.repeats)
    return found


# -------------------------------------------------------------------------------------------------------------- machine


def machine(device: str | None = None) -> dict[str, Any]:
    """Kind (a folder's name), CPU, cores, threads, memory, GPU, versions, UTC date.

    Without a `device` the kind is the GPU's if there is one; what ran on "cpu" beside a GPU is of the CPU's kind.
    """
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() and device != "cpu" else None
    cpu, cores = _cpu(), os.cpu_count() or 1
    kind = gpu or f"{cpu} {cores} cores"
    return {
        "kind": re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-"),
        "cpu": cpu,
        "cores": cores,
        "threads": torch.get_num_threads(),
        "memory_gb": round(_meminfo("MemTotal") / 1e9, 1),
        "gpu": gpu,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def available_memory() -> int:
    """Bytes that a process can take without swapping (Linux's MemAvailable); 0 where that is not known."""
    return _meminfo("MemAvailable")


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _meminfo(field: str) -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), 0)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


# ----------------------------------------------------------------------------------------------------------------- time


def times(
    methods: Mapping[str, Callable[[], Any]], repeats: int, *, warm_up: int = 1, at_least: float = 0.0
) -> dict[str, list[float]]:
    """Seconds per call of each method, taken in turns, so that what disturbs the machine disturbs all alike.

    Args:
        methods: name -> what to call.
        repeats: how many times each is taken.
        warm_up: calls before that, untimed.
        at_least: one time is the mean over as many calls as last so many seconds together (for very short methods).
    """
    for _ in range(warm_up):
        for method in methods.values():
            method()
    calls = dict.fromkeys(methods, 1)
    if at_least:
        for name, method in methods.items():
            calls[name] = max(1, math.ceil(at_least / max(_seconds(method, 1), 1e-9)))
    found: dict[str, list[float]] = {name: [] for name in methods}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(repeats):
            for name, method in methods.items():
                found[name].append(_seconds(method, calls[name]))
            gc.collect()
    finally:
        if collecting:
            gc.enable()
    return found


def median_times(methods: Mapping[str, Callable[[], Any]], repeats: int, **settings: Any) -> dict[str, float]:
    """The medians of `times`, seconds."""
    return {name: statistics.median(values) for name, values in times(methods, repeats, **settings).items()}


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The quartiles of a sample; three times the value of a sample of one."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def _seconds(method: Callable[[], Any], calls: int) -> float:
    start = timer()
    for _ in range(calls):
        method()
    return (timer() - start) / calls


# --------------------------------------------------------------------------------------------------------------- memory


def peak_memory(
    method: Callable[..., Any], prepare: Callable[[], Any] | None = None, *, anonymous: bool = False, threads: int | None = None
) -> int:
    """Bytes that a call holds at its peak over what its process held before; the call is made in a new process.

    Both functions go to that process by name: functions of a module's top level, or `functools.partial` of such. Linux only.

    Args:
        method: called as `method()`, or `method(prepare())` if there is a `prepare`, whose memory does not count.
        prepare: makes what is given to `method`.
        anonymous: leave out pages of mapped files (sampled every millisecond, so that shorter peaks are missed). Otherwise
            it is the kernel's own high-water mark, which counts those that were touched.
        threads: of torch in that process (default: as many as here).

    Raises:
        concurrent.futures.process.BrokenProcessPool: the process was killed, mostly for want of memory.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak_here, method, prepare, anonymous, threads or torch.get_num_threads()).result()


def peak_device_memory(method: Callable[[], Any]) -> int:
    """Bytes that a call holds on the CUDA device at its peak over what was held before, by torch's allocator."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    method()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def resident(field: str = "VmRSS") -> int:
    """Bytes of this process: VmRSS (in memory now), VmHWM (its maximum), RssAnon (without mapped files)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def _peak_here(method: Callable[..., Any], prepare: Callable[[], Any] | None, anonymous: bool, threads: int) -> int:
    torch.set_num_threads(threads)
    arguments = () if prepare is None else (prepare(),)
    gc.collect()
    if anonymous:
        return _sampled_peak(method, arguments)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    before = resident()
    kept = method(*arguments)
    peak = resident("VmHWM") - before
    del kept
    return max(0, peak)


def _sampled_peak(method: Callable[..., Any], arguments: tuple[Any, ...]) -> int:
    before = highest = resident("RssAnon")
    done = threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.is_set():
            highest = max(highest, resident("RssAnon"))
            time.sleep(1e-3)

    watching = threading.Thread(target=watch)
    watching.start()
    kept = method(*arguments)
    done.set()
    watching.join()
    highest = max(highest, resident("RssAnon"))
    del kept
    return highest - before


# --------------------------------------------------------------------------------------------------------------- output


def number(value: Any) -> str:
    """A cell of a table: three significant digits, whole numbers in full, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if value == 0 or not math.isfinite(value):
            return f"{value:g}"
        digits = 2 - math.floor(math.log10(abs(value)))
        if 0 <= digits <= 5:
            return f"{value:.{digits}f}"
        return f"{value:,.0f}" if -5 <= digits < 0 else f"{value:.1e}"
    return str(value)


def table(rows: Sequence[Row]) -> str:
    """A Markdown table, or several under their titles; the columns in the order in which the rows first name them."""
    titles = list(dict.fromkeys(row.get("table") for row in rows))
    told = []
    for title in titles:
        own = [{k: v for k, v in row.items() if k != "table"} for row in rows if row.get("table") == title]
        columns = list(dict.fromkeys(key for row in own for key in row))
        cells = [[number(row.get(column)) for column in columns] for row in own]
        numeric = [all(not isinstance(row.get(c), str) for row in own) for c in columns]
        widths = [max(3, *(len(line[i]) for line in (columns, *cells))) for i in range(len(columns))]
        lines = [columns, ["-" * (w - right) + ":" * right for w, right in zip(widths, numeric, strict=True)], *cells]
        text = [
            "| " + " | ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, numeric, strict=True)) + " |"
            for line in lines
        ]
        told.append("\n".join([*([f"{title}\n"] if title else []), *text]))
    return "\n\n".join(told)


def claim_line(claim: Mapping[str, Any]) -> str:
    """One claim beside what was measured."""
    verdict = {True: "met", False: "not met", None: "not measured here"}[claim["met"]]
    why = f" ({claim['why']})" if claim.get("why") and claim["met"] is not True else ""
    return f"{claim['claim']}: {claim['measured']}, {verdict}{why}"


def finish(
    name: str,
    claim: str,
    rows: Sequence[Row],
    json_path: Path | str | None = None,
    *,
    claims: Sequence[Mapping[str, Any]] = (),
    notes: Sequence[str] = (),
    device: str | None = None,
) -> None:
    """Print the machine, the table, notes and claims; write them as JSON if a path is given.

    Args:
        name: of the benchmark, its file's name without .py.
        claim: what it is to show, one sentence.
        rows: the figures, see the module's head.
        json_path: where to write, or None.
        claims: each acceptance beside its figure, see the module's head.
        notes: what a reader must know to read the table: what was counted, what was left out and why.
        device: "cpu" or "cuda" for a benchmark that can run on both.
    """
    here = machine(device)
    found = {
        "benchmark": name,
        "claim": claim,
        "command": shlex.join(["python", f"benchmarks/{name}.py", *_without_json(sys.argv[1:])]),
        "machine": here,
        "rows": list(rows),
        "claims": [dict(c) for c in claims],
        "notes": list(notes),
    }
    place = here["gpu"] or f"{here['cpu']}, {here['cores']} cores"
    print(f"{name}: {claim}\n{place}, {here['threads']} threads, torch {here['versions']['torch']}, {here['date']}\n")
    print(table(rows))
    for note in notes:
        print(f"\n{note}")
    for one in claims:
        print(f"\n- {claim_line(one)}")
    if json_path is not None:
        Path(json_path).parent.mkdir(parents=True, exist_ok=True)
        Path(json_path).write_text(json.dumps(found, indent=1) + "\n")


def _without_json(arguments: Sequence[str]) -> list[str]:
    """The command line without --json FILE, which is nobody's business but ours."""
    kept, skip = [], False
    for argument in arguments:
        if skip or argument.startswith("--json"):
            skip = argument == "--json" and not skip
            continue
        kept.append(argument)
    return kept
