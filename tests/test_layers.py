"""The layers of the repository: imports point down only. See docs/architecture.md."""

import ast
from pathlib import Path

import pytest

from tests.conftest import ROOT

LAYERS = [  # from the top; a module imports only from its own package and from layers below
    ("benchmarks",),
    ("scripts", "main"),
    ("experiments",),
    ("cli", "optimize"),
    ("search",),
    ("train",),
    ("evaluate",),
    ("data_loader", "inference", "analysis"),
    ("data", "training"),
    ("tracking",),
    ("checkpoint", "distributed"),
    ("model",),
    ("generation",),
    ("ops", "tokenizer"),
    ("validation",),
    ("runtime",),
    ("config", "errors"),
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
HYDRA = {"hydra": ("cli",), "omegaconf": ("cli", "experiments", "benchmarks")}  # who may import it
KNOWN = {  # arrows up that are still to go
    ("gpt2.training.state", "gpt2.train"),
}
FILES = [*sorted((ROOT / "gpt2").rglob("*.py")), *sorted(ROOT.glob("*.py"))]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def package_of(module: str) -> str:
    return module.split(".")[1] if module.startswith("gpt2.") else "scripts"


def imports_of(path: Path) -> list[tuple[int, str]]:
    """The modules that a file imports anywhere in it, with their lines."""
    modules = {module_of(file) for file in FILES}
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [(node.lineno, name if name in modules else str(node.module)) for name in names]
    return [(line, name) for line, name in found if (module_of(path), name) not in KNOWN]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    own = package_of(module_of(path))
    for line, name in imports_of(path):
        place = f"{path.relative_to(ROOT)}:{line} imports {name}"
        top = name.split(".")[0]
        assert top != "tests", f"{place}, which is not part of the product"
        assert own in HYDRA.get(top, (own,)), f"{place}, which only {' and '.join(HYDRA[top])} may"
        if name.startswith("gpt2.") and package_of(name) != own:
            assert LEVEL[own] < LEVEL[package_of(name)], f"{place}, which is not in a layer below"


def test_imports_have_no_cycle():
    graph = {module_of(path): {name for _, name in imports_of(path)} for path in FILES}
    while leaves := [module for module, names in graph.items() if not names & graph.keys()]:
        for module in leaves:
            del graph[module]
    assert not graph, f"these modules import each other in a circle: {sorted(graph)}"
