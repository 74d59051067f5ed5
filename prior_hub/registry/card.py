"""The model card of a prior, rendered from its configuration.

The rendered part stands between two comments; a person's own text before and after them survives every rendering, and so
does every metadata key that is not rendered here, comments and all. What was rendered from the configuration of a prior that is
replaced goes with it, and so do its evaluation results, pictures and compute; the list of versions stays.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

from prior_hub.errors import PriorFormatError, PriorMetadataError
from prior_hub.priors.architecture import config_fingerprint
from prior_hub.priors.config import PriorConfig, is_hub_name
from prior_hub.priors.tensor_files import open_regular
from prior_hub.registry.evaluation import evaluation_table
from prior_hub.registry.markdown import plain as _plain
from prior_hub.registry.markdown import table as _markdown_table
from prior_hub.registry.markdown import table_rows
from prior_hub.registry.versions import Version, read_versions, versions_table

__all__ = [
    "PICTURES",
    "architecture_tag",
    "card_metadata",
    "card_pictures",
    "card_problems",
    "card_versions",
    "check_compute",
    "prior_facts",
    "read_card",
    "render_card",
    "update_card",
]

BEGIN = "<!-- prior_hub: rendered from prior_config.json; text outside these comments is kept -->"
END = "<!-- prior_hub: end -->"
METADATA_KEY = "prior_hub"
PLACEHOLDER = "path/to/this/prior"
_METADATA = re.compile(r"\A\s*---[ \t]*\r?\n((?:.*?\n)??)---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_SECTION = re.compile(f"{re.escape(BEGIN)}(?:(?!{re.escape(BEGIN)}).)*?{re.escape(END)}", re.DOTALL)
_LOAD_LINE = re.compile(r"^prior = PriorModel\.from_pretrained\(.*\)$", re.MULTILINE)
_LICENSE_ID = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_LIBRARY_NAME = "prior-hub"
_MOST_CARD = 8 * 2**20  # bytes
_MOST_METADATA = 2**18  # characters
_MOST_VALUES = 20_000  # the longest tables of results there are on the Hub have half of it
_SAFE_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TAGS = ("prior-hub", "prior", "bayesian", "transfer-learning")
PICTURES = "prior_pictures"  # folder beside the card
_PICTURE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*\.(?:png|jpg|jpeg|webp|gif)")
_VERSIONS, _EVALUATION, _COMPUTE, _LOOKS = "Versions", "Evaluation", "Compute", "Pictures"
_ORDER = ("How to use", "What it is", _LOOKS, "Where it comes from", _EVALUATION, _COMPUTE, "Limits", "Citation", _VERSIONS)
_KEYS = {_EVALUATION: "model-index", _COMPUTE: "co2_eq_emissions"}  # metadata that go with a part
_EMISSIONS = ("emissions", "source", "training_type", "geographical_location", "hardware_used")  # the Hub's co2_eq_emissions
_COMPUTE_UNITS = {"emissions": "CO2 equivalent (g)", "hours": "duration (hours)"}


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
        "stored_bytes": sum(config.stored_bytes.values()),
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
    evaluation: Sequence[EvalResult] = (),
    compute: Mapping[str, Any] | None = None,
    pictures: Mapping[str, str] | None = None,
    versions: Sequence[Version] = (),
) -> str:
    """The whole card: metadata, how to use the prior, what it is, where it comes from, its limits, whom to cite.

    Evaluation, compute, pictures and versions are in it if they are given, and never made up.

    Args:
        config: the prior's configuration; every number in the card is from it.
        repo_id: the Hub name the how-to-use block loads; a placeholder when not known yet.
        subfolder: folder of the repository the prior lies in.
        title: the heading; made from `repo_id` or `base_model` when None.
        recipe: Markdown that tells how to make a prior that is not there yet: the card then says so, and that its numbers are
            those of the recipe.
        evaluation: results of models fine-tuned under the prior; also written as model-index, the Hub's form.
        compute: see `check_compute`; also written as co2_eq_emissions where the emissions are given.
        pictures: file name -> alternative text; the files are in the folder `PICTURES` beside the card.
        versions: rows of the list of versions, newest first.
    """
    name = title or (repo_id.split("/")[-1] if repo_id else f"Prior over {config.base_model or config.model_type or 'a model'}")
    recipe_parts = [_NOT_YET, "## How to make it", recipe.strip()] if recipe else []
    compute = check_compute(compute)
    parts = {
        "How to use": _how_to_use(repo_id or PLACEHOLDER, subfolder, config.scale),
        "What it is": f"{_covariance(config)}\n\n{_table(config)}",
        _LOOKS: _pictures(pictures or {}),
        "Where it comes from": _provenance(config),
        _EVALUATION: _EVALUATED + evaluation_table(evaluation) if evaluation else "",
        _COMPUTE: _computed(compute),
        "Limits": _limits(config, made=not recipe),
        "Citation": _CITATION,
        _VERSIONS: versions_table(versions) if versions else "",
    }
    told = [piece for heading in _ORDER if parts[heading] for piece in (f"## {heading}", parts[heading])]
    body = "\n\n".join([BEGIN, f"# {_plain(name)}", _summary(config), *recipe_parts, *told, END])
    data = card_metadata(config)
    if evaluation:
        data["model-index"] = eval_results_to_model_index(_plain(name), list(evaluation))
    if "emissions" in compute:
        data["co2_eq_emissions"] = {key: compute[key] for key in _EMISSIONS if key in compute}
    return _join(data, body + "\n")


def check_compute(compute: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a prior cost to make: checked, {} for None.

    Args:
        compute: "emissions" (grams of CO2 equivalent), "source" (of that number, such as "codecarbon"), "training_type"
            ("pre-training" or "fine-tuning"), "geographical_location", "hardware_used", "hours"; any of them.

    Raises:
        PriorMetadataError: an unknown key, or a value that is no number >= 0 or text.
    """
    found = dict(compute or {})
    unknown = sorted(found.keys() - {*_EMISSIONS, "hours"})
    if unknown:
        raise PriorMetadataError(f"compute has {', '.join(unknown)}, expected some of {', '.join((*_EMISSIONS, 'hours'))}.")
    for key, value in found.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < float("inf")
        if not (number if key in _COMPUTE_UNITS else isinstance(value, str) and value.strip()):
            wanted = "a number >= 0" if key in _COMPUTE_UNITS else "a text"
            raise PriorMetadataError(f"compute gives {key} as {value!r}, expected {wanted}.")
    return found


