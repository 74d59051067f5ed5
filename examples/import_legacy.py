"""Import the files of "Pre-Train Your Loss": the same prior, number for number, under each published convention.

    python examples/import_legacy.py [--output example_output] [--convention swag] [--n 50]

The paper's own files are gigabytes, behind a link (model_cards/recipes/ tells where). So this example makes a small set of the
same four files first, **with a SWAG run of its own**: a small network learns handwritten digits 0-4 (scikit-learn), and a dozen
lines keep running mean, running squares and deviations as the paper's code does. Then it

1. writes digits_mean.pt, digits_variance.pt, digits_covmat.pt and digits_model.pt;
2. imports them under every convention, and prints what was decided about them;
3. fine-tunes on n images of the digits 5-9 with PriorTrainer under the prior of --convention, and without a prior;
4. at the fine-tuned weights, prints the penalty of each convention twice: by the published code's formula on the files (torch's
   LowRankMultivariateNormal, float64) and by prior_hub, and how far they are apart, relative to their size.

The claim is (4): the difference is that of rounding. The accuracies of (3) are of one seed and one setting and show that it
works, not which is better. Offline, half a minute on one core.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributions import LowRankMultivariateNormal
from transformers import PrinterCallback, Trainer

from prior_hub import PriorModel, PriorTrainer, PriorTrainingArguments

SCALE, EPS, ROWS = 1e10, 0.1, 5  # defaults of the published code
PUBLISHED = ("paper", "paper-unscaled", "tufts", "tufts-elbo")


class Digits(nn.Module):
    """A small convolutional network; `fc` is its head, which the paper's files leave out."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(32)
        self.fc = nn.Linear(32, classes)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Logits, and the loss where there are labels."""
        x = self.bn1(self.conv1(pixel_values)).relu()
        logits = self.fc(self.bn2(self.conv2(x)).relu().mean((2, 3)))
        return {"logits": logits} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def backbone(model: Digits) -> Tensor:
    """All weights but the head's in the order of `parameters()`, (P,)."""
    return torch.cat([p.detach().reshape(-1) for name, p in model.named_parameters() if not name.startswith("fc.")])


def digits(first: int) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 8, 8) of five digits from `first` on, and labels 0 to 4."""
    images, labels = load_digits(return_X_y=True)
    wanted = (labels >= first) & (labels < first + 5)
    return torch.tensor(images[wanted] / 8 - 1, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(labels[wanted] - first)


def write_files(options: argparse.Namespace, folder: Path) -> dict[str, Tensor]:
    """The source task, and the four files as the paper's code writes them."""
    torch.manual_seed(options.seed)
    images, labels = digits(0)
    model = Digits()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    rows: list[Tensor] = []
    mean = squares = torch.zeros(len(backbone(model)))
    taken = 0
    for step in range(options.source_steps + options.snapshots * options.every):
        batch = torch.randint(len(images), (32,))
        loss = model(images[batch], labels[batch])["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step >= options.source_steps and (step - options.source_steps) % options.every == 0:
            w = backbone(model)
            mean = mean * (taken / (taken + 1)) + w / (taken + 1)
            squares = squares * (taken / (taken + 1)) + w**2 / (taken + 1)
            rows = [*rows, w - mean][-options.rank :]
            taken += 1
    covmat = torch.stack(rows) / math.sqrt(len(rows) - 1)
    files = {"mean": mean, "variance": (squares - mean**2).clamp(min=1e-6), "covmat": covmat}
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("fc.")}
    folder.mkdir(parents=True, exist_ok=True)
    for kind, value in {**files, "model": state}.items():
        torch.save(value, folder / f"digits_{kind}.pt")
    print(
        f"source task: loss {loss.item():.3f}, {step + 1} steps, {taken} snapshots of {len(mean):,} weights, {len(rows)} kept"
    )
    return files


def published_penalty(convention: str, files: dict[str, Tensor], theta: Tensor) -> float:
    """The quadratic form of the published code's Gaussian on the files as they are, in nats."""
    mean, v, q = files["mean"].double(), files["variance"].double(), files["covmat"][:ROWS].double()
    factor, diagonal = {
        "paper": (SCALE, SCALE * v + EPS),
        "paper-unscaled": (1.0, SCALE * v + EPS),
        "tufts": (math.sqrt(SCALE / (2 * (len(q) - 1))), SCALE * v / 2 + EPS),
        "tufts-elbo": (math.sqrt(SCALE / (2 * (len(q) - 1))), SCALE * (v / 2 + EPS)),
    }[convention]
    zero = torch.zeros_like(
        mean
    )  # around zero, with the distance made large: a log density hides a small penalty in its digits
    normal = LowRankMultivariateNormal(zero, factor * q.T, diagonal)
    enlarged = 1e6 * (theta - mean)
    return float(normal.log_prob(zero) - normal.log_prob(enlarged)) / 1e12


