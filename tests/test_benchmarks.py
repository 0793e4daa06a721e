"""The PyTorch twins of the benchmarks do the same work: same samples, same gradients, from transplanted weights."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks import rows

pytest.importorskip("torch", reason="the twins need PyTorch, which the library never does: pip install torch")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(rows, "STEPS", 3)
    monkeypatch.setattr(rows, "BATCH", 2)
    monkeypatch.setattr(rows, "SIDE", 8)
    monkeypatch.setattr(rows, "CHANNELS", (8, 16))
    monkeypatch.setattr(rows, "CANDIDATES", 2)


CASES = (
    rows.Case("ancestral", "ancestral"),
    rows.Case("svdd", "svdd"),
    rows.Case("draft", "draft", live=2, remat=True),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.row)
def test_both_sides_agree(case):
    given = rows.Ours(case).export()
    assert rows.Torch(case, given, compiled=False, threads=1, mode=None).check() < 1e-5
    if case.row == "svdd":  # the winner's prediction, kept or computed again, is the same
        again = dataclasses.replace(case, reuse=False)
        assert rows.Torch(again, given, compiled=False, threads=1, mode=None).check() < 1e-5


def test_a_wrong_transplant_is_seen():
    case = CASES[0]
    given = rows.Ours(case).export()
    name = "params/mid_res0/norm1/bias"
    assert rows.Torch(case, given | {name: -given[name]}, compiled=False, threads=1, mode=None).check() > 1e-4
    with pytest.raises(ValueError, match="without a partner"):
        rows.Torch(case, {k: v for k, v in given.items() if k != name}, compiled=False, threads=1, mode=None)
