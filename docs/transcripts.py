"""Run every command as a new user would, against a Hub of this machine, and write what was printed into docs/transcript.md.

    python docs/transcripts.py            # writes docs/transcript.md, some minutes on two slow cores
    python docs/transcripts.py --check    # compares what is printed now with docs/transcript.md, numbers and hashes aside

STORY is the table: scenes of commands and Python programs, in order, run in one new folder with an empty cache
against tests/loopback_hub.py. To show a new command add a `Sh("prior-hub NAME ...")` where it belongs: tests/test_docs.py fails
while a command of the parser is in no scene. Nothing that was printed is edited but what differs between two runs: the address
of the loopback server (written as the Hub's), hashes of commits, temporary folders, durations.

Each command has a process of its own, forked from one that has imported torch and transformers already (that takes seconds).
Python programs, and commands that set HF_HUB_OFFLINE, which the Hub's client reads when it is imported, start from nothing.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "transcript.md"
HOME = "/home/alice"
TIMEOUT = 600  # seconds that one command may take


@dataclass(frozen=True)
class Sh:
    """A command line; `code` is the exit code it must have."""

    text: str
    code: int = 0


@dataclass(frozen=True)
class Py:
    """A Python program."""

    text: str
    code: int = 0


@dataclass(frozen=True)
class Scene:
    """Steps under a heading, with a sentence before them."""

    title: str
    words: str
    steps: tuple[Sh | Py, ...]


STORY = (
    Scene(
        "Is it there?",
        "",
        (Sh("prior-hub --version"),),
    ),
    Scene(
        "The whole idea in one command",
        "A much smaller run than `prior-hub demo`, which shows the path and not the result.",
        (Sh("prior-hub demo --quick --seeds 1"),),
    ),
    Scene(
        "A model and a data set",
        "Stand-ins for your own: a small ResNet with random weights, published, and handwritten digits 0-4 in a folder.",
        (
            Py("""\
from datasets import ClassLabel, Dataset, Features, Image
from sklearn.datasets import load_digits
from transformers import ConvNextImageProcessor, ResNetConfig, ResNetForImageClassification, set_seed

set_seed(0)
config = ResNetConfig(embedding_size=8, hidden_sizes=[16], depths=[1], layer_type="basic", num_labels=5)
ResNetForImageClassification(config).push_to_hub("alice/tiny-resnet")
ConvNextImageProcessor(size={"shortest_edge": 8}, crop_pct=1.0).push_to_hub("alice/tiny-resnet")

images, labels = load_digits(return_X_y=True)
rows = [(x.reshape(8, 8) * 15, y) for x, y in zip(images, labels, strict=True) if y < 5]
features = Features({"image": Image(), "label": ClassLabel(names=list("01234"))})
columns = {"image": [x.astype("uint8") for x, _ in rows], "label": [int(y) for _, y in rows]}
Dataset.from_dict(columns, features=features).to_parquet("digits/train.parquet")
print(len(rows), "images")
"""),
        ),
    ),
    Scene(
        "Learn a prior",
        "",
        (
            Sh(
                "prior-hub learn --base-model alice/tiny-resnet --dataset ./digits --steps 200 --start 0.5 --every-n-steps 5 "
                "--learning-rate 0.05 --rank 10 --no-augment --license cc-by-4.0 --cpu --output digits-prior"
            ),
            Sh("ls digits-prior"),
        ),
    ),
    Scene(
        "Look at it",
        "",
        (
            Sh("prior-hub check digits-prior"),
            Sh("prior-hub check digits-prior --strict", 1),
            Sh("prior-hub info digits-prior --model alice/tiny-resnet"),
            Sh("prior-hub plot digits-prior --output digits-prior.png"),
            Sh("prior-hub compress digits-prior --explained 0.9 --output smaller"),
            Sh("prior-hub diff digits-prior smaller"),
        ),
    ),
    Scene(
        "Publish it",
        "A line that a person adds to the card survives the next push.",
        (
            Sh("prior-hub card digits-prior | sed -n '1,20p'"),
            Sh("prior-hub push digits-prior alice/digits-prior --dry-run | sed -n '1,30p'"),
            Sh("prior-hub push digits-prior alice/digits-prior --tag v1.0 --message 'First version'"),
            Sh("printf '\\nTried on digits 5-9.\\n' >> digits-prior/README.md"),
            Sh("prior-hub push digits-prior alice/digits-prior --message 'What it was tried on'"),
            Sh("prior-hub push digits-prior alice/digits-prior --dry-run | tail -3"),
            Sh("prior-hub push smaller alice/digits-prior --create-pr --message 'Principal directions'"),
            Sh("prior-hub push smaller alice/digits-prior-small --private --json"),
        ),
    ),
    Scene(
        "Without a licence it is not published",
        "",
        (
            Sh("prior-hub learn --base-model alice/tiny-resnet --estimator isotropic --variance 0.01 --output l2-sp | tail -3"),
            Sh("prior-hub push l2-sp alice/l2-sp", 1),
            Sh("prior-hub push l2-sp alice/l2-sp --license mit --json"),
        ),
    ),
    Scene(
        "Find one that fits",
        "No weights are downloaded.",
        (
            Sh("prior-hub list --base-model alice/tiny-resnet"),
            Sh("prior-hub search digits swag"),
            Sh("prior-hub fits alice/tiny-resnet"),
            Py("""\
