"""What makes a prior good: one factor at a time around the demo's prior, on real digits.

    python benchmarks/transfer/prior_quality.py              # what is missing, two cells at a time
    python benchmarks/transfer/prior_quality.py --list       # what is done and what is not
    python benchmarks/transfer/prior_quality.py --report     # the tables, put between the marks in PRIOR_QUALITY.md
    python benchmarks/transfer/prior_quality.py --only factor="variance floor" source=0

The source task, the network and the cut of the images are the demo's (`prior_hub/demo.py`): digits 0-4 in four orientations,
then few labelled digits 5-9. A *run* trains on the source task with one learning rate, schedule and augmentation; several
SWAG estimators watch it, each with its own first snapshot and interval. A *prior* is what one of them gives, possibly changed
(rank, floor, eps, weights, scale of each layer). Every prior has a typical variance to choose (its scale is that / the median
of its marginal variances): the candidate with the lowest NLL on development images, one few-shot set for each of two source
runs, is used in every reported fine-tuning, and no test image has a part in that choice. Few-shot sets, new heads and the
noise of augmentation are the same for every prior, so that differences from the default prior are paired: same source seed,
same few-shot seed.

A row of results/prior_quality.csv is a cell. Stages: `prior` (what it looks like, and the source task at its mean under the
last head), `tune` (a candidate on development images), `final` (on test images). What has a row is not run again.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

HERE = Path(__file__).parent
COLUMNS = (
    *("stage", "factor", "value", "source", "seed", "strength", "accuracy", "nll"),
    *("rank", "effective_rank", "useful_rank", "share_at_floor", "median_variance", "low_rank_share", "snapshots"),
    *("seconds", "torch", "machine", "date"),
)
KEY = ("stage", "factor", "value", "source", "seed", "strength")
BEGIN, END = "<!-- tables: written by prior_quality.py --report -->", "<!-- tables: end -->"
STUDENT = {
    1: 12.71,
    2: 4.30,
    3: 3.18,
    4: 2.78,
    5: 2.57,
    6: 2.45,
    7: 2.36,
    8: 2.31,
    9: 2.26,
    10: 2.23,
    11: 2.20,
}  # 95 %, two-sided
PLAIN = "plain fine-tuning"
Cell = dict[str, Any]


# -------------------------------------------------------------------------------------------------------------- the plan


@dataclass(frozen=True)
class Run:
    """One way to train on the source task.

    Attributes:
        learning_rate: of SGD with momentum 0.9.
        cosine: let it fall to zero over the whole run, instead of keeping it.
        augment: the demo's random distortions.
        length: the run takes this many times the default's steps, all of them before the last snapshots.
    """

    learning_rate: float = 0.05
    cosine: bool = False
    augment: bool = True
    length: float = 1.0


@dataclass(frozen=True)
class Collection:
    """Which of a run's last steps are snapshots: `number` of them, `every` steps apart."""

    number: int = 42
    every: int = 7


@dataclass(frozen=True)
class Plan:
    """Sizes; as the demo's where it has them."""

    pixels: int = 24
    source_steps: int = 600
    source_batch: int = 32
    rank: int = 20
    variance_floor: float = 1e-5
    n: int = 25
    steps: int = 40
    batch: int = 25
    learning_rate: float = 0.03
    head_variance: float = 1.0
    strengths: tuple[float, ...] = (0.03, 0.1, 0.3)  # typical variance of a weight
    fixed: float = 0.1  # every prior is measured at this one too
    weight_decays: tuple[float, ...] = (3e-3, 1e-2, 3e-2)  # of plain fine-tuning
    sources: int = 3
    tuned: int = 2  # source runs whose development images choose a strength
    sets: int = 2  # few-shot sets for each source run


QUICK = Plan(pixels=16, source_steps=24, rank=3, n=10, steps=2, batch=10, strengths=(0.1, 1.0), sources=2, tuned=1, sets=1)


