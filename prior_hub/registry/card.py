"""The model card of a prior, rendered from its configuration.

The rendered part stands between two comments; a person's own text before and after them survives every rendering, and so
does every metadata key that is not rendered here, comments and all. What was rendered from the configuration of a prior that is
replaced goes with it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from prior_hub.errors import PriorFormatError
from prior_hub.priors.architecture import config_fingerprint, stored_bytes
from prior_hub.priors.config import PriorConfig, is_hub_name
from prior_hub.priors.tensor_files import open_regular

__all__ = ["architecture_tag", "card_metadata", "prior_facts", "read_card", "render_card", "update_card"]

BEGIN = "<!-- prior_hub: rendered from prior_config.json; text outside these comments is kept -->"
END = "<!-- prior_hub: end -->"
METADATA_KEY = "prior_hub"
PLACEHOLDER = "path/to/this/prior"
_METADATA = re.compile(r"\A\s*---[ \t]*\r?\n((?:.*?\n)?)---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_SECTION = re.compile(f"{re.escape(BEGIN)}(?:(?!{re.escape(BEGIN)}).)*?{re.escape(END)}", re.DOTALL)
_LOAD_LINE = re.compile(r"^prior = PriorModel\.from_pretrained\(.*\)$", re.MULTILINE)
_LICENSE_ID = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_LIBRARY_NAME = "prior-hub"
_MOST_CARD = 8 * 2**20  # bytes
_MOST_METADATA = 2**18  # characters
_MOST_VALUES = 20_000  # the longest tables of results there are on the Hub have half of it
_SAFE_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TAGS = ("prior-hub", "prior", "bayesian", "transfer-learning")


def card_metadata(config: PriorConfig) -> dict[str, Any]:
    """The Hub metadata of a prior's card: what is known, and nothing that is not a valid Hub value."""
    data: dict[str, Any] = {"library_name": _LIBRARY_NAME}
    if config.license and _LICENSE_ID.fullmatch(config.license):
        data["license"] = config.license
    elif config.license:  # not in the form of the Hub's list
        data |= {"license": "other", "license_name": config.license}
    if is_hub_name(config.base_model):
        data["base_model"] = config.base_model
    dataset = config.source.get("dataset")
    valid = [name for name in _as_list(dataset) if is_hub_name(name)]
    if valid:
        data["datasets"] = _once(valid)
    estimator = str(config.estimator.get("name") or "").lower()
    facts = prior_facts(config)
    found = [estimator if re.fullmatch(r"[a-z0-9-]+", estimator) else "", architecture_tag(facts.get("architecture")) or ""]
    data["tags"] = _once([*_TAGS, *filter(None, found)])
    return data | {METADATA_KEY: facts}


def prior_facts(config: PriorConfig) -> dict[str, Any]:
    """What the metadata say under `prior_hub:`, so that one listing answers with it and no configuration need be read.

    format, rank, estimator, objective, num_parameters, stored_bytes, scale, architecture (the fingerprint); what is not known
    is left out.
    """
    facts = {
        "format": config.format_version,
        "rank": config.rank,
        "estimator": config.estimator.get("name"),
        "objective": config.source.get("objective"),
        "num_parameters": config.num_parameters,
        "stored_bytes": stored_bytes(config),
        "scale": config.scale,
        "architecture": config_fingerprint(config),
    }
    texts = ("estimator", "objective", "architecture")
    return {key: value for key, value in facts.items() if key not in texts or (isinstance(value, str) and value)}


def architecture_tag(fingerprint: str | None) -> str | None:
    """The tag that finds the priors over one architecture."""
    return f"prior-arch-{fingerprint}" if fingerprint else None


def render_card(
    config: PriorConfig,
    *,
    repo_id: str | None = None,
    subfolder: str | None = None,
    title: str | None = None,
    recipe: str | None = None,
) -> str:
    """The whole card: metadata, how to use the prior, what it is, where it comes from, its limits, whom to cite.

    Args:
        config: the prior's configuration; every number in the card is from it.
        repo_id: the Hub name the how-to-use block loads; a placeholder when not known yet.
        subfolder: folder of the repository the prior lies in.
        title: the heading; made from `repo_id` or `base_model` when None.
        recipe: Markdown that tells how to make a prior that is not there yet: the card then says so, and that its numbers are
            those of the recipe.
    """
    name = title or (repo_id.split("/")[-1] if repo_id else f"Prior over {config.base_model or config.model_type or 'a model'}")
    body = "\n\n".join(
        [
            BEGIN,
            f"# {_plain(name)}",
            _summary(config),
            *([_NOT_YET, "## How to make it", recipe.strip()] if recipe else []),
            "## How to use",
            _how_to_use(repo_id or PLACEHOLDER, subfolder),
            "## What it is",
            _covariance(config),
            _table(config),
            "## Where it comes from",
            _provenance(config),
            "## Limits",
            _limits(config, made=not recipe),
            "## Citation",
            _CITATION,
            END,
        ]
    )
    return _join(card_metadata(config), body + "\n")


