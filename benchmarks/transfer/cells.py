"""One cell of the grid: a task, a training-set size, a seed, a method and its strength -> one fine-tuning, one row.

A method is a function (prior, strength) -> (prior, settings) for PriorTrainer, None for no prior; a task brings model, data and
metrics. A further method (an average over the posterior) or task (segmentation, text) is one more entry of METHODS or TASKS.

Every method starts from the same weights: the prior's mean, its BatchNorm statistics, and a head fitted on the frozen features
by logistic regression, whose variance is chosen by cross-validation on the n images and is the head prior's variance too. With
a new random head the number of steps, not the prior, decides how good it gets, and a wide prior wins because it trains faster.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

from prior_hub import PriorModel, PriorTrainer, PriorTrainingArguments, SwagCallback, isotropic_prior

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from cifar_resnet20 import Images, ResNet20, load
from safetensors.torch import load_file

from prior_hub.finetuning.scale import ScaleChoice, find_scale, held_out_split
from prior_hub.inference.metrics import expected_calibration_error, reliability_bins


@dataclass(frozen=True)
class Cell:
    """What identifies a row of the results. `stage`: tune (validation), final (test) or oracle (test, for regret only)."""

    task: str
    stage: str
    method: str
    n: int
    seed: int
    strength: float  # weight decay, variance or scale
    learning_rate: float  # the highest


# ----------------------------------------------------------------------------------------------------------------- tasks


class CifarTask:
    """CIFAR-10 ResNet-20 -> CIFAR-100's 20 superclasses; forgetting is measured with the source head on CIFAR-10's test set."""

    def __init__(self, config: dict[str, Any], work: Path) -> None:
        self.config, self.work = config, work
        self._cache: dict[str, Any] = {}

    def _images(self, which: str, split: str, augment: bool) -> Images:
        key = f"{which}/{split}/{augment}"
        if key not in self._cache:
            with contextlib.redirect_stderr(io.StringIO()):
                self._cache[key] = load(self.config[which]["dataset"], split, augment=augment)
        return self._cache[key]

    def source_model(self) -> nn.Module:
        """The pre-trained source model."""
        model = ResNet20(10)
        model.load_state_dict(load_file(self.config["source"]["weights"]))
        return model

    def prior(self) -> PriorModel:
        """The learned prior, made on the first call and kept in the work folder."""
        folder = self.work / "prior"
        if not (folder / "prior_config.json").is_file():
            s = self.config["source"]
            set_seed(0)
            callback = SwagCallback(s["rank"], start=s["start"], variance_floor=s["variance_floor"])
            settings = {"max_steps": s["steps"], "learning_rate": s["learning_rate"], "lr_scheduler_type": "constant"}
            settings |= {"per_device_train_batch_size": s["batch_size"], "weight_decay": s.get("weight_decay", 0.0), "seed": 0}
            train(Trainer, self.source_model(), settings, self._images("source", "train", s["augment"]), callbacks=[callback])
            learned = callback.prior(
                objective="supervised classification",
                dataset=Path(s["dataset"]).name,
                source={"learning_rate": s["learning_rate"], "steps": s["steps"], "augmented": s["augment"]},
            )
            learned.save_pretrained(folder)
        return PriorModel.from_pretrained(folder)

    def model(self, prior: PriorModel, images: Images) -> tuple[nn.Module, float]:
        """The target model at the prior's mean with a fitted head, and the variance of that head's prior."""
        model = ResNet20(20)
        prior.initialize(model)
        features: list[Tensor] = []
        handle = model.linear.register_forward_hook(lambda _module, inputs, _output: features.append(inputs[0]))
        measure(model, images)
        handle.remove()
        variance = fit_head(model.linear, torch.cat(features).double(), images.labels)
        return model, variance

    def data(self, n: int, seed: int) -> Images:
        """n labelled images; seed 0 takes the first n rows of the shuffled data set, and so on (with wrap-around)."""
        pool = self._images("target", "train", self.config["target"]["augment"])
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
        return pool.part(order[:n])

    def tuning(self, n: int, seed: int) -> tuple[Images, Images]:
        """(four fifths to fit, one fifth to validate) of the n."""
        images = self.data(n, seed)
        held = n // 5
        return images.part(torch.arange(held, n)), images.part(torch.arange(held))

    def test(self) -> Images:
        """The target's test set."""
        return self._images("target", "test", False)

    def forgetting(self, model: nn.Module) -> dict[str, float]:
        """How much of the source task is left: the fine-tuned features under the source task's own head."""
        again = ResNet20(10)
        own = self.source_model().linear
        again.load_state_dict({**model.state_dict(), "linear.weight": own.weight, "linear.bias": own.bias})
        images = self._images("source", "test", False)
        scores = measure(again, images.part(torch.arange(min(2000, len(images)))))
        return {"source_accuracy": scores["accuracy"], "source_nll": scores["nll"]}