@dataclass(frozen=True)
class Prior:
    """One prior of the study.

    Attributes:
        factor: what differs from the default.
        value: how.
        run: where it comes from.
        collection: which snapshots.
        change: from the stored prior (all snapshots as deviations, no floor to speak of) to the one that is used.
        floor: its variance floor, when it is not the plan's.
        rank: its rank, when it is not the plan's.
        late: to be run after the others.
    """

    factor: str
    value: str
    run: str = "default"
    collection: Collection = field(default_factory=Collection)
    change: Callable[[Any], Any] | None = None
    floor: float | None = None
    rank: int | None = None
    late: bool = False


RUNS = {
    "default": Run(),
    "rate / 10": Run(learning_rate=0.005),
    "rate x 3": Run(learning_rate=0.15),
    "no augmentation": Run(augment=False),
    "cosine": Run(cosine=True),
    "long": Run(length=2.4),
}


def priors() -> list[Prior]:
    """The study, in the order in which it is run."""
    usual = Collection()
    return [
        Prior("default", "as the demo"),
        Prior("covariance", "isotropic", change=isotropic),
        Prior("covariance", "diagonal only", rank=0),
        Prior("covariance", "diagonal, variances shuffled within each tensor", rank=0, change=shuffled),
        Prior("covariance", "low-rank weight x 10", change=lambda p: weighted(p, 1.0, 10.0), late=True),
        Prior("rank", "2", rank=2, late=True),
        Prior("rank", "5", rank=5),
        Prior("rank", "42 (every snapshot)", rank=42, late=True),
        Prior("principal directions", "99 % of the low-rank variance", change=lambda p: p.compressed(0.99), late=True),
        Prior("principal directions", "90 %", change=lambda p: p.compressed(0.9), late=True),
        Prior("variance floor", "1e-8", floor=1e-8),
        Prior("variance floor", "1e-4", floor=1e-4),
        Prior("eps", "1e-2", change=lambda p: rebuilt(p, eps=1e-2), late=True),
        Prior("eps", "1e-1", change=lambda p: rebuilt(p, eps=1e-1)),
        Prior("scale of each layer", "the same mean variance", change=lambda p: levelled(p, relative=False)),
        Prior(
            "scale of each layer", "mean variance proportional to the mean square", change=lambda p: levelled(p, relative=True)
        ),
        Prior("snapshots", "5", collection=Collection(5, usual.every)),
        Prior("interval", "1 step", collection=Collection(usual.number, 1)),
        Prior("interval", "20 steps, a run 2.4 times as long", run="long", collection=Collection(usual.number, 20)),
        Prior("interval", "7 steps, after a burn-in 3.8 times as long", run="long"),
        Prior("SWAG learning rate", "0.005", run="rate / 10"),
        Prior("SWAG learning rate", "0.005, floor 1e-8", run="rate / 10", floor=1e-8),
        Prior("SWAG learning rate", "0.15", run="rate x 3"),
        Prior("augmentation", "none", run="no augmentation"),
        Prior("schedule", "cosine to zero", run="cosine"),
        *(
            Prior("isotropic at the mean of", run, run=run, change=isotropic, late=True)
            for run in ("rate / 10", "rate x 3", "no augmentation", "cosine", "long")
        ),
        Prior(PLAIN, "weight decay"),
    ]


def rebuilt(prior: Any, *, variance: Any = None, deviations: Any = None, **settings: Any) -> Any:
    """The prior with other numbers; what is not given stays."""
    from prior_hub import PriorModel

    known, gaussian = prior.config, prior.gaussian
    kept = {
        "scale": gaussian.scale,
        "diagonal_weight": gaussian.diagonal_weight,
        "low_rank_weight": gaussian.low_rank_weight,
        "eps": gaussian.eps,
        "variance_floor": known.variance_floor,
        "num_snapshots": known.num_snapshots,
        "head_parameters": known.head_parameters,
        "model_type": known.model_type,
    }
    return PriorModel.from_tensors(
        prior.mean,
        prior.variance if variance is None else variance,
        prior.deviations if deviations is None else deviations,
        buffers=prior.buffers,
        **(kept | settings),
    )


def floored(prior: Any, floor: float) -> Any:
    """Variances of at least `floor`."""
    return rebuilt(prior, variance={n: v.clamp(min=floor) for n, v in prior.variance.items()}, variance_floor=floor)


def weighted(prior: Any, diagonal: float, low_rank: float) -> Any:
    """Both weights multiplied."""
    own = prior.gaussian
    return rebuilt(prior, diagonal_weight=diagonal * own.diagonal_weight, low_rank_weight=low_rank * own.low_rank_weight)