from transformers import AutoModelForImageClassification

from prior_hub import list_priors, prior_info, priors_for, search_priors

print([info.repo_id for info in list_priors(author="alice", min_rank=2)])
print(search_priors("resnet swag"))
model = AutoModelForImageClassification.from_pretrained("alice/tiny-resnet", num_labels=3, ignore_mismatched_sizes=True)
for fit in priors_for(model):
    print(fit.repo_id, f"{fit.coverage:.0%}", fit.why)
print(prior_info("alice/digits-prior").rank)
"""),
            Sh("prior-hub search imagenet"),
        ),
    ),
    Scene(
        "Take it",
        "",
        (
            Sh("prior-hub info alice/digits-prior --revision v1.0 --json | sed -n '1,5p'"),
            Sh("prior-hub pull alice/digits-prior --revision v1.0 --rank 4 --output mine"),
            Sh("HF_HUB_OFFLINE=1 prior-hub pull alice/digits-prior --revision v1.0"),
        ),
    ),
    Scene(
        "Fine-tune under it, from Python",
        "The model is the published one with another head: 40 examples of digits 5-9.",
        (
            Py("""\
from sklearn.datasets import load_digits
from transformers import AutoModelForImageClassification, set_seed

from prior_hub import PriorModel, PriorTrainer, PriorTrainingArguments, push_prior_to_hub

set_seed(0)
images, labels = load_digits(return_X_y=True)
new = [
    {"pixel_values": (x.reshape(1, 8, 8).repeat(3, 0) / 16).astype("float32"), "labels": y - 5}
    for x, y in zip(images, labels, strict=True)
    if y >= 5
]
model = AutoModelForImageClassification.from_pretrained("alice/tiny-resnet", num_labels=5)
prior = PriorModel.from_pretrained("alice/digits-prior", revision="v1.0")
print(prior)
print(prior.match(model))
print(prior.diagnose())

arguments = PriorTrainingArguments(
    "out", prior_scale=1e3, max_steps=30, learning_rate=0.02, use_cpu=True, disable_tqdm=True, save_strategy="no"
)
trainer = PriorTrainer(model=model, prior=prior, args=arguments, train_dataset=new[:40])
trainer.train()
print(trainer.prior_penalty.report())

result = push_prior_to_hub(prior.rescaled(1e3), "alice/digits-prior", tag="v1.1")
print(result.commit_url)
"""),
        ),
    ),
    Scene(
        "Import other people's files",
        "Four files in the form of the paper's, made here from random snapshots.",
        (
            Py("""\
