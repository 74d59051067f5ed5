"""Fuzz prior_hub for a while: python tests/fuzz/run.py --minutes 10 [--target reader] [--corpus FOLDER].

Inputs are mutated from good ones, and some of them kept to be mutated further. What is found is written to the corpus folder as
finding-*; exit code 1 then.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import re
import resource
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from targets import TARGETS, Finding, Targets, mutate, scratch

_MOST_KEPT = 300


def fuzz(target: str, seconds: float, seed: int, corpus: Path | None, targets: Targets) -> tuple[int, list[str]]:
    """(executions, findings) of one target."""
    rng = random.Random(seed)
    seeds = targets.seeds(target)
    kept = list(seeds)
    if corpus:
        kept += [path.read_bytes() for path in sorted((corpus / target).glob("input-*"))]
    seen: set[str] = set()
    findings: dict[str, bytes] = {}
    start, before, accepted_before = time.monotonic(), targets.executions, targets.accepted
    slowest = 0.0
    while time.monotonic() - start < seconds:
        base = rng.choice(seeds if rng.random() < 0.5 else kept)
        data = rng.randbytes(8) if target == "matcher" else mutate(target, base, kept, rng)
        begun = time.process_time()
        outcome = "accepted"
        accepted = targets.accepted
        try:
            targets.run(target, data)
            if targets.accepted == accepted:
                outcome = "refused"
        except Finding as finding:
            key = re.sub(r"\d+", "#", str(finding))[:120]
            if key not in findings:
                findings[key] = data
                print(f"  {target}: {finding}", flush=True)
        took = time.process_time() - begun
        slowest = max(slowest, took)
        if target != "matcher" and len(data) < 20_000:
            mark = f"{outcome} {len(data) // 64} {data[:3]!r}"
            if mark not in seen and len(kept) < _MOST_KEPT and rng.random() < (0.5 if outcome == "accepted" else 0.1):
                seen.add(mark)
                kept.append(data)
    executions = targets.executions - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    crashes = sum(key.startswith("crash") for key in findings)
    accepted = targets.accepted - accepted_before
    print(
        f"{target}: {executions:,} executions ({accepted:,} accepted) in {time.monotonic() - start:.0f} s, {crashes} crashes, "
        f"{len(findings) - crashes} accepted lies, slowest {slowest:.2f} s, peak {peak} MB",
        flush=True,
    )
    if corpus:
        (corpus / target).mkdir(parents=True, exist_ok=True)
        for name, contents in (("input", kept[len(seeds) :]), ("finding", list(findings.values()))):
            for content in contents:
                (corpus / target / f"{name}-{hashlib.sha256(content).hexdigest()[:16]}").write_bytes(content)
    return executions, list(findings)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="for all targets together")
    parser.add_argument("--target", choices=TARGETS, help="one target only")
    parser.add_argument("--seed", type=int, default=None, help="default: from the clock, printed")
    parser.add_argument("--corpus", type=Path, help="folder to read inputs from, and to keep them and findings in")
    arguments = parser.parse_args()
    chosen = [arguments.target] if arguments.target else list(TARGETS)
    seed = time.time_ns() % 2**32 if arguments.seed is None else arguments.seed
    print(f"seed {seed}", flush=True)
    total, findings = 0, []
    with scratch() as root:
        targets = Targets(Path(root))
        for target in chosen:
            executions, found = fuzz(target, 60 * arguments.minutes / len(chosen), seed, arguments.corpus, targets)
            total += executions
            findings += [f"{target}: {text}" for text in found]
        print(f"{total:,} executions ({targets.accepted:,} accepted, {targets.refused:,} refused), {len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