def isotropic(prior: Any) -> Any:
    """One variance, the mean of all marginal ones, at the same mean."""
    from prior_hub import isotropic_prior

    total = sum(float(v.sum(dtype=v.double().dtype)) for v in prior.gaussian.marginal_variance().values())
    return isotropic_prior(prior, variance=total / prior.num_parameters)


def shuffled(prior: Any) -> Any:
    """The same variances in each tensor, at random places: what is left is each tensor's scale and spread."""
    import torch

    generator = torch.Generator().manual_seed(0)
    mixed = {n: v.flatten()[torch.randperm(v.numel(), generator=generator)].view_as(v) for n, v in prior.variance.items()}
    return rebuilt(prior, variance=mixed)


def levelled(prior: Any, *, relative: bool) -> Any:
    """Each tensor's variances and deviations rescaled: mean marginal variance 1e-4, or 1e-4 times the tensor's mean square."""
    factors = {}
    for name, variance in prior.gaussian.marginal_variance().items():
        wanted = 1e-4 * (float(prior.mean[name].square().mean()) if relative else 1.0)
        factors[name] = max(wanted, 1e-8) / float(variance.mean())
    return rebuilt(
        prior,
        variance={n: v * factors[n] for n, v in prior.variance.items()},
        deviations={n: d * math.sqrt(factors[n]) for n, d in prior.deviations.items()},
        variance_floor=0.0,  # it is another number in every tensor now
    )


# ------------------------------------------------------------------------------------------------------------- the work


