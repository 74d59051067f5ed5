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
    "prior_hub.learning.callback",
    "prior_hub.learning.recipes",
    "prior_hub.demo",
}
MATPLOTLIB = {"prior_hub.plots"}


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
        assert top not in {"pickle", "cloudpickle", "dill", "joblib"}, f"{module} imports {target}"


def test_nothing_is_ever_unpickled():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("load", "loads"):
                owner = ast.unparse(node.func.value)
                assert owner in ("json", "self.estimator"), f"{path.name}: {ast.unparse(node)}"


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
