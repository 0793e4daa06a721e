"""Imports point one way, in the order of the design's listing, and heavy packages load only where they are used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import rgdiff

ROOT = Path(rgdiff.__file__).parent

# DESIGN.md, section 3: a module imports only from rows above its own (or its own package). `checks` stands beside
# `typing`; `metrics` is a leaf that only domains and the command line use.
ORDER = [
    {"typing", "checks"}, {"keys"}, {"kernels"}, {"schedules"}, {"processes"}, {"denoisers"}, {"values", "rewards"}, {"policies"}, {"guides"},
    {"resampling"}, {"samplers"}, {"tuners"}, {"surrogates"}, {"seiko"}, {"nets"}, {"metrics"}, {"domains"}, {"runtime"}, {"cli"},
    {"__main__"},
]  # fmt: skip
RANK = {name: i for i, row in enumerate(ORDER) for name in row}
MODULES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py") if "__pycache__" not in path.parts)
HEAVY = {"flax", "optax", "orbax", "hydra", "matplotlib", "sklearn", "scipy", "rich", "PIL"}


def imported(path: Path, *, top: bool) -> set[str]:
    """Names of modules a file imports: anywhere, or only at its top level."""
    tree = ast.parse((ROOT / path).read_text())
    nodes = [n for n in ast.walk(tree)] if not top else [n for n in tree.body]
    out = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            out |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            out |= {f"{module}.{alias.name}" for alias in node.names} if module == "rgdiff" else {module}
    return out


def unit(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_point_one_way(path):
    if str(path) == "__init__.py":
        assert not {name for name in imported(path, top=False) if name.startswith("rgdiff.")}
        return
    own = unit(path)
    assert own in RANK, f"{own} has no place in the listing"
    for name in imported(path, top=False):
        parts = name.split(".")
        if parts[0] != "rgdiff" or len(parts) == 1 or parts[1] == "__version__":
            continue
        assert parts[1] == own or RANK[parts[1]] < RANK[own], f"{path} imports {name}"


def test_the_vocabulary_imports_nothing_of_ours():
    for path in ("typing.py",):
        assert not {name for name in imported(Path(path), top=False) if name.startswith("rgdiff")}


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_heavy_packages_are_imported_inside_functions(path):
    """Only the reference networks, which are Linen modules, import Flax at their top."""
    allowed = {"flax"} if unit(path) == "nets" else set()
    assert {name.split(".")[0] for name in imported(path, top=True)} & HEAVY <= allowed


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
    code = "import sys, rgdiff; assert 'rgdiff.samplers' not in sys.modules; rgdiff.samplers.sample; print('ok')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent)
    assert run.stdout == "ok\n", run.stderr
    with pytest.raises(AttributeError, match="has no attribute 'sampler'"):
        rgdiff.sampler  # noqa: B018