class Study:
    """The tasks and the stored priors."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        from prior_hub import demo

        self.plan, self.folder, self.demo = plan, folder, demo
        self.source, self.target = demo._tasks(plan.pixels)
        self._kept: dict[tuple[str, str, int], Any] = {}

    def stored(self, run: str, source: int, collection: Collection) -> Path:
        """Where a prior lies before it is changed."""
        return (
            self.folder / f"{run.replace(' / ', '-by-').replace(' ', '-')}-{source}" / f"{collection.number}-{collection.every}"
        )

    def learn(self, run: str, source: int, collections: Sequence[Collection]) -> None:
        """Train on the source task once, and store every prior that is not there."""
        import torch

        from prior_hub import SwagEstimator
        from prior_hub.priors.batch_norm import recompute_batch_norm

        plan, how, demo = self.plan, RUNS[run], self.demo
        steps = round(plan.source_steps * how.length)
        collections = [c for c in collections if not (self.stored(run, source, c) / "accuracy.txt").is_file()]
        if not collections:
            return
        torch.manual_seed(source)
        model = demo.DigitsClassifier(4 * demo.CLASSES).to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), lr=how.learning_rate, momentum=0.9, weight_decay=1e-4)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if how.cosine else None
        estimators = [SwagEstimator(rank=c.number, variance_floor=1e-12) for c in collections]
        order = self._order(len(self.source.labels), plan.source_batch)
        model.train()
        for step in range(1, steps + 1):
            batch = self._batch(self.source, next(order), augment=how.augment)
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
            if decay is not None:
                decay.step()
            left = steps - step
            for estimator, c in zip(estimators, collections, strict=True):
                if left % c.every == 0 and left // c.every < c.number:
                    estimator.update(model)
        for estimator, c in zip(estimators, collections, strict=True):
            torch.manual_seed(source)
            rows = torch.randperm(len(self.source.labels))[: 32 * plan.source_batch]
            loader = [self._batch(self.source, part, augment=how.augment) for part in rows.split(plan.source_batch)]
            buffers = recompute_batch_norm(model, loader, parameters=estimator.mean(), progress=False)
            prior = estimator.prior(buffers=buffers)
            place = self.stored(run, source, c)
            prior.save_pretrained(place)
            body = demo.DigitsClassifier(4 * demo.CLASSES)
            body.load_state_dict(model.state_dict())
            prior.initialize(body)
            accuracy, nll = demo._evaluate(body, self.source.held_out_images, self.source.held_out_labels)
            (place / "accuracy.txt").write_text(f"{accuracy!r} {nll!r}\n")  # last: what has it is whole

    def prior(self, which: Prior, source: int) -> Any:
        """A prior as it is used."""
        from prior_hub import PriorModel

        key = (which.factor, which.value, source)
        if key not in self._kept:
            prior = PriorModel.from_pretrained(self.stored(which.run, source, which.collection))
            rank = self.plan.rank if which.rank is None else which.rank
            prior = floored(prior.truncated(min(rank, prior.rank)), which.floor or self.plan.variance_floor)
            self._kept[key] = prior if which.change is None else which.change(prior)
        return self._kept[key]

    def look(self, which: Prior, source: int) -> Cell:
        """What the prior looks like; accuracy and NLL are those of the source task at its mean."""
        accuracy, nll = map(float, (self.stored(which.run, source, which.collection) / "accuracy.txt").read_text().split())
        prior = self.prior(which, source)
        found = prior.rescaled(self.plan.fixed / typical_variance(prior)).diagnose()  # eps counts at a scale in use only
        return {
            "accuracy": accuracy,
            "nll": nll,
            "rank": prior.rank,
            "effective_rank": found.effective_rank,
            "useful_rank": found.useful_rank,
            "share_at_floor": found.share_at_floor,
            "median_variance": found.variance_range[1],
            "low_rank_share": found.low_rank_share,
            "snapshots": which.collection.number,
        }

    def tune(self, which: Prior, source: int, strength: float) -> tuple[float, float]:
        """(accuracy, NLL) of a candidate on the development images."""
        few = self.target.few(self.target.development, self.plan.n, 1000 + source)
        return self.fine_tune(which, source, strength, few, self.target.validation, 1000 + source)

    def final(self, which: Prior, source: int, seed: int, strength: float) -> tuple[float, float]:
        """(accuracy, NLL) on the test images."""
        few = self.target.few(self.target.training, self.plan.n, seed)
        return self.fine_tune(which, source, strength, few, self.target.test, seed)

    def fine_tune(
        self, which: Prior, source: int, strength: float, chosen: list[int], measured: list[int], seed: int
    ) -> tuple[float, float]:
        """MAP from the prior's mean and a new head; everything random is the same for every prior."""
        import torch

        from prior_hub import PriorPenalty
        from prior_hub.finetuning.proximal import chosen_update

        plan, demo, prior = self.plan, self.demo, self.prior(which, source)
        torch.manual_seed(seed)
        model = demo.DigitsClassifier(demo.CLASSES, freeze_statistics=True)
        prior.initialize(model)
        plain, penalty, implicit = which.factor == PLAIN, None, False
        optimizer = torch.optim.SGD(
            model.parameters(), lr=plan.learning_rate, momentum=0.9, weight_decay=strength if plain else 0.0
        )
        if not plain:
            scale = strength / typical_variance(prior)
            penalty = PriorPenalty(prior, model, num_examples=len(chosen), scale=scale, head_variance=plan.head_variance)
            implicit = chosen_update("auto", penalty, optimizer)[0] == "implicit"  # as PriorTrainer
            if implicit:
                penalty.attach(optimizer)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, plan.steps)
        order = self._order(len(chosen), plan.batch)
        picked = torch.tensor(chosen)
        model.train()
        for _ in range(plan.steps):
            batch = self._batch(self.target, picked[next(order)], augment=True)
            optimizer.zero_grad()
            model(**batch).loss.backward()
            if penalty is not None and not implicit:
                penalty.add_gradient_()
            optimizer.step()
            decay.step()
        found: tuple[float, float] = demo._evaluate(model, self.target.images[measured], self.target.labels[measured])
        return found

    def _order(self, count: int, size: int) -> Iterator[Any]:
        """Shuffled batches of indices, for ever."""
        import torch

        while True:
            yield from torch.randperm(count)[: max(size, count - count % size)].split(size)

    def _batch(self, task: Any, rows: Any, *, augment: bool) -> dict[str, Any]:
        """pixel_values in channels_last (a quarter faster here) and labels."""
        import torch

        images, labels = task.images[rows], task.labels[rows]
        if augment:
            images = self.demo._distorted([{"pixel_values": x, "labels": y} for x, y in zip(images, labels, strict=True)])
            images = images["pixel_values"]
        return {"pixel_values": images.contiguous(memory_format=torch.channels_last), "labels": labels}


