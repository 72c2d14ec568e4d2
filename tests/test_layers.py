"""The layers of the repository: imports point down only, see docs/architecture.md; the scripts are short."""

import ast
from pathlib import Path

import pytest

from tests.conftest import ROOT

LAYERS = """
doctor
benchmarks
scripts main
experiments
cli optimize
search
train
evaluate tasks
data_loader inference analysis
data training
tracking
checkpoint distributed
model
generation
ops tokenizer
validation
runtime
config errors
"""  # from the top: a module imports only from its own package and from layers below
LEVEL = {package: level for level, line in enumerate(LAYERS.strip().splitlines()) for package in line.split()}
ALLOWED = {
    "hydra": {"cli"},
    "omegaconf": {"cli", "experiments", "benchmarks", "doctor"},
    "tests": set(),
}  # who may import it
FILES = [*sorted((ROOT / "gpt2").rglob("*.py")), *sorted(ROOT.glob("*.py"))]


def package_of(module: str) -> str:
    return module.split(".")[1] if module.startswith("gpt2.") else "scripts"


def imports_of(path: Path) -> list[tuple[int, str]]:
    """The modules that a file imports, anywhere in it, with their lines. `from gpt2 import train` counts as both."""
    imports = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imports += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "gpt2":
            imports += [(node.lineno, f"gpt2.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imports += [(node.lineno, str(node.module))]
    return imports


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    own = package_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for line, name in imports_of(path):
        place, top = f"{path.relative_to(ROOT)}:{line} imports {name}", name.split(".")[0]
        assert own in ALLOWED.get(top, {own}), f"{place}, which only {sorted(ALLOWED[top])} may"
        if name.startswith("gpt2.") and package_of(name) != own:
            assert LEVEL[own] < LEVEL[package_of(name)], f"{place}, which is not in a layer below"


@pytest.mark.parametrize("script", ["train.py", "evaluate.py", "generate.py"])
def test_scripts_are_short(script):
    assert len((ROOT / script).read_text().splitlines()) < 120
