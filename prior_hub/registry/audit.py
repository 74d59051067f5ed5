"""What a publisher should put right before others rely on a prior: everything a reader needs that is missing or doubtful.

Loading has checked that the prior is whole (hashes, names, shapes, values). Here it is asked whether a stranger can use it: may
they, what is it over, what does it know, how was it made, does the card say the same, and does anything lie beside it that
should not.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCardData
from torch import Tensor

from prior_hub.errors import PriorFormatError, PriorHubError, PriorNotFoundError
from prior_hub.priors.config import CONFIG_NAME, PriorConfig, is_hub_name
from prior_hub.priors.diagnosis import Diagnosis
from prior_hub.priors.gaussian import LowRankGaussian
from prior_hub.priors.storage import CARD_NAME, INDEX_NAME, WEIGHTS_NAME, leads_out
from prior_hub.registry.card import BEGIN, END, card_metadata, read_card, render_card, split_card
from prior_hub.registry.client import explained, hub_client, join

__all__ = [
    "Finding",
    "HubState",
    "audit_card",
    "audit_config",
    "audit_files",
    "audit_hub",
    "audit_values",
    "hub_state",
    "local_card",
]

_FEWEST_SNAPSHOTS = 10
_MOST_AT_FLOOR = 0.01  # share of the variances
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".tar", ".gz", ".zip")
_BELONG = (".md", ".txt", ".png", ".jpg", ".jpeg", ".svg", ".gif", ".pdf", ".bib", ".cff", ".json", ".yaml", ".yml", ".csv")
_BELONG_NAMES = (".gitattributes", "LICENSE", "LICENCE", "NOTICE", "tokenizer.model", "chat_template.jinja", ".gitignore")
_TOKEN = re.compile(r"token(?!iz)(?<!special_token)(?<!added_token)")  # not a tokenizer's files, of the model it lies beside
_OF_A_MODEL = re.compile(r"(model|adapter_model)(-[0-9]{5}-of-[0-9]{5})?\.safetensors")  # which a prior may lie beside
_SQUARE = 1.8e19  # magnitude above which float32 cannot hold the square
_BLOCK = 1 << 20  # entries looked at at a time


@dataclass(frozen=True)
class Finding:
    """One thing that is missing or doubtful.

    Attributes:
        what: what was found.
        do: what to do about it.
    """

    what: str
    do: str

    def __str__(self) -> str:
        """Both, as one line."""
        return f"{self.what}: {self.do}"


@dataclass(frozen=True)
class HubState:
    """What a repository says of itself.

    Attributes:
        files: paths in the prior's folder of the repository, relative to it.
        private: only some accounts see it.
        gated: terms are to be accepted first ("auto", "manual"), or False.
        tags: names of the tags that point at the commit.
        card: text of the card, None without one.
    """

    files: tuple[str, ...]
    private: bool
    gated: str | bool
    tags: tuple[str, ...]
    card: str | None


def audit_config(config: PriorConfig) -> list[Finding]:
    """What the configuration leaves out: licence, base model, source data, estimator, versions, snapshots."""
    found = []

    def need(value: Any, what: str, do: str) -> None:
        if not value:
            found.append(Finding(what, do))

    need(
        config.license,
        "no licence is recorded",
        "record the Hub's identifier of it (license='apache-2.0'), or nobody may use it",
    )
    if config.license and "license_name" in card_metadata(config):
        found.append(
            Finding(
                f"the licence {config.license[:60]!r} is not in the Hub's form",
                "use an identifier of the Hub's list, 'cc-by-4.0'",
            )
        )
    need(config.base_model, "no base model is recorded", "record its name on the Hub (base_model='org/model')")
    if config.base_model and not is_hub_name(config.base_model):
        what = f"the base model {config.base_model[:60]!r} is no name on the Hub"
        found.append(Finding(what, "a reader cannot fetch it: record the name under which it is published"))
    if config.base_model:
        need(
            config.base_model_revision,
            "the revision of the base model is not recorded",
            "record the commit its weights are from (base_model_revision=): a branch moves",
        )
    made = config.estimator
    if made.get("name") != "isotropic":
        need(
            config.source.get("dataset"),
            "no source data set is recorded",
            "record what the prior has seen (source={'dataset': ...})",
        )
        if config.source.get("dataset"):
            need(
                config.source.get("dataset_license"),
                "the licence of the source data set is not recorded",
                "record it (learn or push --dataset-license, source={'dataset_license': ...}): it may bind who uses the prior",
            )
        need(
            config.source.get("objective"),
            "the source task's objective is not recorded",
            "record it (source={'objective': ...})",
        )
    need(
        made.get("name"), "the estimator is not recorded", "record how the moments were taken (estimator={'name': 'swag', ...})"
    )
    if made.get("name") and not made.keys() - {"name", "batch_norm"}:
        what = f"no arguments of the estimator {made['name']!r:.60} are recorded"
        found.append(Finding(what, "record those it ran with (learning rate, interval, batch size): nobody can make it again"))
    need(
        config.prior_hub_version,
        "the version of prior_hub that made it is not recorded",
        "record it (config.replace(prior_hub_version=...))",
    )
    missing = [name for name in ("torch",) if name not in config.libraries]
    need(
        not missing,
        f"versions of libraries are not recorded: {', '.join(missing)}",
        "record them (config.replace(libraries={'torch': torch.__version__})), as `PriorModel.from_tensors` does",
    )
    if config.rank and config.num_snapshots is None:
        found.append(
            Finding("the number of snapshots is not recorded", "record over how many the moments were taken (num_snapshots=)")
        )
    if config.num_snapshots is not None and config.num_snapshots < _FEWEST_SNAPSHOTS and config.rank:
        what = f"it was taken over {config.num_snapshots} snapshots only"
        found.append(Finding(what, f"take {_FEWEST_SNAPSHOTS} or more: the covariance is a rough estimate"))
    return found


def audit_values(gaussian: LowRankGaussian, diagnosis: Diagnosis, variance_floor: float) -> list[Finding]:
    """What is doubtful in the numbers: variances at the floor, denormals, squares that overflow, what `diagnose` remarks."""
    found = [Finding(*_sentence(remark)) for remark in diagnosis.remarks]
    if diagnosis.share_at_floor > _MOST_AT_FLOOR and not any("at the floor" in finding.what for finding in found):
        what = f"{100 * diagnosis.share_at_floor:.1f} % of the variances are at the floor ({variance_floor:g})"
        found.append(Finding(what, "these weights did not move between snapshots: take them further apart, or lower the floor"))
    denormal = sum(_count(v, lambda part: part < torch.finfo(part.dtype).tiny) for v in gaussian.variance.values())
    if denormal:
        what = f"{denormal} variances are denormal numbers"
        found.append(
            Finding(what, "accelerators take them for zero: raise them with variance_floor, or store variances with a scale")
        )
    large = sum(_count(m, lambda part: part.abs() > _SQUARE) for m in gaussian.mean.values())
    if large:
        found.append(Finding(f"{large} means are above {_SQUARE:g}", "float32 cannot hold their squares: these are no weights"))
    return found


def audit_card(text: str | None, config: PriorConfig, *, problem: str | None = None) -> list[Finding]:
    """What is wrong with the card: not there, not valid, or saying something else than the configuration.

    Args:
        text: of the card; None where there is none.
        config: the prior's.
        problem: what the Hub's own validator said of it, or why it could not be read.
    """
    if problem is not None:
        return [Finding(f"the card is not valid ({problem[:300]})", f"put {CARD_NAME} right")]
    if text is None:
        return [Finding("there is no model card", f"save it again with prior_hub, which writes {CARD_NAME}")]
    try:
        metadata, _ = split_card(text)
        ModelCardData(**{str(key): value for key, value in metadata.items()}, ignore_metadata_errors=False)
    except (PriorFormatError, ValueError, TypeError, KeyError, AttributeError) as error:
        return [
            Finding(f"the card's metadata are not valid ({_line(error)})", f"put the block at the top of {CARD_NAME} right")
        ]
    found = []
    if not metadata:
        found.append(Finding("the card has no metadata", "save the prior again: the Hub finds nothing without them"))
    for key, value in card_metadata(config).items():
        there = metadata.get(key)
        if (
            metadata
            and key in ("license", "base_model")
            and there != value
            and value not in (there if isinstance(there, list) else [])
        ):
            found.append(Finding(f"the card's {key} is {there!r:.80}, the configuration's {value!r:.80}", "make them the same"))
    lines = {line for line in _rendered(render_card(config)).splitlines() if line.startswith("| ")}
    section = _rendered(text)
    if not section:
        found.append(
            Finding("the card has no section rendered from the configuration", "push or save the prior again: it is added")
        )
    elif wrong := sorted(lines - set(section.splitlines())):
        what = f"the card's rendered section is not that of this configuration ({len(wrong)} lines differ, {wrong[0][:80]!r})"
        found.append(Finding(what, "save or push the prior again: the section is rendered anew, your own text stays"))
    return found


def audit_files(names: Iterable[str], config: PriorConfig, *, folder: Path | None = None) -> list[Finding]:
    """Which files beside the prior do not belong there.

    Args:
        names: of the files and folders in the prior's folder.
        config: the prior's.
        folder: where they are, if they are here: links that lead out of it are named.
    """
    found = []
    for name in sorted(names):
        first = name.split("/")[0]
        suffix = Path(name).suffix.lower()
        shown = repr(name[:100])
        if name in (CONFIG_NAME, CARD_NAME, *config.weight_files) or (name == INDEX_NAME and len(config.weight_files) > 1):
            pass
        elif suffix in _PICKLES:
            what = f"{shown} is a pickle or an archive"
            found.append(Finding(what, "remove it: who loads it may run whatever it says; prior_hub never opens it"))
        elif name in (INDEX_NAME, WEIGHTS_NAME) or (first == name and name.startswith("prior-") and suffix == ".safetensors"):
            found.append(Finding(f"{shown} is no file of this prior", "remove it: it is left from another one"))
        elif first.startswith(".prior-"):
            found.append(Finding(f"{shown} is left from a save that was interrupted", "save the prior again: it tidies up"))
        elif first.startswith(".env") or _TOKEN.search(first.lower()) or suffix in (".pem", ".key"):
            found.append(Finding(f"{shown} may hold a secret", "remove it, and replace the secret if it was published"))
        elif (
            name not in _BELONG_NAMES
            and not _OF_A_MODEL.fullmatch(name)
            and suffix not in _BELONG
            and not (folder and (folder / name).is_dir())
            and "/" not in name
        ):
            found.append(Finding(f"{shown} does not belong to a prior", "remove it, or keep it elsewhere"))
        if folder is not None and leads_out(folder / name):
            target = os.path.realpath(folder / name)
            found.append(
                Finding(f"{shown} is a link to {target[:100]!r}", "put the file itself here: the link leads out of the folder")
            )
    return found


def audit_hub(state: HubState) -> tuple[list[Finding], list[str]]:
    """(what to put right, what is worth knowing) of a repository."""
    found, notes = [], []
    if not state.tags:
        found.append(
            Finding("no tag points at this commit", "tag it (push --tag v1.0), so that it can be loaded by a name that stays")
        )
    if state.private:
        notes.append("the repository is private: only those who may see it can load the prior")
    if state.gated:
        notes.append(f"the repository is gated ({state.gated}): readers accept its terms first and log in")
    return found, notes


def hub_state(
    repo_id: str, commit: str, *, subfolder: str | None = None, token: str | bool | None = None
) -> tuple[HubState, str | None]:
    """What a repository says of itself at a commit, and what the Hub's own validator says of its card (None: nothing).

    Raises:
        PriorNotFoundError, PriorAccessError, PriorConnectionError: as `download_prior`.
    """
    api = hub_client(token)
    with explained(repo_id, commit, subfolder):
        info = api.model_info(repo_id, revision=commit)
        tags = [ref.name for ref in api.list_repo_refs(repo_id).tags if ref.target_commit == commit]
    prefix = join(subfolder, "")
    paths = [sibling.rfilename for sibling in info.siblings or []]
    files = [path.removeprefix(prefix) for path in paths if path.startswith(prefix)]
    text = problem = None
    if CARD_NAME in files:
        with explained(repo_id, commit, subfolder):
            path = Path(api.hf_hub_download(repo_id, prefix + CARD_NAME, revision=commit))
        try:
            text = read_card(path)
            split_card(text)  # bounded, before the client reads it
            with explained(repo_id, commit, subfolder), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of empty metadata, which `audit_card` finds
                api._validate_yaml(text, repo_type="model")  # ModelCard.validate asks huggingface.co whatever the endpoint is
        except PriorFormatError as error:
            problem = _line(error.__cause__ or error)
    gated = info.gated or False
    state = HubState(tuple(files), bool(info.private), gated, tuple(tags), text)
    return state, problem


def local_card(folder: Path) -> tuple[str | None, str | None]:
    """(text of the card in a folder, why it cannot be read)."""
    path = folder / CARD_NAME
    if not path.exists() and not path.is_symlink():
        return None, None
    try:
        return read_card(path), None
    except (PriorHubError, PriorNotFoundError, OSError) as error:
        return None, _line(error)


def _sentence(remark: str) -> tuple[str, str]:
    """A remark of `diagnose`, cut after what was found."""
    what, _, rest = remark.rstrip(".").partition(": ")
    return what, rest or "take the snapshots again"


def _rendered(text: str) -> str:
    start, stop = text.find(BEGIN), text.find(END)
    return text[start:stop].replace("\r\n", "\n") if 0 <= start < stop else ""


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _count(tensor: Tensor, wrong: Callable[[Tensor], Tensor]) -> int:
    return sum(int(wrong(part).sum()) for part in torch.split(tensor.reshape(-1), _BLOCK)) if tensor.numel() else 0