def typical_variance(prior: Any) -> float:
    """The median marginal variance at scale 1 without eps: the unit of strengths."""
    import torch

    plain = prior.gaussian._with(scale=1.0, eps=0.0).marginal_variance()
    return float(torch.cat([v.flatten() for v in plain.values()]).median())


# ------------------------------------------------------------------------------------------------------------- the cells


def read(path: Path) -> list[dict[str, str]]:
    """The rows so far."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def key(row: Cell) -> tuple[str, ...]:
    """What identifies a row."""
    return tuple(f"{float(row[k]):g}" if k == "strength" else str(row[k]) for k in KEY)


def append(path: Path, row: Cell) -> None:
    """Write one row at the end, with the heading if the file is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.is_file()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def strengths(which: Prior, plan: Plan) -> tuple[float, ...]:
    """The candidates."""
    return plan.weight_decays if which.factor == PLAIN else plan.strengths


def chosen(rows: list[dict[str, str]], which: Prior, plan: Plan) -> float | None:
    """The candidate with the lowest mean NLL on development images; None while one is missing."""
    found: dict[float, list[float]] = {}
    for row in rows:
        if (row["stage"], row["factor"], row["value"]) == ("tune", which.factor, which.value):
            nll = float(row["nll"])
            found.setdefault(float(row["strength"]), []).append(math.inf if math.isnan(nll) else nll)  # it diverged
    tried = strengths(which, plan)
    if any(len(found.get(s, [])) < plan.tuned for s in tried):
        return None
    return min(tried, key=lambda s: fmean(found[s]))


def cells(which: Prior, rows: list[dict[str, str]], plan: Plan) -> Iterator[Cell]:
    """Every cell of a prior that can be named now."""
    name = {"factor": which.factor, "value": which.value}
    for source in range(plan.sources):
        if which.factor != PLAIN:
            yield {"stage": "prior", **name, "source": source, "seed": 0, "strength": 0.0}
        for strength in strengths(which, plan) if source < plan.tuned else ():
            yield {"stage": "tune", **name, "source": source, "seed": 1000 + source, "strength": strength}
    measured = dict.fromkeys([*([] if which.factor == PLAIN else [plan.fixed]), chosen(rows, which, plan)])
    for strength, source, few in itertools.product(measured, range(plan.sources), range(plan.sets)):
        if strength is not None:  # the choice is not known yet
            yield {"stage": "final", **name, "source": source, "seed": source + plan.sources * few, "strength": strength}


def matches(cell: Cell, only: list[str]) -> bool:
    """Whether a cell has all the KEY=VALUE pairs."""
    for pair in only:
        name, _, value = pair.partition("=")
        if name not in KEY:
            raise SystemExit(f"--only {pair}: the names are {', '.join(KEY)}.")
        if value != (f"{cell[name]:g}" if name == "strength" else str(cell[name])):
            return False
    return True


_STUDIES: dict[tuple[Plan, str], Study] = {}


def study(plan: Plan, folder: str) -> Study:
    """One per process."""
    import torch

    torch.set_num_threads(1)
    if (plan, folder) not in _STUDIES:
        _STUDIES[plan, folder] = Study(plan, Path(folder))
    return _STUDIES[plan, folder]


def learn(job: tuple[Plan, str, str, int, list[Collection]]) -> str:
    """One source run, in a process of its own."""
    plan, folder, run, source, collections = job
    began = time.monotonic()
    study(plan, folder).learn(run, source, collections)
    return f"source run {run!r}, seed {source}: {len(collections)} priors, {time.monotonic() - began:.0f} s"


def work(job: tuple[Plan, str, Cell]) -> Cell:
    """One cell, in a process of its own."""
    import torch

    plan, folder, cell = job
    all_of_it = study(plan, folder)
    which = next(p for p in priors() if (p.factor, p.value) == (cell["factor"], cell["value"]))
    began = time.monotonic()
    source, strength = cell["source"], cell["strength"]
    if cell["stage"] == "prior":
        row = all_of_it.look(which, source)
    else:
        tuning = cell["stage"] == "tune"
        accuracy, nll = (
            all_of_it.tune(which, source, strength) if tuning else all_of_it.final(which, source, cell["seed"], strength)
        )
        row = {"accuracy": accuracy, "nll": nll}
    row = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    made = {"seconds": f"{time.monotonic() - began:.1f}", "torch": torch.__version__, "machine": machine}
    return cell | row | made | {"date": time.strftime("%Y-%m-%d")}


