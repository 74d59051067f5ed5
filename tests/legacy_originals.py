"""Small implementations of the two programs whose files are imported, from what their sources do; nothing of prior_hub.

`PaperSwag`: one flat vector, rows in one matrix, divided on export, variances at least 1e-6 (hsouri/BayesianTransferLearning).
`SwaGaussian`: a module whose parameters become buffers, children first (wjmaddox/swa_gaussian).
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import nn
from torch.distributions import LowRankMultivariateNormal


class Network(nn.Module):
    """A backbone with BatchNorm and a head, every tensor large enough to be recognised."""

    def __init__(self, classes=0):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer = nn.Sequential(nn.Conv2d(64, 8, 1), nn.BatchNorm2d(8))
        self.fc = nn.Linear(8, classes) if classes else nn.Identity()

    def forward(self, x):
        return self.fc(self.layer(self.bn1(self.conv1(x)).relu()).mean((2, 3)))


def network(seed=0, classes=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Network(classes)
        with torch.no_grad():
            for p in net.parameters():
                p += 0.3 * torch.randn_like(p)
            net.bn1.running_mean.normal_()
            net.bn1.running_var.uniform_(0.5, 2)
    return net


def trajectory(net, n, seed=0, spread=0.01, drift=0.0):
    """Moves the parameters of `net` n times; yields it after each. Standard deviations differ from entry to entry."""
    g = torch.Generator().manual_seed(seed)
    start = [p.detach().clone() for p in net.parameters()]
    sd = [spread * 10 ** (0.25 * torch.randn(p.shape, generator=g)) for p in start]
    walk = [torch.zeros_like(p) for p in start]
    for _ in range(n):
        with torch.no_grad():
            for p, p0, s, w in zip(net.parameters(), start, sd, walk, strict=True):
                step = s * torch.randn(p.shape, generator=g)
                w += drift * step
                p.copy_(p0 + step + w)
        yield net


def flat(net):
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()])


class PaperSwag:
    def __init__(self, max_rank, clamp=1e-6):
        self.max_rank, self.clamp, self.n, self.rows = max_rank, clamp, 0, []

    def collect(self, net):
        w = flat(net)
        if self.n == 0:
            self.mean, self.sq_mean = torch.zeros_like(w), torch.zeros_like(w)
        self.mean = self.mean * (self.n / (self.n + 1.0)) + w / (self.n + 1.0)
        self.sq_mean = self.sq_mean * (self.n / (self.n + 1.0)) + w**2 / (self.n + 1.0)
        self.rows = [*self.rows, w - self.mean][-self.max_rank :]
        self.n += 1

    def export(self, divided=True):
        covmat = torch.stack(self.rows)
        return {
            "mean": self.mean,
            "variance": torch.clamp(self.sq_mean - self.mean**2, self.clamp),
            "covmat": covmat / math.sqrt(len(covmat) - 1) if divided else covmat,
        }


def paper_files(folder, n=12, rank=8, *, divided=True, seed=0, net=None, name="prior", drift=0.0, **changes):
    """Writes the four files; returns what is in them and the snapshots. `changes` replace tensors (None: no file)."""
    net = network(seed) if net is None else net
    swag, snapshots = PaperSwag(rank), []
    for moved in trajectory(net, n, seed, drift=drift):
        swag.collect(moved)
        snapshots.append(flat(moved).double())
    files = swag.export(divided) | {"model": net.state_dict()} | changes
    Path(folder).mkdir(parents=True, exist_ok=True)
    for kind, value in files.items():
        if value is not None:
            torch.save(value, Path(folder) / f"{name}_{kind}.pt")
    return files, torch.stack(snapshots)


def original_log_prob(convention, files, theta, *, k, scale=1e10, eps=0.1):
    """log density as the published code has it, on the files as they are, in float64."""
    mean, v, q = (files[kind].double() for kind in ("mean", "variance", "covmat"))
    q = q[:k]
    if convention == "paper":
        cov, diag = scale * q, scale * v + eps
    elif convention == "paper-unscaled":
        cov, diag = q, scale * v + eps
    elif convention == "tufts":
        cov, diag = math.sqrt(scale / (2 * (k - 1))) * q, scale * v / 2 + eps
    elif convention == "tufts-elbo":
        cov, diag = math.sqrt(scale) * math.sqrt(1 / (2 * k - 2)) * q, scale * (0.5 * v + eps)
    else:
        raise AssertionError(convention)
    return LowRankMultivariateNormal(mean, cov.T, diag).log_prob(theta)


class SwaGaussian(nn.Module):
    """Parameters of `base` become buffers <p>_mean, <p>_sq_mean, <p>_cov_mat_sqrt, in the order of `Module.apply`."""

    def __init__(self, base, max_num_models):
        super().__init__()
        self.register_buffer("n_models", torch.zeros([1], dtype=torch.long))
        self.base, self.max_num_models, self.places = base, max_num_models, []
        base.apply(self._take)

    def _take(self, module):
        for name in list(module._parameters):
            p = module._parameters.pop(name)
            if p is None:
                continue
            module.register_buffer(f"{name}_mean", torch.zeros_like(p.data))
            module.register_buffer(f"{name}_sq_mean", torch.zeros_like(p.data))
            module.register_buffer(f"{name}_cov_mat_sqrt", torch.zeros(0, p.numel()))
            self.places.append((module, name))

    def collect(self, net):
        n = self.n_models.item()
        for (module, name), p in zip(self.places, net.parameters(), strict=True):
            mean = getattr(module, f"{name}_mean") * (n / (n + 1.0)) + p.data / (n + 1.0)
            square = getattr(module, f"{name}_sq_mean") * (n / (n + 1.0)) + p.data**2 / (n + 1.0)
            rows = torch.cat([getattr(module, f"{name}_cov_mat_sqrt"), (p.data - mean).reshape(1, -1)])
            setattr(module, f"{name}_mean", mean)
            setattr(module, f"{name}_sq_mean", square)
            setattr(module, f"{name}_cov_mat_sqrt", rows[1:] if n + 1 > self.max_num_models else rows)
        self.n_models += 1


def swa_checkpoint(path, n=12, rank=8, *, seed=0, make=network, update_bn=True, drift=0.0, spread=0.01):
    """Writes {"epoch", "state_dict"}; returns the state_dict, the snapshots and the network at the end."""
    net = make(seed)
    swag, snapshots = SwaGaussian(make(seed), rank), []
    for moved in trajectory(net, n, seed, spread=spread, drift=drift):
        swag.collect(moved)
        snapshots.append({name: p.detach().double().clone() for name, p in moved.named_parameters()})
    state = swag.state_dict()
    if not update_bn:
        for key in state:
            if key.endswith("running_mean"):
                state[key].zero_()
            if key.endswith("running_var"):
                state[key].fill_(1)
    torch.save({"epoch": n, "state_dict": state}, path)
    return state, snapshots, net
