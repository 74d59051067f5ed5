"""A study: the prior's scale found within one training run, by the gradient of a held-out loss.

    python benchmarks/transfer/in_run_scale.py benchmarks/transfer/cifar_trial.toml --n 500 --seed 0 --scale 1e5

For the first 60 % of the steps a fifth of the n images is held out. After an implicit step

    theta' = mean + Sigma (Sigma + C)^-1 (theta - mean)        d theta' / d log scale = theta' - theta''

where theta'' is the same step taken once more, from theta'. So one held-out gradient g tells every second step whether a wider
prior would have helped: log scale goes down by 0.15 times g . (theta' - theta'') over its running root mean square. Then the
fifth is put back, and the scale stays where it is. Prints the path of the scale and the result on the test set.

Source: Luketina et al. 2016, arXiv 1511.06727 (T1-T2). Differs: a proximal step as the regulariser, and normalised outer steps.
"""

from __future__ import annotations

import math
import time
import tomllib

import torch
from cells import TASKS, Images, measure, study_arguments
from transformers import set_seed

from prior_hub import PriorPenalty

HELD_OUT_STEPS, OUTER_STEP, BATCH, HELD_OUT_BATCH = 0.6, 0.15, 32, 50


def main() -> None:
    """One run."""
    parser = study_arguments(__doc__)
    parser.add_argument("--scale", type=float, default=1e5, help="where it starts (default: %(default)s)")
    options = parser.parse_args()
    config = tomllib.loads(options.config.read_text())
    target = config["target"]
    highest = target["learning_rates"][0]
    steps = target["steps"][target["numbers"].index(options.n)]
    task = TASKS[config["task"]](config, options.work / options.config.stem)
    prior = task.prior()
    fit, held_out = task.tuning(options.n, options.seed)
    images = task.data(options.n, options.seed)
    set_seed(1000 + options.seed)
    model, head_variance = task.model(prior, fit)
    print(f"start: {measure(model, task.test())}, head variance {head_variance:.3g}", flush=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=highest, momentum=0.9)
    generator = torch.Generator().manual_seed(options.seed)
    logarithm, square, count, path, order, used = math.log(options.scale), 0.0, 0, [], [], fit
    penalty = PriorPenalty(prior, model, num_examples=len(used), scale=options.scale, head_variance=head_variance)
    began = time.perf_counter()
    for step in range(steps):
        adapting = step < HELD_OUT_STEPS * steps
        if not adapting and used is fit:
            used, order = images, []
        if len(order) < BATCH:
            order = torch.randperm(len(used), generator=generator).tolist()
        batch, order = torch.tensor(order[:BATCH]), order[BATCH:]
        model.train()
        optimizer.zero_grad()
        model(used.batch(batch), used.labels[batch])["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = highest * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        lengths = {id(p): rate / 0.1 for p in model.parameters()}
        penalty = PriorPenalty(prior, model, num_examples=len(used), scale=math.exp(logarithm), head_variance=head_variance)
        penalty.proximal_step_(lengths)
        if adapting and step % 2:
            slope = slope_of_log_scale(model, penalty, lengths, held_out, generator)
            count += 1
            square = 0.9 * square + 0.1 * slope**2
            logarithm -= OUTER_STEP * slope / (math.sqrt(square / (1 - 0.9**count)) + 1e-12)
            logarithm = max(math.log(0.1), min(math.log(1e8), logarithm))
            path.append(round(logarithm / math.log(10), 2))
    print(f"log10 of the scale on the way: {path[::6]}")
    print(f"seed {options.seed}, from {options.scale:g} to {math.exp(logarithm):.0f}, {time.perf_counter() - began:.0f} s:")
    print(measure(model, task.test()))


def slope_of_log_scale(model, penalty: PriorPenalty, lengths, held_out: Images, generator: torch.Generator) -> float:
    """d held-out loss / d log scale through the last implicit step; the model's weights are left as they are."""
    model.eval()
    model.zero_grad()
    chosen = torch.randint(0, len(held_out), (HELD_OUT_BATCH,), generator=generator)
    plain = Images(held_out.pixels, held_out.labels, augment=False)
    model(plain.batch(chosen), held_out.labels[chosen])["loss"].backward()
    parameters = {name: penalty.trained_parameters()[name] for name in penalty.gaussian.names}
    before = {name: p.detach().clone() for name, p in parameters.items()}
    penalty.gaussian.proximal_step_(parameters, {name: lengths[id(p)] / penalty.num_examples for name, p in parameters.items()})
    slope = sum(float((p.grad * (before[name] - p.detach())).sum()) for name, p in parameters.items())
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(before[name])
    return slope


if __name__ == "__main__":
    main()
