"""The model card of a prior, rendered from its configuration.

The rendered part stands between two comments; a person's own text before and after them survives every rendering, and so
does every metadata key that is not rendered here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from prior_hub.priors.config import PriorConfig

__all__ = ["card_metadata", "render_card", "update_card"]

BEGIN = "<!-- prior_hub: rendered from prior_config.json; text outside these comments is kept -->"
END = "<!-- prior_hub: end -->"
PLACEHOLDER = "path/to/this/prior"
_METADATA = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_TAGS = ("prior-hub", "prior", "bayesian", "transfer-learning")


def card_metadata(config: PriorConfig) -> dict[str, Any]:
    """The Hub metadata of a prior's card: what is known, and nothing that is not a valid Hub value."""
    data: dict[str, Any] = {"library_name": "prior-hub"}
    if config.license:
        data["license"] = config.license
    if config.base_model and _HUB_ID.fullmatch(config.base_model):
        data["base_model"] = config.base_model
    dataset = config.source.get("dataset")
    datasets = [dataset] if isinstance(dataset, str) else list(dataset or ())
    valid = [name for name in datasets if isinstance(name, str) and _HUB_ID.fullmatch(name)]
    if valid:
        data["datasets"] = valid
    estimator = str(config.estimator.get("name", "")).lower()
    data["tags"] = [*_TAGS, *([estimator] if re.fullmatch(r"[a-z0-9-]+", estimator) else [])]
    return data


def render_card(
    config: PriorConfig, *, repo_id: str | None = None, subfolder: str | None = None, title: str | None = None
) -> str:
    """The whole card: metadata, how to use the prior, what it is, where it comes from, its limits, whom to cite.

    Args:
        config: the prior's configuration; every number in the card is from it.
        repo_id: the Hub name the how-to-use block loads; a placeholder when not known yet.
        subfolder: folder of the repository the prior lies in.
        title: the heading; made from `repo_id` or `base_model` when None.
    """
    name = title or (repo_id.split("/")[-1] if repo_id else f"Prior over {config.base_model or config.model_type or 'a model'}")
    body = "\n\n".join(
        [
            BEGIN,
            f"# {name}",
            _summary(config),
            "## How to use",
            _how_to_use(repo_id or PLACEHOLDER, subfolder),
            "## What it is",
            _COVARIANCE,
            _table(config),
            "## Where it comes from",
            _provenance(config),
            "## Limits",
            _limits(config),
            "## Citation",
            _CITATION,
            END,
        ]
    )
    return _join(card_metadata(config), body + "\n")


def update_card(existing: str | None, rendered: str, *, repo_id: str | None = None, subfolder: str | None = None) -> str:
    """Put a rendered card into an existing one, keeping what a person wrote.

    Args:
        existing: the card that is there, or None.
        rendered: a text made by `render_card`, possibly edited around its rendered part.
        repo_id: replaces the placeholder of the how-to-use block.
        subfolder: added to that block.
    """
    if repo_id:
        rendered = rendered.replace(_load_line(PLACEHOLDER, None), _load_line(repo_id, subfolder))
    if not existing:
        return rendered
    new_data, new_body = split_card(rendered)
    old_data, old_body = split_card(existing)
    start, stop = new_body.find(BEGIN), new_body.find(END)
    section = new_body[start : stop + len(END)] if 0 <= start < stop else new_body
    begin, end = old_body.find(BEGIN), old_body.find(END)
    if 0 <= begin < end:
        merged = old_data | new_data
        for key in ("tags", "datasets"):
            both = [*_as_list(old_data.get(key)), *_as_list(new_data.get(key))]
            if both:
                merged[key] = list(dict.fromkeys(both))
        return _join(merged, old_body[:begin] + section + old_body[end + len(END) :])
    # the card of something else, such as the model the prior lies beside: its metadata wins, the prior is added
    merged = new_data | old_data
    merged["tags"] = list(dict.fromkeys([*_as_list(old_data.get("tags")), *_as_list(new_data.get("tags"))]))
    return _join(merged, old_body.rstrip() + "\n\n" + section + "\n")


def split_card(text: str) -> tuple[dict[str, Any], str]:
    """(metadata, body) of a card.

    Raises:
        ValueError: the metadata block is not a YAML mapping.
    """
    match = _METADATA.match(text)
    if match is None:
        return {}, text
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        raise ValueError(f"the model card's metadata is not valid YAML: {error}") from error
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ValueError("the model card's metadata is not a mapping of keys to values.")
    return data, text[match.end() :].lstrip("\n")