# ------------------------------------------------------------------------------------------------------------ the report


def report(path: Path, plan: Plan) -> str:
    """The tables, from the rows alone."""
    rows = read(path)
    if not rows:
        raise SystemExit(f"{path} has no rows: run the study first.")
    plain = next(p for p in priors() if p.factor == "default")
    base = {s: _measured(rows, plain, s) for s in (chosen(rows, plain, plan), plan.fixed) if s is not None}
    count = len(base[plan.fixed])
    hours = sum(float(r["seconds"]) for r in rows) / 3600
    dates = sorted({r["date"] for r in rows})
    made = ", ".join(sorted({f"{r['machine']}, torch {r['torch']}" for r in rows}))
    lines = [
        f"From `{path.name}` ({len(rows)} cells, {hours:.1f} hours of one cell at a time, source runs not counted; "
        f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}; {made}, one thread, shared with other work). n = {plan.n}, "
        f"{count} fine-tunings for each prior ({plan.sources} source seeds, {plan.sets} few-shot sets for each).",
        "",
        "Columns: K, effective rank, directions with 99 % of the low-rank variance, share of variances at the floor, median "
        "variance, share of the total variance in the low-rank part, accuracy on the source task at the mean; the typical "
        "variance chosen on development images, and with it test NLL (nats), accuracy, and their differences from the default "
        f"prior with its own choice; last, the difference in NLL when both have a typical variance of {plan.fixed:g}. "
        "Differences are paired, mean ± standard error. **Bold**: told apart by a paired t-test at 95 %; of so many "
        "comparisons one in twenty would be by chance alone. Empty: not run, or (scale, K = 0, no prior) not defined.",
        "",
        "| factor | value | K | eff. | 99 % | floor | median var. | low-rank | source acc. | chosen | NLL | accuracy "
        f"| NLL - default | accuracy - default (points) | NLL - default, both at {plan.fixed:g} |",
        "|" + "---|" * 15,
    ]
    previous = ""
    for which in priors():
        best = chosen(rows, which, plan)
        mine = {} if best is None else _measured(rows, which, best)
        fixed = {} if which.factor == PLAIN else _measured(rows, which, plan.fixed)
        looks = [r for r in rows if (r["stage"], r["factor"], r["value"]) == ("prior", which.factor, which.value)]
        if not mine and not fixed and not looks:
            continue
        factor = "" if which.factor == previous else which.factor
        previous = which.factor
        measured = ["", "", ""]
        if best is not None and mine:
            nll, accuracy = (fmean(float(r[name]) for r in mine.values()) for name in ("nll", "accuracy"))
            measured = [f"{best:g}", f"{nll:.4f}", f"{100 * accuracy:.1f} %"]
        gaps = ["", "", ""]
        if which.factor != "default":
            own = base.get(chosen(rows, plain, plan) or math.nan, {})
            gaps = [_gap(mine, own, "nll", 1.0, 4), _gap(mine, own, "accuracy", 100.0, 2)]
            gaps.append(_gap(fixed, base[plan.fixed], "nll", 1.0, 4))
        entries = [factor, which.value, _looks(looks), *measured, *gaps]
        lines.append("| " + " | ".join(entries) + " |")
    return "\n".join(lines)


def _measured(rows: list[dict[str, str]], which: Prior, strength: float) -> dict[tuple[str, str], dict[str, str]]:
    """(source, seed) -> the reported row of a prior at a strength."""
    mine = [r for r in rows if (r["stage"], r["factor"], r["value"]) == ("final", which.factor, which.value)]
    return {(r["source"], r["seed"]): r for r in mine if math.isclose(float(r["strength"]), strength)}


def _gap(mine: dict[Any, dict[str, str]], theirs: dict[Any, dict[str, str]], name: str, unit: float, digits: int) -> str:
    """The paired difference of a column."""
    return difference([unit * (float(mine[k][name]) - float(theirs[k][name])) for k in mine if k in theirs], digits)