def finetune(options: argparse.Namespace, prior: PriorModel, *, under_prior: bool) -> tuple[Digits, float, float]:
    """Train on n images of the digits 5-9 from the prior's mean; the model, its accuracy and NLL on the other images."""
    torch.manual_seed(options.seed)
    images, labels = digits(5)
    order = torch.randperm(len(images))
    train = [{"pixel_values": images[i], "labels": labels[i]} for i in order[: options.n]]
    model = Digits()
    prior.initialize(model)
    settings: dict[str, Any] = {
        "output_dir": str(options.output / "trainer"),
        "max_steps": options.steps,
        "learning_rate": 0.05,
        "lr_scheduler_type": "cosine",
        "optim": "sgd",
        "per_device_train_batch_size": min(16, options.n),
        "seed": options.seed,
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        "dataloader_pin_memory": False,
    }
    if under_prior:
        arguments = PriorTrainingArguments(**settings, prior_scale=options.scale, prior_head_variance=1.0)
        trainer: Trainer = PriorTrainer(model=model, args=arguments, train_dataset=train, prior=prior)
    else:
        trainer = Trainer(model=model, args=PriorTrainingArguments(**settings, weight_decay=1e-3), train_dataset=train)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    model.eval()
    with torch.no_grad():
        rest = order[options.n :]
        logits = model(images[rest])["logits"]
        nll = nn.functional.cross_entropy(logits, labels[rest]).item()
        return model, (logits.argmax(1) == labels[rest]).float().mean().item(), nll


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--output", type=Path, default=Path("example_output"), help="folder for files, prior and results (default: %(default)s)"
    )
    add("--convention", choices=("swag", *PUBLISHED), default="swag", help="prior to fine-tune under (default: %(default)s)")
    add("--scale", type=float, help="its scale (default: 1e4 for swag, as imported for the others)")
    add("--n", type=int, default=50, help="images of the digits 5-9 (default: %(default)s)")
    add("--steps", type=int, default=200, help="fine-tuning steps (default: %(default)s)")
    add("--source-steps", type=int, default=300, help="steps before the first snapshot (default: %(default)s)")
    add("--snapshots", type=int, default=20, help="snapshots in all (default: %(default)s)")
    add("--every", type=int, default=20, help="steps between them (default: %(default)s)")
    add("--rank", type=int, default=20, help="snapshots kept, the last ones (default: %(default)s)")
    add("--seed", type=int, default=0, help="of everything (default: %(default)s)")
    add("--quick", action="store_true", help="few steps: shows the path, not the result")
    options = parser.parse_args(arguments)
    if options.quick:
        options.steps, options.source_steps, options.snapshots, options.every, options.rank = 10, 30, 8, 3, 8
    if options.scale is None and options.convention == "swag":
        options.scale = 1e4
    return options


def main(arguments: list[str] | None = None) -> None:
    """Run the example."""
    options = parse(arguments)
    started = time.perf_counter()
    folder = options.output / "legacy_files"
    files = write_files(options, folder)
    priors = {c: PriorModel.from_legacy(folder, convention=c, reference=Digits()) for c in ("swag", *PUBLISHED)}
    for key, value in priors["swag"].config.estimator.items():
        if key != "files":
            print(f"  {key.replace('_', ' ')}: {value}")
    chosen = priors[options.convention]
    chosen.save_pretrained(options.output / "imported_prior")
    plain = finetune(options, chosen, under_prior=False)
    model, accuracy, nll = finetune(options, PriorModel.from_pretrained(options.output / "imported_prior"), under_prior=True)
    print(f"{options.n} images of the digits 5-9, one seed, accuracy / NLL in nats:")
    print(f"  {accuracy:.3f} / {nll:.3f} under {options.convention}, {plain[1]:.3f} / {plain[2]:.3f} by plain fine-tuning")
    print(f"\n{'penalty of the result':<24}{'published formula':>22}{'prior_hub':>22}{'relative difference':>22}")
    rows = []
    for convention in PUBLISHED:
        theta = {n: p.detach().double() for n, p in model.named_parameters() if n in priors[convention].mean}
        published = published_penalty(convention, files, backbone(model).double())
        ours = priors[convention].penalty(theta).item()
        rows.append(
            {"convention": convention, "published": published, "prior_hub": ours, "difference": abs(ours / published - 1)}
        )
        print(f"{convention:<24}{published:>22.14g}{ours:>22.14g}{rows[-1]['difference']:>22.1e}")
    result = {"accuracy": accuracy, "nll": nll, "plain_accuracy": plain[1], "plain_nll": plain[2], "penalties": rows}
    (options.output / "import_legacy.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"{time.perf_counter() - started:.0f} s; every number is in {options.output / 'import_legacy.json'}")


if __name__ == "__main__":
    main()