def update_card(
    existing: str | None,
    rendered: str,
    *,
    previous: PriorConfig | None = None,
    repo_id: str | None = None,
    subfolder: str | None = None,
) -> str:
    """Put a rendered card into an existing one, keeping what a person wrote.

    A card whose `library_name` is prior-hub, or that has no text yet, gets the prior's metadata. Any other is the card of
    something else, such as the model the prior lies beside: to its metadata only the prior's tags and `prior_hub:` are added.

    Args:
        existing: the card that is there, or None.
        rendered: a text made by `render_card`, possibly edited around its rendered part; what was written there and is
            not in `existing` is kept too.
        previous: configuration of the prior that is replaced: the metadata rendered from it are not a person's, and go
            (its licence, its base model, its data sets, its estimator's tag) unless they are true of the new one too.
        repo_id: the name the how-to-use block loads.
        subfolder: added to that block.
    """
    if repo_id:
        rendered = _renamed(rendered, _load_line(repo_id, subfolder))
    if not existing:
        return rendered
    newline = "\r\n" if "\r\n" in existing else "\n"
    existing, rendered = (text.replace("\r\n", "\n").removeprefix("\ufeff") for text in (existing, rendered))
    new_data, new_body = split_card(rendered)
    old_data, old_body = split_card(existing)
    outdated = card_metadata(previous) if previous is not None else {}
    ours = old_data.get("library_name") == _LIBRARY_NAME or not old_body.strip()
    merged = old_data | {key: value for key, value in new_data.items() if key == METADATA_KEY}
    if ours:
        left = {key for key, value in outdated.items() if key not in new_data and old_data.get(key) == value}
        merged = {key: value for key, value in old_data.items() if key not in left} | new_data
    for key in ("tags", "datasets") if ours else ("tags",):
        gone = [value for value in _as_list(outdated.get(key)) if value not in _as_list(new_data.get(key))]
        kept = [value for value in _as_list(old_data.get(key)) if value not in gone]
        values = _once([*kept, *_as_list(new_data.get(key))])
        if values:
            merged[key] = values
        elif gone:
            merged.pop(key, None)
    text = _METADATA.match(existing)
    metadata = _edited(text[1] if text else "", old_data, merged)
    body = _merged_body(old_body.lstrip("\n"), new_body)
    return f"---\n{metadata}---\n\n{body}".replace("\n", newline)


def _renamed(rendered: str, load_line: str) -> str:
    """A rendered card whose how-to-use block has another line for loading."""
    section = _SECTION.search(rendered)
    if section is None:
        return rendered
    text = _LOAD_LINE.sub(lambda _: load_line, section[0])
    return rendered[: section.start()] + text + rendered[section.end() :]


def _merged_body(old: str, new: str) -> str:
    """The old text with the new section in place of its own, or at its end; and what else the new text has."""
    place, section = _SECTION.search(old), _SECTION.search(new)
    before, middle, after = (new[: section.start()], section[0], new[section.end() :]) if section else ("", new.strip(), "")
    pieces = [piece.strip() for piece in (before, middle, after)]
    kept = [piece for i, piece in enumerate(pieces) if piece and (i == 1 or piece not in old)]
    if place:
        return old[: place.start()] + "\n\n".join(kept) + old[place.end() :]
    return "\n\n".join([old.rstrip(), *kept] if old.strip() else kept) + "\n"


