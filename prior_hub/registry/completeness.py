"""What a published prior must say of itself: its licence, the model it is over, and the data of its source task.

Nobody can use a prior without them: the licence says whether they may, the base model whose weights these are, the data set
what the prior knows. An isotropic prior has no source task of its own, so that it needs no data set.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from prior_hub.errors import PriorMetadataError
from prior_hub.priors.config import PriorConfig, is_hub_name
from prior_hub.registry.tokens import TOKEN

__all__ = ["check_complete", "completed", "missing_in", "missing_metadata", "refuse_tokens"]


def missing_metadata(
    *,
    license: str | None,  # noqa: A002 - the Hub's word
    base_model: str | None,
    dataset: Any,
    estimator: str | None,
) -> dict[str, str]:
    """What is missing, by its name: what was found, and how it is given.

    Args:
        license: `PriorConfig.license`; the Hub's "unknown" counts, since it says so.
        base_model: `PriorConfig.base_model`; a folder of somebody's machine does not count.
        dataset: source["dataset"].
        estimator: estimator["name"]; "isotropic" needs no data set.
    """
    missing = {}
    if not license:
        missing["license"] = "no licence: config.license, license='apache-2.0' or --license apache-2.0"
    if not is_hub_name(base_model):
        found = f"base_model is {base_model!r}, which is no name on the Hub" if base_model else "no base_model"
        missing["base_model"] = f"{found}: config.base_model, base_model='org/model' or --base-model org/model"
    if not dataset and estimator != "isotropic":
        missing["dataset"] = "no source data set: config.source['dataset'], dataset='org/data' or --dataset org/data"
    return missing


def missing_in(config: PriorConfig) -> dict[str, str]:
    """`missing_metadata` of a configuration."""
    return missing_metadata(
        license=config.license,
        base_model=config.base_model,
        dataset=config.source.get("dataset"),
        estimator=config.estimator.get("name"),
    )


def check_complete(missing: dict[str, str]) -> None:
    """Refuse if anything is missing.

    Raises:
        PriorMetadataError: lists all of it, and how to give each.
    """
    if missing:
        what = "; ".join(missing.values())
        raise PriorMetadataError(
            f"nothing was sent: readers of this prior would miss {len(missing)} thing{'s'[: len(missing) > 1]}. {what}. "
            "Give them, or publish it all the same with allow_incomplete=True (--allow-incomplete)."
        )


def completed(
    config: PriorConfig,
    *,
    license: str | None = None,  # noqa: A002 - the Hub's word
    base_model: str | None = None,
    dataset: str | list[str] | None = None,
    dataset_license: str | None = None,
) -> PriorConfig:
    """The configuration with what is given in place of what it says; another base model takes the old one's commit away."""
    changes: dict[str, Any] = {}
    if license:
        changes["license"] = license
    if base_model and base_model != config.base_model:
        changes |= {"base_model": base_model, "base_model_revision": None}
    known = {name: value for name, value in (("dataset", dataset), ("dataset_license", dataset_license)) if value}
    if known:
        changes["source"] = {**config.source, **known}
    return config.replace(**changes) if changes else config


def refuse_tokens(texts: Iterable[tuple[str, str | None]], token: str | None) -> None:
    """Refuse to publish an access token: the one in use, or what looks like one.

    Args:
        texts: (what it is, text).
        token: the token in use.

    Raises:
        PriorMetadataError: names the text, not the token.
    """
    for name, text in texts:
        if text and ((token and len(token) > 7 and token in text) or TOKEN.search(text)):
            raise PriorMetadataError(
                f"{name} contains an access token of the Hub: nothing was sent. Take it out; if it has been anywhere public, "
                "invalidate it at https://huggingface.co/settings/tokens."
            )
