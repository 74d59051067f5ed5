"""The documentation: links lead somewhere, nothing is behind the code, and what is shown runs. No mkdocs needed."""

import dataclasses
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save as safetensors_bytes

import prior_hub
from prior_hub import PriorConfig, PriorModel, isotropic_prior
from prior_hub.cli import _parser

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
GUIDES = [path for path in PAGES if path.name not in ("transcript.md", "cli.md") and "```" in path.read_text()]
NAME = "alice"  # stands for the reader's own name on the Hub


def load(name):
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)


# ---------------------------------------------------------------------------------------------------------------- links


def test_every_relative_link_and_anchor_of_every_page_resolves():
    links = load("check_links")
    files = links.markdown_files()
    assert {ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES, *(ROOT / "model_cards").glob("*.md")} <= set(files)
    assert sum(len(links.links_of(path)) for path in files) > 100
    assert links.broken(files) == []


def test_a_broken_link_and_a_broken_anchor_are_found_and_code_is_left_alone(tmp_path):
    links = load("check_links")
    (tmp_path / "there.md").write_text("# A title: `code`, twice\n\n## Twice\n\n## Twice\n\n```\n# no title\n```\n")
    good = "[a](there.md) [b](there.md#a-title-code-twice) [c](there.md#twice-1) [d](#here) ![e](there.md) <https://x.y/z>\n"
    code = "`[x](no)` ``[y](no)``\n\n```md\n[z](no)\n```\n\n    [w](no)\n\n<!-- [v](no) -->\n"
    page = tmp_path / "page.md"
    page.write_text(f"# Here\n\n{good}\n{code}")
    assert links.broken([page], tmp_path) == []
    for bad in ("gone.md", "there.md#no-title", "#nowhere", "there.md#twice-2", "../outside.md"):
        page.write_text(f"# Here\n\n{good}[bad]({bad})\n\n{code}")
        (problem,) = links.broken([page], tmp_path)
        assert f"page.md: ({bad}) leads to no" in problem


def test_every_page_is_in_the_navigation_once():
    text = (ROOT / "mkdocs.yml").read_text()
    listed = re.findall(r"^\s+- ([\w/.-]+\.md)$", text, re.MULTILINE)
    assert sorted(listed) == sorted(path.relative_to(DOCS).as_posix() for path in PAGES)


def test_links_out_of_the_docs_become_the_files_name_or_its_address_in_the_site():
    hook = load("hooks").on_page_markdown
    text = "[the grid](../benchmarks/transfer/README.md#a) [`LICENSE`](../LICENSE) [here](find.md)\n```\n[x](../no)\n```"

    class Of(dict):
        __getattr__ = dict.get

    page = Of(file=Of(src_uri="scale.md"))
    named = hook(text, page=page, config=Of(repo_url=None))
    assert named == "the grid (`benchmarks/transfer/README.md`) `LICENSE` [here](find.md)\n```\n[x](../no)\n```"
    linked = hook(text, page=page, config=Of(repo_url="https://github.com/o/r/"))
    assert "[the grid](https://github.com/o/r/blob/main/benchmarks/transfer/README.md#a)" in linked
    assert "[here](find.md)" in linked


# ------------------------------------------------------------------------------------------------- what the code can tell


def test_the_written_pages_and_tables_are_what_docs_make_writes():
    stale = [name for name, text in load("make").files().items() if (ROOT / name).read_text() != text]
    assert not stale, f"python docs/make.py writes {', '.join(stale)} anew"


def test_every_public_name_is_in_the_api_reference_exactly_once():
    pages = [path.read_text() for path in (DOCS / "api").glob("*.md")]
    named = [name for page in pages for name in re.findall(r"^::: ([\w.]+)$", page, re.MULTILINE)]
    assert sorted(name.rpartition(".")[2] for name in named) == sorted(prior_hub.__all__)
    for name in named:
        module, _, attribute = name.rpartition(".")  # where it is defined: mkdocstrings reads the source
        place = ROOT / module.replace(".", "/")
        source = (place / "__init__.py" if place.is_dir() else place.with_suffix(".py")).read_text()
        assert re.search(rf"^(?:(?:class|def) {attribute}\b|{attribute} = )", source, re.MULTILINE), name