TASKS = {"cifar": CifarTask}


# --------------------------------------------------------------------------------------------------------------- methods


def plain(prior: PriorModel, strength: float) -> tuple[PriorModel | None, dict[str, Any]]:
    """Weight decay on everything."""
    del prior
    return None, {"weight_decay": strength}


def zero_mean(prior: PriorModel, strength: float) -> tuple[PriorModel | None, dict[str, Any]]:
    """N(0, strength I), from the same start."""
    zero = {name: torch.zeros_like(t) for name, t in prior.mean.items()}
    flat = {name: torch.full_like(t, strength) for name, t in prior.mean.items()}
    return PriorModel.from_tensors(zero, flat, head_parameters=prior.config.head_parameters), {}


def at_the_mean(prior: PriorModel, strength: float) -> tuple[PriorModel | None, dict[str, Any]]:
    """N(mean, strength I): L2-SP."""
    return isotropic_prior(prior, variance=strength), {}


def diagonal(prior: PriorModel, strength: float) -> tuple[PriorModel | None, dict[str, Any]]:
    """The learned variances, no deviations, at scale `strength`."""
    return prior.truncated(0).rescaled(strength), {}


def low_rank(prior: PriorModel, strength: float) -> tuple[PriorModel | None, dict[str, Any]]:
    """The learned prior at scale `strength`."""
    return prior.rescaled(strength), {}


def low_rank_auto(prior: PriorModel, strength: float) -> tuple[PriorModel | None, dict[str, Any]]:
    """The learned prior; run_cell finds its scale as PriorTrainer does, with a head that has not seen the held-out part."""
    del strength
    return prior, {}


def frozen(prior: PriorModel, strength: float) -> tuple[PriorModel | None, dict[str, Any]]:
    """No training: the head alone, on the features at the prior's mean."""
    del prior, strength
    return None, {}


METHODS = {
    "frozen": frozen,
    "plain": plain,
    "zero-mean": zero_mean,
    "at the mean": at_the_mean,
    "diagonal": diagonal,
    "low rank": low_rank,
    "low rank, auto": low_rank_auto,
}


# ---------------------------------------------------------------------------------------------------------------- a run


def train(trainer_class: type[Trainer], model: nn.Module, settings: dict[str, Any], images: Any, **more: Any) -> Trainer:
    """SGD with momentum 0.9, quietly."""
    trainer = made_trainer(trainer_class, model, settings, images, **more)
    trainer.train()
    return trainer


def made_trainer(trainer_class: type[Trainer], model: nn.Module, settings: dict[str, Any], images: Any, **more: Any) -> Trainer:
    """The trainer; nothing is written to its folder."""
    arguments = PriorTrainingArguments if trainer_class is PriorTrainer else TrainingArguments
    quiet = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "log_level": "error"}
    if not torch.cuda.is_available():
        quiet |= {"use_cpu": True, "dataloader_pin_memory": False}
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(folder, **quiet, **settings)
        sgd = (torch.optim.SGD, {"lr": args.learning_rate, "momentum": 0.9})
        trainer = trainer_class(model=model, args=args, train_dataset=images, optimizer_cls_and_kwargs=sgd, **more)
        trainer.remove_callback(PrinterCallback)
    return trainer


@torch.no_grad()
def logits_of(model: nn.Module, images: Images) -> Tensor:
    """[images, classes], float64, without augmentation."""
    model.eval()
    device = next(model.parameters()).device
    plain = Images(images.pixels, images.labels, augment=False)
    return torch.cat([model(plain.batch(p).to(device))["logits"].cpu() for p in torch.arange(len(plain)).split(250)]).double()


