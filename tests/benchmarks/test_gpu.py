"""The GPU benchmark's twins are the networks that they stand for, and the script runs start to end at small size."""

from __future__ import annotations

import sys

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the other side of the benchmark is PyTorch: pip install torch")

from benchmarks.gpu import __main__ as script  # noqa: E402
from benchmarks.gpu import ours, theirs  # noqa: E402
from benchmarks.gpu.work import SMALL, WORK, calls_of, timed  # noqa: E402
from benchmarks.speed.measures import nested  # noqa: E402


@pytest.mark.parametrize("work", SMALL, ids=lambda work: work.kind)
def test_both_networks_are_the_same(work):
    given = ours.Side(work, jnp.float32).forward()
    net = theirs.loaded(work, nested(given))
    x = torch.tensor(np.moveaxis(given["x"], -1, 1).copy())
    with torch.no_grad():
        out = np.moveaxis(net(x, torch.full((2,), 0.3)).numpy(), 1, -1)
        theirs.adapted(net)  # leaves the function as it is
        again = np.moveaxis(net(x, torch.full((2,), 0.3)).numpy(), 1, -1)
    np.testing.assert_allclose(out, given["out"], rtol=2e-4, atol=2e-4 * np.abs(given["out"]).max())
    np.testing.assert_allclose(again, out, rtol=1e-5, atol=1e-5)


def test_a_round_of_steps_is_at_least_as_many_as_asked_where_time_allows():
    runs, waits = [], []
    times = timed(lambda: runs.append(1), lambda: waits.append(1), 20, 5.0, rounds=3)
    assert len(times) == 3 and len(runs) == 1 + 3 * 20 and len(waits) == 1 + 3
    assert all(row in work.rows and calls_of(row, work.calls) for work in WORK for row in work.rows)


@pytest.mark.slow
def test_the_script_runs_at_small_size(tmp_path, monkeypatch):
    arguments = ["gpu", "--small", "--sides", "ours,eager", "--seconds", "120", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    script.main()
    text = next(tmp_path.glob("gpu-*-small.md")).read_text()
    for work in SMALL:
        for row in work.rows:
            for side in ("rgdiff", "PyTorch eager"):
                assert f"| {work.name} | {row} | {side} |" in text, (work.name, row, side, text)
