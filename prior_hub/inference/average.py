"""Bayesian model average: the mean of the probabilities that samples of the weights predict.

    p(y | x) = 1/S sum_s p(y | x, theta_s)         log p by log-sum-exp, so that small probabilities keep their digits
    entropy of the average = mean entropy of the members (what no member knows) + mutual information (where they disagree)

One model is in memory whatever S is: samples are read one after another into the same model, whose own weights are put back.
"""

from __future__ import annotations

import itertools
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from prior_hub.distributed import copy_full_, local_tensor, reshard
from prior_hub.errors import PriorFormatError, PriorHubError, PriorMatchError, PriorNotFoundError, PriorWarning
from prior_hub.inference.diagnostics import ChainDiagnostics, chain_diagnostics, warn_without_variability
from prior_hub.inference.samples import Sample, StoredSample, frozen_digest, list_samples
from prior_hub.model import PriorModel
from prior_hub.priors.batch_norm import has_batch_norm, recompute_batch_norm
from prior_hub.priors.matching import canonical_parameters, persistent_buffers, unwrapped

__all__ = ["AveragedPrediction", "BayesianModelAverage", "class_dimension", "default_logits", "ignore_index_of", "nll_of"]

_IGNORED = -100


@dataclass(frozen=True)
class AveragedPrediction:
    """What the average predicts.

    Attributes:
        log_probabilities: (B, C), (B, L, C) or, for segmentation, (B, C, H, W), float32; as good as logits for metrics.
        expected_entropy: mean entropy of the members' predictions in nats, the shape without C.
        num_members: S.
    """

    log_probabilities: Tensor
    expected_entropy: Tensor
    num_members: int

    @property
    def probabilities(self) -> Tensor:
        """As `log_probabilities`."""
        return self.log_probabilities.exp()

    @property
    def entropy(self) -> Tensor:
        """Entropy of the averaged prediction in nats: all of its uncertainty."""
        return _entropy(self.log_probabilities)

    @property
    def mutual_information(self) -> Tensor:
        """Mutual information of label and weights in nats: the part of the entropy that more data would remove."""
        return (self.entropy - self.expected_entropy).clamp(min=0)


