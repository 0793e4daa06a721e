"""Imports point one way, without circles, in the order of the design's listing; heavy packages load only where they are used."""

from __future__ import annotations

import ast
import graphlib
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import rgdiff

ROOT = Path(rgdiff.__file__).parent

# A package or module imports only from rows above its own, or from itself.
ORDER = [
    {"_cache", "_lazy", "_settings", "_worker", "assets", "typing"}, {"checks"}, {"oracles"}, {"keys", "shards"}, {"kernels"}, {"schedules"}, {"processes"}, {"correctors", "graphs"}, {"denoisers"}, {"rewards"}, {"values"}, {"policies"},
    {"guides"}, {"resampling"}, {"samplers"}, {"tuners"}, {"surrogates"}, {"seiko"}, {"nets"}, {"pretrained"}, {"metrics"}, {"exact"}, {"domains"},
    {"runtime"}, {"recipes"}, {"examples"}, {"cli"}, {"__main__"},
]  # fmt: skip
RANK = {name: i for i, row in enumerate(ORDER) for name in row}
MODULES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py") if "__pycache__" not in path.parts)
HEAVY = {"flax", "optax", "orbax", "hydra", "matplotlib", "sklearn", "scipy", "rich", "PIL"}


def dotted(path: Path) -> str:
    return ".".join(["rgdiff", *path.with_suffix("").parts]).removesuffix(".__init__")


NAMES = {dotted(path) for path in MODULES}


def imported(path: Path, *, top: bool) -> set[str]:
    """Names of modules that a file imports: anywhere, or only at its top level. Those of ours are the files meant."""
    tree = ast.parse((ROOT / path).read_text())
    out = set()
    for node in tree.body if top else ast.walk(tree):
        if isinstance(node, ast.Import):
            out |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            for alias in node.names:
                full = f"{module}.{alias.name}"
                out.add(full if full in NAMES else module)
    return out


def lazy(path: Path) -> bool:
    """Whether a package only lists its submodules: it imports them for type checkers, and when they are asked for."""
    return path.name == "__init__.py" and "submodules(" in (ROOT / path).read_text()


def unit(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def test_imports_point_one_way():
    wrong = []
    for path in MODULES:
        if str(path) == "__init__.py":
            continue
        own = unit(dotted(path))
        assert own in RANK, f"{own} has no place in the listing"
        for name in imported(path, top=False):
            other = unit(name) if name.startswith("rgdiff.") else own
            if other != own and RANK[other] >= RANK[own]:
                wrong.append(f"{path} imports {name}")
    assert not wrong, wrong


def test_there_is_no_circle_of_imports():
    """Of files, inside functions too; a package stands for its __init__."""
    graph = {
        dotted(path): set()
        if lazy(path)
        else {n for n in imported(path, top=False) if n in NAMES and n != dotted(path)}
        for path in MODULES
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the circle


def test_the_vocabulary_imports_nothing_of_ours():
    assert not {name for name in imported(Path("typing.py"), top=False) if name.startswith("rgdiff")}


def test_heavy_packages_are_imported_inside_functions():
    """Only reference and released networks, which are Linen modules, import Flax at their top; examples do as their readers would."""
    for path in MODULES:
        allowed = {"nets": {"flax"}, "pretrained": {"flax"}, "examples": {"flax", "optax"}}.get(
            unit(dotted(path)), set()
        )
        assert {name.split(".")[0] for name in imported(path, top=True)} & HEAVY <= allowed, path


def test_orbax_is_imported_by_the_checkpoints_alone():
    users = {str(p) for p in MODULES if any(n.split(".")[0] == "orbax" for n in imported(p, top=False))}
    assert users <= {"runtime/checkpoint.py"}


def test_importing_the_core_loads_no_heavy_package():
    code = (
        "import sys, jax, jax.numpy; before = set(sys.modules)\n"
        "import rgdiff, rgdiff.samplers, rgdiff.tuners, rgdiff.denoisers, rgdiff.values, rgdiff.rewards\n"
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, check=True)
    loaded = set(run.stdout.split())
    assert "rgdiff" in loaded and not loaded & HEAVY, loaded & HEAVY


def test_rgdiff_names_its_modules_lazily():
    code = "import sys, rgdiff; assert 'rgdiff.samplers' not in sys.modules and 'jax' not in sys.modules; rgdiff.samplers.sample; print('ok')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent)
    assert run.stdout == "ok\n", run.stderr
    with pytest.raises(AttributeError, match="has no attribute 'sampler'"):
        rgdiff.sampler  # noqa: B018


@pytest.mark.parametrize("name", ["rgdiff", "rgdiff.domains", "rgdiff.pretrained"])
def test_what_a_lazy_package_lists_is_there(name):
    package = importlib.import_module(name)
    assert set(package.__all__) == set(dir(package)) - {"__version__"}
    for attribute in dir(package):
        assert getattr(package, attribute) is not None


def test_a_public_module_is_not_hidden_by_what_it_holds():
    """`import rgdiff.tuners.dxdp` must give a module: a package exports no function under the name of one of its modules."""
    hidden = []
    for module in sorted(NAMES - {"rgdiff.__main__"}):
        package, _, last = module.rpartition(".")
        found = importlib.import_module(module)
        if package and not last.startswith("_") and getattr(importlib.import_module(package), last) is not found:
            hidden.append(module)
    assert not hidden, hidden


def test_no_two_public_classes_bear_one_name():
    homes: dict[str, list[str]] = {}
    for path in MODULES:
        for node in ast.parse((ROOT / path).read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(str(path))
    assert not {name: where for name, where in homes.items() if len(where) > 1}
