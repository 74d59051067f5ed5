"""Time and memory of a call in a new process: own (anonymous) memory and pages of mapped files, apart."""

from __future__ import annotations

import gc
import multiprocessing
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from common import resident


@dataclass(frozen=True)
class Cost:
    """Of one call.

    Attributes:
        seconds: how long it took.
        own: bytes of anonymous memory at the peak, over what was there before: what the machine must have.
        mapped: the same of files that are mapped: the system's cache, given back when memory is short.
        result: what it returned.
    """

    seconds: float
    own: int
    mapped: int
    result: Any


def in_new_process(call: Callable[..., Any], prepare: Callable[[], Any] | None = None) -> Cost:
    """`call()`, or `call(prepare())`, in a process that has torch and prior_hub and did nothing yet; Linux only.

    Both go there by name: functions of a module's top level, or `functools.partial` of such. Their result must be picklable.
    What `prepare` makes is not counted. Memory is sampled every millisecond.
    """
    context = multiprocessing.get_context("forkserver")  # importing torch for each call takes longer than most calls
    context.set_forkserver_preload(["torch", "prior_hub.model", "common", "watch"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_here, call, prepare, torch.get_num_threads()).result()


def _here(call: Callable[..., Any], prepare: Callable[[], Any] | None, threads: int) -> Cost:
    torch.set_num_threads(threads)
    arguments = () if prepare is None else (prepare(),)
    gc.collect()
    fields = ("RssAnon", "RssFile")
    before = {name: resident(name) for name in fields}
    highest = dict(before)
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            for name in fields:
                highest[name] = max(highest[name], resident(name))
            time.sleep(1e-3)

    watching = threading.Thread(target=watch)
    watching.start()
    start = time.perf_counter()
    result = call(*arguments)
    seconds = time.perf_counter() - start
    for name in fields:
        highest[name] = max(highest[name], resident(name))
    done.set()
    watching.join()
    own, mapped = (highest[name] - before[name] for name in fields)
    return Cost(seconds, own, mapped, result)
