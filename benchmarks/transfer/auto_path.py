"""A study: what the path of `prior_scale="auto"` says of a scale, and what a whole training on the same images says.

    python benchmarks/transfer/auto_path.py benchmarks/transfer/cifar_trial.toml --seed 0 --scales 22000 2200 220 22
    python benchmarks/transfer/auto_path.py benchmarks/transfer/cifar_trial.toml --seed 0 --longer 3

Prints the NLL on the held-out fifth that `auto` measures on: along its path, and of a whole training on the four fifths at each
of the scales. Nothing is chosen by the test images, whose NLL is printed beside the second.
"""

from __future__ import annotations

import tomllib
from typing import Any

import cells
import torch

from prior_hub import PriorTrainer
from prior_hub.finetuning.scale import held_out_split


def main() -> None:
    """One seed."""
    parser = cells.study_arguments(__doc__)
    parser.add_argument("--scales", type=float, nargs="*", default=[], help="of whole trainings; none: the path")
    parser.add_argument("--longer", type=int, default=1, help="the path takes this many times its steps (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=0.02)
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = tomllib.loads(options.config.read_text())
    task = cells.TASKS[config["task"]](config, options.work / options.config.stem)
    target = config["target"]
    compiled = target.get("compile", False)
    images, prior = task.data(options.n, options.seed), task.prior()
    settings: dict[str, Any] = {
        "max_steps": target["steps"][target["numbers"].index(options.n)],
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "cosine",
        "per_device_train_batch_size": target["batch_size"],
        "dataloader_drop_last": True,
        "seed": options.seed,
        "prior_initialize": False,
    }
    cells.set_seed(1000 + options.seed)
    _, settings["prior_head_variance"] = task.model(prior, images)
    if not options.scales:
        settings["max_steps"] *= options.longer
        choice = cells.found_scale(task, prior, settings, images, compiled=compiled)
        for name, trials in (("path", choice.trials), ("whole trainings", choice.checks)):
            print(f"{name}: " + ", ".join(f"{t.scale:.2g}: {t.nll:.3f}" for t in trials))
        print(choice.report(), flush=True)
    rest, held = (images.part(torch.tensor(p.indices)) for p in held_out_split(images, 0.2, options.seed))
    for scale in options.scales:
        cells.set_seed(1000 + options.seed)
        model, _ = task.model(prior, rest)
        if compiled:
            model.forward = torch.compile(model.forward)  # type: ignore[method-assign]
        cells.train(PriorTrainer, model, {**settings, "prior_scale": scale}, rest, prior=prior)
        vars(model).pop("forward", None)
        found = [cells.measure(model, part)["nll"] for part in (held, task.test())]
        print(f"scale {scale:g}: NLL {found[0]:.4f} held out, {found[1]:.4f} on the test images", flush=True)


if __name__ == "__main__":
    main()
