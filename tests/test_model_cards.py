"""Every published card is what its configuration renders to, around a person's own text; figures are those of their files."""

import csv
import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest

from prior_hub import PriorConfig
from prior_hub.cli import _parser
from prior_hub.registry.card import render_card, split_card, update_card

FOLDER = Path(__file__).parent.parent / "model_cards"
CARDS = sorted(FOLDER.glob("*.md"))
RECIPES = sorted((FOLDER / "recipes").glob("*.md"))


@pytest.fixture(scope="module")
def make():
    pytest.importorskip("torchvision")
    spec = importlib.util.spec_from_file_location("make_cards", FOLDER / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def config_of(path):
    return PriorConfig.from_json(path.with_suffix(".json").read_bytes(), where=path.stem)


def recipe_of(path):
    recipe = FOLDER / "recipes" / path.name
    return recipe.read_text() if recipe.exists() else None


def test_there_is_a_card():
    assert len(CARDS) >= 5
    assert {path.stem for path in RECIPES} <= {path.stem for path in CARDS}


@pytest.mark.parametrize("path", CARDS, ids=lambda p: p.stem)
def test_a_card_is_rendered_from_its_configuration(path):
    recipe, text = recipe_of(path), path.read_text()
    name = path.stem if recipe else f"prior-hub/{path.stem}"
    assert update_card(text, render_card(config_of(path), repo_id=name, recipe=recipe)) == text


@pytest.mark.parametrize("path", CARDS, ids=lambda p: p.stem)
def test_a_card_has_what_the_hub_and_a_reader_need(path):
    data, body = split_card(path.read_text())
    assert data["library_name"] == "prior-hub"
    assert data["license"]
    assert "prior-hub" in data["tags"]
    for section in ("## How to use", "## What it is", "## Where it comes from", "## Limits", "## Citation"):
        assert section in body


@pytest.mark.parametrize("path", CARDS, ids=lambda p: p.stem)
def test_a_card_without_weights_says_so_and_claims_no_measurement(path):
    made, text = bool(config_of(path).weight_files), path.read_text()
    assert made == (recipe_of(path) is None)
    assert ("**Not made here yet.**" in text) != made
    assert ("## Measured" in text) == made


def test_the_papers_cards_are_of_torchvisions_networks_and_the_papers_convention(make):
    sizes = {
        "resnet50-simclr-prior": 23_508_032,
        "resnet50-supervised-prior": 23_508_032,
        "resnet101-supervised-prior": 42_500_160,
    }
    for name, size in sizes.items():
        config = make.papers_config(name)
        assert (FOLDER / f"{name}.json").read_text() == config.to_json()
        assert config.num_parameters == size  # torchvision documents 25,557,032 and 44,549,160 with 2,049,000 in fc
        assert config.scale * config.low_rank_weight == make.SCALE**2  # s^2 Q^T Q


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_the_commands_of_a_recipe_are_commands(path):
    (block,) = re.findall(r"```sh\n(.*?)```", path.read_text(), re.DOTALL)
    parsed = [_parser().parse_args(shlex.split(line)[1:]) for line in block.splitlines()]
    assert parsed[0].convention == config_of(FOLDER / path.name).estimator["convention"]
    assert parsed[0].output.name == parsed[1].prior == path.stem


def test_the_figures_of_the_learned_prior_are_those_of_its_results(make):
    path = FOLDER / f"{make.LEARNED}.md"
    assert make.card(make.LEARNED, make.learned_config(None), path.read_text()) == path.read_text()
    assert (FOLDER / f"{make.LEARNED}.json").read_text() == make.learned_config(None).to_json()
    rows = csv.DictReader(make.RESULTS.read_text().splitlines())
    nll = [float(r["nll"]) for r in rows if (r["stage"], r["method"], r["n"]) == ("final", "low rank", "500")]
    assert len(nll) >= 3
    assert f"{sum(nll) / len(nll):.3f}" in path.read_text()


def test_figures_that_somebody_changed_by_hand_are_noticed(make):
    path = FOLDER / f"{make.LEARNED}.md"
    number = re.search(r"\| this prior \| \S+ \| \S+ \| (0\.\d+)", path.read_text())[1]
    changed = path.read_text().replace(number, "0.999")
    assert make.card(make.LEARNED, make.learned_config(None), changed) == path.read_text()


def test_the_golden_configurations_are_json_a_person_can_read():
    for path in CARDS:
        text = path.with_suffix(".json").read_text()
        assert json.loads(text)["num_parameters"] == config_of(path).num_parameters


def test_the_card_of_the_learned_prior_says_where_it_wins_and_that_it_wins_nowhere():
    text = (FOLDER / "cifar10-resnet20-prior.md").read_text()
    lowest = [line.split("|") for line in text.splitlines() if line.startswith("| ") and "**" in line]
    assert len(lowest) == 4  # one for each n
    told = next(line for line in text.splitlines() if line.startswith("Lowest NLL: "))
    for cells in lowest:
        assert cells[2].strip() in told
        assert cells[1].strip() in told
    assert ("This prior has it nowhere" in told) == (not any("this prior" in c[2] and "mean" not in c[2] for c in lowest))
