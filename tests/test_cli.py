"""The command line: help that teaches, exit codes, JSON, and the real Hub client underneath."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_fixtures import fresh_repo_id
from huggingface_hub import HfApi
from models import tiny_vit

from prior_hub import PriorModel, __version__
from prior_hub.cli import main

COMPLETE = {"base_model": "org/tiny", "license": "mit", "source": {"dataset": "org/data", "objective": "supervised"}}


@pytest.fixture
def folder(tmp_path):
    g = torch.Generator().manual_seed(0)
    mean = {"conv.weight": torch.randn(4, 3, generator=g), "conv.bias": torch.randn(4, generator=g)}
    variance = {n: torch.full_like(t, 1e-2) for n, t in mean.items()}
    rows = {n: torch.randn(3, *t.shape, generator=g) * 0.1 for n, t in mean.items()}
    prior = PriorModel.from_tensors(mean, variance, rows, **COMPLETE)
    prior.save_pretrained(tmp_path / "prior")
    return tmp_path / "prior"


COMMANDS = [
    *("demo", "learn", "list", "search", "fits", "info", "plot", "diff", "pull", "push", "card", "check", "compress"),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_help_that_teaches(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert f"examples:\n  prior-hub {command}" in text
    assert len(text.split("options:")[0].split()) > 20  # what it does, not only its usage


def test_no_command_and_an_unknown_one_are_usage_errors(capsys):
    for arguments in ([], ["publish"], ["info"], ["pull", "x", "--rank", "-1"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
    capsys.readouterr()


def test_with_json_what_was_not_understood_or_was_interrupted_is_one_json_object_too(capsys, monkeypatch):
    for arguments in (["pull", "x", "--rank", "-1", "--json"], ["info", "--json"], ["list", "--json", "--nothing"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        said = capsys.readouterr()
        found = json.loads(said.out)
        assert (stop.value.code, found["ok"], found["error"]) == (2, False, "UsageError")
        assert found["message"].removeprefix(f"prior-hub {arguments[0]}: ").removeprefix("prior-hub: ") in said.err

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("prior_hub.cli.look.read_config_of", interrupted)
    assert main(["info", "x", "--json"]) == 130
    assert json.loads(capsys.readouterr().out) == {"ok": False, "error": "KeyboardInterrupt", "message": "interrupted"}


def test_version_is_the_packages(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == f"prior-hub {__version__}"


def test_info_shows_the_configuration(folder, capsys):
    assert main(["info", str(folder)]) == 0
    text = capsys.readouterr().out
    for part in (
        "org/tiny",
        "org/data",
        "2 tensors, 16 values",
        "rank K",
        "Sigma = scale (0.5 diag(variance) + 0.25 D^T D)",
        "mit",
    ):
        assert part in text
    assert main(["info", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["config"]["rank"] == 3
    assert found["ok"] is True


def test_check_passes_a_good_prior_and_notes_what_is_missing(folder, tmp_path, capsys):
    assert main(["check", str(folder)]) == 0
    assert "note:" not in capsys.readouterr().out
    PriorModel.from_tensors({"w": torch.zeros(2)}, {"w": torch.ones(2)}).save_pretrained(tmp_path / "bare")
    assert main(["check", str(tmp_path / "bare")]) == 0
    text = capsys.readouterr().out
    assert "no license is recorded" in text
    assert "no base_model is recorded" in text


def test_check_of_a_huge_prior_bounds_its_precision_by_the_smallest_variance(folder, capsys, monkeypatch):
    monkeypatch.setattr("prior_hub.cli.checking._MOST_ITERATED", 10)
    monkeypatch.setattr("prior_hub.LowRankGaussian.largest_precision", lambda self: pytest.fail("it iterates"))
    assert main(["check", str(folder)]) == 0
    assert "largest precision at most 200\n" in capsys.readouterr().out  # 1 / (1/2 * 1e-2)
    assert main(["check", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["largest_precision"] == pytest.approx(200)
    assert found["largest_precision_is_a_bound"]


def test_check_says_what_is_wrong_and_exits_1(folder, tmp_path, capsys):
    weights = folder / "prior.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert main(["check", str(folder)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "sha256" in captured.err
    assert main(["check", str(folder), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["ok"], found["error"]) == (False, "PriorFormatError")
    assert main(["check", str(tmp_path)]) == 1
    assert "holds no prior" in capsys.readouterr().err
    assert main(["check", "no/such/folder"]) == 1
    assert "not a folder" in capsys.readouterr().err
    data[-1] ^= 1
    weights.write_bytes(data)
    assert main(["pull", str(folder), "--rank", "99"]) == 1
    assert "rank 99 is not between 0 and 3" in capsys.readouterr().err


@pytest.mark.hub
def test_push_info_pull_and_check_over_the_hub(folder, tmp_path, hub, capsys):
    repo = fresh_repo_id("cli")
    assert main(["push", str(folder), repo, "--tag", "v1.0", "--no-pictures", "--json"]) == 0
    pushed = json.loads(capsys.readouterr().out)
    assert pushed["tag"] == "v1.0"
    assert pushed["commit_url"].endswith(pushed["commit_hash"])
    assert main(["info", repo, "--revision", "v1.0"]) == 0
    assert pushed["commit_hash"][:8] in capsys.readouterr().out
    assert main(["pull", repo, "--output", str(tmp_path / "copy"), "--rank", "2"]) == 0
    assert "written to" in capsys.readouterr().out
    copy, original = PriorModel.from_pretrained(tmp_path / "copy"), PriorModel.from_pretrained(folder)
    assert copy.rank == 2
    assert torch.equal(copy.deviations["conv.weight"], original.deviations["conv.weight"][:2])
    assert main(["check", repo, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["commit"] == pushed["commit_hash"]


@pytest.mark.hub
def test_pull_as_json_says_what_came_from_where_and_what_went_wrong(folder, tmp_path, hub, capsys):
    repo = fresh_repo_id("cli")
    commit = PriorModel.from_pretrained(folder).push_to_hub(repo, tag="v1.0").commit_hash
    for options, output in (([], ""), (["--output", str(tmp_path / "copy")], str(tmp_path / "copy"))):
        assert main(["pull", repo, "--revision", "v1.0", "--json", *options]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found == {"ok": True, "prior": repo, "commit": commit, "folder": output}
    assert PriorModel.from_pretrained(tmp_path / "copy").rank == 3
    assert main(["pull", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["commit"] is None
    assert main(["pull", repo, "--revision", "v9", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["ok"], found["error"]) == (False, "PriorNotFoundError")


@pytest.mark.hub
@pytest.mark.filterwarnings("ignore::prior_hub.errors.PriorWarning")  # `fits` meets what other tests left on this Hub
def test_every_example_of_every_help_does_what_it_shows(folder, tmp_path, hub, capsys, monkeypatch):
    """The names stand for repositories of the reader's; what takes long is replaced by what notes its arguments."""
    import prior_hub.demo
    import prior_hub.learning.recipes
    import prior_hub.learning.references

    demos, learned, models = [], [], []
    fitting = torch.nn.ModuleDict({"conv": torch.nn.Linear(3, 4)})

    def learn(base_model, dataset, *, output, **options):
        learned.append((dataset, options.get("estimator"), options.get("objective")))
        prior.save_pretrained(output)

    monkeypatch.setattr(prior_hub.learning.recipes, "learn_prior", learn)
    monkeypatch.setattr("prior_hub.plots.card_pictures", lambda prior, folder: {})
    taken = lambda name, revision=None: models.append(name) or fitting  # noqa: E731
    monkeypatch.setattr(prior_hub.learning.references, "named_model", taken)
    monkeypatch.setattr(prior_hub.demo, "run_demo", lambda output, **options: demos.append((str(output), options["seeds"])))
    prior = PriorModel.from_pretrained(folder)
    names = {name: fresh_repo_id(name.split("/")[1]) for name in ("org/resnet50-simclr-prior", "org/name", "me/my-prior")}
    targets = []  # what each `push` publishes to, with something in it already
    for name in names.values():
        prior.push_to_hub(name, tag="v1.0")
    monkeypatch.chdir(tmp_path)
    prior.save_pretrained("my_prior")
    tiny_vit().config.save_pretrained("my_model")
    with pytest.raises(SystemExit):
        main(["--help"])
    (first_step,) = re.findall(r"`prior-hub ([^`]+)`", capsys.readouterr().out)
    assert main(shlex.split(first_step)) == 0
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        lines = [x.strip() for x in capsys.readouterr().out.split("examples:\n")[1].splitlines() if x.strip()]
        assert len(lines) >= 2
        for line in lines:
            assert line.startswith(f"prior-hub {command}")
            words = [names.get(word, word) for word in shlex.split(line)[1:]]
            if "--collection" in words and not hasattr(hub, "collections"):  # the full Hub server has none
                at = words.index("--collection")
                del words[at : at + 2]
            if command == "push":
                targets.append(
                    PriorModel.from_tensors({"w": torch.zeros(2)}, {"w": torch.ones(2)}, **COMPLETE).push_to_hub(
                        fresh_repo_id()
                    )
                )
                words[2] = targets[-1].repo_id
            assert main(words) == 0, f"{line}: {capsys.readouterr()}"
    expected = [("uoft-cs/cifar10", None, None), ("./photos", "fisher", None), ("fancyzhx/ag_news", None, "masked-lm")]
    assert learned == [*expected, ("./photos", None, "simclr"), (None, "isotropic", None)]
    assert models == ["resnet18", "torchvision:resnet50", "./my_model", "microsoft/resnet-50"]  # fits, info --model
    assert demos == [("demo_output", 3), ("demo_output", 3), ("my_demo", 5)]
    assert PriorModel.from_pretrained("prior").rank == 3  # pull --output
    refs = [HfApi().list_repo_refs(t.repo_id, include_pull_requests=True) for t in targets]
    assert [(len(r.tags), len(r.pull_requests)) for r in refs] == [(0, 0), (0, 0), (1, 0), (0, 0), (0, 1)]