class BayesianModelAverage:
    """Averages a model's predictions over samples of its weights.

        average = BayesianModelAverage.from_folder("out/samples", model)
        prediction = average.predict(dataloader)                 # all batches
        for batch, prediction in average.stream(dataloader): ... # one after another: memory does not grow with the data

    Args:
        model: any torch module; it keeps its weights, statistics and mode.
        members: the samples.
        logits: (output, batch) -> logits; `default_logits` when None.
        frozen: what `frozen_digest(model)` gave, where it is known already.

    Raises:
        PriorNotFoundError: there is no sample.
        PriorMatchError: a sample has a parameter that the model has not, of another shape, or was taken beside other frozen
            weights.
    """

    def __init__(
        self,
        model: nn.Module,
        members: Sequence[Sample | StoredSample],
        *,
        logits: Callable[[Any, Any], Tensor] | None = None,
        frozen: str | None = None,
    ) -> None:
        if not members:
            raise PriorNotFoundError("there is no sample to average over.")
        self.model = model
        self.members = list(members)
        self.logits = logits or default_logits
        self._frozen = frozen
        self._names: frozenset[str] | None = None  # of the tensors in a sample

    @classmethod
    def from_folder(
        cls,
        folder: str | os.PathLike[str],
        model: nn.Module,
        *,
        chain: int | None = None,
        logits: Callable[[Any, Any], Tensor] | None = None,
        frozen: str | None = None,
    ) -> BayesianModelAverage:
        """The average over the samples that `PriorTrainer` (or `write_sample`) wrote.

        Args:
            folder: OUTPUT_DIR/samples.
            model: a model of the same architecture.
            chain: only this chain; all of them when None.
            logits: as for the class.
            frozen: as for the class.

        Raises:
            PriorNotFoundError: there is none.
        """
        found = list_samples(folder, chain=chain)
        if not found:
            raise PriorNotFoundError(f"{folder} holds no sample (chain-0/sample-00000001.safetensors, ...).")
        laws: dict[str, set[str]] = {}
        for metadata in (sample.metadata() for sample in found):
            for name in ("sampler", "temperature", "scale", "num_data"):
                laws.setdefault(name, set()).add(str(metadata.get(name)))
        if differing := {name: sorted(values) for name, values in laws.items() if len(values) > 1}:
            warnings.warn(
                f"the samples in {folder} are of different posteriors: {differing}. Their average is of none of them; choose "
                "one chain, or keep them in different folders.",
                PriorWarning,
                stacklevel=2,
            )
        return cls(model, found, logits=logits, frozen=frozen)

    @classmethod
    def from_prior(
        cls,
        prior: PriorModel,
        model: nn.Module,
        *,
        num_samples: int = 10,
        seed: int = 0,
        dataloader: Iterable[Any] | None = None,
        logits: Callable[[Any, Any], Tensor] | None = None,
        **matching: Any,
    ) -> BayesianModelAverage:
        """The average over draws from the prior itself, at its own scale.

        Parameters the prior does not know stay as they are in the model.

        Args:
            prior: the prior.
            model: the model it is for.
            num_samples: S.
            seed: of the draws.
            dataloader: training data, to recompute BatchNorm statistics for each draw.
            logits: as for the class.
            **matching: as `PriorModel.match`.

        Raises:
            ValueError: the model has BatchNorm, and there is no dataloader.
        """
        if has_batch_norm(model) and dataloader is None:
            raise ValueError("the model has BatchNorm, whose statistics every draw needs anew: pass dataloader=training data.")
        match = prior.match(model, **matching)
        generator = torch.Generator().manual_seed(seed)
        members = []
        for _ in range(num_samples):
            draw = prior.sample(generator=generator)
            parameters = {target: draw[name] for name, target in match.pairs.items()}
            buffers = (
                {} if dataloader is None else recompute_batch_norm(model, dataloader, parameters=parameters, progress=False)
            )
            members.append(Sample(parameters, buffers))
        return cls(model, members, logits=logits)

    def __len__(self) -> int:
        """S."""
        return len(self.members)

    def stream(
        self, dataloader: Iterable[Any], *, block: int = 16, progress: bool = True
    ) -> Iterator[tuple[Any, AveragedPrediction]]:
        """(batch, prediction) for each batch, in order.

        Args:
            dataloader: batches: dictionaries (passed as keywords), tuples (first element), or tensors.
            block: batches for which a sample, once read, is used; memory holds the predictions of so many.
            progress: show a progress bar.
        """
        with self.own_weights_kept(), tqdm(desc=f"average of {len(self)}", unit=" forward", disable=not progress) as bar:
            batches = iter(dataloader)
            while chunk := list(itertools.islice(batches, block)):
                sums: list[tuple[Tensor, Tensor]] = []
                for index, member in enumerate(self.members):
                    self.put(member)
                    for position, batch in enumerate(chunk):
                        found = self._member(batch)
                        if index == 0:
                            sums.append(found)
                        else:
                            sums[position] = _joined(sums[position], found)
                        bar.update()
                chunk.reverse()
                sums.reverse()
                while chunk:  # what has been given is not held
                    yield chunk.pop(), _finished(sums.pop(), len(self))

    def predict(self, dataloader: Iterable[Any], *, progress: bool = True) -> AveragedPrediction:
        """All batches' predictions together, on the CPU.

        Raises:
            PriorHubError: the data loader gave no batch.
        """
        parts = [
            (found.log_probabilities.cpu(), found.expected_entropy.cpu())
            for _, found in self.stream(dataloader, progress=progress)
        ]
        if not parts:
            raise PriorHubError("the data loader gave no batch to predict.")
        try:
            return AveragedPrediction(torch.cat([p for p, _ in parts]), torch.cat([e for _, e in parts]), len(self))
        except RuntimeError as error:
            raise PriorHubError(
                f"the batches' predictions have different shapes ({error}): pad all batches to one length, or use stream()."
            ) from error

    def function_values(self, dataloader: Iterable[Any], *, progress: bool = True) -> Tensor:
        """Each member's log-probabilities on all batches, (S, B, C), on the CPU: for diagnostics, on a few hundred inputs."""
        batches, values = list(dataloader), []
        with self.own_weights_kept():
            for member in tqdm(self.members, desc="members", disable=not progress):
                self.put(member)
                values.append(torch.cat([self._member(batch)[0].cpu() for batch in batches]))
        return torch.stack(values)

    def diagnose(self, dataloader: Iterable[Any], *, functions: int = 200, progress: bool = True) -> ChainDiagnostics:
        """R-hat and effective sample size of the log-probabilities on some inputs, over the chains that the samples come from.

        Chains of different lengths are compared over the length of the shortest. The samples' likeness is warned of.

        Args:
            dataloader: batches, of a few dozen inputs that were not trained on.
            functions: how many function values are looked at, taken evenly.
            progress: show a progress bar.

        Raises:
            ImportError: arviz-stats is missing.
            ValueError: too few samples in a chain (4, or 8 of a single chain).
        """
        values = self.function_values(dataloader, progress=progress)
        if len(self) > 1:
            warn_without_variability(values.exp().movedim(class_dimension(values[0]) % (values.ndim - 1) + 1, 2))
        chains: dict[int, list[int]] = {}
        for index, member in enumerate(self.members):
            chains.setdefault(member.chain if isinstance(member, StoredSample) else 0, []).append(index)
        draws = min(len(indices) for indices in chains.values())
        flat = values.flatten(1)
        kept = flat[:, torch.linspace(0, flat.shape[1] - 1, min(functions, flat.shape[1])).long()]
        return chain_diagnostics(torch.stack([kept[indices[-draws:]] for indices in chains.values()]))

    @contextmanager
    def own_weights_kept(self) -> Iterator[None]:
        """Within, `put` may load samples into the model; afterwards it has its own weights, statistics and mode again."""
        reshard(self.model)
        tensors = [*canonical_parameters(self.model).values(), *persistent_buffers(self.model).values()]
        saved = [local_tensor(t).detach().clone() for t in tensors]
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            yield
        finally:
            reshard(self.model)
            with torch.no_grad():
                for tensor, value in zip(tensors, saved, strict=True):
                    local_tensor(tensor).copy_(value)
            for module, training in modes.items():
                module.training = training

    def put(self, member: Sample | StoredSample) -> None:
        """Put a sample into the model; only within `own_weights_kept`."""
        sample = member.read()
        if sample.frozen and self._frozen is None:
            self._frozen = frozen_digest(self.model)
        reshard(self.model)
        where = getattr(member, "path", "a sample")
        targets = canonical_parameters(self.model) | persistent_buffers(self.model)
        values = {**sample.parameters, **sample.buffers}
        for name, value in values.items():
            if name not in targets or targets[name].shape != value.shape:
                found = "no such parameter" if name not in targets else f"shape {tuple(targets[name].shape)}"
                raise PriorMatchError(f"{where} has {name!r} with shape {tuple(value.shape)}, the model {found}.")
        missing = [name for name, p in canonical_parameters(self.model).items() if p.requires_grad and name not in values]
        if missing and isinstance(member, StoredSample):
            raise PriorMatchError(
                f"{where} has nothing for {len(missing)} trained parameters of the model ({missing[0]!r}): freeze what was "
                "frozen when the samples were taken."
            )
        if sample.frozen and sample.frozen != self._frozen:
            raise PriorMatchError(
                f"{where} was taken beside other frozen weights than this model has: load the model it was trained from."
            )
        if self._names is not None and self._names != values.keys():
            differing = sorted(self._names ^ values.keys())
            raise PriorMatchError(
                f"{where} has other tensors than the members before it ({differing[0]!r} and {len(differing) - 1} more), and "
                "would be mixed with theirs."
            )
        self._names = frozenset(values)
        for name, value in values.items():
            copy_full_(targets[name], value)

    @torch.no_grad()
    def _member(self, batch: Any) -> tuple[Tensor, Tensor]:
        """(log-probabilities, entropy) of the sample that is loaded."""
        device = local_tensor(next(iter(canonical_parameters(self.model).values()))).device
        if isinstance(batch, Mapping):
            output = self.model(**{key: _moved(value, device) for key, value in batch.items()})
        else:
            output = self.model(_moved(batch[0] if isinstance(batch, (tuple, list)) else batch, device))
        return member_terms(self.logits(output, batch))


