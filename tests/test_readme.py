"""The README's examples run as printed and give what their comments say. Examples in docstrings: `pytest --doctest-modules rgdiff`."""

import re
from pathlib import Path

import numpy as np

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()


def test_library_examples(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in re.findall(r"```python\n(.*?)```", README, re.S):
        exec(compile(code, "README.md", "exec"), names)
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    prior, steered, tuned, asked = (np.fromstring(line.strip(" []"), sep=" ") for line in printed)
    assert np.abs(prior).max() < 0.06  # mean of N(0, I) from 4,096 samples, four standard errors
    assert abs(steered[0] - 1.7) < 0.08 and abs(steered[1]) < 0.08  # what the comment says
    assert np.abs(tuned - 0.95).max() < 0.15  # what the comment says, of a maximum at (1, 1)
    assert np.abs(asked - 0.6).max() < 0.3  # the same, from 96 answers
    assert (tmp_path / "runs" / "laboratory" / "campaigns").is_dir()
