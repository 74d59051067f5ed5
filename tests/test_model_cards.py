"""Every published card is what its configuration renders to, around a person's own text."""

from pathlib import Path

import pytest

from prior_hub import PriorConfig
from prior_hub.registry.card import render_card, split_card, update_card

CARDS = sorted((Path(__file__).parent.parent / "model_cards").glob("*.md"))


def test_there_is_a_card():
    assert CARDS


@pytest.mark.parametrize("path", CARDS, ids=lambda p: p.stem)
def test_a_card_is_rendered_from_its_configuration(path):
    config = PriorConfig.from_json(path.with_suffix(".json").read_bytes(), where=path.stem)
    text = path.read_text()
    assert update_card(text, render_card(config, repo_id=f"prior-hub/{path.stem}")) == text


@pytest.mark.parametrize("path", CARDS, ids=lambda p: p.stem)
def test_a_card_has_what_the_hub_and_a_reader_need(path):
    data, body = split_card(path.read_text())
    assert data["library_name"] == "prior-hub"
    assert data["license"]
    assert "prior-hub" in data["tags"]
    for section in ("## How to use", "## What it is", "## Where it comes from", "## Limits", "## Citation"):
        assert section in body