def member_terms(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probabilities, entropy) of one member, from its logits."""
    log_probabilities = logits.detach().float().log_softmax(class_dimension(logits))
    return log_probabilities, _entropy(log_probabilities)


def _joined(total: tuple[Tensor, Tensor], member: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return torch.logaddexp(total[0], member[0]), total[1] + member[1]


def _finished(total: tuple[Tensor, Tensor], members: int) -> AveragedPrediction:
    return AveragedPrediction(total[0] - math.log(members), total[1] / members, members)


def averaged(logits: Iterable[Tensor]) -> AveragedPrediction:
    """The average of the predictions that members' logits stand for, one after another."""
    total: tuple[Tensor, Tensor] | None = None
    count = 0
    for one in logits:
        count += 1
        terms = member_terms(one)
        total = terms if total is None else _joined(total, terms)
    if total is None:
        raise PriorNotFoundError("there is no member to average over.")
    return _finished(total, count)


def default_logits(output: Any, batch: Any) -> Tensor:
    """The logits in a model's output: `.logits`, ["logits"], the first of a tuple, or the tensor itself.

    Segmentation logits (B, C, h, w) that are smaller than the batch's labels (B, H, W) are enlarged to them, as the models of
    transformers do for their loss.

    Raises:
        PriorFormatError: there are none.
    """
    found = output
    if isinstance(output, Mapping) and "logits" in output:
        found = output["logits"]
    elif hasattr(output, "logits"):
        found = output.logits
    elif isinstance(output, (tuple, list)):
        found = output[0]
    if not isinstance(found, Tensor):
        raise PriorFormatError(
            f"no logits in the model's output, a {type(output).__name__}: pass logits=(output, batch) -> tensor."
        )
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    return found if labels is None else enlarged(found, labels)


