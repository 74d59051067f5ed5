"""Rooms and their walls: who may import whom, and what importing prior_hub costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import prior_hub

ROOT = Path(prior_hub.__file__).parent
# Imports go one way: a room may use rooms before it in this order, and itself.
ORDER = [
    ["prior_hub.errors"],
    ["prior_hub"],
    ["prior_hub.distributed"],
    ["prior_hub.priors"],
    ["prior_hub.registry"],
    ["prior_hub.model"],
    ["prior_hub.learning", "prior_hub.inference"],
    ["prior_hub.finetuning"],
    ["prior_hub.plots"],
    ["prior_hub.demo"],
    ["prior_hub.cli"],
]
TRANSFORMERS = {
    "prior_hub.finetuning.trainer",
    "prior_hub.finetuning.arguments",
    "prior_hub.finetuning.scale",
    "prior_hub.learning.callback",
    "prior_hub.learning.references",  # architectures by name, for `prior-hub import --reference`
    "prior_hub.learning.recipes",
    "prior_hub.demo",
}
MATPLOTLIB = {"prior_hub.plots"}
PICKLERS = {"pickle", "cloudpickle", "dill", "joblib"}
PICKLE_NAMES = {"prior_hub.priors.legacy": {"UnpicklingError"}}  # what torch.load raises when it refuses an object
TORCH_LOAD = "prior_hub.priors.legacy"  # other people's files of tensors: only there, only with weights_only=True


def module_name(path):
    parts = ("prior_hub", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module):
    return ".".join(module.split(".")[:2])


def imports(path):
    """(module, is it needed when the file is imported?) for every import outside `if TYPE_CHECKING`."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(n)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for n in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            if node.module == "prior_hub":  # a lazy public name is an import of the room it lives in
                yield from (prior_hub._LAZY[alias.name] for alias in node.names if alias.name in prior_hub._LAZY)
            if node.module == "torch":
                assert not {alias.name for alias in node.names} & {"load", "save"}, f"{path}: pickles"


FILES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_go_one_way(path):
    rank = {name: i for i, names in enumerate(ORDER) for name in names}
    own = room(module_name(path))
    assert own in rank, f"{own} has no place in the order of rooms: give it one here and in README.md"
    for target in imports(path):
        if target.split(".")[0] != "prior_hub":
            continue
        there = room(target)
        assert there == own or rank[there] < rank[own], f"{module_name(path)} imports {target}"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_heavy_libraries_stay_in_their_places(path):
    module = module_name(path)
    for target in imports(path):
        top = target.split(".")[0]
        assert top not in {"transformers", "accelerate"} or module in TRANSFORMERS, f"{module} imports {target}"
        assert top != "matplotlib" or module in MATPLOTLIB, f"{module} imports {target}"
        assert top not in PICKLERS or module in PICKLE_NAMES, f"{module} imports {target}"


def unpickling(path):
    """What in a file could turn bytes into objects, as text; [] for a file that cannot."""
    module, found = module_name(path), []
    tree = ast.parse(path.read_text())
    safe = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [ast.unparse(node) for alias in node.names if alias.name.split(".")[0] in PICKLERS]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PICKLERS:
            names = {alias.name for alias in node.names}
            found += [] if node.module == "pickle" and names <= PICKLE_NAMES.get(module, set()) else [ast.unparse(node)]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            options = {keyword.arg: keyword.value for keyword in node.keywords}
            only = options.get("weights_only")
            if module == TORCH_LOAD and isinstance(only, ast.Constant) and only.value is True and None not in options:
                safe.add(node.func)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("load", "loads", "Unpickler", "_load", "_legacy_load"):
            owner = ast.unparse(node.value)
            if module == "prior_hub.priors.kernels" and owner == "tl":  # triton.language, which reads a GPU's memory
                continue
            if node not in safe and owner not in ("json", "self.estimator"):
                found.append(ast.unparse(node))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in (*PICKLERS, "weights_only"):
            found.append(repr(node.value))  # by another way: importlib.import_module("pickle"), **{"weights_only": False}
    return found


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_nothing_is_ever_unpickled(path):
    assert unpickling(path) == []


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(p)",
        "torch.load(p, weights_only=False)",
        "torch.load(p, weights_only=flag)",
        "torch.load(p, weights_only=True, **more)",
        "read = torch.load",
        "import pickle",
        "from pickle import loads",
        "from pickle import UnpicklingError, load",
        "joblib.load(p)",
        "importlib.import_module('pickle')",
        "functools.partial(torch.load, weights_only=True)",
    ],
)
def test_the_rule_against_unpickling_can_be_broken(line, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "priors" / "legacy.py"
    path.parent.mkdir()
    path.write_text("torch.load(p, map_location='cpu', weights_only=True)\nfrom pickle import UnpicklingError\n")
    assert unpickling(path) == []
    path.write_text(line)
    assert unpickling(path) != []
    path.write_text("torch.load(p, weights_only=True)")
    assert unpickling(path.rename(path.with_name("storage.py"))) != []


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_importing_prior_hub_loads_neither_torch_nor_transformers():
    heavy = ["torch", "transformers", "huggingface_hub", "numpy", "safetensors", "matplotlib", "timm"]
    result = run(f"import sys, prior_hub; print([m for m in {heavy!r} if m in sys.modules])")
    assert result.stdout.strip() == "[]", result.stderr


def test_a_prior_can_be_loaded_without_transformers(tmp_path):
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import torch; from prior_hub import PriorModel\n"
        f"p = PriorModel.from_tensors({{'w': torch.zeros(3)}}, {{'w': torch.ones(3)}}); p.save_pretrained({str(tmp_path)!r})\n"
        f"print(PriorModel.from_pretrained({str(tmp_path)!r}).num_parameters)"
    )
    result = run(code)
    assert result.stdout.strip() == "3", result.stderr


def test_every_public_name_exists_and_is_listed():
    for name in prior_hub.__all__:
        assert getattr(prior_hub, name) is not None
    assert set(prior_hub._LAZY) <= set(prior_hub.__all__) <= set(dir(prior_hub))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = prior_hub.nothing


def test_the_package_is_typed():
    assert (ROOT / "py.typed").is_file()


def test_one_version_everywhere():
    from importlib.metadata import version

    assert version("prior-hub") == prior_hub.__version__
