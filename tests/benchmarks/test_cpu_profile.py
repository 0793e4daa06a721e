"""Shares of a profile are of operations alone, kinds together, loops left out."""

from __future__ import annotations

from benchmarks.studies import cpu_profile


def test_shares():
    def ran(name, duration):
        return {"ph": "X", "dur": duration, "args": {"hlo_op": name}}

    events = [ran("dot.3", 2.0), ran("dot", 1.0), ran("copy.12", 1.0), ran("while.1", 9.0), {"ph": "M", "args": {}}]
    assert cpu_profile.shares(events) == {"dot": 0.75, "copy": 0.25}