import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(20, 10), nn.Linear(10, 5))
snapshots = torch.stack([torch.randn(265) * 0.1 for _ in range(8)])
running = torch.stack([snapshots[: i + 1].mean(0) for i in range(8)])
torch.save(model.state_dict(), "net_model.pt")
torch.save(snapshots.mean(0), "net_mean.pt")
torch.save(snapshots.var(0, correction=0), "net_variance.pt")
torch.save(snapshots - running, "net_covmat.pt")
"""),
            Sh("prior-hub import ./net --head none --trust-order --license mit --output imported"),
        ),
    ),
    Scene(
        "When something is wrong",
        "Each says what was found and what to do; the exit code is 1.",
        (
            Sh("prior-hub info alice/digit-prior", 1),
            Sh("prior-hub pull alice/digits-prior --revision v9.9", 1),
            Sh("prior-hub check digits", 1),
            Sh("prior-hub push digits-prior alice/digits-prior --tag v1.0", 1),
            Sh("prior-hub push digits-prior bob/digits-prior", 1),
            Sh("HF_HUB_OFFLINE=1 prior-hub pull alice/never-seen", 1),
            Sh("printf x | dd of=mine/prior.safetensors bs=1 seek=5000 conv=notrunc status=none"),
            Sh("prior-hub check mine", 1),
            Sh("prior-hub check mine --json", 1),
        ),
    ),
)


def shown_commands() -> set[str]:
    """The commands of `prior-hub` that a scene runs."""
    texts = [step.text for scene in STORY for step in scene.steps if isinstance(step, Sh)]
    return {found for text in texts for found in re.findall(r"\bprior-hub ([a-z]+)", text)}


def record() -> Iterator[str]:
    """The page, piece by piece, as the commands run."""
    sys.path.insert(0, str(ROOT / "tests"))
    from hub_fixtures import client_environment, start_hub

    yield _HEAD
    with tempfile.TemporaryDirectory(prefix="prior-hub-transcript-") as place:
        base = Path(place)
        work, programs = base / "work", base / "bin"
        work.mkdir()
        programs.mkdir()
        script = programs / "prior-hub"
        script.write_text(_CLIENT.format(python=sys.executable, socket=str(base / "socket")))
        script.chmod(0o755)
        hub = start_hub(base / "hub")
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "PRIOR_HUB_"))}
        environment = inherited | client_environment(hub, base / "cache") | {
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "HOME": str(work),
            "COLUMNS": "100",
            "OMP_NUM_THREADS": "1",
            "HF_DATASETS_CACHE": str(base / "datasets"),
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_VERBOSITY": "error",
            "TRANSFORMERS_VERBOSITY": "error",
            "PYTHONWARNINGS": "ignore",
        }  # fmt: skip

        def tidy(text: str) -> str:
            for found, written in (
                (hub.endpoint, "https://huggingface.co"),
                (str(base / "cache"), f"{HOME}/.cache/huggingface"),
            ):
                text = text.replace(found, written)
            return _same_each_time(text.replace(str(work), HOME).replace(str(base), "/tmp"))

        served = subprocess.Popen(
            [sys.executable, __file__, "--serve", str(base / "socket")], cwd=work, env=environment, stdout=subprocess.DEVNULL
        )
        try:
            while not (base / "socket").exists():
                time.sleep(0.1)
                if served.poll() is not None:
                    raise SystemExit("the process that runs the commands ended")
            for scene in STORY:
                yield f"\n## {scene.title}\n" + (f"\n{scene.words}\n" if scene.words else "")
                for step in scene.steps:
                    yield "\n" + _run(step, work, environment, tidy)
        finally:
            served.kill()
            served.wait()
            hub.stop()


_CLIENT = """\
#!{python} -S
import json, os, socket, sys

if os.environ.get("HF_HUB_OFFLINE", "0") != "0":
    os.execv({python!r}, [{python!r}, "-m", "prior_hub.cli", *sys.argv[1:]])
