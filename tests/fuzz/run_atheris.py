"""Coverage-guided fuzzing with atheris: python tests/fuzz/run_atheris.py TARGET [libFuzzer's arguments, -max_total_time=600].

`pip install atheris` (Linux, CPython 3.11 or later) first. Half of the inputs are changed by libFuzzer, half by the mutations
of targets.py, which know JSON and the length of a header.
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import atheris  # type: ignore[import-not-found]

with atheris.instrument_imports(
    include=["prior_hub.priors.config", "prior_hub.priors.storage", "prior_hub.priors.tensor_files"]
):
    import prior_hub.priors.config
    import prior_hub.priors.storage
    import prior_hub.priors.tensor_files
with atheris.instrument_imports(include=["prior_hub.priors.matching", "prior_hub.registry.card", "prior_hub.priors.legacy"]):
    import prior_hub.priors.legacy
    import prior_hub.priors.matching
    import prior_hub.registry.card  # noqa: F401

from targets import TARGETS, Targets, mutate, scratch


def main() -> None:
    target = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if target not in TARGETS:
        sys.exit(f"name a target: {', '.join(TARGETS)}")
    with scratch() as root:
        targets = Targets(Path(root))
        seeds = targets.seeds(target)
        corpus = Path(root) / "corpus"
        corpus.mkdir()
        for number, data in enumerate(seeds):
            (corpus / str(number)).write_bytes(data)

        def changed(data: bytes, most: int, seed: int) -> bytes:
            rng = random.Random(seed)
            if target == "matcher" or rng.random() < 0.5:
                return bytes(atheris.Mutate(data, most))
            return mutate(target, data or seeds[0], seeds, rng)[:most]

        def once(data: bytes) -> None:
            targets.run(target, data)

        atheris.Setup([*sys.argv, str(corpus), "-max_len=16384"], once, custom_mutator=changed)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