def _join(data: Mapping[str, Any], body: str) -> str:
    text = yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True, width=1_000_000)
    return f"---\n{text}---\n\n{body}"


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _summary(config: PriorConfig) -> str:
    over = f"`{config.base_model}`" if config.base_model else f"a `{config.model_type or 'torch'}` model"
    low_rank = f", with a low-rank part of {config.rank} deviations" if config.rank else ""
    return (
        f"A Gaussian prior over {config.num_parameters:,} weights of {over}{low_rank}: what the source task knows about "
        "the weights, in the form of a penalty for fine-tuning. It changes the whole loss surface, not only the starting "
        "point."
    )


def _load_line(name: str, subfolder: str | None) -> str:
    folder = f', subfolder="{subfolder}"' if subfolder else ""
    return f'prior = PriorModel.from_pretrained("{name}"{folder})'


def _how_to_use(name: str, subfolder: str | None) -> str:
    return (
        "With a `model` to fine-tune and its `train_dataset`, as for the Hugging Face `Trainer`:\n\n"
        "```python\n"
        "from prior_hub import PriorModel, PriorTrainer, PriorTrainingArguments\n\n"
        f"{_load_line(name, subfolder)}\n"
        "print(prior.match(model))  # which parameters of your model are under the prior\n\n"
        "trainer = PriorTrainer(\n"
        "    model=model,\n"
        "    prior=prior,\n"
        '    args=PriorTrainingArguments(output_dir="out", prior_scale=prior.scale),\n'
        "    train_dataset=train_dataset,\n"
        ")\n"
        "trainer.train()\n"
        "```"
    )


def _table(config: PriorConfig) -> str:
    snapshots = "none" if config.num_snapshots is None else str(config.num_snapshots)
    rows = [
        ("parameters under the prior", f"{len(config.parameters)} tensors, {config.num_parameters:,} values"),
        ("rank K (rows of D)", str(config.rank)),
        ("scale", f"{config.scale:g}"),
        ("a (diagonal_weight)", f"{config.diagonal_weight:g}"),
        ("b (low_rank_weight)", f"{config.low_rank_weight:g}"),
        ("eps", f"{config.eps:g}"),
        ("variance_floor", f"{config.variance_floor:g}"),
        ("snapshots", snapshots),
        ("stored as", ", ".join(f"{kind} {dtype}" for kind, dtype in config.dtype.items())),
        ("file format", f"prior_hub {config.format_version} (safetensors)"),
    ]
    return _markdown_table(rows)


def _provenance(config: PriorConfig) -> str:
    revision = f" @ {config.base_model_revision}" if config.base_model_revision else ""
    rows = [("base model", f"{config.base_model}{revision}" if config.base_model else "not recorded")]
    rows += [("model type", config.model_type or "not recorded")]
    rows += [(key.replace("_", " "), _plain(value)) for key, value in config.source.items()]
    rows += [(f"estimator: {key.replace('_', ' ')}", _plain(value)) for key, value in config.estimator.items()]
    head = config.head_parameters
    rows += [("source task's head", ", ".join(head[:4]) + (" ..." if len(head) > 4 else "") if head else "none")]
    rows += [("made with", ", ".join(f"{name} {version}" for name, version in config.libraries.items()) or "not recorded")]
    return _markdown_table(rows)


def _limits(config: PriorConfig) -> str:
    lines = [
        "- It fits models with the same network inside (names may carry another prefix); the head of the source task is "
        "not part of it.",
        "- Its scale is a choice: too small and the data cannot move the weights, too large and it does nothing. Learned "
        "variances are often tiny, and an explicit gradient step is then unstable; `PriorTrainer` warns when it is.",
        "- It is no better than its source task: where source and target have little in common, plain fine-tuning or an "
        "isotropic prior at the same mean can do as well or better. Compare with both.",
    ]
    if config.rank >= 2 and (config.num_snapshots or 0) < 10:
        lines.append(f"- It was taken over {config.num_snapshots} snapshots only: its covariance is a rough estimate.")
    if not config.license:
        lines.append("- No licence is recorded. The licences of the base model and of the source data apply.")
    return "\n".join(lines)


def _markdown_table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)])


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        text = ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    elif isinstance(value, (list, tuple)):
        text = ", ".join(_plain(item) for item in value)
    else:
        text = f"{value:g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "\\|").split())


_CITATION = """\
```bibtex
@inproceedings{shwartzziv2022pretrain,
  title = {Pre-Train Your Loss: Easy Bayesian Transfer Learning with Informative Priors},
  author = {Shwartz-Ziv, Ravid and Goldblum, Micah and Souri, Hossein and Kapoor, Sanyam and Zhu, Chen and LeCun, Yann
            and Wilson, Andrew Gordon},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2022}
}
```"""

_COVARIANCE = """\
The prior is N(mean, Sigma) with

    Sigma = scale * (a * diag(variance) + b * D^T D) + eps * I

where D holds one row per kept snapshot (snapshot minus final mean). Fine-tuning minimises
mean NLL + 1/2 (theta - mean)^T Sigma^-1 (theta - mean) / N, in nats, with N training examples."""