def card_problems(text: str) -> list[str]:
    """What the Hub or its client would not accept in a card's metadata; [] if nothing. No request is made.

    The client's own `ModelCardData` reads them as whoever loads the card will, model-index included.
    """
    try:
        data, _ = split_card(text)
    except PriorFormatError as error:
        return [str(error)]
    problems = []
    try:
        ModelCardData(**data)
    except (TypeError, ValueError) as error:
        problems.append(f"the Hub's client cannot read it: {' '.join(str(error).split())}")
    for key in ("library_name", "license_name", "license_link", "pipeline_tag"):
        if not isinstance(data.get(key, ""), str):
            problems.append(f"{key!r} is {data[key]!r}, expected a text")
    for key in ("license", "base_model", "datasets", "tags", "language"):
        if not all(isinstance(value, str) for value in _as_list(data.get(key))):
            problems.append(f"{key!r} is {data[key]!r}, expected texts")
    for key in ("base_model", "datasets"):
        problems += [f"{key!r} has {v!r}, which is no name on the Hub" for v in _as_list(data.get(key)) if not is_hub_name(v)]
    return problems


def update_card(
    existing: str | None,
    rendered: str,
    *,
    previous: PriorConfig | None = None,
    config: PriorConfig | None = None,
    repo_id: str | None = None,
    subfolder: str | None = None,
    published: str | None = None,
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
        config: configuration of the prior that is described now. The evaluation, compute and pictures of the card that is
            there stay only if it is known to describe the same Gaussian, and `rendered` has none of its own.
        repo_id: the name the how-to-use block loads.
        subfolder: added to that block.
        published: the card as the last push left it. What `rendered` has in common with it has been seen by whoever edited
            `existing` since: what they changed or took out stays so.
    """
    if repo_id:
        rendered = _renamed(rendered, _load_line(repo_id, subfolder))
    if not existing:
        return rendered
    newline = "\r\n" if "\r\n" in existing else "\n"
    existing, rendered = map(_with_one_newline, (existing, rendered))
    new_data, new_body = split_card(rendered)
    old_data, old_body = split_card(existing)
    seen_data, seen_body = _split_or_nothing(published)
    fixed = card_metadata(config) if config is not None else {}
    new_data = _not_seen(new_data, seen_data, fixed)
    outdated = card_metadata(previous) if previous is not None else {}
    ours = old_data.get("library_name") == _LIBRARY_NAME or not old_body.strip()
    stay = _parts_that_stay(old_body, new_body, same=_same_gaussian(previous, config))
    new_body = _with_parts(new_body, stay)
    merged = old_data | {key: value for key, value in new_data.items() if key == METADATA_KEY}
    if ours:
        left = {key for key, value in outdated.items() if key not in new_data and old_data.get(key) == value}
        if _COMPUTE not in stay and _COMPUTE_UNITS["emissions"] in _part(old_body, _COMPUTE):
            left.add("co2_eq_emissions")
        merged = {key: value for key, value in old_data.items() if key not in left} | new_data
        if _EVALUATION not in stay:
            _join_results(merged, old_data.get("model-index"), new_data.get("model-index"), _part(old_body, _EVALUATION))
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
    body = _merged_body(old_body.lstrip("\n"), new_body, seen_body)
    return f"---\n{metadata}---\n\n{body}".replace("\n", newline)


def _with_one_newline(text: str) -> str:
    """A card as it is looked through: an editor on Windows ends lines in its own way, and may begin with a mark."""
    return text.replace("\r\n", "\n").removeprefix("\ufeff")


def _renamed(rendered: str, load_line: str) -> str:
    """A rendered card whose how-to-use block has another line for loading."""
    section = _SECTION.search(rendered)
    if section is None:
        return rendered
    text = _LOAD_LINE.sub(lambda _: load_line, section[0])
    return rendered[: section.start()] + text + rendered[section.end() :]


def _split_or_nothing(text: str | None) -> tuple[dict[str, Any], str]:
    try:
        return split_card(_with_one_newline(text or ""))
    except PriorFormatError:
        return {}, ""


def _not_seen(new: dict[str, Any], seen: Mapping[str, Any], fixed: Mapping[str, Any]) -> dict[str, Any]:
    """The new metadata without what is a person's and was published already; `fixed` are those of the configuration."""
    left = {
        key: value for key, value in new.items() if key in {*fixed, *_KEYS.values()} or key not in seen or seen[key] != value
    }
    for key in ("tags", "datasets"):
        known = [value for value in _as_list(seen.get(key)) if value not in _as_list(fixed.get(key))]
        if key in left and key in seen:
            left[key] = [value for value in _as_list(left[key]) if value not in known]
    return left


def _merged_body(old: str, new: str, seen: str = "") -> str:
    """The old text with the new section in place of its own, or at its end; and what else the new text has."""
    place, section = _SECTION.search(old), _SECTION.search(new)
    before, middle, after = (new[: section.start()], section[0], new[section.end() :]) if section else ("", new.strip(), "")
    if not place:
        kept = [piece.strip() for piece in (before, middle, after)]
        kept = [piece for i, piece in enumerate(kept) if piece and (i == 1 or piece not in old)]
        return "\n\n".join([old.rstrip(), *kept] if old.strip() else kept) + "\n"
    first, last = old[: place.start()], old[place.end() :]
    known = {paragraph for text in (old, seen) for paragraph in _paragraphs(text)}
    return _with_paragraphs(first, before, known, "\n\n") + middle + _with_paragraphs(last, after, known, "\n")


def _paragraphs(text: str) -> list[str]:
    return [paragraph.strip("\n") for paragraph in re.split(r"\n[ \t]*\n", text) if paragraph.strip()]


def _with_paragraphs(old: str, new: str, known: set[str], end: str) -> str:
    """The old text with the paragraphs of the new one that are not `known`, each after what it follows there."""
    ours, theirs = _paragraphs(old), _paragraphs(new)
    if known.issuperset(theirs):
        return old
    found: list[str] = []
    for _, i, j, k, m in difflib.SequenceMatcher(None, ours, theirs, autojunk=False).get_opcodes():
        found += [*ours[i:j], *(paragraph for paragraph in theirs[k:m] if paragraph not in known)]
    return ("\n\n" if end == "\n" else "") + "\n\n".join(found) + end


def _same_gaussian(one: PriorConfig | None, other: PriorConfig | None) -> bool:
    """Whether two configurations are known to be of the same Gaussian: the same files, read in the same way."""
    if one is None or other is None or not one.weight_files:
        return False
    names = ("weight_files", "rank", "scale", "diagonal_weight", "low_rank_weight", "eps")
    return all(getattr(one, name) == getattr(other, name) for name in names)


def _part(body: str, heading: str) -> str:
    """The text under a heading of the rendered section, "" if there is none."""
    section = _SECTION.search(body)
    found = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", section[0], re.MULTILINE | re.DOTALL) if section else None
    return found[1].replace(END, "").strip() if found else ""


def _parts_that_stay(old: str, new: str, *, same: bool) -> dict[str, str]:
    """Heading -> text of what no configuration tells, in the old section and not in the new one, and still true."""
    headings = (_VERSIONS, *((_LOOKS, _EVALUATION, _COMPUTE) if same else ()))
    return {heading: text for heading in headings if (text := _part(old, heading)) and not _part(new, heading)}


def _with_parts(body: str, parts: Mapping[str, str]) -> str:
    """The body with more parts in its rendered section, each in its place."""
    section = _SECTION.search(body)
    if section is None:
        return body
    text = section[0]
    for heading, content in parts.items():
        later = "|".join(_ORDER[_ORDER.index(heading) + 1 :])
        found = re.search(rf"^## (?:{later})$", text, re.MULTILINE) if later else None
        place = found.start() if found else text.rindex(END)
        text = f"{text[:place]}## {heading}\n\n{content}\n\n{text[place:]}"
    return body[: section.start()] + text + body[section.end() :]


def _join_results(data: dict[str, Any], old: Any, new: Any, shown: str) -> None:
    """Put the new results into `data` in place of the old ones the card shows; others are a person's, and stay."""
    if old is None or (not shown and new is None):
        return
    try:
        name, found = model_index_to_eval_results(old)
    except (KeyError, TypeError, ValueError):  # a person's, in a form of their own; the Hub says what it thinks of it
        return
    rows = [row[:4] for row in table_rows(shown)]
    theirs = [result for result in found if table_rows(evaluation_table([result]))[0][:4] not in rows]
    results = theirs + (model_index_to_eval_results(new)[1] if new else [])
    if results:
        data["model-index"] = eval_results_to_model_index(name, results)
    else:
        data.pop("model-index", None)


def card_versions(text: str) -> list[Version]:
    """The rows of a card's list of versions, newest first."""
    return read_versions(_part(split_card(_with_one_newline(text))[1], _VERSIONS))


def card_pictures(text: str) -> list[str]:
    """The names of the pictures that the rendered part of a card shows."""
    shown = re.findall(rf"\]\({PICTURES}/([^)/]+)\)", _part(split_card(_with_one_newline(text))[1], _LOOKS))
    return [name for name in shown if _PICTURE.fullmatch(name)]


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


def _how_to_use(name: str, subfolder: str | None, stored: float) -> str:
    """A scale of 1 is the source task's own posterior, which nobody has chosen for a target task: too narrow as a rule."""
    scale = "prior.scale" if stored != 1 else '"auto"'
    return (
        "With a `model` to fine-tune and its `train_dataset`, as for the Hugging Face `Trainer`:\n\n"
        "```python\n"
        "from prior_hub import PriorModel, PriorTrainer, PriorTrainingArguments\n\n"
        f"{_load_line(name, subfolder)}\n"
        "print(prior.match(model))  # which parameters of your model are under the prior\n\n"
        "trainer = PriorTrainer(\n"
        "    model=model,\n"
        "    prior=prior,\n"
        f'    args=PriorTrainingArguments(output_dir="out", prior_scale={scale}),\n'
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
        "variances are often tiny, and an explicit gradient step is then unstable: `PriorTrainer` takes a step of its own "
        "there (SGD, Adam, AdamW) and warns where it cannot.",
        "- It is no better than its source task: where source and target have little in common, plain fine-tuning or an "
        "isotropic prior at the same mean can do as well or better. Compare with both.",
    ]
    if config.rank >= 2 and config.num_snapshots is not None and config.num_snapshots < 10:
        lines.append(f"- It was taken over {config.num_snapshots} snapshots only: its covariance is a rough estimate.")
    if not config.license:
        lines.append("- No licence is recorded. The licences of the base model and of the source data apply.")
    return "\n".join(lines)


def _pictures(pictures: Mapping[str, str]) -> str:
    for name in pictures:
        if not _PICTURE.fullmatch(name):
            raise PriorMetadataError(f"{name!r} is no name for a picture: expected one like spectrum.png, without a folder.")
    texts = {name: re.sub(r"[\[\]]", "", _plain(text)) for name, text in pictures.items()}
    return "\n\n".join(f"![{text}]({PICTURES}/{name})" for name, text in texts.items())


def _computed(compute: Mapping[str, Any]) -> str:
    rows = [
        (_COMPUTE_UNITS.get(key, key.replace("_", " ")), _plain(compute[key]))
        for key in (*_EMISSIONS, "hours")
        if key in compute
    ]
    return _markdown_table(rows) if rows else ""


_EVALUATED = "Of models fine-tuned under this prior, as reported by who published it:\n\n"

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