def test_every_command_has_a_section_and_every_option_a_row():
    page = (DOCS / "cli.md").read_text()
    sections = dict(re.findall(r"^## (\S+)$(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    (choices,) = (action.choices for action in _parser()._actions if action.choices)
    assert list(sections) == list(choices)
    for name, parser in choices.items():
        for option in (option for action in parser._actions for option in action.option_strings):
            assert option in ("-h", "--help") or re.search(rf"^\| `(?:.*, )?{option}\b", sections[name], re.MULTILINE), option


def test_every_key_of_the_configuration_is_in_the_formats_table_and_no_other():
    table = (DOCS / "format.md").read_text().split("## The configuration")[1].split("## The tensors")[0]
    keys = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert sorted(keys) == sorted({f.name for f in dataclasses.fields(PriorConfig)} | {"num_parameters"})


def test_the_formats_example_is_the_file_it_says_and_costs_what_is_worked_out_by_hand(tmp_path):
    text = (DOCS / "format.md").read_text()
    config_text, tensors_text = (
        re.search(rf"<!-- example: {name} -->\n```json\n(.*?)```", text, re.DOTALL)[1] for name in ("config", "tensors")
    )
    arrays = {key: np.array(values, np.float32) for key, values in json.loads(tensors_text).items()}
    (tmp_path / "prior.safetensors").write_bytes(safetensors_bytes(arrays, metadata={"format": "pt"}))
    (tmp_path / "prior_config.json").write_text(config_text)
    prior = PriorModel.from_pretrained(tmp_path)  # compares the hash
    assert prior.config.to_json() == config_text
    config = json.loads(config_text)
    d = arrays["deviations.w"].astype(float)
    sigma = config["scale"] * (config["diagonal_weight"] * np.diag(arrays["variance.w"]) + config["low_rank_weight"] * d.T @ d)
    assert sigma.tolist() == [[4, 2], [2, 4]]
    rows = re.findall(r"^\| \((-?\d), (-?\d)\) \| \((-?\d), (-?\d)\).*= (\d\.\d) nats \|$", text, re.MULTILINE)
    assert len(rows) == 2
    for *numbers, cost in rows:
        theta, delta = np.reshape([float(x) for x in numbers], (2, 2))
        assert (theta - arrays["mean.w"]).tolist() == delta.tolist()
        assert 0.5 * delta @ np.linalg.solve(sigma, delta) == pytest.approx(float(cost))
        assert float(prior.penalty({"w": torch.tensor(theta, dtype=torch.float32)})) == pytest.approx(float(cost))


# ------------------------------------------------------------------------------------------------------- what is shown runs


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.stem)
def test_every_command_of_a_guide_is_one_that_is_understood(path):
    shown = [line for block in blocks(path, "sh") for line in block.splitlines() if line.strip()]
    for line in [*shown, *re.findall(r"`(prior-hub [a-z][^`]*)`", path.read_text())]:
        assert line.startswith("prior-hub "), f"{line!r} is run by nobody"
        assert callable(_parser().parse_args(shlex.split(line)[1:]).run), line  # any error exits
    assert set(re.findall(r"^```(\w*)$", path.read_text(), re.MULTILINE)) <= {"", "python", "sh", "json"}
    for block in blocks(path, "python"):
        compile(block, str(path), "exec")


@pytest.mark.hub
@pytest.mark.parametrize(
    "path",  # scale.md runs a rehearsal of 104 steps, which the quick tests have elsewhere
    [pytest.param(p, marks=[pytest.mark.slow] * (p.stem == "scale"), id=p.stem) for p in GUIDES if blocks(p, "python")],
)
def test_every_python_block_of_a_guide_runs_in_order(path, hub, tmp_path, monkeypatch):
    from transformers import ResNetConfig, ResNetForImageClassification

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=5)
    model = ResNetForImageClassification(config)
    rows = [{"pixel_values": x, "labels": i % 5} for i, x in enumerate(torch.randn(40, 1, 8, 8))]
    prior = isotropic_prior(model, variance=1.0, license="mit", base_model=f"{NAME}/tiny-resnet")
    own = f"{NAME}/{path.stem}-"  # all tests share one Hub
    prior.push_to_hub(f"{own}digits-prior")
    names = {
        **{"model": model, "train_dataset": rows, "prior": prior},
        **{"source_model": ResNetForImageClassification(config), "source_dataset": rows},
        **{"loader": torch.utils.data.DataLoader(rows, batch_size=8)},
    }
    for block in blocks(path, "python"):
        exec(compile(block.replace("your-name/", own), str(path), "exec"), names)
    if path.stem == "first-prior":
        arguments = names["PriorSeq2SeqArguments"]("out", prior_num_examples=7, predict_with_generate=True, use_cpu=True)
        assert arguments.prior_num_examples == 7
        assert PriorModel.from_pretrained("digits-prior").config.base_model == f"{own}tiny-resnet"