there = socket.socket(socket.AF_UNIX)
there.connect({socket!r})
socket.send_fds(there, [json.dumps([sys.argv[1:], os.getcwd()]).encode()], [0, 1, 2])
sys.exit(int(there.recv(16)))
"""


def serve(place: str) -> None:
    """Run the commands that come over a socket, each in a fork of this process, with the files and the folder of who asks."""
    for name in ("demo", "finetuning.trainer", "learning.recipes"):
        importlib.import_module(f"prior_hub.{name}")
    from prior_hub.cli import main as run

    listening = socket.socket(socket.AF_UNIX)
    listening.bind(place + ".new")
    listening.listen()
    Path(place + ".new").rename(place)  # it is there when it answers
    while True:
        asking, _ = listening.accept()
        message, files, _, _ = socket.recv_fds(asking, 1 << 16, 3)
        arguments, folder = json.loads(message)
        child = os.fork()
        if not child:
            code: int | str | None = 1
            try:
                for number, file in enumerate(files):
                    os.dup2(file, number)
                os.chdir(folder)
                code = run(arguments)
            except SystemExit as stop:
                code = stop.code
            except BaseException:  # noqa: BLE001 (shown, and the child ends)
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code if isinstance(code, int) else 0)
        for file in files:
            os.close(file)
        asking.sendall(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())
        asking.close()


def _run(step: Sh | Py, work: Path, environment: dict[str, str], tidy: object) -> str:
    command = ["bash", "-c", step.text] if isinstance(step, Sh) else [sys.executable, "-c", step.text]
    result = subprocess.run(
        command, cwd=work, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=TIMEOUT
    )
    assert callable(tidy)
    output = tidy(result.stdout)
    if result.returncode != step.code:
        problem = f"{step.text}\nended with exit code {result.returncode}, expected {step.code}:\n{output}"
        if not os.environ.get("KEEP_GOING"):
            raise SystemExit(problem)
        print(f"PROBLEM {problem}", file=sys.stderr)
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`{3,}", output)), 3)  # a card has fences of its own
    if isinstance(step, Sh):
        code = f"(exit code {result.returncode})\n" if result.returncode else ""
        return f"{fence}console\n$ {step.text}\n{output}{code}{fence}\n"
    return f"```python\n{step.text}```\n" + (f"\n{fence}text\n{output}{fence}\n" if output else "")


def _same_each_time(text: str) -> str:
    """Without what differs between two runs on one machine."""
    text = "\n".join(line.rstrip().rpartition("\r")[2] for line in text.split("\n"))  # the last state of a progress bar
    text = re.sub(r"(?<![0-9a-f])[0-9a-f]{40}(?![0-9a-f])", "<commit>", text)
    text = re.sub(r"(@ |\(?commit )[0-9a-f]{8}(?![0-9a-f])", r"\1<commit>", text)
    text = re.sub(r"\b\d+(\.\d+)? s\b", "... s", text)
    return re.sub(r"('train_(?:runtime|samples_per_second|steps_per_second)': )'?[\d.e+-]+'?", r"\1...", text)


def masked(text: str) -> str:
    """Without numbers, hashes and the width of columns, which differ between machines and versions of libraries."""
    text = re.sub(r"(?<![0-9a-zA-Z])[0-9a-f]{12,64}(?![0-9a-zA-Z])", "#", text)
    text = re.sub(r"[-+]?\d[\d,]*(?:\.\d+)*(?:e[-+]?\d+)?", "#", text)
    return re.sub(r"[ \t]+", " ", re.sub(r"\n {2,}", " ", text))  # lines that were broken where the numbers were longer


_HEAD = """\
# Transcript

<!-- written by docs/transcripts.py -->

Every command, run in order by `python docs/transcripts.py` in a new folder, with an empty cache, against a Hub server on this
machine (`tests/loopback_hub.py`) that stands for huggingface.co; prior_hub has not been tried against huggingface.co itself.
The output is as it was printed, error messages included; only the server's address, hashes of commits, temporary folders and
durations are replaced. `alice` is logged in (`HF_TOKEN`).
"""


def main() -> int:
    """Write the page, or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where something else is printed")
    parser.add_argument("--serve", metavar="SOCKET", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve)
    pieces = []
    for piece in record():
        print(piece, end="", flush=True, file=sys.stderr)
        pieces.append(piece)
    text = "".join(pieces)
    if not arguments.check:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    old, new = (masked(t).splitlines() for t in (PAGE.read_text(encoding="utf-8"), text))
    print("\n".join(difflib.unified_diff(old, new, "docs/transcript.md", "now", lineterm="")))
    return int(old != new)


if __name__ == "__main__":
    sys.exit(main())