def _looks(rows: list[dict[str, str]]) -> str:
    """What the priors look like, mean over the source seeds."""
    if not rows:
        return " | ".join([""] * 7)

    def mean(name: str) -> float:
        return fmean(float(r[name]) for r in rows)

    low_rank = mean("rank") > 0
    cells = [
        f"{mean('rank'):g}",
        f"{mean('effective_rank'):.1f}" if low_rank else "",
        f"{mean('useful_rank'):.1f}" if low_rank else "",
        f"{100 * mean('share_at_floor'):.0f} %",
        f"{mean('median_variance'):.1e}",
        f"{100 * mean('low_rank_share'):.0f} %" if low_rank else "",
        f"{100 * mean('accuracy'):.1f} %",
    ]
    return " | ".join(cells)


def difference(values: list[float], digits: int) -> str:
    """Mean ± standard error; bold where a t-test at 95 % tells it from zero."""
    if len(values) < 2:
        return "(one pair)" if values else ""
    lost = sum(math.isnan(v) for v in values)
    if lost:
        return f"(diverged in {lost} of {len(values)})"
    mean, error = fmean(values), stdev(values) / math.sqrt(len(values))
    text = f"{mean:+.{digits}f} ± {error:.{digits}f}"
    return f"**{text}**" if abs(mean) > STUDENT.get(len(values) - 1, 2.2) * error > 0 else text


def write_report(text: str, path: Path) -> None:
    """Between the marks; what stands around them is a person's."""
    old = path.read_text() if path.is_file() else f"# What makes a prior good\n\n{BEGIN}\n{END}\n"
    before, _, rest = old.partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


# -------------------------------------------------------------------------------------------------------------- the rest


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], metavar="KEY=VALUE", help=f"cells with these: {', '.join(KEY)}")
    parser.add_argument("--list", action="store_true", help="list the cells and run none")
    parser.add_argument("--report", action="store_true", help="write the tables into PRIOR_QUALITY.md (or --into)")
    parser.add_argument(
        "--into", type=Path, default=HERE / "PRIOR_QUALITY.md", help="file with the marks (default: %(default)s)"
    )
    parser.add_argument("--workers", type=int, default=2, help="cells at a time, one thread each (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=HERE / "work" / "prior_quality", help="folder for the learned priors")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "prior_quality.csv", help="CSV file")
    parser.add_argument("--quick", action="store_true", help="a much smaller study that shows the path, not the result")
    options = parser.parse_args(arguments)
    plan = QUICK if options.quick else Plan()
    if options.report:
        write_report(report(options.results, plan), options.into)
        print(f"{options.into} has the tables of {options.results}")
        return

    def missing(which: Prior) -> list[Cell]:
        rows = read(options.results)
        done = {key(row) for row in rows}
        return [c for c in cells(which, rows, plan) if key(c) not in done and matches(c, options.only)]

    if options.list:
        for which in priors():
            left = {key(c) for c in missing(which)}
            for cell in cells(which, read(options.results), plan):
                if matches(cell, options.only):
                    print("missing" if key(cell) in left else "done   ", *cell.values())
        return
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        for turn in (1, 2, 3):
            mine = [p for p in priors() if turn == (3 if p.late else 1 if p.run == "default" else 2) and missing(p)]
            sources = sorted({c["source"] for p in mine for c in missing(p)})
            trained = []
            for run, source in itertools.product(dict.fromkeys(p.run for p in mine), sources):
                collections = list(dict.fromkeys(p.collection for p in priors() if p.run == run))
                trained.append((plan, str(options.work), run, source, collections))
            for told in pool.imap_unordered(learn, trained):
                print(told, flush=True)
            while jobs := [(plan, str(options.work), c) for p in mine for c in missing(p)]:  # finals are known after tuning
                for number, row in enumerate(pool.imap_unordered(work, jobs), 1):
                    append(options.results, row)
                    told = ", ".join(str(row[k]) for k in KEY)
                    print(f"[{number}/{len(jobs)}] {told}: NLL {row['nll']} ({row['seconds']} s)", flush=True)


if __name__ == "__main__":
    main()