def test_the_picture_is_of_a_true_minimum_under_the_priors_own_penalty():
    figure = load("figure")
    torch.manual_seed(0)
    prior = PriorModel.from_tensors(
        {"weight": torch.tensor([[1.0, 2.0]], dtype=torch.float64)},
        {"weight": torch.tensor([[0.5, 1.0]], dtype=torch.float64)},
        {"weight": torch.randn(3, 1, 2, dtype=torch.float64)},
        scale=2.0,
    )
    x, y = torch.randn(6, 2, dtype=torch.float64), torch.tensor([0.0, 1, 1, 0, 1, 0], dtype=torch.float64)
    idea = figure.Idea(x, y, prior, prior)
    lowest = idea.lowest(prior).requires_grad_()
    nll = torch.nn.functional.binary_cross_entropy_with_logits(x @ lowest, y)
    loss = nll + prior.gaussian.penalty({"weight": lowest.reshape(1, 2)}) / len(x)
    assert float(idea.loss(lowest.detach(), prior)) == pytest.approx(loss.item())
    nll_gradient = torch.autograd.grad(nll, lowest)[0]
    prior_gradient = torch.linalg.inv(figure.covariance(prior)) @ (lowest - prior.mean["weight"].reshape(2)) / len(x)
    assert torch.allclose(nll_gradient, -prior_gradient.detach(), atol=1e-10)
    assert not figure.Idea(torch.cat([x, x]), torch.cat([y, 1 - y]), prior, prior).separable()
    assert figure.Idea(x, (x[:, 0] > 0).double(), prior, prior).separable()
    assert (DOCS / "idea.png").read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------------------------------------------------- transcript


def test_every_command_is_in_a_scene_of_the_transcript_and_every_scene_on_the_page():
    transcripts = load("transcripts")
    (choices,) = (action.choices for action in _parser()._actions if action.choices)
    assert transcripts.shown_commands() == set(choices), "add it to STORY in docs/transcripts.py, and run that"
    page = transcripts.PAGE.read_text()
    for scene in transcripts.STORY:
        assert f"\n## {scene.title}\n" in page
        for step in scene.steps:
            shown = f"$ {step.text}\n" if isinstance(step, transcripts.Sh) else f"```python\n{step.text}```"
            assert shown in page, f"python docs/transcripts.py has not been run since {step.text.splitlines()[0]!r} was added"
            if isinstance(step, transcripts.Py):
                compile(step.text, "transcript", "exec")


def test_the_transcript_names_no_address_folder_or_token_of_the_machine_it_was_made_on():
    page = (DOCS / "transcript.md").read_text()
    assert not re.search(r"127\.0\.0\.\d|localhost|/tmp/prior-hub|hf_alice", page)
    assert not re.search(r"(?<![0-9a-f])[0-9a-f]{40}(?![0-9a-f])", page)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_transcript_is_what_is_printed_today():
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    command = [sys.executable, str(DOCS / "transcripts.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=3600, env=environment | {"PYTHONPATH": str(ROOT)})
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
