"""The tutorials of `rgdiff.examples` run from their command line; what their prose says they assert themselves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import rgdiff

ROOT = Path(rgdiff.__file__).parents[1]
FILES = sorted(path for path in (ROOT / "rgdiff" / "examples").glob("*.py") if path.name != "__init__.py")


@pytest.mark.slow
@pytest.mark.parametrize("name", [path.stem for path in FILES])
def test_an_example_runs_as_its_first_lines_say(name, tmp_path):
    environment = {
        name: value for name, value in os.environ.items() if name != "XLA_FLAGS"
    }  # as a reader's, not as conftest's
    environment |= {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", f"rgdiff.examples.{name}"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=600)
    assert run.returncode == 0, run.stderr[-2000:]


def test_every_example_is_listed_and_says_how_it_is_run():
    listed = (ROOT / "rgdiff" / "docs" / "examples.md").read_text()
    assert FILES
    for path in FILES:
        text = path.read_text()
        assert f"Run it: `python -m rgdiff.examples.{path.stem}" in text and "def main(" in text, path.name
        assert f"[{path.stem}](../examples/{path.name})" in listed, path.name


def test_importing_rgdiff_does_not_import_the_examples():
    code = "import sys, rgdiff, rgdiff.samplers, rgdiff.tuners; assert not [m for m in sys.modules if m.startswith('rgdiff.examples')]"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