def enlarged(logits: Tensor, labels: Tensor) -> Tensor:
    """Segmentation logits (B, C, h, w) at the size of labels (B, H, W); others as they are."""
    if logits.ndim != 4 or labels.ndim != 3 or logits.shape[2:] == labels.shape[1:]:
        return logits
    return nn.functional.interpolate(logits.float(), size=labels.shape[1:], mode="bilinear", align_corners=False)


def class_dimension(logits: Tensor) -> int:
    """Where the classes are: 1 for segmentation, (B, C, H, W), the last for everything else."""
    return 1 if logits.ndim == 4 else -1


def nll_of(log_probabilities: Tensor, labels: Tensor, ignore_index: int = _IGNORED) -> Tensor:
    """Mean NLL of labels (the shape without C) in nats, over those that are not `ignore_index`: 0-d float32.

    Raises:
        PriorMatchError: labels of another shape.
    """
    by_class = (
        log_probabilities.movedim(class_dimension(log_probabilities), 1) if log_probabilities.ndim > 1 else log_probabilities
    )
    if by_class.shape[:1] + by_class.shape[2:] != labels.shape:
        raise PriorMatchError(f"predictions {tuple(log_probabilities.shape)} do not fit labels {tuple(labels.shape)}.")
    return nn.functional.nll_loss(by_class.float(), labels.long(), ignore_index=ignore_index)


def ignore_index_of(model: nn.Module, labels: Tensor | None = None) -> int:
    """The label that a model's loss leaves out: for segmentation what its config says (255 as a rule), else -100.

    In transformers it is `semantic_loss_ignore_index` (SegFormer, BEiT, DPT, MobileViT) or `loss_ignore_index` (UperNet).
    Some configs have it for their classification heads too, where 255 is a class like any other.

    Args:
        model: any model.
        labels: what it is asked about; pictures of labels, (B, H, W), when None.
    """
    if labels is not None and labels.ndim != 3:
        return _IGNORED
    config = getattr(unwrapped(model), "config", None)
    for name in ("semantic_loss_ignore_index", "loss_ignore_index"):
        found = getattr(config, name, None)
        if isinstance(found, int):
            return found
    return _IGNORED


def _entropy(log_probabilities: Tensor) -> Tensor:
    entropy: Tensor = torch.special.entr(log_probabilities.exp()).sum(class_dimension(log_probabilities))
    return entropy


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