@pytest.mark.hub
def test_a_missing_repository_exits_1_with_advice(hub, capsys):
    assert main(["pull", "alice/there-is-no-such-prior"]) == 1
    assert "Check the spelling" in capsys.readouterr().err


def test_the_installed_script_and_the_module_are_the_same_program(folder):
    script = Path(sys.executable).with_name("prior-hub")
    for command in ([str(script)], [sys.executable, "-m", "prior_hub.cli"]):
        result = subprocess.run([*command, "info", str(folder)], capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
        assert "org/tiny" in result.stdout


@pytest.mark.slow
def test_the_demo_runs_from_the_command_line(tmp_path):
    command = [sys.executable, "-m", "prior_hub.cli", "demo", "--quick", "--seeds", "1", "--output", str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    for method in ("plain fine-tuning", "isotropic prior", "learned prior"):
        assert method in result.stdout
    assert (tmp_path / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert PriorModel.from_pretrained(tmp_path / "out" / "prior").rank == 4


@pytest.mark.slow
def test_without_matplotlib_the_demo_says_what_to_install(tmp_path):
    code = "import sys; sys.modules['matplotlib'] = None; from prior_hub.cli import main; sys.exit(main(['demo', '--quick']))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert result.returncode == 1
    assert "pip install 'prior-hub[plots,vision]'" in result.stderr