def scores(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """accuracy, nll (nats per image), ece (15 bins of equal width); NaN where the model diverged."""
    if not logits.isfinite().all():
        return dict.fromkeys(("accuracy", "nll", "ece"), float("nan"))
    accuracy = (logits.argmax(1) == labels).double().mean().item()
    nll = nn.functional.cross_entropy(logits, labels).item()
    return {"accuracy": accuracy, "nll": nll, "ece": expected_calibration_error(logits, labels, bins=15, from_logits=True)}


def measure(model: nn.Module, images: Images) -> dict[str, float]:
    """The scores of a model."""
    return scores(logits_of(model, images), images.labels)


def fit_head(head: nn.Linear, features: Tensor, labels: Tensor, folds: int = 5) -> float:
    """Logistic regression in place; the variance of its weights' prior, by cross-validation over half-decades."""
    design = torch.cat([features, features.new_ones(len(features), 1)], 1)
    part = torch.arange(len(labels)) % folds
    classes = head.out_features

    def fitted(rows: Tensor, variance: float) -> Tensor:
        weights = torch.zeros(classes, design.shape[1], dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

        def objective() -> Tensor:
            optimizer.zero_grad()
            nll = nn.functional.cross_entropy(design[rows] @ weights.T, labels[rows], reduction="sum")
            loss = nll + weights.square().sum() / (2 * variance)
            loss.backward()
            return loss

        optimizer.step(objective)
        return weights.detach()

    def score(variance: float) -> float:
        held = [design[part == f] @ fitted(part != f, variance).T for f in range(folds)]
        own = torch.cat([labels[part == f] for f in range(folds)])
        return nn.functional.cross_entropy(torch.cat(held), own).item()

    candidates = [10 ** (k / 2) for k in range(-5, 3)]  # 0.003 to 10
    chosen = min(candidates, key=score)
    weights = fitted(part >= 0, chosen)
    with torch.no_grad():
        head.weight.copy_(weights[:, :-1])
        head.bias.copy_(weights[:, -1])
    return chosen


def study_arguments(description: str | None) -> argparse.ArgumentParser:
    """What every study of one training set asks for."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path(__file__).parent / "work")
    return parser


def found_scale(task: CifarTask, prior: PriorModel, settings: dict[str, Any], images: Images, *, compiled: bool) -> ScaleChoice:
    """What `prior_scale="auto"` chooses; the head is fitted to the four fifths alone, or it would know the held-out labels."""
    rest, _ = held_out_split(images, 0.2, settings["seed"])
    model, _ = task.model(prior, images.part(torch.tensor(rest.indices)))
    if compiled:
        model.forward = torch.compile(model.forward)  # type: ignore[method-assign]
    trainer = made_trainer(PriorTrainer, model, settings, images, prior=prior)
    return find_scale(trainer)


def run_cell(cell: Cell, config: dict[str, Any], task: CifarTask) -> dict[str, Any]:
    """Fine-tune and measure: the row, and with a final one its reliability diagram as "bins"."""
    began = time.perf_counter()
    prior = task.prior()
    fit, validation = task.tuning(cell.n, cell.seed) if cell.stage == "tune" else (task.data(cell.n, cell.seed), None)
    chosen, extra = METHODS[cell.method](prior, cell.strength)
    t = config["target"]
    steps = 0 if cell.method == "frozen" else t["steps"][t["numbers"].index(cell.n)]
    settings: dict[str, Any] = {
        "max_steps": steps,
        "learning_rate": cell.learning_rate,
        "lr_scheduler_type": "cosine",
        "per_device_train_batch_size": min(t["batch_size"], len(fit)),
        "dataloader_drop_last": True,  # every step of one size, which is what a compiled model wants
        "seed": cell.seed,
        **extra,
    }
    set_seed(1000 + cell.seed)
    model, head_variance = task.model(prior, fit)
    row: dict[str, Any] = {**asdict(cell), "strength": f"{cell.strength:g}", "learning_rate": f"{cell.learning_rate:g}"}
    row |= {"head_variance": f"{head_variance:.3g}"}
    if t.get("compile", False):
        model.forward = torch.compile(model.forward)  # type: ignore[method-assign]
    if steps == 0:  # the frozen features: where every method starts
        pass
    elif chosen is None:
        train(Trainer, model, settings, fit)
    else:
        head = {"prior_initialize": False, "prior_head_variance": head_variance}
        if cell.method.endswith("auto"):
            choice = found_scale(task, chosen, head | settings, fit, compiled=t.get("compile", False))
            settings["prior_scale"] = choice.scale
            row["choice"] = choice
            set_seed(1000 + cell.seed)
        trainer = train(PriorTrainer, model, {**head, **settings}, fit, prior=chosen)
        row["update"] = trainer.prior_update
        row["scale"] = f"{trainer.prior_penalty.gaussian.scale:.6g}"
    vars(model).pop("forward", None)  # to measure with batches of another size
    row.setdefault("update", "")
    row.setdefault("scale", "")
    seconds = time.perf_counter() - began
    images = validation if validation is not None else task.test()
    logits = logits_of(model, images)
    row |= {k: f"{v:.5f}" for k, v in scores(logits, images.labels).items()}
    if cell.stage == "final" and logits.isfinite().all():
        row["bins"] = reliability_bins(logits, images.labels, bins=15, from_logits=True)
    forgotten = task.forgetting(model) if cell.stage == "final" else {"source_accuracy": "", "source_nll": ""}
    row |= {k: v if v == "" else f"{v:.5f}" for k, v in forgotten.items()}
    return row | {"steps": steps, "seconds": f"{seconds:.1f}"}