def _edited(block: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The YAML text `block`, which says `old`, changed to say `new`: only the entries that differ are written anew.

    Writing all of it would lose comments, and what YAML 1.1 takes for something else (`language: no` is False to it).
    """
    text = block.rstrip("\n") + "\n" if block.strip() else ""
    for key in [*new, *(key for key in old if key not in new)]:
        if key in old and key in new and old[key] == new[key]:
            continue
        lines = rf"^(['\"]?){re.escape(str(key))}\1[ \t]*:.*\n(?:[ \t]+\S.*\n|-(?:[ \t].*)?\n)*"
        found, entry = re.search(lines, text, re.MULTILINE), _dumped({key: new[key]}) if key in new else ""
        start, stop = found.span() if found else (len(text), len(text))
        text = text[:start] + entry + text[stop:]
    try:
        same = yaml.safe_load(text) == dict(new)
    except yaml.YAMLError:
        same = False
    return text if same else _dumped(new)


def read_card(path: Path) -> str:
    """The text of a card, its line ends as they are.

    Raises:
        PriorFormatError: it is not UTF-8, no regular file, or larger than a card is.
    """
    with open_regular(path) as file:
        data = file.read(_MOST_CARD + 1) or b""
    if len(data) > _MOST_CARD:
        raise PriorFormatError(f"{path} has more than {_MOST_CARD} bytes: no model card is so long. Move it away.")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PriorFormatError(f"{path} is not UTF-8 text ({error}): convert it, or move it away.") from error


def split_card(text: str) -> tuple[dict[str, Any], str]:
    """(metadata, body) of a card.

    Raises:
        PriorFormatError: the metadata block is not a YAML mapping.
    """
    match = _METADATA.match(text)
    if match is None:
        return {}, text
    values = sum(map(match[1].count, "\n,[{-"))  # before it is parsed, which takes a millisecond for 20 of them
    if len(match[1]) > _MOST_METADATA or values > 2 * _MOST_VALUES:
        raise PriorFormatError(
            f"the metadata of the model card (README.md) has {len(match[1])} characters and some {values} values, more than "
            f"the {_MOST_METADATA} and {2 * _MOST_VALUES} it may."
        )
    try:
        loader = _SAFE_LOADER(match[1])  # safe_load's, in C where that is there
        try:
            data = loader.get_single_data()
        finally:
            loader.dispose()
        _refuse_expansion(data)
    except (
        yaml.YAMLError,
        ValueError,
        OverflowError,
        AttributeError,
        TypeError,
        RecursionError,
    ) as error:  # a date like 2020-99-99
        if isinstance(error, PriorFormatError):
            raise
        said = "nested too deep" if isinstance(error, RecursionError) else error
        raise PriorFormatError(f"the metadata of the model card (README.md) is not valid YAML: {said}") from error
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise PriorFormatError("the metadata of the model card (README.md) is not a mapping of keys to values.")
    return data, text[match.end() :].lstrip("\n")


def _refuse_expansion(data: Any) -> None:
    """Refuse metadata that its aliases (*name) blow up, or that contain themselves: written out they would fill the memory."""
    sizes: dict[int, int] = {}  # by identity, of what is still held by `data`

    def size(value: Any) -> int:
        if not isinstance(value, (dict, list, tuple, set)):
            return _MOST_VALUES + 1 if isinstance(value, int) and value.bit_length() > 1000 else 1
        if id(value) not in sizes:
            sizes[id(value)] = _MOST_VALUES + 1  # should it contain itself
            inner = [*value.keys(), *value.values()] if isinstance(value, dict) else value
            sizes[id(value)] = 1 + sum(map(size, inner))
        return sizes[id(value)]

    if size(data) > _MOST_VALUES:
        raise PriorFormatError(
            f"the metadata of the model card (README.md) stands for more than {_MOST_VALUES} values once its aliases (*name) "
            "are followed: write them without aliases."
        )


def _join(data: Mapping[str, Any], body: str) -> str:
    return f"---\n{_dumped(data)}---\n\n{body}"


def _dumped(data: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True, width=1_000_000)


def _once(values: list[Any]) -> list[Any]:
    return [value for i, value in enumerate(values) if value not in values[:i]]


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _summary(config: PriorConfig) -> str:
    name = _plain(config.base_model or config.model_type or "torch").replace("`", "'")
    over = f"`{name}`" if config.base_model else f"a `{name}` model"
    low_rank = f", with a low-rank part of {config.rank} deviations" if config.rank else ""
    return (
        f"A Gaussian prior over {config.num_parameters:,} weights of {over}{low_rank}: what the source task knows about "
        "the weights, in the form of a penalty for fine-tuning. It changes the whole loss surface, not only the starting "
        "point."
    )


def _load_line(name: str, subfolder: str | None) -> str:
    folder = f", subfolder={json.dumps(subfolder, ensure_ascii=False)}" if subfolder else ""
    return f"prior = PriorModel.from_pretrained({json.dumps(name, ensure_ascii=False)}{folder})"


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


def _covariance(config: PriorConfig) -> str:
    """The formula, and what D is: files of others may hold rows of another kind (priors/legacy.py)."""
    made = config.estimator
    rows = "snapshot minus final mean"
    if "imported_from" in made and made.get("recentred") is False:
        rows = "snapshot minus the running mean of its time"
    if "imported_from" in made and made.get("convention") != "swag":
        divided = str(made.get("covmat", "")).startswith("divided")
        rows += ", divided by sqrt(number of rows in the file - 1)" if divided else ", as in the file"
    return _COVARIANCE.format(rows=rows)


def _table(config: PriorConfig) -> str:
    unknown = "not recorded" if config.rank else "none"  # deviations are of snapshots
    snapshots = unknown if config.num_snapshots is None else str(config.num_snapshots)
    rows = [
        ("parameters under the prior", f"{len(config.parameters)} tensors, {config.num_parameters:,} values"),
        ("rank K (rows of D)", str(config.rank)),
        ("scale", repr(config.scale)),
        ("a (diagonal_weight)", repr(config.diagonal_weight)),
        ("b (low_rank_weight)", repr(config.low_rank_weight)),
        ("eps", repr(config.eps)),
        ("variance_floor", repr(config.variance_floor)),
        ("snapshots", snapshots),
        ("stored as", ", ".join(f"{kind} {config.dtype[kind]}" for kind in ("mean", "variance", "deviations"))),
        ("file format", f"prior_hub {config.format_version} (safetensors)"),
    ]
    return _markdown_table(rows)


def _provenance(config: PriorConfig) -> str:
    revision = f" @ {config.base_model_revision}" if config.base_model_revision else ""
    rows = [("base model", f"{config.base_model}{revision}" if config.base_model else "not recorded")]
    rows += [("model type", config.model_type or "not recorded")]
    rows += [(str(key).replace("_", " "), _plain(value)) for key, value in config.source.items()]
    rows += [(f"estimator: {str(key).replace('_', ' ')}", _plain(value)) for key, value in config.estimator.items()]
    head = config.head_parameters
    rows += [("source task's head", ", ".join(head[:4]) + (" ..." if len(head) > 4 else "") if head else "none")]
    rows += [("made with", ", ".join(f"{name} {version}" for name, version in config.libraries.items()) or "not recorded")]
    return _markdown_table([(_plain(key), _plain(value)) for key, value in rows])


def _limits(config: PriorConfig, *, made: bool) -> str:
    lines = [] if made else ["- Nobody has made or measured it here: no number of this card is a measurement."]
    lines += [
        "- It fits models with the same network inside (names may carry another prefix); the head of the source task is "
        "not part of it.",
        "- Its scale is a choice: too small and the data cannot move the weights, too large and it does nothing. Learned "
        "variances are often tiny, and an explicit gradient step is then unstable; `PriorTrainer` warns when it is.",
        "- It is no better than its source task: where source and target have little in common, plain fine-tuning or an "
        "isotropic prior at the same mean can do as well or better. Compare with both.",
    ]
    if config.rank >= 2 and config.num_snapshots is not None and config.num_snapshots < 10:
        lines.append(f"- It was taken over {config.num_snapshots} snapshots only: its covariance is a rough estimate.")
    if not config.license:
        lines.append("- No licence is recorded. The licences of the base model and of the source data apply.")
    return "\n".join(lines)


def _markdown_table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)])


def _plain(value: Any) -> str:
    """A value as one cell of a table: on one line, and never an HTML comment, which could be taken for one of ours."""
    if isinstance(value, Mapping):
        text = ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    elif isinstance(value, (list, tuple)):
        text = ", ".join(_plain(item) for item in value)
    else:
        text = str(value)
    text = re.sub(r"(?<!\\)\|", r"\\|", text).replace("<!--", "&lt;!--")
    return " ".join(text.split())


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

_NOT_YET = (
    "**Not made here yet.** There are no weights behind this card. It is what `prior_hub` would write from other people's "
    "files: sizes and names are those of the network, the covariance that of the convention named below."
)

_COVARIANCE = """\
The prior is N(mean, Sigma) with

    Sigma = scale * (a * diag(variance) + b * D^T D) + eps * I

where D holds one row per kept snapshot ({rows}). Fine-tuning minimises
mean NLL + 1/2 (theta - mean)^T Sigma^-1 (theta - mean) / N, in nats, with N training examples."""
