"""The README's examples run as printed and give what their comments say; examples in docstrings are true."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import numpy as np
import pytest

import rgdiff

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()


def test_library_examples(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in re.findall(r"```python\n(.*?)```", README, re.S):
        exec(compile(code, "README.md", "exec"), names)
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    prior, steered, params, asked = (np.fromstring(line.strip(" []"), sep=" ") for line in printed)
    assert np.abs(prior).max() < 0.06  # mean of N(0, I) from 4,096 samples, four standard errors
    assert 1.5 < steered[0] < 2.1 and abs(steered[1]) < 0.08
    assert (params > 0.05).all()  # towards the reward's maximum at (1, 1)
    assert (asked > 0.2).all() and (asked < 1.2).all()  # the same, from 96 answers
    assert (tmp_path / "runs" / "laboratory" / "campaigns").is_dir()


MODULES = sorted(m.name for m in pkgutil.walk_packages(rgdiff.__path__, "rgdiff.") if not m.name.endswith("__main__"))


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
