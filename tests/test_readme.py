"""The README: every code block runs, every command is run here or by .ci/run, every link to a file leads to one."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prior_hub import PriorModel, isotropic_prior
from prior_hub.cli import _parser, main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
NAME = "alice"  # stands for the reader's own name on the Hub


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.mark.hub
def test_every_python_block_runs_in_order(hub, tmp_path, monkeypatch):
    from transformers import ResNetConfig, ResNetForImageClassification

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=5)
    model = ResNetForImageClassification(config)
    images = torch.randn(40, 1, 8, 8)
    train_dataset = [{"pixel_values": x, "labels": i % 5} for i, x in enumerate(images)]
    isotropic_prior(model, variance=1.0, license="mit", base_model="org/tiny").push_to_hub(f"{NAME}/digits-prior")
    names = {
        "model": model,
        "train_dataset": train_dataset,
    }
    for block in blocks("python"):
        if block.strip() == (ROOT / "examples" / "minimal.py").read_text().strip():
            continue  # run as a program by tests/test_examples.py
        exec(compile(block.replace("your-name", NAME), "README.md", "exec"), names)
    assert "v1.0" in {tag.name for tag in __import__("huggingface_hub").list_repo_refs(f"{NAME}/my-prior").tags}
    for line in "\n".join(blocks("sh")).splitlines():
        if line.startswith("prior-hub "):
            assert main(shlex.split(line.replace("your-name", NAME))[1:]) == 0, line
    assert PriorModel.from_pretrained(f"{NAME}/my-prior-copy").num_parameters == names["prior"].num_parameters


def test_every_fenced_block_is_of_a_kind_that_is_run():
    assert set(re.findall(r"^```(\w*)$", README, re.MULTILINE)) == {"", "python", "sh"}  # "" closes a block


def test_every_other_command_is_run_by_ci():
    ci = (ROOT / ".ci" / "run").read_text()
    for line in "\n".join(blocks("sh")).splitlines():
        assert line.startswith("prior-hub ") or f"\n{line}\n" in ci, f"{line!r} is run by nobody"


def test_every_command_in_the_text_is_one_that_is_understood():
    commands = re.findall(r"`(prior-hub [^`]+)`", README)
    assert "prior-hub demo --seeds 15" in commands
    for command in [*commands, *(x for x in "\n".join(blocks("sh")).splitlines() if x.startswith("prior-hub "))]:
        assert callable(_parser().parse_args(shlex.split(command)[1:]).run), command  # any error exits


def test_the_fifteen_lines_are_the_example():
    example = (ROOT / "examples" / "minimal.py").read_text()
    assert f"<!-- examples/minimal.py -->\n```python\n{example}```" in README
    code = [line for line in example.splitlines() if line.strip() and not line.strip().startswith(("#", '"""'))]
    assert len(code) <= 15


def test_every_link_to_a_file_leads_to_one():
    links = re.findall(r"\]\((?!http)([^)]+)\)", README)
    assert links
    assert all((ROOT / link.partition("#")[0]).exists() for link in links)  # tests/test_docs.py looks at the anchors
    for path in re.findall(r"`((?:tests|benchmarks|examples)/[\w./]+)`", README):
        assert (ROOT / path).exists(), path


def test_the_benchmark_named_in_it_runs():
    command = [sys.executable, str(ROOT / "benchmarks" / "penalty.py"), "--quick", "--no-memory"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "torch.distributions" in result.stdout


def test_architecture_names_every_room():
    rooms = {p.name for p in (ROOT / "prior_hub").iterdir() if (p / "__init__.py").is_file()}
    assert all(f"`{room}/`" in README for room in rooms)
